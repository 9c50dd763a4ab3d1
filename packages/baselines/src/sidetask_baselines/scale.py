"""The sum convention for methods whose papers let weights sum to 1."""

from __future__ import annotations


def check_scale(scale: str) -> str:
    """`scale`, if it is ``"sum"`` or ``"paper"``; a ValueError if it is not."""
    if scale not in ("sum", "paper"):
        raise ValueError(f"scale must be 'sum' or 'paper', not {scale!r}")
    return scale


def total_weight(scale: str, tasks: int) -> float:
    """What weights that sum to 1 in their paper sum to here: their number for ``"sum"``, 1 for ``"paper"``."""
    return float(tasks) if scale == "sum" else 1.0
