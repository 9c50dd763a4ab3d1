"""MATLAB files of version 5, the format of "MAT-File Format" (MathWorks), level 5, section 1.

Our own reader, because a damaged file can make the compiled one of scipy crash the process. Of what such a file can
hold it knows numbers, texts, structures and cells; whatever is wrong is a ValueError.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any

import numpy
from numpy.typing import NDArray

_HEAD = 128
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCT, _CHAR = 1, 2, 4
_DEEPEST = 32


def parse(content: bytes, most: int = 1 << 29) -> dict[str, NDArray[Any]]:
    """The variables of a file, by name.

    Numbers come in the type that they are stored in, texts as an array with a text for each row, structures with a
    field of objects for each of theirs, cells as objects.

    Args:
        content: of the file.
        most: bytes that it may have, unpacked: a few compressed ones can claim any number.

    Raises:
        ValueError: if it is not such a file, or damaged.
    """
    head = content[:_HEAD]
    order = {b"IM": "<", b"MI": ">"}.get(head[126:128])
    if order is None or not head.startswith(b"MATLAB") or struct.unpack(f"{order}H", head[124:126]) != (0x0100,):
        raise ValueError("it does not begin as a MATLAB file of version 5")
    found = {}
    left = most
    place = _HEAD
    while place < len(content):
        kind, piece, place = _element(content, place, order, padded=False)
        if kind == _COMPRESSED:
            stream = zlib.decompressobj()
            try:
                unpacked = stream.decompress(piece, left + 1)
            except zlib.error as error:
                raise ValueError(f"a compressed variable is damaged: {error}") from error
            left -= len(unpacked)
            if left < 0:
                raise ValueError(f"it unpacks to more than {most} bytes")
            if not stream.eof:
                raise ValueError("a compressed variable is cut short")
            kind, piece, _ = _element(unpacked, 0, order)
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} where a variable should be")
        name, value = _Reader(piece, order).matrix()
        if name:
            found[name] = value
    return found


def _element(content: bytes, place: int, order: str, padded: bool = True) -> tuple[int, bytes, int]:
    """An element's type and data, and where the next one begins."""
    if place + 8 > len(content):
        raise ValueError("it is cut short")
    (tag,) = struct.unpack_from(f"{order}I", content, place)
    if tag >> 16:
        # A small element: type and size share four bytes, the data are in the other four.
        kind, size, start, after = tag & 0xFFFF, tag >> 16, place + 4, place + 8
        if size > 4:
            raise ValueError("a small element has more than four bytes")
    else:
        kind, (size,), start = tag, struct.unpack_from(f"{order}I", content, place + 4), place + 8
        after = start + size + (-size % 8 if padded and kind != _COMPRESSED else 0)
    if start + size > len(content):
        raise ValueError("it is cut short")
    return kind, content[start : start + size], after


class _Reader:
    """Reads the parts of one variable after the other."""

    def __init__(self, content: bytes, order: str, depth: int = 0) -> None:
        if depth > _DEEPEST:
            raise ValueError("its structures are nested too deep")
        self.content, self.order, self.depth, self.place = content, order, depth, 0

    def matrix(self) -> tuple[str, NDArray[Any]]:
        """Name and value of the variable."""
        if not self.content:
            return "", numpy.zeros((0, 0))
        flags = self._number()
        kind = flags & 0xFF
        sizes = self._numbers()
        shape = tuple(int(n) for n in sizes) if sizes.dtype.kind != "f" else ()
        if not shape or len(shape) > 8 or min(shape) < 0:
            raise ValueError(f"an array of shape {list(shape)}")
        name = self._next()[1].decode("latin1")
        count = math.prod(shape)
        if kind == _STRUCT:
            return name, self._structure(shape, count)
        if kind == _CELL:
            cells = numpy.empty(self._affordable(count), object)
            for index in range(count):
                cells[index] = self._nested()
            return name, cells.reshape(shape, order="F")
        if kind == _CHAR:
            return name, self._text(shape, count)
        if 6 <= kind <= 15:
            if flags & 0x0800:
                raise ValueError(f"{name!r} has complex numbers")
            return name, self._filled(self._numbers(), shape, count)
        raise ValueError(f"{name!r} is of class {kind}, which is not read")

    def _structure(self, shape: tuple[int, ...], count: int) -> NDArray[Any]:
        width = self._number()
        names = self._next()[1]
        if width < 1 or len(names) % width:
            raise ValueError("a structure's names are damaged")
        fields = [names[i : i + width].split(b"\0")[0].decode("latin1") for i in range(0, len(names), width)]
        if not fields:
            return numpy.empty(shape if count == 0 else (0, 0), object)
        if len(set(fields)) < len(fields) or not all(fields):
            raise ValueError("a structure's names are damaged")
        found = numpy.empty(self._affordable(count * len(fields)) // len(fields), [(name, object) for name in fields])
        for index in range(count):
            for name in fields:
                found[name][index] = self._nested()
        return found.reshape(shape, order="F")

    def _text(self, shape: tuple[int, ...], count: int) -> NDArray[Any]:
        kind, data = self._next()
        if kind in _TEXTS:
            letters = numpy.array(list(data.decode(_TEXTS[kind], "replace")), "U1")
        elif kind in _NUMBERS:
            letters = numpy.array([chr(max(int(code), 0) & 0xFFFF) for code in self._values(kind, data)], "U1")
        else:
            raise ValueError(f"a text of type {kind}")
        rows = self._filled(letters, shape, count).reshape(shape[0], -1)
        return numpy.array(["".join(row) for row in rows])

    def _filled(self, values: NDArray[Any], shape: tuple[int, ...], count: int) -> NDArray[Any]:
        if len(values) != count:
            raise ValueError(f"an array of shape {list(shape)} has {len(values)} values")
        return values.reshape(shape, order="F")

    def _nested(self) -> NDArray[Any]:
        kind, data = self._next()
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} where an array should be")
        return _Reader(data, self.order, self.depth + 1).matrix()[1]

    def _affordable(self, count: int) -> int:
        """The count, which cannot be of more arrays than what is left has room for."""
        if count > (len(self.content) - self.place) // 8:
            raise ValueError(f"it has no room for {count} arrays")
        return count

    def _number(self) -> int:
        """The first of the numbers in the next element."""
        values = self._numbers()
        if not len(values) or values.dtype.kind == "f":
            raise ValueError("a number is missing")
        return int(values[0])

    def _numbers(self) -> NDArray[Any]:
        return self._values(*self._next())

    def _values(self, kind: int, data: bytes) -> NDArray[Any]:
        if kind not in _NUMBERS:
            raise ValueError(f"numbers of type {kind}")
        dtype = numpy.dtype(self.order + _NUMBERS[kind])
        if len(data) % dtype.itemsize:
            raise ValueError("numbers that are cut short")
        return numpy.frombuffer(data, dtype).astype(dtype.newbyteorder("="))

    def _next(self) -> tuple[int, bytes]:
        kind, data, self.place = _element(self.content, self.place, self.order)
        return kind, data
