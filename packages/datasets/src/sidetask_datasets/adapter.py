"""From files to a `Dataset`: what every adapter does once it knows its files and its tasks.

An adapter is a module with two functions: ``NAME_source(root, ...)`` finds the files and says how each is read, and the
factory ``NAME(root, tasks, ...)`` puts tasks to them. Everything between is here, so that all are cached, held out,
augmented and moved alike.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sidetask_core import Task

from sidetask_datasets import tasks as task_kinds
from sidetask_datasets.augment import Augmentation
from sidetask_datasets.cache import prepare
from sidetask_datasets.dataset import Dataset
from sidetask_datasets.files import DataError, DataErrors
from sidetask_datasets.noise import with_noise
from sidetask_datasets.source import Source
from sidetask_datasets.split import ResidentSplit
from sidetask_datasets.view import Colour, View

# For each of train, validation and test: which of a source's splits it is taken from, and which samples of that.
Parts = Mapping[str, tuple[str, slice]]
Folder = str | os.PathLike[str]
# Of the images of ImageNet, which pretrained encoders expect and which fit any photographs well enough.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Target:
    """A task with what a `Dataset` says about it.

    Args:
        task: its target is a field of the source.
        outputs: channels or logits of its head.
        view: how it is drawn.
    """

    task: Task
    outputs: int
    view: View


def dense_targets(
    names: Iterable[str],
    primary: Collection[str],
    *,
    classes: Mapping[str, Sequence[str]] | None = None,
    colours: Mapping[str, Sequence[Colour]] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    normals_loss: str = "cosine",
) -> list[Target]:
    """The tasks that dense datasets have under these names, see `tasks.dense`.

    Args:
        names: of the tasks.
        primary: those that count.
        classes: for each segmentation the names of its classes.
        colours: for each segmentation the colours of its classes; chosen if not given.
        limits: for each task of depth or disparity the values at the ends of its ramp.
        normals_loss: see `tasks.normals`.
    """
    targets = []
    for name in names:
        named = tuple((classes or {}).get(name, ()))
        task = task_kinds.dense(name, len(named), name in primary, normals_loss)
        if named:
            view = View("classes", classes=named, colours=tuple((colours or {}).get(name, ())))
        elif name in ("depth", "disparity"):
            view = View("scalar", limits=(limits or {}).get(name, (0.0, 1.0)))
        else:
            view = View("normals" if name == "normals" else "binary")
        targets.append(Target(task, len(named) or {"normals": 3}.get(name, 1), view))
    return targets


def find_source(factory: Callable[..., Dataset], root: Folder, options: Mapping[str, Any]) -> Source:
    """The files of an adapter's dataset, without reading more of them than it takes to find them.

    Args:
        factory: of the dataset. Beside it, in its module, is the function ``NAME_source``.
        root: of the files.
        options: of the dataset; those that say nothing of how files are read are left out.

    Raises:
        ValueError: if the dataset is not read from files, or for an option that it does not take.
        DataError: see the adapter.
    """
    find = getattr(sys.modules[factory.__module__], f"{factory.__name__}_source", None)
    if find is None:
        raise ValueError(f"dataset {factory.__name__!r} decodes no files, so there is nothing to prepare")
    takes = [name for name in inspect.signature(factory).parameters if name != "root"]
    for name in options:
        if name not in takes:
            raise ValueError(f"dataset {factory.__name__!r} has no option {name!r}; there are: {', '.join(takes)}")
    needs = inspect.signature(find).parameters
    found: Source = find(root, **{name: value for name, value in options.items() if name in needs})
    return found


def hold_out(source: Source, count: int, pool: str = "train") -> Parts:
    """Validation is the last `count` samples of a source's split, training the others, test its split "test".

    Raises:
        DataErrors: what is wrong with the tree.
        DataError: if nothing is left to train on.
    """
    if source.problems:
        raise DataErrors(source.problems)
    there = len(source.splits[pool])
    if there <= count:
        raise DataError(f"{source.root}: with {there} samples, {count} for validation leave none to train on")
    return {
        "train": (pool, slice(0, there - count)),
        "validation": (pool, slice(there - count, there)),
        "test": ("test", slice(None)),
    }


def read_splits(
    source: Source,
    parts: Parts | None = None,
    *,
    inputs: str = "image",
    augmentation: Augmentation | None = None,
    cache: Folder | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, ResidentSplit]:
    """The source's samples, decoded through the cache; on the CPU mapped from it, and not copied.

    Args:
        source: the files.
        parts: the splits wanted; None: those of the source.
        inputs: the field that is the input; all others are targets.
        augmentation: of "train", and of no other.
        cache: where caches are kept, see `cache.cache_folder`.
        device: where the samples live.

    Raises:
        DataErrors: see `cache.prepare`.
        DataError: naming an empty split.
    """
    if parts is None:
        parts = {name: (name, slice(None)) for name in source.splits}
    if source.problems:
        raise DataErrors(source.problems)
    for name, (pool, rows) in parts.items():
        if not source.splits[pool][rows]:
            raise DataError(f"{source.root}: the split {name!r} is empty")
    arrays = prepare(source, cache).arrays
    splits = {}
    for name, (pool, rows) in parts.items():
        columns = {key: field.column(arrays[pool][key][rows]) for key, field in source.fields.items()}
        image = columns.pop(inputs)
        splits[name] = ResidentSplit(image, columns, augmentation if name == "train" else None).resident(device)
    return splits


def read_dataset(
    source: Source,
    targets: Sequence[Target],
    parts: Parts | None = None,
    *,
    dense: bool = True,
    augmentation: Augmentation | None = None,
    noise: bool = False,
    seed: int = 0,
    cache: Folder | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """The dataset that an adapter gives: the source's field "image" is the input.

    Args:
        source: the files.
        targets: the tasks; the source's other fields are their targets.
        parts: train, validation and test; None: the source's splits of these names. See `hold_out`.
        dense: whether tasks label pixels.
        augmentation: of the training split.
        noise: add the task "noise", see `with_noise`.
        seed: of the noise.
        cache: where caches are kept, see `cache.cache_folder`.
        device: where batches appear, see `Dataset.to`.

    Raises:
        DataErrors: see `cache.prepare`.
        DataError: naming an empty split.
    """
    image = source.fields["image"]
    splits = read_splits(source, parts, augmentation=augmentation, cache=cache)
    data = Dataset(
        name=source.name,
        tasks=tuple(target.task for target in targets),
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        outputs={target.task.name: target.outputs for target in targets},
        views={target.task.name: target.view for target in targets},
        input_view=View("image", mean=tuple(image.mean), std=tuple(image.std)),
        dense=dense,
    )
    return (with_noise(data, seed) if noise else data).to(device)
