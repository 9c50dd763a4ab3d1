import pytest
import torch
from sidetask_baselines.famo import FAMO, famo
from sidetask_core import Method, Step
from sidetask_core.signals import Progress
from sidetask_core.testing import batches, close, conformance, problem, tiny_tasks, train

TestFAMO = conformance(famo)
TestFAMOPaperScale = conformance(famo, scale="paper", lr=0.5, decay=0.0)

TASKS = tiny_tasks()


def progress(before, after, labelled=(True, True, True)):
    return Progress(*(torch.tensor(x, dtype=torch.float64) for x in (before, after)), torch.tensor(labelled))


def history(steps):
    losses = torch.rand(steps, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    return [progress(*pair.tolist()) for pair in losses]


def test_weights_are_those_of_the_written_algorithm(given):
    """Logits by autograd through the softmax and torch's Adam; weights as the gradient of c Σ z log L."""
    rule = FAMO(TASKS, scale="paper")
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.025, weight_decay=0.01)
    past = None
    for done in history(30):
        if past is not None:
            adam.zero_grad()
            fell = (past.before + 1e-8).log() - (past.after + 1e-8).log()
            logits.softmax(0).backward(fell)
            adam.step()
        losses = torch.tensor([3.0, 0.2, 40.0], dtype=torch.float64, requires_grad=True)
        z = logits.softmax(0).detach()
        constant = 1 / (z / (losses.detach() + 1e-8)).sum()
        (expected,) = torch.autograd.grad(constant * (z * (losses + 1e-8).log()).sum(), losses)
        close(rule(given(losses.tolist(), progress=past)), expected, "weights")
        past = done


def test_a_task_that_fell_least_gains_most(given):
    rule = FAMO(TASKS)
    for _ in range(10):
        weights = rule(given((1.0, 1.0, 1.0), progress=progress((2.0, 2.0, 2.0), (1.9, 1.5, 1.0))))
    assert weights[0] > weights[1] > weights[2]
    assert weights.sum() == pytest.approx(3)


def test_equal_relative_falls_leave_the_logits(given):
    """Whatever the scales of the losses."""
    rule = FAMO(TASKS, lr=1e-9)
    weights = rule(given((1.0, 10.0, 100.0), progress=progress((1e-3, 2.0, 4e5), (5e-4, 1.0, 2e5))))
    # Adam's step is of one length whatever the gradient's, so look at that: log(2) times rounding.
    assert rule.adam.first.abs().max() < 1e-6
    close(weights * torch.tensor([1.0, 10.0, 100.0]), weights[:1].expand(3), "weights are inverse to losses", rtol=1e-3)


def test_scaling_a_loss_divides_its_weight(given):
    steps = history(10)
    plain, scaled = FAMO(TASKS, scale="paper"), FAMO(TASKS, scale="paper")
    factor = torch.tensor([1.0, 1000.0, 1.0], dtype=torch.float64)
    for done in steps:
        more = Progress(done.before * factor, done.after * factor, done.labelled)
        a = plain(given(done.after.tolist(), progress=done))
        b = scaled(given((done.after * factor).tolist(), progress=more)) * factor
        torch.testing.assert_close(a / a.sum(), b / b.sum(), rtol=1e-5, atol=0)


def test_an_absent_task_keeps_its_logit_and_has_no_weight(given):
    rule = FAMO(TASKS)
    rule(given(progress=progress((2.0, 2.0, 2.0), (1.0, 1.5, 2.0))))
    before = rule.logits.clone()
    absent = (True, False, True)
    weights = rule(given((1.0, 0.0, 1.0), labelled=absent, progress=progress((2.0, 0.0, 2.0), (1.0, 0.0, 2.0), absent)))
    assert rule.logits[1] == before[1]
    assert (rule.logits != before).tolist() == [True, False, True]
    assert weights[1] == 0
    assert weights.sum() == pytest.approx(2)
    assert rule(given((0.0,) * 3, labelled=(False,) * 3)).tolist() == [0, 0, 0]


def test_without_an_update_in_between_nothing_is_learned(given):
    rule = FAMO(TASKS)
    rule(given(progress=progress((2.0, 2.0, 2.0), (1.0, 1.5, 2.0))))
    state = {name: value.clone() for name, value in rule.state_dict().items() if isinstance(value, torch.Tensor)}
    rule(given(progress=progress((2.0, 2.0, 2.0), (2.0, 2.0, 2.0))))
    for name, value in state.items():
        assert torch.equal(rule.state_dict()[name], value), name


def test_losses_of_zero_stay_finite(given):
    rule = FAMO(TASKS)
    weights = rule(given((0.0, 1.0, 1e6), progress=progress((1.0, 0.0, 1e-6), (0.0, 1.0, 1e6))))
    assert weights.isfinite().all()
    assert (weights > 0).all()


def test_training_steps_look_back_at_their_own_batch():
    tasks, data = tiny_tasks(), batches(3)
    rule = FAMO(tasks)
    step = Step(problem(), tasks, Method(encoder=rule, decoder=rule))
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    train(step, data[:1], optimizer)
    assert (rule.logits == 0).all()
    with torch.no_grad():
        predictions = step.model(data[0].inputs)
        after = torch.stack([(predictions[n] - y).square().mean() for n, y in data[0].targets.items()])
    before = torch.stack([(problem()(data[0].inputs)[n] - y).square().mean() for n, y in data[0].targets.items()])
    fell = before.log() - after.log()
    train(step, data[1:2], optimizer)
    # Adam's first step is the sign of the gradient.
    torch.testing.assert_close(rule.logits, -0.025 * (fell - fell.mean()).sign(), rtol=1e-4, atol=0)


def test_bad_options_are_named():
    for options, message in (({"lr": 0}, "lr must be"), ({"decay": -1}, "decay"), ({"scale": "mean"}, "scale must be")):
        with pytest.raises(ValueError, match=message):
            famo(TASKS, **options)
