"""IMTL-L: Liu et al., "Towards impartial multi-task learning", ICLR 2021; the losses' half."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sidetask_core import Method, Signals, Task, Weighting
from torch import Tensor, nn


class IMTLL(Weighting):
    """Scale every loss to the same size, by factors that are learned with the network.

    The objective is Σ_t e^{s_t} L_t − s_t, so that the weights are e^{s_t} and settle where e^{s_t} L_t = 1.
    `log_scale`, the s_t ``[T]``, is trained by the caller's optimizer (``step.parameters()``).

    The scale of a loss does not matter: training on k L_t from s_t − log k is training on L_t from s_t, step for step.
    From the common start it has to cover log k first. The gradient of s_t is e^{s_t} L_t − 1: choose `init`, or an
    optimizer like Adam, so that a first loss far above 1 does not throw s_t far down. A loss that stays zero or
    negative lets s_t, and with it the weight, rise without bound: e^{s} L = 1 has no solution.

    Args:
        tasks: the tasks.
        init: first value of every s_t; 0, weights of one.

    >>> IMTLL([Task("seg", loss=abs), Task("depth", loss=abs)]).log_scale.exp().tolist()
    [1.0, 1.0]
    """

    def __init__(self, tasks: Sequence[Task], *, init: float = 0.0) -> None:
        super().__init__(tasks)
        self.log_scale = nn.Parameter(torch.full((len(self.tasks),), float(init)))

    def forward(self, signals: Signals) -> Tensor:
        """Weights e^s, ``[T]``."""
        return self.log_scale.exp()

    def objective(self, signals: Signals) -> Tensor:
        """Σ_t e^{s_t} L_t − s_t over the tasks that have labels in this batch."""
        return ((signals.losses * self.log_scale.exp() - self.log_scale) * signals.labelled).sum()


def imtl_l(tasks: Sequence[Task], *, init: float = 0.0) -> Method:
    """IMTL-L above and below the cut."""
    rule = IMTLL(tasks, init=init)
    return Method(encoder=rule, decoder=rule)
