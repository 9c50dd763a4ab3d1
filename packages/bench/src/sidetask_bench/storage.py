"""Files that survive a kill: atomic replacement, and a journal of JSON lines that can be cut back to a known point."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from sidetask_core import parallel
from torch import Tensor

from sidetask_bench.schema import ExperimentError, plain

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

# A lock that is held no longer is that of `is_locked`, which looks.
_LOOK_SECONDS = 0.5


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], *, durable: bool = True) -> None:
    """Give `path` new content: readers, and a process killed at any moment, see all of the old or all of the new.

    Args:
        path: the file; its folder is created.
        write: called with a binary file open for writing.
        durable: also after a power failure; a file that is soon replaced needs not be, and is written faster.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    with _naming(path):
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable and os.name == "posix":  # the rename itself is durable only once the folder is
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of which file an error is: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()), durable=durable)


def write_json(path: Path, data: Any, *, durable: bool = True) -> None:
    """Write JSON atomically; NaN and infinities, which JSON lacks, become null."""
    write_text(path, json.dumps(_finite(plain(data)), indent=2, allow_nan=False) + "\n", durable=durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None if there is no such file."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    return found


def write_tensors(path: Path, data: Mapping[str, Any]) -> None:
    """Write nested mappings of tensors and plain values atomically; `read_tensors` reads them."""
    write_atomically(path, lambda file: torch.save(dict(data), file))


def read_tensors(path: Path) -> dict[str, Any]:
    """Read what `write_tensors` wrote, on the CPU. Never runs code from the file.

    Raises:
        ExperimentError: if the file is not one.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no common class for damaged files
        raise ExperimentError(f"{path} is not a checkpoint of sidetask: {error}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of the folder of a run or of a comparison, and tell those who watch that one is there.

    The lock goes with the process, however that ends. Under ``torchrun``, process 0 holds it for all.

    Raises:
        ExperimentError: if another process holds it.
    """
    if parallel.rank():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with (folder / ".lock").open("w") as file:
        until = time.monotonic() + _LOOK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise ExperimentError(f"another process is training in {folder}") from error
            time.sleep(_LOOK_SECONDS / 20)
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process holds a folder's lock, as far as can be said here."""
    path = folder / ".lock"
    if fcntl is None or not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class Journal:
    """A file of JSON lines, appended to; `size` and `cut` bring it back to where a checkpoint was taken.

    Args:
        path: the file; created when it is first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, *records: Mapping[str, Any]) -> None:
        """Add one line per record."""
        lines = [json.dumps(_finite(record), allow_nan=False) + "\n" for record in records]
        with _naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def size(self) -> int:
        """Bytes so far, made durable: a checkpoint that names this size will find it after a power failure too."""
        if not self.path.exists():
            return 0
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def cut(self, size: int) -> None:
        """Forget everything after the first `size` bytes.

        Raises:
            ExperimentError: if the file is shorter than that, so that it cannot be continued.
        """
        present = self.path.stat().st_size if self.path.exists() else 0
        if present < size:
            raise ExperimentError(f"{self.path} is shorter than its checkpoint says; it was changed by hand")
        if present > size:
            with self.path.open("rb+") as file:
                file.truncate(size)

    def read(self, *, partial: bool = False) -> list[dict[str, Any]]:
        """All records; with `partial`, without a last line that another process has not finished."""
        if not self.path.exists():
            return []
        lines = self.path.read_text("utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n") or not partial]


class StepLog:
    """Losses and weights of every step, kept on the device until a chunk is written: no synchronisation per step.

    Args:
        journal: where the chunks go.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.latest: dict[str, Any] = {}
        self._pending: list[tuple[dict[str, Any], list[tuple[str, str]], Tensor]] = []

    def add(self, record: Mapping[str, Any], values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Note a step: plain values, and per group a mapping from task to a 0-dim tensor."""
        layout = [(group, name) for group, items in values.items() for name in items]
        numbers = [values[group][name].detach().float() for group, name in layout]
        base = {**record, **{group: {} for group in values}}
        self._pending.append((base, layout, torch.stack(numbers) if numbers else torch.zeros(0)))

    def flush(self) -> None:
        """Write the pending steps; one transfer from the device for all of them."""
        if not self._pending:
            return
        numbers = iter(torch.cat([values for _, _, values in self._pending]).tolist())
        records = []
        for record, layout, _ in self._pending:
            for group, name in layout:
                # Nine digits are what float32 needs to be read back to the same value.
                record[group][name] = float(f"{next(numbers):.9g}")
            records.append(record)
        self._pending.clear()
        self.latest = records[-1]
        self.journal.append(*records)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
