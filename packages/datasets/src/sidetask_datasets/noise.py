"""A task that nothing can teach: noise to predict beside the tasks of any dataset.

What a method of auxiliary learning does with it is a check of the method (Liu, James, Davison, Johns, "Auto-λ:
Disentangling dynamic task relationships", TMLR 2022): a method that asks which tasks help should find that this one
does not.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sidetask_core import Batch
from torch import Tensor

from sidetask_datasets import draws, tasks
from sidetask_datasets.dataset import Dataset, check_seed
from sidetask_datasets.joined import alone, beside, domains_of
from sidetask_datasets.split import DerivedSplit, Split
from sidetask_datasets.view import View

NAME = "noise"


def with_noise(dataset: Dataset, seed: int = 0, *, domain: str | None = None) -> Dataset:
    """The dataset with one more task, "noise": an auxiliary one, whose target is noise for each sample.

    Targets are float32, uniform in [0, 1): independent pixels ``[N, 1, H, W]`` where tasks label pixels, a number
    ``[N, 1]`` where they label whole images. The loss is L1, the metric the mean absolute error. Only a memory of the
    samples predicts them better than the constant 1/2, whose error is 1/4. A sample has the same noise in every epoch,
    order, batch size and process, and on every device. Augmentation leaves it where it is: noise that moved with the
    image would be noise all the same.

    Where tasks have inputs of their own, the noise belongs to the samples of one domain, and is absent from batches
    that have none of these.

    Args:
        dataset: any.
        seed: of the noise.
        domain: whose samples it belongs to, where tasks have inputs of their own; None: the first task's.

    Raises:
        ValueError: if a task is called "noise" already, or there is no such domain.

    >>> from sidetask_datasets import digit_domains, scenes
    >>> data = with_noise(scenes(size=(12, 16), train=4, validation=2, test=2, tasks=["depth"]))
    >>> [(task.name, task.primary) for task in data.tasks], data.train[0].targets["noise"].shape
    ([('depth', True), ('noise', False)], torch.Size([1, 1, 12, 16]))
    >>> data = with_noise(digit_domains(train=4, validation=2, test=2, tasks=["low_0", "high_36"]), domain="high_36")
    >>> [(task.name, task.input) for task in data.tasks], data.train[0].targets["noise"].shape
    ([('low_0', 'low_0'), ('high_36', 'high_36'), ('noise', 'high_36')], torch.Size([1, 1]))
    """
    check_seed(seed)
    if NAME in (task.name for task in dataset.tasks):
        raise ValueError(f"dataset {dataset.name!r} has a task {NAME!r} already")
    if domains := domains_of(dataset):
        chosen = domains[0] if domain is None else domain
        return beside(dataset, chosen, with_noise(alone(dataset, chosen), seed))
    if domain is not None:
        raise ValueError(f"dataset {dataset.name!r} has no domain {domain!r}: all tasks share one input")
    shape = (1, *dataset.input_shape[-2:]) if dataset.dense else (1,)

    def noisy(split: str) -> NoisySplit:
        return NoisySplit(getattr(dataset, split), draws.key(seed, "noise task", split), shape)

    return replace(
        dataset,
        tasks=(*dataset.tasks, tasks.noise(NAME)),
        train=noisy("train"),
        validation=noisy("validation"),
        test=noisy("test"),
        outputs={**dataset.outputs, NAME: 1},
        views={**dataset.views, NAME: View("scalar" if dataset.dense else "vector")},
    )


class NoisySplit(DerivedSplit):
    """A split whose batches have one more target, "noise", drawn on the device as they are made.

    Args:
        split: what the rest comes from.
        key: of the noise, see `draws.key`.
        shape: of a sample's noise.
    """

    def __init__(self, split: Split, key: int, shape: tuple[int, ...]) -> None:
        super().__init__(split)
        self.key = key
        self.shape = shape

    def derive(self, split: Split) -> NoisySplit:
        """The same noise beside the samples of another split."""
        return NoisySplit(split, self.key, self.shape)

    def change(self, batch: Batch, ids: Tensor, epoch: int) -> Batch:
        """The batch with noise beside its targets."""
        noise = draws.uniform(self.key, self.identify(ids.to(self.device), epoch), math.prod(self.shape))
        return replace(batch, targets={**batch.targets, NAME: noise.view(-1, *self.shape)})
