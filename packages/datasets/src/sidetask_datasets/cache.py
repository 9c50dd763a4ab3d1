"""Datasets decoded once: compact arrays on the disk that later runs map into memory."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from sidetask_datasets.files import DataError, DataErrors
from sidetask_datasets.source import Field, Source

_FORMAT = 1
_CHUNK = 32  # samples that one process decodes before it reports; what a kill may lose
_INDEX, _DONE = "index.json", "done.json"
_ROOM = "SIDETASK_CACHE"


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

    A cache is found by what decides its content: the dataset's reading rules and options, and the names, sizes and
    times of change of its files. It is used only if its arrays have the checksums they were written with, else it is
    made anew. Several processes may ask at once: one works, the others wait.

    Args:
        source: the files.
        folder: where caches are kept, see `cache_folder`.
        jobs: processes that decode; None: one per core, or none beside this one where there is little to do.
        progress: show a bar while decoding, if standard error is a terminal.

    Raises:
        DataErrors: naming every file that something is wrong with. What could be decoded is kept aside, so that the
            same call, after these files are mended, decodes only what is missing, as it does after a kill.
        OSError: if the cache cannot be written.
    """
    if source.problems:
        raise DataErrors(source.problems)
    place = cache_folder(folder) / source.name
    place.mkdir(parents=True, exist_ok=True)
    name = _digest(source.layout, str(source.root.resolve()))[:16]
    chunks = dict(_chunks(source))
    final = place / f"{name}-{_digest(chunks)[:16]}"
    # The lock is on the dataset and its options, so that what an older state of the files left can be taken away.
    with FileLock(place / f"{name}.lock"):
        found = _opened(final, source, chunks)
        if found is None:
            shutil.rmtree(final, ignore_errors=True)
            _build(source, chunks, place / f"{name}.part", final, jobs, progress)
            for old in place.glob(f"{name}-*"):
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
            found = _opened(final, source, chunks)
        if found is None:
            raise DataError(f"{final}: was written and cannot be read back")
        return found


def _chunks(source: Source) -> Iterator[tuple[str, str]]:
    """Some samples after the other, and what their files are."""
    for split, samples in source.splits.items():
        for start in range(0, len(samples), _CHUNK):
            stop = min(start + _CHUNK, len(samples))
            yield f"{split} {start} {stop}", source.fingerprint(split, start, stop)


def _opened(folder: Path, source: Source, chunks: Mapping[str, str]) -> Cache | None:
    """The cache in a folder, None if it is not there, not whole, or not of these files."""
    index = _read_json(folder / _INDEX)
    if index.get("format") != _FORMAT or index.get("layout") != source.layout or index.get("chunks") != dict(chunks):
        return None
    arrays: dict[str, dict[str, Tensor]] = {}
    for split, samples in source.splits.items():
        arrays[split] = {}
        for name, field in source.fields.items():
            path = folder / _array_name(split, name)
            array = _mapped(path, field, len(samples))
            sums = index.get("checksums")
            if array is None or not isinstance(sums, dict) or sums.get(path.name) != _checksum(path):
                return None
            arrays[split][name] = torch.from_numpy(array)
    return Cache(folder, arrays)


def _mapped(path: Path, field: Field, count: int) -> NDArray[Any] | None:
    try:
        # Copy on write: torch asks for memory that may be written to, and the file stays as it is.
        array = numpy.load(path, mmap_mode="c" if count else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    right = array.shape == (count, *field.shape) and array.dtype == numpy.dtype(field.dtype)
    return array if right else None


def _build(
    source: Source, chunks: Mapping[str, str], part: Path, final: Path, jobs: int | None, progress: bool
) -> None:
    """Decode what is missing in the folder `part`, which becomes `final` when it is whole."""
    state = _read_json(part / _DONE)
    if state.get("layout") != source.layout:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        state = {"layout": source.layout, "chunks": {}}
    for split, samples in source.splits.items():
        for name, field in source.fields.items():
            if _mapped(part / _array_name(split, name), field, len(samples)) is None:
                _create(part / _array_name(split, name), field, len(samples))
                state["chunks"] = {key: value for key, value in state["chunks"].items() if key.split()[0] != split}
    missing = [chunk for chunk, files in chunks.items() if state["chunks"].get(chunk) != files]
    total = sum(len(samples) for samples in source.splits.values())
    problems: list[str] = []
    sizes = {chunk: int(chunk.split()[2]) - int(chunk.split()[1]) for chunk in missing}
    bar = tqdm(
        total=total,
        initial=total - sum(sizes.values()),
        desc=source.name,
        unit="sample",
        disable=None if progress else True,
    )
    with bar:
        for chunk, wrong in _decode_all(source, part, missing, jobs):
            if wrong:
                problems += wrong
            else:
                state["chunks"][chunk] = chunks[chunk]
                _write_json(part / _DONE, state)
            bar.update(sizes[chunk])
    if problems:
        raise DataErrors(sorted(problems))
    names = [_array_name(split, name) for split in source.splits for name in source.fields]
    sums = {name: _checksum(part / name) for name in names}
    index = {"format": _FORMAT, "layout": source.layout, "root": str(source.root.resolve()), "chunks": dict(chunks)}
    _write_json(part / _INDEX, {**index, "checksums": sums})
    (part / _DONE).unlink()
    part.rename(final)


def _decode_all(source: Source, part: Path, missing: list[str], jobs: int | None) -> Iterator[tuple[str, list[str]]]:
    """Each chunk, when it is in its arrays, with what was wrong in it."""
    if jobs is None:
        # A process takes seconds to start.
        jobs = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
        jobs = min(jobs, math.ceil(len(missing) / 16))
    if jobs <= 1:
        for chunk in missing:
            yield chunk, _decode(_only(source, chunk), part, chunk)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_decode, _only(source, chunk), part, chunk): chunk for chunk in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()


def _only(source: Source, chunk: str) -> Source:
    """The source with the samples of one chunk, which is all that a process has to be sent."""
    split, start, stop = chunk.split()
    return replace(source, splits={split: list(source.splits[split][int(start) : int(stop)])})


def _decode(source: Source, part: Path, chunk: str) -> list[str]:
    """Read the samples of a chunk into the arrays; what is wrong with them."""
    split, start, _ = chunk.split()
    problems = []
    for name, field in source.fields.items():
        array = numpy.load(part / _array_name(split, name), mmap_mode="r+", allow_pickle=False)
        for index, sample in enumerate(source.splits[split], start=int(start)):
            path = sample[name][0]
            try:
                value = field.read(*sample[name])
                if value.shape != field.shape:
                    raise DataError(f"{path}: expected shape {list(field.shape)}, found {list(value.shape)}")
                if value.dtype != numpy.dtype(field.dtype):
                    raise TypeError(f"{path}: the reader of {name!r} gave {value.dtype}, not {field.dtype}")
                array[index] = value
            except DataError as error:
                problems.append(str(error))
            except (OSError, ValueError, OverflowError, MemoryError, EOFError, SyntaxError) as error:
                problems.append(f"{path}: cannot be read: {type(error).__name__}: {error}")
        if isinstance(array, numpy.memmap):
            array.flush()
    return problems


def _create(path: Path, field: Field, count: int) -> None:
    array = numpy.lib.format.open_memmap(path, "w+", numpy.dtype(field.dtype), (count, *field.shape))
    array.flush()


def _array_name(split: str, name: str) -> str:
    return f"{split}.{name}.npy"


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)
