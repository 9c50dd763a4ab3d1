"""Learned coefficients against a loop that differentiates through the network's step, and what normalising does."""

import pytest
import torch
from sidetask_core import Batch, Step, Task
from sidetask_core.testing import batches, close, conformance, problem, squared
from sidetask_saal import LearnedTransfers, Shares
from sidetask_saal.saal import saal_e, saal_ew, saal_w
from torch.func import functional_call

HALF = {"splits": ("half-shared",), "seed": 0}
CHOSEN = ("b->a", "a->b", "c->b")

TestChosen = conformance(saal_e, transfers=CHOSEN, **HALF)
TestPlain = conformance(saal_e, transfers=CHOSEN, normalization="none", **HALF)
TestBySource = conformance(saal_e, transfers="all", normalization="source", **HALF)
TestSharedBranch = conformance(
    saal_e,
    transfers="all",
    splits=("two heads on one branch",),
    route={"a": "both", "b": "both", "c": "other"},
    seed=0,
)
TestScheduled = conformance(saal_e, transfers=CHOSEN, schedule={"c->b": [[1, 3]]}, **HALF)
TestLearned = conformance(saal_w, by_name=True, transfers=CHOSEN, **HALF)
TestAfter = conformance(saal_w, by_name=True, when="after", transfers=CHOSEN, **HALF)
TestOnline = conformance(saal_w, by_name=True, when="online", transfers=CHOSEN, **HALF)
TestLearnedAndChosen = conformance(saal_ew, by_name=True, every=2, transfers=("c->a",), normalization="none", **HALF)
LEARNED = (TestLearned, TestAfter, TestOnline, TestLearnedAndChosen)

# Far from the paper's, so that coefficients move by much in few steps.
LR = 0.05
# Of the network.
RATE = 0.1
NAMES = ("a", "b", "c", "b→a", "a→b", "c→b")
WHENS = ("before", "after", "online")


def three():
    return [Task("a", squared), Task("b", squared), Task("c", squared, primary=False)]


def normalized(omega, normalization, present, on=(True,) * 6):
    """Eq. 11, written out."""
    if normalization == "none":
        return omega * 1
    weights = []
    for i, name in enumerate(NAMES):
        source, _, target = name.partition("→")
        mine = (target or source) if normalization == "target" else source
        total = 0
        for j, other in enumerate(NAMES):
            s, _, t = other.partition("→")
            if ((t or s) if normalization == "target" else s) == mine and on[j]:
                total = total + omega[j].abs()
        weights.append(omega[i] / total if present[i] else omega[i] * 0)
    return torch.stack(weights)


def losses_at(model, tasks, batch, parameters):
    found = []
    for task in tasks:
        target = batch.target_of(task)
        if target is None:
            found.append(torch.zeros((), dtype=torch.float64))
            continue
        prediction = functional_call(model, parameters, (batch.inputs, [task.name]))[task.name]
        found.append(squared(prediction, target).mean())
    return found


def by_hand(model, tasks, data, validation, *, when, normalization, every=1, init=0.1):
    """ω, weights and parameters after every step, by autograd through plain SGD and by torch's Adam."""
    omega = torch.full((len(tasks),), init, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([omega], lr=LR)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    primaries = [task for task in tasks if task.primary]

    def after(parameters, slopes, weights):
        return {
            name: p - RATE * sum(w * s[name] for w, s in zip(weights, slopes, strict=True) if s[name] is not None)
            for name, p in parameters.items()
        }

    def learn(parameters, slopes, present, batch):
        moved = after(parameters, slopes, normalized(omega, normalization, present))
        adam.zero_grad()
        sum(losses_at(model, primaries, batch, moved)).backward()
        adam.step()

    path, last = [], None
    for iteration, (batch, probe) in enumerate(zip(data, validation, strict=True)):
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        present = [batch.target_of(task) is not None for task in tasks]
        slopes = []
        for loss in losses_at(model, tasks, batch, leaves):
            empty = [None] * len(leaves)
            some = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if loss.requires_grad else empty
            slopes.append(dict(zip(leaves, some, strict=True)))
        old = normalized(omega, normalization, present).detach()
        if iteration % every == 0:
            if when == "online":
                if last is not None:
                    learn(*last, batch)
            else:
                learn(parameters, slopes, present, probe)
        used = old if when == "after" else normalized(omega, normalization, present).detach()
        last = (parameters, slopes, present)
        parameters = after(parameters, slopes, used)
        path.append((used, omega.detach().clone(), parameters))
    return path


def check(data, validation, **options):
    tasks = three()
    method = saal_w(tasks, transfers=["b->a", "a->b", "c->b"], lr=LR, seed=0, **options)
    step = Step(problem("half-shared"), tasks, method)
    expected = by_hand(step.model, step.tasks, data, validation, **options)
    optimizer = torch.optim.SGD(step.model.parameters(), lr=RATE)
    for i, (batch, probe) in enumerate(zip(data, validation, strict=True)):
        optimizer.zero_grad()
        report = step.backward(batch, validation=probe, optimizer=optimizer)
        optimizer.step()
        used, omega, parameters = expected[i]
        assert tuple(report.encoder_weights) == NAMES
        close(torch.stack([*report.encoder_weights.values()]), used, f"weights of step {i}", rtol=1e-8)
        close(torch.stack([*report.decoder_weights.values()]), used, f"weights of step {i}", rtol=1e-8)
        close(step.encoder.weights, omega, f"ω after step {i}", rtol=1e-8)
        for name, p in step.model.named_parameters():
            close(p.detach(), parameters[name], f"{name} after step {i}", rtol=1e-8)
    # Nothing else trains the branch of c: normalised, its weight is one, whatever its coefficient.
    moving = [i for i, name in enumerate(NAMES) if name != "c" or options["normalization"] != "target"]
    assert (expected[-1][1] - options.get("init", 0.1))[moving].abs().min() > 1e-3, "a coefficient did not move"


@pytest.mark.parametrize("normalization", ["target", "source", "none"])
@pytest.mark.parametrize("when", WHENS)
def test_coefficients_learn_as_in_the_written_out_loop(when, normalization):
    data = batches(10)
    check(data[:5], data[5:], when=when, normalization=normalization)


@pytest.mark.parametrize("when", WHENS)
def test_in_every_second_step(when):
    data = batches(12)
    check(data[:6], data[6:], when=when, normalization="target", every=2)


@pytest.mark.parametrize("init", [-0.1, 0.5])
def test_negative_coefficients_are_shares_of_absolute_values(init):
    data = batches(8)
    check(data[:4], data[4:], when="before", normalization="target", init=init)


@pytest.mark.parametrize("when", WHENS)
def test_tasks_without_labels_take_no_part(when):
    """The first is missing in one step: its copies are too, and hindsight has to remember who was there."""
    data = batches(10)
    train = [Batch(b.inputs, {**b.targets, "a": None} if i == 2 else b.targets) for i, b in enumerate(data[:5])]
    tasks = three()
    # torch's Adam moves an absent entry by its moments, so the loop is followed up to the step in question.
    steps = 4 if when == "online" else 3
    method = saal_w(tasks, transfers=["b->a", "a->b", "c->b"], lr=LR, seed=0, when=when)
    step = Step(problem("half-shared"), tasks, method)
    optimizer = torch.optim.SGD(step.model.parameters(), lr=RATE)
    for i in range(steps):
        before = step.encoder.weights.clone()
        optimizer.zero_grad()
        report = step.backward(train[i], validation=data[5 + i], optimizer=optimizer)
        optimizer.step()
        if i == 2:
            absent = [name for name, w in report.encoder_weights.items() if w == 0]
            assert absent == ["a", "a→b"]
            used = before if when == "after" else step.encoder.weights
            omega = dict(zip(NAMES, used.tolist(), strict=True))
            expected = omega["b→a"] / (abs(omega["a"]) + abs(omega["b→a"]))
            assert report.encoder_weights["b→a"].item() == pytest.approx(expected, rel=1e-12)
    kept = (step.encoder.weights == before).tolist()
    # What has no labels keeps its coefficient; c alone trains its branch and has weight one, whatever its coefficient.
    assert kept == [True, False, True, False, True, False]


def test_a_branch_without_transfers_keeps_weight_one_and_its_coefficient():
    tasks = three()
    step = Step(problem("half-shared"), tasks, saal_w(tasks, transfers=["b→a"], lr=LR, seed=0))
    optimizer = torch.optim.SGD(step.model.parameters(), lr=RATE)
    for batch in batches(4):
        report = step.backward(batch, validation=batch, optimizer=optimizer)
        assert report.encoder_weights["b"] == report.encoder_weights["c"] == 1
    assert step.encoder.weights[1:3].tolist() == [0.1, 0.1]
    assert step.encoder.weights[0] != 0.1


def test_shares_never_turn_round_or_exceed_their_group():
    tasks = [Task(name, squared) for name in NAMES]
    shares, everyone = Shares(tasks, "target"), torch.ones(6, dtype=torch.bool)
    nobody = ~everyone
    omega = torch.tensor([1.0, 3.0, 0.0, -1 + 1e-12, 1.0, -4.0], dtype=torch.float64)
    weights = shares(omega, everyone, everyone)
    close(weights, torch.tensor([0.5, 3 / 8, 0, -0.5, 1 / 8, -0.5], dtype=torch.float64), "shares", rtol=1e-6)
    assert shares(torch.zeros(6, dtype=torch.float64), everyone, everyone).tolist() == [0] * 6
    assert shares(omega, nobody, everyone).tolist() == shares(omega, nobody, nobody).tolist() == [0] * 6
    close(shares(omega * 7, everyone, everyone), weights, "shares of multiples")
    by_source = Shares(tasks, "source")(omega.abs(), everyone, everyone)
    close(by_source[[0, 4]].sum(), torch.tensor(1.0, dtype=torch.float64), "all that a teaches")


@pytest.mark.parametrize("factory", [saal_w, saal_ew])
def test_coefficients_that_could_never_learn_are_refused(factory):
    with pytest.raises(ValueError, match="init must not be 0: shares of nothing"):
        factory(three(), transfers=["b->a"], init=0)
    factory(three(), transfers=["b->a"], init=0, normalization="none")


def test_coefficients_are_named():
    rule = saal_w(three(), transfers=["b->a"], init=0.3).encoder
    assert {name: w.item() for name, w in rule.named_weights().items()} == dict.fromkeys(["a", "b", "c", "b→a"], 0.3)


def test_what_is_there_alone_is_not_made_large():
    """A coefficient just below zero whose branch's own task has no labels would turn its gradient round."""
    shares = Shares([Task(name, squared) for name in NAMES[:4]], "target")
    omega = torch.tensor([0.5, 0.5, 0.5, -0.01], dtype=torch.float64)
    on, without_a = torch.ones(4, dtype=torch.bool), torch.tensor([False, True, True, True])
    assert shares(omega, without_a, on)[3].item() == pytest.approx(-0.01 / 0.51)
    # Batches that have the labels of one task each add up to one that has all.
    each = torch.eye(4, dtype=torch.bool)
    close(sum(shares(omega, one, on) for one in each), shares(omega, ~(on & ~on), on), "one at a time")
    # What is switched off is as if it did not exist.
    assert shares(omega, ~each[3], ~each[3]).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("normalization", ["target", "source", "none"])
def test_derivatives_through_shares(normalization):
    generator = torch.Generator().manual_seed(0)
    tasks = [Task(name, squared) for name in NAMES]
    shares = Shares(tasks, normalization)
    some, few = [True, False, True, True, True, False], [False, True, False, True, False, False]
    for present, on in (([True] * 6, [True] * 6), (some, [True] * 6), (few, [True] * 6), (some, [*[True] * 5, False])):
        omega = torch.randn(6, generator=generator, dtype=torch.float64)
        slope = torch.randn(6, generator=generator, dtype=torch.float64)
        there = torch.tensor(present)
        if normalization == "none":
            expected = slope
        else:
            leaf = omega.clone().requires_grad_()
            (full,) = torch.autograd.grad(normalized(leaf, normalization, present, on) @ slope, leaf)
            expected = torch.where(there, full, 0.0)
        found = shares.pull_back(slope, omega, there, torch.tensor(on))
        close(found, expected, "derivative", rtol=1e-12)


def test_coefficients_follow_tasks_by_name():
    tasks = three()
    method = saal_w(tasks, transfers=["b->a", "a->b"], lr=LR, seed=0)
    step = Step(problem("half-shared"), tasks, method)
    optimizer = torch.optim.SGD(step.model.parameters(), lr=RATE)
    for batch in batches(3):
        step.backward(batch, validation=batch, optimizer=optimizer)
    other = saal_w(tasks, transfers=["c->a", "b->a"]).encoder
    rule = step.encoder.for_tasks(saal_w(tasks, transfers=["c->a", "b->a"]).augment.extended(tasks))
    assert rule.tasks == other.tasks == ("a", "b", "c", "b→a", "c→a")
    assert isinstance(rule, LearnedTransfers)
    assert rule.weights[:4].tolist() == step.encoder.weights[:4].tolist()
    assert rule.weights[4] == 0.1
    assert rule.present.tolist() == [True, True, True, True, False]
