"""Furniture, put together from boxes, cylinders and spheres and spread over the floor.

The floor in front of the camera is a grid of 3 rows and 4 columns, a cell for each piece, shuffled: cabinets, a pillar
and a lamp along the back wall; tables, chairs, balls, another lamp and a low cabinet before it. So hardly anything
stands in anything else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sidetask_datasets.scenes.world import Shapes

_COLUMNS = 4


class Dice:
    """Hands out the numbers of a batch of scenes in order."""

    def __init__(self, numbers: Tensor, difficulty: float) -> None:
        self.numbers = numbers
        self.difficulty = difficulty
        self.position = 0

    def __call__(self, low: float, high: float) -> Tensor:
        """``[B]`` uniform between `low` and `high`."""
        return self.many(low, high, 1)[:, 0]

    def many(self, low: float, high: float, count: int) -> Tensor:
        """``[B, count]`` uniform between `low` and `high`."""
        first, self.position = self.position, self.position + count
        if self.position > self.numbers.shape[1]:
            raise IndexError(f"a room takes more than {self.numbers.shape[1]} numbers")
        return low + (high - low) * self.numbers[:, first : self.position]

    def there(self, probability: float) -> Tensor:
        """``[B]``, 1 with this probability, else 0."""
        return (self(0.0, 1.0) < probability).float()


@dataclass(frozen=True, eq=False)
class Piece:
    """One shape in every scene of a batch; pieces of one group share their yaw and the draw of their material."""

    centre: Tensor
    half: Tensor
    yaw: Tensor
    label: str
    material: str
    leg: bool
    group: int


@dataclass(eq=False)
class Pieces:
    """Shapes as they are put down."""

    room: Tensor
    boxes: list[Piece] = field(default_factory=list)
    cylinders: list[Piece] = field(default_factory=list)
    spheres: list[Piece] = field(default_factory=list)
    groups: int = 0

    def put(
        self,
        kind: list[Piece],
        at: tuple[Tensor, Tensor, Tensor],
        half: tuple[Tensor | float, Tensor | float, Tensor | float],
        there: Tensor,
        label: str,
        *,
        offset: tuple[Tensor | float, Tensor | float] = (0.0, 0.0),
        yaw: Tensor | None = None,
        material: str | None = None,
        leg: bool = False,
        new: bool = False,
    ) -> None:
        """Add a shape at (x, height of its centre above the floor, z), moved by `offset` along its turned x and z."""
        self.groups += new
        x, above, z = at
        yaw = torch.zeros_like(x) if yaw is None else yaw
        s, c = yaw.sin(), yaw.cos()
        right, ahead = offset
        centre = torch.stack([x + c * right + s * ahead, self.room[:, 1, 1] - above, z + c * ahead - s * right], -1)
        sizes = torch.stack([torch.as_tensor(value, device=x.device).expand_as(x) * there for value in half], -1)
        kind.append(Piece(centre, sizes, yaw, label, material or label, leg, self.groups))


def stack(shapes: list[Piece]) -> Shapes:
    """Pieces as the renderer wants them."""
    groups = {shape.group: shape.yaw for shape in shapes}
    order = list(groups)
    return Shapes(
        torch.stack([shape.centre for shape in shapes], 1),
        torch.stack([shape.half for shape in shapes], 1),
        torch.stack(list(groups.values()), 1),
        tuple(order.index(shape.group) for shape in shapes),
    )


def place(pieces: Pieces, dice: Dice, room: Tensor) -> None:
    """Furnish rooms ``[B, 2, 3]``."""
    front = torch.argsort(dice.many(0, 1, 2 * _COLUMNS), dim=1)
    back = torch.argsort(dice.many(0, 1, _COLUMNS), dim=1) + 2 * _COLUMNS
    often = 0.35 + 0.55 * dice.difficulty
    left, right, far = room[:, 0, 0], room[:, 1, 0], room[:, 1, 2]

    def cell(number: Tensor) -> tuple[Tensor, Tensor]:
        step_x, step_z = (right - left - 0.2) / _COLUMNS, (far - 1.4) / 3
        x = left + 0.1 + step_x * (number % _COLUMNS + 0.5) + dice(-0.12, 0.12)
        return x, 1.35 + step_z * (number // _COLUMNS + 0.5) + dice(-0.15, 0.15)

    x, z = cell(front[:, 0])
    _square_table(pieces, dice, x, z, dice.there(often + 0.1))
    x, z = cell(front[:, 1])
    _round_table(pieces, dice, x, z, dice.there(often))
    for index in (2, 3):
        x, z = cell(front[:, index])
        _chair(pieces, dice, x, z, dice.there(often))
    for index in (4, 5):
        x, z = cell(front[:, index])
        radius = dice(0.14, 0.34)
        pieces.put(pieces.spheres, (x, radius, z), (radius,) * 3, dice.there(often), "ball", new=True)
    x, z = cell(front[:, 6])
    _lamp(pieces, dice, x, z, dice.there(0.6 * often))
    x, z = cell(front[:, 7])
    tall = dice(0.22, 0.4)
    pieces.put(
        pieces.boxes,
        (x, tall, z),
        (dice(0.25, 0.42), tall, dice(0.22, 0.34)),
        dice.there(0.8 * often),
        "cabinet",
        yaw=dice(-0.6, 0.6),
        new=True,
    )
    for index in (0, 1):
        x, _ = cell(back[:, index])
        tall, deep = dice(0.4, 1.05), dice(0.18, 0.28)
        half = (dice(0.32, 0.5), tall, deep)
        pieces.put(pieces.boxes, (x, tall, far - deep - 0.01), half, dice.there(often), "cabinet", new=True)
    x, z = cell(back[:, 2])
    height, radius = (room[:, 1, 1] - room[:, 0, 1]) / 2, dice(0.14, 0.26)
    pieces.put(pieces.cylinders, (x, height, z), (radius, height, radius), dice.there(often), "pillar", new=True)
    x, z = cell(back[:, 3])
    _lamp(pieces, dice, x, z, dice.there(0.8 * often))


def _square_table(pieces: Pieces, dice: Dice, x: Tensor, z: Tensor, there: Tensor) -> None:
    wide, deep, high, yaw = dice(0.36, 0.5), dice(0.28, 0.38), dice(0.6, 0.78), dice(-0.5, 0.5)
    pieces.put(pieces.boxes, (x, high, z), (wide, 0.035, deep), there, "table", yaw=yaw, new=True)
    for right in (-1.0, 1.0):
        for ahead in (-1.0, 1.0):
            offset = (right * (wide - 0.06), ahead * (deep - 0.06))
            half = (0.035, high / 2, 0.035)
            pieces.put(pieces.boxes, (x, high / 2, z), half, there, "table", offset=offset, yaw=yaw, leg=True)
    radius = dice(0.08, 0.16)
    there = there * dice.there(0.4 + 0.4 * dice.difficulty)
    at = (x + dice(-0.2, 0.2), high + 0.035 + radius, z + dice(-0.15, 0.15))
    pieces.put(pieces.spheres, at, (radius,) * 3, there, "ball", new=True)


def _round_table(pieces: Pieces, dice: Dice, x: Tensor, z: Tensor, there: Tensor) -> None:
    radius, high = dice(0.34, 0.48), dice(0.5, 0.74)
    pieces.put(pieces.cylinders, (x, high, z), (radius, 0.035, radius), there, "table", new=True)
    pieces.put(pieces.cylinders, (x, high / 2, z), (0.06, high / 2, 0.06), there, "table", leg=True)
    small = dice(0.07, 0.14)
    there = there * dice.there(0.3 + 0.4 * dice.difficulty)
    pieces.put(pieces.spheres, (x, high + 0.035 + small, z), (small,) * 3, there, "ball", new=True)


def _chair(pieces: Pieces, dice: Dice, x: Tensor, z: Tensor, there: Tensor) -> None:
    half, high, yaw = dice(0.2, 0.26), dice(0.4, 0.48), dice(-math.pi, math.pi)
    pieces.put(pieces.boxes, (x, high, z), (half, 0.035, half), there, "chair", yaw=yaw, new=True)
    tall = dice(0.2, 0.3)
    back = (half, tall, 0.035)
    pieces.put(pieces.boxes, (x, high + tall, z), back, there, "chair", offset=(0.0, half - 0.03), yaw=yaw)
    for right in (-1.0, 1.0):
        for ahead in (-1.0, 1.0):
            offset = (right * (half - 0.035), ahead * (half - 0.035))
            legs = (0.03, high / 2, 0.03)
            pieces.put(pieces.boxes, (x, high / 2, z), legs, there, "chair", offset=offset, yaw=yaw, leg=True)


def _lamp(pieces: Pieces, dice: Dice, x: Tensor, z: Tensor, there: Tensor) -> None:
    high, radius = dice(1.25, 1.7), dice(0.17, 0.25)
    foot = torch.full_like(x, 0.03)
    pieces.put(pieces.cylinders, (x, foot, z), (0.16, 0.03, 0.16), there, "lamp", material="pole", new=True)
    half = (0.032, high / 2, 0.032)
    pieces.put(pieces.cylinders, (x, high / 2, z), half, there, "lamp", material="pole", leg=True)
    pieces.put(pieces.cylinders, (x, high, z), (radius, dice(0.13, 0.2), radius), there, "lamp", new=True)
