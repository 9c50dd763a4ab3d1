"""Exact solvers over convex combinations of task gradients."""

from __future__ import annotations

from math import fsum

import numpy as np
from scipy.optimize import nnls
from sidetask_core import StepFailure

# Optimality conditions are checked to this accuracy, relative to the lengths of the vectors they compare.
TOLERANCE = 1e-6
DOUBLE = float(np.finfo(float).eps)


class SolverFailure(StepFailure):
    """A solver did not reach its optimality conditions; says how badly conditioned its Gramian was."""

    def __init__(self, what: str, gramian: np.ndarray) -> None:
        finite = np.isfinite(gramian).all()
        condition = f"{np.linalg.cond(gramian):.3g}" if finite else "undefined, it is not finite"
        super().__init__(f"{what} (condition number of the {len(gramian)}x{len(gramian)} Gramian: {condition})")


def rounding(count: int, eps: float) -> float:
    """Below this, an eigenvalue of a matrix of `count` × `count` cosines is a rounding error of inner products."""
    return 10 * count * eps


def accuracy(eps: float) -> float:
    """To what equations between gradients hold: 1e-6, or 1e-2 for inner products in single precision."""
    return max(TOLERANCE, 30 * float(np.sqrt(eps)))


def vectors(gramian: np.ndarray) -> np.ndarray:
    """T columns, in T dimensions, with the given inner products.

    Each is found at its own scale: columns of very different lengths are normalised, factored, and stretched again.
    """
    lengths = np.sqrt(np.diagonal(gramian).clip(min=0))
    safe = np.where(lengths > 0, lengths, 1.0)
    values, axes = np.linalg.eigh(gramian / np.outer(safe, safe))
    unit = np.sqrt(values.clip(min=0))[:, None] * axes.T
    return unit * lengths


def shortest(gramian: np.ndarray, eps: float = DOUBLE) -> np.ndarray:
    """Weights w of the shortest convex combination p of T gradients g_t with the given inner products.

    They are found as those of `min_norm_weights` are, for vectors that reproduce the inner products to rounding. Then
    they are refined, and their optimality conditions checked, with the inner products as they are given: p·g_t ≥ p·p,
    with equality where a task has weight.

    What cancels in p limits what inner products say of it. With r = Σ_t w_t |g_t|, they tell p from zero down to
    |p| = √`rounding` r, which for three tasks is 8e-8 r in double precision and 2e-3 r in single. Shorter ones count
    as zero; their conditions are held to what is asked at that length.

    Args:
        gramian: inner products of the gradients ``[T, T]``.
        eps: their relative rounding error.

    Raises:
        SolverFailure: if the search fails, or a condition is missed by more than `accuracy` |g_t| times |p|, or times
            √`rounding` r where p is shorter than that; in single precision also by more than `rounding` r (r + |g_t|),
            for there may be no gradients that have just those inner products.

    >>> shortest(np.array([[9.0, 0.0], [0.0, 1.0]])).round(6)
    array([0.1, 0.9])
    """
    squares = np.diagonal(gramian)
    # A power of two rounds nothing, and halves of digits can neither overflow nor vanish.
    gramian = np.ldexp(gramian, -np.frexp(squares.max())[1])
    zero = np.diagonal(gramian) <= np.finfo(float).tiny
    if zero.any():
        return zero / zero.sum()
    lengths = np.sqrt(np.diagonal(gramian))
    weights = _search(vectors(gramian), lengths)
    inner = _products(gramian, weights)
    miss = _missed(inner, weights, lengths, eps)
    for _ in range(4):
        refined = _refined(gramian, weights, inner, lengths)
        along = _products(gramian, refined)
        left = _missed(along, refined, lengths, eps)
        if not left < miss:
            break
        weights, inner, miss = refined, along, left
    if not miss <= accuracy(eps):
        raise SolverFailure("the shortest combination misses its optimality conditions", gramian)
    return weights


def min_norm_weights(points: np.ndarray) -> np.ndarray:
    """Weights of the shortest convex combination of the columns of `points` ``[D, T]``.

    With the columns at unit length u and their inverse lengths c, minimising |U x|² + (c·x − 1)² over x ≥ 0 has
    the wanted direction as its solution (Lawson and Hanson, "Solving least squares problems", chapter 23).

    Raises:
        SolverFailure: if the search fails, or the solution p misses the optimality conditions p·p_t ≥ p·p, with
            equality where a task has weight, by more than 1e-6 |p_t| times |p|, or times √`rounding` Σ_t w_t |p_t|
            where p is shorter than that: points with given inner products are not known better.

    >>> min_norm_weights(np.array([[3.0, 0.0], [0.0, 1.0]])).round(6)
    array([0.1, 0.9])
    """
    lengths = np.linalg.norm(points, axis=0)
    zero = lengths <= np.finfo(float).tiny
    if zero.any():
        return zero / zero.sum()
    weights = _search(points, lengths)
    if not _missed(points @ weights @ points, weights, lengths, DOUBLE) <= TOLERANCE:
        raise SolverFailure("the shortest combination misses its optimality conditions", points.T @ points)
    return weights


def _search(points: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    unit, inverse = points / lengths, lengths.min() / lengths
    try:
        scaled, _ = nnls(np.vstack([unit, inverse]), np.append(np.zeros(len(points)), 1.0))
    except RuntimeError as error:
        raise SolverFailure(f"the search for the shortest combination failed: {error}", points.T @ points) from error
    weights = scaled / lengths
    return weights / weights.sum()


def _refined(gramian: np.ndarray, weights: np.ndarray, inner: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The weights after a Newton step on their support, where C y ∝ c for the cosines C and the inverse lengths c."""
    some = weights > 0
    # At unit lengths, and with c beside C: a direction in which gradients all but cancel decides as long as it changes
    # either. In one that changes neither, that of duplicates, the least step leaves the shares as they are.
    cosines = gramian[np.ix_(some, some)] / np.outer(lengths[some], lengths[some])
    inverse = lengths[some].min() / lengths[some]
    system = np.block([[cosines, inverse[:, None]], [inverse, np.zeros(1)]])
    missing = np.append((weights @ inner - inner[some]) / lengths[some], 0.0)
    step = np.linalg.lstsq(system, missing, rcond=len(system) * DOUBLE)[0][:-1]
    refined = np.zeros_like(weights)
    refined[some] = (weights[some] + step / lengths[some]).clip(min=0)
    return refined / refined.sum()


def _products(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """``matrix @ vector``, each entry rounded once: what cancels in it would leave little but rounding errors else."""
    halves = [(hi, whole - hi) for whole in (matrix, vector) for hi in [_upper(whole)]]
    # Products of halves are exact, and so is their sum before it is rounded.
    terms = np.concatenate([left * right for left in halves[0] for right in halves[1]], axis=1)
    return np.array([fsum(row) for row in terms.tolist()])


def _upper(numbers: np.ndarray) -> np.ndarray:
    """The upper half of the digits of each number (Dekker, "A floating-point technique", 1971)."""
    large = (2.0**27 + 1) * numbers
    return large - (large - numbers)


def _missed(inner: np.ndarray, weights: np.ndarray, lengths: np.ndarray, eps: float) -> float:
    """By how much a combination p misses its optimality conditions, of |p| |p_t|, from its inner products with p_t."""
    squared = weights @ inner
    reach = weights @ lengths
    length = np.sqrt(max(squared, rounding(len(weights), eps) * reach**2))
    # No gradients may have just the inner products that are rounded to single precision; none is hidden in double.
    hidden = rounding(len(weights), eps - DOUBLE) * reach * (reach + lengths)
    off = inner - squared
    miss = np.maximum(-off, off * (weights > 0)) - hidden
    return float((miss / (length * lengths)).max())
