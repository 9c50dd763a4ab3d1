"""Augmentation of a whole batch at once, image and labels moved alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy
import torch
from numpy.typing import NDArray
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
        moved = {name: motion.turn_(kinds[name], motion.sampled(kinds[name], one)) for name, one in targets.items()}
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
        return Motion(size, scale, corner, numbers[:, 3] < self.flip, angle, self.pad)


@dataclass(frozen=True, eq=False)
class Motion:
    """Where each pixel of an augmented batch comes from.

    Args:
        size: height and width of the images.
        scale: ``[n]``, by which the window is enlarged.
        corner: ``[n, 2]``, top and left of the window in pixels.
        flip: ``[n]``, whether it is mirrored.
        angle: ``[n]``, by which images are turned before, in radians, clockwise; None: not at all.
        pad: by how many whole pixels the window may leave the image; 0 where it is scaled.
    """

    size: tuple[int, int]
    scale: Tensor
    corner: Tensor
    flip: Tensor
    angle: Tensor | None
    pad: int

    def __getitem__(self, index: int) -> Motion:
        """What one image does, as a batch of one."""
        row = slice(index, index + 1)
        angle = None if self.angle is None else self.angle[row]
        return replace(self, scale=self.scale[row], corner=self.corner[row], flip=self.flip[row], angle=angle)

    def read(self, column: Column, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows of a column, moved as they are stored, in few bytes, and then as `Column.expand` has them."""
        if column.kind == "image":
            return column.expand(self.image(rows), out)
        if column.kind == "tokens":
            moved = self.sampled(column.kind, column.expand(rows))
            return moved if out is None else out.copy_(moved)
        return self.turn_(column.kind, column.expand(self.sampled(column.kind, rows), out))

    def read_one(self, index: int, column: Column, row: Tensor, out: Tensor) -> None:
        """One image of the batch: `row`, ``[1, *]`` as it is stored, into `out`, as a batch has it.

        On the CPU faster than `read` for images of many pixels, and the same: labels bit for bit, images but for
        rounding.
        """
        if self.angle is None and not self.pad and column.kind not in (*_WHOLE, "tokens"):
            self._crops.read(index, column, row, out)
        else:
            self[index].read(column, row, out)

    @cached_property
    def _crops(self) -> _Crops:
        return _Crops(self)

    def image(self, image: Tensor) -> Tensor:
        """Images ``[n, C, H, W]``, where 0 is black; floating, unless nothing has to be interpolated."""
        if self.pad and self.angle is None:
            return self._shifted(image, 0)
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
        if self.pad and self.angle is None:
            return self._shifted(target, unlabelled)
        return self._nearest(target, unlabelled)

    def turn_(self, kind: Kind, target: Tensor) -> Tensor:
        """Labels of this kind, as a batch has them, given the values that they have in the new view, in place."""
        match kind:
            case "depth":
                return target.div_(self.scale.view(-1, 1, 1, 1))
            case "disparity":
                return target.mul_(self.scale.view(-1, 1, 1, 1))
            case "normals":
                if self.angle is not None:
                    x, y = target[:, 0].clone(), target[:, 1].clone()
                    cos, sin = (f(self.angle).view(-1, 1, 1) for f in (torch.cos, torch.sin))
                    target[:, 0] = cos * x - sin * y
                    target[:, 1] = sin * x + cos * y
                target[:, 0] *= torch.where(self.flip, -1.0, 1.0).to(target.dtype).view(-1, 1, 1)
                return target
            case _:
                return target

    def source(self, height: int, width: int) -> tuple[Tensor, Tensor]:
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
    def _places(self) -> tuple[Tensor, Tensor]:
        """The nearest pixel's place in a flat image, ``[n, H·W]``, and whether it is outside, ``[n, 1, H, W]``."""
        height, width = self.size
        y, x = (place.floor().long() for place in self.source(height, width))
        outside = ((y < 0) | (y >= height) | (x < 0) | (x >= width)).unsqueeze(1)
        return (y.clamp_(0, height - 1) * width + x.clamp_(0, width - 1)).flatten(1), outside

    def _linear(self, image: Tensor) -> Tensor:
        y, x = self.source(image.shape[-2], image.shape[-1])
        y, x = torch.broadcast_tensors(2.0 * y / self.size[0] - 1.0, 2.0 * x / self.size[1] - 1.0)
        grid = torch.stack([x, y], dim=-1).to(image.dtype)
        beyond = "border" if self.angle is None and not self.pad else "zeros"
        return functional.grid_sample(image, grid, mode="bilinear", padding_mode=beyond, align_corners=False)

    def _nearest(self, target: Tensor, unlabelled: int) -> Tensor:
        """Of ``[n, H, W]`` or ``[n, C, H, W]``."""
        places, outside = self._places
        wide = target if target.ndim == 4 else target.unsqueeze(1)
        found = wide.flatten(2).gather(2, places.unsqueeze(1).expand(-1, wide.shape[1], -1)).view_as(wide)
        if self.angle is not None or self.pad:
            found = found.masked_fill_(outside, unlabelled)
        return found.view_as(target)

    def _shifted(self, target: Tensor, unlabelled: int) -> Tensor:
        """Of ``[n, H, W]`` or ``[n, C, H, W]``, by whole pixels."""
        wide = target if target.ndim == 4 else target.unsqueeze(1)
        padded = functional.pad(wide, (self.pad,) * 4, value=unlabelled)
        windows = padded.unfold(2, self.size[0], 1).unfold(3, self.size[1], 1)
        top, left = (self.corner.long() + self.pad).unbind(1)
        found = windows[torch.arange(len(target), device=target.device), :, top, left]
        return torch.where(self.flip.view(-1, 1, 1, 1), found.flip(-1), found).view_as(target)


class _Crops:
    """What a motion that neither turns nor pads does to single images: it chooses columns, and then rows.

    Columns are chosen in the few bytes that are stored, and what is to be done to every pixel is done before its row is
    repeated.
    """

    def __init__(self, motion: Motion) -> None:
        self.motions = [motion[index] for index in range(len(motion.scale))]
        self.still = (motion.scale == 1.0).tolist()
        self.flip = motion.flip.tolist()
        places = zip(motion.source(*motion.size), motion.size, strict=True)
        self.rows, self.columns = (_Side(place.flatten(1), side) for place, side in places)

    def read(self, index: int, column: Column, row: Tensor, out: Tensor) -> None:
        if self.still[index]:
            column.expand(row.flip(-1) if self.flip[index] else row, out)
            if self.flip[index]:
                self.motions[index].turn_(column.kind, out)
            return
        seen = row[..., self.rows.seen[index], self.columns.seen[index]]
        if column.kind == "image":
            (high, low, down), (left, right, across) = self.rows.between(index), self.columns.between(index)
            wide = _taken(seen, left, -1).float()
            torch.lerp(wide, _taken(seen, right, -1).float(), across, out=wide)
            column.expand(wide, wide)
            torch.lerp(_taken(wide, high, -2), _taken(wide, low, -2), down[:, None], out=out)
        else:
            wide = column.expand(_taken(seen, self.columns.nearest[index], -1))
            if self.flip[index] or column.kind != "normals":
                self.motions[index].turn_(column.kind, wide)
            # "clip" writes into `out` without a copy between; there is nothing to be clipped.
            numpy.take(wide.numpy(), self.rows.nearest[index], axis=-2, out=out.numpy(), mode="clip")


class _Side:
    """Where the rows, or the columns, of each image of a batch come from.

    Args:
        places: ``[n, length]``, in pixels from the image's edge.
        count: rows or columns of the image.
    """

    def __init__(self, places: Tensor, count: int) -> None:
        # In numpy, which begins sooner than torch: there are few numbers.
        exact = places.numpy()
        # As `grid_sample` does at the border.
        beside = (exact - numpy.float32(0.5)).clip(0, count - 1)
        before = beside.astype(numpy.int64)
        after = (before + 1).clip(max=count - 1)
        # What is nearest is one of the two.
        first = before.min(axis=1)
        self.seen = [slice(*ends) for ends in zip(first.tolist(), (after.max(axis=1) + 1).tolist(), strict=True)]
        self.share = torch.from_numpy(beside - before.astype(numpy.float32))
        self.before, self.after = before - first[:, None], after - first[:, None]
        self.nearest = numpy.floor(exact).astype(numpy.int64).clip(0, count - 1) - first[:, None]

    def between(self, index: int) -> tuple[_Places, _Places, Tensor]:
        """Of an image, as they are counted in what is seen of it: those before, those after, and the share of these."""
        return self.before[index], self.after[index], self.share[index]


_Places = NDArray[numpy.int64]


def _taken(values: Tensor, places: _Places, axis: int) -> Tensor:
    # Of torch's own ways none is as fast along the last dimension of bytes, 16-bit and 64-bit numbers.
    return torch.from_numpy(numpy.take(values.numpy(), places, axis=axis))
