"""Splits larger than the device's memory: batches fetched from the map while the one before is in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from sidetask_core import Batch
from torch import Tensor

from sidetask_datasets import draws
from sidetask_datasets.columns import Column
from sidetask_datasets.split import ResidentSplit, Split

# Inputs and targets as they are stored, and their ids, on the device; and what says that they have arrived.
_Rows = tuple[Tensor, dict[str, Tensor], Tensor, "torch.cuda.Event | None"]


class StreamedSplit(Split):
    """Samples in the host's memory, or mapped into it from a file, whose batches appear on a device.

    Rows are gathered as they are stored, in few bytes, by a thread of its own, one batch ahead, into one of two pinned
    buffers, and copied to the device beside whatever it does; there they are expanded and augmented. Batches are those
    of the resident split, bit for bit.

    Args:
        source: the samples, on the CPU.
        device: where batches appear.

    Raises:
        ValueError: if the source is on another device.

    >>> source = ResidentSplit(
    ...     Column(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), "image"),
    ...     {"digit": Column(torch.arange(5, dtype=torch.int16), "label")},
    ... )
    >>> split = StreamedSplit(source, "cpu")
    >>> [batch.targets["digit"].tolist() for batch in split.batches(2, shuffle=False)]
    [[0, 1], [2, 3]]
    """

    def __init__(self, source: ResidentSplit, device: torch.device | str) -> None:
        if source.device.type != "cpu":
            raise ValueError(f"samples are streamed from the CPU, found them on {source.device}")
        self.source = source
        self.place = torch.device(device)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def device(self) -> torch.device:
        """Where batches appear."""
        return self.place

    def to(self, device: torch.device | str, memory: int | None = None) -> Split:
        """The same samples on `device`, see `Split.to`."""
        return self.source.to(device, memory)

    def order(self, *, seed: int, epoch: int, shuffle: bool) -> Tensor:
        """The ids of an epoch, on the CPU, where samples are gathered."""
        if shuffle:
            return draws.permutation(draws.key(seed, "order", epoch), len(self))
        return torch.arange(len(self))

    def with_targets(self, targets: Mapping[str, Column]) -> StreamedSplit:
        """The same samples with further targets, which are augmented with them."""
        there = {name: column.to("cpu") for name, column in targets.items()}
        return StreamedSplit(self.source.with_targets(there), self.place)

    def checksum(self) -> int:
        """A number that tells these inputs from others."""
        return self.source.checksum()

    def make(self, ids: Tensor, *, seed: int, epoch: int, augment: bool) -> Batch:
        """The samples `ids`, fetched now."""
        return self._finish(self._fetch(ids.cpu(), None), seed, epoch, augment)

    def deal(self, shares: Iterable[Tensor], *, seed: int, epoch: int, augment: bool) -> Iterator[Batch]:
        """Batches of one share of ids after the other, each fetched while the one before is in use."""
        buffers = (_Buffer(), _Buffer()) if self.place.type == "cuda" else (None, None)
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[_Rows] | None = None
            for index, ids in enumerate(shares):
                coming = pool.submit(self._fetch, ids, buffers[index % 2])
                if ahead is not None:
                    yield self._finish(ahead.result(), seed, epoch, augment)
                ahead = coming
            if ahead is not None:
                yield self._finish(ahead.result(), seed, epoch, augment)

    def _fetch(self, ids: Tensor, buffer: _Buffer | None) -> _Rows:
        if buffer is None:
            inputs, targets = self.source.gather(ids)
            moved = {name: rows.to(self.place) for name, rows in targets.items()}
            return inputs.to(self.place), moved, ids.to(self.place), None
        columns = {"": self.source.inputs.data, **{name: one.data for name, one in self.source.targets.items()}}
        rows = buffer.fill(columns, ids)
        with torch.cuda.stream(buffer.stream(self.place)):
            there = {name: row.to(self.place, non_blocking=True) for name, row in rows.items()}
            arrived = buffer.copied()
        own = there.pop(buffer.IDS)
        return there.pop(""), there, own, arrived

    def _finish(self, rows: _Rows, seed: int, epoch: int, augment: bool) -> Batch:
        inputs, targets, ids, arrived = rows
        if arrived is not None:
            here = torch.cuda.current_stream(self.place)
            here.wait_event(arrived)
            # Made on another stream: its memory is not to be given away before this one is done with it.
            for tensor in (inputs, ids, *targets.values()):
                tensor.record_stream(here)
        return self.source.finish(inputs, targets, ids, seed=seed, epoch=epoch, augment=augment)


class _Buffer:
    """Pinned memory for a batch as it is stored; filled again only when its last copy to the device is done."""

    IDS = " ids"  # no name of a target begins with a space

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        self.event: torch.cuda.Event | None = None
        self.side: torch.cuda.Stream | None = None

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        self.side = self.side or torch.cuda.Stream(device)
        return self.side

    def copied(self) -> torch.cuda.Event:
        """An event of the end of the copies asked for so far."""
        self.event = torch.cuda.Event()
        self.event.record()
        return self.event

    def fill(self, columns: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        if self.event is not None:
            self.event.synchronize()
        found = {}
        for name, data in columns.items():
            found[name] = torch.index_select(data, 0, ids, out=self._room(name, len(ids), data))
        found[self.IDS] = self._room(self.IDS, len(ids), ids).copy_(ids)
        return found

    def _room(self, name: str, count: int, like: Tensor) -> Tensor:
        room = self.rows.get(name)
        if room is None or len(room) < count:
            room = self.rows[name] = torch.empty(count, *like.shape[1:], dtype=like.dtype, pin_memory=True)
        return room[:count]
