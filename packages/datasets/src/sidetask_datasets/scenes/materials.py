"""Colours and patterns that are typical of each class, and how a scene picks among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sidetask_datasets.scenes.world import PATTERNS

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """Two colours (as seen, 0 to 1), the pattern that mixes them, its frequency per metre, gloss and emission."""

    first: RGB
    second: RGB
    pattern: str = "plain"
    frequency: tuple[float, float] = (1.0, 1.0)
    gloss: float = 0.0
    emission: float = 0.0


MATERIALS: dict[str, tuple[Look, ...]] = {
    "floor": (
        Look((0.62, 0.45, 0.28), (0.32, 0.2, 0.12), "planks", (4.0, 7.0), gloss=0.06),
        Look((0.78, 0.64, 0.46), (0.55, 0.4, 0.26), "planks", (4.0, 7.0), gloss=0.06),
        Look((0.8, 0.77, 0.7), (0.5, 0.5, 0.5), "checker", (1.6, 2.6), gloss=0.1),
        Look((0.55, 0.55, 0.52), (0.42, 0.42, 0.4), "grain", (2.0, 4.0)),
    ),
    "ceiling": (Look((0.95, 0.95, 0.93), (0.95, 0.95, 0.93)),),
    "wall": (
        Look((0.8, 0.83, 0.78), (0.8, 0.83, 0.78)),
        Look((0.78, 0.82, 0.88), (0.78, 0.82, 0.88)),
        Look((0.9, 0.84, 0.72), (0.82, 0.72, 0.58), "stripes", (2.0, 4.0)),
        Look((0.72, 0.8, 0.76), (0.84, 0.88, 0.84), "stripes", (2.0, 4.0)),
        Look((0.72, 0.45, 0.36), (0.82, 0.78, 0.72), "bricks", (4.0, 5.0)),
    ),
    "window": (Look((0.55, 0.8, 1.0), (0.96, 0.96, 0.94), "sky", emission=0.9),),
    "door": (
        Look((0.5, 0.3, 0.18), (0.3, 0.17, 0.1), "doors", gloss=0.05),
        Look((0.42, 0.24, 0.2), (0.7, 0.6, 0.5), "doors", gloss=0.05),
    ),
    "picture": (
        Look((0.9, 0.25, 0.2), (0.1, 0.1, 0.12), "painting", (5.0, 14.0)),
        Look((0.15, 0.5, 0.75), (0.75, 0.6, 0.25), "painting", (5.0, 14.0)),
        Look((0.95, 0.85, 0.4), (0.2, 0.14, 0.12), "painting", (5.0, 14.0)),
        Look((0.3, 0.65, 0.35), (0.9, 0.88, 0.82), "painting", (5.0, 14.0)),
    ),
    "rug": (
        Look((0.66, 0.14, 0.2), (0.92, 0.8, 0.55), "stripes", (2.5, 5.0)),
        Look((0.2, 0.26, 0.56), (0.85, 0.82, 0.8), "stripes", (2.5, 5.0)),
        Look((0.5, 0.2, 0.5), (0.95, 0.75, 0.3), "dots", (2.5, 4.5)),
        Look((0.16, 0.42, 0.4), (0.9, 0.9, 0.8), "checker", (2.5, 4.5)),
    ),
    "table": (
        Look((0.72, 0.5, 0.28), (0.52, 0.32, 0.16), "grain", (3.0, 6.0), gloss=0.12),
        Look((0.85, 0.68, 0.45), (0.7, 0.52, 0.3), "grain", (3.0, 6.0), gloss=0.12),
    ),
    "cabinet": (
        Look((0.88, 0.88, 0.85), (0.62, 0.62, 0.6), "doors", gloss=0.05),
        Look((0.32, 0.46, 0.6), (0.18, 0.28, 0.4), "doors", gloss=0.05),
        Look((0.38, 0.48, 0.36), (0.24, 0.3, 0.22), "doors", gloss=0.05),
    ),
    "chair": (
        Look((0.16, 0.55, 0.36), (0.1, 0.4, 0.26)),
        Look((0.12, 0.42, 0.5), (0.1, 0.3, 0.4)),
        Look((0.4, 0.62, 0.2), (0.3, 0.45, 0.15)),
    ),
    "ball": (
        Look((0.9, 0.16, 0.12), (0.98, 0.95, 0.9), "stripes", (1.5, 4.0), gloss=0.5),
        Look((0.95, 0.45, 0.08), (0.95, 0.45, 0.08), gloss=0.5),
        Look((0.85, 0.2, 0.55), (0.95, 0.9, 0.3), "checker", (3.0, 6.0), gloss=0.5),
        Look((0.95, 0.85, 0.15), (0.15, 0.3, 0.8), "stripes", (1.5, 4.0), gloss=0.5),
    ),
    "pillar": (
        Look((0.74, 0.74, 0.76), (0.5, 0.5, 0.54), "grain", (2.0, 4.0), gloss=0.15),
        Look((0.66, 0.62, 0.56), (0.5, 0.45, 0.4), "bricks", (3.0, 5.0)),
    ),
    "lamp": (
        Look((1.0, 0.9, 0.6), (1.0, 0.9, 0.6), emission=1.3),
        Look((1.0, 0.78, 0.5), (1.0, 0.78, 0.5), emission=1.2),
    ),
    "pole": (Look((0.12, 0.12, 0.13), (0.12, 0.12, 0.13), gloss=0.4),),
}


def pick(looks: tuple[Look, ...], numbers: Tensor, difficulty: float) -> Tensor:
    """Materials ``[B, 10]`` of one surface, see `Scene`.

    Args:
        looks: to choose from with equal probability.
        numbers: ``[B, 12]`` uniform in [0, 1).
        difficulty: 0 keeps the colours nearly as they are; 1 mixes half of a random colour into them and takes
            half of a pattern's contrast away.
    """
    table = torch.tensor(
        [
            [*look.first, *look.second, *look.frequency, look.gloss, look.emission, PATTERNS.index(look.pattern)]
            for look in looks
        ],
        device=numbers.device,
    )
    rows = table[(numbers[:, 0] * len(looks)).long()]
    first, second = rows[:, 0:3], rows[:, 3:6]
    second = second + (first - second) * 0.5 * difficulty * numbers[:, 1:2]
    share = (0.08 + 0.42 * difficulty) * numbers[:, 2:3]
    strange = numbers[:, 3:6]
    colours = [(colour + (strange - colour) * share).clamp(0, 1).pow(2.2) for colour in (first, second)]
    frequency = rows[:, 6] + (rows[:, 7] - rows[:, 6]) * numbers[:, 6]
    return torch.cat([*colours, torch.stack([rows[:, 10], frequency, rows[:, 8], rows[:, 9]], -1)], dim=-1)
