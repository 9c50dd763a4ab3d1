"""Splits for those who bring a loader of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from sidetask_datasets.split import Split


class Samples(TorchDataset[tuple[Tensor, dict[str, Tensor]]]):
    """A split as a `torch.utils.data.Dataset`: one sample after the other, for a `DataLoader` to put together.

    `Split.batches` makes batches faster and needs no worker; this is for what insists on a loader. A sample is what it
    is in a batch of that split, augmentation included, so that both train alike.

    Args:
        split: the samples; all tasks share their input.
        augment: whether samples are augmented.
        seed: what augmentation depends on.
        epoch: the same; set it anew in every epoch, before the loader starts its workers.

    Raises:
        ValueError: if tasks have inputs of their own.

    >>> from sidetask_datasets import digits
    >>> samples = Samples(digits(train=8, validation=2, test=2).train)
    >>> inputs, targets = next(iter(torch.utils.data.DataLoader(samples, batch_size=4)))
    >>> inputs.shape, targets["top_left"].shape
    (torch.Size([4, 1, 36, 36]), torch.Size([4]))
    """

    def __init__(self, split: Split, *, augment: bool = False, seed: int = 0, epoch: int = 0) -> None:
        if not isinstance(split[0].inputs, Tensor):
            raise ValueError("tasks have inputs of their own, which no loader can put together")
        self.split = split
        self.augment = augment
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Input and targets of one sample, without the dimension of samples.

        Raises:
            IndexError: if there is no such sample.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} is out of range for a split of {len(self)} samples")
        ids = torch.tensor([index % len(self)], device=self.split.device)
        batch: Any = self.split.make(ids, seed=self.seed, epoch=self.epoch, augment=self.augment)
        return batch.inputs[0], {name: target[0] for name, target in batch.targets.items()}
