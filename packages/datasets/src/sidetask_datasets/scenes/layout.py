"""Random rooms in which a surface's class can be told from shape, pattern and place."""

from __future__ import annotations

import torch
from torch import Tensor

from sidetask_datasets import draws
from sidetask_datasets.scenes.furniture import Dice, Piece, Pieces, place, stack
from sidetask_datasets.scenes.materials import MATERIALS, pick
from sidetask_datasets.scenes.world import BACK, CLASSES, LEFT, RIGHT, Camera, Scene

_NUMBERS = 640  # draws per scene; more than are used


def furnish(
    seed: int,
    ids: Tensor,
    *,
    size: tuple[int, int] = (48, 64),
    difficulty: float = 0.5,
) -> tuple[Scene, Camera]:
    """Random rooms, one for each id, and a camera in each.

    Args:
        seed: which world.
        ids: ``[B]`` integers below 2³²; a scene depends on nothing but (seed, id) and `difficulty`.
        size: height and width of the camera's image.
        difficulty: 0 to 1. More furniture (each piece is there with a probability of 0.35 to 0.9), colours less typical
            of their class, patterns of less contrast, light of more varying strength, colour and place.
    """
    dice = Dice(draws.uniform(draws.key(seed, "scene"), ids, _NUMBERS), difficulty)
    width, height, depth = dice(4.0, 5.8), dice(2.4, 3.0), dice(4.4, 6.2)
    eye = dice(1.25, 1.65)
    low = torch.stack([-width / 2, eye - height, torch.full_like(eye, -0.6)], -1)
    room = torch.stack([low, torch.stack([width / 2, eye, depth], -1)], dim=1)
    pieces = Pieces(room)
    place(pieces, dice, room)
    rug = _rug(dice, room)
    panels, panel_names = _panels(dice, room)

    names = ["floor", "ceiling", "wall", "wall", "wall", "wall", "rug"]
    labels = torch.tensor([CLASSES.index(name) for name in names], device=ids.device).expand(len(ids), -1)
    shapes = pieces.boxes + pieces.cylinders + pieces.spheres
    shape_labels = torch.tensor([CLASSES.index(shape.label) for shape in shapes], device=ids.device)
    labels = torch.cat([labels, panel_names, shape_labels.expand(len(ids), -1)], dim=1)
    legs = torch.tensor([False] * (len(names) + panels.shape[1]) + [shape.leg for shape in shapes], device=ids.device)
    scene = Scene(
        room=room,
        boxes=stack(pieces.boxes),
        cylinders=stack(pieces.cylinders),
        spheres=stack(pieces.spheres),
        rug=rug,
        panels=panels,
        labels=labels,
        legs=legs.expand(len(ids), -1),
        materials=_materials(dice, names, panel_names, shapes),
        light=_light(dice, room),
    )
    return scene, _camera(dice, room, size)


def _rug(dice: Dice, room: Tensor) -> Tensor:
    there = dice.there(0.7)
    middle = room[:, 1, 2] * dice(0.4, 0.62)
    return torch.stack(
        [dice(-0.8, 0.8), middle, dice(0.6, 1.25) * there, dice(0.5, 0.95) * there, dice(-0.4, 0.4)], dim=-1
    )


def _panels(dice: Dice, room: Tensor) -> tuple[Tensor, Tensor]:
    """Two places on each of three walls: a window, a door, a picture or nothing."""
    rows, names = [], []
    floor = room[:, 1, 1]
    for wall in (BACK, LEFT, RIGHT):
        axis = 0 if wall == BACK else 2
        low = room[:, 0, 0] if wall == BACK else torch.full_like(floor, 1.0)
        high = room[:, 1, axis]
        for part in (0.25, 0.75):
            chance = dice(0.0, 1.0)
            window, picture = chance < 0.34, (chance >= 0.54) & (chance < 0.9)
            door = (chance >= 0.34) & (chance < 0.54)
            wide = dice(0.0, 1.0)
            across = torch.where(window, 0.42 + 0.3 * wide, torch.where(door, 0.4 + 0.06 * wide, 0.26 + 0.24 * wide))
            tall = dice(0.0, 1.0)
            up = torch.where(window, 0.42 + 0.2 * tall, torch.where(door, 0.96 + 0.06 * tall, 0.22 + 0.2 * tall))
            above = torch.where(door, up, torch.where(window, 1.5, 1.5 + 0.15 * wide))
            there = (window | door | picture).float()
            along = low + (high - low) * part + dice(-0.2, 0.2)
            # The wall's number is compared with integers; a float holds it exactly.
            rows.append(
                torch.stack([torch.full_like(floor, wall), along, floor - above, across * there, up * there], -1)
            )
            ids = [CLASSES.index(name) for name in ("window", "door", "picture")]
            names.append(torch.where(window, ids[0], torch.where(door, ids[1], ids[2])))
    return torch.stack(rows, 1), torch.stack(names, 1)


def _materials(dice: Dice, names: list[str], panels: Tensor, shapes: list[Piece]) -> Tensor:
    """Materials of every surface; the four walls share one, and so do the shapes of a group and material."""
    rows: list[Tensor] = []
    made: dict[tuple[str, int], Tensor] = {}

    def material(name: str, group: int) -> Tensor:
        if (name, group) not in made:
            made[name, group] = pick(MATERIALS[name], dice.many(0.0, 1.0, 12), dice.difficulty)
        return made[name, group]

    rows.extend(material(name, -1) for name in names)
    for d in range(panels.shape[1]):
        chosen = torch.zeros_like(rows[0])
        for name in ("window", "door", "picture"):
            here = (panels[:, d] == CLASSES.index(name)).unsqueeze(-1)
            chosen = torch.where(here, material(name, d if name == "picture" else -1), chosen)
        rows.append(chosen)
    rows.extend(material(shape.material, shape.group) for shape in shapes)
    return torch.stack(rows, 1)


def _light(dice: Dice, room: Tensor) -> Tensor:
    vary = 0.25 + 0.75 * dice.difficulty
    middle = (room[:, 0] + room[:, 1]) / 2
    reach = (room[:, 1] - room[:, 0]) / 2
    x = middle[:, 0] + reach[:, 0] * dice(-0.6, 0.6) * vary
    z = middle[:, 2] + reach[:, 2] * dice(-0.5, 0.5) * vary
    power = 1.5 * (2.0 ** (dice(-0.8, 0.6) * vary))
    tint = 1.0 + dice.many(-0.25, 0.25, 3) * vary
    ambient = 0.34 * (2.0 ** (dice(-0.7, 0.5) * vary))
    position = torch.stack([x, room[:, 0, 1] + 0.25, z], -1)
    return torch.cat([position, power[:, None] * tint, ambient[:, None]], dim=-1)


def _camera(dice: Dice, room: Tensor, size: tuple[int, int]) -> Camera:
    height, width = size
    x = (room[:, 1, 0] - room[:, 0, 0]) * dice(-0.22, 0.22)
    yaw = torch.atan2(-x, 0.55 * room[:, 1, 2]) + dice(-0.2, 0.2)
    principal = torch.tensor([width / 2, height / 2], device=x.device).expand(len(x), -1)
    focal = 0.88 * max(width, height) * dice(0.92, 1.08)
    zero = torch.zeros_like(x)
    return Camera(torch.stack([x, zero, zero], -1), yaw, dice(0.08, 0.3), focal, principal, size)
