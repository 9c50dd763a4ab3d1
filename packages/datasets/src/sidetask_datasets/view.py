"""How inputs, targets and predictions are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

Colour = tuple[int, int, int]
Pixels = NDArray[numpy.uint8]
ViewKind = Literal["image", "classes", "scalar", "normals", "binary", "label", "distribution", "vector"]

UNLABELLED: Colour = (0, 0, 0)
# Dark violet to light yellow, of evenly rising lightness: near is bright.
_RAMP = ((252, 246, 196), (250, 190, 92), (232, 116, 66), (176, 58, 94), (98, 36, 112), (28, 18, 64))


@dataclass(frozen=True)
class View:
    """Turns one sample of a target or a prediction into a picture.

    ======== ===================================== ============================ ============================
    kind     target                                prediction                   picture
    ======== ===================================== ============================ ============================
    image    ``[C, H, W]`` standardised            the same                     the photograph
    classes  ``[H, W]`` integer, −1 unlabelled     ``[C, H, W]`` logits         each class in its colour
    scalar   ``[1, H, W]``, 0 unlabelled           ``[1, H, W]``                bright is low, dark is high
    normals  ``[3, H, W]``, 0 unlabelled           ``[3, H, W]`` any length     red right, green up, blue near
    binary   ``[1, H, W]`` integer, −1 unlabelled  ``[1, H, W]`` logits         white is what is sought
    label    0-dim integer                         ``[C]`` logits               the class's name
    vector   ``[K]``                               the same                     a bar each, up above 0, down below
    ======== ===================================== ============================ ============================

    A ``distribution`` ``[K]`` or ``[K, h, w]``, 0 unlabelled, and its prediction, logits ``[K]`` or ``[K, H, W]``, are
    drawn as the likeliest class, each in its colour. Integer tensors are read as labels, floating ones as predictions.
    Of an image with more than three channels the first three are drawn.

    Args:
        kind: a row of the table.
        classes: names, in order of their ids.
        colours: one per class; chosen by `palette` if empty.
        limits: values drawn as the two ends of the ramp (scalar) or of the bars (vector), in the target's unit.
        mean: undoes standardisation (image), one number per channel; 0 if empty.
        std: likewise; 1 if empty.
        size: height and width of the picture of a label or vector, in pixels.

    Raises:
        ValueError: for an unknown kind, or as many colours as there are not classes.

    >>> view = View("classes", classes=("floor", "wall"), colours=((255, 0, 0), (0, 0, 255)))
    >>> view.image(torch.tensor([[0, 1, -1]])).tolist()
    [[[255, 0, 0], [0, 0, 255], [0, 0, 0]]]
    """

    kind: ViewKind
    classes: tuple[str, ...] = ()
    colours: tuple[Colour, ...] = ()
    limits: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    size: tuple[int, int] = (36, 36)

    def __post_init__(self) -> None:
        if self.kind not in get_args(ViewKind):
            raise ValueError(f"a view's kind is one of {', '.join(get_args(ViewKind))}, not {self.kind!r}")
        if not self.colours:
            object.__setattr__(self, "colours", palette(len(self.classes)))
        if len(self.colours) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes need as many colours, found {len(self.colours)}")

    def image(self, sample: Tensor) -> Pixels:
        """The picture of one sample, ``[H, W, 3]`` uint8.

        Raises:
            ValueError: if the tensor has not the dimensions that the kind has in the table.
        """
        sample = sample.detach().cpu()
        allowed = {"label": (0, 1), "vector": (1,), "classes": (2, 3), "distribution": (1, 3)}.get(self.kind, (3,))
        if sample.ndim not in allowed:
            wanted = " or ".join(str(n) for n in allowed)
            raise ValueError(f"a view of {self.kind} draws {wanted} dimensions, found {list(sample.shape)}")
        match self.kind:
            case "image":
                return self._photograph(sample.float())
            case "classes":
                ids = sample.float().argmax(0) if sample.ndim == 3 else sample.long()
                return _bytes(torch.tensor([*self.colours, UNLABELLED])[ids])
            case "scalar":
                return self._ramp(sample[0].float())
            case "normals":
                vectors = sample.float()
                length = vectors.norm(dim=0)
                facing = torch.stack([vectors[0], -vectors[1], -vectors[2]]) / length.clamp(min=1e-12)
                return _bytes(((127.5 + 127.5 * facing) * (length > 0)).movedim(0, -1))
            case "binary":
                shown = sample[0].float().sigmoid() if sample.is_floating_point() else sample[0].clamp(min=0).float()
                return _bytes((255.0 * shown)[..., None].expand(-1, -1, 3))
            case "distribution":
                maps = sample.float() if sample.ndim == 3 else sample.float().view(-1, 1, 1).expand(-1, *self.size)
                ids = torch.where((maps != 0).any(dim=0), maps.argmax(dim=0), -1)
                return _bytes(torch.tensor([*self.colours, UNLABELLED])[ids])
            case "vector":
                return self._bars(sample.float())
            case "label":
                index = int(sample.float().argmax()) if sample.ndim else int(sample)
                return self._tile("?" if index < 0 else self.classes[index])

    def _photograph(self, sample: Tensor) -> Pixels:
        channels = 3 if len(sample) > 3 else len(sample)
        sample = sample[:channels]
        std = torch.tensor(self.std[:channels] or (1.0,)).view(-1, 1, 1)
        mean = torch.tensor(self.mean[:channels] or (0.0,)).view(-1, 1, 1)
        return _bytes((255.0 * (sample * std + mean)).movedim(0, -1).expand(-1, -1, 3))

    def _ramp(self, values: Tensor) -> Pixels:
        low, high = self.limits
        ramp = torch.tensor(_RAMP, dtype=torch.float32)
        place = ((values - low) / (high - low)).nan_to_num(0.0).clamp(0, 1) * (len(ramp) - 1)
        below = place.long().clamp(max=len(ramp) - 2)
        part = (place - below)[..., None]
        colours = ramp[below] * (1 - part) + ramp[below + 1] * part
        return _bytes(torch.where((values == 0)[..., None], torch.zeros(3), colours))

    def _bars(self, values: Tensor) -> Pixels:
        height, width = self.size
        low, high = self.limits
        # Places between the rows, 0 the upper edge: of each value and of zero.
        ends = torch.cat([values.nan_to_num(0.0), values.new_zeros(1)]).clamp(low, high)
        ends = ((high - ends) / (high - low) * height).round()
        column = torch.arange(width) * len(values) // width
        row = torch.arange(height)[:, None] + 0.5
        tops, zero = ends[:-1][column], ends[-1]
        inside = (row > torch.minimum(tops, zero)) & (row < torch.maximum(tops, zero))
        colours = torch.tensor(palette(len(values)))[column].expand(height, -1, -1)
        return _bytes(torch.where(inside[..., None], colours, 255))

    def _tile(self, text: str) -> Pixels:
        height, width = self.size
        tile = Image.new("RGB", (width, height))
        centre, white = (width / 2, height / 2), (255, 255, 255)
        ImageDraw.Draw(tile).text(centre, text, fill=white, anchor="mm", font_size=height / 2)
        return numpy.asarray(tile)


def palette(count: int) -> tuple[Colour, ...]:
    """Well separated colours: hues by the golden ratio, in three lightnesses."""
    import colorsys

    colours = []
    for index in range(count):
        rgb = colorsys.hls_to_rgb(index * 0.618034 % 1.0, (0.62, 0.44, 0.76)[index % 3], 0.6)
        colours.append((round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])))
    return tuple(colours)


def gallery(rows: Sequence[Sequence[Pixels]], gap: int = 2, zoom: int = 1) -> Pixels:
    """Pictures side by side, row under row, ``[H, W, 3]`` uint8 on white.

    Args:
        rows: pictures; those of a row may differ in size, each column is as wide as its widest.
        gap: pixels between pictures, before zooming.
        zoom: every pixel becomes a square of so many.
    """
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    count = max(len(row) for row in rows)
    widths = [max((row[i].shape[1] for row in rows if i < len(row)), default=0) for i in range(count)]
    canvas = numpy.full((sum(heights) + gap * (len(rows) - 1), sum(widths) + gap * (count - 1), 3), 255, numpy.uint8)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for picture, width in zip(row, widths, strict=False):
            canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
            left += width + gap
        top += height + gap
    return canvas.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _bytes(values: Tensor) -> Pixels:
    return values.float().round().clamp(0, 255).to(torch.uint8).contiguous().numpy()
