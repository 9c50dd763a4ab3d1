"""GradNorm against its written loss, differentiated by autograd and minimised by torch's Adam."""

import math

import pytest
import torch
from sidetask_baselines.gradnorm import FLOOR, GradNorm, gradnorm
from sidetask_core import Batch, Equal, Method, SplitModel
from sidetask_core.step import Step
from sidetask_core.testing import batches, conformance, problem, tiny_tasks, train
from torch import nn

TestGradNorm = conformance(gradnorm)
TestGradNormAtFeatures = conformance(gradnorm, at="features", alpha=0.5, lr=0.1)

TASKS = tiny_tasks()


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def along(norms):
    """Gradients of given lengths."""
    return torch.diag(rows(*norms))


def written_loss(weights, gradients, losses, initial, alpha):
    """Equation 2, as it stands."""
    lengths = (weights[:, None] * gradients).norm(dim=1)
    ratios = losses / initial
    target = lengths.mean() * (ratios / ratios.mean()) ** alpha
    return (lengths - target.detach()).abs().sum()


def history(count, steps, seed=0):
    """Losses and gradients of a run, of one scale for each task."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, count, dtype=torch.float64)
    for i in range(steps):
        noise = torch.rand(count, generator=generator, dtype=torch.float64)
        gradients = torch.randn(count, 12, generator=generator, dtype=torch.float64)
        yield scales * (0.5 + noise) * 0.97**i, scales[:, None] * gradients


@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_weights_are_those_of_adam_on_the_written_loss(given, count, alpha):
    tasks = tiny_tasks("abcdefghi"[:count])
    rule = GradNorm(tasks, alpha=alpha, lr=0.01)
    weights = torch.ones(count, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weights], lr=0.01)
    initial = None
    for losses, gradients in history(count, 60):
        initial = losses if initial is None else initial
        torch.testing.assert_close(rule(given(losses.tolist(), gradients)), weights.detach(), rtol=1e-10, atol=0)
        adam.zero_grad()
        written_loss(weights, gradients, losses, initial, alpha).backward()
        adam.step()
        assert (weights > FLOOR).all(), "the reference has no floor"
        with torch.no_grad():
            weights *= count / weights.sum()
    assert (weights - 1).abs().max() > 0.1


@pytest.mark.parametrize("count", [2, 3, 20])
def test_the_gradient_is_that_of_the_written_loss(count):
    rule = GradNorm(tiny_tasks("abcdefghijklmnopqrst"[:count]))
    everyone = torch.ones(count, dtype=torch.bool)
    for losses, gradients in history(count, 20, seed=1):
        weights = (0.1 + torch.rand(count, dtype=torch.float64)).requires_grad_()
        initial = losses.flip(0)
        (expected,) = torch.autograd.grad(written_loss(weights, gradients, losses, initial, 1.5), weights)
        found = rule.gradient(weights.detach(), gradients.norm(dim=1), losses / initial, everyone)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_two_steps_by_hand(given):
    """Adam's first step is lr against the gradient's sign; here G = (1, 4), and the rates are one."""
    rule = GradNorm(TASKS[:2], lr=0.1)
    signals = given((2.0, 3.0), along((1.0, 4.0)))
    assert rule(signals).tolist() == [1, 1]
    torch.testing.assert_close(rule(signals), rows(1.1, 0.9), rtol=1e-7, atol=0)


def test_at_equal_rates_the_weights_that_equalise_norms_stay_and_others_go_there(given):
    norms = rows(0.5, 1.0, 4.0)
    settled = 3 / norms / (1 / norms).sum()
    everyone = torch.ones(3, dtype=torch.bool)
    # With powers of two the lengths are equal to the last bit, and the loss is stationary.
    exact = GradNorm(TASKS).gradient(1 / norms, norms, torch.ones(3, dtype=torch.float64), everyone)
    assert exact.tolist() == [0, 0, 0]
    rule = GradNorm(TASKS, lr=2e-3)
    for _ in range(1500):
        weights = rule(given((1.0, 2.0, 3.0), along(norms.tolist())))
    torch.testing.assert_close(weights, settled, rtol=0.05, atol=0)


def test_a_slow_task_ends_with_the_longer_gradient(given):
    """Where it settles, lengths are as the rates to the power alpha, the scale of which the mean sets."""
    rule = GradNorm(TASKS[:2], lr=5e-3, alpha=0.5)
    rule(given((1.0, 10.0), along((1.0, 2.0))))
    for _ in range(800):
        weights = rule(given((0.9, 1.0), along((1.0, 2.0))))
    lengths = weights * rows(1.0, 2.0)
    assert lengths[0] > 1.5 * lengths[1]


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_scaled_loss_is_balanced_back(given, factor):
    rule = GradNorm(TASKS, lr=0.01)
    for _ in range(400):
        weights = rule(given((factor, 1.0, 1.0), along((factor, 1.0, 1.0))))
        assert (weights > 0).all()
    lengths = weights * rows(factor, 1.0, 1.0)
    if factor > 1:
        assert weights[0] < 0.05
    else:
        assert weights[0] > 2.9
    assert lengths.isfinite().all()


def test_a_common_scale_of_the_losses_changes_nothing(given):
    plain, scaled = GradNorm(TASKS), GradNorm(TASKS)
    for losses, gradients in history(3, 30):
        a = plain(given(losses.tolist(), gradients))
        b = scaled(given((1e3 * losses).tolist(), 1e3 * gradients))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_weights_stay_positive_and_sum_to_the_tasks(given):
    rule = GradNorm(TASKS, lr=0.5)
    lowest = 1.0
    for losses, gradients in history(3, 200):
        weights = rule(given(losses.tolist(), gradients * rows([1.0], [1e4], [1.0])))
        assert (weights > 0).all()
        assert weights.sum().item() == pytest.approx(3, rel=1e-12)
        lowest = min(lowest, weights.min().item())
    assert lowest < 2 * FLOOR, "no weight met the floor"


def test_the_step_takes_the_weights_from_before_the_update():
    tasks = tiny_tasks()
    step = Step(problem(), tasks, gradnorm(tasks))
    first, second = train(step, batches(2))
    assert [w.item() for w in first.encoder_weights.values()] == [1, 1, 1]
    assert all(w != 1 for w in second.encoder_weights.values())
    assert second.encoder_weights == second.decoder_weights


def test_an_absent_task_keeps_its_state_and_the_others_their_sum(given):
    rule = GradNorm(TASKS)
    run = list(history(3, 20))
    for losses, gradients in run[:10]:
        rule(given(losses.tolist(), gradients))
    before = {name: buffer.clone() for name, buffer in rule.named_buffers()}
    for losses, gradients in run[10:]:
        losses[1], gradients[1] = 0, 0
        rule(given(losses.tolist(), gradients, labelled=[True, False, True]))
    for name, buffer in rule.named_buffers():
        assert buffer[1] == before[name][1], name
    assert rule.weights[0] != before["weights"][0]
    assert rule.weights.sum().item() == pytest.approx(3, rel=1e-12)


@pytest.mark.parametrize("how", ["nan", "none"])
def test_a_task_that_never_has_labels_is_as_if_it_were_not_there(how):
    tasks, data = tiny_tasks(), batches(6)
    rest = [tasks[0], tasks[2]]
    whole, part = (
        Step(problem(), tasks, gradnorm(tasks)),
        Step(problem().restricted_to(["a", "c"]), rest, gradnorm(rest)),
    )
    absent = [None if how == "none" else torch.full_like(batch.targets["b"], math.nan) for batch in data]
    train(whole, [Batch(batch.inputs, {**batch.targets, "b": b}) for batch, b in zip(data, absent, strict=True)])
    train(part, data)
    for key, p in part.model.named_parameters():
        torch.testing.assert_close(whole.model.get_parameter(key), p, rtol=1e-12, atol=1e-14)


def test_a_batch_without_any_label_changes_nothing(given):
    rule = GradNorm(TASKS)
    rule(given(gradients=along((1.0, 2.0, 3.0))))
    before = {name: buffer.clone() for name, buffer in rule.named_buffers()}
    weights = rule(given((0.0,) * 3, torch.zeros(3, 3, dtype=torch.float64), labelled=[False] * 3))
    assert torch.equal(weights, before["weights"])
    assert all(torch.equal(buffer, before[name]) for name, buffer in rule.named_buffers())


def test_a_task_that_comes_late_starts_from_its_own_first_loss(given):
    rule = GradNorm(TASKS)
    g = along((1.0, 2.0, 3.0))
    for losses, labelled in (((8.0, 0.0, 2.0), (True, False, True)), ((4.0, 5.0, 1.0), (True, True, True))):
        rule(given(losses, g * torch.tensor(labelled)[:, None], labelled=labelled))
    assert rule.initial.tolist() == [8, 5, 2]
    assert rule.adam.updates.tolist() == [2, 1, 2]


def test_a_loss_that_does_not_start_positive_counts_from_its_first_positive_value(given):
    rule = GradNorm(TASKS)
    for losses in ((1.0, 0.0, -2.0), (1.0, 3.0, -1.0), (1.0, 2.0, 4.0)):
        assert rule(given(losses, along((1.0, 2.0, 3.0)))).isfinite().all()
    assert rule.initial.tolist() == [1, 3, 4]


@pytest.mark.parametrize("losses", [(0.0, 0.0, 0.0), (-1.0, 1.0, 1.0), (1.0, 1e-300, 1e300), (-1.0, -2.0, -3.0)])
def test_odd_losses_leave_weights_finite_and_positive(given, losses):
    for first in (losses, (1.0, 1.0, 1.0), (1e-300, 1.0, 1.0)):
        rule = GradNorm(TASKS)
        rule(given(first, along((1.0, 2.0, 3.0))))
        for _ in range(5):
            weights = rule(given(losses, along((1.0, 2.0, 3.0))))
            assert weights.isfinite().all()
            assert (weights > 0).all()


def test_a_negative_loss_counts_as_training_at_the_mean_rate(given):
    a, b = GradNorm(TASKS), GradNorm(TASKS)
    g = along((1.0, 1.0, 1.0))
    for rule, second in ((a, -1.0), (b, 0.5)):
        rule(given((1.0, 1.0, 1.0), g))
        # The others stand at 0.4 and 0.6 of their first losses, 0.5 in the mean.
        rule(given((0.4, second, 0.6), g))
    torch.testing.assert_close(a.weights, b.weights, rtol=1e-12, atol=0)
    assert a.weights[0] < a.weights[1] < a.weights[2]


def test_a_zero_gradient_does_not_push(given):
    rule = GradNorm(TASKS)
    rule(given(gradients=along((0.0, 1.0, 1.0))))
    assert rule.adam.first[0] == 0
    assert (rule.adam.first[1:] > 0).all()
    assert rule.weights.isfinite().all()


def test_a_step_that_overflows_does_not_end_the_weights(given):
    rule = GradNorm(TASKS)
    rule(given(gradients=along((1.0, 2.0, 3.0))))
    rule(given(gradients=along((math.inf, 2.0, 3.0))))
    rule(given((math.inf, 1.0, 1.0), along((1.0, 2.0, 3.0))))
    assert all(buffer.isfinite().all() for buffer in rule.buffers())
    assert rule.adam.updates.tolist() == [1, 3, 3]


def test_decoders_can_be_left_unweighted():
    tasks = tiny_tasks()
    step = Step(problem(), tasks, Method(encoder=GradNorm(tasks), decoder=Equal(tasks)))
    report = train(step, batches(2))[-1]
    assert [w.item() for w in report.decoder_weights.values()] == [1, 1, 1]
    assert any(w != 1 for w in report.encoder_weights.values())


def test_both_slots_hold_one_rule():
    method = gradnorm(TASKS)
    assert method.encoder is method.decoder


@pytest.mark.parametrize("cast", [torch.float32, torch.float64])
def test_state_is_read_back_as_it_was_saved(cast):
    """The step of a network in single precision may itself have been cast, or not."""
    tasks = tiny_tasks()
    step = Step(problem(dtype=torch.float32), tasks, gradnorm(tasks))
    step.encoder.to(cast)
    train(step, batches(3, dtype=torch.float32))
    other = GradNorm(tasks).to(cast)
    other.load_state_dict(step.encoder.state_dict())
    for name, buffer in step.encoder.named_buffers():
        assert buffer.dtype in (cast, torch.bool)
        assert torch.equal(buffer, other.get_buffer(name)), name


def test_without_any_loss_left_all_train_at_one_rate(given):
    a, b = GradNorm(TASKS), GradNorm(TASKS)
    g = along((1.0, 2.0, 3.0))
    for losses in ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)):
        a(given(losses, g))
        b(given((1.0, 1.0, 1.0), g))
    torch.testing.assert_close(a.weights, b.weights, rtol=1e-12, atol=0)


def test_features_and_parameters_agree_behind_an_orthogonal_encoder():
    """Their norms are proportional, and Adam passes over a common scale."""
    tasks, data = tiny_tasks(), batches(10, size=1)
    shared = nn.Linear(4, 4, bias=False).double()
    nn.init.orthogonal_(shared.weight)
    model = SplitModel(shared, {n: nn.Linear(4, 2).double() for n in "abc"})
    steps = [Step(model, tasks, gradnorm(tasks, at=at)) for at in ("features", "parameters")]
    data = [Batch(batch.inputs / batch.inputs.norm(), batch.targets) for batch in data]
    for batch in data:
        found = [torch.stack(list(step.backward(batch).encoder_weights.values())) for step in steps]
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)
    assert (found[0] - 1).abs().max() > 0.01


def test_nothing_waits_for_the_device(given):
    """On tensors without values, whatever asked the host for one would raise."""
    rule = GradNorm(TASKS).to("meta")
    signals = given(gradients=along((1.0, 2.0, 3.0)))
    for name in ("primary", "labelled", "losses", "_gradients"):
        setattr(signals, name, getattr(signals, name).to("meta"))
    for _ in range(3):
        assert rule(signals).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha must be at least 0, not -1.0"),
        ({"lr": 0.0}, "lr must be positive, not 0.0"),
        ({"at": "heads"}, "at must be 'features' or 'parameters', not 'heads'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GradNorm(TASKS, **options)
