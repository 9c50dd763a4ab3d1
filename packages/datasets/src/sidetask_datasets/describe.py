"""What is in a dataset, to be looked at before it is believed: how often each class, how far, how much unlabelled."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from sidetask_core import Task
from torch import Tensor

from sidetask_datasets.dataset import SPLITS, Dataset
from sidetask_datasets.split import Split
from sidetask_datasets.view import Pixels, View, gallery

UNLABELLED = "unlabelled"


def describe(dataset: Dataset, batch_size: int = 64) -> dict[str, dict[str, dict[str, float]]]:
    """For each task and split what all its labels are, not augmented.

    Of classes, the share of all pixels, or of all samples, that each has; these and the share "unlabelled" sum to 1.
    Of a distribution, the same by its likeliest class. Of numbers, the "least", "mean" and "greatest" labelled one, and
    the share "unlabelled"; of normals, the mean of "x", "y" and "z" instead.

    Args:
        dataset: any.
        batch_size: samples at a time.

    >>> from sidetask_datasets import digits
    >>> found = describe(digits(train=8, validation=2, test=2))
    >>> sum(found["top_left"]["train"].values())
    1.0
    """
    found: dict[str, dict[str, dict[str, float]]] = {task.name: {} for task in dataset.tasks}
    for name in SPLITS:
        split: Split = getattr(dataset, name)
        tallies = {task.name: _Tally(task, dataset.views[task.name]) for task in dataset.tasks}
        for batch in split.batches(batch_size, shuffle=False, augment=False, drop_last=False):
            for task in dataset.tasks:
                # A domain that has fewer samples than others runs out.
                if (target := batch.targets[task.target or task.name]) is not None:
                    tallies[task.name].add(target)
        for task in dataset.tasks:
            found[task.name][name] = tallies[task.name].shares()
    return found


def sheet(dataset: Dataset, samples: int = 3, gap: int = 4) -> Pixels:
    """Samples of every split, a row each: the input and every task's label, ``[H, W, 3]`` uint8.

    They lie evenly over each split: nobody picked them by how they look. Where tasks have inputs of their own, each
    label is beside its own.

    Args:
        dataset: any.
        samples: of each split, fewer where it has fewer.
        gap: pixels between pictures.

    Raises:
        ValueError: for fewer than 1 sample.
    """
    if samples < 1:
        raise ValueError(f"samples is at least 1, found {samples}")
    rows = []
    for name in SPLITS:
        split: Split = getattr(dataset, name)
        count = min(samples, len(split))
        for place in range(count):
            batch = split[(2 * place + 1) * len(split) // (2 * count)]
            row: list[Pixels] = []
            for task in dataset.tasks:
                target = batch.targets[task.target or task.name]
                if target is None:
                    continue
                if task.input is not None:
                    row.append(dataset.show_input(batch.input_of(task)[0]))
                elif not row:
                    row.append(dataset.show_input(batch.inputs[0]))
                row.append(dataset.views[task.name].image(target[0]))
            rows.append(row)
    return gallery(rows, gap=gap)


class _Tally:
    """What the labels of one task are, batch after batch."""

    def __init__(self, task: Task, view: View) -> None:
        self.task = task
        self.kind = view.kind
        self.names = ("no", "yes") if view.kind == "binary" else view.classes
        self.counts = torch.zeros(len(self.names) + 1, dtype=torch.int64)
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.ends = (float("inf"), float("-inf"))
        self.labelled = self.total = 0

    def add(self, target: Tensor) -> None:
        target = target.cpu()
        if self.kind in ("classes", "label", "binary"):
            self._count(target)
        elif self.kind == "distribution":
            self._count(torch.where((target != 0).any(dim=1), target.argmax(dim=1), -1))
        else:
            valid = self.task.valid
            mask = torch.ones_like(target, dtype=torch.bool) if valid is None else valid(target)
            self.total += mask.numel()
            self.labelled += int(mask.sum())
            if self.kind == "normals":
                self.sums += target.double().sum(dim=(0, 2, 3))
            elif bool(mask.any()):
                values = target[mask].double()
                self.sums[0] += values.sum()
                self.ends = min(self.ends[0], float(values.min())), max(self.ends[1], float(values.max()))

    def _count(self, ids: Tensor) -> None:
        self.counts += torch.bincount(ids.flatten().clamp(min=-1) + 1, minlength=len(self.counts))

    def shares(self) -> dict[str, float]:
        if self.names:
            shares = (self.counts / self.counts.sum().clamp(min=1)).tolist()
            return {**dict(zip(self.names, shares[1:], strict=True)), UNLABELLED: shares[0]}
        means = (self.sums / max(self.labelled, 1)).tolist()
        found: Mapping[str, float]
        if self.kind == "normals":
            found = dict(zip("xyz", means, strict=True))
        else:
            found = {"least": self.ends[0], "mean": means[0], "greatest": self.ends[1]}
        return {**found, UNLABELLED: 1.0 - self.labelled / max(self.total, 1)}
