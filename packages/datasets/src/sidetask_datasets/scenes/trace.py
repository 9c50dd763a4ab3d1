"""Ray casting: which surface a ray meets first, where, and how that surface stands.

Every shape is convex, so that a ray is inside it along one interval, the meeting of the intervals of its slabs,
its round side, or its sphere. Shapes are taken one by one, each for all rays of all scenes at once: that keeps
intermediate tensors small enough for a processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sidetask_datasets.scenes.world import BACK, CEILING, FLOOR, FRONT, LEFT, PANELS, RIGHT, RUG, Scene, Shapes

_NEAR = 1e-3  # in lengths of a ray: what is nearer is the surface that the ray leaves
_SLACK = 1e-9

Interval = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Hits:
    """What rays met, for ``P`` rays in each of ``B`` scenes.

    Args:
        distance: ``[B, P]``, in lengths of the ray's direction.
        surface: ``[B, P]``, number of the surface met.
        point: ``[B, P, 3]`` in the world.
        normal: ``[B, P, 3]`` in the world, of length 1, towards the side that the ray comes from.
        place: ``[B, P, 2]`` metres along the surface, for patterns.
        share: ``[B, P, 2]``, from −1 to 1 across a panel or the face of a box; 0 elsewhere.
        face: ``[B, P]``: 0 the room or the rug, 1 a panel, 2 top or bottom, 3 front, 4 side of a box, 5 cap, 6 side
            of a cylinder, 7 upper, 8 lower half of a sphere.
    """

    distance: Tensor
    surface: Tensor
    point: Tensor
    normal: Tensor
    place: Tensor
    share: Tensor
    face: Tensor


def trace(scene: Scene, origin: Tensor, direction: Tensor) -> Hits:
    """Follow rays from `origin` ``[B, 1, 3]`` along `direction` ``[B, P, 3]`` to the first surface.

    The origin is inside the room and outside every shape.
    """
    start, along = _components(origin), _components(direction)
    nearest, surface = _walls(scene, start, along)
    number = PANELS + scene.panels.shape[1]
    for enter, leave in _intervals(scene, start, along):
        enter = enter.clamp_(min=_NEAR)
        met = enter < torch.minimum(leave, nearest)
        nearest = torch.where(met, enter, nearest)
        surface.masked_fill_(met, number)
        number += 1
    return _describe(scene, nearest, surface, origin + nearest.unsqueeze(-1) * direction)


def blocked(scene: Scene, origin: Tensor, direction: Tensor) -> Tensor:
    """Whether a shape stands between `origin` ``[B, P, 3]`` and `origin` + `direction`; ``[B, P]`` bool."""
    longest = torch.zeros_like(origin[..., 0])
    for enter, leave in _intervals(scene, _components(origin), _components(direction)):
        inside = leave.clamp_(max=1.0).sub_(enter.clamp_(min=_NEAR))
        longest = torch.maximum(longest, inside, out=longest)
    return longest > 0


_Vectors = tuple[Tensor, Tensor, Tensor]


def _components(vectors: Tensor) -> _Vectors:
    x, y, z = vectors.unbind(-1)
    return x.contiguous(), y.contiguous(), z.contiguous()


def _intervals(scene: Scene, start: _Vectors, along: _Vectors) -> Iterator[Interval]:
    """Where along the rays each shape begins and ends, in the order of surface numbers; empty if end ≤ begin."""
    yield from _boxes(scene.boxes, start, along)
    flat = along[0].square().addcmul_(along[2], along[2])
    low = torch.where(along[1].abs() < _SLACK, _SLACK, along[1]).reciprocal_()
    for k in range(scene.cylinders.half.shape[1]):
        x, y, z = _from_centre(scene.cylinders, k, start)
        radius, half = scene.cylinders.half[:, k, :1], scene.cylinders.half[:, k, 1:2]
        enter, leave = _round(flat, x * along[0] + z * along[2], x * x + z * z - radius.square())
        bottom, top = _slab(y, low, low.abs(), half)
        yield torch.maximum(enter, bottom), torch.minimum(leave, top)
    full = flat.addcmul_(along[1], along[1])
    for k in range(scene.spheres.half.shape[1]):
        x, y, z = _from_centre(scene.spheres, k, start)
        radius = scene.spheres.half[:, k, :1]
        towards = (x * along[0]).addcmul_(y, along[1]).addcmul_(z, along[2])
        enter, leave = _round(full, towards, x * x + y * y + z * z - radius.square())
        # Rounding may let a ray through the middle of nothing meet it.
        yield enter, leave.masked_fill_(radius <= 0, 0.0)


def _boxes(shapes: Shapes, start: _Vectors, along: _Vectors) -> Iterator[Interval]:
    low = torch.where(along[1].abs() < _SLACK, _SLACK, along[1]).reciprocal_()
    reach = low.abs()
    turned = -1
    for k, turn in enumerate(shapes.turns):
        if turn != turned:
            # Boxes that stand alike follow one another and share the turned directions.
            turned = turn
            s, c = shapes.yaw[:, turn, None].sin(), shapes.yaw[:, turn, None].cos()
            right, ahead = c * along[0] - s * along[2], s * along[0] + c * along[2]
            right = torch.where(right.abs() < _SLACK, _SLACK, right).reciprocal_()
            ahead = torch.where(ahead.abs() < _SLACK, _SLACK, ahead).reciprocal_()
            right_reach, ahead_reach = right.abs(), ahead.abs()
        x, y, z = _from_centre(shapes, k, start)
        half = shapes.half[:, k, :, None]
        enter, leave = _slab(y, low, reach, half[:, 1])
        for begin, end in (
            _slab(c * x - s * z, right, right_reach, half[:, 0]),
            _slab(s * x + c * z, ahead, ahead_reach, half[:, 2]),
        ):
            enter, leave = torch.maximum(enter, begin, out=enter), torch.minimum(leave, end, out=leave)
        yield enter, leave


def _from_centre(shapes: Shapes, k: int, start: _Vectors) -> _Vectors:
    centre = shapes.centre[:, k, :, None]
    return start[0] - centre[:, 0], start[1] - centre[:, 1], start[2] - centre[:, 2]


def _slab(start: Tensor, inverse: Tensor, reach: Tensor, half: Tensor) -> Interval:
    """Between −half and half along one axis, for 1 / direction and its absolute value."""
    middle, width = start * inverse, reach * half
    return -(middle + width), width.sub_(middle)


def _round(a: Tensor, b: Tensor, c: Tensor) -> Interval:
    """Where a·t² + 2·b·t + c is negative, as an empty interval where it never is."""
    inverse = a.clamp(min=_SLACK).reciprocal_()
    root = (b * b).sub_(a * c).clamp_(min=0).sqrt_().mul_(inverse)
    middle = b * inverse
    return -(middle + root), root.sub_(middle)


def _walls(scene: Scene, start: _Vectors, along: _Vectors) -> tuple[Tensor, Tensor]:
    """Distance to the room's walls from inside, and which of the six it is."""
    nearest = surface = None
    for axis, (low, high) in enumerate(((LEFT, RIGHT), (CEILING, FLOOR), (FRONT, BACK))):
        ahead = along[axis] > 0
        plane = torch.where(ahead, scene.room[:, 1, axis, None], scene.room[:, 0, axis, None])
        inverse = 1.0 / torch.where(along[axis].abs() < _SLACK, torch.where(ahead, _SLACK, -_SLACK), along[axis])
        distance = (plane - start[axis]) * inverse
        number = torch.where(ahead, high, low)
        if nearest is None or surface is None:
            nearest, surface = distance, number
        else:
            closer = distance < nearest
            nearest, surface = torch.where(closer, distance, nearest), torch.where(closer, number, surface)
    assert nearest is not None and surface is not None
    return nearest, surface


def _describe(scene: Scene, distance: Tensor, surface: Tensor, point: Tensor) -> Hits:
    panels = scene.panels.shape[1]
    first = PANELS + panels
    shapes = (scene.boxes, scene.cylinders, scene.spheres)
    centre = torch.cat([s.centre for s in shapes], dim=1)
    half = torch.cat([s.half for s in shapes], dim=1)
    yaw = torch.cat([s.yaw[:, s.turns] for s in shapes], dim=1)
    inside = surface >= first
    x, y, z = _components(point)
    if centre.shape[1]:
        k = (surface - first).clamp(min=0)
        chosen = k.unsqueeze(-1).expand(-1, -1, 3)
        cx, cy, cz = _components(centre.gather(1, chosen))
        hx, hy, hz = _components(half.gather(1, chosen))
        angle = yaw.gather(1, k)
    else:
        cx = cy = cz = angle = torch.zeros_like(x)
        hx = hy = hz = torch.ones_like(x)
    s, c = angle.sin(), angle.cos()
    lx, ly, lz = c * (x - cx) - s * (z - cz), y - cy, s * (x - cx) + c * (z - cz)

    box = inside & (surface < first + scene.boxes.half.shape[1])
    ball = surface >= first + scene.boxes.half.shape[1] + scene.cylinders.half.shape[1]
    tube = inside & ~box & ~ball
    # Of a box, the face is the axis along which the point is farthest out; of a cylinder, cap or side.
    ex, ey, ez = lx.abs() / hx, ly.abs() / hy, lz.abs() / hz
    radial = (lx * lx + lz * lz).sqrt()
    lid = torch.where(box, (ey >= ex) & (ey >= ez), tube & (ey >= radial / hx))
    flank = box & ~lid & (ex > ez)
    end = box & ~lid & ~flank
    curved = (tube & ~lid) | ball
    length = torch.where(ball, hx, radial).clamp(min=1e-9)
    nx = torch.where(flank, lx.sign(), torch.where(curved, lx / length, 0.0))
    ny = torch.where(lid, ly.sign(), torch.where(ball, ly / length, 0.0))
    nz = torch.where(end, lz.sign(), torch.where(curved, lz / length, 0.0))
    normal = torch.stack([c * nx + s * nz, ny, c * nz - s * nx], dim=-1)
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    inward = point.new_tensor([[0, -1, 0], [0, 1, 0], [1, 0, 0], [-1, 0, 0], [0, 0, -1], [0, 0, 1]])
    normal = torch.where(inside.unsqueeze(-1), normal, inward[surface.clamp(max=5)])

    level = (surface == FLOOR) | (surface == CEILING)
    side = (surface == LEFT) | (surface == RIGHT)
    turn = torch.atan2(lx, lz) * hx
    across = torch.where(inside, torch.where(flank, lz, torch.where(curved, turn, lx)), torch.where(side, z, x))
    up = torch.where(inside, torch.where(lid, lz, ly), torch.where(level, z, y))
    share_across = torch.where(flank, lz / hz, torch.where(box, lx / hx, 0.0))
    share_up = torch.where(lid & box, lz / hz, torch.where(box, ly / hy, 0.0))

    face = torch.zeros_like(surface)
    for mask, number in ((box, 4), (end & (lz < 0), 3), (box & lid, 2), (tube, 6), (tube & lid, 5)):
        face = torch.where(mask, number, face)
    face = torch.where(ball, torch.where(ly < 0, 7, 8), face)

    surface, across, up = _cover_floor(scene, surface, x, z, across, up)
    for d in range(panels):
        wall, centre_across, centre_up, half_across, half_up = scene.panels[:, d, :, None].unbind(1)
        a = (torch.where(side, z, x) - centre_across) / half_across.clamp(min=1e-9)
        b = (y - centre_up) / half_up.clamp(min=1e-9)
        on = (surface == wall) & (a.abs() < 1) & (b.abs() < 1)
        surface = torch.where(on, PANELS + d, surface)
        face = torch.where(on, 1, face)
        share_across, share_up = torch.where(on, a, share_across), torch.where(on, b, share_up)
    place, share = torch.stack([across, up], dim=-1), torch.stack([share_across, share_up], dim=-1)
    return Hits(distance, surface, point, normal, place, share, face)


def _cover_floor(
    scene: Scene, surface: Tensor, x: Tensor, z: Tensor, across: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay the rug on the floor."""
    centre_x, centre_z, half_x, half_z, yaw = scene.rug[:, :, None].unbind(1)
    s, c = yaw.sin(), yaw.cos()
    rx = c * (x - centre_x) - s * (z - centre_z)
    rz = s * (x - centre_x) + c * (z - centre_z)
    on = (surface == FLOOR) & (rx.abs() < half_x) & (rz.abs() < half_z)
    return torch.where(on, RUG, surface), torch.where(on, rx, across), torch.where(on, rz, up)
