"""The lookahead of single elements against one gradient for each of them, and what shapers learn from it."""

import functools

import pytest
import torch
from sidetask_core import Batch, Combiner, Fixed, Method, MissingKey, Shaper, SplitModel, Step, Task
from sidetask_core.derivative import NoForwardDerivative
from sidetask_core.testing import (
    SPLITS,
    batches,
    close,
    gradients,
    in_two_processes,
    labelled,
    problem,
    squared,
    tiny_tasks,
    train,
)
from torch import nn
from torch.func import functional_call

LR = 0.1
WEIGHTS = {"a": 0.3, "b": 0.7, "c": 1.9}


class Asking(Shaper):
    """Weights that depend on the labels, and one question to the signals in every step."""

    def __init__(self, ask, every=1):
        super().__init__()
        self.ask, self.every, self.found = ask, every, []

    def forward(self, losses, target):
        return 1 + target.nan_to_num().sigmoid()

    def update(self, signals):
        if signals.iteration % self.every == 0:
            self.found.append(self.ask(signals))


def ahead(task="b", **how):
    return lambda signals: signals.lookahead_elements(task, **how)


def back(task="b", **how):
    return lambda signals: signals.hindsight_elements(task, **how)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": LR, **options})


def noisy(split="half-shared"):
    """Dropout in encoder, branches and heads."""
    model = problem(split, norm=True)
    for modules in (model.branches, model.heads):
        for name in list(modules):
            modules[name] = nn.Sequential(nn.Dropout(0.3), modules[name])
    model.shared.append(nn.Dropout(0.3))
    return model


def element_gradients(model, task, batch):
    """The parameters' gradient of every labelled element, ``[elements, D]``, and where they lie."""
    predictions = model(batch.inputs)
    ((losses, mask),) = task.elements(predictions[task.name], batch.target_of(task))
    mask = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    rows = [torch.autograd.grad(x, [*model.parameters()], retain_graph=True, allow_unused=True) for x in losses[mask]]
    parameters = list(model.parameters())
    flat = [
        torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, row, strict=True)])
        for row in rows
    ]
    return torch.stack(flat), mask


def loss_gradient(model, tasks, batch, run=None):
    """The parameters' gradient of the sum of the tasks' losses ``[D]``, in a run of all heads or of theirs alone."""
    predictions = model(batch.inputs, run or [task.name for task in tasks])
    loss = sum(task.mean(predictions[task.name], batch.target_of(task))[0] for task in tasks)
    found = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    pairs = zip(model.parameters(), found, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def check(model, tasks, method, shaper, *, data=None, of="a", optimizer=None, rtol=1e-9, task="b"):
    """One step that looks ahead, then the same by real steps of the optimizer and one gradient per element."""
    first, second = data or batches(2)
    optimizer = optimizer or sgd(model)
    by_name = {one.name: one for one in tasks}
    step = Step(model, tasks, method)
    torch.manual_seed(5)
    optimizer.zero_grad()
    step.backward(first, validation=second, optimizer=optimizer)
    random = torch.get_rng_state()
    torch.manual_seed(5)
    rows, mask = element_gradients(model, by_name[task], first)
    optimizer.step()
    torch.set_rng_state(random)
    v = loss_gradient(model, [by_name[name] for name in of], second)
    found = shaper.found[-1]
    assert torch.equal(found.mask, mask)
    assert found.target is first.targets[task]
    close(found.slopes[mask], -LR * rows @ v, "slopes", rtol=rtol)
    assert not found.slopes[~mask].any()
    assert found.slopes.abs().max() > 1e-6
    return found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=["plain", "momentum"])
def test_it_is_minus_the_rate_times_the_product_with_each_elements_gradient(split, options):
    tasks, model = tiny_tasks(), problem(split, norm=True)
    optimizer = sgd(model, **options)
    train(Step(model, tasks), batches(3), optimizer)
    shaper = Asking(ahead())
    method = Method(shapers={"b": shaper}, encoder=Fixed(tasks, WEIGHTS))
    check(model, tasks, method, shaper, data=batches(5)[3:], optimizer=optimizer)


def test_without_labels_an_element_has_no_slope():
    tasks, model, (first, second) = tiny_tasks(), problem(), batches(2)
    first.targets["b"][1:4, 0] = torch.nan
    second.targets["a"][2] = torch.nan
    shaper = Asking(ahead())
    found = check(model, tasks, Method(shapers={"b": shaper}), shaper, data=(first, second))
    assert found.mask.sum() == 9


@pytest.mark.parametrize("split", SPLITS)
def test_dropout_of_encoder_branch_and_head_is_that_of_the_step(split):
    tasks, model = tiny_tasks(), noisy(split)
    shaper = Asking(ahead())
    check(model, tasks, Method(shapers={"b": shaper}), shaper)


def test_the_loss_that_is_to_fall_can_be_named():
    for of in ("b", "ac", "cba"):
        tasks, model = tiny_tasks(), problem("two heads on one branch")
        shaper = Asking(ahead(of=[*of]))
        check(model, tasks, Method(shapers={"c": shaper}), shaper, of=of)


def test_the_step_is_the_one_that_all_rules_together_decided_on():
    tasks = tiny_tasks()

    class Halved(Combiner):
        def forward(self, signals):
            return signals.gradients(self.at).sum(dim=0) / 2

    for encoder in (Halved(tasks, at="features"), Halved(tasks, at="parameters"), Fixed(tasks, WEIGHTS)):
        for decoder in (None, Fixed(tasks, {"a": 2.0, "b": 0.1, "c": 1.0})):
            shaper, model = Asking(ahead()), problem("half-shared")
            check(model, tasks, Method(shapers={"b": shaper}, encoder=encoder, decoder=decoder), shaper)


@pytest.mark.parametrize("way", ["ahead", "back"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_mean_over_elements_is_the_derivative_by_the_tasks_weight(split, way):
    tasks, data = tiny_tasks(), batches(2)
    data[0].targets["c"][:2] = torch.nan

    class Both(Fixed):
        def forward(self, signals):
            weights = super().forward(signals)
            self.found = signals.lookahead(weights) if way == "ahead" else signals.hindsight()
            return weights

    rule, shaper = Both(tasks, WEIGHTS), Asking(lambda s: [(ahead if way == "ahead" else back)(n)(s) for n in "abc"])
    shaper.forward = lambda losses, target: torch.ones_like(losses)
    model = problem(split)
    step, optimizer = Step(model, tasks, Method(shapers={"a": shaper}, encoder=rule)), sgd(model)
    for batch in data[:1] if way == "ahead" else data:
        optimizer.zero_grad()
        step.backward(batch, validation=data[1], optimizer=optimizer)
        optimizer.step()
    for t, found in enumerate(shaper.found[-1]):
        close(found.slopes[found.mask].mean(), rule.found[t], "abc"[t], rtol=1e-10)


def test_objectives_have_slopes_of_their_own():
    def both(prediction, target):
        return {"square": squared(prediction, target), "cube": (prediction - target).abs() ** 3}

    tasks, model = tiny_tasks(), problem()
    tasks[1] = Task("b", both, valid=labelled, primary=False, objectives=("square", "cube"))

    class Ones(Asking):
        def forward(self, losses, target):
            return dict.fromkeys(losses, torch.ones(()))

    (first, second), alone = batches(2), {}
    shaper = Ones(lambda s: [ahead(objective=name)(s) for name in ("square", "cube")])
    optimizer = sgd(model)
    Step(model, tasks, Method(shapers={"b": shaper})).backward(first, validation=second, optimizer=optimizer)
    rows, _ = element_gradients(model, Task("b", squared), first)
    alone["cube"] = element_gradients(model, Task("b", lambda p, y: (p - y).abs() ** 3), first)[0]
    optimizer.step()
    v = loss_gradient(model, tasks[:1], second)
    for found, each in zip(shaper.found[0], (rows, alone["cube"]), strict=True):
        close(found.slopes.flatten(), -LR * each @ v, "slopes")


@pytest.mark.parametrize("split", SPLITS)
def test_hindsight_is_the_same_of_the_step_that_was_taken(split):
    tasks, model, (first, second) = tiny_tasks(), noisy(split), batches(2)
    shaper, optimizer = Asking(back()), sgd(model, momentum=0.9)
    step = Step(model, tasks, Method(shapers={"b": shaper}))
    torch.manual_seed(5)
    rows, mask = element_gradients(model, tasks[1], first)
    target = first.targets["b"].clone()
    torch.manual_seed(5)
    step.backward(first, optimizer=optimizer)
    optimizer.step()
    # The caller may fill the same memory with the next batch.
    for memory in (first.inputs, first.targets["b"]):
        memory.zero_()
    optimizer.zero_grad()
    random = torch.get_rng_state()
    step.backward(second, optimizer=optimizer)
    torch.set_rng_state(random)
    v = loss_gradient(model, tasks[:1], second, run="abc")
    assert shaper.found[0] is None
    close(shaper.found[1].slopes[mask], -LR * rows @ v, "slopes")
    assert torch.equal(shaper.found[1].target, target)


@pytest.mark.parametrize("way", [ahead, back])
@pytest.mark.parametrize(("mode", "rtol"), [("difference", 1e-3), ("one-sided", 1e-2)])
def test_differences_come_near(mode, rtol, way):
    found = []
    for one in ("exact", mode):
        model, tasks = noisy(), tiny_tasks()
        shaper, optimizer, (first, second, probe) = Asking(way(mode=one)), sgd(model), batches(3)
        step = Step(model, tasks, Method(shapers={"b": shaper}))
        torch.manual_seed(5)
        for batch in (first, second):
            step.backward(batch, validation=probe, optimizer=optimizer)
        found.append(shaper.found[1].slopes)
    torch.testing.assert_close(found[1], found[0], rtol=rtol, atol=1e-6)
    assert not torch.equal(*found)


@pytest.mark.parametrize("way", [ahead, back])
def test_the_step_and_the_world_do_not_notice(way):
    states = []
    for ask in (lambda signals: None, way()):
        tasks, model = tiny_tasks(), noisy()
        torch.manual_seed(5)
        step, optimizer = Step(model, tasks, Method(shapers={"b": Asking(ask)})), sgd(model)
        for batch in batches(4):
            optimizer.zero_grad()
            step.backward(batch, validation=batch, optimizer=optimizer)
            optimizer.step()
        states.append([torch.get_rng_state(), *model.buffers(), *model.parameters(), *gradients(model).values()])
    assert torch.equal(states[0][0], states[1][0])
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("when", [1, 2, 3])
def test_hindsight_in_some_steps_survives_a_resume_at_any(when, tmp_path):
    def start():
        tasks, model = tiny_tasks(), noisy()
        shaper = Asking(back(), every=3)
        torch.manual_seed(5)
        return Step(model, tasks, Method(shapers={"b": shaper})), sgd(model, momentum=0.9), shaper

    def go(step, optimizer, data):
        for batch in data:
            optimizer.zero_grad()
            step.backward(batch, optimizer=optimizer)
            optimizer.step()

    data = batches(8)
    whole, optimizer, shaper = start()
    go(whole, optimizer, data)
    half, half_optimizer, before = start()
    go(half, half_optimizer, data[: 3 + when])
    torch.save([half.state_dict(), half_optimizer.state_dict(), torch.get_rng_state()], tmp_path / "state.pt")
    resumed, resumed_optimizer, after = start()
    state, optimizer_state, random = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state)
    resumed_optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(random)
    go(resumed, resumed_optimizer, data[3 + when :])
    found = [one for one in [*before.found, *after.found] if one is not None]
    assert len(found) == 2
    for one, expected in zip(found, shaper.found[1:], strict=True):
        assert torch.equal(one.slopes, expected.slopes)
        assert torch.equal(one.target, expected.target)


def test_several_shapers_share_one_validation_gradient():
    tasks, model, made = tiny_tasks(), problem(), []
    first, second = batches(2)

    def make():
        made.append(second)
        return second

    shapers = {"b": Asking(ahead("b")), "c": Asking(ahead("c"))}
    Step(model, tasks, Method(shapers=shapers)).backward(first, validation=make, optimizer=sgd(model))
    assert len(made) == 1
    assert not torch.equal(shapers["b"].found[0].slopes, shapers["c"].found[0].slopes)


def test_a_batch_without_labels_has_no_elements():
    tasks, model, (first, second) = tiny_tasks(), problem(), batches(2)
    absent = Batch(first.inputs, {**first.targets, "b": None})
    shaper = Asking(lambda s: (s.target("b"), ahead()(s), back()(s)))
    step = Step(model, tasks, Method(shapers={"b": shaper}))
    for batch in (absent, second, absent):
        step.backward(batch, validation=second, optimizer=sgd(model))
    none = [[value is None for value in found] for found in shaper.found]
    assert none == [[True, True, True], [False, False, True], [True, True, False]]


def test_shapers_learn_after_the_rules_once_per_step_and_not_from_one_that_fails():
    order = []

    class Rule(Fixed):
        def forward(self, signals):
            order.append("rule")
            return super().forward(signals)

    tasks, model, (first, second) = tiny_tasks(), problem(), batches(2)
    shaper = Asking(lambda signals: order.append("shaper"))
    step = Step(model, tasks, Method(shapers={"b": shaper}, encoder=Rule(tasks, WEIGHTS)))
    step.backward(first)
    with pytest.raises(ArithmeticError):
        step.backward(Batch(first.inputs * torch.nan, first.targets))
    step.backward(second)
    assert order == ["rule", "shaper"] * 2


def test_what_is_missing_is_said():
    tasks, model, (first, second) = tiny_tasks(), problem(), batches(2)

    def ask(question, **given):
        Step(model, tasks, Method(shapers={"b": Asking(question)})).backward(first, **given)

    given = {"validation": second, "optimizer": sgd(model)}
    with pytest.raises(ValueError, match=r"looks ahead and needs step.backward\(batch, validation="):
        ask(ahead())
    with pytest.raises(ValueError, match="looks back at each step and needs"):
        ask(back())
    for validation, message in ((True, "looks ahead and needs"), (False, "looks back at each step and needs")):
        with pytest.raises(ValueError, match=message):
            ask(lambda signals, validation=validation: signals.expect(validation=validation))
        ask(lambda signals, validation=validation: signals.expect(validation=validation), **given)
    with pytest.raises(ValueError, match="not 'forward'"):
        ask(ahead(mode="forward"), **given)
    with pytest.raises(MissingKey, match="there is no task 'd'"):
        ask(ahead("d"), **given)
    with pytest.raises(MissingKey, match="there is no task 'd'"):
        ask(ahead(of=["d"]), **given)
    with pytest.raises(MissingKey, match="no objective 'x'"):
        ask(back(objective="x"), **given)

    class Early(Fixed):
        def forward(self, signals):
            signals.lookahead_elements("b")

    with pytest.raises(ValueError, match="once the step's weights are decided, in a shaper's update"):
        Step(model, tasks, Method(encoder=Early(tasks, WEIGHTS))).backward(first, **given)


def test_an_operator_of_the_head_without_forward_derivative_is_named():
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres = nn.Parameter(torch.randn(2, 5, dtype=torch.float64))

        def forward(self, x):
            return torch.cdist(x, self.centres)

    tasks, model = tiny_tasks(), problem()
    model = SplitModel(model.shared, {**model.heads, "b": Distances()})
    first, second = batches(2)
    given = {"validation": second, "optimizer": sgd(model)}
    with pytest.raises(NoForwardDerivative, match=r"operator _cdist_forward has no .* use mode .difference"):
        Step(model, tasks, Method(shapers={"b": Asking(ahead())})).backward(first, **given)
    shaper = Asking(ahead(mode="difference"))
    check(model, tasks, Method(shapers={"b": shaper}), shaper, rtol=1e-3)


def share(rank, world, way):
    """Slopes of each process's elements in the order of the whole batch; the second has one row, then no labels."""
    found = []
    for split in SPLITS:
        tasks, model = tiny_tasks(), problem(split)
        rows = slice(None) if world == 1 else slice(0, 5) if rank == 0 else slice(5, 6)
        data = [Batch(b.inputs[rows], {k: y[rows] for k, y in b.targets.items()}) for b in batches(4)]
        data[3].targets["b"] = None if world == 2 and rank else data[3].targets["b"]
        shaper, optimizer = Asking((ahead if way == "ahead" else back)()), sgd(model, momentum=0.9)
        step = Step(model, tasks, Method(shapers={"b": shaper}))
        for batch in data if world == 2 else data[:3]:
            optimizer.zero_grad()
            step.backward(batch, validation=data[0], optimizer=optimizer)
            optimizer.step()
        found += [one.slopes for one in shaper.found[:3] if one is not None]
    return found


@pytest.mark.parametrize("way", ["ahead", "back"])
def test_two_processes_look_as_one(way):
    whole = share(0, 1, way)
    halves = in_two_processes(functools.partial(share, way=way))
    # The share of five rows comes first.
    halves.sort(key=lambda found: -len(found[0]))
    for first, second, expected in zip(*halves, whole, strict=True):
        close(torch.cat([first, second]), expected, "slopes", rtol=1e-9)


def test_elements_that_share_a_weight_add_up_to_the_derivative_through_the_step():
    tasks, model, (first, second) = tiny_tasks(("a", "b")), problem(names=("a", "b")), batches(2)
    group = first.targets["b"] > 0
    shaper = Asking(ahead())
    shaper.forward = lambda losses, target: torch.ones_like(losses)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    named = dict(model.named_parameters())
    predictions = model(first.inputs)
    elements = squared(predictions["b"], first.targets["b"])
    loss = squared(predictions["a"], first.targets["a"]).mean() + torch.where(group, weight * elements, elements).mean()
    moved = torch.autograd.grad(loss, [*named.values()], create_graph=True)
    after = {name: p - LR * g for (name, p), g in zip(named.items(), moved, strict=True)}
    probe = squared(functional_call(model, after, (second.inputs,))["a"], second.targets["a"]).mean()
    expected = torch.autograd.grad(probe, weight)[0]
    Step(model, tasks, Method(shapers={"b": shaper})).backward(first, validation=second, optimizer=sgd(model))
    slopes = shaper.found[0].slopes
    close(slopes[group].sum() / slopes.numel(), expected, "derivative")
