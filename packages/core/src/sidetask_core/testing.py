"""The checks that every method must pass, for the author of one.

In a pytest file of your package, one line:

    from sidetask_core.testing import conformance
    from my_package import my_method

    TestMyMethod = conformance(my_method)

`problem` gives the tiny networks these checks run on, and `brute_force` the gradients they compare with.
"""

from __future__ import annotations

import atexit
import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sidetask_core.method import Combiner, Method
from sidetask_core.split import SplitModel
from sidetask_core.step import Report, Step
from sidetask_core.task import Batch, Task

Factory = Callable[..., Method]
NAMES = ("a", "b", "c")
SPLITS = ("shared bottom", "half-shared", "two heads on one branch")


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Element losses of the tiny problems."""
    return (prediction - target).square()


def _scaled(scale: float, prediction: Tensor, target: Tensor) -> Tensor:
    return scale * squared(prediction, target)


def labelled(target: Tensor) -> Tensor:
    """Labels of the tiny problems are missing where they are NaN."""
    return ~target.isnan()


def tiny_tasks(names: Sequence[str] = NAMES) -> list[Task]:
    """One regression task for each name, the first of them primary."""
    return [Task(name, squared, valid=labelled, primary=i == 0) for i, name in enumerate(names)]


def problem(
    split: str = "shared bottom",
    *,
    names: Sequence[str] = NAMES,
    norm: bool = False,
    dtype: torch.dtype = torch.float64,
) -> SplitModel:
    """A tiny network, always the same.

    Args:
        split: one of `SPLITS`.
        names: the tasks.
        norm: put a BatchNorm into the shared layers.
        dtype: of the parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first: list[nn.Module] = [nn.Linear(4, 6), nn.Tanh()]
        if norm:
            first.insert(1, nn.BatchNorm1d(6))
        stages = [nn.Sequential(*first), nn.Sequential(nn.Linear(6, 5), nn.Tanh())]
        heads = {name: nn.Linear(5, 2) for name in names}
        if split == "two heads on one branch":
            other = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
            route = {name: "both" if i < 2 else "other" for i, name in enumerate(names)}
            branches = {"both": stages[1]} | ({"other": other} if len(names) > 2 else {})
            model = SplitModel(stages[0], heads, branches, route)
        else:
            model = SplitModel.from_stages(stages, 2 if split == "shared bottom" else 1, heads)
    return model.to(dtype)


def batches(
    count: int, size: int = 6, *, names: Sequence[str] = NAMES, dtype: torch.dtype = torch.float64
) -> list[Batch]:
    """Random batches, always the same."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [Batch(draw(size, 4), {name: draw(size, 2) for name in names}) for _ in range(count)]


def brute_force(
    model: SplitModel,
    tasks: Sequence[Task],
    batch: Batch,
    encoder: Sequence[Tensor],
    decoder: Sequence[Tensor],
    shapers: Mapping[str, nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Gradients by one `torch.autograd.grad` per task over an uncut graph, weighted by hand.

    Args:
        model: the network.
        tasks: the tasks, in the order of the weights.
        batch: what to run it on.
        encoder: weights of the tasks for shared parameters.
        decoder: weights of the tasks for their own parameters.
        shapers: task name to what weighs its elements.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    shared = {id(p) for p in model.shared_parameters()}
    total = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
    for task, above, below in zip(tasks, encoder, decoder, strict=True):
        prediction = model(batch.input_of(task))[task.name]
        target = batch.target_of(task)
        elements = task.elements(prediction, target)
        each = dict(zip(task.objectives or [""], (losses.detach() for losses, _ in elements), strict=True))
        weights = dict.fromkeys(each, 1.0)
        if shapers and task.name in shapers:
            found = shapers[task.name](each if task.objectives else each[""], target)
            weights = found if task.objectives else {"": found}
        loss = torch.zeros((), dtype=elements[0][0].dtype)
        for name, (losses, mask) in zip(each, elements, strict=True):
            shaped = losses * weights[name]
            mask = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
            loss = loss + shaped[mask].sum() / mask.sum().clamp(min=1)
        for key, p, g in zip(names, parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if g is not None:
                total[key] += g * (above if id(p) in shared else below).to(g)
    return total


def close(found: Tensor, expected: Tensor, what: str, rtol: float = 1e-9) -> None:
    """Assert that two tensors agree to `rtol`, and say which they are if they do not."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12, msg=lambda text: f"{what}: {text}")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's `.grad`, zeros where it is None."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def train(step: Step, data: Sequence[Batch], optimizer: torch.optim.Optimizer | None = None) -> list[Report]:
    """A plain training loop over `data`, two batches to the epoch."""
    optimizer = optimizer or torch.optim.SGD(step.parameters(), lr=0.05, momentum=0.9)
    reports = []
    for batch in data:
        optimizer.zero_grad()
        reports.append(backward(step, batch, optimizer))
        optimizer.step()
    return reports


def backward(step: Step, batch: Batch, optimizer: torch.optim.Optimizer | None = None) -> Report:
    """A step with all that a method may ask for, two batches to the epoch; gradients are zero before."""
    step.epoch = step.iteration // 2
    half = Batch(batch.inputs.flip(1), {name: None if y is None else -y for name, y in batch.targets.items()})
    optimizer = optimizer or torch.optim.SGD(step.parameters(), lr=0.05)
    return step.backward(batch, validation=half, optimizer=optimizer)


def conformance(factory: Factory, *, equivariant: bool = True, by_name: bool = False, **options: Any) -> type:
    """A class of tests for pytest that hold for every method.

    Args:
        factory: the method's entry point, ``(tasks, **options) -> Method``; importable by name, since two
            processes run it too. The tasks are called a, b and c, and a is primary.
        equivariant: whether permuting the tasks permutes the weights. False for rules whose random draws depend on
            the order of the tasks: that test is then not among them.
        by_name: whether a state of other tasks, or of the same in another order, is taken over by their names. True for
            rules that allow tasks to come and go; other rules have to refuse it.
        options: passed on to `factory`.
    """
    build = functools.partial(factory, **options)

    class Conformance(_Conformance):
        method = staticmethod(build)

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

    def test_gradients_are_the_reported_weights_times_the_task_gradients(self) -> None:
        for split in SPLITS:
            tasks, model = tiny_tasks(), problem(split)
            step = Step(model, tasks, self.method(tasks))
            combined: list[Tensor] = []
            if isinstance(step.encoder, Combiner):
                step.encoder.register_forward_hook(lambda rule, given, output, seen=combined: seen.append(output))
            for batch in batches(5):
                step.zero_grad()
                report = backward(step, batch)
                decoder = list(report.decoder_weights.values())
                encoder = list(report.encoder_weights.values()) or decoder
                expected = brute_force(step.model, step.tasks, batch, encoder, decoder, dict(step.shapers.items()))
                if isinstance(step.encoder, Combiner):
                    expected |= _by_hand(step.model, batch, step.encoder.at, combined[-1])
                found = gradients(step.model)
                for name in found:
                    close(found[name], expected[name], f"{split}: {name}", rtol=1e-10)
                assert any(found[name].any() for name in found if name.startswith("shared"))

    def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(self) -> None:
        data, tasks = batches(8), tiny_tasks()

        def start() -> tuple[Step, torch.optim.Optimizer]:
            step = Step(problem(norm=True), tasks, self.method(tasks))
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
        state = Step(problem(), tasks, self.method(tasks)).state_dict()
        other = Step(problem(), tasks[::-1], self.method(tasks[::-1]))
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
        first = Step(problem(), tasks, self.method(tasks))
        train(first, batches(4))
        second = Step(problem(), permuted, self.method(permuted))
        second.load_state_dict(first.state_dict())
        last = batches(5)[4]
        for step in (first, second):
            step.zero_grad()
        reports = [backward(step, last) for step in (first, second)]
        for name, weight in reports[0].encoder_weights.items():
            close(reports[1].encoder_weights[name], weight, name)

    def test_a_task_without_labels_contributes_nothing(self) -> None:
        tasks, model = tiny_tasks(), problem()
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
            step = Step(problem(), tasks, self.method(tasks))
            for batch in batches(4):
                step.zero_grad()
                backward(step, batch)
                assert all(g.isfinite().all() for g in gradients(step).values())

    def test_single_precision_gives_the_same_gradients(self) -> None:
        steps = {}
        for dtype in (torch.float64, torch.float32):
            tasks = tiny_tasks()
            steps[dtype] = Step(problem(dtype=dtype), tasks, self.method(tasks)).to(dtype)
        for whole, single in zip(batches(3), batches(3, dtype=torch.float32), strict=True):
            expected, found = ({**gradients(s.model)} for s in _after(steps, whole, single))
            for name in found:
                torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-3, atol=1e-5)

    def test_batch_statistics_move_once_per_step(self) -> None:
        tasks, model = tiny_tasks(), problem(norm=True)
        step = Step(model, tasks, self.method(tasks))
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d))
        for count, batch in enumerate(batches(3), start=1):
            backward(step, batch)
            assert norm.num_batches_tracked == count

    def test_permuting_the_tasks_permutes_the_weights(self) -> None:
        order = [2, 0, 1]
        tasks = tiny_tasks()
        permuted = [tasks[i] for i in order]
        steps = [Step(problem(), some, self.method(some)) for some in (tasks, permuted)]
        for batch in batches(5):
            for step in steps:
                step.zero_grad()
                backward(step, batch)
            first, second = (gradients(step.model) for step in steps)
            for name, gradient in first.items():
                close(gradient, second[name], name)

    def test_two_processes_equal_one(self) -> None:
        whole = _run_share(self.method, 0, 1)
        halves = in_two_processes(_run_share, self.method)
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


def _run_share(build: Factory, rank: int, world: int) -> dict[str, Tensor]:
    """Train on one process's share of every batch; weights and gradients of every step."""
    tasks = tiny_tasks()
    found: dict[str, Tensor] = {}
    for split in SPLITS:
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


def in_two_processes(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments, rank, world)`` in each of two gloo processes, which live as long as this one.

    Function and arguments have to be importable by name.
    """
    pool = _pair()
    futures = [pool.submit(_ranked, function, arguments) for _ in range(2)]
    done, _ = wait(futures, timeout=300, return_when=FIRST_EXCEPTION)
    if len(done) == 2 and not any(future.exception() for future in done):
        return [future.result() for future in futures]
    # A process that waits for one which failed cannot be asked to stop; the next call gets a new pair.
    _pair.cache_clear()
    for process in list(pool._processes.values()):
        process.kill()
    for future in done:
        future.result()
    raise TimeoutError(f"{getattr(function, '__name__', function)} did not end in two processes")


@functools.cache
def _pair() -> ProcessPoolExecutor:
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    context = get_context("spawn")
    pool = ProcessPoolExecutor(2, context, _join, (str(Path(folder.name, "store")), context.Value("i", 0)))

    def close() -> None:
        pool.shutdown()
        folder.cleanup()

    atexit.register(close)
    return pool


def _join(store: str, counter: Any) -> None:
    with counter.get_lock():
        rank = counter.value
        counter.value += 1
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def _ranked(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments, dist.get_rank(), dist.get_world_size())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
