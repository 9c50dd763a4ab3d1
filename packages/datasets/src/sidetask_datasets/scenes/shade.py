"""Colour: procedural patterns, one lamp with shadows, ambient light, gloss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sidetask_datasets.scenes.trace import Hits, blocked
from sidetask_datasets.scenes.world import PATTERNS, Scene

FRAME = 0.84  # share of a panel's half extent where its frame begins


def shade(scene: Scene, hits: Hits, eye: Tensor, pixel: Tensor) -> Tensor:
    """Linear RGB ``[B, P, 3]`` of what rays met.

    Args:
        scene: where.
        hits: what.
        eye: ``[B, 1, 3]``, where the rays came from.
        pixel: ``[B, 1]``, angle that a ray stands for; patterns finer than it fade to their mean.
    """
    chosen = hits.surface.unsqueeze(-1).expand(-1, -1, scene.materials.shape[-1])
    material = scene.materials.gather(1, chosen)
    first, second = material[..., 0:3], material[..., 3:6]
    pattern, frequency, gloss, emission = material[..., 6:].unbind(-1)
    away = hits.point - eye
    distance = away.norm(dim=-1)
    mix = _patterns(pattern.round().long(), frequency, hits, distance * pixel).unsqueeze(-1)
    albedo = first + (second - first) * mix

    position, power, ambient = scene.light[:, None, 0:3], scene.light[:, None, 3:6], scene.light[:, None, 6:]
    start = hits.point + 2e-3 * hits.normal
    to_light = position - start
    range2 = to_light.square().sum(-1)
    towards = to_light / range2.sqrt().clamp(min=1e-6).unsqueeze(-1)
    facing = (hits.normal * towards).sum(-1).clamp(min=0)
    lit = torch.where(blocked(scene, start, to_light), 0.0, 1.0)
    received = (lit * facing / (1.0 + 0.15 * range2)).unsqueeze(-1) * power
    # The ceiling, lit from below by everything else, is what makes ambient light come from above.
    sky = ambient * (0.8 - 0.2 * hits.normal[..., 1:2])
    view = away / distance.clamp(min=1e-6).unsqueeze(-1)
    mirrored = view - 2.0 * (view * hits.normal).sum(-1, keepdim=True) * hits.normal
    shine = (mirrored * towards).sum(-1).clamp(min=0).pow(24) * gloss * lit
    return albedo * (sky + received + emission.unsqueeze(-1)) + shine.unsqueeze(-1) * power


def develop(linear: Tensor) -> Tensor:
    """Linear light to the numbers of a picture, 0 to 1: highlights roll off, then gamma 2.2."""
    return (1.0 - (-1.4 * linear.clamp(min=0)).exp()).pow(1.0 / 2.2)


def _patterns(pattern: Tensor, frequency: Tensor, hits: Hits, footprint: Tensor) -> Tensor:
    """How much of the second colour shows, ``[B, P]`` in [0, 1]."""
    u, v = hits.place.unbind(-1)
    a, b = hits.share.unbind(-1)
    u, v = u * frequency, v * frequency
    row = v.floor()
    shifted = u + 0.5 * (row.long() % 2)
    gap = 0.06
    joints = _near(v, gap) | _near(shifted, gap)
    values = {
        "planks": torch.where(_near(u, gap), 1.0, 0.55 * _noise(u.floor(), (0.35 * v + 0.37 * u.floor()).floor())),
        "checker": ((u.floor() + row).long() % 2).to(u.dtype),
        "stripes": 0.5 + 0.5 * (2 * math.pi * u).sin().mul(4).clamp(-1, 1),
        "dots": (((u % 1) - 0.5).square() + ((v % 1) - 0.5).square() < 0.09).to(u.dtype),
        "bricks": torch.where(joints, 1.0, 0.3 * _noise(shifted.floor(), row)),
        "grain": 0.5
        + 0.25 * (6.3 * u + 1.3 * (2.1 * v).sin()).sin()
        + 0.25 * (13.0 * u + 2.0 * (1.7 * v + 1).sin()).sin(),
    }
    mix = torch.zeros_like(u)
    for name, value in values.items():
        mix = torch.where(pattern == PATTERNS.index(name), value, mix)
    mix = 0.5 + (mix - 0.5) * (1.0 - 1.5 * footprint * frequency).clamp(0, 1)
    mix = torch.where(pattern == PATTERNS.index("plain"), 0.0, mix)

    frame = (a.abs() > FRAME) | (b.abs() > FRAME)
    front = torch.where(hits.face == 3, torch.where(frame | (a.abs() < 0.05), 1.0, 0.0), 0.35)
    leaf = torch.where(((a.abs() - 0.4).abs() < 0.28) & (((b + 0.1).abs() - 0.42).abs() < 0.3), 0.35, 0.0)
    knob = ((a - 0.68).square() + 0.25 * (b - 0.05).square()) < 0.008
    door = torch.where(hits.face == 1, torch.where(frame | knob, 1.0, leaf), front)
    mullion = frame | (a.abs() < 0.06) | ((b + 0.25).abs() < 0.05)
    glass = torch.where(mullion, 1.0, 0.18 * (1.0 + b))
    ring = (a.square() + (b - 0.15).square() * 1.4).sqrt()
    motif = torch.where(frame, 1.0, 0.5 + 0.5 * (frequency * ring + 3.0 * a * b + 2.0 * b).sin())
    mix = torch.where(pattern == PATTERNS.index("doors"), door, mix)
    mix = torch.where(pattern == PATTERNS.index("sky"), glass, mix)
    return torch.where(pattern == PATTERNS.index("painting"), motif, mix)


def _near(coordinate: Tensor, width: float) -> Tensor:
    """Within `width` of a whole number, counted from below."""
    return coordinate % 1 < width


def _noise(i: Tensor, j: Tensor) -> Tensor:
    """A number in [0, 1) for every pair of whole ones; a sine's fractional part is random enough for a plank."""
    return ((12.9898 * i + 78.233 * j).sin() * 43.7585) % 1
