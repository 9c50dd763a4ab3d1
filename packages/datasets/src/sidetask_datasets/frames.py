"""Folders of frames: image, depth, label and normal pictures by id, and text files that say which split an id is in.

The tree, as NYU Depth v2 is often kept::

    root/train.txt  root/test.txt   one id a line
    root/image/ID.jpg               8-bit RGB
    root/label/ID.png               8-bit class ids, 255 unlabelled
    root/depth/ID.png               16-bit millimetres, 0 unlabelled
    root/normal/ID.png              8-bit RGB, per component (x right, y down, z forward, towards the camera, so z < 0)
                                    value = 128 + 124 · n; (0, 0, 0) unlabelled
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetask_datasets import tasks as task_kinds
from sidetask_datasets.augment import Augmentation
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import Dataset, check_counts, check_seed, check_switches, choose, choose_primary
from sidetask_datasets.files import (
    DataError,
    check_apart,
    check_present,
    in_threads,
    picture_size,
    read_ids,
    read_picture,
)
from sidetask_datasets.noise import with_noise
from sidetask_datasets.split import ResidentSplit
from sidetask_datasets.view import View

TASKS = ("segmentation", "depth", "normals")
NYUV2_CLASSES = (
    "bed",
    "books",
    "ceiling",
    "chair",
    "floor",
    "furniture",
    "objects",
    "picture",
    "sofa",
    "table",
    "tv",
    "wall",
    "window",
)
# Of the images of ImageNet, which pretrained encoders expect and which fit any photographs well enough.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PIXELS = {"image": "colour", "normal": "vectors", "depth": "words", "label": "bytes"}
_FOLDERS = {"segmentation": "label", "depth": "depth", "normals": "normal"}


def frames(
    root: str | Path,
    tasks: Sequence[str] = TASKS,
    *,
    validation: int = 159,
    size: Sequence[int] | None = None,
    classes: Sequence[str] = NYUV2_CLASSES,
    primary: Iterable[str] | None = None,
    seed: int = 0,
    normals_loss: str = "cosine",
    noise: bool = False,
    device: torch.device | str = "cpu",
) -> Dataset:
    """A folder of frames in the tree above, decoded once into compact tensors on the device.

    Args:
        root: the folder.
        tasks: among "segmentation", "depth" and "normals". Only the folders that they need are read.
        validation: so many ids, the last of train.txt, are held out for model selection; 159 of NYUv2's 795 in SAAL.
        size: height and width to bring frames to: images by averaging, labels by the nearest pixel; None: as they are.
        classes: names in order of the ids in the label pictures; NYUv2's 13 by default.
        primary: the tasks that count; None for all.
        seed: of `noise`, and of nothing else, since the files say what is in which split.
        normals_loss: "cosine", "l1" or "elements", see `losses`.
        noise: add an auxiliary task "noise", see `with_noise`.
        device: where the frames live.

    Raises:
        DataError: a ValueError that begins with the path of the file at fault: a root, list or picture that is missing,
            an id that could leave the folder, is repeated or is in both splits, an empty list, a picture that cannot be
            decoded or has other pixels or another size than expected, a class id that has no name.
        ValueError: for an unknown task or loss, a switch that is neither true nor false, or if nothing is left to train
            on.
    """
    names = choose("task", tasks, TASKS)
    wanted = choose_primary(primary, names)
    check_counts(validation=validation)
    check_seed(seed)
    check_switches(noise=noise)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size is a height and a width in pixels, found {size!r}")
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; it should hold train.txt, test.txt and the pictures")
    train_file, test_file = root / "train.txt", root / "test.txt"
    train, test = read_ids(train_file), read_ids(test_file)
    check_apart(train_file, train, test_file, test)
    if len(train) <= validation:
        raise ValueError(f"{train_file}: with {len(train)} ids, {validation} for validation leave none to train on")
    lists = {"train": train[:-validation], "validation": train[-validation:], "test": test}
    folders = [_FOLDERS[name] for name in names]
    check_present([_path(root, folder, id_) for folder in ["image", *folders] for id_ in train + test])
    shape = (size[0], size[1]) if size is not None else picture_size(_path(root, "image", train[0]))

    def load(ids: list[str], augmentation: Augmentation | None) -> ResidentSplit:
        found = _decode(root, ids, folders, shape, size is not None, len(classes))
        image = Column(found["image"], "image", MEAN, STD)
        targets = {name: _column(name, found) for name in names}
        return ResidentSplit(image, targets, augmentation).to(device)

    chosen = tuple(task_kinds.dense(name, len(classes), name in wanted, normals_loss) for name in names)
    views = {
        "segmentation": View("classes", classes=tuple(classes)),
        "depth": View("scalar", limits=(0.7, 8.0)),
        "normals": View("normals"),
    }
    outputs = {"segmentation": len(classes), "depth": 1, "normals": 3}
    data = Dataset(
        name="frames",
        tasks=chosen,
        train=load(lists["train"], Augmentation()),
        validation=load(lists["validation"], None),
        test=load(lists["test"], None),
        outputs={name: outputs[name] for name in names},
        views={name: views[name] for name in names},
        input_view=View("image", mean=MEAN, std=STD),
        dense=True,
    )
    return with_noise(data, seed) if noise else data


def _path(root: Path, folder: str, id_: str) -> Path:
    return root / folder / f"{id_}.{'jpg' if folder == 'image' else 'png'}"


def _decode(
    root: Path, ids: list[str], folders: list[str], shape: tuple[int, int], resize: bool, classes: int
) -> dict[str, Tensor]:
    """Every picture of the ids, folder by folder, ``[N, ...]`` in the types of columns."""
    stored = {
        "image": (3, numpy.uint8),
        "normal": (3, numpy.int8),
        "depth": (1, numpy.int16),
        "label": (1, numpy.uint8),
    }
    arrays = {
        folder: numpy.empty((len(ids), *shape, stored[folder][0]), stored[folder][1]) for folder in ["image", *folders]
    }

    def work(index: int) -> None:
        # Frames may differ in size if they are resized, but never the pictures of one frame.
        original = picture_size(_path(root, "image", ids[index])) if resize else shape
        for folder, array in arrays.items():
            path = _path(root, folder, ids[index])
            pixels = read_picture(path, _PIXELS[folder], shape if resize else None, original)
            array[index] = _stored(path, folder, pixels, classes).reshape(*shape, -1)

    in_threads(work, range(len(ids)))
    return {folder: torch.from_numpy(array).movedim(-1, 1).contiguous() for folder, array in arrays.items()}


def _stored(path: Path, folder: str, pixels: NDArray[Any], classes: int) -> NDArray[Any]:
    """Pixels in the type of their column, label ids checked."""
    if folder == "normal":
        # Flipping the highest bit of a byte takes 128 from it and makes it signed.
        return numpy.where(pixels.any(axis=-1, keepdims=True), pixels ^ 128, 0).view(numpy.int8)
    if folder == "label":
        wrong = pixels[(pixels >= classes) & (pixels != 255)]
        if wrong.size:
            raise DataError(f"{path}: class id {wrong[0]}; there are {classes} classes, and 255 is unlabelled")
    return pixels.view(numpy.int16) if folder == "depth" else pixels


def _column(name: str, found: dict[str, Tensor]) -> Column:
    match name:
        case "depth":
            return Column(found["depth"][:, 0], "depth")
        case "normals":
            return Column(found["normal"], "normals")
        case _:
            return Column(found["label"][:, 0], "classes")
