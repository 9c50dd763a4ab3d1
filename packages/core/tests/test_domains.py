"""Tasks with inputs of their own, of which a batch brings some."""

import pytest
import torch
from sidetask_core import Batch, Combiner, Method, MissingKey, SplitModel, Step, Task, Weighting
from sidetask_core.testing import batches, close, gradients, in_two_processes, problem, squared
from torch import nn

NAMES = "abcde"
SPLITS = ("shared bottom", "half-shared")


def domains(names=NAMES):
    return [Task(name, squared, input=name) for name in names]


def drawn(batch, names, given=NAMES):
    """What a loop over sampled domains makes of a batch: inputs and labels of `names`, of the others neither."""
    inputs = {name: batch.inputs * (1 + NAMES.index(name)) for name in names}
    return Batch(inputs, {name: batch.targets[name] if name in names else None for name in given})


class Ones(Weighting):
    """Weights of one, after looking at whatever it was told to look at."""

    def __init__(self, tasks, read=lambda signals: None):
        super().__init__(tasks)
        self.read, self.seen = read, []

    def forward(self, signals):
        self.seen.append((self.read(signals), signals.labelled.tolist()))
        return torch.ones_like(signals.losses)


class Sum(Combiner):
    def forward(self, signals):
        return signals.gradients("parameters").sum(0)


METHODS = {
    "nothing": lambda tasks: Method(),
    "losses": lambda tasks: Method(encoder=Ones(tasks, lambda s: s.losses)),
    "norms": lambda tasks: Method(encoder=Ones(tasks, lambda s: s.norms("features"))),
    "gramian": lambda tasks: Method(encoder=Ones(tasks, lambda s: s.gramian("parameters"))),
    "progress": lambda tasks: Method(encoder=Ones(tasks, lambda s: s.progress())),
    "hindsight": lambda tasks: Method(encoder=Ones(tasks, lambda s: s.hindsight())),
    "lookahead": lambda tasks: Method(encoder=Ones(tasks, lambda s: s.lookahead(torch.ones_like(s.losses)))),
    "a combined gradient": lambda tasks: Method(encoder=Sum(tasks, at="parameters")),
}


def two_steps(names, split, method, share=slice(None)):
    """Gradients of two steps in a row, of which the second is on `names` alone, and what a rule saw there."""
    tasks = domains()
    model = problem(split, names=NAMES)
    method = method(tasks)
    step = Step(model, tasks, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second, probe = (
        Batch(b.inputs[share], {k: y[share] for k, y in b.targets.items()}) for b in batches(3, names=NAMES)
    )
    for batch, chosen in ((first, NAMES[:3]), (second, names)):
        optimizer.zero_grad()
        step.backward(drawn(batch, chosen), validation=drawn(probe, chosen), optimizer=optimizer)
    return gradients(model), getattr(method.encoder, "seen", [])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("names", ["bd", "e"])
def test_the_gradient_is_that_of_the_tasks_there_are(names, method, split):
    found, seen = two_steps(names, split, METHODS[method])
    tasks, model = domains(names), problem(split, names=NAMES)
    batch = drawn(batches(3, names=NAMES)[1], names)
    loss = sum(
        task.mean(model(batch.inputs[n], [n])[n], batch.targets[n])[0] for n, task in zip(names, tasks, strict=True)
    )
    loss.backward()
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        close(gradient, expected[name], name)
    if seen:
        read, labelled = seen[1]
        assert labelled == [name in names for name in NAMES]
        if isinstance(read, torch.Tensor):
            there = [name in (NAMES[:3] if method == "hindsight" else names) for name in NAMES]
            assert ((read if read.ndim == 1 else read.diagonal()) != 0).tolist() == there


def share(rank, world):
    """Every process brings a domain of its own; alone, one process brings both."""
    tasks, model = domains("ab"), problem(names="ab")
    names = "ab" if world == 1 else "ab"[rank]
    rule = Ones(tasks, lambda s: (s.gramian("parameters"), s.norms("features")))
    report = Step(model, tasks, Method(encoder=rule)).backward(drawn(batches(1)[0], names, "ab"))
    (((gramian, norms), labelled),) = rule.seen
    return gradients(model), [*report.losses.values()], gramian, norms, labelled


def test_two_processes_may_draw_different_domains():
    whole = share(0, 1)
    for part in in_two_processes(share):
        assert part[0].keys() == whole[0].keys()
        for name, gradient in whole[0].items():
            close(part[0][name], gradient, name)
        for found, expected in zip([*part[1], *part[2:4]], [*whole[1], *whole[2:4]], strict=True):
            close(found, expected, "signals")
        assert part[4] == [True, True]


class Counted(nn.Module):
    """Counts forward passes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.passes = inner, 0

    def forward(self, x):
        self.passes += 1
        return self.inner(x)


def test_what_a_step_on_two_domains_holds_does_not_depend_on_how_many_there_are():
    held = []
    for count in (5, 10, 20):
        names = [f"domain{i}" for i in range(count)]
        tasks = [Task(name, squared, input=name) for name in names]
        encoder = Counted(nn.Sequential(nn.Linear(4, 5), nn.Tanh()))
        heads = {name: Counted(nn.Linear(5, 2)) for name in names}
        chosen = [names[1], names[-1]]
        targets = dict.fromkeys(names) | {name: torch.randn(6, 2) for name in chosen}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            Step(SplitModel(encoder, heads), tasks).backward(Batch({n: torch.randn(6, 4) for n in chosen}, targets))
        assert encoder.passes == 2
        assert [name for name, head in heads.items() if head.passes] == chosen
        held.append(sum(saved))
    assert held[0] == held[1] == held[2] > 0


def test_what_is_needed_is_said():
    tasks, model = domains("ab"), problem(names="ab")
    step, (batch,) = Step(model, tasks), batches(1)
    with pytest.raises(MissingKey, match="task 'b' has no input 'b'; the batch has: a"):
        step.backward(Batch({"a": batch.inputs}, batch.targets))
    with pytest.raises(MissingKey, match="task 'b' has no target 'b'"):
        step.backward(Batch({"a": batch.inputs}, {"a": batch.targets["a"]}))
    with pytest.raises(ValueError, match="the batch has no input of any task; the tasks are: a, b"):
        step.backward(Batch({}, dict.fromkeys("ab")))
    for read in (lambda s: s.gradients("features"), lambda s: s.gramian("features"), lambda s: s.features()):
        step = Step(model, tasks, Method(encoder=Ones(tasks, read)))
        with pytest.raises(ValueError, match="cannot be compared between tasks with different inputs"):
            step.backward(drawn(batch, "a", "ab"))


class Scaled(nn.Module):
    """An encoder that treats the input of each domain in a way of its own."""

    reads_tasks = True

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.scale = nn.ParameterDict({name: nn.Parameter(torch.full((), 1.5 + i)) for i, name in enumerate(NAMES)})

    def forward(self, x, tasks):
        (name,) = tasks
        return self.inside(x * self.scale[name].to(x))


def scaled(split):
    model = problem(split, names=NAMES)
    model.shared = Scaled(model.shared)
    return model


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_is_told_who_reads(method, split):
    tasks, model = domains(), scaled(split)
    step = Step(model, tasks, METHODS[method](tasks))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for whole in batches(2, names=NAMES):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        batch = drawn(whole, NAMES)
        optimizer.zero_grad()
        step.backward(batch, validation=batch, optimizer=optimizer)
        hand = scaled(split)
        hand.load_state_dict(before, strict=False)
        hand.train()
        losses = [
            task.mean(hand(batch.inputs[n], [n])[n], batch.targets[n])[0] for n, task in zip(NAMES, tasks, strict=True)
        ]
        sum(losses).backward()
        expected = gradients(hand)
        assert any(name.startswith("shared.scale.") for name in expected)
        for name, gradient in gradients(model).items():
            close(gradient, expected[name], name)
        optimizer.step()


@pytest.mark.parametrize("split", SPLITS)
def test_who_reads_is_known_when_a_step_looks_ahead(split):
    found = []
    for mode in ("exact", "difference"):
        tasks, model = domains(), scaled(split)
        rule = Ones(tasks, lambda s, mode=mode: s.lookahead(torch.ones_like(s.losses), mode=mode))
        step = Step(model, tasks, Method(encoder=rule))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        one, probe = (drawn(batch, NAMES) for batch in batches(2, names=NAMES))
        step.backward(one, validation=probe, optimizer=optimizer)
        found.append(rule.seen[0][0])
    # A difference crosses kinks.
    torch.testing.assert_close(*found, rtol=0, atol=1e-3 * found[0].abs().max().item())
