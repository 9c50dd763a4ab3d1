"""IMTL-G: Liu et al., "Towards impartial multi-task learning", ICLR 2021; the gradients' half."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sidetask_core import Equal, Method, Place, Task

from sidetask_baselines.cosines import CosineWeighting
from sidetask_baselines.scale import check_scale, total_weight
from sidetask_baselines.simplex import DOUBLE, TOLERANCE, SolverFailure, accuracy, rounding


class IMTLG(CosineWeighting):
    """Weigh the tasks so that the combined gradient has the same projection on every task's direction.

    With u_t = g_t / ‖g_t‖, the weights α sum to 1 and ⟨Σ_s α_s g_s, u_t⟩ is the same for all t. They may be negative.

    In the unit gradients' coordinates x_t = α_t ‖g_t‖ the equations are C x ∝ 1, with C the cosines. They are solved
    along the eigenvectors of C, and projections are equal to 1e-6 of their mean; to 1e-2 if inner products come in
    single precision. Where those do not tell an eigenvalue from zero:

    - Gradients that rounding alone tells apart are duplicates: each has the same share, and their projections differ by
      no more than that rounding.
    - With opposing gradients projections are equal only if all are zero: so is the combined gradient then, that of the
      shortest such x, and the shared parameters stay. Gradients that cancel but for some 3e-4 of their lengths, or
      5e-2 in single precision, are opposing, for the rounding of their cosines would miss the equations by more.

    A gradient of zero has no direction; its weight is zero, and the other tasks are weighted as if it were not there.

    The equations allow the common projection to be negative, and then a step raises *every* loss. That happens where
    gradients differ much in length and are close to linearly dependent; `descend` turns such a step round.

    Args:
        tasks: the tasks.
        at: ``"features"`` (the paper, one backward pass) or ``"parameters"``.
        scale: weights sum to the number of tasks that have a gradient (``"sum"``) or, as in the paper, to 1
            (``"paper"``).
        descend: where the common projection is negative, take the weights times −1, which the paper does not.

    Raises:
        ValueError: for an unknown place or scale.
        SolverFailure: in a step whose gradients are not finite, or whose solution sums to zero, so that no multiple of
            it sums to 1: scaled, it would be 1e6 times as long as the shortest gradient.
    """

    def __init__(
        self, tasks: Sequence[Task], *, at: Place = "features", scale: str = "sum", descend: bool = False
    ) -> None:
        super().__init__(tasks, at=at)
        self.scale = check_scale(scale)
        self.descend = descend

    def solve_unit(self, cosines: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Weights ``[P]`` of the tasks whose gradients have a length."""
        weights = total_weight(self.scale, len(lengths)) * equal_projections(cosines, lengths, self.eps)
        uphill = self.descend and (cosines @ (weights * lengths)).mean() < 0
        return -weights if uphill else weights


def equal_projections(cosines: np.ndarray, lengths: np.ndarray, eps: float = DOUBLE) -> np.ndarray:
    """Weights that sum to 1 and whose combination has the same projection on every gradient.

    Args:
        cosines: between the gradients ``[T, T]``.
        lengths: of the gradients ``[T]``, positive.
        eps: relative rounding error of the gradients' inner products.

    Raises:
        SolverFailure: if the sum of the weights is zero before it is normalised, or projections differ by more than
            `accuracy` and what tells duplicates apart.

    >>> equal_projections(np.eye(2), np.array([3.0, 1.0]))
    array([0.25, 0.75])
    """
    values, axes = np.linalg.eigh(cosines)
    noise, close = rounding(len(cosines), eps), accuracy(eps)
    along = axes.sum(axis=0)
    # Duplicates, which rounding alone tells apart, along what it makes of their difference: left out.
    spare = (values <= noise) & (np.abs(along) <= np.sqrt(close))
    # The other parts of the solution, along / values, are to be known to what is close.
    lost = ~spare & (noise * np.abs(along) > close * values.clip(min=0))
    left_out = float(np.linalg.norm(along[spare]))
    inverse = lengths.min() / lengths
    if lost.any() or left_out > np.sqrt(close):
        vanishing = axes[:, lost | (values <= noise)]
        x = vanishing @ (inverse @ vanishing)
        size = np.linalg.norm(x)
        miss = np.abs(cosines @ x).max() / (np.sqrt(len(x)) * size)
    else:
        regular = ~spare
        x = axes[:, regular] @ (along[regular] / values[regular])
        size = np.sqrt(x.sum().clip(min=0))
        miss = np.abs(cosines @ x - 1).max() - left_out
    if miss > close:
        raise SolverFailure("the combined gradient's projections differ between tasks", cosines)
    weights = x * inverse
    total = weights.sum()
    if abs(total) <= TOLERANCE * size:
        raise SolverFailure("the weights with equal projections sum to zero, and cannot be scaled to sum to 1", cosines)
    return weights / total


def imtl_g(tasks: Sequence[Task], *, at: Place = "features", scale: str = "sum", descend: bool = False) -> Method:
    """IMTL-G for the shared parameters; task-specific ones keep their own gradients, as in the paper."""
    return Method(encoder=IMTLG(tasks, at=at, scale=scale, descend=descend), decoder=Equal(tasks))
