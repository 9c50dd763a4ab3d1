"""Random numbers that belong to a sample, not to the moment they are drawn.

A draw is a hash of (key, sample id, position). So a sample meets the same numbers whatever batch it is in, whichever
process draws them, on every device, and whether or not the run was interrupted before. The hash is exact integer
arithmetic: the two-round 32-bit mixer found by Chris Wellons' hash prospector ("lowbias32").
"""

from __future__ import annotations

import math
import zlib
from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_Integers = TypeVar("_Integers", int, Tensor)


def key(*parts: int | str) -> int:
    """One 32-bit key from a seed, an epoch, the name of a purpose, ...

    >>> key(0, "order", 3) == key(0, "order", 3), key(0, "order", 3) == key(0, "order", 4)
    (True, False)
    """
    state = 0x9E3779B9
    for part in parts:
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part
        for word in (number & _MASK, (number >> 32) & _MASK):
            state = (_mix(state ^ word) + 0x7F4A7C15) & _MASK
    return state


def uniform(key: int, ids: Tensor, count: int, start: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), ``[len(ids), count]`` float32, on the device of `ids`.

    Args:
        key: what the numbers are for, see `key`.
        ids: sample ids, ``[N]`` integers from 0 to 2³² − 1.
        count: numbers per sample.
        start: position of the first one; positions below it are skipped.

    >>> ids = torch.tensor([5, 9])
    >>> torch.equal(uniform(1, ids, 4)[1:], uniform(1, ids[1:], 4))
    True
    """
    return (_bits(key, ids, count, start) >> 8).to(torch.float32) * 2.0**-24


def normal(key: int, ids: Tensor, count: int) -> Tensor:
    """Standard normal numbers, ``[len(ids), count]`` float32 (Box and Muller's transform of two uniform ones)."""
    half = (count + 1) // 2
    pair = uniform(key, ids, 2 * half)
    radius = (-2.0 * torch.log1p(-pair[:, :half])).sqrt()
    angle = 2.0 * math.pi * pair[:, half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def permutation(key: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """A random order of ``range(count)``; the hash has no ties, so that it is the same on every device."""
    ids = torch.arange(count, device=device)
    return torch.argsort(_mix(_mix(ids) ^ key))


def _bits(key: int, ids: Tensor, count: int, start: int) -> Tensor:
    positions = torch.arange(start, start + count, device=ids.device)
    rows = _mix(_mix(ids.to(torch.int64) & _MASK) ^ key)
    columns = _mix(positions ^ ((key * 0x2545F491) & _MASK))
    return _mix((rows[:, None] + columns) & _MASK)


def _mix(x: _Integers) -> _Integers:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    # The second factor has 32 bits; multiplied in two halves, no product leaves the range of int64.
    x = ((((x * 0x846C) & 0xFFFF) << 16) + x * 0xA68B) & _MASK
    return x ^ (x >> 16)
