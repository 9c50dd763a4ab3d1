"""The optimizer of rules that train their own weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Adam(nn.Module):
    """Adam (Kingma, Ba, 2015) over a vector of which some entries may be absent from an update.

    An absent entry keeps its value and its moments, and every entry counts its own updates, so that one which comes
    later starts like any other: `torch.optim.Adam` has one count for all. The state is in buffers, moves with the rule
    and is saved with it. Nothing here waits for the device.

    Args:
        size: the number of entries.
        lr: step size.
        betas: decay of the two moments; (0.9, 0.999).
        eps: added to the denominator; 1e-8.
        weight_decay: times the values, added to the gradient.

    Raises:
        ValueError: for a step size that is not positive, or a negative weight decay.

    >>> Adam(2, lr=0.1)(torch.ones(2), torch.tensor([5.0, 5.0]), torch.tensor([True, False])).round(decimals=6)
    tensor([0.9000, 1.0000])
    """

    first: Tensor
    second: Tensor
    updates: Tensor

    def __init__(
        self,
        size: int,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr must be positive, not {lr}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, not {weight_decay}")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        for name in ("first", "second", "updates"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))

    def forward(self, values: Tensor, gradient: Tensor, present: Tensor | None = None) -> Tensor:
        """The values ``[size]`` after an update of those that are `present` ``[size]`` (default: all)."""
        # In the buffers' own type, which is what a saved state is read back into.
        now = values.to(self.first)
        there = torch.ones_like(now, dtype=torch.bool) if present is None else present.to(now.device)
        slope = gradient.to(now) + self.weight_decay * now
        slow, fast = self.betas
        self.updates = self.updates + there
        self.first = torch.where(there, slow * self.first + (1 - slow) * slope, self.first)
        self.second = torch.where(there, fast * self.second + (1 - fast) * slope.square(), self.second)
        mean = self.first / (1 - slow**self.updates)
        spread = (self.second / (1 - fast**self.updates)).sqrt()
        return torch.where(there, now - self.lr * mean / (spread + self.eps), now).to(values)
