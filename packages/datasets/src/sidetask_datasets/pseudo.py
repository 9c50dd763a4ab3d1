"""Pseudo tasks: what another model says of the images, as labels of an auxiliary task.

Labels of a task are a folder with a file for each split, ``train.npz``, ``validation.npz`` and ``test.npz``, in the
order of the samples. Each holds `labels`, and what its dimensions say is what they are:

======================== ============================================ ==================================================
`labels`                 what                                         in a batch, and the loss
======================== ============================================ ==================================================
uint8 ``[N, H, W]``      class ids per pixel, 255 unlabelled          int64, −1 unlabelled; cross-entropy
float ``[N, K]``         a distribution over K classes per image      float32 ``[n, K]``; cross-entropy with it
float ``[N, K, h, w]``   tokens: one per patch; h, w divide H, W      float32 ``[n, K, h, w]``; cross-entropy with it
======================== ============================================ ==================================================

Beside class ids, `classes` says how many there are. A distribution of zeros is unlabelled. `images`, if it is there, is
the checksum of the images that the labels are of.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy
import torch
from numpy.typing import NDArray
from sidetask_core import Task, plugins
from torch import Tensor

from sidetask_datasets import tasks
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import Dataset
from sidetask_datasets.files import DataError
from sidetask_datasets.split import Split
from sidetask_datasets.view import View

Kind = Literal["segmentation", "soft", "tokens"]
Teacher = Callable[[Tensor], Tensor]

SPLITS = ("train", "validation", "test")
_UNLABELLED = 255
# Sums of distributions in half precision.
_TOLERANCE = 0.02


def with_pseudo(dataset: Dataset, labels: Mapping[str, str | Path]) -> Dataset:
    """The dataset with one more auxiliary task for each folder of labels.

    Labels are checked as they are read, live on the device with the images, and follow their augmentation.

    Args:
        dataset: whose images they label.
        labels: name of the new task to its folder, see the module.

    Raises:
        DataError: beginning with the path of a file that is missing, damaged, of other images, or holds what is no
            label.
        ValueError: if the dataset has a task of that name, trains on new images in every epoch, or labels whole images
            where these label pixels or patches.
    """
    for name, folder in labels.items():
        dataset = _with_one(dataset, name, Path(folder))
    return dataset


def pseudo_label(
    dataset: Dataset,
    folder: str | Path,
    teacher: Teacher,
    *,
    kind: Kind = "segmentation",
    threshold: float = 0.5,
    batch_size: int = 32,
) -> Path:
    """Let a model label a dataset's images, once: splits whose file is there are not labelled again.

    Args:
        dataset: whose images are labelled, not augmented.
        folder: gets the files, each whole or not at all.
        teacher: gives probabilities for images ``[n, C, H, W]`` as the dataset has them: ``[n, K, H, W]`` for
            segmentation, ``[n, K]`` for soft labels, ``[n, K, h, w]`` for tokens.
        kind: "segmentation", "soft" or "tokens".
        threshold: of a segmentation: pixels whose best class has no higher probability are left unlabelled. 0.5
            (Li et al. 2024, arXiv 2412.19547).
        batch_size: images at a time.

    Returns:
        The folder.

    Raises:
        DataError: for a file that is there and does not fit, see `with_pseudo`.
        ValueError: for an unknown kind, or probabilities of another shape than the kind's.

    >>> from sidetask_datasets import digits
    >>> data = digits(train=8, validation=2, test=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pseudo_label(data, folder, lambda images: torch.full((len(images), 3), 1 / 3), kind="soft")
    ...     data = with_pseudo(data, {"guess": folder})
    >>> data.train[0].targets["guess"].shape, data.outputs["guess"], data.tasks[-1].primary
    (torch.Size([1, 3]), 3, False)
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is one of {', '.join(get_args(Kind))}, not {kind!r}")
    folder = Path(folder)
    for name in SPLITS:
        path, split = folder / f"{name}.npz", getattr(dataset, name)
        if path.exists():
            _read(path, split, dataset)
            continue
        batches = split.batches(batch_size, shuffle=False, augment=False, drop_last=False)
        with torch.no_grad():
            parts = [_checked(teacher(batch.inputs), batch.inputs, kind) for batch in batches]
        if kind == "segmentation":
            labels = torch.cat([thresholded(part, threshold) for part in parts])
        else:
            labels = torch.cat([part.to(torch.float16) for part in parts])
        _save(path, labels=labels.cpu().numpy(), classes=numpy.int64(parts[0].shape[1]), images=split.checksum())
    return folder


def thresholded(scores: Tensor, threshold: float = 0.5) -> Tensor:
    """Class ids ``[n, H, W]`` uint8 of probabilities ``[n, K, H, W]``, 255 where the best is not above the threshold.

    >>> thresholded(torch.tensor([[0.6, 0.5], [0.4, 0.5]]).view(1, 2, 1, 2)).tolist()
    [[[0, 255]]]
    """
    best, ids = scores.max(dim=1)
    return torch.where(best > threshold, ids, _UNLABELLED).to(torch.uint8)


def pseudo(of: str | Mapping[str, Any], labels: Mapping[str, str | Path]) -> Dataset:
    """Any installed dataset with pseudo tasks beside its own.

    Args:
        of: the dataset's name, or a mapping with ``name`` and its options.
        labels: name of each pseudo task to the folder of its labels.

    Raises:
        MissingKey: if there is no such dataset.
        ValueError: see `with_pseudo`, or whatever the dataset objects to.
    """
    options = {"name": of} if isinstance(of, str) else dict(of)
    if "name" not in options:
        raise ValueError("of: the dataset to add pseudo tasks to has no name")
    dataset: Dataset = plugins.find("datasets", options.pop("name"))(**options)
    return with_pseudo(dataset, labels)


def _with_one(dataset: Dataset, name: str, folder: Path) -> Dataset:
    if name in (task.name for task in dataset.tasks):
        raise ValueError(f"dataset {dataset.name!r} has a task {name!r} already")
    read = {split: _read(folder / f"{split}.npz", getattr(dataset, split), dataset) for split in SPLITS}
    column, classes = read["train"]
    for split, (other, count) in read.items():
        if (other.kind, count) != (column.kind, classes):
            raise DataError(
                f"{folder / f'{split}.npz'}: holds {other.kind} of {count} classes, "
                f"train.npz holds {column.kind} of {classes}"
            )
    splits = {split: getattr(dataset, split).with_targets({name: found}) for split, (found, _) in read.items()}
    names = tuple(f"class {index}" for index in range(classes))
    if column.kind == "classes":
        task: Task = tasks.segmentation(name, classes, primary=False)
        view = View("classes", classes=names)
    else:
        task = tasks.distribution(name)
        view = View("distribution", classes=names)
    return replace(
        dataset,
        tasks=(*dataset.tasks, task),
        outputs={**dataset.outputs, name: classes},
        views={**dataset.views, name: view},
        **splits,
    )


def _checked(scores: Tensor, images: Tensor, kind: Kind) -> Tensor:
    height, width = images.shape[-2:]
    n = len(images)
    wanted = {"segmentation": f"[{n}, K, {height}, {width}]", "soft": f"[{n}, K]", "tokens": f"[{n}, K, h, w]"}[kind]
    fits = scores.ndim == (2 if kind == "soft" else 4) and len(scores) == n
    if not fits or (kind == "segmentation" and scores.shape[-2:] != images.shape[-2:]):
        raise ValueError(f"a teacher of kind {kind!r} gives probabilities {wanted}, found {list(scores.shape)}")
    if kind == "segmentation" and scores.shape[1] > _UNLABELLED:
        raise ValueError(f"a segmentation has at most {_UNLABELLED} classes, found {scores.shape[1]}")
    return scores


def _save(path: Path, **arrays: Any) -> None:
    """Write a compressed archive under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            numpy.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path, split: Split, dataset: Dataset) -> tuple[Column, int]:
    """The labels of one split, checked, and the number of classes."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; labels are train.npz, validation.npz and test.npz")
    try:
        # Given a path, numpy leaves a damaged file open.
        with path.open("rb") as file, numpy.load(file, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as an archive of arrays: {error}") from error
    if "labels" not in found:
        raise DataError(f"{path}: holds no array 'labels'; there are: {', '.join(found) or 'none'}")
    if "images" in found and int(found["images"]) != split.checksum():
        raise DataError(f"{path}: its labels are of other images than those of {dataset.name!r}")
    labels = found["labels"]
    if len(labels.shape) == 0 or len(labels) != len(split):
        raise DataError(f"{path}: labels {list(labels.shape)} of a split of {len(split)} samples")
    height, width = dataset.input_shape[-2:]
    if labels.ndim in (2, 4) and labels.dtype.kind == "f":
        _check_distributions(path, labels)
        if labels.ndim == 4 and (height % labels.shape[2] or width % labels.shape[3]):
            raise DataError(
                f"{path}: {labels.shape[2]}×{labels.shape[3]} patches do not divide images of {height}×{width} pixels"
            )
        column = Column(torch.from_numpy(labels.astype(numpy.float16)), "soft" if labels.ndim == 2 else "tokens")
        classes = labels.shape[1]
    elif labels.ndim == 3 and labels.dtype == numpy.uint8:
        classes = _count_classes(path, found)
        if labels.shape[1:] != (height, width):
            raise DataError(f"{path}: labels of {labels.shape[1]}×{labels.shape[2]} pixels, images of {height}×{width}")
        column = Column(torch.from_numpy(labels), "classes")
    else:
        raise DataError(
            f"{path}: labels are uint8 [N, H, W], or floating [N, K] or [N, K, h, w]; "
            f"found {labels.dtype} {list(labels.shape)}"
        )
    if column.kind != "soft" and not dataset.dense:
        raise ValueError(f"{path}: dataset {dataset.name!r} labels whole images, and so may its pseudo tasks: [N, K]")
    return column.to(split.device), classes


def _count_classes(path: Path, found: Mapping[str, NDArray[Any]]) -> int:
    if "classes" not in found or found["classes"].dtype.kind not in "iu" or found["classes"].ndim:
        raise DataError(f"{path}: beside class ids, it needs 'classes', a whole number")
    classes, labels = int(found["classes"]), found["labels"]
    wrong = labels[(labels >= classes) & (labels != _UNLABELLED)]
    if wrong.size:
        raise DataError(f"{path}: class id {wrong[0]}; there are {classes} classes, and {_UNLABELLED} is unlabelled")
    return classes


def _check_distributions(path: Path, labels: NDArray[Any]) -> None:
    if not numpy.isfinite(labels).all() or (labels < 0).any():
        raise DataError(f"{path}: a distribution holds what is no probability")
    totals = labels.sum(axis=1, dtype=numpy.float64)
    wrong = totals[(totals != 0) & (numpy.abs(totals - 1) > _TOLERANCE)]
    if wrong.size:
        raise DataError(f"{path}: a distribution sums to {wrong[0]:.3g}, neither to 1 nor, unlabelled, to 0")
