"""A small convolutional network that learns on two CPU cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sidetask_core import SplitModel
from sidetask_datasets import Dataset
from torch import Tensor, nn

from sidetask_bench.networks.parts import Prediction, check_cut, convolution, image_shape, resize, typical_label


def small(
    dataset: Dataset,
    *,
    cut: int | None = None,
    widths: Sequence[int] = (16, 32, 64, 128),
    head_width: int = 32,
) -> SplitModel:
    """A residual encoder of a few hundred thousand parameters, split at any stage.

    Every stage halves the image and adds one residual convolution. A dense head brings the maps of all stages to one
    width and sums them from coarse to fine (a feature pyramid), so that edges stay sharp and every pixel sees most of
    the image; a classification head pools the last map and is linear. Normals come out unnormalised: their loss and
    metrics normalise. A head that measures begins at the median of some training labels: depths of metres would else
    take a short training most of its steps to reach.

    Args:
        dataset: says how large the images are, which heads there are, and whether they are dense.
        cut: how many stages are shared: 0 is single-task learning, ``len(widths)`` (the default) the shared bottom.
        widths: channels of each stage; as many stages as numbers.
        head_width: channels inside a dense head.

    Returns:
        A model from ``[N, C, H, W]`` to, for each task, ``[N, outputs, H, W]`` (dense) or ``[N, outputs]``.

    Raises:
        ValueError: for an impossible cut, no stage, or images too small to halve once per stage.

    >>> from sidetask_datasets import digits
    >>> model = small(digits(train=8, validation=2, test=2), cut=2, widths=(8, 16, 16))
    >>> {task: tuple(logits.shape) for task, logits in model(torch.zeros(5, 1, 36, 36)).items()}
    {'top_left': (5, 10), 'bottom_right': (5, 10)}
    >>> len(model.shared), len(model.branches["top_left"])
    (2, 1)
    """
    widths = [int(width) for width in widths]
    channels, height, width = image_shape(dataset)
    if not widths or min(*widths, head_width) < 1:
        raise ValueError(f"widths and head_width must be positive, found {widths} and {head_width}")
    if min(height, width) < 2 ** len(widths):
        raise ValueError(
            f"{len(widths)} stages halve an image {len(widths)} times; {height}×{width} is too small for that, "
            "give fewer widths"
        )
    blocks = [Block(a, b) for a, b in zip([channels, *widths], widths, strict=False)]
    heads: dict[str, nn.Module] = {}
    if dataset.dense:
        stages: list[nn.Module] = [Level(block) for block in blocks]
        for task in dataset.tasks:
            outputs, start = dataset.outputs[task.name], typical_label(dataset, task)
            heads[task.name] = PyramidHead(widths, head_width, outputs, (height, width), start)
    else:
        stages = list(blocks)
        for task in dataset.tasks:
            heads[task.name] = PoolHead(widths[-1], dataset.outputs[task.name])
    return SplitModel.from_stages(stages, check_cut(cut, len(stages)), heads)


class Block(nn.Module):
    """Halve the image, then refine it by one residual convolution; an odd side rounds up."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = convolution(inputs, outputs, stride=2)
        self.refine = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H/2, W/2]``."""
        x = self.down(x)
        return torch.relu(x + self.refine(x))


class Level(nn.Module):
    """A stage that hands on what came before it: from an image or a list of maps to a list with one more."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor | list[Tensor]) -> list[Tensor]:
        """The maps of the stages before, and this one's."""
        return [self.block(x)] if isinstance(x, Tensor) else [*x, self.block(x[-1])]


class PyramidHead(nn.Module):
    """Sum the maps of all stages from coarse to fine, and predict at the size of the image."""

    def __init__(self, widths: Sequence[int], width: int, outputs: int, size: tuple[int, int], start: float) -> None:
        super().__init__()
        self.size = size
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, width, 1) for inputs in widths)
        self.smooth = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), convolution(width, width))
        self.predict = Prediction(width, outputs, start)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """``[N, outputs, H, W]``."""
        total = self.lateral[-1](maps[-1])
        for lateral, finer in zip(self.lateral[-2::-1], maps[-2::-1], strict=True):
            total = lateral(finer) + resize(total, (finer.shape[-2], finer.shape[-1]))
        return resize(self.predict(self.smooth(total)), self.size)


class PoolHead(nn.Module):
    """Average the last map over the image; linear."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, outputs]``."""
        return self.linear(x.mean(dim=(2, 3)))
