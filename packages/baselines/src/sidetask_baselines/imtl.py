"""IMTL: Liu et al., "Towards impartial multi-task learning", ICLR 2021; both halves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sidetask_core import Method, Place, Signals, Task
from torch import Tensor

from sidetask_baselines.imtl_g import IMTLG
from sidetask_baselines.imtl_l import IMTLL


class IMTL(IMTLG):
    """IMTL-G on the gradients of the losses that IMTL-L scales.

    The weights α of the scaled gradients e^{s_t} g_t have equal projections and sum to 1; the weights of the task
    gradients themselves are α_t e^{s_t}. Scaling a gradient does not turn it, so that they are IMTL-G's weights times
    one number for all tasks: the scales decide how long the step is, and IMTL-G its direction.

    In the decoders' slot belongs the same `IMTLL` object, so that there is one s (`imtl` does that).

    Args:
        tasks: the tasks.
        at: ``"features"`` (the paper, one backward pass) or ``"parameters"``.
        scale: of the weights α: they sum to the number of tasks that have a gradient (``"sum"``) or, as in the paper,
            to 1 (``"paper"``).
        descend: as in `IMTLG`.
        losses: the rule that scales the losses; a new one by default.

    Raises:
        ValueError: for an unknown place or scale, or a rule for losses of other tasks.
        SolverFailure: as in `IMTLG`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        at: Place = "features",
        scale: str = "sum",
        descend: bool = False,
        losses: IMTLL | None = None,
    ) -> None:
        super().__init__(tasks, at=at, scale=scale, descend=descend)
        self.losses = IMTLL(tasks) if losses is None else losses
        if self.losses.tasks != self.tasks:
            raise ValueError(f"losses scales the tasks {', '.join(self.losses.tasks)}, not {', '.join(self.tasks)}")

    def forward(self, signals: Signals) -> Tensor:
        """Weights α_t e^{s_t}, ``[T]``."""
        return super().forward(signals) * self.losses(signals).detach().to(signals.losses)

    def compared(self, signals: Signals) -> Tensor:
        """The Gramian of the scaled gradients."""
        scales = self.losses(signals).detach().to(torch.float64)
        return super().compared(signals) * scales.outer(scales)

    def objective(self, signals: Signals) -> Tensor:
        """IMTL-L's. A step that finds it in both slots fills the gradient of s once, for the two values are one."""
        return self.losses.objective(signals)


def imtl(
    tasks: Sequence[Task], *, at: Place = "features", scale: str = "sum", descend: bool = False, init: float = 0.0
) -> Method:
    """IMTL: IMTL-L's scales for task-specific parameters, and IMTL-G on top of them for the shared ones."""
    losses = IMTLL(tasks, init=init)
    return Method(encoder=IMTL(tasks, at=at, scale=scale, descend=descend, losses=losses), decoder=losses)
