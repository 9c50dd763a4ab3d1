import math

import pytest
import torch
from sidetask_baselines.famo import FAMO, famo
from sidetask_core import Method, SplitModel, Step, Task
from sidetask_core.signals import Progress
from sidetask_core.testing import batches, close, conformance, problem, tiny_tasks, train

TestFAMO = conformance(famo)
TestFAMOPaperScale = conformance(famo, scale="paper", lr=0.5, decay=0.0)

TASKS = tiny_tasks()
FIELDS = ("before", "after", "labelled")


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


def test_differences_that_are_rounding_teach_nothing(given):
    rule = FAMO(TASKS)
    before = torch.tensor([1.0, 2.0, 3000.0])
    for units, learned in ((2, False), (200, True)):
        after = before * (1 + units * torch.finfo(before.dtype).eps * torch.tensor([1.0, -1.0, 1.0]))
        rule(given(progress=Progress(before, after, torch.tensor([True] * 3))))
        assert bool(rule.logits.any()) == learned


@pytest.mark.parametrize("accumulate", [1, 3])
def test_dropout_teaches_nothing_while_gradients_accumulate(accumulate):
    torch.manual_seed(0)
    heads = {name: torch.nn.Linear(5, 2) for name in "abc"}
    model = SplitModel(torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Dropout(), torch.nn.Linear(32, 5)), heads)
    step = Step(model.double(), TASKS, famo(TASKS))
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    learned = []
    for i, batch in enumerate(batches(9)):
        before = step.encoder.logits.clone()
        step.backward(batch)
        learned.append(not torch.equal(step.encoder.logits, before))
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert learned == [i > 0 and i % accumulate == 0 for i in range(9)]


@pytest.mark.parametrize("after", [math.inf, math.nan, -1.0])
def test_a_task_whose_loss_has_no_logarithm_after_the_update_keeps_its_logit(given, after):
    rule, others = FAMO(TASKS), FAMO(TASKS)
    rule(given(progress=progress((2.0, 2.0, 2.0), (1.0, after, 2.0))))
    others(given(progress=progress((2.0, 2.0, 2.0), (1.0, 7.0, 2.0), (True, False, True))))
    assert rule.logits.tolist() == others.logits.tolist()
    assert rule.logits[1] == 0
    weights = rule(given(progress=progress((2.0, 2.0, 2.0), (1.0, 1.5, 2.0))))
    assert weights.isfinite().all()
    assert (rule.logits != 0).all()


def test_a_negative_loss_has_no_weight_and_the_others_are_weighed_without_it(given):
    rule = FAMO(TASKS)
    rule(given(progress=progress((2.0, 2.0, 2.0), (1.0, 1.5, 2.0))))
    weights = rule(given((1.0, -3.0, 4.0)))
    assert torch.equal(weights, rule(given((1.0, 0.0, 4.0), labelled=(True, False, True))))
    assert weights[1] == 0
    assert weights.sum() == pytest.approx(2)
    assert rule(given((-1.0, -2.0, -3.0))).tolist() == [0, 0, 0]


def test_a_network_whose_losses_left_their_range_learns_on():
    """The loss of the last batch overflows under the new parameters, that of the next one does not."""

    def loss(p, y):
        return torch.where(y > 50, torch.where(y > 50, p, 0.0).exp(), (p - y).square())

    tasks = [Task(name, loss) for name in "ab"]
    data = batches(4, names="ab")
    data[1].targets["a"][0] = 100.0
    step = Step(problem(names="ab"), tasks, famo(tasks))
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-6)
    for i, batch in enumerate(data):
        optimizer.zero_grad()
        report = step.backward(batch)
        assert all(weight.isfinite() for weight in report.encoder_weights.values())
        optimizer.step()
        with torch.no_grad():
            step.model.heads["a"].bias.add_(800.0 * ((i == 1) - (i == 2)))
    assert step.encoder.logits.isfinite().all()
    assert step.encoder.logits.any()


def test_nothing_waits_for_the_device(given):
    """Tensors on the meta device have no values to wait for."""
    rule = FAMO(TASKS).to("meta")
    signals = given(progress=Progress(*(getattr(progress((2.0,) * 3, (1.0,) * 3), name).to("meta") for name in FIELDS)))
    signals.losses, signals.labelled = signals.losses.to("meta"), signals.labelled.to("meta")
    assert rule(signals).shape == (3,)


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
