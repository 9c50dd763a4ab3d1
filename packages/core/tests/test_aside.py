"""Evaluations on the side leave the world as it was, and say what an update did."""

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
from sidetask_core import Batch, Equal, Method, SplitModel, Step, parallel
from sidetask_core.aside import aside
from sidetask_core.testing import batches, close, gradients, in_two_processes, problem, tiny_tasks, train
from torch import nn


class Watching(Equal):
    """Reads the progress in each n-th step."""

    def __init__(self, tasks, every=1):
        super().__init__(tasks)
        self.every, self.seen = every, []

    def forward(self, signals):
        if signals.iteration % self.every == 0:
            self.seen.append(signals.progress())
            assert signals.progress() is self.seen[-1]
        return super().forward(signals)


def stochastic():
    """A network with BatchNorm and dropout."""
    torch.manual_seed(3)
    shared = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh())
    return SplitModel(shared, {name: nn.Linear(6, 2) for name in "abc"}).double()


def watching(model=None, every=1):
    tasks = tiny_tasks()
    return Step(model or problem(norm=True), tasks, Method(encoder=Watching(tasks, every)))


def means(model, batch):
    predictions = model(batch.inputs)
    return torch.stack([(predictions[n] - y).square().mean() for n, y in batch.targets.items()]).detach()


def test_progress_is_the_last_batch_under_the_new_parameters():
    step, data = watching(), batches(3)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    expected = []
    for batch in data:
        optimizer.zero_grad()
        report = step.backward(batch)
        optimizer.step()
        before = torch.stack([*report.losses.values()])
        expected.append((before, aside(step.model, lambda model, batch=batch: means(model, batch))))
    assert step.encoder.seen[0] is None
    for found, (before, after) in zip(step.encoder.seen[1:], expected, strict=False):
        close(found.before, before, "before")
        close(found.after, after, "after")
        assert found.labelled.all()


def test_an_absent_task_makes_no_progress():
    step, (first, second) = watching(), batches(2)
    train(step, [Batch(first.inputs, {**first.targets, "b": None}), second])
    found = step.encoder.seen[1]
    assert found.labelled.tolist() == [True, False, True]
    assert found.after[1] == found.before[1] == 0


def test_a_look_aside_leaves_no_trace():
    plain, looking = (Step(stochastic(), tiny_tasks(), Method()), watching(stochastic()))
    states = []
    for step in (plain, looking):
        torch.manual_seed(7)
        train(step, batches(4))
        states.append([torch.get_rng_state(), *step.model.state_dict().values()])
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)
    assert looking.encoder.seen[1] is not None


def test_a_look_aside_that_raises_leaves_no_trace():
    model = stochastic()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()

    def fail(net):
        net(torch.randn(5, 4, dtype=torch.float64))
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        aside(model, fail, {"shared.0.weight": torch.ones(6, 4, dtype=torch.float64)})
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert isinstance(model.shared[0].weight, nn.Parameter)


def test_other_parameters_take_their_place_and_get_gradients():
    model, x = problem(), batches(1)[0].inputs
    weight = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    found = aside(model, lambda net: net(x)["a"].sum(), {"shared.0.0.weight": weight})
    (gradient,) = torch.autograd.grad(found, [weight])
    with torch.no_grad():
        model.shared[0][0].weight.zero_()
    expected = model(x)["a"].sum()
    close(found.detach(), expected.detach(), "value")
    close(gradient, torch.autograd.grad(expected, [model.shared[0][0].weight])[0], "gradient")


class Twice(nn.Module):
    """One BatchNorm in two places of the encoder, one buffer that a forward pass makes, one that it fills."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.again = nn.Sequential(self.norm, nn.Linear(6, 6), self.norm)
        self.register_buffer("filled", None)

    def forward(self, x):
        self.filled = x.detach().mean()
        self.register_buffer("made", x.detach().sum())
        return torch.tanh(self.again(self.norm(self.first(x))))


def test_modules_in_several_places_are_restored():
    torch.manual_seed(0)
    encoder = Twice()
    head = nn.Sequential(encoder.norm, nn.Linear(6, 2))
    model = SplitModel(encoder, {"a": head, "b": nn.Linear(6, 2)}).double()
    parameters, names = list(model.parameters()), [*dict(model.named_buffers())]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    other = torch.full((6,), 7.0, dtype=torch.float64)
    aside(model, lambda net: net(batches(1)[0].inputs), {"shared.norm.weight": other})
    assert all(x is y for x, y in zip(parameters, model.parameters(), strict=True))
    assert [*dict(model.named_buffers())] == names
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name
    assert encoder.filled is None
    assert not hasattr(encoder, "made")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_run_with_the_other_parameters(kind):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind(1, 5, batch_first=True)

        def forward(self, x):
            return self.layer(x[..., None])[0][:, -1]

    torch.manual_seed(0)
    model, x = SplitModel(Last(), {"a": nn.Linear(5, 2)}).double(), batches(1)[0].inputs
    before, weight = model(x)["a"], torch.randn(*model.shared.layer.weight_hh_l0.shape, dtype=torch.float64)
    found = aside(model, lambda net: net(x)["a"], {"shared.layer.weight_hh_l0": weight})
    assert torch.equal(model(x)["a"], before)
    with torch.no_grad():
        model.shared.layer.weight_hh_l0.copy_(weight)
    assert torch.equal(found, model(x)["a"])
    assert not torch.equal(found, before)


def test_the_training_graph_survives_a_look_aside():
    """BatchNorm's statistics are inputs of its backward pass."""
    found = []
    for look in (False, True):
        model, x = stochastic(), batches(1)[0].inputs
        torch.manual_seed(0)
        loss = model(x)["a"].square().sum()
        if look:
            aside(model, lambda net, x=x: net(x))
        loss.backward()
        found.append(gradients(model))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


def test_compiled_modules_run_as_written():
    model = problem()
    x = batches(1)[0].inputs
    model.shared[0].compile(backend="eager")
    assert torch.equal(aside(model, lambda net: net(x)["a"]), problem()(x)["a"])


def test_nothing_is_kept_unless_it_was_asked_for():
    def kept(step):
        (batch,) = batches(1)
        watch = weakref.ref(batch.inputs)
        step.backward(batch)
        del batch
        gc.collect()
        return watch() is not None, step._memory.past is not None

    assert kept(Step(problem(), tiny_tasks(), Method())) == (False, False)
    # Of a batch that was asked for there is a copy.
    assert kept(watching()) == (False, True)


def test_without_an_update_nothing_has_changed_whatever_dropout_draws():
    step = watching(stochastic())
    for batch in batches(3):
        step.backward(batch)
    for found in step.encoder.seen[1:]:
        assert torch.equal(found.after, found.before)


def test_a_report_is_the_callers_own():
    tasks = tiny_tasks()
    rule = Equal(tasks)
    step = Step(problem(), tasks, Method(encoder=rule))
    report = step.backward(batches(1)[0])
    for values in (report.losses, report.encoder_weights, report.decoder_weights):
        for value in values.values():
            value += 1
    assert rule.weights.tolist() == [1, 1, 1]
    watched = watching()
    first, second = batches(2)
    report = watched.backward(first)
    before = report.losses["a"].clone()
    report.losses["a"] += 5
    watched.backward(second)
    assert watched.encoder.seen[1].before[0] == before


class Inputs(NamedTuple):
    x: torch.Tensor


def test_inputs_that_cannot_be_read_back_safely_are_not_saved(tmp_path):
    class Unpack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 5)

        def forward(self, inputs):
            return self.layer(inputs.x)

    model = SplitModel(Unpack(), {n: nn.Linear(5, 2) for n in "abc"}).double()
    step, (batch,) = watching(model), batches(1)
    step.backward(Batch(Inputs(batch.inputs), batch.targets))
    step.backward(Batch(Inputs(batch.inputs), batch.targets))
    assert step.encoder.seen[1] is not None
    torch.save(step.state_dict(), tmp_path / "state.pt")
    step.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    step.backward(Batch(Inputs(batch.inputs), batch.targets))
    assert step.encoder.seen[2] is None


def test_the_caller_may_reuse_a_batchs_memory():
    (first, second), step = batches(2), watching()
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    step.backward(first)
    expected = aside(step.model, lambda model: means(model, first))
    first.inputs.zero_()
    optimizer.zero_grad()
    step.backward(second)
    close(step.encoder.seen[1].after, expected, "after")


def test_a_failed_step_leaves_no_progress():
    step, (first, second) = watching(), batches(2)
    step.backward(first)
    with pytest.raises(ArithmeticError):
        step.backward(Batch(first.inputs * float("nan"), first.targets))
    step.backward(second)
    assert step.encoder.seen[-1] is None


def progress_of_share(rank, world):
    step = watching(problem())
    train(step, [Batch(b.inputs[rank::world], {k: y[rank::world] for k, y in b.targets.items()}) for b in batches(3)])
    state = step.state_dict()
    if world > 1 and rank == 1:
        # Process 0 saved, everyone loads: this one's batch is not among it.
        state["_extra_state"]["memory"]["rank"] = 0
    step.load_state_dict(state)
    step.backward(batches(1)[0])
    found = step.encoder.seen
    assert found[0] is None
    assert (found[3] is None) == (parallel.world() > 1)
    return {"before": found[2].before, "after": found[2].after}


def test_progress_is_that_of_all_processes():
    whole = progress_of_share(0, 1)
    for half in in_two_processes(progress_of_share):
        for name, value in whole.items():
            close(half[name], value, name)


@pytest.mark.parametrize("every", [1, 3])
def test_progress_survives_a_resume(tmp_path, every):
    def go(step, data):
        # Without momentum, an optimizer has no state to resume.
        train(step, data, torch.optim.SGD(step.parameters(), lr=0.1))

    data = batches(4)
    whole = watching(every=every)
    go(whole, data)
    half = watching(every=every)
    go(half, data[:2])
    torch.save(half.state_dict(), tmp_path / "state.pt")
    resumed = watching(every=every)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    go(resumed, data[2:])
    assert torch.equal(resumed.encoder.seen[-1].after, whole.encoder.seen[-1].after)


def test_progress_under_autocast():
    step, data = watching(problem(dtype=torch.float32)), batches(2, dtype=torch.float32)
    for batch in data:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step.backward(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = means(step.model, data[0])
    # No update was made: it is the same network in the same precision.
    assert torch.equal(step.encoder.seen[1].after, step.encoder.seen[1].before)
    torch.testing.assert_close(step.encoder.seen[1].after, expected.float(), rtol=1e-2, atol=1e-3)
