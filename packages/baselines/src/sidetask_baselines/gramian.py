"""What weightings that need only the inner products of task gradients have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sidetask_core import Place, Signals, Task, Weighting
from torch import Tensor

from sidetask_baselines.simplex import SolverFailure


class Fetched(NamedTuple):
    """What one step knows on the host, in float64: of the P tasks that have labels, and which of all T they are.

    Attributes:
        gramian: ``[P, P]``.
        losses: ``[P]``.
        present: ``[T]`` booleans.
        iteration: index of this step.
        epoch: the epoch the training loop set.
    """

    gramian: np.ndarray
    losses: np.ndarray
    present: np.ndarray
    iteration: int
    epoch: int


class GramianWeighting(Weighting):
    """Weights from the Gramian of the task gradients, solved for in float64 on the host.

    Fetching the Gramian, the losses and who has labels, T² + 2 T numbers, is the one time that `forward` waits for the
    device. A rule says how it weighs in `solve`, or in `weigh` if it looks at more than the Gramian.

    Args:
        tasks: the tasks.
        at: where gradients are compared, at the shared ``"features"`` or over the shared ``"parameters"``.
        seed: of the rule's generator.

    Attributes:
        eps: relative rounding error of the inner products, that of the type they were computed in.
        tiny: squared lengths up to this are zero.
    """

    eps: float
    tiny: float

    def __init__(self, tasks: Sequence[Task], *, at: Place, seed: int = 0) -> None:
        super().__init__(tasks, seed=seed)
        if at not in ("features", "parameters"):
            raise ValueError(f"at must be 'features' or 'parameters', not {at!r}")
        self.at = at

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]``; zero for tasks without a label in this batch, which are left out of the problem.

        Raises:
            SolverFailure: if the Gramian is not finite.
        """
        gramian = self.compared(signals).to(torch.float64)
        about = torch.stack([signals.losses.to(gramian), signals.labelled.to(gramian)])
        # Joined, so that the host waits once.
        *rows, losses, labelled = torch.cat([gramian, about]).cpu().numpy()
        whole, present = np.stack(rows), labelled > 0
        inner = whole[np.ix_(present, present)]
        if not np.isfinite(inner).all():
            raise SolverFailure("the inner products of the task gradients are not finite", inner)
        weights = np.zeros(len(whole))
        if present.any():
            weights[present] = self.weigh(Fetched(inner, losses[present], present, signals.iteration, signals.epoch))
        return torch.from_numpy(weights).to(signals.losses, non_blocking=True)

    def compared(self, signals: Signals) -> Tensor:
        """The Gramian ``[T, T]`` that the weights are solved for."""
        gramian = signals.gramian(self.at)
        precision = torch.finfo(gramian.dtype)
        self.eps, self.tiny = precision.eps, precision.tiny
        return gramian

    def weigh(self, fetched: Fetched) -> np.ndarray:
        """Weights ``[P]`` of the tasks that have labels, one or more."""
        return self.solve(fetched.gramian)

    def solve(self, gramian: np.ndarray) -> np.ndarray:
        """Weights from the Gramian of the tasks that have labels, both of their number."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it weighs a Gramian")
