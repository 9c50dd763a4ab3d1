"""Nash-MTL: Navon et al., "Multi-task learning as a bargaining game", ICML 2022."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sidetask_core import Equal, Method, Place, Signals, Task
from torch import Tensor

from sidetask_baselines.cosines import CosineWeighting
from sidetask_baselines.gramian import Fetched
from sidetask_baselines.simplex import DOUBLE, SolverFailure, accuracy, shortest, vectors


class NashMTL(CosineWeighting):
    """Let the tasks bargain for the direction of the step.

    Of the directions d of one length, the Nash bargaining solution maximises Σ_t log⟨g_t, d⟩. It is Σ_t α_t g_t where
    K α = 1/α, elementwise, with the Gramian K and α > 0. Then every task contributes the same, α_t ⟨g_t, d⟩ = 1, and
    scaling a loss changes nothing but its weight.

    The paper's equation fixes the scale of the weights: whatever the gradients' lengths, the combined gradient is √T
    long, of T tasks. The official code divides K by its Frobenius norm first, which makes it √T ‖K‖^½ long, and clips
    it to length 1.

    Where a convex combination of the gradients vanishes (they oppose each other), no direction serves all tasks, the
    bargain fails, and the shared parameters stay: the weights are those of the shortest combination, with
    Σ_t α_t ‖g_t‖ = T. Inner products tell it from a short one down to 5e-5 of the gradients' lengths in double
    precision and 1e-2 in single: below, their rounding misses the equation by 1e-6 or by 1e-2, and the combination
    counts as vanishing. A gradient of zero has nothing to bargain for; its weight is zero.

    Args:
        tasks: the tasks.
        at: ``"parameters"`` (the paper) or ``"features"``, which saves the pass over the encoder per task.
        scale: ``"paper"``, its equation; ``"sum"``, weights that sum to the number of tasks that have a gradient; or
            ``"frobenius"``, as in the official code.
        max_norm: longest combined gradient, at the place where gradients are compared; longer ones are shortened. 1 in
            the official code.
        every: number of steps between solutions, which cost a pass over the encoder per task; other steps take the last
            weights, and the last factor of `max_norm`. A task with labels that had none at the last solution calls for
            a new one at once; only while there is such a task do the steps between solutions wait for the device.

    Raises:
        ValueError: for an unknown place or scale, or a `max_norm` or `every` that is not positive.
        SolverFailure: in a step whose gradients are not finite, or whose solution misses |α_t (K α)_t − 1| ≤ 1e-6, or
            1e-2 in single precision, with K as it is given.

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
        self.solved = [False] * len(self.tasks)
        self.register_buffer("latest", torch.ones(len(self.tasks), dtype=torch.float64))

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]``, at least zero."""
        if signals.iteration % self.every and self._has_weights(signals.labelled):
            return self.latest.to(signals.losses) * signals.labelled
        self.solved = [False] * len(self.tasks)
        weights = super().forward(signals)
        self.latest = weights.to(torch.float64)
        return weights

    def _has_weights(self, labelled: Tensor) -> bool:
        """Whether every task with labels took part in the last solution."""
        return all(self.solved) or not any(np.greater(labelled.tolist(), self.solved))

    def weigh(self, fetched: Fetched) -> np.ndarray:
        """Weights ``[P]`` of the tasks that have labels."""
        weights = super().weigh(fetched)
        self.solved = fetched.present.tolist()
        return weights

    def solve_unit(self, cosines: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Weights ``[P]`` of the tasks whose gradients have a length."""
        shares = bargain(cosines, self.eps)
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
        """Which tasks have weights to take up again, besides what every rule saves."""
        return super().get_extra_state() | {"solved": list(self.solved)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on where a saved rule stood."""
        super().set_extra_state(state)
        self.solved = list(state["solved"])


def bargain(cosines: np.ndarray, eps: float = DOUBLE) -> np.ndarray:
    """The solution b > 0 of C b = 1/b for the cosines C; the shortest combination that sums to T where there is none.

    It is the minimum of ½ bᵀCb − Σ_t log b_t, which is strictly convex and self-concordant: Newton's method, damped by
    its decrement until that is small, gets there from anywhere (Boyd and Vandenberghe, "Convex optimization", 9.6).

    Args:
        cosines: between the gradients ``[T, T]``.
        eps: relative rounding error of the gradients' inner products.

    Raises:
        SolverFailure: if the equation, with C as it is given, is missed by more than `accuracy`, or no solution is
            found though no combination vanishes.

    >>> bargain(np.eye(2))
    array([1., 1.])
    """
    # Without the negative eigenvalues that rounding makes, and with them a bound.
    points = vectors(cosines)
    exact = points.T @ points
    count = len(cosines)
    b = np.full(count, np.sqrt(count / max(exact.sum(), 1.0)))
    full = 0
    # Beyond these shares, rounding errors of the cosines alone miss the equation by what it is asked to hold to.
    largest = np.sqrt(accuracy(eps) / (10 * eps))
    while full < 6 and b.max() < largest:
        miss = 1 - b * (exact @ b)
        step = np.linalg.solve(np.outer(b, b) * exact + np.eye(count), miss)
        decrement = np.sqrt(miss @ step)
        # From a decrement of a quarter, full steps converge quadratically: six are enough for machine precision.
        full += decrement <= 0.25
        b = b * (1 + step / (1 if decrement <= 0.25 else 1 + decrement))
    if b.max() < largest:
        if not np.abs(b * (cosines @ b) - 1).max() <= accuracy(eps):
            raise SolverFailure("the bargaining equation is not met", cosines)
        return b
    weights = shortest(cosines, eps)
    if np.linalg.norm(points @ weights) > 10 / largest:
        raise SolverFailure("the search for the bargain left its bounds though no combination vanishes", cosines)
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
