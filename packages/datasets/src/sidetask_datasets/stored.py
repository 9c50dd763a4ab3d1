"""Splits of samples that are stored: all of them on the device, or brought there batch by batch."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from sidetask_core import Batch
from torch import Tensor

from sidetask_datasets import draws
from sidetask_datasets.augment import Augmentation, Motion
from sidetask_datasets.columns import Column
from sidetask_datasets.split import Split

_LARGE = 2048  # pixels: images of as many are read one by one on the CPU
# Inputs and targets as they are stored, and their ids, on the device; and what says that they have arrived.
_Rows = tuple[Tensor, dict[str, Tensor], Tensor, "torch.cuda.Event | None"]


class ResidentSplit(Split):
    """A split whose samples all live on the device, in compact form.

    Args:
        inputs: what the encoder sees.
        targets: target name to labels; as many samples each as `inputs`.
        augmentation: what `batches` does to samples when asked; None: nothing.

    Raises:
        ValueError: if a column has another number of samples, or there is no sample.

    >>> split = ResidentSplit(
    ...     Column(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), "image"),
    ...     {"digit": Column(torch.arange(5, dtype=torch.int16), "label")},
    ... )
    >>> [batch.targets["digit"].tolist() for batch in split.batches(2, shuffle=False)]
    [[0, 1], [2, 3]]
    >>> sum(len(batch.inputs) for batch in split.batches(2, drop_last=False))
    5
    """

    def __init__(self, inputs: Column, targets: Mapping[str, Column], augmentation: Augmentation | None = None) -> None:
        for name, column in targets.items():
            if len(column) != len(inputs):
                raise ValueError(f"target {name!r} has {len(column)} samples, the inputs have {len(inputs)}")
        if not len(inputs):
            raise ValueError("a split needs at least one sample, found none")
        self.inputs = inputs
        self.targets = dict(targets)
        self.augmentation = augmentation
        self._drawn: tuple[tuple[int, torch.device], Tensor] | None = None  # the numbers of an epoch, and which

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def device(self) -> torch.device:
        """Where the samples live."""
        return self.inputs.data.device

    @property
    def nbytes(self) -> int:
        """Bytes at rest of all samples together."""
        return self.inputs.nbytes + sum(column.nbytes for column in self.targets.values())

    def to(self, device: torch.device | str, memory: int | None = None) -> Split:
        """The same samples on `device`, see `Split.to`."""
        if memory is not None and self.nbytes > memory:
            return StreamedSplit(self.resident("cpu"), device)
        return self.resident(device)

    def resident(self, device: torch.device | str) -> ResidentSplit:
        """The same samples on `device`, whatever they take."""
        targets = {name: column.to(device) for name, column in self.targets.items()}
        return ResidentSplit(self.inputs.to(device), targets, self.augmentation)

    def with_targets(self, targets: Mapping[str, Column]) -> ResidentSplit:
        """The same samples with further targets, which are augmented with them."""
        return ResidentSplit(self.inputs, {**self.targets, **targets}, self.augmentation)

    def checksum(self) -> int:
        """A number that tells these inputs from others: the CRC-32 of what is stored."""
        return zlib.crc32(self.inputs.data.cpu().numpy().tobytes())

    def make(self, ids: Tensor, *, seed: int, epoch: int, augment: bool) -> Batch:
        """The samples `ids`, read and augmented on the device."""
        motion = self._motion(ids, seed, epoch) if augment else None
        targets = {name: _read(column, column.data, ids, motion) for name, column in self.targets.items()}
        return Batch(_read(self.inputs, self.inputs.data, ids, motion), targets)

    def gather(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Inputs and targets of the samples `ids` as they are stored."""
        targets = {name: column.data.index_select(0, ids) for name, column in self.targets.items()}
        return self.inputs.data.index_select(0, ids), targets

    def finish(
        self, inputs: Tensor, targets: dict[str, Tensor], ids: Tensor, *, seed: int, epoch: int, augment: bool
    ) -> Batch:
        """The batch of what `gather` gave for `ids`, on any device that all of it is on."""
        motion = self._motion(ids, seed, epoch) if augment else None
        expanded = {name: _read(self.targets[name], rows, None, motion) for name, rows in targets.items()}
        return Batch(_read(self.inputs, inputs, None, motion), expanded)

    def _motion(self, ids: Tensor, seed: int, epoch: int) -> Motion | None:
        if self.augmentation is None:
            return None
        asked = draws.key(seed, "augment", epoch), ids.device
        if self._drawn is None or self._drawn[0] != asked:
            # For all samples at once: for those of a batch it takes as long, on the CPU as much as making small images.
            everything = torch.arange(len(self), device=ids.device)
            self._drawn = asked, draws.uniform(asked[0], everything, self.augmentation.draws)
        height, width = self.inputs.data.shape[-2:]
        return self.augmentation.motion(self._drawn[1].index_select(0, ids), (height, width))


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


def _read(column: Column, data: Tensor, ids: Tensor | None, motion: Motion | None) -> Tensor:
    """The rows `ids` of a column's data, all if None, moved, as a batch has them."""
    if data.device.type != "cpu" or data.ndim < 3 or data.shape[-2] * data.shape[-1] < _LARGE:
        rows = data if ids is None else data.index_select(0, ids)
        return column.expand(rows) if motion is None else motion.read(column, rows)
    # One by one, from where they are stored, so that what is done to an image finds it in the processor's cache.
    places = range(len(data)) if ids is None else ids.tolist()
    found = column.room(len(places), data)
    for index, place in enumerate(places):
        row, out = data[place : place + 1], found[index : index + 1]
        if motion is None:
            column.expand(row, out)
        else:
            motion.read_one(index, column, row, out)
    return found
