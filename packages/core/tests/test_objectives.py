"""Tasks whose loss is a sum of several objectives."""

import math

import pytest
import torch
from sidetask_core import Batch, Equal, Method, MissingKey, Shaper, Step, Task
from sidetask_core.testing import (
    batches,
    brute_force,
    close,
    gradients,
    in_two_processes,
    labelled,
    problem,
    tiny_tasks,
)


def two_losses(prediction, target):
    """Objectives whose elements have different shapes."""
    difference = prediction - target
    return {"l1": difference.abs(), "l2": difference.square().sum(dim=1)}


def row_labelled(target):
    return ~target.isnan().any(dim=1)


class Weights(Shaper):
    """Constant weights of the objectives, one of them trained."""

    elementwise = False

    def __init__(self):
        super().__init__()
        self.l1 = torch.nn.Parameter(torch.tensor(0.25, dtype=torch.float64))

    def forward(self, losses, target):
        assert set(losses) == {"l1", "l2"}
        return {"l2": torch.full_like(losses["l2"], 3.0), "l1": self.l1}

    def objective(self, signals):
        return (signals.objectives("b")[0] * torch.stack([self.l1, self.l1**2])).sum()


def tasks_with_objectives():
    tasks = tiny_tasks()
    tasks[1] = Task("b", two_losses, valid=row_labelled, primary=False, objectives=("l1", "l2"))
    return tasks


def with_gaps(batch):
    target = batch.targets["b"].clone()
    target[1, 0] = math.nan
    return Batch(batch.inputs, {**batch.targets, "b": target})


def test_the_loss_is_the_sum_of_the_objectives_means():
    prediction, target = torch.zeros(2, 2), torch.tensor([[1.0, 3.0], [math.nan, 9.0]])
    loss, count = tasks_with_objectives()[1].mean(prediction, target)
    assert loss == (1 + 3) / 2 + (1 + 9)
    assert count == 3


@pytest.mark.parametrize("shaped", [False, True])
def test_gradients_equal_brute_force(shaped):
    tasks, model, batch = tasks_with_objectives(), problem(), with_gaps(batches(1)[0])
    shapers = {"b": Weights()} if shaped else {}
    step = Step(model, tasks, Method(shapers=shapers))
    report = step.backward(batch)
    prediction = model(batch.inputs)["b"]
    rows = row_labelled(batch.targets["b"])
    l1, l2 = (x[rows].mean() for x in two_losses(prediction, batch.targets["b"]).values())
    by_hand = 0.25 * l1 + 3 * l2 if shaped else l1 + l2
    close(report.losses["b"], by_hand.detach(), "the loss")
    ones = [torch.ones(())] * 3
    expected = brute_force(model, tasks, batch, ones, ones, shapers)
    for name, found in gradients(model).items():
        close(found, expected[name], name)
    if shaped:
        close(shapers["b"].l1.grad, (l1 + 2 * 0.25 * l2).detach(), "the shaper's own parameter")
        assert [*step.rule_parameters()] == [shapers["b"].l1]


class Looking(Equal):
    """Keeps what it reads of the objectives."""

    def forward(self, signals):
        self.found = signals.objectives("b")
        self.whole = signals.objectives("a")
        self.l1 = signals.elements("b", "l1")[0] if signals.labelled[1] else None
        return super().forward(signals)


def share(rank, world):
    tasks, batch = tasks_with_objectives(), with_gaps(batches(1)[0])
    rule = Looking(tasks)
    step = Step(problem(), tasks, Method(encoder=rule, shapers={"b": Weights()}))
    step.backward(Batch(batch.inputs[rank::world], {k: y[rank::world] for k, y in batch.targets.items()}))
    return {"means": rule.found[0], **gradients(step)}


def test_rules_see_unshaped_means_of_all_processes():
    whole = share(0, 1)
    batch = with_gaps(batches(1)[0])
    rows = row_labelled(batch.targets["b"])
    both = two_losses(problem()(batch.inputs)["b"], batch.targets["b"])
    close(whole["means"], torch.stack([x[rows].mean() for x in both.values()]).detach(), "means")
    for half in in_two_processes(share):
        for name, value in whole.items():
            close(half[name], value, name)


def test_an_absent_task_has_no_labelled_objective():
    tasks, (batch, *_) = tasks_with_objectives(), batches(1)
    rule = Looking(tasks)
    Step(problem(), tasks, Method(encoder=rule)).backward(Batch(batch.inputs, {**batch.targets, "b": None}))
    assert rule.found[0].tolist() == [0, 0]
    assert rule.found[1].tolist() == [False, False]
    assert rule.whole[1].tolist() == [True]


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="task 'b': objectives are distinct names, not 'l1'"):
        Task("b", two_losses, objectives="l1")
    with pytest.raises(ValueError, match="distinct"):
        Task("b", two_losses, objectives=("l1", "l1"))
    with pytest.raises(TypeError, match="task 'b': loss must return a mapping of its objectives, l1, l3; found l1, l2"):
        Task("b", two_losses, objectives=("l1", "l3")).mean(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="distinct names, not"):
        Task("b", two_losses, objectives=(1, 2))
    misfit = Task("b", two_losses, valid=lambda y: torch.ones(3, 3, dtype=torch.bool), objectives=("l1", "l2"))
    with pytest.raises(ValueError, match="task 'b', objective 'l1': the mask of labelled elements"):
        misfit.mean(torch.zeros(2, 2), torch.zeros(2, 2))
    foreign = Weights()
    foreign.task = "a"
    with pytest.raises(ValueError, match="the shaper for 'b' was made for task 'a'"):
        Step(problem(), tasks_with_objectives(), Method(shapers={"b": foreign}))
    with pytest.raises(TypeError, match="found Tensor"):
        Task("b", lambda p, y: p - y, objectives=("l1",)).mean(torch.zeros(2), torch.zeros(2))
    with pytest.raises(TypeError, match="loss must return a tensor, found dict"):
        Task("b", two_losses, valid=labelled).mean(torch.zeros(2, 2), torch.zeros(2, 2))

    class Asking(Equal):
        def forward(self, signals):
            return signals.elements("b")[0]

    tasks, (batch, *_) = tasks_with_objectives(), batches(1)
    with pytest.raises(MissingKey, match="task 'b' has no objective None; its objectives are: l1, l2"):
        Step(problem(), tasks, Method(encoder=Asking(tasks))).backward(batch)

    class Wrong(Weights):
        def forward(self, losses, target):
            return {"l1": 1.0}

    with pytest.raises(TypeError, match="the shaper of task 'b' must return weights for l1, l2; found l1"):
        Step(problem(), tasks, Method(shapers={"b": Wrong()})).backward(batch)
