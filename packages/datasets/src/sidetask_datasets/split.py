"""Splits: samples dealt out on a device, in seeded batches that can be resumed and shared among processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import tee

import torch
from sidetask_core import Batch
from torch import Tensor

from sidetask_datasets import draws
from sidetask_datasets.columns import Column


class Split(ABC):
    """Samples that come in batches, made where they are used.

    What a batch holds depends on the seed, the epoch and its sample ids alone. So `start` resumes an epoch exactly,
    ranks share a batch without speaking to each other, and a sample is augmented alike in every batch size.
    Here are order, slices and resumption; a subclass says how many samples there are and how they are made.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples in an epoch."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where batches appear."""

    @property
    def nbytes(self) -> int:
        """Bytes at rest on the split's device; 0 where samples are made or fetched as they are needed."""
        return 0

    @abstractmethod
    def to(self, device: torch.device | str, memory: int | None = None) -> Split:
        """The same samples on `device`; streamed there batch by batch if they take more than `memory` bytes."""

    @abstractmethod
    def make(self, ids: Tensor, *, seed: int, epoch: int, augment: bool) -> Batch:
        """The samples `ids`, rows of `order`, augmented for this seed and epoch if asked."""

    def order(self, *, seed: int, epoch: int, shuffle: bool) -> Tensor:
        """What `make` is given for each place of an epoch, in order: the ids ``[len(self)]`` int64 on the device."""
        if shuffle:
            return draws.permutation(draws.key(seed, "order", epoch), len(self), self.device)
        return torch.arange(len(self), device=self.device)

    def with_targets(self, targets: Mapping[str, Column]) -> Split:
        """The same samples with further targets, which are augmented with them.

        Raises:
            ValueError: if samples are new in every epoch, so that nothing can be said of them beforehand.
        """
        raise ValueError(f"a {type(self).__name__} makes new samples in every epoch; labels are for samples that stay")

    def checksum(self) -> int:
        """A number that tells these inputs from others.

        Raises:
            ValueError: as for `with_targets`.
        """
        raise ValueError(f"a {type(self).__name__} makes new samples in every epoch; labels are for samples that stay")

    def identify(self, ids: Tensor, epoch: int) -> Tensor:
        """What tells samples of all epochs apart: the ids themselves, unless every epoch has samples of its own."""
        return ids

    def __getitem__(self, indices: int | slice | Sequence[int] | Tensor) -> Batch:
        """Unaugmented samples, as a batch (of one, for a single index).

        Raises:
            IndexError: naming the first index that is out of range.
        """
        if isinstance(indices, slice):
            indices = range(*indices.indices(len(self)))
        ids = torch.as_tensor([indices] if isinstance(indices, int) else indices, dtype=torch.int64).cpu()
        outside = ids[(ids < -len(self)) | (ids >= len(self))]
        if outside.numel():
            raise IndexError(f"sample {int(outside[0])} is out of range for a split of {len(self)} samples")
        order = self.order(seed=0, epoch=0, shuffle=False)
        return self.make(order[(ids % max(len(self), 1)).to(order.device)], seed=0, epoch=0, augment=False)

    def count(self, batch_size: int, *, drop_last: bool = True) -> int:
        """Number of batches in an epoch.

        Raises:
            ValueError: if there would be none.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, found {batch_size}")
        number = len(self) // batch_size if drop_last else -(-len(self) // batch_size)
        if number == 0:
            raise ValueError(
                f"a split of {len(self)} samples has no batch of {batch_size}; "
                "use a smaller batch_size or drop_last=False"
            )
        return number

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        augment: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> Iterator[Batch]:
        """The batches of one epoch, on the split's device.

        Args:
            batch_size: samples of a global batch, that is over all ranks together.
            seed: what order and augmentation depend on.
            epoch: the same; counts from 0.
            shuffle: False deals the samples in their own order.
            augment: False leaves samples as they are, as does a split that has no augmentation.
            drop_last: leave out a last batch that is not full.
            rank: this process gets the rank-th of `world` equal, consecutive slices of every batch. A last batch that
                is not full is sliced as evenly as it can be and may leave a rank without a share: that rank then
                gets one batch fewer, so keep drop_last in training under several processes.
            world: number of processes.
            start: skip so many batches; what follows is what an uninterrupted epoch would have given.

        Raises:
            ValueError: if a batch cannot be shared equally, a rank or start does not exist, or there is no batch.
        """
        number = self.count(batch_size, drop_last=drop_last)
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"rank is between 0 and world - 1, found rank {rank} of world {world}")
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} samples cannot be shared equally by {world} processes")
        if not 0 <= start <= number:
            raise ValueError(f"start is between 0 and the epoch's {number} batches, found {start}")

        def shares() -> Iterator[Tensor]:
            order = self.order(seed=seed, epoch=epoch, shuffle=shuffle)
            for index in range(start, number):
                ids = order[index * batch_size : (index + 1) * batch_size]
                share = ids[len(ids) * rank // world : len(ids) * (rank + 1) // world]
                if len(share):
                    yield share

        return self.deal(shares(), seed=seed, epoch=epoch, augment=augment)

    def deal(self, shares: Iterable[Tensor], *, seed: int, epoch: int, augment: bool) -> Iterator[Batch]:
        """What `make` makes of one share of ids after the other."""
        for ids in shares:
            yield self.make(ids, seed=seed, epoch=epoch, augment=augment)


class DerivedSplit(Split):
    """A split whose batches are those of another, changed.

    Args:
        split: the other.
    """

    def __init__(self, split: Split) -> None:
        self.split = split

    @abstractmethod
    def derive(self, split: Split) -> DerivedSplit:
        """What this is of its split, of another one."""

    @abstractmethod
    def change(self, batch: Batch, ids: Tensor, epoch: int) -> Batch:
        """A batch of the split, of the samples `ids`, as it is to be."""

    def __len__(self) -> int:
        return len(self.split)

    @property
    def device(self) -> torch.device:
        """Where batches appear."""
        return self.split.device

    @property
    def nbytes(self) -> int:
        """Those of the split, for what changes is made as it is needed."""
        return self.split.nbytes

    def to(self, device: torch.device | str, memory: int | None = None) -> DerivedSplit:
        """The same of the split on `device`, see `Split.to`."""
        return self.derive(self.split.to(device, memory))

    def order(self, *, seed: int, epoch: int, shuffle: bool) -> Tensor:
        """That of the split."""
        return self.split.order(seed=seed, epoch=epoch, shuffle=shuffle)

    def identify(self, ids: Tensor, epoch: int) -> Tensor:
        """What tells the samples of the split apart."""
        return self.split.identify(ids, epoch)

    def with_targets(self, targets: Mapping[str, Column]) -> DerivedSplit:
        """The same of the split with further targets."""
        return self.derive(self.split.with_targets(targets))

    def checksum(self) -> int:
        """That of the split."""
        return self.split.checksum()

    def make(self, ids: Tensor, *, seed: int, epoch: int, augment: bool) -> Batch:
        """The samples `ids` of the split, changed."""
        return self.change(self.split.make(ids, seed=seed, epoch=epoch, augment=augment), ids, epoch)

    def deal(self, shares: Iterable[Tensor], *, seed: int, epoch: int, augment: bool) -> Iterator[Batch]:
        """The batches that the split deals, changed."""
        given, taken = tee(shares)
        batches = self.split.deal(given, seed=seed, epoch=epoch, augment=augment)
        for ids, batch in zip(taken, batches, strict=True):
            yield self.change(batch, ids, epoch)
