"""What weightings that look at directions and lengths of task gradients apart have in common."""

from __future__ import annotations

import numpy as np

from sidetask_baselines.gramian import GramianWeighting


class CosineWeighting(GramianWeighting):
    """Weights from the cosines between the task gradients and from their lengths.

    A gradient of length zero has no direction: its task is as absent as one without labels, and has weight zero.
    """

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
