"""The lookahead against the derivative through a written-out step."""

import functools

import pytest
import torch
from sidetask_core import Batch, Equal, Method, MissingKey, SplitModel, Step, Task, Weighting
from sidetask_core.derivative import NoForwardDerivative
from sidetask_core.testing import (
    SPLITS,
    batches,
    brute_force,
    close,
    gradients,
    in_two_processes,
    problem,
    squared,
    tiny_tasks,
    train,
)
from torch import nn
from torch.func import functional_call

WEIGHTS = torch.tensor([0.3, 0.7, 1.9], dtype=torch.float64)


class Looking(Weighting):
    """Looks ahead with fixed weights, then weighs with others."""

    def __init__(self, tasks, weights=WEIGHTS, then=None, **how):
        super().__init__(tasks)
        self.given, self.then, self.how, self.found = weights, then, how, []

    def forward(self, signals):
        weights = self.given.to(signals.losses)
        self.found.append(signals.lookahead(weights, **self.how))
        self.part = signals.part
        return weights if self.then is None else self.then.to(weights)


class Given(Weighting):
    """The same weights without a look ahead."""

    def forward(self, signals):
        return WEIGHTS


class InPlace(Looking):
    """Changes, after the look, the tensor that it looked with."""

    def forward(self, signals):
        self.given = WEIGHTS.clone()
        super().forward(signals)
        return self.given.mul_(self.then / WEIGHTS)


def sgd(parameters, **options):
    return torch.optim.SGD(parameters, **{"lr": 0.1, **options})


def losses_at(model, tasks, batch, parameters, shapers=()):
    """Each task's loss, by name, at other parameters."""
    found = []
    for task in tasks:
        prediction = functional_call(model, parameters, (batch.input_of(task), [task.name]))[task.name]
        ((losses, mask),) = task.elements(prediction, batch.target_of(task))
        if task.name in shapers:
            losses = losses * shapers[task.name](losses.detach(), batch.target_of(task))
        mask = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
        found.append(losses[mask].sum() / mask.sum().clamp(min=1))
    return found


def written_out(model, tasks, batch, validation, weights, optimizer, part="all", shapers=()):
    """d(validation loss)/d(weights) by differentiating through the optimizer's step."""
    weights = weights.clone().requires_grad_()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shared = {id(p) for p in model.shared_parameters()}
    losses = losses_at(model, tasks, batch, named, shapers)
    per_task = [torch.autograd.grad(x, [*named.values()], allow_unused=True, retain_graph=True) for x in losses]
    after = {}
    for i, (name, p) in enumerate(named.items()):
        terms = [w * g[i].detach() for w, g in zip(weights, per_task, strict=True) if g[i] is not None]
        group = next((g for g in optimizer.param_groups if any(q is p for q in g["params"])), None)
        if not terms or group is None or (part != "all" and (id(p) in shared) != (part == "shared")):
            after[name] = p.detach()
            continue
        step = sum(terms) + group["weight_decay"] * p.detach()
        if group.get("momentum"):
            old = optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
            buffer = step if old is None else group["momentum"] * old + (1 - group["dampening"]) * step
            step = step + group["momentum"] * buffer if group["nesterov"] else buffer
        after[name] = p.detach() - group["lr"] * step
    primaries = [task for task in tasks if task.primary]
    loss = sum(losses_at(model, primaries, validation, after))
    return torch.autograd.grad(loss, weights)[0]


def check(model, tasks, batch, validation, optimizer, rtol=1e-10, shapers=(), **how):
    rule = Looking(tasks, **how)
    step = Step(model, tasks, Method(encoder=rule, shapers=dict(shapers)))
    step.zero_grad()
    step.backward(batch, validation=validation, optimizer=optimizer)
    expected = written_out(model, tasks, batch, validation, WEIGHTS, optimizer, shapers=shapers)
    assert expected.abs().max() > 1e-8
    close(rule.found[0], expected, "lookahead", rtol=rtol)
    return rule.found[0]


def warmed(model, tasks, **options):
    """An optimizer that has taken a few steps, so that it has momentum."""
    optimizer = sgd(model.parameters(), **options)
    train(Step(model, tasks, Method()), batches(3), optimizer)
    return optimizer


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3},
        {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
    ],
    ids=["plain", "momentum", "dampening", "nesterov"],
)
def test_it_is_the_derivative_through_the_optimizers_step(split, options):
    tasks, model = tiny_tasks(), problem(split, norm=True)
    train_batch, validation = batches(5)[3:]
    check(model, tasks, train_batch, validation, warmed(model, tasks, **options))


def test_the_first_step_has_no_momentum_yet():
    tasks, model = tiny_tasks(), problem()
    check(model, tasks, *batches(2), sgd(model.parameters(), momentum=0.9, dampening=0.5))


def test_several_primaries_and_parameter_groups():
    tasks, model = tiny_tasks(), problem("half-shared")
    tasks[2] = Task("c", squared)
    groups = [
        {"params": model.shared.parameters(), "lr": 0.01, "weight_decay": 0.2},
        {"params": [*model.heads.parameters(), *model.branches["a"].parameters()], "lr": 0.3},
    ]
    check(model, tasks, *batches(2), sgd(groups))


def test_frozen_and_unused_parameters():
    tasks, model = tiny_tasks(), problem(norm=True)
    model.shared[0][0].weight.requires_grad_(False)
    model.heads["b"].bias.requires_grad_(False)
    model.shared.register_parameter("idle", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    check(model, tasks, *batches(2), sgd(model.parameters(), weight_decay=0.1))


def test_labels_are_masked_in_both_batches():
    tasks, model = tiny_tasks(), problem()
    first, second = batches(2)
    first.targets["b"][:3] = torch.nan
    second.targets["a"][1] = torch.nan
    check(model, tasks, first, second, sgd(model.parameters()))


def test_a_task_without_labels_has_no_derivative():
    tasks, model = tiny_tasks(), problem()
    first, second = batches(2)
    rule = Looking(tasks)
    step = Step(model, tasks, Method(encoder=rule))
    absent = Batch(first.inputs, {**first.targets, "b": None})
    step.backward(absent, validation=second, optimizer=sgd(model.parameters()))
    assert rule.found[0][1] == 0
    assert (rule.found[0] != 0).tolist() == [True, False, True]


class Twice(nn.Module):
    """Nested features, one of them under two names, one that nobody trains."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 5)

    def forward(self, x):
        low = torch.tanh(self.first(x))
        return {"low": low, "high": (torch.tanh(self.second(low)), low), "input": x}


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, features):
        high, again = features["high"]
        return self.low(features["low"] + again) + self.high(high) + features["input"][:, :2]


def test_nested_features():
    torch.manual_seed(0)
    model = SplitModel(Twice(), {name: Pyramid() for name in "abc"}).double()
    check(model, tiny_tasks(), *batches(2), sgd(model.parameters()))


def test_tasks_with_inputs_of_their_own():
    tasks = [Task(n, squared, input=n, primary=n != "c") for n in "abc"]
    model = problem("half-shared", norm=False)
    data = [Batch({n: draw.inputs * (1 + i) for i, n in enumerate("abc")}, draw.targets) for draw in batches(2)]
    check(model, tasks, *data, sgd(model.parameters()))
    some = Looking(tasks, among=["b"])
    encoded = []
    model.shared.register_forward_hook(lambda *_: encoded.append(1))
    step = Step(model, tasks, Method(encoder=some))
    step.backward(data[0], validation=data[1], optimizer=sgd(model.parameters()))
    whole = written_out(model, tasks, *data, WEIGHTS, sgd(model.parameters()))
    close(some.found[0], whole * torch.tensor([0.0, 1.0, 0.0]), "among")


def test_a_branch_and_nothing_shared():
    torch.manual_seed(0)
    heads = {name: nn.Linear(5, 2) for name in "abc"}
    branches = {"both": nn.Linear(4, 5), "other": nn.Linear(4, 5)}
    route = {"a": "both", "b": "both", "c": "other"}
    model = SplitModel(nn.Identity(), heads, branches, route).double()
    check(model, tiny_tasks(), *batches(2), sgd(model.parameters()))


def test_shapers_weigh_the_training_losses_only():
    from sidetask_core import Shaper

    class Rows(Shaper):
        def forward(self, losses, target):
            return torch.arange(len(losses), dtype=losses.dtype)[:, None]

    model = problem()
    check(model, tiny_tasks(), *batches(2), sgd(model.parameters()), shapers={"b": Rows()})


@pytest.mark.parametrize("part", ["shared", "specific"])
def test_a_rule_in_one_slot_moves_that_part_only(part):
    tasks, model = tiny_tasks(), problem("two heads on one branch")
    first, second = batches(2)
    rule = Looking(tasks)
    other = Equal(tasks)
    method = Method(encoder=rule, decoder=other) if part == "shared" else Method(encoder=other, decoder=rule)
    optimizer = sgd(model.parameters(), momentum=0.9)
    Step(model, tasks, method).backward(first, validation=second, optimizer=optimizer)
    assert rule.part == part
    expected = written_out(model, tasks, first, second, WEIGHTS, optimizer, part)
    close(rule.found[0], expected, part, rtol=1e-10)


def test_of_a_shared_parameter_in_a_head_only_the_encoders_share_is_weighed():
    tasks, (first, second) = tiny_tasks(), batches(2)
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    heads = {name: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)) for name in "abc"}
    heads["a"][0].weight = shared[0].weight
    model, rule = SplitModel(shared, heads).double(), Looking(tasks)
    Step(model, tasks, Method(encoder=rule, decoder=Equal(tasks))).backward(
        first, validation=second, optimizer=sgd(model.parameters())
    )
    parameters = list(model.shared_parameters())
    features = model.encode(first.inputs)
    through, total = [], [torch.zeros_like(p) for p in parameters]
    for weight, task in zip(WEIGHTS, tasks, strict=True):
        cut = features.detach().requires_grad_()
        loss = task.mean(model.heads[task.name](cut), first.target_of(task))[0]
        at_cut, *beside = torch.autograd.grad(loss, [cut, *parameters], allow_unused=True)
        through.append(torch.autograd.grad(features, parameters, at_cut, retain_graph=True))
        for i, (own, other) in enumerate(zip(through[-1], beside, strict=True)):
            total[i] += weight * (own if other is None else own + other)
    names = {id(p): name for name, p in model.named_parameters()}
    after = {names[id(p)]: (p - 0.1 * g).detach().requires_grad_() for p, g in zip(parameters, total, strict=True)}
    validation = sum(losses_at(model, [task for task in tasks if task.primary], second, after))
    slopes = torch.autograd.grad(validation, list(after.values()))
    expected = [-0.1 * sum((v * g).sum() for v, g in zip(slopes, one, strict=True)) for one in through]
    close(rule.found[0], torch.stack(expected), "tied", rtol=1e-10)


class Stopped(nn.Module):
    """An encoder that computes a scale and a mean outside the graph."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        y = self.layer(x)
        with torch.no_grad():
            scale = y.abs().mean(0)
            self.mean.copy_(y.mean(0))
        return torch.tanh(y / scale - self.mean + y.mean(0).detach())


def test_what_is_outside_the_graph_is_constant():
    torch.manual_seed(0)
    tasks, model = tiny_tasks(), SplitModel(Stopped(), {name: nn.Linear(4, 2) for name in "abc"}).double()
    first, second = batches(2)
    rule, optimizer = Looking(tasks), sgd(model.parameters())
    Step(model, tasks, Method(encoder=rule)).backward(first, validation=second, optimizer=optimizer)

    def at(batch, parameters, names):
        out = functional_call(model, parameters, (batch.inputs, names))
        return [squared(out[name], batch.targets[name]).mean() for name in names]

    named = dict(model.named_parameters())
    weights = WEIGHTS.clone().requires_grad_()
    losses = at(first, named, ["a", "b", "c"])
    per_task = [torch.autograd.grad(x, list(named.values()), allow_unused=True, retain_graph=True) for x in losses]
    after = {
        name: p.detach()
        - 0.1 * sum(w * g[i].detach() for w, g in zip(weights, per_task, strict=True) if g[i] is not None)
        for i, (name, p) in enumerate(named.items())
    }
    primaries = [task.name for task in tasks if task.primary]
    expected = torch.autograd.grad(sum(at(second, after, primaries)), weights)[0]
    close(rule.found[0], expected, "outside the graph", rtol=1e-10)


@pytest.mark.parametrize("then", [None, WEIGHTS.flip(0)], ids=["same", "other"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_step_that_follows_is_as_exact_as_without(split, then):
    tasks, model = tiny_tasks(), problem(split, norm=True)
    first, second = batches(2)
    rule = Looking(tasks, then=then)
    Step(model, tasks, Method(encoder=rule)).backward(first, validation=second, optimizer=sgd(model.parameters()))
    weights = WEIGHTS if then is None else then
    expected = brute_force(problem(split, norm=True), tasks, first, weights, weights)
    for name, found in gradients(model).items():
        close(found, expected[name], name, rtol=1e-10)


def test_weights_changed_in_place_after_the_look_are_the_ones_that_count():
    tasks, model = tiny_tasks(), problem()
    first, second = batches(2)
    rule, weights = InPlace(tasks, then=WEIGHTS.flip(0)), WEIGHTS.flip(0)
    Step(model, tasks, Method(encoder=rule)).backward(first, validation=second, optimizer=sgd(model.parameters()))
    expected = brute_force(problem(), tasks, first, weights, weights)
    for name, found in gradients(model).items():
        close(found, expected[name], name, rtol=1e-10)


@pytest.mark.parametrize(("then", "backward"), [(None, 2), (WEIGHTS.flip(0), 3)], ids=["same", "other"])
def test_nothing_is_computed_twice(then, backward):
    """The step's own pass, the validation batch's, and one more only if the step has other weights."""
    tasks, first, second = tiny_tasks(), *batches(2)
    model = problem()
    counts = {"forward": 0, "backward": 0}

    class Counted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            counts["forward"] += 1
            out = self.inner(x)
            if out.requires_grad:
                out.register_hook(lambda g: counts.update(backward=counts["backward"] + 1))
            return out

    model = SplitModel(Counted(model.shared), dict(model.heads.items()))
    rule = Looking(tasks, then=then)
    Step(model, tasks, Method(encoder=rule)).backward(first, validation=second, optimizer=sgd(model.parameters()))
    assert counts == {"forward": 3, "backward": backward}


def noisy():
    torch.manual_seed(3)
    shared = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh())
    heads = {n: nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 2)) for n in "abc"}
    return SplitModel(shared, heads).double()


@pytest.mark.parametrize("mode", ["exact", "difference", "one-sided"])
def test_side_passes_leave_no_trace(mode):
    states = []
    for ahead in (False, True):
        tasks, model = tiny_tasks(), noisy()
        rule = Looking(tasks, mode=mode) if ahead else Given(tasks)
        step, optimizer = Step(model, tasks, Method(encoder=rule)), sgd(model.parameters())
        torch.manual_seed(5)
        first, second = batches(2)
        for _ in range(3):
            optimizer.zero_grad()
            step.backward(first, validation=second, optimizer=optimizer)
            optimizer.step()
        states.append([torch.get_rng_state(), *model.buffers(), *model.parameters()])
    for i, (one, other) in enumerate(zip(*states, strict=True)):
        # Weights, and what is counted under them, differ in rounding at most: they multiply before or after the
        # encoder's pass.
        torch.testing.assert_close(one, other, rtol=1e-12 if i else 0, atol=1e-15 if i else 0)


def test_dropout_draws_the_same_once_more():
    """The directional derivative is of the very network that the step trains."""
    tasks, model = tiny_tasks(), noisy()
    first, second = batches(2)
    found = {}
    for mode in ("exact", "difference", "one-sided"):
        torch.manual_seed(5)
        rule = Looking(tasks, mode=mode)
        Step(model, tasks, Method(encoder=rule)).backward(first, validation=second, optimizer=sgd(model.parameters()))
        found[mode] = rule.found[0]
    close(found["difference"], found["exact"], "central", rtol=1e-4)
    close(found["one-sided"], found["exact"], "one-sided", rtol=1e-3)


@pytest.mark.parametrize(("mode", "rtol"), [("difference", 1e-4), ("one-sided", 1e-4)])
@pytest.mark.parametrize("split", SPLITS)
def test_differences_come_near(split, mode, rtol):
    tasks, model = tiny_tasks(), problem(split, norm=True)
    check(model, tasks, *batches(2), warmed(model, tasks, momentum=0.9), rtol=rtol, mode=mode)


@pytest.mark.parametrize("mode", ["exact", "difference", "one-sided"])
def test_a_validation_loss_without_slope_has_no_derivative(mode):
    tasks, model = tiny_tasks(), problem()
    first, second = batches(2)
    rule = Looking(tasks, mode=mode)
    nothing = Batch(second.inputs, dict.fromkeys("abc"))
    Step(model, tasks, Method(encoder=rule)).backward(first, validation=nothing, optimizer=sgd(model.parameters()))
    assert rule.found[0].tolist() == [0, 0, 0]


def test_single_precision_is_within_a_percent():
    tasks = tiny_tasks()
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = problem(norm=True, dtype=dtype)
        first, second = batches(2, dtype=dtype)
        rule = Looking(tasks)
        Step(model, tasks, Method(encoder=rule)).backward(first, validation=second, optimizer=sgd(model.parameters()))
        found[dtype] = rule.found[0].double()
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=1e-2, atol=1e-6)


def test_under_autocast_and_a_scaler():
    tasks = tiny_tasks()
    found = []
    for scaled in (False, True):
        model = problem(dtype=torch.float32)
        first, second = batches(2, dtype=torch.float32)
        rule = Looking(tasks)
        step = Step(model, tasks, Method(encoder=rule))
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step.backward(first, validation=second, optimizer=sgd(model.parameters()), scaler=scaler)
        found.append(rule.found[0])
    model = problem()
    first, second = batches(2)
    expected = written_out(model, tasks, first, second, WEIGHTS, sgd(model.parameters()))
    for one in found:
        assert ((one.double() - expected).norm() / expected.norm()) < 0.05


def test_compiled_heads_and_encoder():
    tasks, model = tiny_tasks(), problem()
    first, second = batches(2)
    compiled = SplitModel(
        torch.compile(model.shared, backend="aot_eager"),
        {n: torch.compile(head, backend="aot_eager") for n, head in model.heads.items()},
    )
    rule = Looking(tasks)
    Step(compiled, tasks, Method(encoder=rule)).backward(first, validation=second, optimizer=sgd(model.parameters()))
    close(rule.found[0], written_out(model, tasks, first, second, WEIGHTS, sgd(model.parameters())), "compiled")


def test_other_optimizers_are_taken_to_follow_the_gradient():
    tasks, model = tiny_tasks(), problem()
    found = []
    for optimizer in (
        torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01),
        sgd(model.parameters(), weight_decay=0.01),
    ):
        rule = Looking(tasks)
        first, second = batches(2)
        Step(model, tasks, Method(encoder=rule)).backward(first, validation=second, optimizer=optimizer)
        found.append(rule.found[0])
    assert torch.equal(*found)


class Distances(nn.Module):
    """Distances to trained centres, of which torch has no forward-mode derivative."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return torch.cdist(x, self.centres)


def test_an_operator_without_forward_derivative_is_named():
    torch.manual_seed(0)
    model = SplitModel(Distances(), {name: nn.Linear(6, 2) for name in "abc"}).double()
    tasks, given = tiny_tasks(), {"validation": batches(2)[1], "optimizer": sgd(model.parameters())}
    with pytest.raises(NoForwardDerivative, match=r"operator _cdist_forward has no .* use mode .difference"):
        Step(model, tasks, Method(encoder=Looking(tasks))).backward(batches(1)[0], **given)
    rule = Looking(tasks, mode="difference")
    Step(model, tasks, Method(encoder=rule)).backward(batches(1)[0], **given)
    assert rule.found[0].isfinite().all()


class Cube(torch.autograd.Function):
    """A function of its own gradient, without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Cubed(nn.Linear):
    def forward(self, x):
        return Cube.apply(super().forward(x))


def test_a_function_without_forward_derivative_is_named_where_it_is_called():
    model = SplitModel(Cubed(4, 6), {name: nn.Linear(6, 2) for name in "abc"}).double()
    tasks, given = tiny_tasks(), {"validation": batches(2)[1], "optimizer": sgd(model.parameters())}
    with pytest.raises(NoForwardDerivative, match=r"test_lookahead.py, line .*Cube.apply.* use mode .difference"):
        Step(model, tasks, Method(encoder=Looking(tasks))).backward(batches(1)[0], **given)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_validation_loss_that_is_not_finite_skips_no_step(scaled):
    tasks, model = tiny_tasks(), problem(dtype=torch.float32)
    first, second = batches(2, dtype=torch.float32)
    bad = Batch(second.inputs * torch.nan, second.targets)
    rule = Looking(tasks)
    step, optimizer = Step(model, tasks, Method(encoder=rule)), sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
    step.backward(first, validation=bad, optimizer=optimizer, scaler=scaler)
    assert rule.found[0].isnan().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values() if gradient is not None)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == (1024.0 if scaled else 1.0)


def test_an_optimizer_of_many_steps_is_refused():
    tasks, model = tiny_tasks(), problem()
    first, second = batches(2)
    step = Step(model, tasks, Method(encoder=Looking(tasks)))
    with pytest.raises(ValueError, match="LBFGS"):
        step.backward(first, validation=second, optimizer=torch.optim.LBFGS(model.parameters()))


def test_a_validation_batch_may_be_made_when_it_is_needed():
    tasks, model = tiny_tasks(), problem()
    first, second = batches(2)
    made = []

    def make():
        made.append(second)
        return second

    given = {"validation": make, "optimizer": sgd(model.parameters())}
    Step(model, tasks, Method()).backward(first, **given)
    assert not made
    rule = Looking(tasks)
    Step(model, tasks, Method(encoder=rule)).backward(first, **given)
    assert len(made) == 1
    close(rule.found[0], written_out(model, tasks, first, second, WEIGHTS, given["optimizer"]), "lookahead")


def test_what_is_missing_is_said():
    tasks, model = tiny_tasks(), problem()
    first, second = batches(2)
    step = Step(model, tasks, Method(encoder=Looking(tasks)))
    for given in ({}, {"validation": second}, {"optimizer": sgd(model.parameters())}):
        with pytest.raises(ValueError, match=r"looks ahead and needs step.backward\(batch, validation="):
            step.backward(first, **given)
    given = {"validation": second, "optimizer": sgd(model.parameters())}
    with pytest.raises(ValueError, match="exact, difference, one-sided; not 'forward'"):
        Step(model, tasks, Method(encoder=Looking(tasks, mode="forward"))).backward(first, **given)
    with pytest.raises(MissingKey, match="there is no task 'd'"):
        Step(model, tasks, Method(encoder=Looking(tasks, among=["d"]))).backward(first, **given)
    with pytest.raises(ValueError, match="trains no parameter of the step's model"):
        step.backward(first, validation=second, optimizer=sgd(problem().parameters()))
    uphill = sgd(model.parameters(), maximize=True)
    with pytest.raises(ValueError, match="maximizes"):
        step.backward(first, validation=second, optimizer=uphill)


def share(rank, world, mode):
    tasks = tiny_tasks()
    found = {}
    for split in SPLITS:
        model = problem(split)
        rule = Looking(tasks, mode=mode)
        # Unequal shares: one row for the second process.
        rows = slice(None) if world == 1 else slice(0, 5) if rank == 0 else slice(5, 6)
        first, second = (Batch(b.inputs[rows], {k: y[rows] for k, y in b.targets.items()}) for b in batches(2))
        optimizer = sgd(model.parameters(), momentum=0.9)
        Step(model, tasks, Method(encoder=rule)).backward(first, validation=second, optimizer=optimizer)
        found[split] = rule.found[0]
    return found


@pytest.mark.parametrize(("mode", "rtol"), [("exact", 1e-10), ("difference", 1e-3)])
def test_two_processes_look_as_one(mode, rtol):
    whole = share(0, 1, mode)
    for half in in_two_processes(functools.partial(share, mode=mode)):
        for name, value in whole.items():
            close(half[name], value, name, rtol=rtol)


class LookingBack(Weighting):
    """Looks back at the weights of the step before, in each n-th step."""

    def __init__(self, tasks, every=1, **how):
        super().__init__(tasks)
        self.every, self.how, self.found = every, how, []

    def forward(self, signals):
        if signals.iteration % self.every == 0:
            self.found.append(signals.hindsight(**self.how))
        return WEIGHTS.to(signals.losses)


def two_steps(model, tasks, optimizer, data, part="all", **how):
    """What the second step says of the first, and the derivative through the optimizer's real step."""
    rule = LookingBack(tasks, **how)
    method = Method(encoder=rule) if part == "all" else Method(encoder=rule, decoder=Equal(tasks))
    step = Step(model, tasks, method)
    expected = None
    for batch in data:
        optimizer.zero_grad()
        step.backward(batch, optimizer=optimizer)
        if expected is None:
            expected = written_out(model, tasks, *data, WEIGHTS, optimizer, part)
            optimizer.step()
            # The caller may fill the same memory with the next batch.
            inputs = batch.inputs.values() if isinstance(batch.inputs, dict) else [batch.inputs]
            for x in inputs:
                x.zero_()
    assert rule.found[0] is None
    return rule.found[1], expected


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True, "dampening": 0.0}])
def test_hindsight_is_the_derivative_through_the_step_that_was_taken(split, options):
    tasks, model = tiny_tasks(), problem(split, norm=True)
    tasks[2] = Task("c", squared)
    found, expected = two_steps(model, tasks, warmed(model, tiny_tasks(), **options), batches(2))
    close(found, expected, "hindsight", rtol=1e-10)


@pytest.mark.parametrize(("mode", "rtol"), [("difference", 1e-4), ("one-sided", 1e-3)])
def test_hindsight_by_differences(mode, rtol):
    model = problem(norm=True)
    found, expected = two_steps(model, tiny_tasks(), sgd(model.parameters()), batches(2), mode=mode)
    close(found, expected, "hindsight", rtol=rtol)


def test_hindsight_with_inputs_of_their_own():
    tasks = [Task(n, squared, input=n, primary=n != "c") for n in "abc"]
    model = problem("half-shared")
    data = [Batch({n: draw.inputs * (1 + i) for i, n in enumerate("abc")}, draw.targets) for draw in batches(2)]
    found, expected = two_steps(model, tasks, sgd(model.parameters()), data)
    close(found, expected, "hindsight", rtol=1e-10)


def test_hindsight_sees_the_dropout_of_the_step_before():
    found = {}
    for mode in ("exact", "difference"):
        model, tasks = noisy(), tiny_tasks()
        torch.manual_seed(5)
        optimizer, rule = sgd(model.parameters()), LookingBack(tasks, mode=mode)
        step = Step(model, tasks, Method(encoder=rule))
        for batch in batches(2):
            optimizer.zero_grad()
            step.backward(batch, optimizer=optimizer)
            optimizer.step()
        found[mode] = rule.found[1]
    close(found["difference"], found["exact"], "central", rtol=1e-4)


def test_hindsight_leaves_the_step_and_the_world_alone():
    states = []
    for back in (False, True):
        tasks, model = tiny_tasks(), noisy()
        torch.manual_seed(5)
        step = Step(model, tasks, Method(encoder=LookingBack(tasks) if back else Given(tasks)))
        optimizer = sgd(model.parameters())
        for batch in batches(4):
            optimizer.zero_grad()
            step.backward(batch, optimizer=optimizer)
            optimizer.step()
        states.append([torch.get_rng_state(), *model.buffers(), *model.parameters()])
    assert torch.equal(states[0][0], states[1][0])
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("every", [1, 3])
def test_hindsight_survives_a_resume(tmp_path, every):
    def start():
        tasks, model = tiny_tasks(), noisy()
        rule = LookingBack(tasks, every)
        step, optimizer = Step(model, tasks, Method(encoder=rule)), sgd(model.parameters(), momentum=0.9)
        torch.manual_seed(5)
        return step, optimizer, rule

    def go(step, optimizer, data):
        for batch in data:
            optimizer.zero_grad()
            step.backward(batch, optimizer=optimizer)
            optimizer.step()

    data = batches(7)
    whole, optimizer, rule = start()
    go(whole, optimizer, data)
    half, half_optimizer, its_first = start()
    # One step before the last that is asked about, which has to be kept before anything is asked again.
    go(half, half_optimizer, data[:5])
    torch.save([half.state_dict(), half_optimizer.state_dict(), torch.get_rng_state()], tmp_path / "state.pt")
    resumed, resumed_optimizer, its_rule = start()
    state, optimizer_state, random = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state)
    resumed_optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(random)
    go(resumed, resumed_optimizer, data[5:])
    assert its_rule.found
    for found, expected in zip(its_rule.found, rule.found[len(its_first.found) :], strict=True):
        assert torch.equal(found, expected)


def test_hindsight_needs_the_optimizer_of_every_step():
    tasks, model = tiny_tasks(), problem()
    with pytest.raises(ValueError, match="looks back at each step and needs"):
        Step(model, tasks, Method(encoder=LookingBack(tasks))).backward(batches(1)[0])


def test_a_failed_step_leaves_no_hindsight():
    tasks, model = tiny_tasks(), problem()
    rule, optimizer = LookingBack(tasks), sgd(model.parameters())
    step, (first, second) = Step(model, tasks, Method(encoder=rule)), batches(2)
    step.backward(first, optimizer=optimizer)
    with pytest.raises(ArithmeticError):
        step.backward(Batch(first.inputs * float("nan"), first.targets), optimizer=optimizer)
    step.backward(second, optimizer=optimizer)
    assert rule.found == [None, None]


def hindsight_of_share(rank, world):
    tasks, model = tiny_tasks(), problem("two heads on one branch")
    rows = slice(None) if world == 1 else slice(0, 5) if rank == 0 else slice(5, 6)
    data = [Batch(b.inputs[rows], {k: y[rows] for k, y in b.targets.items()}) for b in batches(3)]
    rule, optimizer = LookingBack(tasks), sgd(model.parameters(), momentum=0.9)
    step = Step(model, tasks, Method(encoder=rule))
    for batch in data:
        optimizer.zero_grad()
        step.backward(batch, optimizer=optimizer)
        optimizer.step()
    return {"second": rule.found[1], "third": rule.found[2]}


def test_two_processes_look_back_as_one():
    whole = hindsight_of_share(0, 1)
    for half in in_two_processes(hindsight_of_share):
        for name, value in whole.items():
            close(half[name], value, name, rtol=1e-10)
