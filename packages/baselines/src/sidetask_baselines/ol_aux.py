"""OL-AUX: Lin, Baweja, Kantor, Held, "Adaptive auxiliary task weighting for reinforcement learning", NeurIPS 2019."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sidetask_core import Equal, Method, Place, Signals, Task
from torch import Tensor

from sidetask_baselines.auxiliary import AuxiliaryWeighting


class OLAUX(AuxiliaryWeighting):
    """Raise the weight of auxiliary tasks whose gradients have, over the last steps, lowered the primary's loss.

    To first order a step of size α along w_t G_t lowers the primaries' summed loss by α w_t⟨G_main, G_t⟩. Gradient
    ascent on that, summed over a window of N steps, is

        w_t ← max(0, w_t + β Σ α⟨G_main, G_t⟩),

    after which a new window begins. The weights that a window leads to hold from the step after its last one on.
    Primaries keep weight 1. In a step without its labels a task adds nothing, and without labels of a primary no task
    does; weights stay. Inner products grow with each loss: only α·β matters, and what suits one loss scale does not
    suit another.

    The paper balances the losses by taking their logarithms, which is not done here. The authors' code, by their word a
    re-implementation, does it too; it also averages gradients over four steps before multiplying them, and takes the
    gradient of the whole weighted sum for G_main. Sign, sum and the clamp at 0 are as above.

    Args:
        tasks: the tasks, of which at least one is primary.
        at: ``"parameters"`` (the paper) or ``"features"``.
        window: N, in steps; 5 (the authors' code).
        lr: α, the step size of the caller's optimizer; 1e-3 (the authors' code).
        beta: step size of the weights; 5 (the authors' code, for logarithms: choose it to suit the losses).
        init: first weight of the auxiliary tasks; 1 (the authors' code).

    Raises:
        ValueError: if no task is primary, for an unknown place, a window that is not a positive number of steps, an
            `lr` or `beta` that is not positive, or a negative `init`.
    """

    weights: Tensor
    sums: Tensor

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        at: Place = "parameters",
        window: int = 5,
        lr: float = 1e-3,
        beta: float = 5.0,
        init: float = 1.0,
    ) -> None:
        super().__init__(tasks, at=at)
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a positive number of steps, not {window!r}")
        for name, value in (("lr", lr), ("beta", beta)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if not init >= 0:
            raise ValueError(f"init must be at least 0, not {init}")
        self.window = window
        self.lr = lr
        self.beta = beta
        first = [1.0 if primary else float(init) for primary in self.primary]
        self.register_buffer("weights", torch.tensor(first, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(len(first), dtype=torch.float64))
        self.steps = 0

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]``, at least zero, constant within a window."""
        gramian = signals.gramian(self.at).to(torch.float64)
        primary = self.primaries.to(gramian.device, non_blocking=True)
        weights, sums = self.weights.to(gramian), self.sums.to(gramian)
        gain = self.lr * self.over_primaries(gramian)
        # One step whose gradients overflow is not to end the run's weights.
        sums = sums + torch.where(gain.isfinite(), gain, 0.0)
        self.steps += 1
        adapted = weights
        if self.steps == self.window:
            adapted = torch.where(primary, weights, (weights + self.beta * sums).clamp(min=0))
            sums, self.steps = torch.zeros_like(sums), 0
        self.weights, self.sums = adapted.to(self.weights.dtype), sums.to(self.sums.dtype)
        return weights.to(signals.losses)

    def get_extra_state(self) -> dict[str, Any]:
        """How many steps of the window are done, besides what every rule saves."""
        return super().get_extra_state() | {"steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on where a saved rule stood."""
        super().set_extra_state(state)
        self.steps = state["steps"]


def ol_aux(
    tasks: Sequence[Task],
    *,
    at: Place = "parameters",
    window: int = 5,
    lr: float = 1e-3,
    beta: float = 5.0,
    init: float = 1.0,
) -> Method:
    """OL-AUX for the shared parameters; task-specific ones keep their own gradients.

    The paper's weighted sum of losses trains the heads as well: ``Method(encoder=OLAUX(tasks))``.

    >>> tasks = [Task("seg", loss=abs), Task("depth", loss=abs, primary=False)]
    >>> ol_aux(tasks, init=0.5).encoder.weights.tolist()
    [1.0, 0.5]
    """
    return Method(
        encoder=OLAUX(tasks, at=at, window=window, lr=lr, beta=beta, init=init),
        decoder=Equal(tasks),
    )
