"""What the reference networks have in common: the shape of a dataset's images, convolution blocks, resizing."""

from __future__ import annotations

import torch.nn.functional as F
from sidetask_core import Task
from sidetask_datasets import Dataset
from torch import Tensor, nn


def image_shape(dataset: Dataset) -> tuple[int, int, int]:
    """Channels, height and width of the images of a dataset.

    Raises:
        ValueError: if the inputs are not images.
    """
    shape = dataset.input_shape
    if len(shape) != 3:
        raise ValueError(f"dataset {dataset.name!r}: this network reads images [C, H, W], found inputs {list(shape)}")
    return shape[0], shape[1], shape[2]


def check_dense(network: str, dataset: Dataset) -> None:
    """Refuse a dataset of labels per image."""
    if not dataset.dense:
        raise ValueError(
            f"{network} predicts a value per pixel, but dataset {dataset.name!r} has labels per image; use small"
        )


def check_whole(network: str, dataset: Dataset) -> None:
    """Refuse a dataset of labels per pixel."""
    if dataset.dense:
        raise ValueError(
            f"{network} predicts a label per image, but dataset {dataset.name!r} has labels per pixel; use small"
        )


def check_cut(cut: int | None, stages: int) -> int:
    """The cut between so many stages; None is after the last.

    Raises:
        ValueError: if it is not a whole number; `sidetask_core.SplitModel.from_stages` checks its size.
    """
    if cut is not None and (not isinstance(cut, int) or isinstance(cut, bool)):
        raise ValueError(f"cut is a whole number of stages, 0 to {stages}, found {cut!r}")
    return stages if cut is None else cut


def convolution(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU; without a stride the image keeps its size."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Prediction(nn.Conv2d):
    """The last layer of a dense head: 1×1, with a bias that begins at `start`, also when the head is made anew."""

    start = 0.0

    def __init__(self, inputs: int, outputs: int, start: float) -> None:
        super().__init__(inputs, outputs, 1)
        self.start = start
        nn.init.constant_(self.get_parameter("bias"), start)

    def reset_parameters(self) -> None:
        """As at the beginning."""
        super().reset_parameters()
        nn.init.constant_(self.get_parameter("bias"), self.start)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of ``[N, C, h, w]`` to ``size``."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def typical_label(dataset: Dataset, task: Task, samples: int = 16) -> float:
    """Median label of a task that measures (a depth, say) over some training samples; 0 for any other task."""
    if dataset.views[task.name].kind != "scalar":
        return 0.0
    target = dataset.train[range(min(samples, len(dataset.train)))].target_of(task)
    if target is None:
        return 0.0
    labelled = target if task.valid is None else target[task.valid(target)]
    return float(labelled.float().median()) if labelled.numel() else 0.0
