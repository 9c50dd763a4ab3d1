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


def shortest(gramian: np.ndarray) -> np.ndarray:
    """Weights of the shortest convex combination of T gradients with the given inner products.

    Those of `min_norm_weights`, refined on their support, where C y ∝ c for the cosines C and the inverse lengths c:
    there with the inner products as they are given, and not as `vectors` reproduces them. Then the optimality
    conditions p·p_t ≥ p·p, with equality where a task has weight w_t, are missed by no more than rounding the weights
    makes of them, some ε |p_t| max_s w_s |p_s|. That is far below 1e-6 |p|², unless gradients whose lengths differ by
    1e4 cancel but for 1e-3 as well: then it is 1e-5 |p|².

    Raises:
        SolverFailure: see `min_norm_weights`.
    """
    weights = min_norm_weights(vectors(gramian))
    some = weights > 0
    lengths = np.sqrt(np.diagonal(gramian)[some].clip(min=0))
    if (lengths <= np.finfo(float).tiny).any():
        return weights
    cosines, inverse = gramian[np.ix_(some, some)] / np.outer(lengths, lengths), lengths.min() / lengths
    scaled = weights[some] * lengths
    for _ in range(2):
        along = cosines @ scaled
        wanted = (scaled @ along) / (scaled @ inverse) * inverse
        # Duplicates keep their shares, for a singular matrix takes the least correction.
        scaled = scaled + np.linalg.lstsq(cosines, wanted - along, rcond=1e-13)[0]
    if (scaled > 0).all():
        weights[some] = scaled / lengths
    return weights / weights.sum()


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
