"""DeepLabV3 on a ResNet at output stride 8, split at any stage."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sidetask_core import SplitModel
from sidetask_datasets import Dataset
from torch import Tensor, nn

from sidetask_bench.networks.parts import check_cut, check_dense, convolution, image_shape, resize
from sidetask_bench.networks.weights import load_weights

_DEPTHS = {18: "resnet18", 50: "resnet50"}
FEATURES = {18: 512, 50: 2048}


def deeplabv3(
    dataset: Dataset,
    *,
    cut: int | None = None,
    depth: int = 50,
    weights: str | Path | None = None,
) -> SplitModel:
    """A ResNet whose last two stages dilate instead of shrinking, with one atrous pyramid head per task.

    The five stages are the stem and ``layer1`` … ``layer4``. Output stride 8 ([Chen et al. 2017](
    https://arxiv.org/abs/1706.05587)): the strides of ``layer3`` and ``layer4`` become dilations 2 and 4, where the
    convolution that had the stride keeps the dilation before it. The features at every second and fourth pixel are
    then those of the plain ResNet, so that its weights fit. Normals come out unnormalised: their loss and metrics
    normalise.

    Args:
        dataset: says how large the images are and which heads there are; it must be dense.
        cut: how many of the five stages are shared: 0 is single-task learning, 3 the half-shared network of the
            auxiliary-learning literature (stem, ``layer1``, ``layer2``), 5 (the default) the shared bottom.
        depth: 18 or 50.
        weights: of torchvision's ResNet of that depth, whose classifier is ignored: a name of torchvision's
            (``DEFAULT``, ``IMAGENET1K_V1``), downloaded at the first use, or a local file with the ``state_dict``;
            None (the default) trains from scratch. The weights see the images as the dataset gives them.

    Returns:
        A model from ``[N, C, H, W]`` to ``[N, outputs, H, W]`` for each task. Training needs batches of at least two
        images: the head normalises an image-level feature over the batch.

    Raises:
        ValueError: for a depth other than 18 or 50, an impossible cut, a dataset that is not dense, or weights that
            do not fit (the error names the keys).
    """
    check_depth(depth)
    check_dense("deeplabv3", dataset)
    channels, height, width = image_shape(dataset)
    stages = resnet_stages(depth, channels, weights)
    heads = {
        task.name: AtrousHead(FEATURES[depth], dataset.outputs[task.name], (height, width)) for task in dataset.tasks
    }
    return SplitModel.from_stages(stages, check_cut(cut, len(stages)), heads)


def check_depth(depth: int) -> None:
    """Refuse a ResNet that is not offered."""
    if depth not in _DEPTHS:
        raise ValueError(f"depth must be one of {', '.join(map(str, _DEPTHS))}, found {depth!r}")


def resnet_stages(
    depth: int, channels: int = 3, weights: str | Path | None = None, *, stride: Literal[8, 32] = 8
) -> list[nn.Sequential]:
    """Stem and four layers of a ResNet: maps at 1/4, 1/4, 1/8, 1/8, 1/8 of the image, or at 1/4, 1/4, 1/8, 1/16, 1/32.

    Args:
        depth: 18 or 50.
        channels: of the image; with other than three, the first convolution is new.
        weights: of torchvision's ResNet of that depth, by name or from a file; None: none.
        stride: 8 trades the strides of the last two layers for dilations, 32 is the plain ResNet.
    """
    import torchvision

    net = getattr(torchvision.models, _DEPTHS[depth])(weights=None)
    if channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    if weights is not None:
        load_weights(net, weights, _DEPTHS[depth], but="fc.")
    if stride == 8:
        _dilate(net.layer3, 2)
        _dilate(net.layer4, 4)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return [stem, net.layer1, net.layer2, net.layer3, net.layer4]


def _dilate(layer: nn.Module, dilation: int) -> None:
    """Trade the stride of a layer for a dilation, whichever of its convolutions has the stride."""
    for conv in layer.modules():
        if isinstance(conv, nn.Conv2d):
            own = dilation // 2 if conv.stride == (2, 2) else dilation
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (own, own)


class AtrousHead(nn.Module):
    """torchvision's atrous spatial pyramid, one 3×3 convolution, a linear read-out, and upsampling to the image.

    The pyramid is five parallel views of the map, 256 channels each: itself (1×1), three 3×3 convolutions at dilations
    12, 24, 36, and the image's mean; joined to 256. torchvision drops half of what is joined out; the papers' releases
    (Auto-λ, MTAN) do not, and neither does this.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: tuple[int, int],
        *,
        width: int = 256,
        rates: tuple[int, ...] = (12, 24, 36),
    ) -> None:
        super().__init__()
        from torchvision.models.segmentation.deeplabv3 import ASPP

        self.size = size
        self.pyramid = ASPP(inputs, rates, width)
        self.pyramid.project = self.pyramid.project[:-1]  # all but the dropout
        self.smooth = convolution(width, width)
        self.predict = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, outputs, H, W]``."""
        return resize(self.predict(self.smooth(self.pyramid(x))), self.size)
