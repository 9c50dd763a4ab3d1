"""Splits side by side, one for each domain: tasks that have inputs of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

import torch
from sidetask_core import Batch
from torch import Tensor

from sidetask_datasets import draws
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import Dataset, choose
from sidetask_datasets.split import Split


class JoinedSplit(Split):
    """Several splits whose samples have nothing to do with each other, dealt out together.

    A batch of n holds n samples of every domain: ``inputs`` is a mapping from domain to what that split gives, and
    ``Task.input`` names the domain. An epoch is as long as the longest domain. Shuffled, every domain is dealt in an
    order of its own, and shorter ones begin again in another order, so that every batch is full. In their own order
    (``shuffle=False``, as in evaluation) no sample comes twice: a domain that has run out is missing from the inputs,
    and its targets are None.

    Args:
        parts: domain to its split. All give inputs of one shape, and targets of names that no other part gives.

    Raises:
        ValueError: for no part, parts on different devices, inputs of different shapes, or a target in two parts.

    >>> from sidetask_datasets.stored import ResidentSplit
    >>> def domain(count, name):
    ...     labels = Column(torch.arange(count, dtype=torch.int16), "label")
    ...     return ResidentSplit(Column(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), "image"), {name: labels})
    >>> split = JoinedSplit({"a": domain(3, "a"), "b": domain(2, "b")})
    >>> [batch.targets for batch in split.batches(2, shuffle=False, drop_last=False)]
    [{'a': tensor([0, 1]), 'b': tensor([0, 1])}, {'a': tensor([2]), 'b': None}]
    >>> [batch.targets["b"].sort().values.tolist() for batch in split.batches(2)]
    [[0, 1]]
    """

    def __init__(self, parts: Mapping[str, Split]) -> None:
        if not parts:
            raise ValueError("a JoinedSplit needs at least one part")
        self.parts = dict(parts)
        self.names: dict[str, tuple[str, ...]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for domain, part in self.parts.items():
            batch = part[0]
            if not isinstance(batch.inputs, Tensor):
                raise ValueError(f"part {domain!r} has several inputs itself")
            self.names[domain] = tuple(batch.targets)
            shapes[domain] = tuple(batch.inputs.shape[1:])
            for other, names in list(self.names.items())[:-1]:
                if shared := set(names) & set(batch.targets):
                    raise ValueError(f"target {min(shared)!r} is in parts {other!r} and {domain!r}")
        devices = {domain: str(part.device) for domain, part in self.parts.items()}
        if len(set(devices.values())) > 1:
            raise ValueError(f"the parts must be on one device, found {devices}")
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the parts' inputs must be of one shape, found {shapes}")

    def __len__(self) -> int:
        """Samples of the longest part."""
        return max(len(part) for part in self.parts.values())

    @property
    def device(self) -> torch.device:
        """Where batches appear."""
        return next(iter(self.parts.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes at rest of all parts together."""
        return sum(part.nbytes for part in self.parts.values())

    def to(self, device: torch.device | str, memory: int | None = None) -> JoinedSplit:
        """The same samples on `device`; those parts are streamed for which no memory is left."""
        parts = {}
        for domain, part in self.parts.items():
            parts[domain] = part.to(device, memory)
            memory = None if memory is None else memory - parts[domain].nbytes
        return JoinedSplit(parts)

    def order(self, *, seed: int, epoch: int, shuffle: bool) -> Tensor:
        """Ids ``[len(self), parts]`` int64, on the CPU: what is there is asked for each batch, and must not wait.

        An id of −1 is none.
        """
        orders = torch.full((len(self), len(self.parts)), -1, dtype=torch.int64)
        for column, (domain, part) in enumerate(self.parts.items()):
            rounds = -(-len(self) // len(part)) if shuffle else 1
            for r in range(rounds):
                room = orders[r * len(part) : (r + 1) * len(part), column]
                ids = torch.arange(len(part))
                if shuffle:
                    ids = draws.permutation(draws.key(seed, "order", epoch, domain, r), len(part))
                room.copy_(ids[: len(room)])
        return orders

    def make(self, ids: Tensor, *, seed: int, epoch: int, augment: bool) -> Batch:
        """The samples `ids` (``[n, parts]``) of every part, without those that are none."""
        inputs: dict[str, Tensor] = {}
        targets: dict[str, Tensor | None] = {}
        chosen = [column[column >= 0] for column in ids.T]
        # One transfer for all.
        there = torch.cat(chosen).to(self.device, non_blocking=True).split([len(one) for one in chosen])
        for (domain, part), own in zip(self.parts.items(), there, strict=True):
            if len(own):
                # Sample 5 of one domain is not to be moved as sample 5 of another.
                batch = part.make(own, seed=draws.key(seed, domain), epoch=epoch, augment=augment)
                inputs[domain] = batch.inputs
                targets.update(batch.targets)
            else:
                targets.update(dict.fromkeys(self.names[domain]))
        return Batch(inputs, targets)

    def with_targets(self, targets: Mapping[str, Column]) -> NoReturn:
        """Refuse: further labels belong to one of the parts.

        Raises:
            ValueError: always.
        """
        raise ValueError("samples of several domains have no labels in common; give targets to the parts")

    def checksum(self) -> NoReturn:
        """Refuse, as `with_targets` does.

        Raises:
            ValueError: always.
        """
        self.with_targets({})


def domains_of(dataset: Dataset) -> tuple[str, ...]:
    """The domains that a dataset's tasks name as their inputs, in order; none where all tasks share one input."""
    return tuple(dict.fromkeys(task.input for task in dataset.tasks if task.input is not None))


def alone(dataset: Dataset, domain: str) -> Dataset:
    """One domain as a dataset: its samples, and its tasks, which now share their input.

    Args:
        dataset: whose splits are each a `JoinedSplit`.
        domain: one of `domains_of`.

    Raises:
        ValueError: for an unknown domain, or splits of another kind.
    """
    choose("domain", [domain], domains_of(dataset))

    def part(split: str) -> Split:
        whole = getattr(dataset, split)
        if not isinstance(whole, JoinedSplit):
            raise ValueError(
                f"dataset {dataset.name!r} has domains, so its splits are JoinedSplits; {split} is a "
                f"{type(whole).__name__}"
            )
        return whole.parts[domain]

    own = tuple(replace(task, input=None) for task in dataset.tasks if task.input == domain)
    return replace(dataset, tasks=own, train=part("train"), validation=part("validation"), test=part("test"))


def beside(dataset: Dataset, domain: str, changed: Dataset) -> Dataset:
    """The dataset with one of its domains as it is in `changed`: `alone` with further tasks."""
    known = {task.name for task in dataset.tasks}
    more = tuple(replace(task, input=domain) for task in changed.tasks if task.name not in known)

    def joined(split: str) -> JoinedSplit:
        return JoinedSplit({**getattr(dataset, split).parts, domain: getattr(changed, split)})

    return replace(
        dataset,
        tasks=(*dataset.tasks, *more),
        train=joined("train"),
        validation=joined("validation"),
        test=joined("test"),
        outputs=changed.outputs,
        views=changed.views,
    )
