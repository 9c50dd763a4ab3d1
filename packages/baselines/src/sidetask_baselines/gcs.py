"""GCS: Du et al., "Adapting auxiliary losses using gradient similarity", 2018 (arXiv 1812.02224)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sidetask_core import Equal, Method, Place, Signals, Task
from torch import Tensor

from sidetask_baselines.auxiliary import AuxiliaryWeighting


class GCS(AuxiliaryWeighting):
    """Follow an auxiliary task only while its gradient points the way of the primary's.

    Primaries keep weight 1. An auxiliary task gets 1 if the cosine of the angle between its gradient and that of the
    primaries' summed losses is positive, else 0 (``"hard"``); or that cosine itself, at least 0 (``"soft"``).

    There is no angle to a zero gradient, so that such a task gets 0, and so does every auxiliary task in a step whose
    primaries have no labels or cancel each other. Without auxiliary tasks all weights are 1. Scaling an auxiliary loss,
    or all primary ones alike, changes no weight. The device is never waited for.

    At right angles the paper's text would follow an auxiliary task (cos ≥ 0), and its formula (sign(cos) + 1) / 2 by
    half. Here the cosine has to be positive, as in other public code.

    Args:
        tasks: the tasks, of which at least one is primary.
        at: ``"parameters"`` (the paper) or ``"features"``.
        mode: ``"hard"`` (the paper's unweighted version) or ``"soft"`` (its weighted version).

    Raises:
        ValueError: if no task is primary, or for an unknown place or mode.
    """

    def __init__(self, tasks: Sequence[Task], *, at: Place = "parameters", mode: str = "hard") -> None:
        super().__init__(tasks, at=at)
        if mode not in ("hard", "soft"):
            raise ValueError(f"mode must be 'hard' or 'soft', not {mode!r}")
        self.mode = mode

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]`` between 0 and 1."""
        given = signals.gramian(self.at)
        gramian = given.to(torch.float64)
        primary = self.primaries.to(gramian.device, non_blocking=True)
        # Products of lengths, not of their squares: those of tiny gradients would vanish.
        lengths = gramian.diagonal().sqrt()
        along = self.over_primaries(gramian)
        squared = self.over_primaries(along)
        # What is left of primaries that cancel is rounding errors, which point nowhere.
        noise = len(self.tasks) * torch.finfo(given.dtype).eps * self.over_primaries(lengths).square()
        both = lengths * torch.where(squared > noise, squared, 0.0).sqrt()
        cosine = torch.where(both > 0, along / both, 0.0)
        value = cosine.clamp(max=1) if self.mode == "soft" else torch.ones_like(cosine)
        return torch.where(primary, 1.0, torch.where(cosine > 0, value, 0.0)).to(signals.losses)


def gcs(tasks: Sequence[Task], *, at: Place = "parameters", mode: str = "hard") -> Method:
    """GCS for the shared parameters; task-specific ones keep their own gradients, as in the paper.

    >>> tasks = [Task("seg", loss=abs), Task("depth", loss=abs, primary=False)]
    >>> gcs(tasks, mode="soft").encoder.primary
    (True, False)
    """
    return Method(encoder=GCS(tasks, at=at, mode=mode), decoder=Equal(tasks))
