"""What weights sum to: the sum convention for methods whose papers let them sum to 1, and tasks that are absent."""

from __future__ import annotations

import torch
from torch import Tensor


def check_scale(scale: str) -> str:
    """`scale`, if it is ``"sum"`` or ``"paper"``; a ValueError if it is not."""
    if scale not in ("sum", "paper"):
        raise ValueError(f"scale must be 'sum' or 'paper', not {scale!r}")
    return scale


def total_weight(scale: str, tasks: int) -> float:
    """What weights that sum to 1 in their paper sum to here: their number for ``"sum"``, 1 for ``"paper"``."""
    return float(tasks) if scale == "sum" else 1.0


def softmax_among(logits: Tensor, among: Tensor) -> Tensor:
    """The softmax of some of the logits ``[T]``, zero for the others; zeros if there are none.

    >>> softmax_among(torch.zeros(3), torch.tensor([True, False, True]))
    tensor([0.5000, 0.0000, 0.5000])
    """
    return torch.where(among, torch.where(among, logits, -torch.inf).softmax(dim=0), 0.0)
