"""FAMO: Liu, Feng, Stone, Liu, "FAMO: fast adaptive multitask optimization", NeurIPS 2023."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sidetask_core import Method, Signals, Task, Weighting
from sidetask_core.adam import Adam
from torch import Tensor

from sidetask_baselines.scale import check_scale, softmax_among

# Added to losses before they are divided by and before their logarithm, as in the released code.
EPSILON = 1e-8
# Relative differences of this many units are rounding, of kernels that differ between the step and the look back.
ROUNDING = 16


class FAMO(Weighting):
    """Let the tasks' losses fall at one relative rate, with losses alone.

    With z the softmax of T logits, a step descends on Σ_t z_t log L_t: weights z_t / L_t, scaled to sum to 1 in the
    paper. Its success is δ_t = log L_t(before) − log L_t(after), on one batch, and the logits descend along
    (∂z/∂logits)ᵀ δ, so that a task which fell least gains most (Algorithm 1). They are trained by the rule's own Adam.

    The losses after the update cost a forward pass without gradient over the previous batch, as in the released code
    (see `Signals.progress`). Where the previous step failed, or the losses differ by no more than rounding, as while
    gradients accumulate, the logits stay. A task without label in the previous batch keeps its logit, one without label
    in this batch has weight zero. Weights are inverse to the scale of a loss, and the logits do not depend on it.

    The method takes logarithms. A loss of exactly zero counts as 1e-8, and its task has all but all of the weight (the
    released code). A negative loss has no logarithm: its task has weight zero, and keeps its logit, as does one whose
    loss after the update was not finite. Add a constant to a loss that can become negative.

    Args:
        tasks: the tasks. Their losses should not be negative.
        lr: Adam's step size; 0.025 (the released code).
        decay: weight decay of the logits, the paper's γ; 0.01 (the released code).
        scale: weights sum to the number of tasks whose weight is not zero (``"sum"``) or, as in the paper, to 1
            (``"paper"``).

    Raises:
        ValueError: for an unknown scale, an `lr` that is not positive or a negative `decay`.

    >>> rule = FAMO([Task("seg", loss=abs), Task("depth", loss=abs)])
    >>> rule.logits.tolist()
    [0.0, 0.0]
    """

    logits: Tensor

    def __init__(self, tasks: Sequence[Task], *, lr: float = 0.025, decay: float = 0.01, scale: str = "sum") -> None:
        super().__init__(tasks)
        self.scale = check_scale(scale)
        self.adam = Adam(len(self.tasks), lr=lr, weight_decay=decay)
        self.register_buffer("logits", torch.zeros(len(self.tasks), dtype=torch.float64))

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]``, at least zero."""
        progress = signals.progress()
        if progress is not None:
            fell = (progress.before + EPSILON).log() - (progress.after + EPSILON).log()
            rounding = ROUNDING * torch.finfo(progress.after.dtype).eps * progress.before.abs()
            moved = ((progress.before - progress.after).abs() > rounding) & progress.labelled
            there = progress.labelled & fell.isfinite() & moved.any()
            shares = softmax_among(self.logits, there)
            fell = torch.where(there, fell, 0.0)
            self.logits = self.adam(self.logits, shares * (fell - (shares * fell).sum()), there)
        weighable = signals.labelled & (signals.losses > -EPSILON)
        shares = softmax_among(self.logits, weighable)
        wanted = torch.where(weighable, shares / (signals.losses + EPSILON), 0.0)
        total = weighable.sum() if self.scale == "sum" else 1.0
        return total * wanted / wanted.sum().clamp(min=torch.finfo(wanted.dtype).tiny)


def famo(tasks: Sequence[Task], *, lr: float = 0.025, decay: float = 0.01, scale: str = "sum") -> Method:
    """FAMO above and below the cut, as in the paper."""
    rule = FAMO(tasks, lr=lr, decay=decay, scale=scale)
    return Method(encoder=rule, decoder=rule)
