"""What a transfer teaches and whom, that it goes without a trace, and what is refused."""

import copy

import pytest
import torch
from sidetask_core import (
    Batch,
    BilevelWeighting,
    Equal,
    Fixed,
    Method,
    Shaper,
    SplitModel,
    Step,
    Task,
    Uncertainty,
    Weighting,
    plugins,
)
from sidetask_core.testing import batches, brute_force, close, gradients, problem, squared, tiny_tasks
from sidetask_saal import ChosenTransfers, SelfAuxiliaries
from sidetask_saal.auxiliaries import fresh
from sidetask_saal.saal import saal_e, saal_ew, saal_w
from torch import nn

ALL = ("b→a", "c→a", "a→b", "c→b", "a→c", "b→c")


def three(names="abc"):
    return [Task(name, squared) for name in names]


def step_of(transfers, model=None, rule=Equal, **options):
    tasks = three()
    auxiliaries = SelfAuxiliaries(tasks, transfers, seed=1, **options)
    model = problem("half-shared") if model is None else model
    return Step(model, tasks, Method(augment=auxiliaries, encoder=rule(auxiliaries.extended(tasks))))


def test_all_transfers_are_by_targets_and_then_by_sources():
    assert SelfAuxiliaries(three(), "all").transfers == ALL
    assert SelfAuxiliaries(three(), ["b->c", "c→a", "b→a"]).transfers == ("b→a", "c→a", "b→c")
    # A target that is not wanted for itself needs no help.
    assert SelfAuxiliaries(tiny_tasks(), "all").transfers == ("b→a", "c→a")


def test_the_copy_is_the_source_s_task_on_the_target_s_branch():
    mask = lambda y: y > 0  # noqa: E731
    tasks = [
        Task("a", squared, valid=mask, metrics={"m": None}, target="labels", input="x"),
        Task("b", lambda p, y: {"l": squared(p, y)}, objectives=("l",)),
    ]
    first, second = SelfAuxiliaries(tasks, "all").extended(tasks)[2:]
    assert (second.name, second.loss, second.valid, second.target, second.input) == (
        "a→b",
        squared,
        mask,
        "labels",
        "x",
    )
    assert (first.name, first.loss, first.target, first.input) == ("b→a", tasks[1].loss, "b", None)
    assert first.objectives == ("l",)
    assert not first.primary
    assert not second.primary
    assert second.metrics == {}
    step = step_of(["b→a"])
    assert step.model.route["b→a"] == "a"
    assert step.model.heads["b→a"] is not step.model.heads["b"]


@pytest.mark.parametrize("source", "bc")
def test_a_transfer_changes_its_target_s_branch_and_the_shared_layers_and_nothing_else(source):
    """By brute force: the sum over all tasks but the copy, plus what the copy's own loss gives."""
    (batch,) = batches(1)
    weight = 0.75
    plain = Step(problem("half-shared"), three())
    plain.backward(batch)
    before = gradients(plain.model)

    name = f"{source}→a"
    weights = dict.fromkeys("abc", 1.0) | {name: weight}
    step = step_of([name], rule=lambda tasks: Fixed(tasks, weights))
    step.backward(batch)
    after = gradients(step.model)

    model = step.model
    prediction = model.heads[name](model.branches["a"](model.shared(batch.inputs)))
    loss = weight * squared(prediction, batch.targets[source]).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected = {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}
    changed = set()
    for n, gradient in after.items():
        close(gradient, before.get(n, torch.zeros(())) + expected[n], n, rtol=1e-12)
        if n in before and not torch.equal(gradient, before[n]):
            changed.add(n.rpartition(".")[0].partition(".0")[0])
    assert changed == {"shared", "branches.a"}
    assert after[f"heads.{name}.weight"].any()


@pytest.mark.parametrize("split", ["half-shared", "two heads on one branch"])
def test_gradients_of_all_transfers_by_brute_force(split):
    (batch,) = batches(1)
    route = {"a": "both", "b": "both", "c": "other"} if "two" in split else None
    tasks = three()
    auxiliaries = SelfAuxiliaries(tasks, "all", route=route)
    extended = auxiliaries.extended(tasks)
    values = torch.linspace(-0.5, 2, len(extended), dtype=torch.float64)
    rule = Fixed(extended, dict(zip([t.name for t in extended], values.tolist(), strict=True)))
    step = Step(problem(split), tasks, Method(augment=auxiliaries, encoder=rule))
    step.backward(batch)
    expected = brute_force(step.model, step.tasks, batch, rule.weights, rule.weights)
    for name, gradient in gradients(step.model).items():
        close(gradient, expected[name], name, rtol=1e-6)


class Scaled(Weighting):
    """A constant for the given tasks, zero for copies: what no weight of theirs may change."""

    def forward(self, signals):
        return torch.tensor([0.0 if "→" in name else 1.0 for name in self.tasks]).to(signals.losses)


class Halves(Weighting):
    """Weights that differ, and depend on losses."""

    def forward(self, signals):
        return torch.where(signals.labelled, 0.3 / (1 + signals.losses), 0.0)


def trained(step, data):
    optimizer = torch.optim.SGD(step.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for batch in data:
        optimizer.zero_grad()
        step.backward(batch)
        optimizer.step()
    return step.export().state_dict()


@pytest.mark.parametrize("transfers", ["all", ["b→a"], ["a→c", "b→c"]], ids=str)
@pytest.mark.parametrize("how", ["weights of zero", "switched off", "switched off, other weights", "by schedule"])
def test_without_weight_or_switched_off_training_is_bit_for_bit_that_without(how, transfers):
    data = batches(6)
    rule = {"weights of zero": Scaled, "switched off, other weights": Halves}.get(how, ChosenTransfers)
    schedule = None
    if how == "by schedule":
        schedule = {name: [[100, None]] for name in SelfAuxiliaries(three(), transfers).transfers}
    step = step_of(transfers, problem("half-shared", norm=True), rule, schedule=schedule)
    if "switched" in how:
        for name in step.augment.transfers:
            step.augment.switch(name, False)
    alone = Step(problem("half-shared", norm=True), three(), Method(encoder=rule(three())))
    found, expected = trained(step, data), trained(alone, data)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("how", ["weights of zero", "switched off", "one input at a time"])
def test_statistics_of_a_branch_are_those_of_its_own_input(how):
    """Tasks with inputs of their own: what rides along on another's must not show in what is exported."""
    tasks = [Task(name, squared, input=f"x{name}") for name in "ab"]

    def network():
        torch.manual_seed(1)
        # Heads that are not run draw nothing.
        dropout = [nn.Dropout(0.3)] if how == "switched off" else []
        branch = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), *dropout)
        return SplitModel.from_stages([nn.Linear(4, 5), branch], 1, {n: nn.Linear(5, 1) for n in "ab"}).double()

    def data(i):
        g = torch.Generator().manual_seed(i)
        xa, xb, ya, yb = (torch.randn(8, n, generator=g, dtype=torch.float64) for n in (4, 4, 1, 1))
        inputs = {"xa": xa, "xb": 5 * xb + 3}
        targets = {"a": ya, "b": yb}
        if how == "one input at a time":
            del inputs["xb" if i % 2 else "xa"]
            targets["b" if i % 2 else "a"] = None
        return Batch(inputs, targets)

    auxiliaries = SelfAuxiliaries(tasks, "all", seed=0)
    step = Step(network(), tasks, Method(augment=auxiliaries, encoder=Scaled(auxiliaries.extended(tasks))))
    if how == "switched off":
        for name in auxiliaries.transfers:
            auxiliaries.switch(name, False)
    states = []
    for one in (step, Step(network(), tasks)):
        torch.manual_seed(2)
        # Without momentum or decay, which move what has a gradient of zero and not what has none.
        optimizer = torch.optim.SGD(one.model.parameters(), lr=0.1)
        for i in range(4):
            optimizer.zero_grad()
            one.backward(data(i))
            optimizer.step()
        states.append(one.export().state_dict())
    found, expected = states
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_gates_by_hand_and_by_schedule_and_what_they_cost():
    step = step_of("all", schedule={"c->b": [[1, 2], [3, None]]})
    run = {name: [] for name in ALL}
    for name in ALL:
        step.model.heads[name].register_forward_hook(lambda *_, n=name: run[n].append(step.iteration))
    for i, batch in enumerate(batches(5)):
        if i == 2:
            step.augment.switch("b->a", False)
        if i == 4:
            step.augment.switch("b→a", True)
        step.zero_grad()
        report = step.backward(batch)
        off = {name for name, loss in report.losses.items() if loss == 0}
        assert off == step.augment.resting(i, 0)
        assert all(step.model.heads[name].weight.grad is None for name in off)
    assert run == {name: [0, 1, 2, 3, 4] for name in ALL} | {"b→a": [0, 1, 4], "c→b": [1, 3, 4]}


def test_epochs_for_a_schedule():
    auxiliaries = SelfAuxiliaries(three(), ["a→b"], schedule={"a→b": [[0, 2]]}, schedule_by="epoch")
    assert [len(auxiliaries.resting(1000, epoch)) for epoch in range(3)] == [0, 0, 1]


def test_gates_are_saved():
    step = step_of("all")
    step.augment.switch("a→c", False)
    other = step_of("all")
    other.load_state_dict(step.state_dict())
    assert other.augment.resting(0, 0) == {"a→c"}
    other.augment.switch("a→c", True)
    step.load_state_dict(other.state_dict())
    assert step.augment.resting(0, 0) == set()


def test_export_is_the_network_that_never_had_any():
    given = problem("half-shared", norm=True)
    twin = copy.deepcopy(given)
    step = step_of("all", given)
    names = [name for name, _ in given.named_parameters()]
    exported = step.export()
    assert list(exported.state_dict()) == list(twin.state_dict())
    assert [name for name, _ in exported.named_parameters()] == names
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in exported.state_dict().items())
    assert all(p is q for p, q in zip(exported.parameters(), given.parameters(), strict=True))
    trained(step, batches(3))
    twin.load_state_dict(exported.state_dict())
    (batch,) = batches(1)
    exported.eval(), twin.eval()
    for name, value in twin(batch.inputs).items():
        assert torch.equal(exported(batch.inputs)[name], value)
    assert torch.equal(step.model.restricted_to(["b"])(batch.inputs)["b"], exported(batch.inputs)["b"])


def test_tasks_of_one_branch_share_the_copies():
    route = {"a": "both", "b": "both", "c": "other"}
    tasks = three()
    auxiliaries = SelfAuxiliaries(tasks, "all", route=route)
    # Between a and b there is nothing to add, and c comes to both at once.
    assert auxiliaries.transfers == ("c→a", "a→c", "b→c")
    assert auxiliaries.named("c->b") == "c→a"
    assert SelfAuxiliaries(tasks, ["c→b", "c→a"], route=route).transfers == ("c→a",)
    assert SelfAuxiliaries(tasks, ["c→b"], route=route).transfers == ("c→b",)
    step = Step(problem("two heads on one branch"), tasks, Method(augment=auxiliaries))
    assert step.model.route["c→a"] == "both"
    # Every branch, and each of its copies, weighs as much as its tasks.
    method = saal_e(tasks, transfers="all", route=route)
    (batch,) = batches(1)
    report = Step(problem("two heads on one branch"), tasks, method).backward(batch)
    thirds = {name: round(3 * w.item(), 12) for name, w in report.encoder_weights.items()}
    assert thirds == {"a": 2, "b": 2, "c": 1, "c→a": 2, "a→c": 1, "b→c": 1}


def test_new_heads_depend_on_the_seed_and_the_name_alone():
    def heads(transfers, seed, tasks="abc", model=None):
        auxiliaries = SelfAuxiliaries(three(tasks), transfers, seed=seed)
        made = auxiliaries(problem("half-shared") if model is None else model, three(tasks)).heads
        return {name: made[name].weight.detach() for name in auxiliaries.transfers}

    whole = heads("all", 0)
    assert torch.equal(heads(["c→a"], 0)["c→a"], whole["c→a"])
    assert torch.equal(heads("all", 0, "cab")["c→a"], whole["c→a"])
    assert not torch.equal(heads("all", 1)["c→a"], whole["c→a"])
    assert not torch.equal(whole["c→a"], whole["c→b"])
    assert not torch.equal(whole["c→a"], problem("half-shared").heads["c"].weight)
    single = heads("all", 0, model=problem("half-shared", dtype=torch.float32))
    assert all(torch.equal(single[name].double(), value) for name, value in whole.items())

    before = torch.get_rng_state()
    torch.manual_seed(5)
    one = heads("all", None)
    again = heads("all", None)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(5).get_state())
    torch.manual_seed(6)
    other = heads("all", None)
    torch.set_rng_state(before)
    assert torch.equal(one["a→b"], again["a→b"])
    assert not torch.equal(one["a→b"], other["a→b"])


class Offset(nn.Module):
    """Has a parameter, and a beginning of its own if it says so."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.offset = nn.Parameter(torch.full((2,), 4.0))


class Begins(Offset):
    def reset_parameters(self):
        nn.init.constant_(self.offset, 4.0)
        nn.init.constant_(self.linear.bias, 7.0)


def test_what_cannot_be_made_anew_is_named():
    with pytest.raises(ValueError, match=r"head of task 'b' cannot be made anew: nothing sets offset; .*\(Offset\)"):
        fresh(Offset(), 0, "the head of task 'b'")
    made = fresh(Begins(), 0, "it")
    # A module's own beginning comes after its parts'.
    assert made.linear.bias.tolist() == [7, 7]
    assert made.offset.tolist() == [4, 4]
    kept = Offset()
    kept.offset.requires_grad_(False)
    assert fresh(kept, 0, "it").offset.tolist() == [4, 4]
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"nothing sets parametrizations\.weight\.original0, param"):
        fresh(normed, 0, "it")
    norm = nn.Sequential(nn.BatchNorm1d(2), nn.MultiheadAttention(2, 1), nn.GRU(2, 2))
    norm[0](torch.randn(4, 2))
    assert fresh(norm, 0, "it")[0].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("transfers", "options", "message"),
    [
        (["a→d"], {}, r"transfer 'a→d': there is no task 'd'; the tasks are: a, b, c"),
        (["seg->b"], {}, "there is no task 'seg'"),
        (["a"], {}, "written as 'source→target' or 'source->target', not 'a'"),
        ([3], {}, "not 3"),
        (["a->a"], {}, "'a->a' goes from a task to itself"),
        (["a->b", "a→b"], {}, "transfer a→b is given twice"),
        ("some", {}, "'all' or a list of names such as 'seg→depth', not 'some'"),
        (["a->b"], {"route": {"a": "x", "b": "x"}}, "both tasks ride branch 'x', which 'a' trains already"),
        (["a->b"], {"route": {"d": "x"}}, "route names task 'd', but the tasks are: a, b, c"),
        (["a->b"], {"schedule": {"b->a": [[0, 1]]}}, "no transfer 'b->a'; the transfers are: a→b"),
        (["a->b"], {"schedule": {"a->b": [[2, 1]]}}, r"schedule of 'a->b': .* not \[2, 1\]"),
        (["a->b"], {"schedule": {"a->b": [3]}}, "not 3"),
        (["a->b"], {"schedule": {"a->b": 3}}, "not 3"),
        (["a->b"], {"schedule": {"a->b": ["ab"]}}, "not 'ab'"),
        (["a->b"], {"schedule_by": "hour"}, "'iteration' or 'epoch', not 'hour'"),
    ],
)
def test_bad_input_is_refused_at_the_door(transfers, options, message):
    with pytest.raises(ValueError, match=message):
        SelfAuxiliaries(three(), transfers, **options)


def test_names_of_transfers_are_not_for_given_tasks():
    with pytest.raises(ValueError, match="task 'a->b' has the name of a transfer"):
        SelfAuxiliaries([Task("a->b", squared)], "all")
    with pytest.raises(ValueError, match="made for tasks a, b, c, not for c, b, a"):
        SelfAuxiliaries(three(), "all").extended(three("cba"))
    with pytest.raises(ValueError, match="no transfer 'a'; the transfers are: b→a"):
        SelfAuxiliaries(three(), ["b→a"]).switch("a", False)


def test_networks_whose_tasks_share_everything_are_refused():
    with pytest.raises(ValueError, match=r"'b→a': task 'a' has no branch, .* \(SplitModel.from_stages with a smaller"):
        step_of("all", problem("shared bottom"))
    with pytest.raises(ValueError, match=r"'a' and 'b' ride one branch in the model; give route=\{'a': 'both', 'b': "):
        step_of("all", problem("two heads on one branch"))
    with pytest.raises(ValueError, match="'a' and 'b' ride branches of their own in the model"):
        step_of(["c→a"], route={"a": "both", "b": "both"})
    # Without a transfer there is nothing to refuse, and a source may read the shared features.
    step_of([], problem("shared bottom"))
    shared, heads = nn.Linear(4, 5), {name: nn.Linear(5, 2) for name in "abc"}
    model = SplitModel(shared, heads, {"c": nn.Linear(5, 5)}, {"a": None, "b": None}).double()
    assert list(step_of(["a→c"], model).model.heads) == ["a", "b", "c", "a→c"]


def test_methods_by_name_and_slot_by_slot():
    tasks = three()
    names = ("a", "b", "c", "b→a", "a→b")
    chosen = {"name": "saal-e", "transfers": ["b->a", "a->b"]}
    for spec in (
        chosen,
        {"augment": chosen, "encoder": {"name": "saal-e", "transfers": "all"}},
        {"augment": chosen, "encoder": {"name": "saal-w", "when": "after"}},
        {"augment": chosen, "decoder": chosen, "encoder": chosen},
    ):
        method = plugins.make_method(spec, tasks)
        assert method.encoder.tasks == names
        step = Step(problem("half-shared"), tasks, method)
        assert tuple(task.name for task in step.tasks) == names
    with pytest.raises(ValueError, match="weighs the tasks a, b, c, b→a, a→b, but there are a, b, c; name"):
        plugins.make_method({"encoder": chosen}, tasks)
    assert saal_w(tasks).encoder.tasks == ("a", "b", "c", *ALL)
    assert isinstance(saal_ew(tasks, transfers=["a→b"]).encoder, BilevelWeighting)
    for factory in (saal_e, saal_ew):
        with pytest.raises(ValueError, match="give either transfers"):
            factory(tasks)
        with pytest.raises(ValueError, match="give either transfers"):
            factory(tasks, transfers="all", relations="x.json")
    with pytest.raises(ValueError, match="one of target, source, none, not 'both'"):
        saal_e(tasks, transfers="all", normalization="both")


@pytest.mark.parametrize("schedule", [[["b->a", 1]], "b->a", {"b->a": 3}, {"b->a": [[True, 5]]}], ids=str)
def test_a_schedule_of_another_form_is_refused(schedule):
    with pytest.raises(ValueError, match=r"a schedule maps names of transfers to windows|schedule of 'b->a'"):
        SelfAuxiliaries(three(), ["b->a"], schedule=schedule)


def test_two_schedules_of_one_transfer_are_refused():
    with pytest.raises(ValueError, match="transfer b→a has two schedules"):
        SelfAuxiliaries(three(), ["b->a"], schedule={"b->a": [[0, 5]], "b→a": [[10, None]]})


@pytest.fixture
def rules_of_core(monkeypatch):
    """Core's rules under the names that another package gives them, which is not here when this one is alone."""
    rules = {"fixed": Fixed, "uncertainty": Uncertainty}
    found = plugins.find

    def find(group, name):
        if name not in rules:
            return found(group, name)
        return lambda tasks, **options: Method(encoder=rules[name](tasks, **options))

    monkeypatch.setattr(plugins, "find", find)


@pytest.mark.usefixtures("rules_of_core")
def test_a_rule_of_another_route_is_refused():
    route = {"a": "both", "b": "both", "c": "other"}
    spec = {"augment": {"name": "saal-e", "transfers": "all", "route": route}}
    model = problem("two heads on one branch")
    method = plugins.make_method(spec | {"encoder": {"name": "saal-e", "transfers": "all"}}, three())
    with pytest.raises(
        ValueError, match=r"the rule ChosenTransfers was made for branches .*; give both the same route"
    ):
        Step(model, three(), method)
    for same in (spec | {"encoder": spec["augment"]}, spec | {"encoder": "uncertainty"}):
        Step(model, three(), plugins.make_method(same, three()))


@pytest.mark.usefixtures("rules_of_core")
def test_every_rule_takes_a_transfer_in_ascii():
    weights = {"a": 1, "b": 2, "c": 3, "b->a": 0.5}
    augment = {"name": "saal-e", "transfers": ["b->a"]}
    spec = {"augment": augment, "encoder": {"name": "fixed", "weights": weights}}
    assert plugins.make_method(spec, three()).encoder.weights.tolist() == [1, 2, 3, 0.5]
    # What is given alike is still built once.
    both = plugins.make_method({"augment": augment, "encoder": dict(augment), "decoder": dict(augment)}, three())
    assert both.encoder is both.decoder
    learned = {"name": "saal-w", "transfers": ["b->a"], "schedule": {"b->a": [[0, 5]]}}
    method = plugins.make_method({"augment": learned, "encoder": learned}, three())
    assert method.augment.schedule == {"b→a": [(0, 5)]}
    spec["encoder"]["weights"] = weights | {"x->a": 1}
    with pytest.raises(ValueError, match="there is a weight for 'x->a'"):
        plugins.make_method(spec, three())


class Half(Shaper):
    def forward(self, losses, target):
        return torch.full_like(losses, 0.5)


def test_a_copy_never_learns_without_the_shaper_of_its_source():
    auxiliaries = SelfAuxiliaries(three(), ["b->a"], seed=0)
    model = problem("half-shared")
    with pytest.raises(ValueError, match="task 'b' has a shaper, but its copy 'b→a' would learn from the plain loss"):
        Step(model, three(), Method(augment=auxiliaries, shapers={"b": Half()}))
    Step(model, three(), Method(augment=auxiliaries, shapers={"a": Half()}))
    step = Step(model, three(), Method(augment=auxiliaries, shapers={"b": Half(), "b→a": Half()}))
    step.model.heads["b→a"].load_state_dict(step.model.heads["b"].state_dict())
    step.model.branches["a"].load_state_dict(step.model.branches["b"].state_dict())
    losses = step.backward(batches(1)[0]).losses
    assert losses["b"] == losses["b→a"]
