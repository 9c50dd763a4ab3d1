"""Arrays by number, ``SPLIT/FIELD/NUMBER.npy``: how the data of MTAN's experiments are handed round.

Copies differ in their types (single or double precision, labels as integers or as floats), so values are checked, not
types.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from sidetask_datasets.files import DataError, averaged, check_ids, nearest, paired, read_array, single
from sidetask_datasets.source import Item

Size = tuple[int, int]


def numbered(root: Path, folders: Mapping[str, str], ending: str = ".npy") -> tuple[dict[str, list[Item]], list[str]]:
    """The samples of one split, by field, in order of their numbers; and what is wrong with the tree."""
    places = {name: root / folder for name, folder in folders.items()}
    endings = {name: "{}" + (ending if "." not in folder else "") for name, folder in folders.items()}
    ids, problems = paired(places, endings)
    return {name: [(places[name] / endings[name].format(id_),) for id_ in ids] for name in folders}, problems


def shape_of(path: Path) -> Size:
    """Height and width of an array ``[H, W, ...]``.

    Raises:
        DataError: if it has less than two dimensions, or no pixels.
    """
    shape = read_array(path).shape
    if len(shape) < 2 or 0 in shape:
        raise DataError(f"{path}: expected an array [H, W, ...] of some pixels, found {list(shape)}")
    return shape[0], shape[1]


def read_image(path: Path, *, shape: Size, resize: Size | None = None) -> NDArray[Any]:
    """A photograph, ``[3, H, W]`` uint8, from ``[H, W, 3]``: uint8, or floats between 0 and 1."""
    values = _checked(path, shape, (3,))
    if values.dtype != numpy.uint8:
        if values.dtype.kind != "f":
            raise DataError(f"{path}: expected uint8, or floats between 0 and 1, found {values.dtype}")
        if values.min() < -1e-3 or values.max() > 1.001:
            raise DataError(f"{path}: expected values between 0 and 1, found {values.min():.4g} to {values.max():.4g}")
        values = (values.clip(0, 1) * 255.0).round().astype(numpy.uint8)
    return averaged(values, resize or shape).transpose(2, 0, 1)


def read_classes(path: Path, *, shape: Size, classes: int, resize: Size | None = None) -> NDArray[Any]:
    """Class ids, ``[H, W]`` uint8, 255 unlabelled; in the file it is −1."""
    values = _checked(path, shape, ())
    with numpy.errstate(invalid="ignore"):
        whole = values.round().astype(numpy.int64)
    if (values != whole).any():
        raise DataError(f"{path}: expected whole numbers, found {values[values != whole][0]:.4g}")
    if whole.size and whole.min() < -1:
        raise DataError(f"{path}: class id {whole.min()}; -1 is unlabelled")
    ids = numpy.where(whole < 0, 255, whole)
    check_ids(path, ids, classes)
    return nearest(ids.astype(numpy.uint8), resize or shape)


def read_positive(path: Path, *, shape: Size, resize: Size | None = None) -> NDArray[Any]:
    """Depth or disparity, ``[H, W]`` float32, 0 unlabelled."""
    values = _checked(path, shape, ())
    if values.size and values.min() < 0:
        raise DataError(f"{path}: expected values that are not negative, found {values.min():.4g}")
    return nearest(single(path, values), resize or shape)


def read_normals(path: Path, *, shape: Size, resize: Size | None = None) -> NDArray[Any]:
    """Unit vectors, ``[3, H, W]`` int16, of length 32767; 0 unlabelled."""
    values = _checked(path, shape, (3,)).astype(numpy.float64)
    with numpy.errstate(over="ignore"):
        lengths = numpy.sqrt((values**2).sum(axis=-1))
    if lengths.max() > 1.05:
        raise DataError(f"{path}: expected unit vectors, found one of length {lengths.max():.4g}")
    # Single ones may be shorter, where vectors of two surfaces were averaged.
    usual = numpy.median(lengths[lengths > 0]) if lengths.any() else 1.0
    if usual < 0.95:
        raise DataError(f"{path}: expected unit vectors, found a median length of {usual:.4g}")
    vectors = (values * 32767.0).round().clip(-32767, 32767).astype(numpy.int16)
    return nearest(vectors, resize or shape).transpose(2, 0, 1)


def _checked(path: Path, shape: Size, channels: tuple[int, ...]) -> NDArray[Any]:
    """The finite numbers in a file, ``[H, W, *channels]``; a last dimension of 1 may stand where none is wanted."""
    values = read_array(path)
    if values.dtype.kind not in "iuf":
        raise DataError(f"{path}: expected numbers, found {values.dtype}")
    if not channels and values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.shape != (*shape, *channels):
        raise DataError(f"{path}: expected shape {[*shape, *channels]}, found {list(values.shape)}")
    values = numpy.asarray(values)
    if not values.size:
        raise DataError(f"{path}: has no pixels")
    if values.dtype.kind == "f" and not numpy.isfinite(values).all():
        raise DataError(f"{path}: holds values that are not finite")
    return values
