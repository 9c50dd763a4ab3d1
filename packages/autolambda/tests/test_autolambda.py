"""Auto-λ against a loop that differentiates through the network's step, and what λ does in it."""

import copy
import functools
import math

import pytest
import torch
from sidetask_autolambda import AutoLambda
from sidetask_autolambda.autolambda import autolambda
from sidetask_core import Batch, Method, SplitModel, Step, Task, Weighting
from sidetask_core.testing import (
    SPLITS,
    batches,
    brute_force,
    close,
    conformance,
    gradients,
    in_two_processes,
    problem,
    squared,
    tiny_tasks,
)
from torch import nn
from torch.func import functional_call

TestAutoLambda = conformance(autolambda, by_name=True)
TestAfter = conformance(autolambda, by_name=True, when="after")
TestOnline = conformance(autolambda, by_name=True, when="online")
TestEverySecond = conformance(autolambda, by_name=True, every=2)
TestSoftmax = conformance(autolambda, by_name=True, constraint="softmax")
TestDifference = conformance(autolambda, by_name=True, mode="difference")
# How far a difference reaches is rounded otherwise in two processes, see below.
TestDifference.test_two_processes_equal_one = None
TestSampling = conformance(autolambda, by_name=True, equivariant=False, sample=2)
# Which tasks are drawn depends on their order.
TestSampling.test_state_of_other_tasks_is_taken_over_by_name = None

# Far from the paper's, so that λ moves by much in few steps.
LR = 0.05
# Of the network.
RATE = 0.1
WHENS = ("before", "after", "online")


def losses_at(model, tasks, batch, parameters):
    """Each task's loss at other parameters."""
    found = []
    for task in tasks:
        prediction = functional_call(model, parameters, (batch.input_of(task), [task.name]))[task.name]
        ((losses, mask),) = task.elements(prediction, batch.target_of(task))
        mask = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
        found.append(losses[mask].sum() / mask.sum().clamp(min=1))
    return found


def by_hand(
    model,
    tasks,
    data,
    validation,
    *,
    when="before",
    every=1,
    constraint=None,
    weight_decay=0.0,
    init=0.1,
    shared_only=False,
    decoder=None,
):
    """λ and the network's parameters after every step, by autograd through plain SGD and by torch's Adam."""
    start = 0.0 if constraint == "softmax" else init
    raw = torch.full((len(tasks),), start, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=LR, weight_decay=weight_decay)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    above = {name for name, p in model.named_parameters() if any(p is q for q in model.shared_parameters())}
    primaries = [task for task in tasks if task.primary]

    def lambdas():
        return len(tasks) * raw.softmax(0) if constraint == "softmax" else raw * 1

    def after(parameters, slopes, weights):
        """The parameters after a step, differentiable in the weights of those that λ weighs."""
        moved = {}
        for name, p in parameters.items():
            mine = weights if name in above or not shared_only else decoder
            moved[name] = p - RATE * sum(w * s[name] for w, s in zip(mine, slopes, strict=True) if s[name] is not None)
        return moved

    def learn(parameters, slopes, batch):
        weights = lambdas()
        moved = after(parameters, slopes, weights)
        if shared_only and when != "online":
            # A look ahead moves what λ weighs; in hindsight, all has moved.
            moved = {name: p if name in above else parameters[name] for name, p in moved.items()}
        adam.zero_grad()
        sum(losses_at(model, primaries, batch, moved)).backward()
        adam.step()
        with torch.no_grad():
            if constraint == "nonnegative":
                raw.clamp_(min=0)
            elif constraint == "softmax":
                raw.sub_(raw.exp().mean().log())
            elif constraint is not None:
                raw.clamp_(*constraint)

    path, last = [], None
    for iteration, (batch, probe) in enumerate(zip(data, validation, strict=True)):
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        slopes = []
        for loss in losses_at(model, tasks, batch, leaves):
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            slopes.append(dict(zip(leaves, found, strict=True)))
        old = lambdas().detach()
        if iteration % every == 0:
            if when == "online":
                if last is not None:
                    learn(*last, batch)
            else:
                learn(parameters, slopes, probe)
        used = old if when == "after" else lambdas().detach()
        last = (parameters, slopes)
        parameters = after(parameters, slopes, used)
        path.append((used, lambdas().detach(), parameters))
    return path


def run(model, tasks, data, validation, method):
    """λ and the network's parameters after every step."""
    step = Step(model, tasks, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    path = []
    for batch, probe in zip(data, validation, strict=True):
        optimizer.zero_grad()
        report = step.backward(batch, validation=probe, optimizer=optimizer)
        optimizer.step()
        used = torch.stack([*report.encoder_weights.values()])
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        path.append((used, method.encoder.weights.clone(), parameters))
    return path


def same(found, expected, rtol=1e-8):
    for i, ((used, weights, parameters), (used_there, weights_there, there)) in enumerate(
        zip(found, expected, strict=True)
    ):
        close(used, used_there, f"weights of step {i}", rtol=rtol)
        close(weights, weights_there, f"λ after step {i}", rtol=rtol)
        for name, p in parameters.items():
            close(p, there[name], f"{name} after step {i}", rtol=rtol)


def one_step(rule, tasks=None, model=None, *, scaler=None, probe=None, train=None):
    """One step of a method with this rule in both slots."""
    first, second = batches(2)
    model = problem() if model is None else model
    step = Step(model, tiny_tasks() if tasks is None else tasks, Method(encoder=rule, decoder=rule))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    given = {"validation": probe or second, "optimizer": optimizer, "scaler": scaler}
    return step.backward(train or first, **given)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"every": 2},
        {"constraint": "softmax"},
        {"constraint": "softmax", "weight_decay": 0.1},
        {"constraint": "nonnegative", "weight_decay": 0.01},
        {"constraint": (0.05, 0.2)},
        {"init": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("when", WHENS)
def test_training_is_that_of_the_written_out_loop(when, options):
    tasks, data = tiny_tasks(), batches(12)
    expected = by_hand(problem(), tasks, data[:6], data[6:], when=when, **options)
    found = run(problem(), tasks, data[:6], data[6:], autolambda(tasks, lr=LR, when=when, **options))
    same(found, expected)
    assert (expected[-1][1] - expected[0][0]).abs().max() > 1e-2, "λ did not move"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("when", WHENS)
def test_of_every_network(when, split):
    tasks, data = tiny_tasks(), batches(8)
    tasks[2] = Task("c", squared)
    expected = by_hand(problem(split), tasks, data[:4], data[4:], when=when)
    same(run(problem(split), tasks, data[:4], data[4:], autolambda(tasks, lr=LR, when=when)), expected)


class Learned(Weighting):
    """A rule whose weights the user's optimizer trains, as uncertainty weighting does."""

    def __init__(self, tasks):
        super().__init__(tasks)
        self.logs = nn.Parameter(torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64))

    def forward(self, signals):
        return self.logs.exp()

    def objective(self, signals):
        return (self.logs.exp() * signals.losses - self.logs).sum()


@pytest.mark.parametrize("when", WHENS)
def test_beside_another_decoder_rule_only_shared_parameters_take_part(when):
    tasks, data = tiny_tasks(), batches(8)
    other = Learned(tasks)
    expected = by_hand(
        problem("half-shared"),
        tasks,
        data[:4],
        data[4:],
        when=when,
        shared_only=True,
        decoder=other.logs.detach().exp(),
    )
    method = Method(encoder=AutoLambda(tasks, lr=LR, when=when), decoder=other)
    # Its own parameters stay: the optimizer of `run` has only the network's.
    same(run(problem("half-shared"), tasks, data[:4], data[4:], method), expected)
    assert other.logs.grad.abs().min() > 0


@pytest.mark.parametrize("when", WHENS)
def test_tasks_with_inputs_of_their_own(when):
    tasks = [Task(n, squared, input=n, primary=n != "c") for n in "abc"]
    data = [Batch({n: b.inputs * (1 + i) for i, n in enumerate("abc")}, b.targets) for b in batches(8)]
    expected = by_hand(problem("half-shared"), tasks, data[:4], data[4:], when=when)
    same(run(problem("half-shared"), tasks, data[:4], data[4:], autolambda(tasks, lr=LR, when=when)), expected)


class Counted(nn.Module):
    """Counts forward and backward passes."""

    def __init__(self, inner, counts, kind):
        super().__init__()
        self.inner, self.counts, self.kind = inner, counts, kind

    def forward(self, x):
        self.counts[self.kind, "forward"] += 1
        out = self.inner(x)
        if out.requires_grad:
            out.register_hook(
                lambda g: self.counts.update({(self.kind, "backward"): self.counts[self.kind, "backward"] + 1})
            )
        return out

    def __deepcopy__(self, memo):
        raise AssertionError("the network is not to be copied")


@pytest.mark.parametrize(
    ("options", "encoder", "heads"),
    [
        ({}, (3, 3), (4, 4)),
        ({"when": "after"}, (3, 2), (4, 4)),
        ({"when": "online"}, (2, 2), (3, 3)),
        ({"every": 3}, (1, 1), (3, 3)),
        ({"mode": "difference"}, (4, 3), (4, 4)),
        ({"mode": "one-sided", "when": "after"}, (3, 2), (4, 4)),
        ({"mode": "one-sided", "when": "online"}, (2, 2), (3, 3)),
    ],
    ids=str,
)
def test_what_a_step_costs(options, encoder, heads):
    """Forward and backward passes of the encoder, and of all heads together; one of the three tasks is primary."""
    tasks, plain = tiny_tasks(), problem()
    counts = {(kind, way): 0 for kind in ("encoder", "head") for way in ("forward", "backward")}
    model = SplitModel(
        Counted(plain.shared, counts, "encoder"), {n: Counted(h, counts, "head") for n, h in plain.heads.items()}
    )
    step = Step(model, tasks, autolambda(tasks, **options))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for batch, probe in zip(batches(2), batches(4)[2:], strict=True):
        counts.update(dict.fromkeys(counts, 0))
        step.backward(batch, validation=probe, optimizer=optimizer)
    assert tuple(counts["encoder", way] for way in ("forward", "backward")) == encoder
    assert tuple(counts["head", way] for way in ("forward", "backward")) == heads


def test_other_steps_need_no_validation_batch():
    tasks, (first, second) = tiny_tasks(), batches(2)
    model = problem()
    step = Step(model, tasks, autolambda(tasks, every=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    step.backward(first, validation=second, optimizer=optimizer)
    step.backward(first)
    with pytest.raises(ValueError, match=r"needs step.backward\(batch, validation="):
        step.backward(first)


def moments(rule):
    return torch.stack([rule.weights, rule.adam.first, rule.adam.second, rule.adam.updates])


@pytest.mark.parametrize("options", [{}, {"constraint": "nonnegative", "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("when", WHENS)
@pytest.mark.thorough
def test_a_sample_learns_as_all_do_and_the_others_keep_what_they_have(when, options):
    tasks, data = tiny_tasks("abcde"), batches(8, names="abcde")
    drawn = set()
    for seed in range(10):
        found = []
        for sample in (None, 2):
            model = problem(names="abcde")
            rule = AutoLambda(tasks, lr=LR, when=when, **options)
            step = Step(model, tasks, Method(encoder=rule))
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            for i, (batch, probe) in enumerate(zip(data[:4], data[4:], strict=True)):
                if i == 3:
                    # What all have learned is the same until here.
                    before, rule.sample = moments(rule), sample
                    rule.generator.manual_seed(seed)
                optimizer.zero_grad()
                step.backward(batch, validation=probe, optimizer=optimizer)
                optimizer.step()
            found.append(moments(rule))
        whole, some = found
        changed = (some != before).any(dim=0)
        assert changed.sum() == 2
        assert torch.equal(some[:, ~changed], before[:, ~changed])
        close(some[:, changed], whole[:, changed], "those drawn", rtol=1e-9)
        drawn |= {*changed.nonzero().flatten().tolist()}
    assert drawn == set(range(5))


def test_every_task_is_drawn_as_often_as_any():
    class Recording:
        def __init__(self, tasks):
            self.tasks, self.losses = tasks, torch.zeros(len(tasks), dtype=torch.float64)
            self.iteration, self.drawn = 0, []

        def lookahead(self, weights, *, mode, among, taken):
            self.drawn.append(tuple(among))
            return torch.zeros_like(weights)

    rule = AutoLambda(tiny_tasks("abcde"), sample=2, seed=3)
    signals = Recording(rule.tasks)
    for _ in range(2000):
        rule(signals)
    assert all(len(set(pair)) == 2 for pair in signals.drawn)
    often = torch.tensor([sum(name in pair for pair in signals.drawn) for name in rule.tasks]) / 2000
    # Five standard deviations of a share of 2 in 5.
    assert (often - 0.4).abs().max() < 5 * math.sqrt(0.4 * 0.6 / 2000)


def test_only_inputs_of_drawn_tasks_are_encoded_again():
    tasks = [Task(n, squared, input=n) for n in "abc"]
    data = [
        Batch(dict.fromkeys("abc", b.inputs) | {n: b.inputs + i for i, n in enumerate("abc")}, b.targets)
        for b in batches(2)
    ]
    counts = []
    for sample in (1, 2, None):
        model, encoded = problem(), []
        model.shared.register_forward_hook(lambda *_, seen=encoded: seen.append(1))
        one_step(AutoLambda(tasks, sample=sample), tasks, model, train=data[0], probe=data[1])
        counts.append(len(encoded))
    # Training and validation encode three each.
    assert counts == [7, 8, 9]


@pytest.mark.parametrize("when", WHENS)
def test_inputs_of_domains_that_are_not_drawn_may_be_left_out(when):
    """λ learns as if they were there without labels, and nothing of theirs is encoded."""
    names = "abcde"
    tasks, data = [Task(n, squared, input=n) for n in names], batches(8, names=names)
    found = []
    for everything in (True, False):
        model, encoded, path = problem(names=names), [], []
        model.shared.register_forward_hook(lambda *_, seen=encoded: seen.append(1))
        rule = AutoLambda(tasks, lr=LR, when=when)
        step = Step(model, tasks, Method(encoder=rule))
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for i, (batch, probe) in enumerate(zip(data[:4], data[4:], strict=True)):
            pair = names[i], names[(2 * i + 1) % 5]

            def drawn(batch, pair=pair, everything=everything):
                inputs = {n: (1 + k) * batch.inputs for k, n in enumerate(names) if everything or n in pair}
                return Batch(inputs, dict.fromkeys(names) | {n: batch.targets[n] for n in pair})

            optimizer.zero_grad()
            encoded.clear()
            step.backward(drawn(batch), validation=drawn(probe), optimizer=optimizer)
            optimizer.step()
            path += [moments(rule), *(p.detach().clone() for p in model.parameters())]
        found.append(path)
    # Two in the training batch, two in the validation batch, two to look ahead or back.
    assert len(encoded) == (4 if when == "online" else 6)
    for there, left_out in zip(*found, strict=True):
        close(left_out, there, "moments and parameters", rtol=1e-12)
    assert (found[1][-len(list(model.parameters())) - 1][3] > 0).sum() >= 4


@pytest.mark.parametrize("constraint", [None, "nonnegative", "softmax"], ids=str)
@pytest.mark.parametrize("when", WHENS)
def test_a_task_without_labels_keeps_what_it_has(when, constraint):
    tasks, data = tiny_tasks(), batches(6)
    model = problem()
    rule = AutoLambda(tasks, lr=LR, when=when, constraint=constraint, weight_decay=0.1)
    step = Step(model, tasks, Method(encoder=rule, decoder=rule))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    before = []
    for i, batch in enumerate(data):
        before.append(moments(rule))
        targets = (
            {**batch.targets, "b": None}
            if i == 2
            else {**batch.targets, "b": batch.targets["b"] * torch.nan}
            if i == 3
            else batch.targets
        )
        optimizer.zero_grad()
        step.backward(Batch(batch.inputs, targets), validation=data[0], optimizer=optimizer)
        optimizer.step()
    before.append(moments(rule))
    # An online step judges the batch before.
    absent = [3, 4] if when == "online" else [2, 3]
    for i in range(1, 6):
        kept = (before[i] == before[i + 1]).all(dim=0).tolist()
        assert kept == [False, i in absent, False], i
    if constraint == "softmax":
        assert rule.weights.sum().item() == pytest.approx(3, rel=1e-12)


def test_without_validation_labels_nothing_is_learned():
    tasks, rule = tiny_tasks(), AutoLambda(tiny_tasks(), weight_decay=0.1)
    before = moments(rule)
    one_step(rule, tasks, probe=Batch(batches(1)[0].inputs, dict.fromkeys("abc")))
    assert torch.equal(moments(rule), before)


@pytest.mark.parametrize("constraint", [None, "softmax"], ids=str)
def test_a_derivative_that_is_not_finite_is_not_learned_from(constraint):
    tasks, rule = [Task(n, squared) for n in "abc"], AutoLambda(tiny_tasks(), constraint=constraint)
    second = batches(2)[1]
    one_step(rule, tasks)
    before = moments(rule)
    model = problem()
    report = one_step(
        rule, tasks, model, probe=Batch(second.inputs, {**second.targets, "a": second.targets["a"] * torch.inf})
    )
    assert torch.equal(moments(rule), before)
    assert all(w.isfinite() for w in report.encoder_weights.values())
    assert all(g.isfinite().all() for g in gradients(model).values())


class Line(nn.Module):
    """A linear map without bias that starts at zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("when", WHENS)
def test_an_auxiliary_that_agrees_gains_and_one_that_opposes_loses(when):
    tasks = tiny_tasks(("wanted", "friend", "foe"))
    model = SplitModel(Line(), {task.name: nn.Identity() for task in tasks})
    inputs = torch.randn(40, 200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)

    def batch(x):
        y = x @ truth
        return Batch(x, {"wanted": y, "friend": y + 1, "foe": -y})

    rule = AutoLambda(tasks, lr=0.01, when=when)
    path = run(model, tasks, [*map(batch, inputs[:20])], [*map(batch, inputs[20:])], Method(encoder=rule))
    weights = torch.stack([weights for _, weights, _ in path])
    # An online run learns from its second step on.
    moved = weights[2:].diff(dim=0)
    assert (moved[:, :2] > 0).all()
    assert (moved[:, 2] < 0).all()
    assert weights[-1, 2] < 0 < 0.1 < weights[-1, :2].min()


def test_the_derivative_is_linear_in_the_primaries():
    """The slope of a sum of losses at one place is the sum of the slopes."""
    parts = []
    for primaries in ("abc", "a", "b", "c"):
        tasks = [Task(n, squared, primary=n in primaries) for n in "abc"]
        rule = AutoLambda(tasks)
        one_step(rule, tasks)
        parts.append(rule.adam.first)
    close(parts[1] + parts[2] + parts[3], parts[0], "first moments")


def test_the_unit_of_all_losses_does_not_matter():
    """A thousand times the loss at a thousandth of the learning rate; Adam's ε is small beside the derivatives."""
    found = []
    for unit in (1.0, 1000.0):
        tasks = [Task(n, lambda p, y, unit=unit: unit * squared(p, y), primary=n == "a") for n in "abc"]
        rule, model, data = AutoLambda(tasks, lr=LR), problem(), batches(10)
        step = Step(model, tasks, Method(encoder=rule))
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE / unit)
        for batch, probe in zip(data[:5], data[5:], strict=True):
            optimizer.zero_grad()
            step.backward(batch, validation=probe, optimizer=optimizer)
            optimizer.step()
        found.append(rule.weights)
    close(found[1], found[0], "λ", rtol=1e-5)


def test_multiplying_one_loss_does_not_divide_its_weight():
    """Adam's first step is as long for any derivative."""
    found = []
    for unit in (1.0, 1000.0):
        tasks = tiny_tasks()
        tasks[1] = Task("b", lambda p, y, unit=unit: unit * squared(p, y), primary=False)
        # At zero, so that the step looked at is the same.
        rule = AutoLambda(tasks, lr=LR, init=0.0)
        one_step(rule, tasks)
        found.append(rule)
    close(found[1].adam.first[1], 1000 * found[0].adam.first[1], "the derivative is multiplied")
    close(found[1].weights, found[0].weights, "λ", rtol=1e-4)


@pytest.mark.parametrize("mode", ["difference", "one-sided"])
@pytest.mark.parametrize("when", WHENS)
def test_differences_come_near(when, mode):
    tasks, data = tiny_tasks(), batches(8)
    rules = [AutoLambda(tasks, lr=LR, when=when, mode=one) for one in ("exact", mode)]
    for rule in rules:
        run(problem(norm=True), tasks, data[:4], data[4:], Method(encoder=rule))
    close(rules[1].adam.first, rules[0].adam.first, "moments", rtol=1e-3)
    close(rules[1].weights, rules[0].weights, "λ", rtol=1e-3)
    assert not torch.equal(rules[1].weights, rules[0].weights)


def share(rank, world, mode):
    """λ of a run on one process's share of every batch."""
    tasks, data = (
        tiny_tasks(),
        [Batch(b.inputs[rank::world], {name: y[rank::world] for name, y in b.targets.items()}) for b in batches(8)],
    )
    rule = AutoLambda(tasks, lr=LR, mode=mode)
    run(problem(), tasks, data[:4], data[4:], Method(encoder=rule))
    return rule.weights


@pytest.mark.parametrize("mode", ["difference", "one-sided"])
def test_differences_in_two_processes_come_as_near(mode):
    whole = share(0, 1, "exact")
    for half in in_two_processes(functools.partial(share, mode=mode)):
        close(half, whole, "λ", rtol=1e-3)


def test_bounds_hold_and_are_reached():
    tasks, data = tiny_tasks(), batches(8)
    rule = AutoLambda(tasks, lr=1.0, constraint=[0.05, 0.2])
    run(problem(), tasks, data[:4], data[4:], Method(encoder=rule))
    assert ((rule.weights == 0.05) | (rule.weights == 0.2)).all()
    rule = AutoLambda(tasks, lr=1e3, constraint="softmax")
    run(problem(), tasks, data, data[::-1], Method(encoder=rule))
    assert rule.weights.isfinite().all()
    assert (rule.weights >= 0).all()
    assert rule.weights.sum().item() == pytest.approx(3, rel=1e-12)


def by_name(rule):
    return {name: column.tolist() for name, column in zip(rule.tasks, moments(rule).T, strict=True)}


@pytest.mark.parametrize(
    "options", [{}, {"sample": 2}, {"constraint": "softmax", "every": 2, "when": "after"}], ids=str
)
def test_a_run_that_goes_on_with_other_tasks(options):
    tasks, data = tiny_tasks(), batches(8)
    rule = AutoLambda(tasks, lr=LR, **options)
    run(problem(), tasks, data[:4], data[4:], Method(encoder=rule))
    there = by_name(rule)
    reordered = by_name(rule.for_tasks([tasks[2], tasks[0], tasks[1]]))
    for name, entries in there.items():
        assert reordered[name] == pytest.approx(entries, rel=1e-12 if "constraint" in options else 0, abs=0), name
    new = Task("new", squared, primary=False)
    more = rule.for_tasks([new, *tasks])
    found = by_name(more)
    assert found["new"] == [1.0 if "constraint" in options else 0.1, 0, 0, 0]
    for name in "abc":
        assert found[name] == pytest.approx(there[name], rel=1e-12)
    fewer = by_name(more.for_tasks(tasks[:2]))
    if "constraint" in options:
        assert sum(entries[0] for entries in fewer.values()) == pytest.approx(2)
        assert fewer["a"][0] / fewer["b"][0] == pytest.approx(there["a"][0] / there["b"][0])
    else:
        assert fewer == {name: there[name] for name in "ab"}
    assert (more.when, more.every, more.sample, more.adam.lr) == (rule.when, rule.every, rule.sample, rule.adam.lr)
    assert torch.equal(more.generator.get_state(), rule.generator.get_state())


def test_training_goes_on_after_a_task_came_and_another_went():
    """The task that stays is not set back: its moments are those of a run without the change."""
    data = batches(8, names="abcd")
    old, new = tiny_tasks("abc"), tiny_tasks("adb")
    model = problem(names="abc")
    rule = AutoLambda(old, lr=LR)
    step = Step(model, old, Method(encoder=rule))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def train(step, batch, probe):
        optimizer.zero_grad()
        step.backward(batch, validation=probe, optimizer=optimizer)
        optimizer.step()

    for batch, probe in zip(data[:3], data[4:7], strict=True):
        train(step, batch, probe)
    before = by_name(rule)
    rule = rule.for_tasks(new)
    heads = {"a": model.heads["a"], "d": problem(names="abcd").heads["d"], "b": model.heads["b"]}
    step = Step(SplitModel(model.shared, heads), new, Method(encoder=rule))
    optimizer.add_param_group({"params": heads["d"].parameters()})
    train(step, data[3], data[7])
    after = by_name(rule)
    assert list(after) == ["a", "d", "b"]
    assert [after[name][3] for name in after] == [4, 1, 4]
    assert abs(after["d"][0] - 0.1) == pytest.approx(LR, rel=1e-3)
    for name in "ab":
        assert 0 < abs(after[name][0] - before[name][0]) < 2 * LR


@pytest.mark.parametrize("when", WHENS)
def test_a_saved_run_is_taken_up_with_other_tasks(when, tmp_path):
    tasks, data = tiny_tasks(), batches(8, names="abcd")
    method = autolambda(tasks, lr=LR, when=when)
    step = Step(problem(), tasks, method)

    def train(step, batch, probe):
        optimizer = torch.optim.SGD(step.parameters(), lr=RATE)
        optimizer.zero_grad()
        step.backward(batch, validation=probe, optimizer=optimizer)
        optimizer.step()

    for batch, probe in zip(data[:3], data[4:7], strict=True):
        train(step, batch, probe)
    torch.save(step.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    there = by_name(method.encoder)

    order = [tasks[i] for i in (2, 0, 1)]
    reordered = Step(problem(), order, autolambda(order, lr=LR, when=when))
    reordered.load_state_dict(state)
    assert by_name(reordered.encoder) == there

    more = tiny_tasks("dabc")
    larger = Step(problem(names="dabc"), more, autolambda(more, lr=LR, when=when))
    unlike = larger.load_state_dict(state, strict=False)
    assert set(unlike.missing_keys) == {"model.heads.d.weight", "model.heads.d.bias"}
    assert unlike.unexpected_keys == []
    assert by_name(larger.encoder) == {**there, "d": [0.1, 0, 0, 0]}

    fewer = Step(problem(names="ab"), tasks[:2], autolambda(tasks[:2], lr=LR, when=when))
    unlike = fewer.load_state_dict(state, strict=False)
    assert unlike.missing_keys == []
    assert all("heads.c" in key for key in unlike.unexpected_keys)
    assert by_name(fewer.encoder) == {name: there[name] for name in "ab"}

    for one in (reordered, larger, fewer, step):
        assert one.iteration == 3
        train(one, data[3], data[7])
    for name, entries in by_name(step.encoder).items():
        assert by_name(reordered.encoder)[name] == pytest.approx(entries, rel=1e-9), name


def test_a_loaded_state_is_not_changed_by_loading():
    rule = AutoLambda(tiny_tasks())
    one_step(rule)
    state = rule.state_dict()
    before = {name: copy.deepcopy(value) for name, value in state.items()}
    AutoLambda(tiny_tasks("cab")).load_state_dict(state)
    AutoLambda(tiny_tasks("bx"), constraint="softmax").load_state_dict(state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[n], x) for n, x in before.items() if isinstance(x, torch.Tensor))


def test_copies_load_for_themselves():
    """A hook that was copied with the rule looks at the copy."""
    rule = copy.deepcopy(AutoLambda(tiny_tasks()))
    trained = AutoLambda(tiny_tasks("cab"))
    one_step(trained, tiny_tasks("cab"))
    rule.load_state_dict(trained.state_dict())
    assert by_name(rule) == {name: by_name(trained)[name] for name in "abc"}


def test_under_bfloat16_it_learns_nearly_the_same():
    found = []
    for enabled in (False, True):
        tasks, data = tiny_tasks(), batches(8, dtype=torch.float32)
        rule = AutoLambda(tasks, lr=0.01)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            run(problem(dtype=torch.float32), tasks, data[:4], data[4:], Method(encoder=rule))
        assert rule.weights.dtype == torch.float64
        found.append(rule.weights)
    moved = (found[0] - 0.1).abs().max()
    assert (found[1] - found[0]).abs().max() < 0.05 * moved
    assert not torch.equal(*found)


@pytest.mark.parametrize("when", WHENS)
def test_under_a_scaler_it_learns_the_same_and_not_from_an_overflow(when):
    found = {}
    for scale in (None, 1024.0, 3e38):
        tasks = [Task(n, lambda p, y: 100 * squared(p, y), primary=n == "a") for n in "abc"]
        data = batches(8, dtype=torch.float32)
        model = problem(dtype=torch.float32)
        rule = AutoLambda(tasks, lr=LR, when=when)
        step = Step(model, tasks, Method(encoder=rule))
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE / 100)
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        for batch, probe in zip(data[:4], data[4:], strict=True):
            optimizer.zero_grad()
            step.backward(batch, validation=probe, optimizer=optimizer, scaler=scaler)
            scaler.step(optimizer)
            scaler.update(scale)
        found[scale] = moments(rule)
    torch.testing.assert_close(found[1024.0], found[None], rtol=1e-4, atol=1e-9)
    assert torch.equal(found[3e38], moments(AutoLambda(tasks)))


@pytest.mark.parametrize("when", WHENS)
def test_gradients_accumulate_each_under_the_weights_of_its_call(when):
    tasks, data = tiny_tasks(), batches(4)
    model = problem()
    step = Step(model, tasks, autolambda(tasks, lr=LR, when=when))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    reports = [step.backward(b, validation=v, optimizer=optimizer) for b, v in zip(data[:2], data[2:], strict=True)]
    total = dict.fromkeys(gradients(model), 0.0)
    for batch, report in zip(data, reports, strict=False):
        weights = [*report.encoder_weights.values()]
        for name, g in brute_force(problem(), tasks, batch, weights, weights).items():
            total[name] = total[name] + g
    for name, found in gradients(model).items():
        close(found, total[name], name)
    assert reports[0].encoder_weights != reports[1].encoder_weights


@pytest.mark.parametrize("when", WHENS)
def test_compiled_modules(when):
    tasks, data = tiny_tasks(), batches(6)
    plain = problem()
    compiled = SplitModel(
        torch.compile(plain.shared, backend="aot_eager"),
        {name: torch.compile(head, backend="aot_eager") for name, head in plain.heads.items()},
    )
    found = run(compiled, tasks, data[:3], data[3:], autolambda(tasks, lr=LR, when=when))
    expected = run(problem(), tasks, data[:3], data[3:], autolambda(tasks, lr=LR, when=when))
    for (used, weights, _), (used_there, weights_there, _) in zip(found, expected, strict=True):
        close(used, used_there, "weights")
        close(weights, weights_there, "λ")


def test_what_is_missing_is_said():
    tasks, (first, second) = tiny_tasks(), batches(2)
    model = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    step = Step(model, tasks, autolambda(tasks))
    for given in ({}, {"validation": second}, {"optimizer": optimizer}):
        with pytest.raises(ValueError, match=r"looks ahead and needs step.backward\(batch, validation="):
            step.backward(first, **given)
    with pytest.raises(ValueError, match=r"needs step.backward\(batch, optimizer="):
        Step(model, tasks, autolambda(tasks, when="online")).backward(first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, not 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, not -1"),
        ({"lr": "1e-4"}, "lr must be a finite number, not '1e-4'"),
        ({"lr": math.inf}, "lr must be a finite number, not inf"),
        ({"init": math.inf}, "init must be a finite number, not inf"),
        ({"init": None}, "init must be a finite number, not None"),
        ({"init": -0.1, "constraint": "nonnegative"}, r"init must be within \[0.0, inf\], not -0.1"),
        ({"init": 0.1, "constraint": [0.2, 1]}, r"within \[0.2, 1.0\], not 0.1"),
        ({"when": "during"}, "when must be one of before, after, online; not 'during'"),
        ({"mode": "forward"}, "mode must be one of exact, difference, one-sided; not 'forward'"),
        ({"every": 0}, "every must be a whole number of at least 1, not 0"),
        ({"every": True}, "every must be a whole number of at least 1, not True"),
        ({"sample": 1.5}, "sample must be a whole number of at least 1, not 1.5"),
        ({"sample": 9}, "sample must be at most the number of tasks, 3, not 9"),
        ({"constraint": "positive"}, "constraint must be 'nonnegative', 'softmax' or a pair of bounds, not 'positive'"),
        ({"constraint": [0, 1, 2]}, r"a pair of bounds, not \[0, 1, 2\]"),
        ({"constraint": [1, 0]}, r"in ascending order, not \[1, 0\]"),
        ({"constraint": "softmax", "sample": 1}, "sample must be at least 2"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        autolambda(tiny_tasks(), **options)


def test_without_a_primary_task_there_is_nothing_to_lower():
    with pytest.raises(ValueError, match=r"no task is primary.* the tasks are: a, b"):
        autolambda([Task(name, squared, primary=False) for name in "ab"])
