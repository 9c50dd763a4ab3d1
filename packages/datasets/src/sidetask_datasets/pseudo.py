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

Beside class ids, `classes` says how many there are, 1 to 255. A distribution of zeros is unlabelled. Where tasks have
inputs of their own, and nowhere else, `domain` says whose images the labels are of. `images`, if it is there, is the
checksum of these images. `made`, if it is there, says how `pseudo_label` made the labels.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy
import torch
from numpy.typing import NDArray
from sidetask_core import Task, plugins
from torch import Tensor, nn

from sidetask_datasets import tasks
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import SPLITS, Dataset, choose
from sidetask_datasets.files import DataError, is_file
from sidetask_datasets.joined import alone, beside, domains_of
from sidetask_datasets.split import Split
from sidetask_datasets.view import View

Kind = Literal["segmentation", "soft", "tokens"]
Teacher = Callable[[Tensor], Tensor]
_Arrays = Mapping[str, NDArray[Any]]

_UNLABELLED = 255
# Of sums of distributions in half precision.
_TOLERANCE = 0.02


def with_pseudo(dataset: Dataset, labels: Mapping[str, str | Path]) -> Dataset:
    """The dataset with one more auxiliary task for each folder of labels.

    Labels are checked as they are read, live on the device with the images, and follow their augmentation. Where tasks
    have inputs of their own, the input of the new one is the domain that its files name.

    Args:
        dataset: whose images they label.
        labels: name of the new task to its folder, see the module.

    Raises:
        DataError: beginning with the path of a file that is missing, damaged, of other images or another domain, or
            holds what is no label.
        TypeError: if `labels` is no mapping of names to folders.
        ValueError: if the dataset has a task of that name, trains on new images in every epoch, or labels whole images
            where these label pixels or patches.
    """
    _check_folders(labels)
    for name, folder in labels.items():
        dataset = _with_one(dataset, name, Path(folder))
    return dataset


def pseudo_label(
    dataset: Dataset,
    folder: str | Path,
    teacher: Teacher,
    *,
    domain: str | None = None,
    kind: Kind = "segmentation",
    threshold: float = 0.5,
    source: str | None = None,
    batch_size: int = 32,
) -> Path:
    """Let a model label a dataset's images, once: splits whose file is there are not labelled again.

    A file says how it was made, and one that was made otherwise is refused.

    Args:
        dataset: whose images are labelled, not augmented.
        folder: gets the files, each whole or not at all.
        teacher: gives probabilities for images ``[n, C, H, W]`` as the dataset has them: ``[n, K, H, W]`` for
            segmentation, ``[n, K]`` for soft labels, ``[n, K, h, w]`` for tokens, where h and w divide H and W. Zeros
            for all classes leave an image, pixel or patch unlabelled. A module labels in evaluation mode.
        domain: whose images are labelled, where tasks have inputs of their own; None where they share one.
        kind: "segmentation", "soft" or "tokens".
        threshold: of a segmentation: pixels whose best class has no higher probability are left unlabelled. 0.5
            (Li et al. 2024, arXiv 2412.19547).
        source: tells teachers apart. The `fingerprint` of a module, and of another function nothing, if None.
        batch_size: images at a time.

    Returns:
        The folder.

    Raises:
        DataError: for a file that is there and does not fit, see `with_pseudo`, or was made otherwise.
        ValueError: for an unknown kind or domain; a threshold that is not in [0, 1); pixels or patches of a dataset
            that labels whole images; what are no probabilities, or of another shape than the kind's; or numbers of
            classes that differ.

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
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1:
        raise ValueError(f"threshold is a probability, at least 0 and below 1, not {threshold!r}")
    if kind != "soft" and not dataset.dense:
        raise ValueError(f"dataset {dataset.name!r} labels whole images, and so may its pseudo tasks: kind 'soft'")
    if domains := domains_of(dataset):
        dataset = alone(dataset, *choose("domain", () if domain is None else domain, domains))
    elif domain is not None:
        raise ValueError(f"dataset {dataset.name!r} has no domain {domain!r}: all tasks share one input")
    if source is None:
        source = fingerprint(teacher) if isinstance(teacher, nn.Module) else ""
    folder = Path(folder)
    made = f"{kind} above {float(threshold)}" if kind == "segmentation" else kind
    made += f" of {source}" if source else ""
    classes = 0
    for name in SPLITS:
        path, split = folder / f"{name}.npz", getattr(dataset, name)
        if is_file(path):
            found = _load(path)
            if (other := _domain(path, found, dataset.name, domains)) != domain:
                raise DataError(
                    f"{path}: holds labels of {other!r}, not of {domain!r}; "
                    "label into another folder, or remove the file"
                )
            _, classes = _read(path, found, split, dataset, made)
            continue
        parts = []
        with _labelling(teacher):
            for batch in split.batches(batch_size, shuffle=False, augment=False, drop_last=False):
                scores = _checked(teacher(batch.inputs), batch.inputs, kind)
                if scores.shape[1] != (classes := classes or scores.shape[1]):
                    raise ValueError(f"a teacher has one number of classes, found {classes} and then {scores.shape[1]}")
                # At once, since all probabilities of a split would fill the memory.
                parts.append(thresholded(scores, threshold) if kind == "segmentation" else scores.to(torch.float16))
        labels = torch.cat(parts).cpu().numpy()
        said = {"made": made} if domain is None else {"made": made, "domain": domain}
        _save(path, labels=labels, classes=numpy.int64(classes), images=split.checksum(), **said)
    return folder


def fingerprint(module: nn.Module) -> str:
    """A checksum of a module's kind, parameters and buffers, the same wherever they are loaded.

    >>> fingerprint(nn.Identity())
    'Identity 00000000'
    """
    found = 0
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            found = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), found)
            found = zlib.crc32(flat.tobytes(), found)
    return f"{type(module).__name__} {found:08x}"


@contextlib.contextmanager
def _labelling(teacher: Teacher) -> Iterator[None]:
    """Without gradient, and a module in evaluation mode, every part of which then gets its own mode back."""
    modes = {module: module.training for module in teacher.modules()} if isinstance(teacher, nn.Module) else {}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


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
        TypeError: if `of` or `labels` is something else.
        ValueError: see `with_pseudo`, or whatever the dataset objects to.
    """
    if not isinstance(of, str | Mapping):
        raise TypeError(f"of: a dataset's name, or a mapping with its name and options, found {of!r}")
    options = {"name": of} if isinstance(of, str) else dict(of)
    if "name" not in options:
        raise ValueError("of: the dataset to add pseudo tasks to has no name")
    _check_folders(labels)
    dataset: Dataset = plugins.find("datasets", options.pop("name"))(**options)
    return with_pseudo(dataset, labels)


def _check_folders(labels: object) -> None:
    fits = isinstance(labels, Mapping) and all(
        isinstance(name, str) and isinstance(folder, str | Path) for name, folder in labels.items()
    )
    if not fits:
        raise TypeError(f"labels: a mapping of pseudo tasks' names to the folders of their labels, found {labels!r}")


def _with_one(dataset: Dataset, name: str, folder: Path) -> Dataset:
    if name in (task.name for task in dataset.tasks):
        raise ValueError(f"dataset {dataset.name!r} has a task {name!r} already")
    found = {folder / f"{split}.npz": _load(folder / f"{split}.npz") for split in SPLITS}
    domains = [_domain(path, arrays, dataset.name, domains_of(dataset)) for path, arrays in found.items()]
    for path, domain in zip(found, domains, strict=True):
        if domain != domains[0]:
            raise DataError(f"{path}: holds labels of {domain!r}, train.npz holds labels of {domains[0]!r}")
    if domains[0] is None:
        return _with_arrays(dataset, name, found)
    return beside(dataset, domains[0], _with_arrays(alone(dataset, domains[0]), name, found))


def _with_arrays(dataset: Dataset, name: str, found: Mapping[Path, _Arrays]) -> Dataset:
    """The dataset, whose tasks share their input, with the task that the files of the three splits make."""
    read = {
        split: _read(path, arrays, getattr(dataset, split), dataset)
        for split, (path, arrays) in zip(SPLITS, found.items(), strict=True)
    }
    column, classes = read["train"]
    for path, (other, count) in zip(found, read.values(), strict=True):
        if (other.kind, count) != (column.kind, classes):
            raise DataError(
                f"{path}: holds {other.kind} of {count} classes, train.npz holds {column.kind} of {classes}"
            )
    splits = {split: getattr(dataset, split).with_targets({name: own}) for split, (own, _) in read.items()}
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


def _checked(scores: object, images: Tensor, kind: Kind) -> Tensor:
    """Probabilities of the kind's shape."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"a teacher gives a floating tensor of probabilities, found {found}")
    height, width = images.shape[-2:]
    n = len(images)
    wanted = {"segmentation": f"[{n}, K, {height}, {width}]", "soft": f"[{n}, K]", "tokens": f"[{n}, K, h, w]"}[kind]
    fits = scores.ndim == (2 if kind == "soft" else 4) and len(scores) == n
    if not fits or (kind == "segmentation" and scores.shape[-2:] != images.shape[-2:]):
        raise ValueError(f"a teacher of kind {kind!r} gives probabilities {wanted}, found {list(scores.shape)}")
    if kind == "tokens" and (not scores.numel() or height % scores.shape[2] or width % scores.shape[3]):
        raise ValueError(
            f"a teacher of kind 'tokens' gives patches that divide images of {height}×{width} pixels, "
            f"found {scores.shape[2]}×{scores.shape[3]} patches"
        )
    most = _UNLABELLED if kind == "segmentation" else scores.shape[1]
    if not 1 <= scores.shape[1] <= most:
        raise ValueError(f"a teacher of kind {kind!r} has classes, at most {_UNLABELLED}, found {scores.shape[1]}")
    totals = scores.sum(dim=1, dtype=torch.float64)
    wrong = totals[(totals != 0) & ~((totals - 1).abs() <= _TOLERANCE)]
    # NaN and infinity fail the sum; a negative one may hide in it.
    if len(wrong) or (scores < 0).any():
        what = f"a sum of {wrong[0].item():.3g}" if len(wrong) else f"{scores.min().item():.3g}"
        raise ValueError(f"a teacher gives probabilities, at least 0, with sum 1 over the classes; found {what}")
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


def _load(path: Path) -> dict[str, NDArray[Any]]:
    """What a file of labels holds."""
    if not is_file(path):
        names = "train.npz, validation.npz and test.npz"
        raise DataError(f"{path}: no such file; labels are {names}, as sidetask label writes them")
    try:
        # Given a path, numpy leaves a damaged file open.
        with path.open("rb") as file:
            archive = numpy.load(file, allow_pickle=False)
            if not isinstance(archive, numpy.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            with archive:
                found = {name: archive[name] for name in archive.files}
    # A damaged archive fails wherever its bytes lead: zlib, encryption, other versions of the format, syntax, memory.
    except Exception as error:
        raise DataError(f"{path}: cannot be read as an archive of arrays: {error}") from error
    return found


def _domain(path: Path, found: _Arrays, name: str, domains: Sequence[str]) -> str | None:
    """Whose images a file's labels are of: one of the domains of the dataset `name`, None if it has none."""
    if "domain" not in found:
        if domains:
            raise DataError(f"{path}: does not say in 'domain' whose images its labels are of: {', '.join(domains)}")
        return None
    domain = _text(found, "domain")
    if domain not in domains:
        there = f"has the domains {', '.join(domains)}" if domains else "has no domains: all tasks share one input"
        raise DataError(f"{path}: holds labels of {domain!r}; {name!r} {there}")
    return domain


def _read(path: Path, found: _Arrays, split: Split, dataset: Dataset, made: str | None = None) -> tuple[Column, int]:
    """The labels of one split, checked, and the number of classes; refused if they were not `made` that way."""
    if "labels" not in found:
        raise DataError(f"{path}: holds no array 'labels'; there are: {', '.join(found) or 'none'}")
    if "images" in found and _whole(path, found, "images") != split.checksum():
        raise DataError(f"{path}: its labels are of other images than those of {dataset.name!r}")
    if made is not None and (before := _text(found, "made") or "labels made elsewhere") != made:
        raise DataError(f"{path}: holds {before}, not {made}; label into another folder, or remove the file")
    labels = found["labels"]
    if len(labels.shape) == 0 or len(labels) != len(split):
        raise DataError(f"{path}: labels {list(labels.shape)} of a split of {len(split)} samples")
    if not labels.size:
        raise DataError(f"{path}: labels {list(labels.shape)} are empty")
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


def _whole(path: Path, found: _Arrays, name: str) -> int:
    if found[name].dtype.kind not in "iu" or found[name].ndim:
        raise DataError(f"{path}: {name!r} is a whole number, found {found[name].dtype} {list(found[name].shape)}")
    return int(found[name])


def _text(found: _Arrays, name: str) -> str:
    """The text of that name; empty if there is none."""
    text = found.get(name)
    return "" if text is None or text.dtype.kind != "U" or text.ndim else str(text)


def _count_classes(path: Path, found: _Arrays) -> int:
    if "classes" not in found:
        raise DataError(f"{path}: beside class ids, it needs 'classes', a whole number")
    classes, labels = _whole(path, found, "classes"), found["labels"]
    if not 1 <= classes <= _UNLABELLED:
        raise DataError(f"{path}: 'classes' is at least 1 and at most {_UNLABELLED}, found {classes}")
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
