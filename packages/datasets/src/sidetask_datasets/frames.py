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
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from sidetask_datasets.adapter import MEAN, STD, Folder, read_dense
from sidetask_datasets.dataset import Dataset, check_size, choose
from sidetask_datasets.files import (
    DataError,
    check_ids,
    first_size,
    is_folder,
    missing,
    picture_size,
    read_lists,
    read_picture,
)
from sidetask_datasets.source import Field, Item, Source

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
LIMITS = (0.7, 8.0)  # metres of depth, as it is drawn
_FOLDERS = {"image": "image", "segmentation": "label", "depth": "depth", "normals": "normal"}


def frames(  # noqa: D417 -- what all adapters take is described in one place
    root: Folder,
    tasks: Sequence[str] = TASKS,
    *,
    validation: int = 159,
    size: Sequence[int] | None = None,
    classes: Sequence[str] = NYUV2_CLASSES,
    primary: Iterable[str] | None = None,
    seed: int = 0,
    normals_loss: str = "cosine",
    noise: bool = False,
    cache: Folder | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """A folder of frames in the tree above, decoded once into a cache.

    `primary`, `seed`, `normals_loss`, `noise`, `cache` and `device` are those of `adapter.read_dense`.

    Args:
        root: the folder.
        tasks: among "segmentation", "depth" and "normals". Only the folders that they need are read.
        validation: so many ids, the last of train.txt, are held out for model selection; 159 of NYUv2's 795 in SAAL.
        size: height and width to bring frames to: images by averaging, labels by the nearest pixel; None: as they are.
        classes: names in order of the ids in the label pictures; NYUv2's 13 by default.

    Raises:
        DataError: a ValueError that begins with the path of the file at fault: a root, list or picture that is missing,
            an id that could leave the folder, is repeated or is in both splits, an empty list, a picture that cannot be
            decoded or has other pixels or another size than expected, a class id that has no name. Nothing left to
            train on. All problems of the lists come together, and then all of the pictures, in one `DataErrors`.
        ValueError: for an unknown task or loss, or a switch that is neither true nor false.
    """
    return read_dense(
        partial(frames_source, root, tasks, size=size, classes=classes),
        classes={"segmentation": classes},
        normals_loss=normals_loss,
        validation=validation,
        primary=primary,
        seed=seed,
        noise=noise,
        cache=cache,
        device=device,
    )


def frames_source(
    root: Folder,
    tasks: Sequence[str] = TASKS,
    *,
    size: Sequence[int] | None = None,
    classes: Sequence[str] = NYUV2_CLASSES,
) -> Source:
    """The files of `frames`, which says what the arguments are and what is raised."""
    names = choose("task", tasks, TASKS)
    wanted = check_size(size)
    root = Path(root)
    if not is_folder(root):
        raise DataError(f"{root}: no such folder; it should hold train.txt, test.txt and the pictures")
    lists = read_lists({split: root / f"{split}.txt" for split in ("train", "test")})
    splits: dict[str, list[dict[str, Item]]] = {}
    for split, ids in lists.items():
        splits[split] = []
        for id_ in ids:
            image = root / "image" / f"{id_}.jpg"
            paths = {name: root / _FOLDERS[name] / f"{id_}.png" for name in names}
            splits[split].append({name: (path, image) for name, path in {"image": image, **paths}.items()})
    everything = [path for samples in splits.values() for sample in samples for path, _ in sample.values()]
    problems = missing(everything)
    images = [sample["image"][0] for samples in splits.values() for sample in samples]
    shape = wanted or first_size(images, picture_size, problems)
    # If they are resized, frames may differ in size, but never the pictures of one frame.
    options: dict[str, Any] = {"shape": shape, "resize": wanted is not None}
    fields = {
        "image": Field("image", (3, *shape), "uint8", partial(read_colour, **options), MEAN, STD),
        "segmentation": Field("classes", shape, "uint8", partial(read_classes, classes=len(classes), **options)),
        "depth": Field("depth", shape, "int16", partial(read_depth, **options), limits=LIMITS),
        "normals": Field("normals", (3, *shape), "int8", partial(read_normals, **options)),
    }
    return Source(
        name="frames",
        root=root,
        fields={name: fields[name] for name in ("image", *names)},
        splits=splits,
        settings={"size": wanted, "classes": len(classes)},
        problems=problems,
    )


def read_colour(path: Path, image: Path, *, shape: tuple[int, int], resize: bool) -> NDArray[Any]:
    """A photograph, ``[3, H, W]`` uint8."""
    return _pixels(path, image, "colour", shape, resize).transpose(2, 0, 1)


def read_classes(path: Path, image: Path, *, shape: tuple[int, int], resize: bool, classes: int) -> NDArray[Any]:
    """Class ids, ``[H, W]`` uint8, checked."""
    pixels = _pixels(path, image, "bytes", shape, resize)
    check_ids(path, pixels, classes)
    return pixels


def read_depth(path: Path, image: Path, *, shape: tuple[int, int], resize: bool) -> NDArray[Any]:
    """Millimetres, ``[H, W]``, the bits of unsigned numbers."""
    return _pixels(path, image, "words", shape, resize).view(numpy.int16)


def read_normals(path: Path, image: Path, *, shape: tuple[int, int], resize: bool) -> NDArray[Any]:
    """Vectors, ``[3, H, W]`` int8, of length 124 or so."""
    pixels = _pixels(path, image, "vectors", shape, resize)
    # Flipping the highest bit of a byte takes 128 from it and makes it signed.
    signed = numpy.where(pixels.any(axis=-1, keepdims=True), pixels ^ 128, 0).view(numpy.int8)
    return signed.transpose(2, 0, 1)


def _pixels(path: Path, image: Path, kind: str, shape: tuple[int, int], resize: bool) -> NDArray[Any]:
    original = picture_size(image) if resize else shape
    return read_picture(path, kind, shape if resize else None, original)
