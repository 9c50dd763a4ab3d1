"""Aligned-MTL: Senushkin et al., "Independent component alignment for multi-task learning", CVPR 2023."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sidetask_core import Equal, Method, Place, Task

from sidetask_baselines.cosines import CosineWeighting
from sidetask_baselines.scale import check_scale, total_weight
from sidetask_baselines.simplex import TOLERANCE, SolverFailure, rounding, vectors

SINGULAR_VALUES = ("min", "median", "rmse")


class AlignedMTL(CosineWeighting):
    """Replace the matrix of task gradients by the nearest one, up to scale, whose components do not dominate another.

    The matrix G = U Σ Vᵀ of the task gradients becomes σ U Vᵀ: its columns are orthogonal and all σ long, if the
    gradients are linearly independent. They are G B with B = σ V Σ⁻¹ Vᵀ, over the singular values that are not zero,
    and the weights are B w for the tasks' preferences w: ones here, so that orthogonal gradients of one length are left
    as they are; 1/T each in the paper.

    σ is the smallest singular value that is not zero, and hence where tasks nearly agree, or one has nearly converged,
    steps become short. Singular values are zero if they are below 1e-9 of the largest, or if scaling the gradients to
    one length shows them to be linearly dependent to the precision that their inner products have. A gradient of zero
    has weight zero and takes no part in the mean.

    Args:
        tasks: the tasks.
        at: ``"parameters"`` (the paper) or ``"features"`` (its Aligned-MTL-UB, one backward pass).
        singular_value: what σ is: ``"min"`` (the paper), or as in the official code ``"median"`` (the lower one of two)
            or ``"rmse"``, the root of the mean square.
        scale: preferences of one (``"sum"``) or of 1/T (``"paper"``).

    Raises:
        ValueError: for an unknown place, singular value or scale.
        SolverFailure: in a step whose gradients are not finite or whose aligned matrix has unequal singular values.
    """

    def __init__(
        self, tasks: Sequence[Task], *, at: Place = "parameters", singular_value: str = "min", scale: str = "sum"
    ) -> None:
        super().__init__(tasks, at=at)
        if singular_value not in SINGULAR_VALUES:
            raise ValueError(f"singular_value must be 'min', 'median' or 'rmse', not {singular_value!r}")
        self.singular_value = singular_value
        self.scale = check_scale(scale)

    def solve_unit(self, cosines: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Weights ``[P]`` of the tasks whose gradients have a length."""
        balance = align(cosines, lengths, self.singular_value, self.eps)
        return total_weight(self.scale, len(balance)) * balance.mean(axis=1)


def align(
    cosines: np.ndarray, lengths: np.ndarray, singular_value: str = "min", eps: float = float(np.finfo(float).eps)
) -> np.ndarray:
    """The matrix B ``[T, T]`` that aligns the gradients, of the given cosines and lengths.

    Args:
        cosines: between the gradients ``[T, T]``.
        lengths: of the gradients ``[T]``, positive.
        singular_value: one of `SINGULAR_VALUES`.
        eps: relative rounding error of the gradients' inner products.

    Raises:
        SolverFailure: if singular values of the aligned gradients differ by more than `TOLERANCE`.

    >>> align(np.eye(2), np.array([4.0, 1.0]))
    array([[0.25, 0.  ],
           [0.  , 1.  ]])
    """
    # One row for each eigenvalue of the cosines, as long as its root.
    points = vectors(cosines)
    points = points[(points**2).sum(axis=1) > rounding(len(cosines), eps)] * lengths
    _, values, axes = np.linalg.svd(points, full_matrices=False)
    values, axes = values[values > 1e-9 * values[0]], axes[values > 1e-9 * values[0]]
    if singular_value == "median":
        common = values[len(values) // 2]
    else:
        common = values[-1] if singular_value == "min" else np.sqrt((values**2).mean())
    balance: np.ndarray = (axes.T * (common / values)) @ axes
    aligned = points @ (balance / common)
    if np.abs(aligned.T @ aligned - axes.T @ axes).max() > TOLERANCE:
        raise SolverFailure("the aligned gradients have unequal singular values", cosines)
    return balance


def aligned_mtl(
    tasks: Sequence[Task], *, at: Place = "parameters", singular_value: str = "min", scale: str = "sum"
) -> Method:
    """Aligned-MTL for the shared parameters; task-specific ones keep their own gradients, as in the paper."""
    return Method(encoder=AlignedMTL(tasks, at=at, singular_value=singular_value, scale=scale), decoder=Equal(tasks))
