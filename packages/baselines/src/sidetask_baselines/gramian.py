"""What weightings that need only the inner products of task gradients have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sidetask_core import Place, Signals, Task, Weighting
from torch import Tensor


class GramianWeighting(Weighting):
    """Weights from the Gramian of the task gradients, solved for in float64 on the host.

    Fetching the Gramian, T² numbers, is the one time the rule waits for the device.

    Args:
        tasks: the tasks.
        at: where gradients are compared, at the shared ``"features"`` or over the shared ``"parameters"``.
        seed: of the rule's generator.
    """

    def __init__(self, tasks: Sequence[Task], *, at: Place, seed: int = 0) -> None:
        super().__init__(tasks, seed=seed)
        if at not in ("features", "parameters"):
            raise ValueError(f"at must be 'features' or 'parameters', not {at!r}")
        self.at = at

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]``."""
        gramian = signals.gramian(self.at).to("cpu", torch.float64).numpy()
        return torch.from_numpy(self.solve(gramian)).to(signals.losses, non_blocking=True)

    def solve(self, gramian: np.ndarray) -> np.ndarray:
        """Weights ``[T]`` from the Gramian ``[T, T]``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it weighs a Gramian")
