"""What is in a scene: a room, shapes, panels on its walls, a rug, materials and a light; and the camera that sees it.

All lengths are metres. World axes: x right, y down, z forward; the room is a box along them. Every record holds a whole
batch of scenes, ``B`` of them, and there are as many shapes of a kind in each: one that is not there has a size of 0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

CLASSES = (
    "floor",
    "ceiling",
    "wall",
    "window",
    "door",
    "picture",
    "rug",
    "table",
    "cabinet",
    "chair",
    "ball",
    "pillar",
    "lamp",
)
"""What a pixel can be of, in the order of the labels of segmentation."""
COLOURS = (
    (150, 111, 72),
    (226, 226, 214),
    (176, 190, 204),
    (96, 196, 240),
    (122, 62, 38),
    (236, 132, 182),
    (148, 60, 160),
    (240, 176, 52),
    (58, 96, 170),
    (60, 158, 90),
    (222, 60, 50),
    (110, 112, 122),
    (250, 240, 110),
)
PARTS = (
    "room",
    "frame",
    "pane",
    "box top",
    "box front",
    "box side",
    "cylinder cap",
    "cylinder side",
    "sphere upper",
    "sphere lower",
    "leg",
)
"""The parts of what stands in a room, in the order of the labels of parts."""
PART_COLOURS = (
    (196, 196, 190),
    (120, 72, 48),
    (120, 200, 236),
    (244, 190, 70),
    (224, 110, 60),
    (168, 70, 60),
    (170, 214, 110),
    (62, 140, 84),
    (216, 120, 206),
    (126, 64, 160),
    (56, 76, 140),
)
# A room's own surfaces come first in every table of surfaces, in this order; then the rug, panels, shapes.
FLOOR, CEILING, LEFT, RIGHT, BACK, FRONT, RUG, PANELS = range(8)
PATTERNS = ("plain", "planks", "checker", "stripes", "dots", "bricks", "grain", "doors", "sky", "painting")

_Record = TypeVar("_Record", bound="_Rows")


@dataclass(frozen=True, eq=False)
class _Rows:
    """Tensors with one row per scene."""

    def __getitem__(self: _Record, rows: slice) -> _Record:
        """The scenes `rows`, as a batch of their own."""
        changes = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | _Rows):
                changes[field.name] = value[rows]
        return replace(self, **changes)


@dataclass(frozen=True, eq=False)
class Shapes(_Rows):
    """Boxes, upright cylinders or spheres, ``K`` in every scene.

    Args:
        centre: ``[B, K, 3]``.
        half: ``[B, K, 3]``, half the extent along the shape's own axes. A cylinder's radius is the first and half its
            height the second; a sphere's radius is the first. 0: not there.
        yaw: ``[B, Y]``, rotations about the vertical in radians; from z towards x.
        turns: which of the yaws each of the K shapes has; shapes of one yaw are fastest next to each other.
    """

    centre: Tensor
    half: Tensor
    yaw: Tensor
    turns: tuple[int, ...]

    @classmethod
    def none(cls, count: int = 1, device: torch.device | str = "cpu") -> Shapes:
        """No shape in any of `count` scenes."""
        empty = torch.zeros(count, 0, 3, device=device)
        return cls(empty, empty, empty[..., 0], ())


@dataclass(frozen=True, eq=False)
class Scene(_Rows):
    """A batch of rooms and what is in them.

    Surfaces are numbered: floor, ceiling, left, right, back and front wall, rug, the ``D`` panels, then boxes,
    cylinders and spheres in order. `labels`, `legs` and `materials` are tables over those ``S`` numbers.

    Args:
        room: ``[B, 2, 3]``, the lowest and the highest coordinates; the floor is at the highest y.
        boxes: ``Kb`` per scene.
        cylinders: ``Kc`` per scene.
        spheres: ``Ks`` per scene.
        rug: ``[B, 5]``: x and z of its centre, half its extents (0: none), its yaw.
        panels: ``[B, D, 5]``: the wall's surface number, the centre along the wall (x or z) and in height (y), and half
            the extents. Windows, doors and pictures.
        labels: ``[B, S]`` class ids, see `CLASSES`.
        legs: ``[B, S]`` bool, whether a surface is the leg of something, for the part labels.
        materials: ``[B, S, 10]``: two linear RGB colours, the index of the pattern that mixes them (`PATTERNS`), its
            frequency per metre, gloss, emission.
        light: ``[B, 7]``: position of the lamp under the ceiling, its linear RGB power at one metre, ambient light.
    """

    room: Tensor
    boxes: Shapes
    cylinders: Shapes
    spheres: Shapes
    rug: Tensor
    panels: Tensor
    labels: Tensor
    legs: Tensor
    materials: Tensor
    light: Tensor

    def __len__(self) -> int:
        return len(self.room)


@dataclass(frozen=True, eq=False)
class Camera(_Rows):
    """A pinhole camera per scene. Camera axes: x right, y down, z forward, along which depth is measured.

    Args:
        position: ``[B, 3]`` in the world.
        yaw: ``[B]`` radians, from the world's z towards its x.
        pitch: ``[B]`` radians, positive looks down.
        focal: ``[B]`` in pixels.
        principal: ``[B, 2]``, where the axis meets the image: pixels from its left and upper border.
        size: height and width of the image in pixels.
    """

    position: Tensor
    yaw: Tensor
    pitch: Tensor
    focal: Tensor
    principal: Tensor
    size: tuple[int, int]

    def rays(self) -> Tensor:
        """Directions ``[B, H·W, 3]`` through the pixels' centres, camera axes, z = 1: a ray's length is depth."""
        height, width = self.size
        y, x = torch.meshgrid(
            torch.arange(height, device=self.focal.device) + 0.5,
            torch.arange(width, device=self.focal.device) + 0.5,
            indexing="ij",
        )
        across = (x.flatten() - self.principal[:, :1]) / self.focal[:, None]
        down = (y.flatten() - self.principal[:, 1:]) / self.focal[:, None]
        return torch.stack([across, down, torch.ones_like(across)], dim=-1)

    def rotation(self) -> Tensor:
        """``[B, 3, 3]``, from camera to world axes: ``world = rotation @ camera``."""
        s, c = self.pitch.sin(), self.pitch.cos()
        zero, one = torch.zeros_like(s), torch.ones_like(s)
        tilt = torch.stack([one, zero, zero, zero, c, s, zero, -s, c], dim=-1).view(-1, 3, 3)
        s, c = self.yaw.sin(), self.yaw.cos()
        turn = torch.stack([c, zero, s, zero, one, zero, -s, zero, c], dim=-1).view(-1, 3, 3)
        return turn @ tilt
