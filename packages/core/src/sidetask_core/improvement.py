"""How much better than single-task learning: the three definitions in use, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from sidetask_core.task import MissingKey, Task, _listed, check_tasks

Results = Mapping[str, Mapping[str, float]]
Definition = Literal["mean-of-tasks", "one-metric", "flat"]


def relative_improvement(
    results: Results, baseline: Results, tasks: Sequence[Task], definition: Definition = "mean-of-tasks"
) -> float:
    """Relative improvement over a baseline in percent, averaged over the primary tasks only.

    With M a result, S its single-task baseline and the sign turned where lower is better, each metric improves by
    ±(M − S)/S.

    - ``"mean-of-tasks"`` (SAAL, Eq. 12): mean over each task's metrics, then over tasks;
    - ``"one-metric"`` (Auto-λ, IAL): the headline metric of each task, the first of ``task.metrics``;
    - ``"flat"`` (Nash-MTL's Δm): the mean over all metrics of all tasks, with the sign flipped: *lower is better*.

    Args:
        results: task name to metric name to value.
        baseline: the same, of the single-task networks.
        tasks: say which are primary, which metrics count and which way is better.
        definition: one of the three names.

    Raises:
        MissingKey: for a task or metric that is not in `results` or `baseline`.
        ValueError: for an unknown definition, no primary task, a task without metrics, a metric that does not say
            which way is better, or a baseline of zero.

    >>> class Metric:
    ...     def __init__(self, higher_is_better): self.higher_is_better = higher_is_better
    >>> tasks = [Task("seg", loss=abs, metrics={"miou": Metric(True)}),
    ...          Task("depth", loss=abs, metrics={"abs": Metric(False), "rel": Metric(False)})]
    >>> single = {"seg": {"miou": 0.5}, "depth": {"abs": 0.4, "rel": 0.2}}
    >>> ours = {"seg": {"miou": 0.55}, "depth": {"abs": 0.4, "rel": 0.18}}
    >>> round(relative_improvement(ours, single, tasks), 6)
    7.5
    >>> round(relative_improvement(ours, single, tasks, "flat"), 6)
    -6.666667
    """
    if definition == "flat":
        tasks = _primaries(tasks)
        return -fmean(change for task in tasks for change in _changes(results, baseline, task))
    return fmean(relative_improvement_by_task(results, baseline, _primaries(tasks), definition).values())


def relative_improvement_by_task(
    results: Results, baseline: Results, tasks: Sequence[Task], definition: Definition = "mean-of-tasks"
) -> dict[str, float]:
    """Each task's own relative improvement in percent, auxiliary tasks included; higher is better.

    Of ``"flat"``, which pools metrics, this is the mean over the task's metrics as in ``"mean-of-tasks"``.
    """
    if definition not in ("mean-of-tasks", "one-metric", "flat"):
        raise ValueError(f"definition must be 'mean-of-tasks', 'one-metric' or 'flat', not {definition!r}")
    count = 1 if definition == "one-metric" else None
    return {task.name: fmean(_changes(results, baseline, task)[:count]) for task in check_tasks(tasks)}


def _primaries(tasks: Sequence[Task]) -> list[Task]:
    primaries = [task for task in check_tasks(tasks) if task.primary]
    if not primaries:
        raise ValueError(f"none of the tasks is primary: {_listed([task.name for task in tasks])}")
    return primaries


def _changes(results: Results, baseline: Results, task: Task) -> list[float]:
    """Improvement of each of the task's metrics in percent."""
    if not task.metrics:
        raise ValueError(f"task {task.name!r} has no metrics to compare")
    changes = []
    for name, metric in task.metrics.items():
        if metric.higher_is_better is None:
            raise ValueError(f"metric {name!r} of task {task.name!r} does not say whether higher is better")
        ours, single = (
            _value(where, source, task.name, name) for where, source in (("results", results), ("baseline", baseline))
        )
        if single == 0:
            raise ValueError(f"the baseline of metric {name!r} of task {task.name!r} is 0: no relative improvement")
        changes.append(100 * (ours - single) / abs(single) * (1 if metric.higher_is_better else -1))
    return changes


def _value(where: str, source: Results, task: str, metric: str) -> float:
    if task not in source:
        raise MissingKey(f"task {task!r} is not in the {where}, which have: {_listed(source)}")
    if metric not in source[task]:
        raise MissingKey(
            f"metric {metric!r} of task {task!r} is not in the {where}, which have: {_listed(source[task])}"
        )
    return float(source[task][metric])
