"""Looking ahead and back behind branches that many heads ride: a derivative is carried through each of them once."""

import functools

import pytest
import torch
from sidetask_core import Batch, Equal, Method, SplitModel, Step, Task, Weighting
from sidetask_core.testing import batches, close, gradients, in_two_processes, squared
from torch import nn
from torch.func import functional_call

# Seven ride one branch and two another; one has a branch alone, and one reads the shared features.
NAMES = tuple("abcdefghijk")
ROUTE = {**dict.fromkeys("abcdefg", "many"), "h": "few", "i": "few", "j": "alone", "k": None}
LR = 0.1
MANY, SHARED = 5, 6


class Pair(nn.Module):
    """Two maps of different sizes, as a pyramid has them."""

    def __init__(self, norm=True, dropout=0.0):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(SHARED, MANY), nn.BatchNorm1d(MANY) if norm else nn.Tanh(), nn.Tanh())
        self.second = nn.Sequential(nn.Dropout(dropout), nn.Linear(MANY, MANY), nn.Tanh())

    def forward(self, x):
        first = self.first(x)
        return [first, self.second(first)]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.lateral = nn.ModuleList([nn.Linear(MANY, 2), nn.Linear(MANY, 2)])

    def forward(self, maps):
        return self.lateral[0](maps[0]) + self.lateral[1](maps[1])


def network(dropout=0.0, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shared = nn.Sequential(nn.Linear(4, SHARED), nn.BatchNorm1d(SHARED), nn.Tanh(), nn.Dropout(dropout))
        branches = {name: Pair(dropout=dropout) for name in ("many", "few", "alone")}
        heads = {name: Head() if name != "k" else nn.Linear(SHARED, 2) for name in NAMES}
        return SplitModel(shared, heads, branches, ROUTE).to(dtype)


def eleven():
    return [Task(name, squared, primary=name in "abhk") for name in NAMES]


def given(dtype=torch.float64):
    return torch.linspace(0.3, 1.7, len(NAMES), dtype=dtype)


class Looks(Weighting):
    def __init__(self, tasks, back=False, read=False, **how):
        super().__init__(tasks)
        self.back, self.read, self.how, self.found = back, read, how, []

    def forward(self, signals):
        if self.read:
            signals.norms("features")
        weights = given().to(signals.losses)
        self.found.append(signals.hindsight(**self.how) if self.back else signals.lookahead(weights, **self.how))
        return weights


def written_out(model, tasks, batch, validation, part="all", elsewhere=0.0):
    """d(primaries' loss after a plain step)/d(weights of a part of the parameters), through the step.

    `elsewhere` is every task's weight in the other part.
    """
    weights = given().requires_grad_()
    named, shared = dict(model.named_parameters()), {id(p) for p in model.shared_parameters()}

    def loss_of(task, batch, parameters):
        prediction = functional_call(model, parameters, (batch.inputs, [task.name]))[task.name]
        return squared(prediction, batch.targets[task.name]).mean()

    after = {name: p.detach() for name, p in named.items()}
    for weight, task in zip(weights, tasks, strict=True):
        if batch.targets[task.name] is None:
            continue
        found = torch.autograd.grad(loss_of(task, batch, named), [*named.values()], allow_unused=True)
        for (name, p), g in zip(named.items(), found, strict=True):
            if g is not None:
                mine = part == "all" or (id(p) in shared) == (part == "shared")
                after[name] = after[name] - LR * (weight if mine else elsewhere) * g
    loss = sum(loss_of(task, validation, after) for task in tasks if task.primary)
    return torch.autograd.grad(loss, weights)[0]


def method_of(rule, tasks, part):
    if part == "specific":
        return Method(encoder=Equal(tasks), decoder=rule)
    return Method(encoder=rule, decoder=Equal(tasks) if part == "shared" else None)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("part", ["all", "shared", "specific"])
@pytest.mark.parametrize(
    ("mode", "taken"), [("exact", False), ("exact", True), ("difference", False), ("one-sided", True)]
)
def test_looking_ahead(mode, taken, part, missing):
    tasks, model = eleven(), network()
    first, second = batches(2, names=NAMES)
    if missing:
        first = Batch(first.inputs, {**first.targets, "c": None})
    rule = Looks(tasks, mode=mode, taken=taken)
    step, optimizer = Step(model, tasks, method_of(rule, tasks, part)), torch.optim.SGD(model.parameters(), lr=LR)
    step.backward(first, validation=second, optimizer=optimizer)
    expected = written_out(model, tasks, first, second, part)
    assert (expected[[t for t in range(11) if not (missing and t == 2)]].abs() > 1e-7).sum() >= 9
    close(rule.found[0], expected, "lookahead", rtol=1e-9 if mode == "exact" else 1e-3)


@pytest.mark.parametrize("part", ["all", "shared", "specific"])
def test_looking_back(part):
    tasks, model = eleven(), network()
    first, second = batches(2, names=NAMES)
    rule = Looks(tasks, back=True)
    step, optimizer = Step(model, tasks, method_of(rule, tasks, part)), torch.optim.SGD(model.parameters(), lr=LR)
    # Not asked for before the first step, which leaves nothing to a second that asks.
    step.backward(first, optimizer=optimizer)
    optimizer.zero_grad()
    step.backward(first, optimizer=optimizer)
    # The part that others weigh has moved, too: the slope is that of a step that was really taken.
    expected = written_out(model, tasks, first, second, part, elsewhere=1.0)
    optimizer.step()
    first.inputs.zero_()
    step.backward(second, optimizer=optimizer)
    close(rule.found[-1], expected, "hindsight", rtol=1e-9)


@pytest.mark.parametrize("how", [{}, {"taken": True}, {"mode": "one-sided"}, {"back": True}])
def test_the_step_s_own_gradient_stays_what_it_is(how):
    """So do BatchNorm statistics and random state, with dropout everywhere."""
    found = []
    for looks in (False, True):
        tasks, model = eleven(), network(dropout=0.3)
        first, second = batches(2, names=NAMES)
        torch.manual_seed(3)
        rule = Looks(tasks, **how) if looks else Fixed(tasks)
        step, optimizer = Step(model, tasks, Method(encoder=rule)), torch.optim.SGD(model.parameters(), lr=LR)
        for batch in (first, second):
            optimizer.zero_grad()
            step.backward(batch, validation=second, optimizer=optimizer)
        found.append((gradients(model), dict(model.named_buffers()), torch.get_rng_state()))
    for name, gradient in found[0][0].items():
        close(found[1][0][name], gradient, name, rtol=1e-10)
    for name, buffer in found[0][1].items():
        assert torch.equal(found[1][1][name], buffer)
    assert torch.equal(found[0][2], found[1][2])


class Fixed(Weighting):
    def forward(self, signals):
        return given().to(signals.losses)


@pytest.mark.parametrize("among", [NAMES, ("h", "i")])
@pytest.mark.parametrize("back", [False, True])
def test_dropout_in_branches_draws_the_same_once_more(back, among):
    """The gradients of riders that were read before are those of what was really drawn."""
    found = []
    for read in (False, True):
        tasks, model = eleven(), network(dropout=0.3)
        first, second = batches(2, names=NAMES)
        torch.manual_seed(3)
        rule = Looks(tasks, back=back, read=read, among=among)
        step, optimizer = Step(model, tasks, Method(encoder=rule)), torch.optim.SGD(model.parameters(), lr=LR)
        for batch in (first, first, second):
            optimizer.zero_grad()
            torch.manual_seed(5)
            step.backward(batch, validation=second, optimizer=optimizer)
            optimizer.step()
        found.append(rule.found[-1])
    assert found[0].count_nonzero() == len(among)
    close(found[0], found[1], "slopes", rtol=1e-9)


@pytest.mark.parametrize("part", ["all", "shared", "specific"])
def test_a_parameter_that_a_branch_shares_with_the_encoder(part):
    """The same as where every rider's gradient was read before, which then meets what moves at the features."""
    found = []
    for read in (False, True):
        tasks, model = eleven(), network()
        tied = model.branches["many"].first[0]
        model.shared.append(nn.Sequential(nn.Linear(SHARED, MANY), nn.Tanh(), nn.Linear(MANY, SHARED)).double())
        with torch.no_grad():
            for p in model.shared[-1].parameters():
                p.copy_(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p))
        model.shared[-1][0].weight = tied.weight
        first, second = batches(2, names=NAMES)
        rule = Looks(tasks, read=read)
        step, optimizer = Step(model, tasks, method_of(rule, tasks, part)), torch.optim.SGD(model.parameters(), lr=LR)
        step.backward(first, validation=second, optimizer=optimizer)
        found.append(rule.found[0])
    close(found[0], found[1], "lookahead", rtol=1e-9)
    if part == "all":
        close(found[0], written_out(model, tasks, first, second), "lookahead", rtol=1e-9)


def test_hindsight_survives_a_resume(tmp_path):
    def start():
        tasks, model = eleven(), network(dropout=0.3)
        rule = Looks(tasks, back=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        torch.manual_seed(3)
        return Step(model, tasks, Method(encoder=rule)), optimizer, rule

    def go(step, optimizer, data):
        for batch in data:
            optimizer.zero_grad()
            step.backward(batch, optimizer=optimizer)
            optimizer.step()

    data = batches(4, names=NAMES)
    whole, optimizer, rule = start()
    go(whole, optimizer, data)
    half, half_optimizer, _ = start()
    go(half, half_optimizer, data[:2])
    torch.save([half.state_dict(), half_optimizer.state_dict(), torch.get_rng_state()], tmp_path / "state.pt")
    resumed, resumed_optimizer, its_rule = start()
    state, optimizer_state, random = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state)
    resumed_optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(random)
    go(resumed, resumed_optimizer, data[2:])
    for found, expected in zip(its_rule.found, rule.found[2:], strict=True):
        assert torch.equal(found, expected)


def of_a_share(rank, world, back):
    tasks, model = eleven(), network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    rows = slice(None) if world == 1 else slice(0, 4) if rank == 0 else slice(4, 6)
    data = [Batch(b.inputs[rows], {k: y[rows] for k, y in b.targets.items()}) for b in batches(3, names=NAMES)]
    rule, optimizer = Looks(tasks, back=back), torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    step = Step(model, tasks, Method(encoder=rule))
    for batch in data:
        optimizer.zero_grad()
        step.backward(batch, validation=data[0], optimizer=optimizer)
        optimizer.step()
    return {str(i): found for i, found in enumerate(rule.found) if found is not None} | {
        name: p.detach() for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("back", [False, True])
def test_two_processes_are_as_one(back):
    whole = of_a_share(0, 1, back)
    for half in in_two_processes(functools.partial(of_a_share, back=back)):
        for name, value in whole.items():
            close(half[name], value, name, rtol=1e-9)


@pytest.mark.parametrize("how", [{}, {"taken": True}])
def test_under_a_scaler_slopes_are_those_of_the_losses(how):
    found = []
    for scaled in (False, True):
        tasks, model = eleven(), network(dtype=torch.float32)
        first, second = batches(2, names=NAMES, dtype=torch.float32)
        rule = Looks(tasks, **how)
        step, optimizer = Step(model, tasks, Method(encoder=rule)), torch.optim.SGD(model.parameters(), lr=LR)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        step.backward(first, validation=second, optimizer=optimizer, scaler=scaler)
        found.append((rule.found[0], {name: g / scaler.get_scale() for name, g in gradients(model).items()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-7)


class Counts(nn.Linear):
    """Counts its passes forward, and backward through it."""

    forwards = backwards = 0

    def forward(self, x):
        Counts.forwards += 1
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(self.count)
        return y

    @staticmethod
    def count(gradient):
        Counts.backwards += 1


@pytest.mark.parametrize(
    ("riders", "how", "forwards", "backwards"),
    [
        # Step and validation; each rider backward, and the validation batch.
        (2, {"taken": False}, 2, 3),
        (1, {"taken": True}, 2, 2),
        # Step, validation and derivative; direction and validation, and with other weights the step. At equal work this
        # way needs less memory.
        (3, {"taken": False}, 3, 3),
        (2, {"taken": True}, 3, 2),
        (2, {"taken": True, "mode": "one-sided"}, 3, 2),
    ],
)
def test_a_branch_is_passed_as_seldom_as_can_be(riders, how, forwards, backwards):
    names = NAMES[:riders]
    heads = {name: nn.Linear(MANY, 2) for name in names}
    model = SplitModel(nn.Linear(4, SHARED), heads, {"b": Counts(SHARED, MANY)}, dict.fromkeys(names, "b")).double()
    tasks = [Task(name, squared, primary=name == "a") for name in names]

    class Rule(Weighting):
        def forward(self, signals):
            weights = torch.ones_like(signals.losses)
            signals.lookahead(weights, **how)
            return weights if how["taken"] else 2 * weights

    first, second = batches(2, names=names)
    Counts.forwards = Counts.backwards = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    Step(model, tasks, Method(encoder=Rule(tasks))).backward(first, validation=second, optimizer=optimizer)
    assert (Counts.forwards, Counts.backwards) == (forwards, backwards)
