"""Uncertainty weighting: Kendall, Gal, Cipolla, "Multi-task learning using uncertainty", CVPR 2018."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sidetask_core import Method, Signals, Task, Weighting
from torch import Tensor, nn


class Uncertainty(Weighting):
    """Weigh each loss by the inverse of a variance that is learned with the network.

    The objective is Σ_t L_t / (2 e^{s_t}) + s_t / 2 with s_t = log σ_t², so that the weights are e^{−s_t} / 2 and
    settle where σ_t² = L_t. `log_variance` ``[T]`` is trained by the caller's optimizer (``step.parameters()``), in
    Auto-λ's code and here without constraint. A loss that stays zero or negative lets s_t fall, and the weight rise,
    without bound: no variance equals it.

    Args:
        tasks: the tasks.
        init: first value of every s_t; −0.7 (Auto-λ's code), at which the weights are close to one.

    >>> rule = Uncertainty([Task("seg", loss=abs), Task("depth", loss=abs)])
    >>> [round(w, 3) for w in (rule.log_variance.neg().exp() / 2).tolist()]
    [1.007, 1.007]
    """

    def __init__(self, tasks: Sequence[Task], *, init: float = -0.7) -> None:
        super().__init__(tasks)
        self.log_variance = nn.Parameter(torch.full((len(self.tasks),), float(init)))

    def forward(self, signals: Signals) -> Tensor:
        """Weights e^{−s} / 2, ``[T]``."""
        return self.log_variance.neg().exp() / 2

    def objective(self, signals: Signals) -> Tensor:
        """Σ_t L_t / (2 e^{s_t}) + s_t / 2 over the tasks that have labels in this batch."""
        terms = signals.losses * self.log_variance.neg().exp() + self.log_variance
        return (terms * signals.labelled).sum() / 2


def uncertainty(tasks: Sequence[Task], *, init: float = -0.7) -> Method:
    """Uncertainty weighting above and below the cut."""
    rule = Uncertainty(tasks, init=init)
    return Method(encoder=rule, decoder=rule)
