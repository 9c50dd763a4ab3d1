"""One task's headline metric, class by class of another task's labels: on which points does it gain?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sidetask_core import MissingKey, SplitModel, Task
from torch import Tensor

from sidetask_bench.evaluate import copies, evaluating
from sidetask_bench.schema import ExperimentError, limited, unknown

if TYPE_CHECKING:
    from sidetask_datasets import Dataset, Split


@dataclass(frozen=True)
class Breakdown:
    """By whose labels a task's metric is broken down; `edges` cut a continuous label, such as depth, into classes."""

    by: str
    edges: tuple[float, ...] = limited(())

    def __post_init__(self) -> None:
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"edges ascend, found {list(self.edges)}")

    def classes(self, dataset: Dataset, task: str) -> tuple[str, ...]:
        """The names of the classes.

        Raises:
            ExperimentError: if there is no such task, one is broken down by itself, or edges are missing or of no use.
        """
        names = [one.name for one in dataset.tasks]
        path = f"breakdown.{task}"
        if task not in names:
            raise unknown(task, names, "breakdown", "task")
        if self.by not in names or self.by == task:
            raise unknown(self.by, [name for name in names if name != task], f"{path}.by", "task")
        inputs = {one.name: one.input for one in dataset.tasks}
        if inputs[self.by] != inputs[task]:
            raise ExperimentError(f"{path}.by: task {self.by!r} does not label the inputs of task {task!r}")
        found = dataset.views[self.by].classes
        if found and self.edges:
            raise ExperimentError(f"{path}.edges: task {self.by!r} has classes already")
        if self.edges:
            middle = [f"{a:g} to {b:g}" for a, b in zip(self.edges, self.edges[1:], strict=False)]
            return (f"< {self.edges[0]:g}", *middle, f">= {self.edges[-1]:g}")
        if not found:
            raise ExperimentError(f"{path}.edges: missing; the labels of task {self.by!r} have no classes")
        return tuple(found)


def check(breakdowns: Mapping[str, Breakdown], dataset: Dataset) -> None:
    """Raise what `Breakdown.classes` would, before anything is trained."""
    for task, breakdown in breakdowns.items():
        breakdown.classes(dataset, task)


def by_class(
    model: SplitModel, dataset: Dataset, breakdowns: Mapping[str, Breakdown], split: Split, batch_size: int
) -> dict[str, dict[str, Any]]:
    """The headline metric of each task over the points of each class of another task's labels, over all of a split.

    Points without a class count nowhere, nor do those where a continuous label is NaN. A class without a labelled
    point has NaN.

    Returns:
        For each task, ``{"by": task, "classes": {class: value}}``.
    """
    tasks = {task.name: task for task in dataset.tasks}
    device = next(model.parameters()).device
    found = {}
    for name, breakdown in breakdowns.items():
        task, other = tasks[name], tasks[breakdown.by]
        classes = breakdown.classes(dataset, name)
        metrics = [next(iter(copies(task, device).values())) for _ in classes]
        seen = [False] * len(classes)
        with evaluating(model), torch.no_grad():
            for batch in split.batches(batch_size, shuffle=False, augment=False, drop_last=False):
                target, labels = batch.target_of(task), batch.target_of(other)
                if target is None or labels is None:
                    continue
                prediction = model(batch.input_of(task), tasks=[name])[name]
                place = _class_of(other, labels, breakdown.edges)
                guess, truth, place = _points(prediction, target, place)
                for c, metric in enumerate(metrics):
                    chosen = place == c
                    if chosen.any():
                        metric.update(guess[chosen], truth[chosen])
                        seen[c] = True
        values = [float(m.compute()) if any_ else math.nan for m, any_ in zip(metrics, seen, strict=True)]
        found[name] = {"by": breakdown.by, "classes": dict(zip(classes, values, strict=True))}
    return found


def _class_of(task: Task, labels: Tensor, edges: Sequence[float]) -> Tensor:
    """The class of every label, −1 where there is none."""
    if not isinstance(labels, Tensor):
        raise MissingKey(f"the labels of task {task.name!r} are no tensor, so that nothing can be broken down by them")
    place = labels.long()
    if edges:
        bins = torch.bucketize(labels.contiguous(), labels.new_tensor(edges), right=True)
        place = torch.where(labels.isnan(), -1, bins)
    return place if task.valid is None else torch.where(task.valid(labels), place, -1)


def _points(prediction: Tensor, target: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction ``[M, K]``, target ``[M]`` or ``[M, K']`` and class ``[M]``, a row for every point."""
    room = (prediction.shape[0], *prediction.shape[2:])
    if place.ndim == len(room) + 1 and place.shape[1] == 1:
        place = place.squeeze(1)
    place = place.reshape(place.shape + (1,) * (len(room) - place.ndim)).expand(room)
    rows = target.movedim(1, -1).flatten(0, -2) if target.ndim == prediction.ndim else target.flatten()
    return prediction.movedim(1, -1).flatten(0, -2), rows, place.flatten()
