"""Numbers from MATLAB's files: small ones of version 5, and arrays of version 7.3, which are HDF5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from sidetask_datasets.files import DataError
from sidetask_datasets.mat5 import parse

_BROKEN = (OSError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, MemoryError, RuntimeError)


def read_mat(path: Path) -> dict[str, NDArray[Any]]:
    """The variables of a file of version 5, see `mat5.parse`.

    Raises:
        DataError: if it is not there, is of another version or cannot be read.
    """
    try:
        return parse(path.read_bytes())
    except (OSError, ValueError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read as a MATLAB file of version 5: {error}") from error


def read_vectors(path: Path) -> dict[str, NDArray[numpy.int64]]:
    """Those variables of a file of version 5 that are vectors of whole numbers."""
    return {name: vector for name, value in read_mat(path).items() if (vector := _whole(value)) is not None}


def read_vector(path: Path, length: int) -> NDArray[numpy.int64]:
    """The one vector of so many whole numbers in a file of version 5, also within structures.

    Raises:
        DataError: if there is none, or several that differ.
    """
    found = [vector for value in _leaves(read_mat(path)) if (vector := _whole(value)) is not None]
    found = [vector for vector in found if len(vector) == length]
    if not found or any((vector != found[0]).any() for vector in found):
        raise DataError(f"{path}: expected one vector of {length} whole numbers, found {len(found)}")
    return found[0]


def length(path: Path, name: str) -> int:
    """Number of rows of an array in a file of version 7.3."""
    with _dataset(path, name) as array:
        return int(array.shape[0])


def read_row(path: Path, name: str, number: int, shape: tuple[int, ...], kind: str) -> NDArray[Any]:
    """One row of an array in a file of version 7.3.

    Args:
        path: of the file.
        name: of the array.
        number: of the row.
        shape: that it must have.
        kind: of its type, by numpy's letter: "u" or "f".

    Raises:
        DataError: if the file cannot be read, or holds something else there.
    """
    with _dataset(path, name) as array:
        if array.ndim != len(shape) + 1 or array.shape[1:] != shape or array.dtype.kind != kind:
            raise DataError(f"{path}: {name}: expected {[None, *shape]}, found {array.dtype} {list(array.shape)}")
        if not 0 <= number < array.shape[0]:
            raise DataError(f"{path}: {name}: there is no row {number} of {array.shape[0]}")
        row: NDArray[Any] = array[number]
        return row


class _dataset:  # noqa: N801 -- reads as the function it is
    """An array of an HDF5 file, while it is open; every failure is one of the file."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def __enter__(self) -> Any:
        try:
            import h5py
        except ImportError as error:
            raise DataError(f"{self.path}: needs h5py to be read; pip install 'sidetask-datasets[mat]'") from error
        try:
            self.file = h5py.File(self.path, "r")
        except _BROKEN as error:
            raise DataError(f"{self.path}: cannot be read as a MATLAB file of version 7.3: {error}") from error
        try:
            # A link, or data kept elsewhere, could lead to any file.
            inside = isinstance(self.file.get(self.name, getlink=True), h5py.HardLink)
            array = self.file[self.name] if inside else None
            if not isinstance(array, h5py.Dataset) or array.external or array.is_virtual or not array.ndim:
                raise DataError(f"{self.path}: has no array {self.name!r} of its own")
        except DataError:
            self.file.close()
            raise
        except _BROKEN as error:
            self.file.close()
            raise DataError(f"{self.path}: {self.name}: cannot be read: {error}") from error
        return array

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.file.close()
        if isinstance(error, _BROKEN) and not isinstance(error, DataError):
            raise DataError(f"{self.path}: {self.name}: cannot be read: {error}") from error


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _leaves(one)
    elif isinstance(value, numpy.ndarray) and (value.dtype.names or value.dtype == object):
        for one in value.flat:
            yield from _leaves(one)
    elif isinstance(value, numpy.void) and value.dtype.names:
        for name in value.dtype.names:
            yield from _leaves(value[name])
    else:
        yield value


def _whole(value: Any) -> NDArray[numpy.int64] | None:
    if (
        not isinstance(value, numpy.ndarray)
        or value.dtype.kind not in "iuf"
        or max(value.shape, default=0) != value.size
    ):
        return None
    flat = value.reshape(-1)
    if flat.dtype.kind == "f" and (not numpy.isfinite(flat).all() or (flat != flat.round()).any()):
        return None
    return flat.astype(numpy.int64)
