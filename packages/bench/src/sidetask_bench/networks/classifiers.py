"""Networks for labels of whole images: ResNet, VGG-16 and LeNet, split at any stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sidetask_core import SplitModel
from sidetask_datasets import Dataset
from torch import Tensor, nn

from sidetask_bench.networks.domains import normalised_by_domain
from sidetask_bench.networks.parts import check_cut, check_whole, image_shape
from sidetask_bench.networks.resnet import FEATURES, check_depth, resnet_stages
from sidetask_bench.networks.weights import load_weights


def resnet(
    dataset: Dataset,
    *,
    cut: int | None = None,
    depth: int = 18,
    hidden: int = 512,
    weights: str | Path | None = None,
) -> SplitModel:
    """A ResNet with one head per task: mean over the image, one hidden layer, logits.

    Args:
        dataset: says how large the images are and which heads there are.
        cut: how many of the five stages (stem, ``layer1`` … ``layer4``) are shared; all by default.
        depth: 18 or 50.
        hidden: width of a head's hidden layer; 512 on CelebA in SAAL. 0: none.
        weights: of torchvision's ResNet of that depth, by name or from a file as for `deeplabv3`.

    Returns:
        A model from ``[N, C, H, W]`` to ``[N, outputs]`` for each task.

    Raises:
        ValueError: for another depth, an impossible cut, a dense dataset, or weights that do not fit.
    """
    check_depth(depth)
    check_whole("resnet", dataset)
    stages = resnet_stages(depth, image_shape(dataset)[0], weights, stride=32)
    heads = _heads(dataset, FEATURES[depth], hidden)
    return SplitModel.from_stages(stages, check_cut(cut, len(stages)), heads)


def vgg16(
    dataset: Dataset,
    *,
    cut: int | None = None,
    width: int = 64,
    hidden: int = 0,
    by_domain: bool = False,
    weights: str | Path | None = None,
) -> SplitModel:
    """The convolutions of VGG-16 with batch normalisation, for small images, and one head per task.

    Five stages; each but the first halves the image before. A head averages over what is left of it and is linear, as
    in Auto-λ's network for CIFAR-100 ([Liu et al. 2022](https://arxiv.org/abs/2202.03091)); the three wide linear
    layers of VGG-16 are not there.

    Args:
        dataset: says how large the images are and which heads there are.
        cut: how many of the five stages are shared; all by default.
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.
        hidden: width of a head's hidden layer; 0 (the default): none.
        by_domain: shared stages normalise each input by itself (`normalised_by_domain`), for tasks with inputs of
            their own, as on CIFAR-100's domains in Auto-λ.
        weights: of torchvision's ``vgg16_bn``, whose classifier is ignored, by name or from a file as for `deeplabv3`.

    Returns:
        A model from ``[N, C, H, W]`` to ``[N, outputs]`` for each task.

    Raises:
        ValueError: for an impossible cut or width, a dense dataset, images smaller than 16×16, `by_domain` where tasks
            have their input in common, or weights that do not fit.
    """
    check_whole("vgg16", dataset)
    channels, rows, columns = image_shape(dataset)
    if min(rows, columns) < 16:
        raise ValueError(f"vgg16 halves an image four times; {rows}×{columns} is too small for that")
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise ValueError(f"width is a number of channels, at least 1, found {width!r}")
    stages = vgg_stages(width, channels, weights)
    model = SplitModel.from_stages(stages, check_cut(cut, len(stages)), _heads(dataset, 8 * width, hidden))
    return normalised_by_domain(model, dataset) if by_domain else model


def vgg_stages(width: int = 64, channels: int = 3, weights: str | Path | None = None) -> list[nn.Sequential]:
    """The convolutions of torchvision's ``vgg16_bn``, without the last pooling: maps at 1, 1/2, 1/4, 1/8, 1/16.

    Args:
        width: channels of the first stage.
        channels: of the image; with other than three, the first convolution is new.
        weights: of torchvision's ``vgg16_bn``, by name or from a file; None: none.
    """
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers([x if isinstance(x, str) else x * width // 64 for x in cfgs["D"][:-1]], batch_norm=True)
    if channels != 3:
        features[0] = nn.Conv2d(channels, width, 3, padding=1)
    if weights is not None:
        load_weights(nn.ModuleDict({"features": features}), weights, "vgg16_bn", but="classifier.")
    stages: list[list[nn.Module]] = [[]]
    for layer in features:
        if isinstance(layer, nn.MaxPool2d):
            stages.append([])
        stages[-1].append(layer)
    return [nn.Sequential(*stage) for stage in stages]


def lenet(dataset: Dataset, *, cut: int | None = None, hidden: int = 50) -> SplitModel:
    """The LeNet of the multi-digit benchmark: two convolutions, one hidden layer, linear heads.

    Convolutions 9×9 to 10 and 5×5 to 20 channels, each followed by pooling, as in Pareto multi-task learning
    ([Lin et al. 2019](https://arxiv.org/abs/1912.12854)) on 36×36 images.

    Args:
        dataset: says how large the images are and which heads there are.
        cut: how many of the three stages are shared; all by default.
        hidden: width of the last shared layer.

    Returns:
        A model from ``[N, C, H, W]`` to ``[N, outputs]`` for each task.

    Raises:
        ValueError: for an impossible cut, a dense dataset, or images smaller than 20×20.
    """
    check_whole("lenet", dataset)
    channels, height, width = image_shape(dataset)
    if min(height, width) < 20:
        raise ValueError(f"lenet needs images of at least 20×20, found {height}×{width}")
    rows, columns = (((side - 8) // 2 - 4) // 2 for side in (height, width))
    stages = [
        nn.Sequential(nn.Conv2d(channels, 10, 9), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(10, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(20 * rows * columns, hidden), nn.ReLU()),
    ]
    heads = {task.name: nn.Linear(hidden, dataset.outputs[task.name]) for task in dataset.tasks}
    return SplitModel.from_stages(stages, check_cut(cut, len(stages)), heads)


def _heads(dataset: Dataset, inputs: int, hidden: int) -> dict[str, nn.Module]:
    return {task.name: MeanHead(inputs, hidden, dataset.outputs[task.name]) for task in dataset.tasks}


class MeanHead(nn.Sequential):
    """Average a map over the image; one hidden layer, or none; linear."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        inside: Sequence[nn.Module] = [nn.Linear(inputs, hidden), nn.ReLU()] if hidden else []
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *inside, nn.Linear(hidden or inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, outputs]``."""
        return super().forward(x)
