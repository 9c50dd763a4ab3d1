import copy
import math

import pytest
import torch
from sidetask_baselines.per_objective_uncertainty import PerObjectiveUncertainty, per_objective_uncertainty
from sidetask_baselines.uncertainty import uncertainty
from sidetask_core import Batch, Step, Task
from sidetask_core.testing import (
    batches,
    close,
    conformance,
    gradients,
    in_two_processes,
    problem,
    squared,
    tiny_tasks,
    train,
)

TestPerObjectiveUncertainty = conformance(per_objective_uncertainty)
TestPerObjectiveUncertaintyFromOne = conformance(per_objective_uncertainty, init=0.0)


def three_losses(prediction, target):
    """Objectives of different shapes and very different sizes, one of them without any element."""
    difference = prediction - target
    return {
        "l1": 100 * difference.abs(),
        "l2": 0.01 * difference.square().sum(dim=1),
        "matched": difference.square()[:, :0],
    }


def row_labelled(target):
    return ~target.isnan().any(dim=1)


def tasks_with_objectives():
    """Task b has three objectives, task c is a ready mean, a scalar."""
    a, _, _ = tiny_tasks()
    b = Task("b", three_losses, valid=row_labelled, primary=False, objectives=("l1", "l2", "matched"))
    return [a, b, Task("c", lambda p, y: squared(p, y).mean(), primary=False)]


def with_gaps(batch):
    target = batch.targets["b"].clone()
    target[1, 0] = math.nan
    return Batch(batch.inputs, {**batch.targets, "b": target})


def build(init=-0.7):
    tasks = tasks_with_objectives()
    return Step(problem(), tasks, per_objective_uncertainty(tasks, init=init)).double()


@pytest.mark.parametrize("init", [-0.7, 0.4])
def test_one_objective_per_task_is_uncertainty_weighting(init):
    """Whole runs agree: network, variances and what the optimizer makes of them."""
    tasks = tiny_tasks()
    methods = (uncertainty, per_objective_uncertainty)
    steps = [Step(problem(), tasks, method(tasks, init=init)).double() for method in methods]
    known, found = steps
    data = batches(6)
    data[2] = Batch(data[2].inputs, {**data[2].targets, "b": None})
    for batch in data:
        for step in steps:
            train(step, [batch])
        of_network = [gradients(step.model) for step in steps]
        for name, expected in of_network[0].items():
            close(of_network[1][name], expected, name, rtol=1e-12)
        variances = torch.cat([shaper.log_variance for shaper in found.shapers.values()])
        close(variances, known.encoder.log_variance, "variances", rtol=1e-12)


def test_network_and_variances_are_trained_on_one_objective():
    step, batch = build(init=0.3), with_gaps(batches(1)[0])
    with torch.no_grad():
        step.shapers["b"].log_variance += torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    report = step.backward(batch)
    predictions, rows = step.model(batch.inputs), row_labelled(batch.targets["b"])
    of_b = three_losses(predictions["b"][rows], batch.targets["b"][rows])
    losses = [
        squared(predictions["a"], batch.targets["a"]).mean(),
        of_b["l1"].mean(),
        of_b["l2"].mean(),
        squared(predictions["c"], batch.targets["c"]).mean(),
    ]
    a, b, c = (step.shapers[name].log_variance for name in "abc")
    total = sum(loss / (2 * s.exp()) + s / 2 for loss, s in zip(losses, [a[0], b[0], b[1], c[0]], strict=True))
    parameters = dict(step.named_parameters())
    expected = torch.autograd.grad(total, list(parameters.values()))
    for (name, p), gradient in zip(parameters.items(), expected, strict=True):
        close(p.grad, gradient, name)
    assert b.grad[2] == 0
    close(report.losses["b"], (losses[1] / (2 * b[0].exp()) + losses[2] / (2 * b[1].exp())).detach(), "the loss")
    assert {id(p) for p in step.rule_parameters()} == {id(p) for p in (a, b, c)}


def test_variances_settle_at_their_objectives():
    """Each variance's gradient is zero where it is the unweighed loss, and turns there."""
    batch = batches(1)[0]
    with torch.no_grad():
        of_b = three_losses(problem()(batch.inputs)["b"], batch.targets["b"])
    optimum = torch.stack([of_b["l1"].mean(), of_b["l2"].mean()]).log()
    for away in (0.0, 0.01, -0.01):
        step = build()
        with torch.no_grad():
            step.shapers["b"].log_variance[:2] = optimum + away
        step.backward(batch)
        found = step.shapers["b"].log_variance.grad[:2]
        torch.testing.assert_close(found, torch.full_like(found, (1 - math.exp(-away)) / 2), rtol=1e-9, atol=1e-12)


def test_a_task_without_labels_leaves_its_variances():
    step, (batch, *_) = build(), batches(1)
    step.backward(Batch(batch.inputs, {**batch.targets, "b": None}))
    assert step.shapers["b"].log_variance.grad.tolist() == [0, 0, 0]
    assert step.shapers["a"].log_variance.grad != 0


def test_a_resumed_run_equals_an_uninterrupted_one():
    data, whole = [with_gaps(b) for b in batches(6)], build()
    optimizer = torch.optim.Adam(whole.parameters(), lr=0.01)
    train(whole, data[:3], optimizer)
    state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, data[3:], optimizer)
    resumed = build(init=5.0)
    optimizer = torch.optim.Adam(resumed.parameters(), lr=0.01)
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(resumed, data[3:], optimizer)
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name


def share(rank, world):
    step = build()
    train(
        step,
        [
            Batch(b.inputs[rank::world], {name: y[rank::world] for name, y in b.targets.items()})
            for b in map(with_gaps, batches(4))
        ],
    )
    return dict(step.named_parameters())


def test_two_processes_equal_one():
    whole = share(0, 1)
    for half in in_two_processes(share):
        for name, value in whole.items():
            close(half[name], value, name)


def test_the_state_of_other_objectives_is_refused():
    task = tasks_with_objectives()[1]
    other = Task("b", three_losses, objectives=("matched", "l2", "l1"))
    with pytest.raises(ValueError, match="is for objectives l1, l2, matched of task 'b', not for matched, l2, l1"):
        PerObjectiveUncertainty(other).load_state_dict(PerObjectiveUncertainty(task).state_dict())
