"""CAGrad: Liu et al., "Conflict-averse gradient descent for multi-task learning", NeurIPS 2021."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from sidetask_core import Equal, Method, Place, Task

from sidetask_baselines.gramian import GramianWeighting
from sidetask_baselines.simplex import DOUBLE, TOLERANCE, SolverFailure, min_norm_weights, rounding, vectors


class CAGrad(GramianWeighting):
    """Among the directions near the mean gradient g₀, take the one that is best for the worst-off task.

    max_d min_t ⟨g_t, d⟩ subject to ‖d − g₀‖ ≤ c‖g₀‖ (Eq. 3). The solution d = g₀ + c‖g₀‖ g_w / ‖g_w‖ is a weighted sum
    of the task gradients. It is T times as long here, so that c = 0 is the gradient of the sum of losses.

    A gradient of zero takes part as one that nothing can serve. Its own weight turns nothing: it is 1, the mean's part.

    Args:
        tasks: the tasks.
        at: ``"parameters"`` (the paper) or ``"features"``.
        c: radius of the search, 0 ≤ c < 1; 0.4 (the paper's value for NYUv2 and Cityscapes).
        rescale: divide by 1 + c², as the official code does by default.

    Raises:
        ValueError: for c outside [0, 1), or an unknown place.
        SolverFailure: in a step whose gradients are not finite, or whose solution d misses the ball's surface by more
            than 1e-6 of its radius, or the best value by more than 1e-6 ‖d‖ times the shortest gradient's length, and
            by more than rounding explains. The surface counts only where ‖g_w‖ > 0 at the optimum: gradients that
            cancel leave d inside.
    """

    def __init__(
        self, tasks: Sequence[Task], *, at: Place = "parameters", c: float = 0.4, rescale: bool = False
    ) -> None:
        super().__init__(tasks, at=at)
        if not 0 <= c < 1:
            raise ValueError(f"c must be at least 0 and less than 1, not {c}")
        self.c = c
        self.rescale = rescale

    def solve(self, gramian: np.ndarray) -> np.ndarray:
        """Weights ``[T]``, at least zero."""
        weights = len(gramian) * conflict_averse(gramian, self.c)
        return weights / (1 + self.c**2) if self.rescale else weights


def conflict_averse(gramian: np.ndarray, c: float) -> np.ndarray:
    """Weights of the tasks in the direction d.

    The dual problem is min_w ⟨g_w, g₀⟩ + k‖g_w‖ over the simplex, with k = c‖g₀‖. Since ‖g_w‖ is the least value of
    (‖g_w‖²/s + s)/2 over s > 0, w is, for the right s, the shortest combination of the shifted gradients
    g_t + (s/k) g₀, and s is right where ‖g_w‖ = s. That is a search for one root, whose sign change is certain.
    """
    points = vectors(gramian)
    count = len(gramian)
    mean = points.mean(axis=1, keepdims=True)
    radius = c * np.linalg.norm(mean)
    lengths = np.linalg.norm(points, axis=0)
    even = np.full(count, 1 / count)
    # The mean of opposing gradients is zero up to rounding, and then there is no direction to stay near.
    if radius <= c * 1e-12 * lengths.max() or c == 0:
        return even

    def shortest(s: float) -> np.ndarray:
        return min_norm_weights(points + (s / radius) * mean)

    def excess(s: float) -> float:
        return s - float(np.linalg.norm(points @ shortest(s)))

    # Below `low` is as good as zero beside the shortest gradient: g_w vanishes at the optimum, and its direction is the
    # limit.
    least = lengths[lengths > 0].min()
    low, high = 1e-7 * min(least, radius), 2 * lengths.max()
    s = low
    if excess(low) < 0:
        s, result = brentq(excess, low, high, xtol=1e-15 * low, rtol=1e-13, maxiter=300, full_output=True, disp=False)
        if not result.converged:
            raise SolverFailure(f"CAGrad's search did not converge: {result.flag}", gramian)
    tilt = shortest(s)
    weights = even + radius / s * tilt
    step, way = points @ weights, points @ tilt
    off = np.linalg.norm(step - mean[:, 0]) / radius - 1
    gap = way @ mean[:, 0] + radius * np.linalg.norm(way) - step @ points
    # What rounding makes of them where gradients cancel, or one is so short that it hardly turns the others.
    noise = rounding(count, DOUBLE)
    away = (off if s == low else abs(off)) - noise * (tilt @ lengths) / s
    missed = gap - noise * (tilt @ lengths + lengths) * (weights @ lengths)
    if away > TOLERANCE or missed.max() > TOLERANCE * np.linalg.norm(step) * least:
        raise SolverFailure("CAGrad's direction is off the ball, or misses the optimum of its dual problem", gramian)
    # A gradient of zero would have all but all of the weight, some radius / low, which serves it nothing.
    weights[lengths == 0] = 1 / count
    return weights


def cagrad(tasks: Sequence[Task], *, at: Place = "parameters", c: float = 0.4, rescale: bool = False) -> Method:
    """CAGrad for the shared parameters; task-specific ones keep their own gradients, as in the paper."""
    return Method(encoder=CAGrad(tasks, at=at, c=c, rescale=rescale), decoder=Equal(tasks))
