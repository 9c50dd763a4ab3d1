"""PASCAL-Context with five tasks: photographs of objects, in the folders of the collection called PASCAL_MT.

The tree::

    root/ImageSets/Context/{train,val}.txt        one id a line
    root/JPEGImages/ID.jpg
    root/semseg/VOC12/ID.png or root/semseg/pascal-context/ID.png
                                                  8-bit class ids, 255 unlabelled
    root/human_parts/ID.mat                       a mask for each part of each object
    root/normals_distill/ID.png                   8-bit RGB, per component n = 2 x / 255 - 1
    root/sal_distill/ID.png                       8-bit grey, above one half is salient
    root/pascal-context/trainval/ID.mat           "LabelMap", ids of 459 classes

Normals and saliency are what other networks say of these images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    is_folder,
    missing,
    nearest,
    picture_size,
    read_lists,
    read_picture,
)
from sidetask_datasets.matlab import read_mat
from sidetask_datasets.source import Field, Item, Source

TASKS = ("segmentation", "human_parts", "normals", "saliency", "edges")
CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
PARTS = ("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")
_PART_OF = {
    **dict.fromkeys(("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"), 1),
    **dict.fromkeys(("neck", "torso"), 2),
    **dict.fromkeys(("luarm", "ruarm"), 3),
    **dict.fromkeys(("lhand", "llarm", "rhand", "rlarm"), 4),
    **dict.fromkeys(("luleg", "ruleg"), 5),
    **dict.fromkeys(("lfoot", "llleg", "rfoot", "rlleg"), 6),
}
_PERSON = 15
_UNLABELLED = 255
_FILL = tuple(round(255 * mean) for mean in MEAN)  # around images that are smaller than all are brought to
# Classes that NYU Depth v2 has too, by name, and the monitor: the network that gave the normals was trained there, and
# elsewhere what it says is not used.
# fmt: off
_NORMALS_COUNT = (
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56, 59,
    61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124, 135,
    141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215,
    216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272,
    273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323, 329,
    330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403, 405,
    407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457,
)
# fmt: on
_LABELS = 459
Shape = tuple[int, int]


def pascal_context(  # noqa: D417 -- what all adapters take is described in one place
    root: Folder,
    tasks: Sequence[str] = TASKS,
    *,
    size: Sequence[int] = (512, 512),
    validation: int = 500,
    primary: Iterable[str] | None = None,
    seed: int = 0,
    normals_loss: str = "l1",
    noise: bool = False,
    cache: Folder | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Photographs of many sizes, each in the middle of a frame of one size, unlabelled around.

    Pictures are brought down to the frame where they are larger, in proportion, and never enlarged. Parts count in
    images with a person alone. Normals count where the class is one that NYU Depth v2 names too. An edge is a pixel
    whose neighbour to the right or below is of another of the 459 classes (the literature thins the Laplacian of these,
    at most a pixel off). Training images are scaled, cropped and flipped.

    `primary`, `seed`, `normals_loss`, `noise`, `cache` and `device` are those of `adapter.read_dense`.

    Args:
        root: the folder.
        tasks: among "segmentation" (21 classes), "human_parts" (7), "normals", "saliency" and "edges".
        size: height and width of the frame; 512×512 holds every picture as it is.
        validation: so many ids, the last of train.txt (4998), are held out for model selection; val.txt (5105) is the
            test split.

    Raises:
        DataError: beginning with the path of the file at fault: one that is missing, damaged or of another size than
            its image, an id that could leave the folder, a class or part that does not exist. All problems of the
            images come together.
        ValueError: for an unknown task or loss, or a switch that is neither true nor false.
    """
    return read_dense(
        partial(pascal_context_source, root, tasks, size=size),
        classes={"segmentation": CLASSES, "human_parts": PARTS},
        normals_loss=normals_loss,
        validation=validation,
        primary=primary,
        seed=seed,
        noise=noise,
        cache=cache,
        device=device,
    )


def pascal_context_source(root: Folder, tasks: Sequence[str] = TASKS, *, size: Sequence[int] = (512, 512)) -> Source:
    """The files of `pascal_context`, which says what the arguments are and what is raised."""
    names = choose("task", tasks, TASKS)
    shape = check_size(size) or (512, 512)
    root = Path(root)
    lists_folder = root / "ImageSets" / "Context"
    lists = read_lists({"train": lists_folder / "train.txt", "test": lists_folder / "val.txt"})
    segmentation = next((f for f in ("VOC12", "pascal-context") if is_folder(root / "semseg" / f)), "VOC12")
    places = {
        "segmentation": ("semseg/" + segmentation, "png"),
        "human_parts": ("human_parts", "mat"),
        "normals": ("normals_distill", "png"),
        "saliency": ("sal_distill", "png"),
        "edges": ("pascal-context/trainval", "mat"),
    }
    splits: dict[str, list[dict[str, Item]]] = {}
    for split, ids in lists.items():
        splits[split] = []
        for id_ in ids:
            image = root / "JPEGImages" / f"{id_}.jpg"
            sample: dict[str, Item] = {"image": (image, image)}
            for name in names:
                folder, ending = places[name]
                sample[name] = (root / folder / f"{id_}.{ending}", image)
            if "normals" in names:
                folder, ending = places["edges"]
                sample["normals"] += (root / folder / f"{id_}.{ending}",)
            splits[split].append(sample)
    paths = dict.fromkeys(path for samples in splits.values() for s in samples for item in s.values() for path in item)
    fields = {
        "image": Field("image", (3, *shape), "uint8", partial(read_photograph, shape=shape), MEAN, STD),
        "segmentation": Field("classes", shape, "uint8", partial(read_classes, shape=shape)),
        "human_parts": Field("classes", shape, "uint8", partial(read_human_parts, shape=shape)),
        "normals": Field("normals", (3, *shape), "int16", partial(read_normals, shape=shape)),
        "saliency": Field("binary", shape, "uint8", partial(read_saliency, shape=shape)),
        "edges": Field("binary", shape, "uint8", partial(read_edges, shape=shape)),
    }
    return Source(
        name="pascal_context",
        root=root,
        fields={name: fields[name] for name in ("image", *names)},
        splits=splits,
        settings={"size": shape},
        problems=missing(paths),
    )


def read_photograph(path: Path, image: Path, *, shape: Shape) -> NDArray[Any]:
    """The image in its frame, ``[3, H, W]`` uint8, the mean colour around it."""
    inner, window = _frame(picture_size(image), shape)
    framed = numpy.empty((*shape, 3), numpy.uint8)
    framed[:] = _FILL
    framed[window] = read_picture(path, "colour", inner)
    return framed.transpose(2, 0, 1)


def read_classes(path: Path, image: Path, *, shape: Shape) -> NDArray[Any]:
    """Class ids in their frame, ``[H, W]`` uint8."""
    size = picture_size(image)
    pixels = read_picture(path, "bytes", None, size)
    check_ids(path, pixels, len(CLASSES))
    return _framed(pixels, size, shape, _UNLABELLED)


def read_human_parts(path: Path, image: Path, *, shape: Shape) -> NDArray[Any]:
    """Ids of the parts of persons in their frame, ``[H, W]`` uint8: all unlabelled where no person has any."""
    size = picture_size(image)
    parts = numpy.zeros(size, numpy.uint8)
    for name, mask in _masks(path):
        if name not in _PART_OF:
            raise DataError(f"{path}: unknown part of a person {name!r}")
        if mask.shape != size:
            raise DataError(f"{path}: expected a mask of {size[0]}×{size[1]} pixels, found {list(mask.shape)}")
        parts[mask.astype(bool)] = _PART_OF[name]
    return _framed(parts if parts.any() else numpy.full_like(parts, _UNLABELLED), size, shape, _UNLABELLED)


def read_normals(path: Path, image: Path, labels: Path, *, shape: Shape) -> NDArray[Any]:
    """Normals in their frame, ``[3, H, W]`` int16 of length 255 or so, 0 where they do not count."""
    size = picture_size(image)
    pixels = read_picture(path, "vectors", size).astype(numpy.int16)
    counts = numpy.isin(_label_map(labels, size), _NORMALS_COUNT)
    return _framed((2 * pixels - 255) * counts[..., None], size, shape, 0).transpose(2, 0, 1)


def read_saliency(path: Path, image: Path, *, shape: Shape) -> NDArray[Any]:
    """What is salient in its frame, ``[H, W]`` uint8: 1, 0, or 255 around."""
    size = picture_size(image)
    pixels = read_picture(path, "bytes", size)
    return _framed((pixels > 127).astype(numpy.uint8), size, shape, _UNLABELLED)


def read_edges(path: Path, image: Path, *, shape: Shape) -> NDArray[Any]:
    """Boundaries of labels in their frame, ``[H, W]`` uint8: 1, 0, or 255 around."""
    size = picture_size(image)
    # Brought to size before: boundaries one pixel wide would be lost.
    inner, window = _frame(size, shape)
    labels = nearest(_label_map(path, size), inner)
    edges = numpy.zeros(inner, numpy.uint8)
    edges[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edges[:-1] |= labels[:-1] != labels[1:]
    framed = numpy.full(shape, _UNLABELLED, numpy.uint8)
    framed[window] = edges
    return framed


def _masks(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Name and mask of every part of every person."""
    found = read_mat(path)
    if "anno" not in found:
        raise DataError(f"{path}: has no variable 'anno'")
    try:
        objects = found["anno"][0, 0]["objects"]
        for one in objects.flat:
            if int(one["class_ind"].item()) == _PERSON and one["parts"].size:
                for part in one["parts"].flat:
                    yield str(part["part_name"].item()), numpy.asarray(part["mask"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: 'anno' is not what PASCAL's part annotations are: {error}") from error


def _label_map(path: Path, size: Shape) -> NDArray[Any]:
    found = read_mat(path)
    if "LabelMap" not in found:
        raise DataError(f"{path}: has no variable 'LabelMap'")
    labels = found["LabelMap"]
    if labels.shape != size or labels.dtype.kind not in "uif":
        what = f"{labels.dtype} {list(labels.shape)}"
        raise DataError(f"{path}: expected LabelMap of {size[0]}×{size[1]} ids, found {what}")
    if not ((labels >= 0) & (labels <= _LABELS)).all():
        raise DataError(f"{path}: an id that is not between 0 and {_LABELS}")
    return labels.astype(numpy.int32)


def _frame(size: Shape, shape: Shape) -> tuple[Shape, tuple[slice, slice]]:
    """The size of the picture in its frame, and where it stands there."""
    scale = min(1.0, shape[0] / size[0], shape[1] / size[1])
    inner = max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)
    top, left = (shape[0] - inner[0]) // 2, (shape[1] - inner[1]) // 2
    return inner, (slice(top, top + inner[0]), slice(left, left + inner[1]))


def _framed(pixels: NDArray[Any], size: Shape, shape: Shape, fill: int) -> NDArray[Any]:
    inner, window = _frame(size, shape)
    framed = numpy.full((*shape, *pixels.shape[2:]), fill, pixels.dtype)
    framed[window] = nearest(pixels, inner)
    return framed
