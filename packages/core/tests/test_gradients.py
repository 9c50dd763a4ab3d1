"""Gradients of every parameter equal brute force, whatever the split and whatever the rules read."""

import itertools

import pytest
import torch
from sidetask_core import Batch, Combiner, Fixed, Method, SplitModel, Step, Task, Weighting
from sidetask_core.testing import NAMES, SPLITS, batches, brute_force, gradients, in_two_processes, problem, squared
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


class Reads(Weighting):
    """Weights that depend on one kind of signal."""

    def __init__(self, tasks, kind):
        super().__init__(tasks)
        self.kind = kind

    def forward(self, signals):
        if self.kind == "losses":
            return signals.losses.softmax(0)
        if self.kind == "norms":
            return 1 / signals.norms("features")
        gramian = signals.gramian(self.kind)
        return gramian.sum(0) / gramian.trace()


class SignAgreement(Combiner):
    """Not a weighted sum: the mean gradient, stretched where the tasks' signs agree. Sees signs of single samples."""

    def forward(self, signals):
        matrix = signals.gradients(self.at)
        return matrix.mean(0) * matrix.sign().sum(0).abs()


KINDS = (None, "losses", "norms", "features", "parameters")


def tasks_of(names=NAMES):
    return [Task(name, squared) for name in names]


def nested_model():
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(2, 2)

        def forward(self, x):
            early = self.first(x).tanh()
            return {"pyramid": (early, [self.second(early).tanh()]), "size": 4, "raw": x}

    class Head(nn.Module):
        def __init__(self, early):
            super().__init__()
            self.early, self.late = early, nn.Linear(6 if early else 5, 2)

        def forward(self, features):
            early, (late,) = features["pyramid"]
            return self.late(early if self.early else late) + features["raw"][:, :2]

    return SplitModel(Encoder(), {"a": Head(True), "b": Head(False), "c": Head(False)}).double()


def tied_model():
    model = problem()
    tied = nn.Linear(5, 2).double()
    return SplitModel(model.shared, {"a": tied, "b": nn.Sequential(tied, nn.Tanh()), "c": model.heads["c"]})


class Named(nn.Module):
    """The same features under two names."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x):
        z = self.layer(x)
        return {"out": z, "last": z, "nothing": None}


class Takes(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name, self.layer = name, nn.Linear(5, 2)

    def forward(self, features):
        return self.layer(features[self.name])


def named_model():
    torch.manual_seed(0)
    return SplitModel(Named(), {"a": Takes("out"), "b": Takes("last"), "c": Takes("out")}).double()


MODELS = {split: lambda split=split: problem(split) for split in SPLITS} | {
    "nested": nested_model,
    "tied": tied_model,
    "named twice": named_model,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("above", "below"), list(itertools.product(KINDS, [*KINDS, "same"])))
def test_weightings_equal_brute_force(name, above, below):
    model, tasks, (batch, *_) = MODELS[name](), tasks_of(), batches(1)
    encoder = None if above is None else Reads(tasks, above)
    decoder = None if below is None else encoder if below == "same" else Reads(tasks, below)
    report = Step(model, tasks, Method(encoder=encoder, decoder=decoder)).backward(batch)
    expected = brute_force(
        model, tasks, batch, list(report.encoder_weights.values()), list(report.decoder_weights.values())
    )
    for key, found in gradients(model).items():
        torch.testing.assert_close(found, expected[key], rtol=1e-10, atol=1e-12, msg=f"{key}")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "named twice"])
@pytest.mark.parametrize("below", KINDS)
@pytest.mark.parametrize("at", ["features", "parameters"])
def test_combiners_equal_brute_force(name, below, at):
    model, tasks, (batch, *_) = MODELS[name](), tasks_of(), batches(1)
    decoder = None if below is None else Reads(tasks, below)
    report = Step(model, tasks, Method(encoder=SignAgreement(tasks, at=at), decoder=decoder)).backward(batch)
    assert report.encoder_weights == {}
    features = model.encode(batch.inputs)
    live, spec = tree_flatten(features)
    # Only what reaches a feature from the heads is combined there, not what a later feature passes on to it.
    cut = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x for x in live]
    predictions = model.decode(tree_unflatten(cut, spec) if at == "features" else features)
    shared = model.shared_parameters()
    leaves = [x for x in cut if isinstance(x, Tensor) and x.requires_grad]
    wanted = leaves if at == "features" else shared
    rows = []
    for task in tasks:
        loss, _ = task.mean(predictions[task.name], batch.target_of(task))
        grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(w * 0 if g is None else g).flatten() for w, g in zip(wanted, grads, strict=True)]))
    matrix = torch.stack(rows)
    flat = matrix.mean(0) * matrix.sign().sum(0).abs()
    combined = [part.view_as(w) for part, w in zip(flat.split([w.numel() for w in wanted]), wanted, strict=True)]
    if at == "features":
        above = [x for x in live if isinstance(x, Tensor) and x.requires_grad]
        combined = torch.autograd.grad(above, shared, combined, allow_unused=True)
    for parameter, expected in zip(shared, combined, strict=True):
        if expected is None:
            assert parameter.grad is None
            continue
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    decoder_weights = list(report.decoder_weights.values())
    expected = brute_force(model, tasks, batch, decoder_weights, decoder_weights)
    for key, found in gradients(model).items():
        if not key.startswith("shared"):
            torch.testing.assert_close(found, expected[key], rtol=1e-10, atol=1e-12)


def test_a_tensor_under_two_names_is_one_feature():
    tasks, model, (batch, *_) = tasks_of(), named_model(), batches(1)
    seen = []

    class Looks(Weighting):
        def forward(self, signals):
            seen.append(signals.gramian("features"))
            return torch.ones(3)

    Step(model, tasks, Method(encoder=Looks(tasks))).backward(batch)
    z = model.shared.layer(batch.inputs)
    rows = []
    for task in tasks:
        loss = squared(model.heads[task.name].layer(z), batch.targets[task.name]).mean()
        rows.append(torch.autograd.grad(loss, z, retain_graph=True)[0].flatten())
    matrix = torch.stack(rows)
    torch.testing.assert_close(seen[0], matrix @ matrix.T, rtol=1e-10, atol=1e-14)


def with_own_inputs():
    tasks = [Task(name, squared, input=name) for name in NAMES]
    inputs = {name: batch.inputs for name, batch in zip(NAMES, batches(3), strict=True)}
    return tasks, Batch(inputs, batches(1)[0].targets)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("above", [None, "losses", "norms", "parameters"])
@pytest.mark.parametrize("below", [None, "losses", "norms", "parameters"])
def test_tasks_with_their_own_inputs_equal_brute_force(split, above, below):
    model, (tasks, batch) = problem(split), with_own_inputs()
    encoder = None if above is None else Reads(tasks, above)
    decoder = None if below is None else Reads(tasks, below)
    report = Step(model, tasks, Method(encoder=encoder, decoder=decoder)).backward(batch)
    expected = brute_force(
        model, tasks, batch, list(report.encoder_weights.values()), list(report.decoder_weights.values())
    )
    for key, found in gradients(model).items():
        torch.testing.assert_close(found, expected[key], rtol=1e-10, atol=1e-12)


def test_a_combiner_over_parameters_takes_tasks_with_their_own_inputs():
    model, (tasks, batch) = problem(), with_own_inputs()
    Step(model, tasks, Method(encoder=SignAgreement(tasks, at="parameters"))).backward(batch)
    rows = []
    for task in tasks:
        loss, _ = task.mean(model(batch.inputs[task.name])[task.name], batch.targets[task.name])
        grads = torch.autograd.grad(loss, model.shared_parameters())
        rows.append(torch.cat([g.flatten() for g in grads]))
    matrix = torch.stack(rows)
    found = torch.cat([p.grad.flatten() for p in model.shared_parameters()])
    torch.testing.assert_close(found, matrix.mean(0) * matrix.sign().sum(0).abs(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_adds_the_micro_batches(kind):
    tasks, (first, second) = tasks_of(), batches(2)
    separate = []
    for batch in (first, second):
        step = Step(problem(), tasks, Method(encoder=Reads(tasks, kind) if kind else None))
        step.backward(batch)
        separate.append(gradients(step.model))
    step = Step(problem(), tasks, Method(encoder=Reads(tasks, kind) if kind else None))
    step.backward(first)
    step.backward(second)
    for key, found in gradients(step.model).items():
        torch.testing.assert_close(found, separate[0][key] + separate[1][key], rtol=1e-10, atol=1e-12)


def test_single_task_learning_shares_nothing_and_equals_separate_networks():
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(4, 5), nn.Tanh())]
    model = SplitModel.from_stages(stages, 0, {n: nn.Linear(5, 2) for n in NAMES}).double()
    tasks, (batch, *_) = tasks_of(), batches(1)
    Step(model, tasks).backward(batch)
    for task in tasks:
        alone = nn.Sequential(model.branches[task.name], model.heads[task.name])
        loss = squared(alone(batch.inputs), batch.targets[task.name]).mean()
        for found, expected in zip(
            [p.grad for p in alone.parameters()], torch.autograd.grad(loss, list(alone.parameters())), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_frozen_and_unreached_parameters_keep_no_gradient():
    model, tasks, (batch, *_) = nested_model(), tasks_of(), batches(1)
    model.shared.first.weight.requires_grad_(False)
    model.heads["b"].requires_grad_(False)
    for kind in KINDS:
        model.zero_grad()
        Step(model, tasks, Method(encoder=Reads(tasks, kind) if kind else None)).backward(batch)
        assert model.shared.first.weight.grad is None
        assert model.shared.unused.weight.grad is None
        assert all(p.grad is None for p in model.heads["b"].parameters())
        assert model.shared.second.weight.grad is not None


def test_gradients_own_their_memory():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            # Of the full shape, so that autograd hands both of them the one gradient of the sum.
            self.first, self.second = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.ones(1, 3))

        def forward(self, x):
            return x + self.first + self.second

    model = SplitModel(Twice(), {"a": nn.Identity()})
    Step(model, [Task("a", squared)]).backward(Batch(torch.ones(1, 3), {"a": torch.zeros(1, 3)}))
    first, second = model.shared.first.grad, model.shared.second.grad
    assert first.data_ptr() != second.data_ptr()
    first.zero_()
    assert second.any()


def test_zero_weights_give_zero_gradients():
    tasks, (batch, *_) = tasks_of(), batches(1)
    step = Step(problem(), tasks, Method(encoder=Fixed(tasks, dict.fromkeys(NAMES, 0.0))))
    step.backward(batch)
    assert all((g == 0).all() for g in gradients(step.model).values())


def two_processes_share(kind, combiner, unequal, rank, world):
    """Gradients of this process, its part of the batch being a third or two thirds if `unequal`."""
    found = {}
    for split in SPLITS:
        tasks = [Task(name, squared, valid=lambda y: ~y.isnan()) for name in NAMES]
        rule = SignAgreement(tasks, at=combiner) if combiner else Reads(tasks, kind) if kind else None
        step = Step(problem(split), tasks, Method(encoder=rule))
        (batch,) = batches(1, size=6)
        batch.targets["c"][0] = torch.nan
        if world > 1:
            part = slice(rank, None, 2) if not unequal else slice(0, 2) if rank == 0 else slice(2, None)
            batch = Batch(batch.inputs[part], {name: y[part] for name, y in batch.targets.items()})
            if unequal and rank == 0:
                batch = Batch(batch.inputs, {**batch.targets, "c": torch.full((2, 2), torch.nan).double()})
        elif unequal:
            batch.targets["c"][:2] = torch.nan
        report = step.backward(batch)
        found |= {f"{split} {name}": g for name, g in gradients(step.model).items()}
        found |= {f"{split} weight {name}": w for name, w in report.encoder_weights.items()}
    return found


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize(
    ("kind", "combiner"), [(kind, None) for kind in KINDS] + [(None, "features"), (None, "parameters")]
)
def test_two_processes_equal_one(kind, combiner, unequal):
    whole = two_processes_share(kind, combiner, unequal, 0, 1)
    for part in in_two_processes(two_processes_share, kind, combiner, unequal):
        for name, value in whole.items():
            torch.testing.assert_close(part[name], value, rtol=1e-10, atol=1e-12, msg=f"{name}")


def own_inputs_share(kind, rank, world):
    model, (tasks, batch) = problem("half-shared"), with_own_inputs()
    batch = Batch(
        {k: x[rank::world] for k, x in batch.inputs.items()}, {k: y[rank::world] for k, y in batch.targets.items()}
    )
    step = Step(model, tasks, Method(encoder=Reads(tasks, kind)))
    step.backward(batch)
    return gradients(model)


@pytest.mark.parametrize("kind", ["norms", "parameters"])
def test_two_processes_equal_one_with_own_inputs(kind):
    whole = own_inputs_share(kind, 0, 1)
    for part in in_two_processes(own_inputs_share, kind):
        for name, value in whole.items():
            torch.testing.assert_close(part[name], value, rtol=1e-10, atol=1e-12)


def unused_share(rank, world):
    model, tasks, (batch, *_) = nested_model(), tasks_of(), batches(1)
    targets = {name: y[rank::world] for name, y in batch.targets.items()}
    if world > 1 and rank == 0:
        targets["c"] = None
    Step(model, tasks).backward(Batch(batch.inputs[rank::world], targets))
    return {name: p.grad is None for name, p in model.named_parameters()}


def test_a_parameter_no_process_reaches_keeps_no_gradient():
    whole = unused_share(0, 1)
    assert whole["shared.unused.weight"]
    assert not whole["heads.c.late.weight"]
    assert in_two_processes(unused_share) == [whole, whole]


class Sums(Weighting):
    """Keeps the norms of one weighted sum and of its terms."""

    weights = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)

    def forward(self, signals):
        places = ("features", "parameters")
        self.found = [signals.norm_of_sum(self.weights, at) for at in places]
        self.norms = [signals.norms(at) for at in places]
        return self.found[0] / self.norms[0] + self.found[1]


@pytest.mark.parametrize("apart", [False, True])
def test_the_norm_of_a_weighted_sum(apart):
    """With inputs of their own, a sum at the features is over all features."""
    tasks, model, (batch, *_) = tasks_of(), problem(), batches(1)
    if apart:
        tasks = [Task(n, squared, input="left" if n == "b" else "right") for n in NAMES]
        batch = Batch({"left": batch.inputs, "right": -batch.inputs}, batch.targets)
    rule = Sums(tasks)
    Step(model, tasks, Method(encoder=rule)).backward(batch)
    inputs = {id(x): x for x in map(batch.input_of, tasks)}
    features = {key: model.encode(x) for key, x in inputs.items()}
    shared = model.shared_parameters()
    losses = [
        squared(model.decode(features[id(batch.input_of(t))], [t.name])[t.name], batch.target_of(t)).mean()
        for t in tasks
    ]
    for i, (at, wanted) in enumerate({"features": [*features.values()], "parameters": shared}.items()):
        rows = []
        for loss in losses:
            grads = torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
        matrix = torch.stack(rows)
        torch.testing.assert_close(rule.found[i], (rule.weights @ matrix).norm(), msg=at)
        torch.testing.assert_close(rule.norms[i], matrix.norm(dim=1), msg=at)


def sums_of_a_share(rank, world):
    tasks, (batch, *_) = tasks_of(), batches(1)
    share = Batch(batch.inputs[rank::world], {n: y[rank::world] for n, y in batch.targets.items()})
    rule = Sums(tasks)
    Step(problem(), tasks, Method(encoder=rule)).backward(share)
    return torch.stack(rule.found)


def test_the_norm_of_a_weighted_sum_in_two_processes():
    whole = sums_of_a_share(0, 1)
    for half in in_two_processes(sums_of_a_share):
        torch.testing.assert_close(half, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_reported_if_a_rule_read_them(kind):
    tasks, model, (batch, *_) = tasks_of(), problem(), batches(1)
    report = Step(model, tasks, Method() if kind is None else Method(encoder=Reads(tasks, kind))).backward(batch)
    assert list(report.gradient_norms) == (list(NAMES) if kind == "norms" else [])
    for name, norm in report.gradient_norms.items():
        torch.testing.assert_close(report.encoder_weights[name], 1 / norm)
