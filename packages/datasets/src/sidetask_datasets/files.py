"""Reading what other people's folders hold: lists of ids and pictures, checked before they are believed."""

from __future__ import annotations

import errno
import re
import stat
import threading
import tokenize
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy
from numpy.typing import NDArray
from PIL import Image

# numpy reads headers by ast.literal_eval, which in Python 3.11 fails now and then while another thread does the same.
_HEADERS = threading.Lock()
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_SAID = 20  # of the lines of a list that are wrong: all may be
_LONGEST = 200  # file systems end names at 255 bytes, and an ending follows
_PIXELS_PER_BYTE = 10_000  # deflate makes 1032 bytes of one, and a byte holds eight pixels of two colours
_MODES = {
    "colour": ("RGB",),
    "vectors": ("RGB",),
    "bytes": ("L", "P"),
    "words": ("I;16", "I;16B", "I"),
    "numbers": ("I", "I;16", "I;16B", "L"),
}
_WANTED = {
    "colour": "8-bit RGB",
    "vectors": "8-bit RGB",
    "bytes": "8-bit grey",
    "words": "16-bit grey",
    "numbers": "integer",
}
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
# What a damaged header or body makes numpy and Pillow raise.
_BROKEN = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    KeyError,
    OverflowError,
    MemoryError,
    tokenize.TokenError,
)


class DataError(ValueError):
    """Something is wrong with a file; the message begins with its path."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, a line each, beginning with a path."""
        return (str(self),)


class DataErrors(DataError):
    """Something is wrong with several files; the first line of the message names one and says how many more.

    Args:
        problems: one line each, beginning with a path.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self._problems = tuple(problems)
        first, *others = self._problems
        more = f" (and {len(others)} more problems)" if others else ""
        super().__init__("\n".join([first + more, *others]))

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, a line each, beginning with a path."""
        return self._problems


def together(*readers: Callable[[], Any]) -> list[Any]:
    """What each of some readers of files gives.

    Raises:
        DataErrors: what is wrong with any of the files.
    """
    found: list[Any] = []
    problems: list[str] = []
    for read in readers:
        try:
            found.append(read())
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataErrors(list(dict.fromkeys(problems)))
    return found


def each_line(path: Path, take: Callable[[int, str], None]) -> None:
    """Go through the lines of a UTF-8 text file that are not empty.

    Args:
        path: of the file.
        take: is called with the number of each line, from 1, and the line, without blanks at its ends; raises a
            ValueError that says what is wrong with it.

    Raises:
        DataError: if the file cannot be read.
        DataErrors: for what is wrong with its lines: the first 20, and how many more there are.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    problems = []
    for number, line in enumerate(lines, start=1):
        try:
            if line := line.strip():
                take(number, line)
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    if len(problems) > _SAID:
        problems[_SAID:] = [f"{path}: something is wrong with {len(problems) - _SAID} more lines"]
    if problems:
        raise DataErrors(problems)


def read_ids(path: Path) -> list[str]:
    """The ids in a UTF-8 text file, one a line; empty lines are skipped.

    Raises:
        DataError: if the file cannot be read or holds no id.
        DataErrors: naming every line with an id that is there already, is too long or is anything but letters, digits,
            ``_``, ``-`` and single dots: it becomes part of a path.
    """
    ids: dict[str, int] = {}

    def take(number: int, name: str) -> None:
        if not _ID.fullmatch(name) or ".." in name:
            raise ValueError(
                f"{name!r} is not an id: letters, digits, '_', '-' and single dots, not beginning with a dot"
            )
        if len(name) > _LONGEST:
            raise ValueError(f"an id of {len(name)} characters; {_LONGEST} at most")
        if name in ids:
            raise ValueError(f"{name!r} is there already, in line {ids[name]}")
        ids[name] = number

    each_line(path, take)
    if not ids:
        raise DataError(f"{path}: holds no id")
    return list(ids)


def read_lists(files: Mapping[str, Path]) -> dict[str, list[str]]:
    """The ids of each split, see `read_ids`.

    Raises:
        DataErrors: what is wrong with any of the lists.
        DataError: if two of them share ids, naming the first.
    """
    lists = dict(zip(files, together(*(partial(read_ids, path) for path in files.values())), strict=True))
    for one, other in combinations(files, 2):
        if shared := sorted(set(lists[one]) & set(lists[other])):
            raise DataError(
                f"{files[other]}: {shared[0]!r} is also in {files[one]} ({len(shared)} shared); splits must be disjoint"
            )
    return lists


def check_ids(path: Path, pixels: NDArray[Any], classes: int) -> None:
    """Refuse a class id that has no name; 255 is unlabelled.

    Raises:
        DataError: naming it.
    """
    wrong = pixels[(pixels >= classes) & (pixels != 255)]
    if wrong.size:
        raise DataError(f"{path}: class id {wrong[0]}; there are {classes} classes, and 255 is unlabelled")


def is_file(path: Path) -> bool:
    """Whether there is a file; a link that leads nowhere or in a circle is none.

    Raises:
        DataError: if that cannot be found out: a folder that may not be entered, a name that is too long.
    """
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Whether there is a folder; see `is_file`."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return 0
        raise DataError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # a zero byte in its name
        raise DataError(f"{str(path)!r}: {error}") from error


def missing(paths: Iterable[Path]) -> list[str]:
    """A problem for each path that is not that of a file; a link that leads nowhere or in a circle is none."""
    problems = []
    for path in paths:
        try:
            if not is_file(path):
                problems.append(f"{path}: no such file")
        except DataError as error:
            problems.append(str(error))
    return problems


def read_picture(
    path: Path, kind: str, size: tuple[int, int] | None = None, original: tuple[int, int] | None = None
) -> NDArray[Any]:
    """The pixels of a JPEG, PNG or TIFF file.

    Args:
        path: of the file. Only the format that its ending names is decoded, whatever it holds.
        kind: "colour" or "vectors" ``[H, W, 3]`` uint8, "bytes" ``[H, W]`` uint8, "words" ``[H, W]`` uint16 or
            "numbers" ``[H, W]`` int32.
        size: the height and width to bring it to: colour by averaging what a new pixel covers, the others by taking
            the nearest pixel, since a mean of labels is no label.
        original: the height and width that the file must have.

    Raises:
        DataError: if it cannot be decoded, or has another size or another kind of pixel.
    """
    formats = (_FORMATS.get(path.suffix.lower(), "JPEG"),)
    try:
        with Image.open(path, formats=formats) as picture:
            _check_claim(path, picture)
            if picture.mode not in _MODES[kind]:
                raise DataError(f"{path}: expected {_WANTED[kind]} pixels, found mode {picture.mode!r}")
            if original is not None and picture.size != original[::-1]:
                found = f"{picture.height}×{picture.width}"
                raise DataError(f"{path}: expected {original[0]}×{original[1]} pixels, found {found}")
            whole: Image.Image = picture
            if kind == "colour" and size is not None and picture.size != size[::-1]:
                whole = picture.resize(size[::-1], Image.Resampling.BILINEAR)
            pixels = numpy.array(whole)
    except DataError:
        raise
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded as {formats[0]}: {error}") from error
    if kind == "numbers":
        pixels = pixels.astype(numpy.int32)
    if kind == "words":
        if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
            raise DataError(f"{path}: expected 16-bit values, found {pixels.min()} to {pixels.max()}")
        pixels = pixels.astype(numpy.uint16)
    return pixels if size is None else nearest(pixels, size)


def nearest(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """An array ``[H, W, ...]`` brought to another height and width, each new pixel the one at its centre."""
    if pixels.shape[:2] == size:
        return pixels
    rows = ((numpy.arange(size[0]) + 0.5) * pixels.shape[0] / size[0]).astype(int)
    columns = ((numpy.arange(size[1]) + 0.5) * pixels.shape[1] / size[1]).astype(int)
    return pixels[rows[:, None], columns[None, :]]


def averaged(pixels: NDArray[numpy.uint8], size: tuple[int, int]) -> NDArray[numpy.uint8]:
    """A photograph ``[H, W, 3]`` brought to another height and width, by averaging what a new pixel covers."""
    if pixels.shape[:2] == size:
        return pixels
    return numpy.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))


def open_array(path: Path, mode: Literal["r", "r+", "c"] | None = "r") -> Any:
    """`numpy.load` of what is no pickle, from any thread."""
    with _HEADERS:
        return numpy.load(path, mmap_mode=mode, allow_pickle=False)


def read_array(path: Path) -> NDArray[Any]:
    """The array in a .npy file, mapped: no more is read than is there, whatever the header says.

    Raises:
        DataError: if it is none; a pickle is never opened.
    """
    try:
        array = open_array(path)
    except _BROKEN as error:
        raise DataError(f"{path}: cannot be read as an array: {error}") from error
    if not isinstance(array, numpy.ndarray):
        array.close()
        raise DataError(f"{path}: cannot be read as an array: it is an archive")
    return array


def single(path: Path, values: NDArray[Any]) -> NDArray[numpy.float32]:
    """Numbers in single precision.

    Raises:
        DataError: if one is not finite, or not in single precision.
    """
    with numpy.errstate(over="ignore", invalid="ignore"):
        found = values.astype(numpy.float32)
    if not numpy.isfinite(found).all():
        raise DataError(f"{path}: holds values that are not finite in single precision")
    return found


def listed(folder: Path) -> list[str]:
    """The names in a folder, but for hidden ones.

    Raises:
        DataError: if it is not there or cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read as a folder: {error.strerror or error}") from error


def paired(folders: Mapping[str, Path], patterns: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The ids of the samples in some folders, each with a file for every sample.

    Args:
        folders: a folder for each field.
        patterns: for each field the name of a sample's file, with ``{}`` for the id.

    Returns:
        The ids that every folder has, numbers in order of their value, and a problem for each file that is missing,
        or that has no such name.

    Raises:
        DataError: for a folder that cannot be read.
    """
    found: dict[str, set[str]] = {}
    problems = []
    for name, folder in folders.items():
        front, back = patterns[name].split("{}")
        found[name] = set()
        for file in listed(folder):
            middle = file[len(front) : len(file) - len(back)]
            if file.startswith(front) and file.endswith(back) and _ID.fullmatch(middle):
                found[name].add(middle)
            else:
                problems.append(f"{folder / file}: does not belong here; files are {patterns[name].format('ID')}")
    every: set[str] = set().union(*found.values())
    for name, folder in folders.items():
        problems += missing(folder / patterns[name].format(id_) for id_ in sorted(every - found[name]))
        problems += missing(folder / patterns[name].format(id_) for id_ in sorted(found[name]))
    both = every.intersection(*found.values())
    return sorted(both, key=lambda id_: (0, int(id_), id_) if id_.isdecimal() else (1, 0, id_)), problems


def first_size(
    paths: Iterable[Path], measure: Callable[[Path], tuple[int, int]], problems: Sequence[str] = ()
) -> tuple[int, int]:
    """Height and width of the first picture that can be read, 0×0 if there is none.

    What is wrong with those before it shows when they are decoded, as it does with the others.

    Args:
        paths: of pictures; those that are not there are passed over.
        measure: height and width of one.
        problems: what is wrong beside.

    Raises:
        DataErrors: if there are some and none can be read: what is wrong with each, after `problems`.
    """
    damaged = []
    for path in paths:
        if not missing([path]):
            try:
                return measure(path)
            except DataError as error:
                damaged.append(str(error))
    if damaged:
        raise DataErrors([*problems, *damaged])
    return 0, 0


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, from its header.

    Raises:
        DataError: if it is not one.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as picture:
            _check_claim(path, picture)
            return picture.height, picture.width
    except DataError:
        raise
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded: {error}") from error


def _check_claim(path: Path, picture: Image.Image) -> None:
    """Refuse, before memory is taken and time is spent, a size that so few bytes cannot hold."""
    size = path.stat().st_size
    if not 0 < picture.height * picture.width <= _PIXELS_PER_BYTE * size:
        raise DataError(f"{path}: claims {picture.height}×{picture.width} pixels in {size} bytes")
