"""Augmentation of a whole batch at once, image and labels moved alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sidetask_datasets.columns import Column, Kind

_WHOLE = ("label", "soft", "vector")  # kinds that say something of the whole image


@dataclass(frozen=True)
class Augmentation:
    """Scale-crop and horizontal flip, the augmentation of the dense multi-task benchmarks; rotation; pad-crop.

    The image is turned about its centre. A window of 1/scale of the height and width, at a random place, is enlarged to
    the full size: image bilinear, labels nearest, depth divided by the scale, disparity multiplied by it. A flip also
    negates the x component of normals, and a rotation turns them. Edges are enlarged as labels are, and so get as much
    wider. Tokens, whose patches the window need not meet, are mixed bilinearly; of the labelled ones alone if these are
    at least half of a mixture, which is unlabelled otherwise. What comes from beyond the image, where it was turned or
    padded, is black and unlabelled.

    Args:
        scales: one is drawn with equal probability. (1.0, 1.2, 1.5) in MTAN's and Auto-λ's NYUv2 protocol.
        flip: probability of a horizontal flip; 0.5 in the same.
        rotation: greatest angle in degrees, drawn evenly between it and its negative.
        pad: pixels of black put around the image before a window of its size is cut out at a random place; 4 in the
            CIFAR protocol. Only without scales.

    Raises:
        ValueError: for a scale below 1, a probability outside [0, 1], an angle that is not between 0 and 180, a padding
            that is no whole number from 0, or one with scales.

    >>> image = torch.arange(4.0).view(1, 1, 1, 4)
    >>> numbers = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.5]])
    >>> Augmentation(scales=(1.0,), flip=1.0)(image, {}, {}, numbers)[0].flatten().tolist()
    [3.0, 2.0, 1.0, 0.0]
    """

    scales: Sequence[float] = (1.0, 1.2, 1.5)
    flip: float = 0.5
    rotation: float = 0.0
    pad: int = 0
    draws: ClassVar[int] = 5  # uniform numbers needed per sample: scale, top, left, flip, angle

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) < 1.0:
            raise ValueError(f"scales are numbers of at least 1, found {tuple(self.scales)}")
        if not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"flip is a probability, found {self.flip}")
        if not 0.0 <= self.rotation <= 180.0:
            raise ValueError(f"rotation is an angle of 0 to 180 degrees, found {self.rotation}")
        if not isinstance(self.pad, int) or self.pad < 0:
            raise ValueError(f"pad is a number of pixels, found {self.pad!r}")
        if self.pad and max(self.scales) > 1.0:
            raise ValueError(f"an image is padded or scaled, not both; found pad {self.pad} and scales {self.scales}")

    def __call__(
        self, image: Tensor, targets: Mapping[str, Tensor], kinds: Mapping[str, Kind], numbers: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch, augmented.

        Args:
            image: ``[n, C, H, W]``, where 0 is black.
            targets: as a batch has them, each of the size of the image; tokens of any.
            kinds: the kind of each target; what is of whole images stays as it is.
            numbers: ``[n, 5]`` uniform in [0, 1).
        """
        motion = self.motion(numbers, (image.shape[-2], image.shape[-1]))
        moved = {name: motion.turned(kinds[name], motion.sampled(kinds[name], one)) for name, one in targets.items()}
        return motion.image(image), moved

    def motion(self, numbers: Tensor, size: tuple[int, int]) -> Motion:
        """What these numbers, ``[n, 5]`` uniform in [0, 1), do to images of this size."""
        choices = numbers.new_tensor(list(self.scales))
        scale = choices[(numbers[:, 0] * len(choices)).long()] if len(choices) > 1 else choices.expand(len(numbers))
        if self.pad:
            corner = (numbers[:, 1:3] * (2 * self.pad + 1)).floor() - self.pad
        else:
            corner = (1.0 - 1.0 / scale)[:, None] * numbers[:, 1:3] * numbers.new_tensor(size)
        angle = (2.0 * numbers[:, 4] - 1.0) * math.radians(self.rotation) if self.rotation else None
        return Motion(size, scale, corner, numbers[:, 3] < self.flip, angle, bool(self.pad))


@dataclass(frozen=True, eq=False)
class Motion:
    """Where each pixel of an augmented batch comes from.

    Args:
        size: height and width of the images.
        scale: ``[n]``, by which the window is enlarged.
        corner: ``[n, 2]``, top and left of the window in pixels.
        flip: ``[n]``, whether it is mirrored.
        angle: ``[n]``, by which images are turned before, in radians, clockwise; None: not at all.
        padded: whether the window may leave the image, by whole pixels.
    """

    size: tuple[int, int]
    scale: Tensor
    corner: Tensor
    flip: Tensor
    angle: Tensor | None
    padded: bool

    def target(self, column: Column, rows: Tensor) -> Tensor:
        """Rows of a column, moved as they are stored, in few bytes, and then as a batch has them."""
        if column.kind == "tokens":
            return self.sampled(column.kind, column.expand(rows))
        return self.turned(column.kind, column.expand(self.sampled(column.kind, rows)))

    def image(self, image: Tensor) -> Tensor:
        """Images ``[n, C, H, W]``, where 0 is black; floating, unless nothing has to be interpolated."""
        if self.padded and self.angle is None:
            return self._nearest(image, 0)
        return self._linear(image.float() if not image.is_floating_point() else image)

    def sampled(self, kind: Kind, target: Tensor) -> Tensor:
        """Labels of this kind, stored or as a batch has them, from where they are now; their values stay."""
        if kind in _WHOLE:
            return target
        if kind == "tokens":
            mixed = self._linear(target)
            # A mixture of distributions is one, but not a mixture with what is unlabelled.
            labelled = mixed.sum(dim=1, keepdim=True)
            return torch.where(labelled >= 0.5, mixed / labelled, 0.0)
        unlabelled = 0
        if kind in ("classes", "binary"):
            unlabelled = 255 if target.dtype == torch.uint8 else -1
        return self._nearest(target, unlabelled)

    def turned(self, kind: Kind, target: Tensor) -> Tensor:
        """Labels of this kind, as a batch has them, with the values that they have for the new view."""
        match kind:
            case "depth":
                return target / self.scale.view(-1, 1, 1, 1)
            case "disparity":
                return target * self.scale.view(-1, 1, 1, 1)
            case "normals":
                if self.angle is not None:
                    x, y, z = target.split(1, dim=1)
                    cos, sin = (f(self.angle).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
                    target = torch.cat([cos * x - sin * y, sin * x + cos * y, z], dim=1)
                sign = torch.ones(len(target), 3, 1, 1, dtype=target.dtype, device=target.device)
                sign[:, 0, 0, 0] = torch.where(self.flip, -1.0, 1.0).to(target.dtype)
                return target * sign
            case _:
                return target

    def _source(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Where the centres of a grid over the batch come from, in the images' pixels from their top and left edges.

        Rows ``[n, height, 1]`` and columns ``[n, 1, width]``, or both ``[n, height, width]`` where images are turned.
        """
        device = self.scale.device
        down = (torch.arange(height, device=device) + 0.5) * (self.size[0] / height)
        right = (torch.arange(width, device=device) + 0.5) * (self.size[1] / width)
        y = self.corner[:, :1] + down / self.scale[:, None]
        x = self.corner[:, 1:] + torch.where(self.flip[:, None], self.size[1] - right, right) / self.scale[:, None]
        y, x = y[:, :, None], x[:, None, :]
        if self.angle is None:
            return y, x
        cos, sin = torch.cos(self.angle).view(-1, 1, 1), torch.sin(self.angle).view(-1, 1, 1)
        y, x = y - self.size[0] / 2, x - self.size[1] / 2
        return cos * y - sin * x + self.size[0] / 2, cos * x + sin * y + self.size[1] / 2

    @cached_property
    def _still(self) -> bool:
        """Whether a lone image stays where it is, but for a flip; only on the CPU, where it costs nothing to ask."""
        alone = len(self.scale) == 1 and self.scale.device.type == "cpu" and self.angle is None
        return alone and not self.padded and float(self.scale) == 1.0

    def _mirrored(self, image: Tensor) -> Tensor:
        return image.flip(-1) if bool(self.flip) else image

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Row and column of the nearest pixel, and where it is outside the image, if any can be."""
        height, width = self.size
        y, x = (place.floor().long() for place in self._source(height, width))
        outside = None
        if self.angle is not None or self.padded:
            outside = ((y < 0) | (y >= height) | (x < 0) | (x >= width)).unsqueeze(1)
        return y.clamp_(0, height - 1), x.clamp_(0, width - 1), outside

    def _linear(self, image: Tensor) -> Tensor:
        if self._still:
            return self._mirrored(image)
        y, x = self._source(image.shape[-2], image.shape[-1])
        y, x = torch.broadcast_tensors(2.0 * y / self.size[0] - 1.0, 2.0 * x / self.size[1] - 1.0)
        grid = torch.stack([x, y], dim=-1).to(image.dtype)
        beyond = "border" if self.angle is None and not self.padded else "zeros"
        return functional.grid_sample(image, grid, mode="bilinear", padding_mode=beyond, align_corners=False)

    def _nearest(self, target: Tensor, unlabelled: int) -> Tensor:
        """Of ``[n, H, W]`` or ``[n, C, H, W]``."""
        if self._still:
            return self._mirrored(target)
        y, x, outside = self._places
        wide = target if target.ndim == 4 else target.unsqueeze(1)
        count, channels, _, width = wide.shape
        if self.angle is None and count == 1:
            # Several times as fast as the general way on the CPU, and no slower elsewhere.
            found = wide.index_select(2, y.view(-1)).index_select(3, x.view(-1))
        else:
            places = (y * width + x).view(count, 1, -1).expand(-1, channels, -1)
            found = wide.flatten(2).gather(2, places).view_as(wide)
        if outside is not None:
            found = found.masked_fill_(outside, unlabelled)
        return found.view_as(target)
