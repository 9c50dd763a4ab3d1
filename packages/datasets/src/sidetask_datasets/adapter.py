"""From files to a `Dataset`: what every adapter does once it knows its files and its tasks.

An adapter is a module with two functions: ``NAME_source(root, ...)`` finds the files and says how each is read, and the
factory ``NAME(root, tasks, ...)`` puts tasks to them. Everything between is here, so that all are cached, held out,
augmented and moved alike.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sidetask_core import Task

from sidetask_datasets import tasks as task_kinds
from sidetask_datasets.augment import Augmentation
from sidetask_datasets.cache import prepare
from sidetask_datasets.dataset import Dataset, check_counts, check_seed, check_switches, choose_primary
from sidetask_datasets.files import DataError, DataErrors
from sidetask_datasets.noise import with_noise
from sidetask_datasets.source import Source
from sidetask_datasets.stored import ResidentSplit
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
        raise ValueError("it decodes no files, so there is nothing to prepare")
    takes = [name for name in inspect.signature(factory).parameters if name != "root"]
    for name in options:
        if name not in takes:
            raise ValueError(f"it has no option {name!r}; there are: {', '.join(takes)}")
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
    """
    if parts is None:
        parts = {name: (name, slice(None)) for name in source.splits}
    if source.problems:
        raise DataErrors(source.problems)
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
    cache: Folder | None = None,
) -> Dataset:
    """The dataset that an adapter gives, mapped from the cache: the source's field "image" is the input.

    Args:
        source: the files.
        targets: the tasks; the source's other fields are their targets.
        parts: train, validation and test; None: the source's splits of these names. See `hold_out`.
        dense: whether tasks label pixels.
        augmentation: of the training split.
        cache: where caches are kept, see `cache.cache_folder`.

    Raises:
        DataErrors: see `cache.prepare`.
    """
    image = source.fields["image"]
    splits = read_splits(source, parts, augmentation=augmentation, cache=cache)
    return Dataset(
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


def read_dense(
    find: Callable[[], Source],
    *,
    classes: Mapping[str, Sequence[str]] | None = None,
    colours: Mapping[str, Sequence[Colour]] | None = None,
    normals_loss: str = "cosine",
    validation: int | None = None,
    primary: Iterable[str] | None = None,
    seed: int = 0,
    noise: bool = False,
    cache: Folder | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """The dataset of an adapter whose tasks label pixels, one for each field of its source beside the image.

    Training images are scaled, cropped and flipped.

    Args:
        find: finds the source; called after the options have been checked.
        classes: for each segmentation the names of its classes.
        colours: for each segmentation the colours of its classes; chosen if not given.
        normals_loss: "cosine", "l1" or "elements", see `losses`.
        validation: so many samples, the last of the source's split "train", are held out for model selection; None: the
            source has a split "validation".
        primary: the tasks that count; None for all.
        seed: of `noise`, and of whatever the adapter says.
        noise: add an auxiliary task "noise", see `with_noise`.
        cache: where decoded samples are kept, see `cache.cache_folder`.
        device: where the samples live, see `Dataset.to`.

    Raises:
        DataErrors: see `cache.prepare`.
        DataError: if nothing is left to train on.
        ValueError: for an unknown task or loss, or a switch that is neither true nor false.
    """
    if validation is not None:
        check_counts(validation=validation)
    check_seed(seed)
    check_switches(noise=noise)
    task_kinds.normals(loss=normals_loss)  # whether there is such a loss
    source = find()
    fields = {name: field for name, field in source.fields.items() if name != "image"}
    wanted = choose_primary(primary, list(fields))
    targets = []
    for name, field in fields.items():
        named = tuple((classes or {}).get(name, ()))
        if field.kind == "disparity":
            task = task_kinds.disparity(name, name in wanted)
        else:
            task = task_kinds.dense(name, len(named), name in wanted, normals_loss)
        if named:
            view = View("classes", classes=named, colours=tuple((colours or {}).get(name, ())))
        elif field.kind in ("depth", "disparity"):
            view = View("scalar", limits=field.limits)
        else:
            view = View("normals" if field.kind == "normals" else "binary")
        targets.append(Target(task, len(named) or (3 if field.kind == "normals" else 1), view))
    parts = None if validation is None else hold_out(source, validation)
    data = read_dataset(source, targets, parts, augmentation=Augmentation(), cache=cache)
    return (with_noise(data, seed) if noise else data).to(device)
