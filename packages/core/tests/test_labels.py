"""Missing labels contribute nothing; a loss that is not finite is named before anything changes."""

import math

import pytest
import torch
from sidetask_core import Batch, Combiner, Method, NonFiniteLoss, SplitModel, Step, StepFailure, Task, Weighting
from sidetask_core.testing import batches, brute_force, gradients, problem, squared, tiny_tasks
from torch import Tensor, nn


def finite(y):
    return y.isfinite()


def test_the_mean_is_over_labelled_elements():
    task = Task("a", squared, valid=finite)
    prediction = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss, count = task.mean(prediction, torch.tensor([[0.0, math.nan], [math.nan, 1.0]]))
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert (loss.item(), count.item()) == (5.0, 2.0)
    assert gradient.tolist() == [[1.0, 0.0], [0.0, 3.0]]


def test_a_mask_of_samples_rules_whole_samples():
    task = Task("a", squared, valid=lambda y: y[:, 0] >= 0)
    loss, count = task.mean(torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 3.0], [-1.0, 9.0, 9.0]]))
    assert count == 3
    torch.testing.assert_close(loss, torch.tensor(14 / 3))


LOSSES = {
    "log": lambda p, y: (p - y.log()).square(),
    "inverse": lambda p, y: (p - 1 / y).square(),
    "root": lambda p, y: (p - y).square().sqrt(),
    "absolute": lambda p, y: (p - y).abs(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("missing", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("all_missing", [False, True])
def test_masked_targets_reach_no_gradient_whatever_the_loss(loss, missing, all_missing):
    task = Task("a", LOSSES[loss], valid=lambda y: y.isfinite() & (y > 0))
    prediction = torch.full((2, 3), 0.3, requires_grad=True)
    target = torch.full((2, 3), 2.0)
    target[0] = missing
    if all_missing:
        target[1] = missing
    value, _ = task.mean(prediction, target)
    (gradient,) = torch.autograd.grad(value, prediction)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[0] == 0).all()
    assert all_missing == bool((gradient[1] == 0).all())


def test_ignored_class_ids_are_never_seen_by_the_loss():
    task = Task("a", lambda p, y: nn.functional.cross_entropy(p, y, reduction="none"), valid=lambda y: y >= 0)
    logits = torch.randn(2, 5, 3, 3, requires_grad=True)
    target = torch.randint(0, 5, (2, 3, 3))
    target[0, 0] = -1
    loss, count = task.mean(logits, target)
    plain = nn.functional.cross_entropy(logits, target, ignore_index=-1)
    assert count == 15
    torch.testing.assert_close(loss, plain)


def test_masked_vectors():
    task = Task("n", lambda p, y: 1 - nn.functional.cosine_similarity(p, y, dim=1), valid=lambda y: y.isfinite().all(1))
    prediction = torch.randn(1, 3, 2, 2, requires_grad=True)
    target = torch.randn(1, 3, 2, 2)
    target[0, :, 0, 0] = math.nan
    loss, count = task.mean(prediction, target)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert count == 3
    assert gradient.isfinite().all()
    assert (gradient[0, :, 0, 0] == 0).all()


@pytest.mark.parametrize("mask", ["samples", "channel", "plain"])
def test_masked_vectors_are_replaced_by_whole_vectors(mask):
    """A vector made of one component of another could have no length, and its direction no derivative."""

    def valid(y):
        found = y.isfinite().all(1)
        return {"samples": found.flatten(1).all(1), "channel": found[:, None], "plain": found}[mask]

    def loss(p, y):
        return 1 - (p * y / y.norm(dim=1, keepdim=True)).sum(1, keepdim=mask == "channel")

    prediction = torch.ones(2, 3, 2, 2, requires_grad=True)
    target = torch.zeros(2, 3, 2, 2)
    target[:, 1] = -1.0
    target[0] = math.nan
    value, count = Task("n", loss, valid=valid).mean(prediction, target)
    (gradient,) = torch.autograd.grad(value, prediction)
    assert (value.item(), count.item()) == (2.0, 4.0)
    assert gradient.isfinite().all()
    assert (gradient[0] == 0).all()


def test_masked_targets_within_structures():
    task = Task("a", lambda p, y: (p - y["v"].log()).square(), valid=lambda y: y["v"] > 0)
    prediction = torch.zeros(3, requires_grad=True)
    value, count = task.mean(prediction, {"v": torch.tensor([0.0, -1.0, 2.0])})
    (gradient,) = torch.autograd.grad(value, prediction)
    assert count == 1
    assert gradient[:2].tolist() == [0, 0]
    torch.testing.assert_close(gradient[2], torch.tensor(-2 * math.log(2)))


class Reads(Weighting):
    def __init__(self, tasks, at):
        super().__init__(tasks)
        self.at = at

    def forward(self, signals):
        return signals.norms(self.at) if self.at else signals.losses


class Sum(Combiner):
    def forward(self, signals):
        return signals.gradients(self.at).sum(0)


RULES = {
    "losses": lambda t: Reads(t, None),
    "features": lambda t: Reads(t, "features"),
    "parameters": lambda t: Reads(t, "parameters"),
    "combiner": lambda t: Sum(t, at="features"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["elements", "samples", "task", "none", "everything"])
def test_missing_labels_under_every_rule(rule, how):
    tasks, model, (batch, *_) = tiny_tasks(), problem("half-shared"), batches(1)
    target: Tensor | None = batch.targets["b"].clone()
    if how == "elements":
        target[0, 0] = math.nan
    elif how == "samples":
        target[:2] = math.nan
    elif how in ("task", "everything"):
        target[:] = math.nan
    else:
        target = None
    targets = {**batch.targets, "b": target}
    if how == "everything":
        targets = dict.fromkeys(targets, target)
    batch = Batch(batch.inputs, targets)
    report = Step(model, tasks, Method(encoder=RULES[rule](tasks))).backward(batch)
    found = gradients(model)
    assert all(g.isfinite().all() for g in found.values())
    if how in ("task", "none", "everything"):
        assert report.losses["b"] == 0
        assert all((g == 0).all() for name, g in found.items() if ".b." in name)
    if how != "none" and rule != "combiner":
        weights = list(report.encoder_weights.values())
        for name, expected in brute_force(model, tasks, batch, weights, weights).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_is_named_before_any_gradient_changes(bad):
    tasks, model = [Task(name, squared) for name in "abc"], problem()
    step = Step(model, tasks, Method(encoder=Reads(tasks, "parameters")))
    first, second = batches(2)
    step.backward(first)
    before = gradients(model)
    broken = second.targets["b"].clone()
    broken[0, 0] = bad
    with pytest.raises(NonFiniteLoss, match=r"task 'b' at iteration 1") as caught:
        step.backward(Batch(second.inputs, {**second.targets, "b": broken}))
    assert caught.value.tasks == ("b",)
    assert caught.value.iteration == 1
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, before[name])


def test_two_bad_losses_are_both_named():
    tasks, (batch, *_) = [Task(name, squared) for name in "abc"], batches(1)
    bad = torch.full_like(batch.targets["a"], math.nan)
    with pytest.raises(NonFiniteLoss, match=r"tasks 'a', 'c' at iteration 0"):
        Step(problem(), tasks).backward(Batch(batch.inputs, {**batch.targets, "a": bad, "c": bad}))


def test_a_deferred_check_raises_one_step_late_and_names_the_iteration():
    tasks, (batch, *_) = [Task(name, squared) for name in "abc"], batches(1)
    step = Step(problem(), tasks, check="deferred")
    step.backward(batch)
    step.backward(Batch(batch.inputs, {**batch.targets, "c": torch.full_like(batch.targets["c"], math.inf)}))
    with pytest.raises(NonFiniteLoss, match=r"task 'c' at iteration 1"):
        step.backward(batch)


def test_a_pending_check_is_part_of_the_state():
    tasks, (batch, *_) = [Task(name, squared) for name in "abc"], batches(1)
    step = Step(problem(), tasks, check="deferred")
    step.backward(Batch(batch.inputs, {**batch.targets, "c": torch.full_like(batch.targets["c"], math.inf)}))
    resumed = Step(problem(), tasks, check="deferred")
    resumed.load_state_dict(step.state_dict())
    with pytest.raises(NonFiniteLoss, match=r"task 'c' at iteration 0"):
        resumed.backward(batch)


class Fails(Weighting):
    def forward(self, signals):
        raise StepFailure("no weights found")


def test_a_rule_that_fails_on_a_loss_that_is_not_finite_names_the_task():
    tasks, (batch, *_) = [Task(name, squared) for name in "abc"], batches(1)
    step = Step(problem(), tasks, Method(encoder=Fails(tasks)), check="deferred")
    with pytest.raises(StepFailure, match="no weights found"):
        step.backward(batch)
    with pytest.raises(NonFiniteLoss, match=r"task 'b' at iteration 0"):
        Step(problem(), tasks, Method(encoder=Fails(tasks)), check="deferred").backward(
            Batch(batch.inputs, {**batch.targets, "b": torch.full_like(batch.targets["b"], math.nan)})
        )


class Labelled(Weighting):
    def forward(self, signals):
        self.seen = signals.labelled
        return torch.ones(3)


def test_signals_say_which_tasks_have_labels():
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    rule = Labelled(tasks)
    absent = torch.full_like(batch.targets["b"], math.nan)
    Step(problem(), tasks, Method(encoder=rule)).backward(
        Batch(batch.inputs, {**batch.targets, "b": absent, "c": None})
    )
    assert rule.seen.tolist() == [True, False, False]


def test_scalar_losses_are_ready_means():
    tasks = [Task("a", lambda p, y: (p - y).square().mean()), Task("b", squared), Task("c", squared)]
    model, (batch, *_) = problem(), batches(1)
    report = Step(model, tasks).backward(batch)
    ones = [torch.ones(())] * 3
    for name, expected in brute_force(model, [Task(n, squared) for n in "abc"], batch, ones, ones).items():
        torch.testing.assert_close(gradients(model)[name], expected)
    assert report.losses["a"].ndim == 0


def test_no_loss_at_all():
    model = SplitModel(nn.Linear(4, 5), {"a": nn.Linear(5, 2)})
    Step(model, [Task("a", squared)]).backward(Batch(torch.randn(3, 4), {"a": None}))
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
