"""What weightings that look at directions and lengths of task gradients apart have in common."""

from __future__ import annotations

import numpy as np
import torch
from sidetask_core import Signals
from torch import Tensor

from sidetask_baselines.gramian import GramianWeighting
from sidetask_baselines.simplex import TOLERANCE


class CosineWeighting(GramianWeighting):
    """Weights from the cosines between the task gradients and from their lengths.

    A gradient of length zero has no direction: its task is as absent as one without labels, and has weight zero.

    Attributes:
        eps: relative rounding error of the inner products, that of the type they were computed in.
        tiny: squared lengths up to this are zero.
    """

    eps: float
    tiny: float

    def compared(self, signals: Signals) -> Tensor:
        """The Gramian ``[T, T]`` that the weights are solved for."""
        gramian = super().compared(signals)
        precision = torch.finfo(gramian.dtype)
        self.eps, self.tiny = precision.eps, precision.tiny
        return gramian

    def solve(self, gramian: np.ndarray) -> np.ndarray:
        """Weights from the Gramian of the tasks that have labels, both of their number."""
        squares = np.diagonal(gramian)
        present = squares > self.tiny
        lengths = np.sqrt(squares[present])
        weights = np.zeros(len(gramian))
        if present.any():
            weights[present] = self.solve_unit(gramian[np.ix_(present, present)] / np.outer(lengths, lengths), lengths)
        return weights

    def solve_unit(self, cosines: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Weights ``[P]`` of the P tasks whose gradients have a length, from their cosines ``[P, P]`` and lengths."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it weighs cosines")


def rounding(count: int, eps: float) -> float:
    """Below this, an eigenvalue of a matrix of `count` × `count` cosines is a rounding error of inner products."""
    return 10 * count * eps


def accuracy(eps: float) -> float:
    """To what equations between gradients hold: 1e-6, or 1e-2 for inner products in single precision."""
    return max(TOLERANCE, 30 * float(np.sqrt(eps)))
