"""Nash-MTL: Navon et al., "Multi-task learning as a bargaining game", ICML 2022."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sidetask_core import Equal, Method, Place, Signals, Task
from torch import Tensor

from sidetask_baselines.cosines import CosineWeighting
from sidetask_baselines.simplex import TOLERANCE, SolverFailure, min_norm_weights, vectors


class NashMTL(CosineWeighting):
    """Let the tasks bargain for the direction of the step.

    Of the directions d of one length, the Nash bargaining solution maximises Σ_t log⟨g_t, d⟩. It is Σ_t α_t g_t where
    K α = 1/α, elementwise, with the Gramian K and α > 0. Then every task contributes the same, α_t ⟨g_t, d⟩ = 1, and
    scaling a loss changes nothing but its weight.

    The paper's equation fixes the scale of the weights: whatever the gradients' lengths, the combined gradient is √T
    long, of T tasks. The official code divides K by its Frobenius norm first, which makes it √T ‖K‖^½ long, and clips
    it to length 1.

    Where a convex combination of the gradients vanishes (they oppose each other), no direction serves all tasks, the
    bargain fails, and the shared parameters stay: the weights are those of the vanishing combination, with
    Σ_t α_t ‖g_t‖ = T. Inner products tell it from a short one down to some 1e-4 of the gradients' lengths: below, their
    rounding misses the equation by 1e-6, and the combination counts as vanishing. A gradient of zero has nothing to
    bargain for; its weight is zero.

    Args:
        tasks: the tasks.
        at: ``"parameters"`` (the paper) or ``"features"``, which saves the pass over the encoder per task.
        scale: ``"paper"``, its equation; ``"sum"``, weights that sum to the number of tasks that have a gradient; or
            ``"frobenius"``, as in the official code.
        max_norm: longest combined gradient, at the place where gradients are compared; longer ones are shortened. 1 in
            the official code.
        every: number of steps between solutions, which cost a pass over the encoder per task; other steps take the last
            weights, and the last factor of `max_norm`.

    Raises:
        ValueError: for an unknown place or scale, or a `max_norm` or `every` that is not positive.
        SolverFailure: in a step whose gradients are not finite or whose solution misses |α_t (K α)_t − 1| ≤ 1e-6.

    The official code weighs the losses, and hence task-specific parameters too: ``Method(encoder=NashMTL(tasks))``.
    """

    latest: Tensor

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        at: Place = "parameters",
        scale: str = "paper",
        max_norm: float | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(tasks, at=at)
        if scale not in ("paper", "sum", "frobenius"):
            raise ValueError(f"scale must be 'paper', 'sum' or 'frobenius', not {scale!r}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, not {max_norm}")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive number of steps, not {every!r}")
        self.scale = scale
        self.max_norm = max_norm
        self.every = every
        self.solved = False
        self.register_buffer("latest", torch.ones(len(self.tasks), dtype=torch.float64))

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]``, at least zero."""
        if self.solved and signals.iteration % self.every:
            return self.latest.to(signals.losses) * signals.labelled
        weights = super().forward(signals)
        # A task without labels keeps its weight for the steps until the next solution.
        self.latest = torch.where(signals.labelled, weights.to(torch.float64), self.latest.to(weights.device))
        self.solved = True
        return weights

    def solve_unit(self, cosines: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Weights ``[P]`` of the tasks whose gradients have a length."""
        shares = bargain(cosines)
        factor = 1.0
        if self.scale == "sum":
            factor = len(shares) / (shares / lengths).sum()
        elif self.scale == "frobenius":
            factor = np.sqrt(np.linalg.norm(cosines * np.outer(lengths, lengths)))
        length = factor * np.sqrt(max(shares @ cosines @ shares, 0.0))
        if self.max_norm is not None and length > self.max_norm:
            factor *= self.max_norm / length
        return factor * shares / lengths

    def get_extra_state(self) -> dict[str, Any]:
        """Whether there are weights to take up again, besides what every rule saves."""
        return super().get_extra_state() | {"solved": self.solved}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on where a saved rule stood."""
        super().set_extra_state(state)
        self.solved = state["solved"]


def bargain(cosines: np.ndarray) -> np.ndarray:
    """The solution b > 0 of C b = 1/b for the cosines C; a vanishing combination that sums to T where there is none.

    It is the minimum of ½ bᵀCb − Σ_t log b_t, which is strictly convex and self-concordant: Newton's method, damped by
    its decrement until that is small, gets there from anywhere (Boyd and Vandenberghe, "Convex optimization", 9.6).

    Raises:
        SolverFailure: if the equation is missed by more than `TOLERANCE` though no combination vanishes.

    >>> bargain(np.eye(2))
    array([1., 1.])
    """
    # Without the negative eigenvalues that rounding makes, and with them a bound.
    points = vectors(cosines)
    cosines = points.T @ points
    count = len(cosines)
    b = np.full(count, np.sqrt(count / max(cosines.sum(), 1.0)))
    full = 0
    # Beyond these shares, rounding errors of the cosines alone miss the equation by the tolerance.
    largest = np.sqrt(TOLERANCE / (10 * np.finfo(float).eps))
    while full < 6 and b.max() < largest:
        miss = 1 - b * (cosines @ b)
        step = np.linalg.solve(np.outer(b, b) * cosines + np.eye(count), miss)
        decrement = np.sqrt(miss @ step)
        # From a decrement of a quarter, full steps converge quadratically: six are enough for machine precision.
        full += decrement <= 0.25
        b = b * (1 + step / (1 if decrement <= 0.25 else 1 + decrement))
    if np.abs(b * (cosines @ b) - 1).max() <= TOLERANCE:
        return b
    weights = min_norm_weights(points)
    if np.linalg.norm(points @ weights) > 1e-3:
        raise SolverFailure("the bargaining equation is not met", cosines)
    return count * weights


def nash_mtl(
    tasks: Sequence[Task],
    *,
    at: Place = "parameters",
    scale: str = "paper",
    max_norm: float | None = None,
    every: int = 1,
) -> Method:
    """Nash-MTL for the shared parameters; task-specific ones keep their own gradients: the paper's game is about θ."""
    return Method(encoder=NashMTL(tasks, at=at, scale=scale, max_norm=max_norm, every=every), decoder=Equal(tasks))
