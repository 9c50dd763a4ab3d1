"""Uncertainty weighting: Kendall, Gal, Cipolla, "Multi-task learning using uncertainty", CVPR 2018."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sidetask_core.method import Weighting
from sidetask_core.signals import Signals
from sidetask_core.task import Task

# Of log variances: those of losses from about 1e-7 to 1e7. No wider, since the first step of a loss that comes back
# after it was zero is weighed by e^_END / 2.
_END = 16.0


@runtime_checkable
class Uncertain(Protocol):
    """A rule that knows how uncertain it is about each task, for rules that go by what another one learns."""

    tasks: tuple[str, ...]

    def sigma(self) -> Tensor:
        """The uncertainty σ of every task ``[T]``, positive, detached."""

    def objective(self, signals: Signals) -> Tensor | None:
        """See `Rule.objective`."""


@runtime_checkable
class FollowsUncertainty(Protocol):
    """A rule that goes by how uncertain another one is, and can be told which."""

    def follow(self, rule: Uncertain) -> None:
        """Go by the σ of this rule from now on."""


class Uncertainty(Weighting):
    """Weigh each loss by the inverse of a variance that is learned with the network.

    The objective is Σ_t L_t / (2σ_t²) + log σ_t, written with s_t = log σ_t², so that the weights are e^{−s_t} / 2 and
    settle where σ_t² = L_t. `log_variance` ``[T]`` is trained by the caller's optimizer (``step.parameters()``), in
    Auto-λ's code and here without constraint.

    A loss that stays zero or negative would let s_t fall without end: no variance equals it. Every s_t is therefore
    kept within ±16, variances from 1e−7 to 1e7, and returns once there is a loss again: by plain or momentum descent
    after one jump to the upper end, by Adam slowly, for it remembers how steep the end was.

    Args:
        tasks: the tasks.
        init: first value of every s_t; −0.7 (Auto-λ's code), at which the weights are close to one.

    >>> rule = Uncertainty([Task("seg", loss=abs), Task("depth", loss=abs)])
    >>> [round(w, 3) for w in (rule.log_variance.neg().exp() / 2).tolist()]
    [1.007, 1.007]
    >>> rule.sigma()
    tensor([0.7047, 0.7047])
    """

    def __init__(self, tasks: Sequence[Task], *, init: float = -0.7) -> None:
        super().__init__(tasks)
        self.log_variance = nn.Parameter(torch.full((len(self.tasks),), float(init)))

    def forward(self, signals: Signals) -> Tensor:
        """Weights e^{−s} / 2, ``[T]``."""
        return self._within_ends().neg().exp() / 2

    def sigma(self) -> Tensor:
        """σ of every task ``[T]``, detached."""
        return (self._within_ends().detach() / 2).exp()

    def objective(self, signals: Signals) -> Tensor:
        """Σ_t L_t / (2 e^{s_t}) + s_t / 2 over the tasks that have labels in this batch."""
        s = self._within_ends()
        return ((signals.losses * s.neg().exp() + s) * signals.labelled).sum() / 2

    def _within_ends(self) -> Tensor:
        """s, after moving it back to the end that it has left."""
        # The parameter itself: one that is far beyond its end finds no way back, at whatever value it is read.
        with torch.no_grad():
            self.log_variance.clamp_(-_END, _END)
        return self.log_variance
