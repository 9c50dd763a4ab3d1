"""The pictures of the pages beside this file, drawn from made-up data that lie on the disk as the real ones would.

    python docs/datasets/pictures.py [NAME ...]

Each writes a small tree in the format of its dataset, reads it back through the adapter, and draws what a network would
see and what it should say. Streets and photographs are rooms of `sidetask_datasets.scenes`; faces and arms are drawn.
"""

from __future__ import annotations

import math
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import scipy.io
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sidetask_datasets import (
    Dataset,
    celeba,
    cifar100_domains,
    cityscapes,
    digits,
    frames,
    gallery,
    nyuv2,
    pascal_context,
    rlbench,
    scenes,
    virtual_kitti,
)
from sidetask_datasets.celeba import ATTRIBUTES
from sidetask_datasets.cifar100_domains import COUNTS, TASKS
from sidetask_datasets.digits import _scans
from sidetask_datasets.virtual_kitti import CLASSES, COLOURS

HERE = Path(__file__).parent
Pixels = NDArray[numpy.uint8]


def rooms(size: tuple[int, int], count: int) -> tuple[Dataset, Any, list[Pixels]]:
    """Rooms to take apart: the dataset, all of them as a batch, and their photographs."""
    data = scenes(size, train=count, validation=1, test=1, samples=2, difficulty=0.4)
    batch = data.train[:]
    return data, batch, [data.show_input(one) for one in batch.inputs]


def save(path: Path, pixels: NDArray[Any], mode: str | None = None) -> None:
    """Write a picture, in its own mode or a given one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels) if mode is None else Image.frombytes(mode, pixels.shape[::-1], pixels.tobytes())
    picture.save(path, quality=95)


def rows(data: Dataset, samples: list[int]) -> list[list[Pixels]]:
    """The input of each sample, and what each task should say of it."""
    found = []
    for index in samples:
        batch = data.train[index]
        views = [data.views[task.name].image(batch.target_of(task)[0]) for task in data.tasks]
        found.append([data.show_input(batch.inputs[0]), *views])
    return found


def draw_virtual_kitti(root: Path) -> list[list[Pixels]]:
    """Rooms as streets, of version 2: image, classes, inverse depth."""
    _, batch, photographs = rooms((94, 310), 20)
    scene = root / "Scene01" / "clone"
    street = [5, 6, 0, 13, 10, 9, 7, 1, 11, 2, 12, 4, 8]  # what each thing in a room stands for
    for index, photograph in enumerate(photographs):
        save(scene / f"frames/rgb/Camera_0/rgb_{index:05}.jpg", photograph)
        ids = numpy.array(street)[batch.targets["segmentation"][index].numpy()]
        colours = numpy.array(COLOURS, numpy.uint8)[ids]
        save(scene / f"frames/classSegmentation/Camera_0/classgt_{index:05}.png", colours)
        depth = (batch.targets["depth"][index, 0] * 500).numpy()
        depth = numpy.where(ids == CLASSES.index("Sky"), 65535, depth).astype(numpy.uint16)
        save(scene / f"frames/depth/Camera_0/depth_{index:05}.png", depth, "I;16")
    lines = [f"{name} {' '.join(map(str, colour))}" for name, colour in zip(CLASSES, COLOURS, strict=True)]
    (scene / "colors.txt").write_text("\n".join(["Category r g b", *lines]))
    return rows(virtual_kitti(root), [1, 5])


def draw_frames(root: Path) -> list[list[Pixels]]:
    """Rooms in the tree of frames: image, classes, depth, normals."""
    _, batch, photographs = rooms((120, 160), 6)
    for index, photograph in enumerate(photographs):
        save(root / f"image/{index}.jpg", photograph)
        save(root / f"label/{index}.png", batch.targets["segmentation"][index].numpy().astype(numpy.uint8))
        depth = (batch.targets["depth"][index, 0] * 1000).numpy().astype(numpy.uint16)
        save(root / f"depth/{index}.png", depth, "I;16")
        normals = 128 + 124 * batch.targets["normals"][index].permute(1, 2, 0).numpy()
        save(root / f"normal/{index}.png", normals.round().astype(numpy.uint8))
    (root / "train.txt").write_text("\n".join(map(str, range(5))))
    (root / "test.txt").write_text("5")
    return rows(frames(root, validation=1), [0, 1, 2])


def draw_nyuv2(root: Path) -> list[list[Pixels]]:
    """Rooms as MTAN's arrays; below each what a network sees of it in one epoch and in the next."""
    _, batch, photographs = rooms((120, 160), 4)
    for index, photograph in enumerate(photographs):
        found = {
            "image": (photograph / 255).astype(numpy.float32),
            "label": batch.targets["segmentation"][index].numpy(),
            "depth": batch.targets["depth"][index].permute(1, 2, 0).numpy(),
            "normal": batch.targets["normals"][index].permute(1, 2, 0).numpy(),
        }
        for name, array in found.items():
            path = root / ("val" if index == 3 else "train") / name / f"{index}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            numpy.save(path, array)
    data = nyuv2(root, validation=1)
    pictures = rows(data, [0])
    for epoch in (0, 1):
        moved = next(data.train.batches(2, shuffle=False, epoch=epoch))
        views = [data.views[task.name].image(moved.target_of(task)[0]) for task in data.tasks]
        pictures.append([data.show_input(moved.inputs[0]), *views])
    return pictures


def draw_cityscapes(root: Path) -> list[list[Pixels]]:
    """Rooms as streets, in the layout of pictures: image, classes, parts, disparity."""
    data = scenes((96, 192), train=6, validation=1, test=1, samples=2, tasks=("segmentation", "parts", "depth"))
    batch = data.train[:]
    street = numpy.array([26, 21, 23, 24, 7, 11, 20, 19, 28, 12, 17, 13, 22])  # what each thing in a room stands for
    for index in range(6):
        folder = root / ("val" if index == 5 else "train")
        ids = street[batch.targets["segmentation"][index].numpy()]
        save(folder / f"image/{index}.png", data.show_input(batch.inputs[index]))
        save(folder / f"seg/{index}.png", ids.astype(numpy.uint8))
        parts = 1 + batch.targets["parts"][index].numpy() % 5
        uids = numpy.where(numpy.isin(ids, (24, 26, 28)), ids * 100_000 + 100 + parts, ids)
        save(folder / f"part_seg/{index}.tif", uids.astype(numpy.int32))
        # Of a full-size image ten times as wide as this one.
        disparity = 1 + 256 * 250 / batch.targets["depth"][index, 0].numpy()
        save(folder / f"depth/{index}.png", disparity.astype(numpy.uint16), "I;16")
    return rows(cityscapes(root, validation=1), [0, 1, 2])


def draw_pascal_context(root: Path) -> list[list[Pixels]]:
    """Rooms of several sizes, with an invented person: image, classes, parts, normals, saliency, edges."""
    ids = [f"2008_{index:06}" for index in range(4)]
    for place, size in enumerate(((120, 160), (150, 110), (120, 160), (90, 160))):
        _, batch, photographs = rooms(size, place + 2)
        last = {name: target[-1].numpy() for name, target in batch.targets.items()}
        save(root / f"JPEGImages/{ids[place]}.jpg", photographs[-1])
        things = last["segmentation"]
        save(root / f"semseg/pascal-context/{ids[place]}.png", numpy.where(things < 6, 0, things).astype(numpy.uint8))
        normals = numpy.round(127.5 + 127.5 * last["normals"].transpose(1, 2, 0)).astype(numpy.uint8)
        save(root / f"normals_distill/{ids[place]}.png", normals)
        save(root / f"sal_distill/{ids[place]}.png", (255 * (things > 6)).astype(numpy.uint8))
        labels = numpy.array([158, 68, 440, 454, 115, 287, 330, 397, 46, 72, 10, 289, 232])[things]
        folder = root / "pascal-context" / "trainval"
        folder.mkdir(parents=True, exist_ok=True)
        scipy.io.savemat(folder / f"{ids[place]}.mat", {"LabelMap": labels.astype(numpy.uint16)})
        write_parts(root / "human_parts" / f"{ids[place]}.mat", size)
    lists = root / "ImageSets" / "Context"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(ids[:3]))
    (lists / "val.txt").write_text(ids[3])
    return rows(pascal_context(root, size=(160, 160), validation=1), [0, 1])


def write_parts(path: Path, size: tuple[int, int]) -> None:
    """A person in the middle, made of ellipses."""
    height, width = size
    places = {
        "head": (0.38, 0.10, 0.62, 0.28),
        "torso": (0.36, 0.28, 0.64, 0.60),
        "luarm": (0.26, 0.30, 0.38, 0.48),
        "ruarm": (0.62, 0.30, 0.74, 0.48),
        "llarm": (0.20, 0.46, 0.32, 0.64),
        "rlarm": (0.68, 0.46, 0.80, 0.64),
        "luleg": (0.38, 0.56, 0.50, 0.78),
        "ruleg": (0.50, 0.56, 0.62, 0.78),
        "llleg": (0.38, 0.74, 0.50, 0.96),
        "rlleg": (0.50, 0.74, 0.62, 0.96),
    }
    parts = numpy.zeros((1, len(places)), [("part_name", "O"), ("mask", "O")])
    for index, (name, (left, top, right, bottom)) in enumerate(places.items()):
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).ellipse((left * width, top * height, right * width, bottom * height), fill=1)
        parts[0, index] = (name, numpy.array(mask))
    one = numpy.zeros((1, 1), [("class", "O"), ("class_ind", "O"), ("mask", "O"), ("parts", "O")])
    one[0, 0] = ("person", 15.0, numpy.zeros(size, numpy.uint8), parts)
    outer = numpy.zeros((1, 1), [("imname", "O"), ("objects", "O")])
    outer[0, 0] = (path.stem, one)
    path.parent.mkdir(exist_ok=True)
    scipy.io.savemat(path, {"anno": outer}, do_compression=True)


def draw_celeba(root: Path) -> list[list[Pixels]]:
    """Drawn faces: image, and whether it has each of six attributes."""
    shown = ["Bald", "Bangs", "Big_Lips", "Big_Nose", "Black_Hair", "Smiling"]
    generator = numpy.random.default_rng(4)
    labels = generator.integers(0, 2, (16, len(ATTRIBUTES)))
    labels[:, ATTRIBUTES.index("Black_Hair")] &= 1 - labels[:, ATTRIBUTES.index("Bald")]
    labels[:, ATTRIBUTES.index("Bangs")] &= 1 - labels[:, ATTRIBUTES.index("Bald")]
    names = [f"{index + 1:06}.jpg" for index in range(len(labels))]
    for name, row in zip(names, labels, strict=True):
        has = dict(zip(ATTRIBUTES, row, strict=True))
        save(root / "Img" / "img_align_celeba" / name, face(has, generator))
    signs = [" ".join("1" if label else "-1" for label in row) for row in labels]
    text = [f"{name} {row}" for name, row in zip(names, signs, strict=True)]
    for path, lines in (
        (root / "Anno" / "list_attr_celeba.txt", [str(len(names)), " ".join(ATTRIBUTES), *text]),
        (root / "Eval" / "list_eval_partition.txt", [f"{n} {max(i - 13, 0)}" for i, n in enumerate(names)]),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines))
    data = celeba(root, shown, share=1.0, size=(109, 89))
    return rows(data, [1, 3, 6])


def face(has: dict[str, Any], generator: numpy.random.Generator) -> Pixels:
    """A face that has what it should have."""
    picture = Image.new("RGB", (178, 218), tuple(generator.integers(120, 220, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    skin = (200 + int(generator.integers(0, 40)), 160 + int(generator.integers(0, 30)), 130)
    hair = (20, 18, 22) if has["Black_Hair"] else (150, 100, 50)
    if not has["Bald"]:
        draw.ellipse((28, 20, 150, 160), fill=hair)
    draw.ellipse((38, 45, 140, 195), fill=skin)
    if has["Bangs"]:
        draw.pieslice((38, 30, 140, 130), 180, 360, fill=hair)
    for x in (70, 108):
        draw.ellipse((x - 9, 95, x + 9, 107), fill="white")
        draw.ellipse((x - 4, 97, x + 4, 105), fill=(40, 60, 90))
    nose = 14 if has["Big_Nose"] else 7
    draw.polygon([(89, 105), (89 - nose, 138), (89 + nose, 138)], fill=tuple(c - 30 for c in skin))
    thick = 12 if has["Big_Lips"] else 5
    if has["Smiling"]:
        draw.arc((65, 135, 113, 172), 15, 165, fill=(170, 40, 50), width=thick)
    else:
        draw.line((70, 163, 108, 163), fill=(170, 40, 50), width=thick)
    return numpy.array(picture)


def draw_cifar100_domains(root: Path) -> list[list[Pixels]]:
    """Rooms of 32×32 pixels: augmented images of six domains, from two epochs."""
    data, batch, _ = rooms((32, 32), 100)
    pixels = torch.stack([torch.from_numpy(data.show_input(one).copy()) for one in batch.inputs]).permute(0, 3, 1, 2)
    folder = root / "cifar-100-binary"
    folder.mkdir()
    for split, count in COUNTS.items():
        fine = numpy.arange(count) % 100
        ids = [(fine // 5)[:, None], fine[:, None]]
        records = numpy.concatenate([*ids, pixels.numpy().reshape(100, -1)[fine]], axis=1)
        records.astype(numpy.uint8).tofile(folder / f"{split}.bin")
    (folder / "coarse_label_names.txt").write_text("\n".join(TASKS))
    (folder / "fine_label_names.txt").write_text("\n".join(f"class {index}" for index in range(100)))
    found = cifar100_domains(root)
    batches = [next(found.train.batches(6, seed=seed)).inputs for seed in range(2)]
    names = [task.name for task in found.tasks][:6]
    return [[found.show_input(batch[name][0]).repeat(3, 0).repeat(3, 1) for name in names] for batch in batches]


def draw_digits(root: Path) -> list[list[Pixels]]:
    """The scans that scikit-learn brings, as files of MNIST: image and both labels."""
    tiles, labels = _scans()
    for name, chosen in (("train", slice(0, 1200)), ("t10k", slice(1200, 1700))):
        images, ids = tiles[chosen].numpy(), labels[chosen].numpy().astype(numpy.uint8)
        for stem, array in ((f"{name}-images-idx3-ubyte", images), (f"{name}-labels-idx1-ubyte", ids)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (root / stem).write_bytes(head + array.tobytes())
    data = digits(64, 8, 8, source="mnist", root=root)
    return [[picture.repeat(2, 0).repeat(2, 1) for picture in row] for row in rows(data, [0, 1, 2])]


def draw_rlbench(root: Path) -> list[list[Pixels]]:
    """A drawn arm, two tasks: at three steps the image, and the action as bars."""
    names = ["reach_target", "push_button"]
    for place, name in enumerate(names):
        for number in range(3):
            write_demonstration(root / name / f"episode{number}", 10 * place + number)
    data = rlbench(root, names, size=(96, 96))
    found = []
    for name in names:
        batch = data.train.parts[name][[0, 4, 8]]
        shown = zip(batch.inputs, batch.targets[name], strict=True)
        views = [(data.show_input(image), data.views[name].image(action)) for image, action in shown]
        found.append([picture for pair in views for picture in pair])
    return found


def write_demonstration(folder: Path, seed: int) -> None:
    """An arm of two links that reaches for a disc."""
    generator = numpy.random.default_rng(seed)
    goal, start = generator.uniform([1.0, 0.3], [1.5, 0.9]), generator.uniform([1.8, 0.6], [2.4, 1.4])
    path = numpy.linspace(start, goal, 9)
    speed = numpy.gradient(path, axis=0) * 8
    for step, (shoulder, elbow) in enumerate(path):
        picture = Image.new("RGB", (128, 128), (225, 222, 214))
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, 112, 128, 128), fill=(150, 111, 72))

        def joint(angle: float, other: float | None = None) -> tuple[float, float]:
            x, y = 64 + 45 * math.cos(angle), 112 - 45 * math.sin(angle)
            if other is not None:
                x, y = x + 40 * math.cos(angle - other), y - 40 * math.sin(angle - other)
            return x, y

        x, y = joint(*goal)
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill=(222, 60, 50))
        draw.line([(64, 112), joint(shoulder), joint(shoulder, elbow)], fill=(70, 80, 100), width=8, joint="curve")
        save(folder / "front_rgb" / f"{step}.png", numpy.array(picture))
    ones = numpy.ones((len(path), 1))
    numpy.save(folder / "state.npy", numpy.concatenate([path, ones], axis=1))
    numpy.save(folder / "action.npy", numpy.concatenate([speed, 0.5 * ones], axis=1))


DRAWN: dict[str, Callable[[Path], list[list[Pixels]]]] = {
    "celeba": draw_celeba,
    "cifar100_domains": draw_cifar100_domains,
    "cityscapes": draw_cityscapes,
    "digits": draw_digits,
    "frames": draw_frames,
    "nyuv2": draw_nyuv2,
    "pascal_context": draw_pascal_context,
    "rlbench": draw_rlbench,
    "virtual_kitti": draw_virtual_kitti,
}


def main() -> None:
    """Draw those asked for, or all."""
    for name in sys.argv[1:] or DRAWN:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
            os.environ["SIDETASK_CACHE"] = cache
            picture = gallery(DRAWN[name](Path(folder)), gap=4)
        path = HERE / "images" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path, optimize=True)


if __name__ == "__main__":
    main()
