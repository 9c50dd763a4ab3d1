"""Datasets decoded once: compact arrays on the disk that later runs map into memory."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from sidetask_datasets.files import DataError, DataErrors, missing, open_array
from sidetask_datasets.source import Field, Item, Source

_FORMAT = 1
_CHUNK = 32  # samples that one process decodes before it reports; what a kill may lose
_INDEX, _DONE = "index.json", "done.jsonl"
_ROOM = "SIDETASK_CACHE"
T = TypeVar("T")


@dataclass(frozen=True)
class Cache:
    """Arrays of all splits, mapped into memory: nothing is read before it is used.

    Args:
        folder: that holds them.
        arrays: for each split and field all samples, ``[N, *shape]``. Writing to them changes no file.
    """

    folder: Path
    arrays: Mapping[str, Mapping[str, Tensor]]


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Where caches are kept: `folder`, or what the variable SIDETASK_CACHE says, or ``~/.cache/sidetask``."""
    return Path(folder or os.environ.get(_ROOM) or Path.home() / ".cache" / "sidetask").expanduser()


def prepare(
    source: Source,
    folder: str | os.PathLike[str] | None = None,
    *,
    jobs: int | None = None,
    progress: bool = True,
) -> Cache:
    """Decode a dataset into a cache, or find the one that is there.

    Every field has a folder of its own, so that asking for other fields later decodes these alone. It is found by what
    decides its content: the dataset's reading rules and options, and the names, sizes and times of change of its files.
    It is used only if its arrays have the checksums they were written with, else it is made anew. Several processes may
    ask at once: one works, the others wait.

    Args:
        source: the files.
        folder: where caches are kept, see `cache_folder`.
        jobs: processes that decode. They import the main module, which has to be one that does nothing when it is
            imported; so the default, None, is threads in this process, which share most of the work: decoders leave
            Python's lock.
        progress: show a bar while decoding, if standard error is a terminal.

    Raises:
        DataErrors: naming every file that something is wrong with, or the splits that are empty.
            What could be decoded is kept aside, so that the
            same call, after these files are mended, decodes only what is missing, as it does after a kill.
        OSError: if the cache cannot be written.
    """
    if source.problems:
        raise DataErrors([*source.problems, *sorted(_damage(source, jobs, progress) - set(source.problems))])
    empty = [f"{source.root}: the split {split!r} is empty" for split, samples in source.splits.items() if not samples]
    if empty:
        raise DataErrors(empty)
    place = cache_folder(folder) / source.name
    place.mkdir(parents=True, exist_ok=True)
    root = str(source.root.resolve())
    with FileLock(place / f"{_digest(root)[:16]}.lock"):
        units = {name: _unit(source.only(name), place, name, root) for name in source.fields}
        found = {name: _opened(unit) for name, unit in units.items()}
        lacking = [units[name] for name, arrays in found.items() if arrays is None]
        _build(source.name, lacking, jobs, progress)
        for unit in lacking:
            found[unit.name] = _opened(unit)
            if found[unit.name] is None:
                raise DataError(f"{unit.final}: was written and cannot be read back")
    return Cache(
        place, {split: {name: arrays[split] for name, arrays in found.items() if arrays} for split in source.splits}
    )


@dataclass(frozen=True)
class _Unit:
    """One field of all samples: what is cached, or missing, as a whole."""

    name: str
    source: Source  # with this field alone
    chunks: Mapping[str, str]  # some samples after the other: what their files are
    part: Path  # while it is decoded
    final: Path

    @property
    def field(self) -> Field:
        return self.source.fields[self.name]

    def path(self, folder: Path, split: str) -> Path:
        return folder / f"{split}.npy"


def _unit(source: Source, place: Path, name: str, root: str) -> _Unit:
    chunks = {}
    for split, samples in source.splits.items():
        for chunk in _chunks(split, len(samples)):
            _, start, stop = chunk.split()
            chunks[chunk] = source.fingerprint(split, int(start), int(stop))
    # Apart from the files' state, so that what an older state of them left can be found and taken away.
    stem = f"{name}-{_digest(source.layout, root)[:16]}"
    return _Unit(name, source, chunks, place / f"{stem}.part", place / f"{stem}-{_digest(chunks)[:16]}")


def _chunks(split: str, count: int) -> list[str]:
    return [f"{split} {start} {min(start + _CHUNK, count)}" for start in range(0, count, _CHUNK)]


def _opened(unit: _Unit) -> dict[str, Tensor] | None:
    """The arrays of a field, None if they are not there, not whole, or not of these files."""
    index = _read_json(unit.final / _INDEX)
    right = {"format": _FORMAT, "layout": unit.source.layout, "chunks": dict(unit.chunks)}
    sums = index.get("checksums")
    if any(index.get(key) != value for key, value in right.items()) or not isinstance(sums, dict):
        return None
    arrays = {}
    for split, samples in unit.source.splits.items():
        path = unit.path(unit.final, split)
        array = _mapped(path, unit.field, len(samples))
        if array is None or sums.get(split) != _checksum(path):
            return None
        arrays[split] = torch.from_numpy(array)
    return arrays


def _mapped(path: Path, field: Field, count: int) -> NDArray[Any] | None:
    try:
        # Copy on write: torch asks for memory that may be written to, and the file stays as it is.
        array = open_array(path, "c" if count else None)
    except (OSError, ValueError, EOFError):
        return None
    right = array.shape == (count, *field.shape) and array.dtype == numpy.dtype(field.dtype)
    return array if right else None


def _build(title: str, units: Sequence[_Unit], jobs: int | None, progress: bool) -> None:
    """Decode what is missing in each unit's folder `part`, which becomes `final` when it is whole."""
    todo = []
    for unit in units:
        there = _started(unit)
        todo += [(unit, chunk) for chunk in unit.chunks if chunk not in there]
    total = sum(_length(chunk) for unit in units for chunk in unit.chunks)
    done = total - sum(_length(chunk) for _, chunk in todo)
    problems: list[str] = []
    off = None if progress and total else True  # None: where standard error is no terminal
    with tqdm(total=total, initial=done, desc=title, unit="file", disable=off) as bar:
        for unit, chunk, (wrong, checksum) in _work(_decode, todo, jobs):
            if wrong:
                problems += wrong
            else:
                # A line each: a file that were written anew would grow with what is done.
                with (unit.part / _DONE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps([chunk, unit.chunks[chunk], checksum]) + "\n")
            bar.update(_length(chunk))
    if problems:
        raise DataErrors(sorted(set(problems)))
    for unit in units:
        sums = {split: _checksum(unit.path(unit.part, split)) for split in unit.source.splits}
        index = {"format": _FORMAT, "layout": unit.source.layout, "chunks": dict(unit.chunks), "checksums": sums}
        _write_json(unit.part / _INDEX, {**index, "root": str(unit.source.root.resolve())})
        shutil.rmtree(unit.final, ignore_errors=True)
        unit.part.rename(unit.final)
        (unit.final / _DONE).unlink(missing_ok=True)
        for old in unit.final.parent.glob(f"{unit.part.stem}-*"):
            if old != unit.final:
                shutil.rmtree(old, ignore_errors=True)


def _started(unit: _Unit) -> dict[str, tuple[str, int]]:
    """The chunks of a unit that are decoded, of which files, and the checksum of their rows, which they still have.

    The unit's folder is there afterwards, with an array for each split.
    """
    layout, *lines = _read_lines(unit.part / _DONE) or [None]
    if layout != unit.source.layout:
        shutil.rmtree(unit.part, ignore_errors=True)
        unit.part.mkdir(parents=True)
        lines = []
    said: dict[str, tuple[str, int]] = {chunk: (files, checksum) for chunk, files, checksum in lines}
    arrays = {}
    for split, samples in unit.source.splits.items():
        path = unit.path(unit.part, split)
        array = _mapped(path, unit.field, len(samples))
        if array is None:
            _create(path, unit.field, len(samples))
        else:
            arrays[split] = array
    there = {}
    for chunk, files in unit.chunks.items():
        split, start, stop = chunk.split()
        found, checksum = said.get(chunk, ("", 0))
        if found == files and split in arrays and _row_checksum(arrays[split][int(start) : int(stop)]) == checksum:
            there[chunk] = found, checksum
    # Without the end of a line that a kill cut short, which the next one would go on.
    lines = [unit.source.layout, *([chunk, *what] for chunk, what in there.items())]
    _write(unit.part / _DONE, "".join(json.dumps(line) + "\n" for line in lines))
    return there


def _read_lines(path: Path) -> list[Any]:
    """What the lines of a file say, as far as they can be read: the first anything, the others chunks."""
    found: list[Any] = []
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            value = json.loads(line)
            if found and not (isinstance(value, list) and [type(v) for v in value] == [str, str, int]):
                break
            found.append(value)
    except (OSError, ValueError):
        pass
    return found


def _length(chunk: str) -> int:
    _, start, stop = chunk.split()
    return int(stop) - int(start)


def _work(
    do: Callable[[_Unit, str], T], chunks: list[tuple[_Unit, str]], jobs: int | None
) -> Iterator[tuple[_Unit, str, T]]:
    """Each chunk, when it is done, with what that gave."""
    if jobs == 1:
        for unit, chunk in chunks:
            yield unit, chunk, do(_only(unit, chunk), chunk)
        return
    pool: Executor
    if jobs is None:
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    else:
        pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    with pool:
        futures = {pool.submit(do, _only(unit, chunk), chunk): (unit, chunk) for unit, chunk in chunks}
        try:
            for future in as_completed(futures):
                yield *futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()


def _only(unit: _Unit, chunk: str) -> _Unit:
    """The unit with the samples of one chunk, which is all that a process has to be sent."""
    split, start, stop = chunk.split()
    samples = {split: list(unit.source.splits[split][int(start) : int(stop)])}
    return replace(unit, source=replace(unit.source, splits=samples, problems=()), chunks={})


def _decode(unit: _Unit, chunk: str) -> tuple[list[str], int]:
    """Read the samples of a chunk into their array; what is wrong with them, and the checksum of the rows."""
    split, start, stop = chunk.split()
    problems = []
    array = open_array(unit.path(unit.part, split), "r+")
    for index, value in enumerate(_values(unit, split), start=int(start)):
        if isinstance(value, str):
            problems.append(value)
        else:
            array[index] = value
    if isinstance(array, numpy.memmap):
        array.flush()
    return problems, _row_checksum(array[int(start) : int(stop)])


def _inspect(unit: _Unit, chunk: str) -> list[str]:
    """Read the samples of a chunk for nothing but what is wrong with them."""
    return [value for value in _values(unit, chunk.split(maxsplit=1)[0]) if isinstance(value, str)]


def _values(unit: _Unit, split: str) -> Iterator[NDArray[Any] | str]:
    """What is stored of each sample, or what is wrong with it."""
    field = unit.field
    for sample in unit.source.splits[split]:
        path = sample[unit.name][0]
        try:
            value = field.read(*sample[unit.name])
            if value.shape != field.shape:
                raise DataError(f"{path}: expected shape {list(field.shape)}, found {list(value.shape)}")
            if value.dtype != numpy.dtype(field.dtype):
                raise TypeError(f"{path}: the reader of {unit.name!r} gave {value.dtype}, not {field.dtype}")
            yield value
        except DataError as error:
            yield str(error)
        except (OSError, ValueError, OverflowError, MemoryError, EOFError, SyntaxError) as error:
            yield f"{path}: cannot be read: {type(error).__name__}: {error}"


def _damage(source: Source, jobs: int | None, progress: bool) -> set[str]:
    """What is wrong with the samples that have all their files, in a tree where others have not."""
    whole = {split: [sample for sample in samples if _is_whole(sample)] for split, samples in source.splits.items()}
    units = [_Unit(name, replace(source.only(name), splits=whole), {}, Path(), Path()) for name in source.fields]
    chunks = [(unit, chunk) for unit in units for split in whole for chunk in _chunks(split, len(whole[split]))]
    problems: set[str] = set()
    off = None if progress and chunks else True
    with tqdm(total=sum(_length(chunk) for _, chunk in chunks), desc=source.name, unit="file", disable=off) as bar:
        for _, chunk, wrong in _work(_inspect, chunks, jobs):
            problems.update(wrong)
            bar.update(_length(chunk))
    return problems


def _is_whole(sample: Mapping[str, Item]) -> bool:
    return not missing(part for item in sample.values() for part in item if isinstance(part, Path))


def _create(path: Path, field: Field, count: int) -> None:
    array = numpy.lib.format.open_memmap(path, "w+", numpy.dtype(field.dtype), (count, *field.shape))
    array.flush()
    if hasattr(os, "posix_fallocate"):
        try:
            # On a full disk, writing into a mapped file that has no room of its own would kill the process.
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError:
            path.unlink()
            raise


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _row_checksum(rows: NDArray[Any]) -> int:
    value = 0
    for row in rows:
        value = zlib.crc32(row.tobytes(), value)
    return value


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """What a file says, nothing if it says nothing that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write(path, json.dumps(content, ensure_ascii=False))


def _write(path: Path, text: str) -> None:
    """The whole text, or what was there before."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)
