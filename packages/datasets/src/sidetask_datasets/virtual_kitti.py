"""Virtual KITTI 1.3.1 and 2: rendered street scenes with classes and depth for every pixel.

The trees, as their authors publish them. Version 1.3.1::

    root/vkitti_1.3.1_rgb/WORLD/VARIATION/00000.png         8-bit RGB
    root/vkitti_1.3.1_depthgt/WORLD/VARIATION/00000.png     16-bit centimetres, 65535 is the sky
    root/vkitti_1.3.1_scenegt/WORLD/VARIATION/00000.png     8-bit RGB, a colour for each class or instance
    root/vkitti_1.3.1_scenegt/WORLD_VARIATION_scenegt_rgb_encoding.txt
                                                            a heading, then "Class[:instance] r g b" a line

Version 2, unpacked into one folder, or its archives into a folder each (``vkitti_2*_rgb`` and so on)::

    root/SCENE/VARIATION/frames/rgb/Camera_0/rgb_00000.jpg
    root/SCENE/VARIATION/frames/depth/Camera_0/depth_00000.png
    root/SCENE/VARIATION/frames/classSegmentation/Camera_0/classgt_00000.png
    root/SCENE/VARIATION/colors.txt
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from sidetask_datasets import draws
from sidetask_datasets.adapter import MEAN, STD, Folder, read_dense
from sidetask_datasets.dataset import Dataset, check_seed, check_size, choose
from sidetask_datasets.files import (
    DataError,
    each_line,
    first_size,
    is_folder,
    listed,
    paired,
    picture_size,
    read_picture,
)
from sidetask_datasets.frames import read_colour
from sidetask_datasets.source import Field, Item, Source

TASKS = ("segmentation", "inverse_depth")
CLASSES = (
    "Building",
    "Car",
    "GuardRail",
    "Misc",
    "Pole",
    "Road",
    "Sky",
    "Terrain",
    "TrafficLight",
    "TrafficSign",
    "Tree",
    "Truck",
    "Van",
    "Vegetation",
)
# As version 2 has them.
COLOURS = (
    (140, 140, 140),
    (255, 127, 80),
    (250, 100, 255),
    (80, 80, 80),
    (255, 130, 0),
    (100, 60, 100),
    (90, 200, 255),
    (210, 0, 200),
    (200, 200, 0),
    (255, 255, 0),
    (0, 199, 0),
    (160, 60, 60),
    (0, 139, 139),
    (90, 240, 0),
)
WORLDS = ("0001", "0002", "0006", "0018", "0020")
VARIATIONS = (
    "15-deg-left",
    "15-deg-right",
    "30-deg-left",
    "30-deg-right",
    "clone",
    "fog",
    "morning",
    "overcast",
    "rain",
    "sunset",
)
FAR = 65535  # how the sky's depth is written
_UNLABELLED = 255
_FIELDS = ("image", *TASKS)


def virtual_kitti(  # noqa: D417 -- what all adapters take is described in one place
    root: Folder,
    tasks: Sequence[str] = TASKS,
    *,
    size: Sequence[int] | None = None,
    worlds: Sequence[str] = WORLDS,
    variations: Sequence[str] = VARIATIONS,
    camera: int = 0,
    primary: Iterable[str] | None = None,
    seed: int = 0,
    noise: bool = False,
    cache: Folder | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Street scenes with 14 classes and inverse depth, in 1/m, 0 in the sky, which counts as unlabelled there.

    A tenth of the frames, by a seeded shuffle, is the test split (9:1 in the literature), a tenth of the others is for
    validation. Frames that follow each other are nearly alike and fall into different splits, so that figures say
    little about streets never seen. Training frames are scaled, cropped and flipped.

    `primary`, `noise`, `cache` and `device` are those of `adapter.read_dense`.

    Args:
        root: the folder; which version it is, the tree says.
        tasks: among "segmentation" and "inverse_depth".
        size: height and width to bring frames to: images by averaging, labels by the nearest pixel; None: 375×1242.
        worlds: among "0001", "0002", "0006", "0018", "0020", which version 2 calls Scene01, Scene02 and so on.
        variations: of weather, light and direction.
        camera: 0 or 1, of version 2, which has two; version 1.3.1 has camera 0.
        seed: of the shuffle, and of `noise`. Another seed is decoded anew.

    Raises:
        DataError: beginning with the path of the file at fault: a picture or encoding that is missing, surplus or
            damaged, a picture of another size, a colour that is no class's. All problems of the pictures come together.
        ValueError: for an unknown task, world or variation, or a switch that is neither true nor false.
    """
    return read_dense(
        partial(
            virtual_kitti_source,
            root,
            tasks,
            size=size,
            worlds=worlds,
            variations=variations,
            camera=camera,
            seed=seed,
        ),
        classes={"segmentation": CLASSES},
        colours={"segmentation": COLOURS},
        primary=primary,
        seed=seed,
        noise=noise,
        cache=cache,
        device=device,
    )


def virtual_kitti_source(
    root: Folder,
    tasks: Sequence[str] = TASKS,
    *,
    size: Sequence[int] | None = None,
    worlds: Sequence[str] = WORLDS,
    variations: Sequence[str] = VARIATIONS,
    camera: int = 0,
    seed: int = 0,
) -> Source:
    """The files of `virtual_kitti`, which says what the arguments are and what is raised."""
    names = choose("task", tasks, TASKS)
    worlds = choose("world", worlds, WORLDS)
    variations = choose("variation", variations, VARIATIONS)
    wanted = check_size(size)
    check_seed(seed)
    if camera not in (0, 1) or isinstance(camera, bool):
        raise ValueError(f"camera is 0 or 1, found {camera!r}")
    root = Path(root)
    places = _first_version(root, worlds, variations) if camera == 0 else []
    second = _second_version(root, worlds, variations, camera)
    if places and second:
        raise DataError(f"{root}: holds version 1.3.1 and version 2; name a folder that holds one")
    samples: list[dict[str, Item]] = []
    problems: list[str] = []
    patterns = _FIRST_FILES if places else _SECOND_FILES
    for folders, encoding in places or second:
        wanted_folders = {name: folders[name] for name in ("image", *names)}
        numbers, wrong = paired(wanted_folders, patterns)
        problems += wrong
        try:
            palette = read_encoding(encoding) if "segmentation" in names else ()
        except DataError as error:
            problems += error.problems
            continue
        for number in numbers:
            paths = {name: folder / patterns[name].format(number) for name, folder in wanted_folders.items()}
            sample: dict[str, Item] = {name: (path, paths["image"]) for name, path in paths.items()}
            if "segmentation" in sample:
                sample["segmentation"] += (palette,)
            samples.append(sample)
    if not samples and not problems:
        raise DataError(
            f"{root}: holds neither vkitti_1.3.1_rgb/WORLD/VARIATION nor SCENE/VARIATION/frames/rgb/Camera_{camera} "
            f"of any world ({', '.join(worlds)}) and variation ({', '.join(variations)})"
        )
    shape = wanted or first_size((sample["image"][0] for sample in samples), picture_size, problems)
    options: dict[str, Any] = {"shape": shape, "resize": wanted is not None}
    fields = {
        "image": Field("image", (3, *shape), "uint8", partial(read_colour, **options), MEAN, STD),
        "segmentation": Field("classes", shape, "uint8", partial(read_palette, **options)),
        "inverse_depth": Field(
            "disparity", shape, "float32", partial(read_inverse_depth, **options), limits=(0.25, 0.0)
        ),
    }
    order = draws.permutation(draws.key(seed, "virtual_kitti"), len(samples)).tolist()
    tenth = max(len(samples) // 10, 1)
    rest = max((len(samples) - tenth) // 10, 1)
    borders = {"test": order[:tenth], "validation": order[tenth : tenth + rest], "train": order[tenth + rest :]}
    return Source(
        name="virtual_kitti",
        root=root,
        fields={name: fields[name] for name in ("image", *names)},
        splits={split: [samples[i] for i in sorted(borders[split])] for split in ("train", "validation", "test")},
        settings={"size": wanted},
        problems=problems,
    )


def read_encoding(path: Path) -> tuple[tuple[int, int], ...]:
    """What colours mean: pairs of a colour, as red · 65536 + green · 256 + blue, and a class id, by colour.

    Raises:
        DataErrors: naming every line that is not "Class r g b" or "Class:instance r g b", has a class that Virtual
            KITTI does not have, or the colour of another class.
        DataError: if the file cannot be read, or names no class.
    """
    palette: dict[int, int] = {}

    def take(number: int, line: str) -> None:
        if number == 1:
            return
        words = line.split()
        name = words[0].split(":")[0]
        if len(words) != 4 or not all(re.fullmatch("[0-9]{1,3}", word) and int(word) < 256 for word in words[1:]):
            raise ValueError(f"expected a class and three numbers from 0 to 255, found {line!r}")
        if name not in CLASSES and name != "Undefined":
            raise ValueError(f"unknown class {name!r}; there are: {', '.join(CLASSES)}")
        red, green, blue = map(int, words[1:])
        code, id_ = red << 16 | green << 8 | blue, _UNLABELLED if name == "Undefined" else CLASSES.index(name)
        if palette.setdefault(code, id_) != id_:
            raise ValueError(f"{words[0]} has the colour of another class")

    each_line(path, take)
    if not palette:
        raise DataError(f"{path}: names no class")
    return tuple(sorted(palette.items()))


def read_palette(
    path: Path, image: Path, palette: tuple[tuple[int, int], ...], *, shape: tuple[int, int], resize: bool
) -> NDArray[Any]:
    """Class ids ``[H, W]`` uint8 of a picture in colours of the palette."""
    original = picture_size(image) if resize else shape
    pixels = read_picture(path, "vectors", shape if resize else None, original).astype(numpy.int64)
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    known, ids = (numpy.array(column) for column in zip(*palette, strict=True))
    places = numpy.searchsorted(known, codes).clip(max=len(known) - 1)
    strange = codes[known[places] != codes]
    if strange.size:
        code = int(strange[0])
        colour = code >> 16, code >> 8 & 255, code & 255
        raise DataError(f"{path}: {strange.size} pixels of a colour that is no class's, such as {colour}")
    return ids[places].astype(numpy.uint8)


def read_inverse_depth(path: Path, image: Path, *, shape: tuple[int, int], resize: bool) -> NDArray[Any]:
    """One by metres, ``[H, W]`` float32, from centimetres; 0 where these are 65535, or 0, which no camera sees."""
    original = picture_size(image) if resize else shape
    depth = read_picture(path, "words", shape if resize else None, original)
    known = (depth > 0) & (depth < FAR)
    return numpy.where(known, 100.0 / numpy.maximum(depth, 1), 0.0).astype(numpy.float32)


_FIRST_FILES = dict.fromkeys(_FIELDS, "{}.png")
_SECOND_FILES = {"image": "rgb_{}.jpg", "segmentation": "classgt_{}.png", "inverse_depth": "depth_{}.png"}
# For each folder of frames: the folder of each field, and the file that says what colours mean.
_Places = list[tuple[dict[str, Path], Path]]


def _first_version(root: Path, worlds: Sequence[str], variations: Sequence[str]) -> _Places:
    bases = {
        name: root / f"vkitti_1.3.1_{part}" for name, part in zip(_FIELDS, ("rgb", "scenegt", "depthgt"), strict=True)
    }
    return [
        (
            {name: base / world / variation for name, base in bases.items()},
            bases["segmentation"] / f"{world}_{variation}_scenegt_rgb_encoding.txt",
        )
        for world in worlds
        for variation in variations
        if is_folder(bases["image"] / world / variation)
    ]


def _second_version(root: Path, worlds: Sequence[str], variations: Sequence[str], camera: int) -> _Places:
    def base(part: str) -> Path:
        """One archive's folder, or the folder of all."""
        own = [name for name in names if name.startswith("vkitti_2") and name.endswith(f"_{part}")]
        return root / own[-1] if own else root

    names = listed(root) if is_folder(root) else []
    parts = dict(zip(_FIELDS, ("rgb", "classSegmentation", "depth"), strict=True))
    found = []
    for world in worlds:
        for variation in variations:
            scene = Path(f"Scene{world[2:]}") / variation
            folders = {name: base(part) / scene / "frames" / part / f"Camera_{camera}" for name, part in parts.items()}
            if is_folder(folders["image"]):
                found.append((folders, base("textgt") / scene / "colors.txt"))
    return found
