"""Cityscapes (Cordts et al. 2016) with panoptic parts (de Geus et al. 2021), in whichever of three layouts it lies.

Preprocessed pictures, as for Auto-λ, 256×512::

    root/train/image/0.png ...      8-bit RGB
    root/train/seg/0.png ...        8-bit label ids
    root/train/part_seg/0.tif ...   integer ids of panoptic parts
    root/train/depth/0.png ...      16-bit disparity of the full-size image, 0 unlabelled, else 256 · pixels + 1
    root/val/...

Preprocessed arrays, as for MTAN, 128×256, without parts::

    root/train/image/0.npy ...      [H, W, 3] in [0, 1]
    root/train/label/0.npy ...      [H, W], 19 classes, -1 unlabelled; or label_7, 7 categories
    root/train/depth/0.npy ...      [H, W, 1] disparity, 0 unlabelled
    root/val/...

The official tree, 1024×2048::

    root/leftImg8bit/train/CITY/ID_leftImg8bit.png
    root/gtFine/train/CITY/ID_gtFine_labelIds.png
    root/gtFinePanopticParts/train/CITY/ID_gtFinePanopticParts.tif
    root/disparity/train/CITY/ID_disparity.png

with ``val`` beside every ``train``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from sidetask_datasets import mtan
from sidetask_datasets.adapter import MEAN, STD, Folder, read_dense
from sidetask_datasets.dataset import Dataset, check_size, choose
from sidetask_datasets.files import DataError, first_size, is_folder, listed, paired, picture_size, read_picture
from sidetask_datasets.source import Field, Item, Source

TASKS = ("segmentation", "part_segmentation", "disparity")
# Name, label id and colour of each class, in order of the training ids.
_TABLE = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
CLASSES = tuple(name for name, _, _ in _TABLE)
CATEGORIES = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
PARTS = ("background", "torso", "head", "arms", "legs", "windows", "wheels", "lights", "licence plate", "chassis")
_LAST = 33  # label id; 255 is the licence plate's, -1
_PEOPLE, _VEHICLES = (24, 25), (26, 27, 28)  # label ids of what has parts
_WIDTH = 2048  # of the full-size images, in whose pixels disparity is measured

_PICTURES = {
    "image": ("image", ".png"),
    "segmentation": ("seg", ".png"),
    "part_segmentation": ("part_seg", ".tif"),
    "disparity": ("depth", ".png"),
}
_OFFICIAL = {
    "image": ("leftImg8bit", "{}_leftImg8bit.png"),
    "segmentation": ("gtFine", "{}_gtFine_labelIds.png"),
    "part_segmentation": ("gtFinePanopticParts", "{}_gtFinePanopticParts.tif"),
    "disparity": ("disparity", "{}_disparity.png"),
}
_OTHERS = ("_gtFine_color.png", "_gtFine_instanceIds.png", "_gtFine_polygons.json", "_gtFine_labelTrainIds.png")


def cityscapes(  # noqa: D417 -- what all adapters take is described in one place
    root: Folder,
    tasks: Sequence[str] | None = None,
    *,
    validation: int = 297,
    size: Sequence[int] | None = None,
    classes: int = 19,
    primary: Iterable[str] | None = None,
    seed: int = 0,
    noise: bool = False,
    cache: Folder | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Cityscapes: 19 classes, ten parts and disparity; 2975 images to train and validate on, 500 to test.

    The official test images have no labels; what is called ``val`` is the test split here, and validation is held out
    of ``train``.

    `primary`, `seed`, `noise`, `cache` and `device` are those of `adapter.read_dense`.

    Args:
        root: a folder with one of the layouts above.
        tasks: among "segmentation", "part_segmentation" and "disparity"; None: all that the layout has.
        validation: so many images, the last of the training split, are held out for model selection; a tenth.
        size: height and width to bring images to: by averaging, labels by the nearest pixel, disparity in pixels of the
            new width; None: as they are, but (256, 512), Auto-λ's, for the official tree.
        classes: 19, or 7 categories, which only the layout of arrays has.

    Raises:
        DataError: for a root that holds none of the layouts, a task that its layout has not, or, all at once and each
            beginning with a path, files that are missing, damaged, or hold what they should not.
        ValueError: for an unknown task, another number of classes, or a switch that is neither true nor false.
    """
    official = classes == len(CLASSES)
    return read_dense(
        partial(cityscapes_source, root, tasks, size=size, classes=classes),
        classes={"segmentation": CLASSES if official else CATEGORIES, "part_segmentation": PARTS},
        colours={"segmentation": [colour for _, _, colour in _TABLE]} if official else {},
        validation=validation,
        primary=primary,
        seed=seed,
        noise=noise,
        cache=cache,
        device=device,
    )


def cityscapes_source(
    root: Folder,
    tasks: Sequence[str] | None = None,
    *,
    size: Sequence[int] | None = None,
    classes: int = 19,
) -> Source:
    """The files of `cityscapes`, which says what the arguments are and what is raised."""
    names = None if tasks is None else choose("task", tasks, TASKS)
    if classes not in (len(CLASSES), len(CATEGORIES)):
        raise ValueError(f"classes is {len(CLASSES)} or {len(CATEGORIES)}, found {classes!r}")
    wanted = check_size(size)
    root = Path(root)
    if is_folder(root / "leftImg8bit"):
        _check_classes(root, classes)
        return _official(root, names or TASKS, wanted or (256, 512))
    if is_folder(root / "train" / "image"):
        if any(name.endswith(".npy") for name in listed(root / "train" / "image")):
            return _arrays(root, names, wanted, classes)
        _check_classes(root, classes)
        return _pictures(root, names or TASKS, wanted)
    raise DataError(
        f"{root}: holds none of Cityscapes' layouts: train/image with .png or .npy files, or leftImg8bit/train"
    )


def _check_classes(root: Path, classes: int) -> None:
    if classes != len(CLASSES):
        raise DataError(f"{root}: {classes} categories are in the layout of arrays only")


def _arrays(root: Path, names: Sequence[str] | None, size: tuple[int, int] | None, classes: int) -> Source:
    names = names or ("segmentation", "disparity")
    if "part_segmentation" in names:
        raise DataError(f"{root}: the layout of arrays has no parts; its tasks are segmentation and disparity")
    label = "label_7" if classes == len(CATEGORIES) and is_folder(root / "train" / "label_7") else "label"
    found = {"image": "image", "segmentation": label, "disparity": "depth"}
    folders = {name: found[name] for name in ("image", *names)}
    splits, problems = {}, []
    for split, folder in (("train", "train"), ("test", "val")):
        columns, wrong = mtan.numbered(root / folder, folders)
        splits[split] = _rows(columns)
        problems += wrong
    shape = _shape(splits, problems, mtan.shape_of)
    options: dict[str, Any] = {"shape": shape, "resize": size}
    stored = size or shape
    fields = {
        "image": Field("image", (3, *stored), "uint8", partial(mtan.read_image, **options), MEAN, STD),
        "segmentation": Field("classes", stored, "uint8", partial(mtan.read_classes, classes=classes, **options)),
        "disparity": Field("disparity", stored, "float32", partial(mtan.read_positive, **options), limits=(0.3, 0.0)),
    }
    return _source(root, "arrays", size, fields, names, splits, problems, classes=classes)


def _pictures(root: Path, names: Sequence[str], size: tuple[int, int] | None) -> Source:
    splits, problems = {}, []
    for split, folder in (("train", "train"), ("test", "val")):
        places = {name: root / folder / _PICTURES[name][0] for name in ("image", *names)}
        ids, wrong = paired(places, {name: "{}" + _PICTURES[name][1] for name in places})
        splits[split] = [
            {name: (place / f"{id_}{_PICTURES[name][1]}",) for name, place in places.items()} for id_ in ids
        ]
        problems += wrong
    shape = _shape(splits, problems, picture_size)
    return _source(root, "pictures", size, _fields(shape, size), names, splits, problems)


def _official(root: Path, names: Sequence[str], size: tuple[int, int]) -> Source:
    splits: dict[str, list[dict[str, Item]]] = {}
    problems: list[str] = []
    for split, folder in (("train", "train"), ("test", "val")):
        splits[split] = []
        tops = {name: root / _OFFICIAL[name][0] / folder for name in ("image", *names)}
        cities = {name: listed(top) for name, top in tops.items()}
        for city in sorted(set().union(*cities.values())):
            lacking = [tops[name] / city for name, there in cities.items() if city not in there]
            problems += [f"{place}: no such folder" for place in lacking]
            if lacking:
                continue
            places = {name: top / city for name, top in tops.items()}
            ids, wrong = paired(places, {name: _OFFICIAL[name][1] for name in places})
            # Other renderings of the same labels lie beside them.
            problems += [problem for problem in wrong if not problem.split(": ")[0].endswith(_OTHERS)]
            splits[split] += [
                {name: (place / _OFFICIAL[name][1].format(id_),) for name, place in places.items()} for id_ in ids
            ]
    shape = _shape(splits, problems, picture_size)
    return _source(root, "official", size, _fields(shape, size), names, splits, problems)


def _rows(columns: Mapping[str, Sequence[Item]]) -> list[dict[str, Item]]:
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _shape(
    splits: Mapping[str, Sequence[Mapping[str, Item]]], problems: Sequence[str], measure: Any
) -> tuple[int, int]:
    """The size of the first image that can be read."""
    return first_size([row["image"][0] for rows in splits.values() for row in rows], measure, problems)


def _fields(shape: tuple[int, int], size: tuple[int, int] | None) -> dict[str, Field]:
    stored = size or shape
    options: dict[str, Any] = {"original": shape, "size": size}
    return {
        "image": Field("image", (3, *stored), "uint8", partial(_read_image, **options), MEAN, STD),
        "segmentation": Field("classes", stored, "uint8", partial(_read_classes, **options)),
        "part_segmentation": Field("classes", stored, "uint8", partial(_read_parts, **options)),
        # A pixel of disparity at full size is less of one in a smaller image.
        "disparity": Field(
            "disparity",
            stored,
            "int16",
            partial(_read_disparity, **options),
            scale=stored[1] / _WIDTH / 256,
            limits=(25.0, 0.0),  # near, where disparity is high, is bright
        ),
    }


def _source(
    root: Path,
    layout: str,
    size: tuple[int, int] | None,
    fields: Mapping[str, Field],
    names: Sequence[str],
    splits: Mapping[str, Sequence[Mapping[str, Item]]],
    problems: list[str],
    **settings: Any,
) -> Source:
    if not problems:
        problems = [f"{root}: holds no image of the split {split!r}" for split, rows in splits.items() if not rows]
    return Source(
        name="cityscapes",
        root=root,
        fields={name: fields[name] for name in ("image", *names)},
        splits=splits,
        settings={"layout": layout, "size": size, **settings},
        problems=problems,
    )


def _read_image(path: Path, *, original: tuple[int, int], size: tuple[int, int] | None) -> NDArray[Any]:
    return read_picture(path, "colour", size, original).transpose(2, 0, 1)


def _read_classes(path: Path, *, original: tuple[int, int], size: tuple[int, int] | None) -> NDArray[Any]:
    pixels = read_picture(path, "bytes", size, original)
    wrong = pixels[(pixels > _LAST) & (pixels != 255)]
    if wrong.size:
        raise DataError(f"{path}: label id {wrong[0]}; they are 0 to {_LAST}, and 255")
    table = numpy.full(256, 255, numpy.uint8)
    table[[label for _, label, _ in _TABLE]] = numpy.arange(len(_TABLE))
    return table[pixels]


def _read_parts(path: Path, *, original: tuple[int, int], size: tuple[int, int] | None) -> NDArray[Any]:
    uids = read_picture(path, "numbers", size, original)
    wrong = uids[(uids < 0) | (uids > 9_999_999)]
    if wrong.size:
        raise DataError(f"{path}: panoptic id {wrong[0]}; they have at most 7 digits")
    return parts_of(uids)


def parts_of(uids: NDArray[numpy.integer[Any]]) -> NDArray[numpy.uint8]:
    """Part ids of panoptic ids: of up to two digits, a class; up to five, class · 1000 + instance; else a part beside.

    >>> parts_of(numpy.array([24, 24001, 2400102, 2600105, 2600106, 3300101])).tolist()
    [0, 0, 2, 9, 0, 0]
    """
    classes, parts = uids // 100_000, numpy.where(uids > 99_999, uids % 100, 0)
    people = numpy.isin(classes, _PEOPLE) & (parts >= 1) & (parts <= 4)
    vehicles = numpy.isin(classes, _VEHICLES) & (parts >= 1) & (parts <= 5)
    found = numpy.where(people, parts, numpy.where(vehicles, parts + 4, 0))
    return found.astype(numpy.uint8)


def _read_disparity(path: Path, *, original: tuple[int, int], size: tuple[int, int] | None) -> NDArray[Any]:
    pixels = read_picture(path, "words", size, original)
    return numpy.where(pixels > 0, pixels - 1, 0).astype(numpy.uint16).view(numpy.int16)
