"""NYU Depth v2 (Silberman et al. 2012), in whichever of three layouts it lies on the disk.

MTAN's preprocessed arrays, 288×384::

    root/train/image/0.npy ...     [H, W, 3] in [0, 1]
    root/train/label/0.npy ...     [H, W], 13 classes, -1 unlabelled
    root/train/depth/0.npy ...     [H, W, 1] metres, 0 unlabelled
    root/train/normal/0.npy ...    [H, W, 3] unit vectors, 0 unlabelled
    root/val/...                   or root/test

The official file with the official split, 480×640; normals are not in it::

    root/nyu_depth_v2_labeled.mat  MATLAB v7.3: images, depths, labels of 894 classes
    root/splits.mat                trainNdxs and testNdxs
    root/classMapping40.mat        894 classes to 40: mapClass
    root/class13Mapping.mat        40 classes to 13

And the tree of `frames`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from sidetask_datasets import matlab, mtan
from sidetask_datasets.adapter import MEAN, STD, Folder, read_dense
from sidetask_datasets.dataset import Dataset, check_size, choose
from sidetask_datasets.files import DataError, averaged, first_size, is_file, is_folder, nearest, single
from sidetask_datasets.frames import LIMITS, NYUV2_CLASSES, TASKS, frames_source
from sidetask_datasets.source import Field, Source

_FOLDERS = {"image": "image", "segmentation": "label", "depth": "depth", "normals": "normal"}
_OFFICIAL = "nyu_depth_v2_labeled.mat"
_SIZE = (480, 640)  # of the official frames
_ALL = 894  # classes of the official labels


def nyuv2(  # noqa: D417 -- what all adapters take is described in one place
    root: Folder,
    tasks: Sequence[str] = TASKS,
    *,
    validation: int = 159,
    size: Sequence[int] | None = None,
    primary: Iterable[str] | None = None,
    seed: int = 0,
    normals_loss: str = "cosine",
    noise: bool = False,
    cache: Folder | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """NYU Depth v2: 13 classes, depth and normals; 795 frames to train and validate on, 654 to test.

    `primary`, `seed`, `normals_loss`, `noise`, `cache` and `device` are those of `adapter.read_dense`.

    Args:
        root: a folder with one of the layouts above.
        tasks: among "segmentation", "depth" and "normals".
        validation: so many frames, the last of the training split, are held out for model selection; 159 in SAAL.
        size: height and width to bring frames to: images by averaging, labels by the nearest pixel; None: as they are,
            but (288, 384), MTAN's, for the official file.

    Raises:
        DataError: for a root that holds none of the layouts, normals asked of the official file, or, all at once and
            each beginning with a path, files that are missing, damaged, or hold what they should not.
        ValueError: for an unknown task or loss, or a switch that is neither true nor false.
    """
    return read_dense(
        partial(nyuv2_source, root, tasks, size=size),
        classes={"segmentation": NYUV2_CLASSES},
        normals_loss=normals_loss,
        validation=validation,
        primary=primary,
        seed=seed,
        noise=noise,
        cache=cache,
        device=device,
    )


def nyuv2_source(root: Folder, tasks: Sequence[str] = TASKS, *, size: Sequence[int] | None = None) -> Source:
    """The files of `nyuv2`, which says what the arguments are and what is raised."""
    names = choose("task", tasks, TASKS)
    wanted = check_size(size)
    root = Path(root)
    if is_file(root / "train.txt"):
        return frames_source(root, names, size=size)
    if is_file(root / _OFFICIAL):
        return _official(root, names, wanted or (288, 384))
    for test in ("val", "test"):
        if is_folder(root / "train" / "image") and is_folder(root / test / "image"):
            return _arrays(root, names, wanted, test)
    raise DataError(
        f"{root}: holds none of NYUv2's layouts: train/image and val/image (or test/image) with .npy files, "
        f"{_OFFICIAL}, or train.txt and test.txt"
    )


def _arrays(root: Path, names: Sequence[str], size: tuple[int, int] | None, test: str) -> Source:
    folders = {name: _FOLDERS[name] for name in ("image", *names)}
    splits, problems = {}, []
    for split, folder in (("train", "train"), ("test", test)):
        columns, wrong = mtan.numbered(root / folder, folders)
        splits[split] = [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]
        problems += wrong
        if not splits[split] and not wrong:
            problems.append(f"{root / folder}: holds no sample")
    images = [sample["image"][0] for samples in splits.values() for sample in samples]
    shape = first_size(images, mtan.shape_of, problems)
    options: dict[str, Any] = {"shape": shape, "resize": size}
    stored = size or shape
    fields = {
        "image": Field("image", (3, *stored), "uint8", partial(mtan.read_image, **options), MEAN, STD),
        "segmentation": Field(
            "classes", stored, "uint8", partial(mtan.read_classes, classes=len(NYUV2_CLASSES), **options)
        ),
        "depth": Field("depth", stored, "float32", partial(mtan.read_positive, **options), limits=LIMITS),
        "normals": Field("normals", (3, *stored), "int16", partial(mtan.read_normals, **options)),
    }
    return Source(
        name="nyuv2",
        root=root,
        fields={name: fields[name] for name in folders},
        splits=splits,
        settings={"layout": "arrays", "size": size},
        problems=problems,
    )


def _official(root: Path, names: Sequence[str], size: tuple[int, int]) -> Source:
    path = root / _OFFICIAL
    if "normals" in names:
        raise DataError(f"{path}: has no normals; the official file is for the tasks segmentation and depth")
    lists = matlab.read_vectors(root / "splits.mat")
    splits = {}
    count = matlab.length(path, "images")
    for split, variable in (("train", "trainNdxs"), ("test", "testNdxs")):
        if variable not in lists or not len(lists[variable]):
            raise DataError(f"{root / 'splits.mat'}: has no {variable}")
        numbers = lists[variable].tolist()
        if min(numbers) < 1 or max(numbers) > count or len(set(numbers)) < len(numbers):
            raise DataError(f"{root / 'splits.mat'}: {variable} are not different numbers from 1 to {count}")
        splits[split] = [dict.fromkeys(("image", *names), (path, number - 1)) for number in numbers]
    shared = set(lists["trainNdxs"].tolist()) & set(lists["testNdxs"].tolist())
    if shared:
        raise DataError(f"{root / 'splits.mat'}: frame {min(shared)} is in both splits; splits must be disjoint")
    table = _thirteen(root) if "segmentation" in names else ()
    fields = {
        "image": Field("image", (3, *size), "uint8", partial(_read_image, size=size), MEAN, STD),
        "segmentation": Field("classes", size, "uint8", partial(_read_labels, size=size, table=table)),
        "depth": Field("depth", size, "float32", partial(_read_depths, size=size), limits=LIMITS),
    }
    return Source(
        name="nyuv2",
        root=root,
        fields={name: fields[name] for name in ("image", *names)},
        splits=splits,
        settings={"layout": "official", "size": size, "classes": table},
    )


def _thirteen(root: Path) -> tuple[int, ...]:
    """The class id of each official label, 255 unlabelled; label 0 is none."""
    forty = matlab.read_vector(root / "classMapping40.mat", _ALL)
    thirteen = matlab.read_vector(root / "class13Mapping.mat", 40)
    if forty.min() < 0 or forty.max() > 40:
        raise DataError(f"{root / 'classMapping40.mat'}: expected classes 1 to 40, found {forty.min()}, {forty.max()}")
    if thirteen.min() < 0 or thirteen.max() > 13:
        raise DataError(
            f"{root / 'class13Mapping.mat'}: expected classes 1 to 13, found {thirteen.min()}, {thirteen.max()}"
        )
    chain = numpy.concatenate([[0], thirteen])[forty]
    return (255, *(int(value) - 1 if value else 255 for value in chain))


def _read_image(path: Path, number: int, *, size: tuple[int, int]) -> NDArray[Any]:
    # MATLAB's first dimension is HDF5's last.
    pixels = matlab.read_row(path, "images", number, (3, *_SIZE[::-1]), "u")
    return averaged(numpy.ascontiguousarray(pixels.transpose(2, 1, 0)), size).transpose(2, 0, 1)


def _read_labels(path: Path, number: int, *, size: tuple[int, int], table: Sequence[int]) -> NDArray[Any]:
    labels = matlab.read_row(path, "labels", number, _SIZE[::-1], "u").T
    if labels.max() >= len(table):
        raise DataError(f"{path}: labels of frame {number + 1}: class {labels.max()}; there are {len(table) - 1}")
    return numpy.array(table, numpy.uint8)[nearest(labels, size)]


def _read_depths(path: Path, number: int, *, size: tuple[int, int]) -> NDArray[Any]:
    depths = single(path, matlab.read_row(path, "depths", number, _SIZE[::-1], "f").T)
    if depths.min() < 0:
        raise DataError(f"{path}: depths of frame {number + 1}: hold negative values")
    return nearest(depths, size)
