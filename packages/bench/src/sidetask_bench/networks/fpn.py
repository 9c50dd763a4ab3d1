"""Feature pyramid decoders, one per task, on a ResNet split at any stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from sidetask_bench.networks.resnet import FEATURES, check_depth, resnet_stages


def fpn(
    dataset: Dataset,
    *,
    cut: int | None = None,
    depth: int = 18,
    width: int = 128,
    weights: str | Path | None = None,
) -> SplitModel:
    """A ResNet with one feature pyramid per task ([Lin et al. 2017](https://arxiv.org/abs/1612.03144)).

    The pyramid's four maps, of ``layer1`` … ``layer4``, are brought to the size of the first and summed, as for
    semantic segmentation in [Kirillov et al. 2019](https://arxiv.org/abs/1901.02446), here without their extra
    convolutions.

    Args:
        dataset: says how large the images are and which heads there are; it must be dense.
        cut: how many of the five stages (stem, ``layer1`` … ``layer4``) are shared; all by default.
        depth: of the ResNet, 18 or 50.
        width: channels of the pyramid.
        weights: of torchvision's ResNet of that depth, by name or from a file as for `deeplabv3`.

    Returns:
        A model from ``[N, C, H, W]`` to ``[N, outputs, H, W]`` for each task.

    Raises:
        ValueError: for another depth, an impossible cut, a dataset that is not dense, or weights that do not fit.
    """
    check_depth(depth)
    check_dense("fpn", dataset)
    channels, height, width_ = image_shape(dataset)
    stem, *layers = resnet_stages(depth, channels, weights, stride=32)
    stages = [stem, *(Level(layer) for layer in layers)]
    widths = [FEATURES[depth] // 2**power for power in (3, 2, 1, 0)]
    heads: dict[str, nn.Module] = {}
    for task in dataset.tasks:
        outputs, start = dataset.outputs[task.name], typical_label(dataset, task)
        heads[task.name] = PyramidDecoder(widths, width, outputs, (height, width_), start)
    return SplitModel.from_stages(stages, check_cut(cut, len(stages)), heads)


class PyramidDecoder(nn.Module):
    """torchvision's feature pyramid, its maps summed at the finest size, and a prediction."""

    def __init__(self, widths: Sequence[int], width: int, outputs: int, size: tuple[int, int], start: float) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.size = size
        self.pyramid = FeaturePyramidNetwork(list(widths), width)
        self.smooth = convolution(width, width)
        self.predict = Prediction(width, outputs, start)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """``[N, outputs, H, W]``."""
        levels = list(self.pyramid({str(index): one for index, one in enumerate(maps)}).values())
        finest = (levels[0].shape[-2], levels[0].shape[-1])
        total = levels[0]
        for level in levels[1:]:
            total = total + resize(level, finest)
        return resize(self.predict(self.smooth(total)), self.size)
