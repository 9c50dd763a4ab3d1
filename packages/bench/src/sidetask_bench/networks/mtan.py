"""Multi-task attention network on a ResNet: one shared trunk, and soft attention masks of each task's own over it."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from sidetask_core import SplitModel
from sidetask_datasets import Dataset
from torch import Tensor, nn

from sidetask_bench.networks.parts import check_dense, convolution, image_shape
from sidetask_bench.networks.resnet import FEATURES, AtrousHead, check_depth, resnet_stages


def mtan(dataset: Dataset, *, cut: int | None = None, depth: int = 50, weights: str | Path | None = None) -> SplitModel:
    """MTAN ([Liu, Johns, Davison 2019](https://arxiv.org/abs/1803.10704)) on the dilated ResNet of `deeplabv3`.

    After each of the four layers, a task multiplies the output of the layer's last block by a mask in [0, 1], made of
    the output of the block before and of what the task's attention made of the earlier layers; one residual bottleneck
    brings the product to the width of the next layer. A task's four masks and three bottlenecks are its branch,
    `AtrousHead` is its head. The masks read every layer, so the trunk is shared as a whole.

    In the authors' release all tasks have the same three bottlenecks. Here each has its own: they read what a task's
    mask has let through, and a `SplitModel` shares only what comes before the tasks part. For three tasks on a
    ResNet-50 that is 15.9 million parameters more, and no more computation.

    Args:
        dataset: says how large the images are and which heads there are; it must be dense.
        cut: None; there is nothing else to choose.
        depth: of the ResNet, 18 or 50.
        weights: of the ResNet, as for `deeplabv3`.

    Returns:
        A model from ``[N, C, H, W]`` to ``[N, outputs, H, W]`` for each task.

    Raises:
        ValueError: for a cut, another depth, a dataset that is not dense, or weights that do not fit.
    """
    if cut is not None:
        raise ValueError(f"mtan's attention reads every stage of the trunk, which is shared whole; found cut {cut!r}")
    check_depth(depth)
    check_dense("mtan", dataset)
    channels, height, width = image_shape(dataset)
    names = [task.name for task in dataset.tasks]
    widths = [FEATURES[depth] // 2**power for power in (3, 2, 1, 0)]
    return SplitModel(
        Trunk(resnet_stages(depth, channels, weights)),
        {name: AtrousHead(widths[-1], dataset.outputs[name], (height, width)) for name in names},
        {name: Attention(widths) for name in names},
    )


class Trunk(nn.Module):
    """A ResNet that hands out, for each layer, the maps after its last block but one and after its last."""

    def __init__(self, stages: list[nn.Sequential]) -> None:
        super().__init__()
        self.stem, *layers = stages
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Four pairs of maps."""
        x = self.stem(x)
        maps = []
        for layer in self.layers:
            assert isinstance(layer, nn.Sequential)
            before = layer[:-1](x)
            x = layer[-1](before)
            maps.append((before, x))
        return maps


class Attention(nn.Module):
    """The masks of one task: from the trunk's pairs of maps to the task's own map of the last layer."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        from torchvision.models.resnet import Bottleneck

        read = [widths[0], *(2 * width for width in widths[1:])]
        self.masks = nn.ModuleList(
            nn.Sequential(
                convolution(inputs, width // 4, 1),
                nn.Conv2d(width // 4, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.Sigmoid(),
            )
            for inputs, width in zip(read, widths, strict=True)
        )
        self.carry = nn.ModuleList(
            Bottleneck(a, b // 4, downsample=nn.Sequential(nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b)))
            for a, b in itertools.pairwise(widths)
        )

    def forward(self, maps: list[tuple[Tensor, Tensor]]) -> Tensor:
        """``[N, C, H / 8, W / 8]``."""
        before, after = maps[0]
        attended = self.masks[0](before) * after
        for mask, carry, (before, after) in zip(list(self.masks)[1:], self.carry, maps[1:], strict=True):
            own = carry(attended)
            if own.shape[-2:] != before.shape[-2:]:
                own = nn.functional.adaptive_max_pool2d(own, before.shape[-2:])
            attended = mask(torch.cat([before, own], dim=1)) * after
        return attended
