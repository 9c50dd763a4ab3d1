"""Random loss weighting: Lin, Ye, Zhang, Tsang, "Reasonable effectiveness of random weighting", TMLR 2022."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sidetask_core import Method, Signals, Task, Weighting
from torch import Tensor

from sidetask_baselines.scale import check_scale, softmax_among


class RLW(Weighting):
    """Draw new weights in every step: the softmax of independent standard normals (RLW-Normal).

    The paper's weights sum to 1. Here they are scaled to sum to T, so that their mean is one and a learning rate
    found for equal weighting keeps its meaning; ``scale="paper"`` leaves the paper's scale. A task without a label in
    the batch has weight zero, and T is the number of the others.

    Args:
        tasks: the tasks.
        scale: ``"sum"`` or ``"paper"``.
        seed: of the rule's generator, whose state is saved with the rule.
    """

    def __init__(self, tasks: Sequence[Task], *, scale: str = "sum", seed: int = 0) -> None:
        super().__init__(tasks, seed=seed)
        self.scale = check_scale(scale)

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]``, positive for tasks with labels."""
        drawn = torch.randn(len(self.tasks), generator=self.generator, dtype=torch.float64)
        shares = softmax_among(drawn.to(signals.losses, non_blocking=True), signals.labelled)
        return signals.labelled.sum() * shares if self.scale == "sum" else shares


def rlw(tasks: Sequence[Task], *, scale: str = "sum", seed: int = 0) -> Method:
    """Random loss weighting above and below the cut."""
    rule = RLW(tasks, scale=scale, seed=seed)
    return Method(encoder=rule, decoder=rule)
