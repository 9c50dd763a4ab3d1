"""Classes of a continuous label."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

# Evenly spaced values of each tensor that quantiles are fitted on; more would only take memory.
_VALUES = 65536


class Bins:
    """A continuous label, such as depth, cut into classes; for weighting only, the loss stays what it was.

    Bin k holds the values from edge k − 1 up to, but without, edge k. The first and the last bin are open, so that
    every number has a bin; NaN has none.

    Args:
        edges: between the bins, ascending; one fewer than there are bins.

    Raises:
        ValueError: for edges that are not finite numbers in ascending order, or none.

    >>> Bins([1.0, 2.5]).names
    ('< 1', '1 to 2.5', '>= 2.5')
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = tuple(float(edge) for edge in edges)
        ascending = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        if not self.edges or not ascending or not all(map(math.isfinite, self.edges)):
            raise ValueError(f"the edges of bins are finite numbers in ascending order, not {list(edges)}")
        middle = [f"{a:g} to {b:g}" for a, b in zip(self.edges, self.edges[1:], strict=False)]
        self.names = (f"< {self.edges[0]:g}", *middle, f">= {self.edges[-1]:g}")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"the edges of bins are too close to be told apart by six digits: {list(self.edges)}")

    @classmethod
    def uniform(cls, low: float, high: float, bins: int) -> Bins:
        """Bins of one width between `low` and `high`.

        >>> Bins.uniform(0, 10, 4).edges
        (2.5, 5.0, 7.5)
        """
        _check(low, high, bins)
        return cls([low + (high - low) * k / bins for k in range(1, bins)])

    @classmethod
    def log(cls, low: float, high: float, bins: int) -> Bins:
        """Bins each as many times as wide as the one before, between `low` and `high`, both above 0.

        >>> Bins.log(0.5, 8, 4).edges
        (1.0, 2.0, 4.0)
        """
        _check(low, high, bins)
        if low <= 0:
            raise ValueError(f"logarithmic bins lie above 0, not from {low}")
        return cls([low * (high / low) ** (k / bins) for k in range(1, bins)])

    @classmethod
    def quantile(
        cls, values: Tensor | Iterable[Tensor], bins: int, *, valid: Callable[[Tensor], Tensor] | None = None
    ) -> Bins:
        """Bins that hold equally many of some labels, for instance of the training data's.

        Args:
            values: labels, in one tensor or several; of each at most 65536, evenly spaced, are looked at.
            bins: how many.
            valid: which labels count, as `Task.valid` says it, in the labels' own shape; all if None. Those that are
                not finite never count.

        Raises:
            ValueError: if so many bins cannot be told apart.

        >>> Bins.quantile(torch.arange(100.0), 4).edges
        (25.0, 50.0, 75.0)
        """
        _check(0, 1, bins)
        parts = []
        for tensor in [values] if isinstance(values, Tensor) else values:
            flat = (tensor if valid is None else tensor[valid(tensor)]).flatten()
            flat = flat[flat.isfinite()]
            parts.append(flat[:: max(1, math.ceil(flat.numel() / _VALUES))].double().cpu())
        ordered = torch.cat(parts).sort().values if parts else torch.empty(0)
        edges = [float(ordered[len(ordered) * k // bins]) for k in range(1, bins)] if len(ordered) else []
        if len(set(edges)) < bins - 1 or edges[0] == float(ordered[0]):
            raise ValueError(f"{len(ordered)} labels with {len(ordered.unique())} values do not fill {bins} bins")
        return cls(edges)


def _check(low: float, high: float, bins: int) -> None:
    if not isinstance(bins, int) or bins < 2:
        raise ValueError(f"bins must be a whole number of at least 2, not {bins!r}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"bins lie between two finite numbers in ascending order, not {low} and {high}")
