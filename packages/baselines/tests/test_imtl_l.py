"""IMTL-L against its written definition."""

import functools
import math

import pytest
import torch
from sidetask_baselines.imtl_l import IMTLL, imtl_l
from sidetask_core import Step, Task
from sidetask_core.testing import batches, conformance, problem, squared, tiny_tasks, train

TASKS = tiny_tasks()

TestIMTLL = conformance(imtl_l)
TestIMTLLFromElsewhere = conformance(imtl_l, init=-1.0)


def times(k, prediction, target):
    return k * squared(prediction, target)


def test_it_settles_where_every_scaled_loss_is_one(given):
    rule = IMTLL(TASKS).double()
    signals = given((0.1, 2.0, 30.0))
    optimizer = torch.optim.LBFGS(rule.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure():
        optimizer.zero_grad()
        loss = rule.objective(signals)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(rule(signals) * signals.losses, torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)


def test_network_and_scales_are_trained_on_one_objective():
    tasks, model, (batch, *_) = tiny_tasks(), problem(), batches(1)
    method = imtl_l(tasks, init=0.3)
    assert method.encoder is method.decoder
    rule = method.encoder.double()
    Step(model, tasks, method).backward(batch)
    losses = torch.stack([squared(p, batch.targets[n]).mean() for n, p in model(batch.inputs).items()])
    objective = (losses * rule.log_scale.exp() - rule.log_scale).sum()
    everything = [*model.parameters(), rule.log_scale]
    for p, expected in zip(everything, torch.autograd.grad(objective, everything), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1e-3, 50.0])
def test_the_scale_of_a_loss_moves_its_s_and_nothing_else(k):
    plain, scaled = tiny_tasks(), tiny_tasks()
    scaled[1] = Task("b", functools.partial(times, k), primary=False)
    steps = [Step(problem(), tasks, imtl_l(tasks)).double() for tasks in (plain, scaled)]
    with torch.no_grad():
        steps[1].encoder.log_scale[1] -= math.log(k)
    for step in steps:
        train(step, batches(6))
    torch.testing.assert_close(steps[0].model.state_dict(), steps[1].model.state_dict(), rtol=1e-9, atol=1e-12)
    shift = steps[0].encoder.log_scale - steps[1].encoder.log_scale
    expected = torch.tensor([0.0, math.log(k), 0.0], dtype=torch.float64)
    torch.testing.assert_close(shift.detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_scale_of_a_task_without_labels_stays(given):
    rule = IMTLL(TASKS).double()
    rule.objective(given((3.0, 0.0, 1.0), labelled=(True, False, True))).backward()
    assert rule.log_scale.grad.tolist() == [2.0, 0.0, 0.0]


def test_one_task(given):
    rule = IMTLL(TASKS[:1], init=math.log(2)).double()
    assert rule(given((3.0,))).tolist() == pytest.approx([2])
