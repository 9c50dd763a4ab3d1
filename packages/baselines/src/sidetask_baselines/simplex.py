"""Exact solvers over convex combinations of task gradients."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls
from sidetask_core import StepFailure

# Optimality conditions are checked to this accuracy, relative to the lengths of the vectors they compare.
TOLERANCE = 1e-6


class SolverFailure(StepFailure):
    """A solver did not reach its optimality conditions; says how badly conditioned its Gramian was."""

    def __init__(self, what: str, gramian: np.ndarray) -> None:
        finite = np.isfinite(gramian).all()
        condition = f"{np.linalg.cond(gramian):.3g}" if finite else "undefined, it is not finite"
        super().__init__(f"{what} (condition number of the {len(gramian)}x{len(gramian)} Gramian: {condition})")


def vectors(gramian: np.ndarray) -> np.ndarray:
    """T columns, in T dimensions, with the given inner products.

    Each is found at its own scale: columns of very different lengths are normalised, factored, and stretched again.
    """
    lengths = np.sqrt(np.diagonal(gramian).clip(min=0))
    safe = np.where(lengths > 0, lengths, 1.0)
    values, axes = np.linalg.eigh(gramian / np.outer(safe, safe))
    unit = np.sqrt(values.clip(min=0))[:, None] * axes.T
    return unit * lengths


def min_norm_weights(points: np.ndarray) -> np.ndarray:
    """Weights of the shortest convex combination of the columns of `points` ``[D, T]``.

    With the columns at unit length u and their inverse lengths c, minimising |U x|² + (c·x − 1)² over x ≥ 0 has
    the wanted direction as its solution (Lawson and Hanson, "Solving least squares problems", chapter 23).

    Raises:
        SolverFailure: if the solution misses the optimality conditions p·p_t ≥ p·p, with equality where a
            task has weight, by more than `TOLERANCE` |p| |p_t|.

    >>> min_norm_weights(np.array([[3.0, 0.0], [0.0, 1.0]])).round(6)
    array([0.1, 0.9])
    """
    count = points.shape[1]
    lengths = np.linalg.norm(points, axis=0)
    zero = lengths <= np.finfo(float).tiny
    if zero.any():
        return zero / zero.sum()
    unit, inverse = points / lengths, lengths.min() / lengths
    try:
        scaled, _ = nnls(np.vstack([unit, inverse]), np.append(np.zeros(len(points)), 1.0))
    except RuntimeError as error:
        raise SolverFailure(f"the search for the shortest combination failed: {error}", points.T @ points) from error
    weights = scaled / lengths
    weights /= weights.sum()
    shortest = points @ weights
    length = np.linalg.norm(shortest)
    # Inner products say how long a vector is to the root of machine precision: below that, it is zero.
    if length > count * np.sqrt(np.finfo(float).eps) * lengths.min():
        miss = (shortest @ points - length**2) / (length * lengths)
        if miss.min() < -TOLERANCE or np.abs(miss * (scaled > 0)).max() > TOLERANCE:
            raise SolverFailure("the shortest combination misses its optimality conditions", points.T @ points)
    return weights
