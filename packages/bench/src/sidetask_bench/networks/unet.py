"""U-Net with one decoder per task, split at any stage of the encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sidetask_core import SplitModel
from sidetask_datasets import Dataset
from torch import Tensor, nn

from sidetask_bench.networks.convolutional import Level
from sidetask_bench.networks.parts import (
    Prediction,
    check_cut,
    check_dense,
    convolution,
    image_shape,
    resize,
    typical_label,
)


def unet(dataset: Dataset, *, cut: int | None = None, widths: Sequence[int] = (64, 128, 256, 512, 1024)) -> SplitModel:
    """A U-Net ([Ronneberger et al. 2015](https://arxiv.org/abs/1505.04597)) whose tasks share the way down.

    A stage is two 3×3 convolutions with batch normalisation; every stage but the first halves the image before. The way
    up is each task's own: the coarser map is enlarged, joined with the stage's map and convolved twice. Convolutions
    are padded, so that predictions have the image's size. A head that measures begins at the median of some training
    labels. Normals come out unnormalised: their loss and metrics normalise.

    Args:
        dataset: says how large the images are and which heads there are; it must be dense.
        cut: how many stages of the way down are shared: 0 is single-task learning, ``len(widths)`` (the default) all.
        widths: channels of each stage.

    Returns:
        A model from ``[N, C, H, W]`` to ``[N, outputs, H, W]`` for each task.

    Raises:
        ValueError: for an impossible cut, no stage, images too small, or a dataset that is not dense.
    """
    check_dense("unet", dataset)
    widths = [int(width) for width in widths]
    channels, height, width = image_shape(dataset)
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be positive, found {widths}")
    if min(height, width) < 2 ** (len(widths) - 1):
        raise ValueError(f"{len(widths)} stages halve an image of {height}×{width} too often; give fewer widths")
    down = [_twice(a, b) for a, b in zip([channels, *widths], widths, strict=False)]
    stages = [Level(block if i == 0 else nn.Sequential(nn.MaxPool2d(2), block)) for i, block in enumerate(down)]
    heads: dict[str, nn.Module] = {}
    for task in dataset.tasks:
        heads[task.name] = Decoder(widths, dataset.outputs[task.name], typical_label(dataset, task))
    return SplitModel.from_stages(stages, check_cut(cut, len(stages)), heads)


class Decoder(nn.Module):
    """The way up: from the maps of all stages, coarsest last, to a prediction of the size of the first."""

    def __init__(self, widths: Sequence[int], outputs: int, start: float) -> None:
        super().__init__()
        pairs = zip(widths[:0:-1], widths[-2::-1], strict=True)
        self.up = nn.ModuleList(_twice(coarse + fine, fine) for coarse, fine in pairs)
        self.predict = Prediction(widths[0], outputs, start)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """``[N, outputs, H, W]``."""
        x = maps[-1]
        for block, finer in zip(self.up, maps[-2::-1], strict=True):
            x = block(torch.cat([resize(x, (finer.shape[-2], finer.shape[-1])), finer], dim=1))
        return self.predict(x)


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, outputs), convolution(outputs, outputs))
