"""Pictures of what the trained networks of a comparison see: input, truth and every row's prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from sidetask_core import Batch, Task
from sidetask_datasets import Dataset, View
from torch import Tensor

from sidetask_bench import drawing
from sidetask_bench.records import Comparison
from sidetask_bench.run import load_run

Pixels = npt.NDArray[np.uint8]

# Larger pictures are thinned to at most this side: a report of megabytes serves nobody.
_SIDE = 256
_DPI = 150

MARKS = {"right": "✓", "wrong": "✗"}


@dataclass(frozen=True)
class Picture:
    """One picture with what is written under it; `note` says of a label whether it is "right" or "wrong".

    `row` is the index of the row that predicts it, None for inputs and truths.
    """

    caption: str
    pixels: Pixels
    note: str = ""
    row: int | None = None


@dataclass(frozen=True)
class Strip:
    """One task of one sample: input, truth, then the prediction of every row; `kind` is that of the task's view."""

    task: str
    sample: int
    pictures: list[Picture]
    kind: str = "image"


@dataclass(frozen=True)
class Legend:
    """How to read the pictures of a task: in words, by the colours of classes, by a ramp between two values."""

    words: str
    classes: list[tuple[str, str]] = field(default_factory=list)
    ramp: Pixels | None = None
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Gallery:
    """Strips, task by task, and a legend per task."""

    strips: list[Strip]
    legends: dict[str, Legend]


def collect(comparison: Comparison, samples: int | None = None) -> Gallery:
    """Predict some test samples with the chosen network of every row's first seed.

    The samples lie evenly over the test split: nobody picked them by how they look.

    Args:
        comparison: whose runs are still in its folder.
        samples: how many; None for 3 where pixels are labelled and 8 where images are.

    Raises:
        ExperimentError: if a run has no trained network, or its data cannot be built.
    """
    dataset: Dataset | None = None
    strips: dict[tuple[int, str], Strip] = {}
    legends: dict[str, Legend] = {}
    for place, row in enumerate(comparison.rows):
        _, dataset, model = load_run(comparison.folder / row.runs[0]["folder"], dataset)
        indices = _even(len(dataset.test), samples or (3 if dataset.dense else 8))
        for index in indices:
            batch = dataset.test[index]
            for task in dataset.tasks:
                # Not trained here, or of a domain that has fewer samples.
                if task.name not in model.heads or batch.input_of(task) is None:
                    continue
                if (index, task.name) not in strips:
                    strips[index, task.name] = _start(dataset, task, batch, index)
                with torch.no_grad():
                    prediction = model(batch.input_of(task), tasks=[task.name])[task.name][0]
                predicted = _predicted(dataset, task, batch, prediction, row.name)
                strips[index, task.name].pictures.append(replace(predicted, row=place))
        for task in dataset.tasks:
            legends.setdefault(task.name, _legend(task, dataset.views[task.name], _truths(dataset, task, indices)))
    tasks = list(legends)
    return Gallery(sorted(strips.values(), key=lambda strip: (tasks.index(strip.task), strip.sample)), legends)


def png(gallery: Gallery, path: Path) -> Path:
    """All strips in one picture, a strip per line."""
    columns = max(len(strip.pictures) for strip in gallery.strips)
    height, width = np.mean([strip.pictures[0].pixels.shape[:2] for strip in gallery.strips], axis=0)
    titles = [[_title(picture) for picture in strip.pictures] for strip in gallery.strips]
    longest = max(len(title) for line in titles for title in line)
    labels = all(strip.kind == "label" for strip in gallery.strips)
    # In inches; letters are about 0.06 wide.
    cell = max(0.8 if labels else 1.5, 0.06 * longest + 0.1)
    line = cell * height / width + 0.28
    size = (cell * columns + 0.5, line * len(gallery.strips))
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white")
    # One axes, in inches from the top left: a layout of one for each picture takes minutes where tasks are many.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    ink: dict[str, Any] = {"color": "#1b1f24", "va": "center"}
    for number, (strip, captions) in enumerate(zip(gallery.strips, titles, strict=True)):
        top = number * line + 0.23
        name = strip.task.replace("$", r"\$")
        axes.text(0.25, top + (line - 0.28) / 2, name, rotation=90, ha="center", fontsize=8, fontweight="bold", **ink)
        for column, (picture, caption) in enumerate(zip(strip.pictures, captions, strict=True)):
            rows, across = picture.pixels.shape[:2]
            scale = min((cell - 0.06) / across, (line - 0.28) / rows)
            middle, wide = 0.45 + cell * (column + 0.5), scale * across / 2
            place = (middle - wide, middle + wide, top + scale * rows, top)
            axes.imshow(picture.pixels, interpolation="nearest", extent=place, aspect="auto")
            axes.text(middle, top - 0.11, caption.replace("$", r"\$"), ha="center", fontsize=7.5, **ink)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    return drawing.save(figure, path)


def _title(picture: Picture) -> str:
    return f"{picture.caption} {MARKS.get(picture.note, '')}".strip()


def _start(dataset: Dataset, task: Task, batch: Batch, index: int) -> Strip:
    pictures = [Picture("input", _thinned(dataset.show_input(batch.input_of(task)[0])))]
    target = batch.target_of(task)
    if target is not None:
        pictures.append(Picture("truth", _thinned(dataset.views[task.name].image(target[0]))))
    return Strip(task.name, index, pictures, dataset.views[task.name].kind)


def _predicted(dataset: Dataset, task: Task, batch: Batch, prediction: Tensor, row: str) -> Picture:
    view = dataset.views[task.name]
    note = ""
    target = batch.target_of(task)
    if view.kind == "label" and target is not None and int(target[0]) >= 0:
        note = "right" if int(prediction.argmax()) == int(target[0]) else "wrong"
    return Picture(row, _thinned(view.image(prediction)), note)


def _truths(dataset: Dataset, task: Task, indices: Sequence[int]) -> list[Tensor]:
    targets = [dataset.test[index].target_of(task) for index in indices]
    return [target[0] for target in targets if target is not None]


def _legend(task: Task, view: View, truths: Sequence[Tensor]) -> Legend:
    match view.kind:
        case "classes":
            present = sorted({int(label) for truth in truths for label in truth.unique()} - {-1})
            colours = [(view.classes[label], "#{:02x}{:02x}{:02x}".format(*view.colours[label])) for label in present]
            return Legend("Classes in the truths shown; black has no label.", colours)
        case "scalar":
            low, high = view.limits
            # Zero itself means unlabelled and is drawn black.
            steps = torch.linspace(low, high, 64).clamp(min=1e-6 * max(abs(low), abs(high)))
            unit = "Metres" if task.name == "depth" else "In the unit of the labels"
            return Legend(f"{unit}; black has no label.", ramp=view.image(steps.view(1, 1, -1)), limits=view.limits)
        case "normals":
            return Legend("Red faces right, green up, blue the camera; black has no label.")
        case "distribution":
            return Legend("The likeliest class; black has no label.")
        case "binary":
            return Legend("White is what is sought; a prediction is as bright as its probability.")
        case "vector":
            low, high = view.limits
            return Legend(f"A bar for each number, from {low:g} to {high:g}; up is above zero.")
        case _:
            return Legend("The class, as the network names it.")


def _even(length: int, count: int) -> list[int]:
    """Up to `count` indices spread evenly over `length`.

    >>> _even(100, 3), _even(2, 3)
    ([16, 50, 83], [0, 1])
    """
    count = min(count, length)
    return [int((index + 0.5) * length / count) for index in range(count)]


def _thinned(pixels: Pixels) -> Pixels:
    step = math.ceil(max(pixels.shape[:2]) / _SIDE)
    return pixels[::step, ::step]
