"""A task that nothing can teach: noise to predict beside the tasks of any dense dataset.

What a method of auxiliary learning does with it is a check of the method (Liu, James, Davison, Johns, "Auto-λ:
Disentangling dynamic task relationships", TMLR 2022): a method that asks which tasks help should find that this one
does not.
"""

from __future__ import annotations

from dataclasses import replace

from sidetask_core import Batch
from torch import Tensor

from sidetask_datasets import draws, tasks
from sidetask_datasets.dataset import Dataset, check_seed
from sidetask_datasets.split import DerivedSplit, Split
from sidetask_datasets.view import View

NAME = "noise"


def with_noise(dataset: Dataset, seed: int = 0) -> Dataset:
    """The dataset with one more task, "noise": an auxiliary one, whose target is a map of noise for each sample.

    Targets are float32 ``[N, 1, H, W]``, uniform in [0, 1), independent from pixel to pixel; the loss is L1, the metric
    the mean absolute error. Only a memory of the samples predicts them better than the constant 1/2, whose error is
    1/4. A sample has the same noise in every epoch, order, batch size and process, and on every device. Augmentation
    leaves it where it is: noise that moved with the image would be noise all the same.

    Args:
        dataset: whose tasks label pixels.
        seed: of the noise.

    Raises:
        ValueError: if its tasks label whole images, or one of them is called "noise".

    >>> from sidetask_datasets import scenes
    >>> data = with_noise(scenes(size=(12, 16), train=4, validation=2, test=2, tasks=["depth"]))
    >>> [(task.name, task.primary) for task in data.tasks], data.train[0].targets["noise"].shape
    ([('depth', True), ('noise', False)], torch.Size([1, 1, 12, 16]))
    """
    check_seed(seed)
    if not dataset.dense:
        raise ValueError(f"dataset {dataset.name!r} labels whole images; noise is for datasets that label pixels")
    if any(task.input is not None for task in dataset.tasks):
        raise ValueError(f"dataset {dataset.name!r} has an input for every task; noise is for one that all tasks share")
    if NAME in (task.name for task in dataset.tasks):
        raise ValueError(f"dataset {dataset.name!r} has a task {NAME!r} already")

    def noisy(split: Split, name: str) -> NoisySplit:
        return NoisySplit(split, draws.key(seed, "noise task", name))

    return replace(
        dataset,
        tasks=(*dataset.tasks, tasks.noise(NAME)),
        train=noisy(dataset.train, "train"),
        validation=noisy(dataset.validation, "validation"),
        test=noisy(dataset.test, "test"),
        outputs={**dataset.outputs, NAME: 1},
        views={**dataset.views, NAME: View("scalar")},
    )


class NoisySplit(DerivedSplit):
    """A split whose batches have one more target, "noise", drawn on the device as they are made.

    Args:
        split: what the rest comes from.
        key: of the noise, see `draws.key`.
    """

    def __init__(self, split: Split, key: int) -> None:
        super().__init__(split)
        self.key = key

    def derive(self, split: Split) -> NoisySplit:
        """The same noise beside the samples of another split."""
        return NoisySplit(split, self.key)

    def change(self, batch: Batch, ids: Tensor, epoch: int) -> Batch:
        """The batch with noise of its inputs' size."""
        height, width = batch.inputs.shape[-2:]
        noise = draws.uniform(self.key, self.identify(ids.to(self.device), epoch), height * width)
        return replace(batch, targets={**batch.targets, NAME: noise.view(-1, 1, height, width)})
