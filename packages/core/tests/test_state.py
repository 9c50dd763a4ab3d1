"""A restored run continues bit for bit; the exported model is the primaries' alone."""

import pytest
import torch
from sidetask_core import (
    Augment,
    Batch,
    Equal,
    Fixed,
    Method,
    Product,
    Shaper,
    Signals,
    SplitModel,
    Step,
    Task,
    Weighting,
)
from sidetask_core.testing import SPLITS, batches, gradients, problem, squared, tiny_tasks, train
from torch import nn


class Everything(Weighting):
    """Draws, learns, keeps a buffer and an optimizer of its own."""

    def __init__(self, tasks):
        super().__init__(tasks, seed=3)
        self.learned = nn.Parameter(torch.zeros(len(self.tasks), dtype=torch.float64))
        self.register_buffer("own", torch.ones(len(self.tasks), dtype=torch.float64))
        self.optimizer = torch.optim.Adam([self.own], lr=0.1)

    def forward(self, signals):
        self.own.grad = signals.gramian("features").sum(0)
        self.optimizer.step()
        return self.own * self.learned.exp() + torch.rand(3, generator=self.generator)

    def objective(self, signals):
        return (self.learned * signals.losses).sum()

    def get_extra_state(self):
        return super().get_extra_state() | {"optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state):
        super().set_extra_state(state)
        self.optimizer.load_state_dict(state["optimizer"])


def start():
    tasks = tiny_tasks()
    step = Step(problem(norm=True), tasks, Method(encoder=Everything(tasks)))
    return step, torch.optim.Adam(step.parameters(), lr=0.01)


def test_a_restored_run_continues_bit_for_bit(tmp_path):
    data = batches(10)
    whole, optimizer = start()
    train(whole, data, optimizer)
    half, optimizer = start()
    train(half, data[:4], optimizer)
    torch.save([half.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    resumed, optimizer = start()
    state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state)
    optimizer.load_state_dict(optimizer_state)
    assert (resumed.iteration, resumed.epoch) == (4, 1)
    train(resumed, data[4:], optimizer)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(whole.encoder.own, resumed.encoder.own)
    assert torch.equal(whole.encoder.generator.get_state(), resumed.encoder.generator.get_state())


def test_without_its_generator_the_run_would_differ():
    data = batches(6)
    whole, optimizer = start()
    train(whole, data, optimizer)
    half, optimizer = start()
    train(half, data[:3], optimizer)
    half.encoder.generator.manual_seed(99)
    train(half, data[3:], optimizer)
    assert not torch.equal(whole.model.shared[0][0].weight, half.model.shared[0][0].weight)


def test_step_parameters_are_the_models_and_the_rules():
    step, _ = start()
    own = {id(p) for p in step.parameters()}
    assert own == {id(p) for p in step.model.parameters()} | {id(step.encoder.learned)}
    assert [id(p) for p in step.rule_parameters()] == [id(step.encoder.learned)]


def test_one_rule_in_both_slots_is_one_rule():
    tasks = tiny_tasks()
    rule = Everything(tasks)
    step = Step(problem(), tasks, Method(encoder=rule, decoder=rule))
    (batch,) = batches(1)
    report = step.backward(batch)
    assert list(step.rules()) == [rule]
    assert report.encoder_weights == report.decoder_weights
    torch.testing.assert_close(rule.learned.grad, torch.stack(list(report.losses.values())))


def test_rule_gradients_accumulate():
    tasks = tiny_tasks()
    rule = Everything(tasks)
    step = Step(problem(), tasks, Method(decoder=rule))
    first, second = batches(2)
    losses = [torch.stack(list(step.backward(b).losses.values())) for b in (first, second)]
    torch.testing.assert_close(rule.learned.grad, losses[0] + losses[1])


def test_export_is_the_primaries_model_alone():
    model = problem("two heads on one branch")
    step = Step(model, tiny_tasks())
    exported = step.export()
    assert list(exported.heads) == ["a"]
    assert list(exported.branches) == ["both"]
    x = batches(1)[0].inputs
    assert torch.equal(exported(x)["a"], model(x)["a"])


class Doubles(Shaper):
    def forward(self, losses, target):
        return torch.where(target > 0, 2.0, 1.0)


def test_a_shaper_weighs_elements_and_keeps_the_denominator():
    tasks, model, (batch, *_) = tiny_tasks(), problem(), batches(1)
    report = Step(model, tasks, Method(shapers={"b": Doubles()})).backward(batch)
    elements = squared(model(batch.inputs)["b"], batch.targets["b"])
    expected = (elements * torch.where(batch.targets["b"] > 0, 2.0, 1.0)).mean()
    torch.testing.assert_close(report.losses["b"], expected.detach())
    weight = model.heads["b"].weight
    torch.testing.assert_close(weight.grad, torch.autograd.grad(expected, weight)[0])


def test_products_multiply_and_add_objectives():
    tasks = tiny_tasks()
    halves = Fixed(tasks, dict.fromkeys("abc", 0.5))
    step = Step(problem(), tasks, Method(encoder=Product(halves, Equal(tasks), halves)))
    (batch,) = batches(1)
    assert {w.item() for w in step.backward(batch).encoder_weights.values()} == {0.25}


class AddsHead(Augment):
    rests = ()

    def __init__(self, branch=None):
        super().__init__()
        self.branch = branch

    def extended(self, tasks):
        return [*tasks, Task("copy", squared, primary=False, target="a")]

    def forward(self, model, tasks):
        head = nn.Linear(5, 2).double()
        return model.with_heads({"copy": head}, {"copy": self.branch})

    def resting(self, iteration, epoch):
        return self.rests


def test_an_augment_changes_model_and_tasks_and_is_dropped_on_export():
    model = problem()
    step = Step(model, [Task(n, squared) for n in "abc"], Method(augment=AddsHead()))
    (batch,) = batches(1)
    report = step.backward(batch)
    assert list(report.losses) == ["a", "b", "c", "copy"] == [t.name for t in step.tasks]
    assert list(step.export().heads) == ["a", "b", "c"]
    assert "copy" not in model.heads
    assert step.model.shared is model.shared


class Progresses(Weighting):
    """Remembers what the last update did."""

    def forward(self, signals: Signals):
        self.last = signals.progress()
        return signals.labelled.to(signals.losses)


@pytest.mark.parametrize("split", SPLITS)
def test_a_resting_task_is_not_run_and_changes_no_bit_of_the_others(split):
    tasks = [Task(n, squared) for n in "abc"]
    plain, first, data = problem(split), problem(split), batches(4)
    both, alone = (
        AddsHead("a" if split == "half-shared" else "both" if "two" in split else None),
        Step(plain, tasks, Method(encoder=Progresses(tasks))),
    )
    extended = both.extended(tasks)
    step = Step(first, tasks, Method(augment=both, encoder=Progresses(extended)))
    seen = []
    step.model.heads["copy"].register_forward_hook(lambda *_: seen.append(step.iteration))
    both.rests = ("copy",)
    optimizers = [torch.optim.SGD(s.model.parameters(), lr=0.1, momentum=0.9) for s in (step, alone)]
    for i, batch in enumerate(data):
        if i == 3:
            # The update that is looked back at was made without it.
            both.rests = ()
        reports = []
        for one, optimizer in zip((step, alone), optimizers, strict=True):
            optimizer.zero_grad()
            reports.append(one.backward(batch))
            optimizer.step()
        if i < 3:
            assert all(torch.equal(p, q) for p, q in zip(first.parameters(), plain.parameters(), strict=True))
            assert step.model.heads["copy"].weight.grad is None
            assert reports[0].losses["copy"] == reports[0].encoder_weights["copy"] == 0
    assert seen == [3]
    assert step.encoder.last.labelled.tolist() == [True, True, True, False]
    assert step.encoder.last.after[3] == 0


class Looks(Weighting):
    def forward(self, signals: Signals):
        self.signals = signals
        self.elements = signals.elements("b")
        return torch.ones(3)


def test_signals_name_tasks_time_and_elements():
    tasks = tiny_tasks()
    rule = Looks(tasks)
    step = Step(problem(), tasks, Method(encoder=rule))
    step.epoch = 7
    first, second = batches(2)
    second.targets["b"][0, 0] = torch.nan
    step.backward(first)
    step.backward(second)
    assert (rule.signals.iteration, rule.signals.epoch, rule.signals.tasks) == (1, 7, ("a", "b", "c"))
    assert rule.signals.primary.tolist() == [True, False, False]
    losses, mask = rule.elements
    assert losses.shape == mask.shape == (6, 2)
    assert mask.sum() == 11
    assert not losses.requires_grad
    torch.testing.assert_close(losses[mask].mean(), rule.signals.losses[1])


def test_the_caller_may_hold_gradients_of_other_things():
    """`.grad` of what a step does not train is not touched."""
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    model = problem()
    model.heads["c"].requires_grad_(False)
    model.heads["c"].weight.grad = torch.full_like(model.heads["c"].weight, 5.0)
    Step(model, tasks).backward(batch)
    assert (model.heads["c"].weight.grad == 5).all()


def test_a_step_under_no_grad_still_trains():
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    plain, other = Step(problem(), tasks), Step(problem(), tasks)
    plain.backward(batch)
    with torch.no_grad():
        other.backward(batch)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient, gradients(other)[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reports_keep_no_graph(dtype):
    report = Step(problem(dtype=dtype), tiny_tasks()).backward(batches(1, dtype=dtype)[0])
    for values in (report.losses, report.encoder_weights, report.decoder_weights):
        assert all(v.ndim == 0 and v.dtype == dtype and v.grad_fn is None for v in values.values())


def test_a_split_model_is_an_ordinary_module():
    model = SplitModel(nn.Linear(1, 1), {"a": nn.Linear(1, 1)}, {"a": nn.Linear(1, 1)})
    assert set(model.state_dict()) == {
        f"{part}.{kind}" for part in ("shared", "branches.a", "heads.a") for kind in ("weight", "bias")
    }
    assert Batch(torch.zeros(1), {}).inputs.shape == (1,)
