"""Relative improvement, by its written definitions."""

from dataclasses import dataclass
from statistics import fmean

import pytest
from sidetask_core import MissingKey, Task, relative_improvement, relative_improvement_by_task


@dataclass
class Way:
    higher_is_better: bool | None


TASKS = [
    Task("seg", abs, metrics={"miou": Way(True), "accuracy": Way(True)}),
    Task("depth", abs, metrics={"abs": Way(False)}),
    Task("helper", abs, metrics={"accuracy": Way(True)}, primary=False),
]
SINGLE = {"seg": {"miou": 0.4, "accuracy": 0.8}, "depth": {"abs": 0.5}, "helper": {"accuracy": 0.5}}
OURS = {"seg": {"miou": 0.5, "accuracy": 0.6}, "depth": {"abs": 0.4}, "helper": {"accuracy": 0.0}}
CHANGES = {"miou": 25.0, "accuracy": -25.0, "abs": 20.0}


def test_definitions():
    assert relative_improvement(OURS, SINGLE, TASKS) == pytest.approx(fmean([0.0, 20.0]))
    assert relative_improvement(OURS, SINGLE, TASKS, "one-metric") == pytest.approx(fmean([25.0, 20.0]))
    assert relative_improvement(OURS, SINGLE, TASKS, "flat") == pytest.approx(-fmean(CHANGES.values()))


@pytest.mark.parametrize("definition", ["mean-of-tasks", "one-metric", "flat"])
def test_the_baseline_does_not_improve_on_itself(definition):
    assert relative_improvement(SINGLE, SINGLE, TASKS, definition) == 0


def test_by_task_includes_auxiliaries():
    by_task = relative_improvement_by_task(OURS, SINGLE, TASKS)
    assert by_task == pytest.approx({"seg": 0.0, "depth": 20.0, "helper": -100.0})


def test_negative_baselines_keep_the_direction():
    task = [Task("a", abs, metrics={"log-likelihood": Way(True)})]
    assert relative_improvement({"a": {"log-likelihood": -1.0}}, {"a": {"log-likelihood": -2.0}}, task) == 50


def test_errors_name_task_and_metric():
    with pytest.raises(MissingKey, match="task 'depth' is not in the results, which have: seg"):
        relative_improvement({"seg": OURS["seg"]}, SINGLE, TASKS)
    with pytest.raises(MissingKey, match="metric 'accuracy' of task 'seg' is not in the baseline, which have: miou"):
        relative_improvement(OURS, {**SINGLE, "seg": {"miou": 0.4}}, TASKS)
    with pytest.raises(ValueError, match="baseline of metric 'abs' of task 'depth' is 0"):
        relative_improvement(OURS, {**SINGLE, "depth": {"abs": 0.0}}, TASKS)
    with pytest.raises(ValueError, match="'median'"):
        relative_improvement(OURS, SINGLE, TASKS, "median")
    with pytest.raises(ValueError, match="none of the tasks is primary: helper"):
        relative_improvement(OURS, SINGLE, TASKS[2:])
    with pytest.raises(ValueError, match="task 'a' has no metrics"):
        relative_improvement({}, {}, [Task("a", abs)])
    with pytest.raises(ValueError, match="metric 'm' of task 'a' does not say"):
        relative_improvement({"a": {"m": 1}}, {"a": {"m": 1}}, [Task("a", abs, metrics={"m": Way(None)})])
