"""Augmentation of a whole batch at once, image and labels moved alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sidetask_datasets.columns import Kind


@dataclass(frozen=True)
class Augmentation:
    """Scale-crop and horizontal flip, the augmentation of the dense multi-task benchmarks.

    A window of 1/scale of the height and width, at a random place, is enlarged to the full size: image bilinear, labels
    nearest, depth divided by the scale. A flip also negates the x component of normals. As no scale is
    below 1, nothing is ever padded. Edges are enlarged as labels are, and so get as much wider. Tokens, whose patches
    the window need not meet, are mixed bilinearly; of the labelled ones alone if these are at least half of a mixture,
    which is unlabelled otherwise.

    Args:
        scales: one is drawn with equal probability. (1.0, 1.2, 1.5) in MTAN's and Auto-λ's NYUv2 protocol.
        flip: probability of a horizontal flip; 0.5 in the same.

    Raises:
        ValueError: for a scale below 1 or a probability outside [0, 1].

    >>> image = torch.arange(4.0).view(1, 1, 1, 4)
    >>> numbers = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    >>> Augmentation(scales=(1.0,), flip=1.0)(image, {}, {}, numbers)[0].flatten().tolist()
    [3.0, 2.0, 1.0, 0.0]
    """

    scales: Sequence[float] = (1.0, 1.2, 1.5)
    flip: float = 0.5
    draws: ClassVar[int] = 4  # uniform numbers needed per sample: scale, top, left, flip

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) < 1.0:
            raise ValueError(f"scales are numbers of at least 1, found {tuple(self.scales)}")
        if not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"flip is a probability, found {self.flip}")

    def __call__(
        self, image: Tensor, targets: Mapping[str, Tensor], kinds: Mapping[str, Kind], numbers: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch, augmented.

        Args:
            image: ``[n, C, H, W]`` float.
            targets: as a batch has them, each of the size of the image; tokens of any.
            kinds: the kind of each target; labels of whole images stay as they are.
            numbers: ``[n, 4]`` uniform in [0, 1).
        """
        height, width = image.shape[-2:]
        choices = numbers.new_tensor(list(self.scales))
        scale = choices[(numbers[:, 0] * len(choices)).long()]
        flip = numbers[:, 3] < self.flip
        rows = _window(height, scale, numbers[:, 1])
        columns = _window(width, scale, numbers[:, 2])
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        image = _sample_linear(image, rows, columns)
        moved = {}
        for name, target in targets.items():
            kind = kinds[name]
            if kind == "tokens":
                target = self._tokens(target, scale, flip, numbers)
            elif kind not in ("label", "soft"):
                target = _sample_nearest(target, rows, columns)
            if kind == "depth":
                target = target / scale.view(-1, 1, 1, 1)
            if kind == "normals":
                sign = torch.where(flip, -1.0, 1.0).to(target.dtype)
                target = torch.cat([target[:, :1] * sign.view(-1, 1, 1, 1), target[:, 1:]], dim=1)
            moved[name] = target
        return image, moved

    def _tokens(self, target: Tensor, scale: Tensor, flip: Tensor, numbers: Tensor) -> Tensor:
        """The window in the coordinates of a coarser grid; a mixture of distributions is one, of what is labelled."""
        height, width = target.shape[-2:]
        columns = _window(width, scale, numbers[:, 2])
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        mixed = _sample_linear(target, _window(height, scale, numbers[:, 1]), columns)
        labelled = mixed.sum(dim=1, keepdim=True)
        return torch.where(labelled >= 0.5, mixed / labelled, 0.0)


def _window(size: int, scale: Tensor, place: Tensor) -> Tensor:
    """Source coordinate of every target pixel's centre, ``[n, size]``, in pixels from the image's edge."""
    visible = size / scale
    centres = (torch.arange(size, device=scale.device) + 0.5) / size
    return ((size - visible) * place)[:, None] + visible[:, None] * centres


def _sample_linear(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    y = (2.0 * rows / height - 1.0)[:, :, None].expand(-1, -1, columns.shape[1])
    x = (2.0 * columns / width - 1.0)[:, None, :].expand(-1, rows.shape[1], -1)
    grid = torch.stack([x, y], dim=-1).to(image.dtype)
    return functional.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _sample_nearest(target: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    height, width = target.shape[-2:]
    y = rows.long().clamp_(0, height - 1)
    x = columns.long().clamp_(0, width - 1)
    batch = torch.arange(len(target), device=target.device)
    if target.ndim == 3:
        return target[batch[:, None, None], y[:, :, None], x[:, None, :]]
    channel = torch.arange(target.shape[1], device=target.device)
    return target[batch[:, None, None, None], channel[None, :, None, None], y[:, None, :, None], x[:, None, None, :]]
