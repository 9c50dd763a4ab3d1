"""What holds for every method, as tests."""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidetask_core.method import Combiner, Method
from sidetask_core.split import SplitModel
from sidetask_core.step import Step
from sidetask_core.task import Batch, Task
from sidetask_core.testing.problems import (
    SPLITS,
    backward,
    batches,
    brute_force,
    close,
    gradients,
    labelled,
    problem,
    squared,
    tiny_tasks,
    train,
)
from sidetask_core.testing.processes import in_two_processes

Factory = Callable[..., Method]


def conformance(
    factory: Factory,
    *,
    equivariant: bool = True,
    by_name: bool = False,
    splits: Sequence[str] = SPLITS,
    **options: Any,
) -> type:
    """A class of tests for pytest that hold for every method.

    Args:
        factory: the method's entry point, ``(tasks, **options) -> Method``; importable by name, since two
            processes run it too. The tasks are called a, b and c, and a is primary.
        equivariant: whether permuting the tasks permutes the weights. False for rules whose random draws depend on
            the order of the tasks: that test is then not among them.
        by_name: whether a state of other tasks, or of the same in another order, is taken over by their names. True for
            rules that allow tasks to come and go; other rules have to refuse it.
        splits: the networks that the method is for, of `SPLITS`; most tests take the first of them.
        options: passed on to `factory`.
    """
    build = functools.partial(factory, **options)

    class Conformance(_Conformance):
        method = staticmethod(build)
        networks = tuple(splits)

    if not equivariant:
        # What is not callable, pytest does not collect.
        Conformance.test_permuting_the_tasks_permutes_the_weights = None  # type: ignore[assignment, method-assign]
    if by_name:
        Conformance.test_state_of_other_tasks_is_refused = None  # type: ignore[assignment, method-assign]
    else:
        Conformance.test_state_of_other_tasks_is_taken_over_by_name = None  # type: ignore[assignment, method-assign]
    Conformance.__name__ = Conformance.__qualname__ = f"Conformance[{getattr(factory, '__name__', factory)}]"
    return Conformance


class _Conformance:
    """See `conformance`."""

    method: Factory
    networks: Sequence[str]

    def problem(self, **options: Any) -> SplitModel:
        """The first of the networks."""
        return problem(self.networks[0], **options)

    def test_gradients_are_the_reported_weights_times_the_task_gradients(self) -> None:
        for split in self.networks:
            tasks, model = tiny_tasks(), problem(split)
            step = Step(model, tasks, self.method(tasks))
            combined: list[Tensor] = []
            if isinstance(step.encoder, Combiner):
                step.encoder.register_forward_hook(lambda rule, given, output, seen=combined: seen.append(output))
            for batch in batches(5):
                step.zero_grad()
                # They learn in the step, after they have weighed it.
                shapers = copy.deepcopy(dict(step.shapers.items()))
                report = backward(step, batch)
                decoder = list(report.decoder_weights.values())
                encoder = list(report.encoder_weights.values()) or decoder
                expected = brute_force(step.model, step.tasks, batch, encoder, decoder, shapers)
                if isinstance(step.encoder, Combiner):
                    expected |= _by_hand(step.model, batch, step.encoder.at, combined[-1])
                found = gradients(step.model)
                for name in found:
                    close(found[name], expected[name], f"{split}: {name}", rtol=1e-10)
                assert any(found[name].any() for name in found if name.startswith("shared"))

    def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(self) -> None:
        data, tasks = batches(8), tiny_tasks()

        def start() -> tuple[Step, torch.optim.Optimizer]:
            step = Step(self.problem(norm=True), tasks, self.method(tasks))
            return step, torch.optim.Adam(step.parameters(), lr=0.01)

        whole, whole_optimizer = start()
        train(whole, data, whole_optimizer)
        half, half_optimizer = start()
        train(half, data[:5], half_optimizer)
        resumed, resumed_optimizer = start()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "state.pt"
            torch.save([half.state_dict(), half_optimizer.state_dict()], file)
            state, optimizer_state = torch.load(file, weights_only=True)
        resumed.load_state_dict(state)
        resumed_optimizer.load_state_dict(optimizer_state)
        train(resumed, data[5:], resumed_optimizer)
        for name, value in whole.state_dict().items():
            assert _same(value, resumed.state_dict()[name]), f"{name} differs after resuming"

    def test_state_of_other_tasks_is_refused(self) -> None:
        tasks = tiny_tasks()
        state = Step(self.problem(), tasks, self.method(tasks)).state_dict()
        other = Step(self.problem(), tasks[::-1], self.method(tasks[::-1]))
        if list(other.rules()):
            try:
                other.load_state_dict(state)
            except (ValueError, RuntimeError) as error:
                assert "a, b, c" in str(error)
            else:
                raise AssertionError("the state of tasks in another order was loaded")

    def test_state_of_other_tasks_is_taken_over_by_name(self) -> None:
        tasks, order = tiny_tasks(), [2, 0, 1]
        permuted = [tasks[i] for i in order]
        first = Step(self.problem(), tasks, self.method(tasks))
        train(first, batches(4))
        second = Step(self.problem(), permuted, self.method(permuted))
        second.load_state_dict(first.state_dict())
        last = batches(5)[4]
        for step in (first, second):
            step.zero_grad()
        reports = [backward(step, last) for step in (first, second)]
        for name, weight in reports[0].encoder_weights.items():
            close(reports[1].encoder_weights[name], weight, name)

    def test_a_task_without_labels_contributes_nothing(self) -> None:
        tasks, model = tiny_tasks(), self.problem()
        step = Step(model, tasks, self.method(tasks))
        for batch in batches(3):
            step.zero_grad()
            absent = torch.full_like(batch.targets["b"], math.nan)
            report = backward(step, Batch(batch.inputs, {**batch.targets, "b": absent}))
            assert report.losses["b"] == 0
            found = gradients(step)
            assert all(g.isfinite().all() for g in found.values())
            assert all((g == 0).all() for name, g in found.items() if name.startswith("model.heads.b"))
            shared = [g for name, g in found.items() if name.startswith("model.shared")]
            assert any(g.any() for g in shared), "the tasks that have labels do not train the encoder"
            step.zero_grad()
            assert backward(step, Batch(batch.inputs, {**batch.targets, "b": None})).losses["b"] == 0

    def test_extreme_loss_scales_stay_finite(self) -> None:
        for scale in (1e-6, 1e6):
            tasks = tiny_tasks()
            tasks[1] = Task("b", functools.partial(_scaled, scale), valid=labelled, primary=False)
            step = Step(self.problem(), tasks, self.method(tasks))
            for batch in batches(4):
                step.zero_grad()
                backward(step, batch)
                assert all(g.isfinite().all() for g in gradients(step).values())

    def test_single_precision_gives_the_same_gradients(self) -> None:
        steps = {}
        for dtype in (torch.float64, torch.float32):
            tasks = tiny_tasks()
            steps[dtype] = Step(self.problem(dtype=dtype), tasks, self.method(tasks)).to(dtype)
        for whole, single in zip(batches(3), batches(3, dtype=torch.float32), strict=True):
            expected, found = ({**gradients(s.model)} for s in _after(steps, whole, single))
            for name in found:
                torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-3, atol=1e-5)

    def test_batch_statistics_move_once_per_step(self) -> None:
        tasks, model = tiny_tasks(), self.problem(norm=True)
        step = Step(model, tasks, self.method(tasks))
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d))
        for count, batch in enumerate(batches(3), start=1):
            backward(step, batch)
            assert norm.num_batches_tracked == count

    def test_permuting_the_tasks_permutes_the_weights(self) -> None:
        order = [2, 0, 1]
        tasks = tiny_tasks()
        permuted = [tasks[i] for i in order]
        steps = [Step(self.problem(), some, self.method(some)) for some in (tasks, permuted)]
        for batch in batches(5):
            for step in steps:
                step.zero_grad()
                backward(step, batch)
            first, second = (gradients(step.model) for step in steps)
            for name, gradient in first.items():
                close(gradient, second[name], name)

    def test_two_processes_equal_one(self) -> None:
        whole = _run_share(self.method, self.networks, 0, 1)
        halves = in_two_processes(_run_share, self.method, self.networks)
        for half in halves:
            for name, value in whole.items():
                close(half[name], value, name)


def _after(steps: Mapping[torch.dtype, Step], whole: Batch, single: Batch) -> list[Step]:
    """The two steps, each after one batch in its precision."""
    for step, batch in zip(steps.values(), (whole, single), strict=True):
        step.zero_grad()
        backward(step, batch)
    return list(steps.values())


def _by_hand(model: SplitModel, batch: Batch, at: str, combined: Tensor) -> dict[str, Tensor]:
    """The shared parameters' gradients that a combined gradient stands for, by one plain backward pass."""
    names, shared = zip(*[(n, p) for n, p in model.named_parameters() if n.startswith("shared.")], strict=True)
    if at == "parameters":
        parts = combined.split([p.numel() for p in shared])
        return {name: part.view_as(p) for name, part, p in zip(names, parts, shared, strict=True)}
    features = model.encode(batch.inputs)
    return dict(zip(names, torch.autograd.grad(features, shared, combined.view_as(features)), strict=True))


def _run_share(build: Factory, networks: Sequence[str], rank: int, world: int) -> dict[str, Tensor]:
    """Train on one process's share of every batch; weights and gradients of every step."""
    tasks = tiny_tasks()
    found: dict[str, Tensor] = {}
    for split in networks:
        step = Step(problem(split), tasks, build(tasks))
        share = [
            Batch(b.inputs[rank::world], {name: y[rank::world] for name, y in b.targets.items()}) for b in batches(5)
        ]
        for report in train(step, share):
            key = f"{split}, iteration {step.iteration}, {len(found)}"
            found[key] = torch.stack([*report.losses.values(), *report.decoder_weights.values()])
            if report.encoder_weights:
                found[f"{key}, encoder"] = torch.stack([*report.encoder_weights.values()])
        found |= {f"{split}, {name}": g for name, g in gradients(step).items()}
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _scaled(scale: float, prediction: Tensor, target: Tensor) -> Tensor:
    return scale * squared(prediction, target)
