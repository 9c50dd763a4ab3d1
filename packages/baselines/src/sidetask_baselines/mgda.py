"""MGDA: Sener, Koltun, "Multi-task learning as multi-objective optimization", NeurIPS 2018; Désidéri 2012."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sidetask_core import Equal, Method, Place, Signals, Task
from torch import Tensor

from sidetask_baselines.gramian import GramianWeighting
from sidetask_baselines.scale import check_scale, total_weight
from sidetask_baselines.simplex import shortest


class MGDA(GramianWeighting):
    """Follow the shortest convex combination of the task gradients, which descends on every task.

    The combination is the solution of a quadratic program over the simplex (Eq. 3), found exactly, where the
    paper's Frank-Wolfe iterations stop short of it.

    Gradients that cancel beyond what their inner products resolve leave the zero vector. In double precision these tell
    a combination of three gradients from zero down to 8e-8 of Σ_t w_t |g_t|, in single precision to 2e-3, and of T
    gradients to √(T/3) times as much.

    Args:
        tasks: the tasks.
        at: ``"features"`` (the paper's upper bound, MGDA-UB, one backward pass) or ``"parameters"``.
        normalization: what gradients are divided by before they are compared: ``"none"`` (the paper), ``"norm"``
            (their length), ``"loss"`` (the task's loss) or ``"loss+"`` (both), as in the official code. The weights
            found apply to the gradients as they are. A loss that is not positive divides nothing: its gradient is
            compared at its own length.
        scale: weights sum to the number of tasks that have labels (``"sum"``) or, as in the paper, to 1 (``"paper"``).

    Raises:
        ValueError: for an unknown place, normalization or scale.
        SolverFailure: in a step whose gradients are not finite, or whose solution p misses its KKT conditions,
            p·g_t ≥ p·p with equality where a task has weight, on the Gramian as it is given: by more than 1e-6
            |p| |g_t|, or 1e-2 |p| |g_t| for one in single precision. If p counts as zero, |p| is the shortest length
            that does not. See `shortest`.
    """

    def __init__(
        self, tasks: Sequence[Task], *, at: Place = "features", normalization: str = "none", scale: str = "sum"
    ) -> None:
        super().__init__(tasks, at=at)
        if normalization not in ("none", "norm", "loss", "loss+"):
            raise ValueError(f"normalization must be 'none', 'norm', 'loss' or 'loss+', not {normalization!r}")
        self.normalization = normalization
        self.scale = check_scale(scale)

    def compared(self, signals: Signals) -> Tensor:
        """The Gramian of the normalised gradients."""
        gramian = super().compared(signals).to(torch.float64)
        # What is too short for digits of its inner products is zero, before a normalisation makes it as long as others.
        real = (gramian.diagonal() > self.tiny).to(gramian)
        gramian = gramian * real.outer(real)
        divisor = torch.ones_like(gramian[0])
        if self.normalization in ("loss", "loss+"):
            divisor = _positive(signals.losses.to(divisor))
        if self.normalization in ("norm", "loss+"):
            divisor = divisor * _positive(gramian.diagonal().sqrt())
        return gramian / divisor.outer(divisor)

    def solve(self, gramian: np.ndarray) -> np.ndarray:
        """Weights of the shortest combination, at least zero, that sum to the number of tasks or to 1."""
        return total_weight(self.scale, len(gramian)) * shortest(gramian, self.eps)


def _positive(sizes: Tensor) -> Tensor:
    """The sizes, or one where they are zero or negative and nothing can be divided by them."""
    return torch.where(sizes > 0, sizes, 1.0)


def mgda(tasks: Sequence[Task], *, at: Place = "features", normalization: str = "none", scale: str = "sum") -> Method:
    """MGDA for the shared parameters; task-specific ones keep their own gradients."""
    return Method(encoder=MGDA(tasks, at=at, normalization=normalization, scale=scale), decoder=Equal(tasks))
