"""Evaluation over a whole split, and the score by which an epoch is chosen."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sidetask_core import SplitModel, Task
from torch import nn

if TYPE_CHECKING:
    from sidetask_datasets import Split

Results = dict[str, dict[str, float]]


def evaluate(model: SplitModel, tasks: Sequence[Task], split: Split, batch_size: int) -> Results:
    """Every metric of every task over all of a split, by task and metric.

    Metrics see all batches before they are computed once, so that no value depends on the batch size. They are
    copies of the tasks'. The model is put in evaluation mode and left as it was; the last incomplete batch counts.

    Args:
        model: has a head for each task.
        tasks: what to judge; their metrics.
        split: unaugmented and in order.
        batch_size: samples at a time.
    """
    device = next(model.parameters()).device
    metrics = {task.name: copies(task, device) for task in tasks}
    with evaluating(model), torch.no_grad():
        for batch in split.batches(batch_size, shuffle=False, augment=False, drop_last=False):
            inputs: dict[int, tuple[Any, list[Task]]] = {}
            for task in tasks:
                value = batch.input_of(task)
                # A domain that is shorter than others is not in the last batches.
                if value is not None:
                    inputs.setdefault(id(value), (value, []))[1].append(task)
            for value, members in inputs.values():
                predictions = model(value, tasks=[task.name for task in members])
                for task in members:
                    target = batch.target_of(task)
                    if target is not None:
                        for metric in metrics[task.name].values():
                            metric.update(predictions[task.name], target)
    return {name: {key: float(metric.compute()) for key, metric in group.items()} for name, group in metrics.items()}


def mean_results(results: Sequence[Results]) -> Results:
    """The mean of every metric over several evaluations; NaN where one is.

    >>> mean_results([{"depth": {"absolute": 0.5}}, {"depth": {"absolute": 0.7}}])
    {'depth': {'absolute': 0.6}}
    """
    return {
        task: {name: math.fsum(one[task][name] for one in results) / len(results) for name in metrics}
        for task, metrics in results[0].items()
    }


def score(results: Mapping[str, Mapping[str, float]], tasks: Sequence[Task]) -> float:
    """How good an epoch's validation is, for choosing one: higher is better.

    The mean over primary tasks of the logarithm of the headline (first) metric, negated where lower is better. The
    difference between two epochs is, to first order, the mean relative improvement of one over the other, and it
    does not depend on any baseline: selection needs no single-task results, and tasks of any scale count alike.
    Values at or below zero count as ``1e-6``. NaN (nothing labelled) makes the epoch the worst.

    >>> from types import SimpleNamespace
    >>> up, down = SimpleNamespace(higher_is_better=True), SimpleNamespace(higher_is_better=False)
    >>> tasks = [Task("a", loss=abs, metrics={"accuracy": up}), Task("b", loss=abs, metrics={"error": down})]
    >>> before = score({"a": {"accuracy": 0.5}, "b": {"error": 2.0}}, tasks)
    >>> after = score({"a": {"accuracy": 0.55}, "b": {"error": 1.8}}, tasks)
    >>> round(after - before, 3)
    0.1
    """
    logarithms = [task_score(results, task) for task in tasks if task.primary and task.metrics]
    return sum(logarithms) / len(logarithms) if logarithms else -math.inf


def task_score(results: Mapping[str, Mapping[str, float]], task: Task) -> float:
    """One task's part of `score`, primary or not; without a metric, minus infinity."""
    if not task.metrics:
        return -math.inf
    name, metric = next(iter(task.metrics.items()))
    value = results[task.name][name]
    if math.isnan(value):
        return -math.inf
    return math.log(max(value, 1e-6)) * (1 if metric.higher_is_better else -1)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own mode again (a frozen BatchNorm stays frozen)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def copies(task: Task, device: torch.device) -> dict[str, Any]:
    """A task's metrics, empty and on `device`; its own stay as they are."""
    found = {}
    for name, metric in task.metrics.items():
        clone: Any = copy.deepcopy(metric)
        clone.reset()
        # One process judges the whole split; torchmetrics would wait for the others to join in.
        clone.distributed_available_fn = lambda: False
        found[name] = clone.to(device) if hasattr(clone, "to") else clone
    return found
