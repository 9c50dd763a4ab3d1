"""Constant weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sidetask_core import Equal, Fixed, Method, Task


def equal(tasks: Sequence[Task]) -> Method:
    """Weight one for every task, above and below the cut: the plain sum of losses."""
    return Method(encoder=Equal(tasks))


def fixed(tasks: Sequence[Task], weights: Mapping[str, float]) -> Method:
    """Constant weights, above and below the cut.

    >>> tasks = [Task("seg", loss=abs), Task("depth", loss=abs)]
    >>> fixed(tasks, {"seg": 1.0, "depth": 0.2}).encoder.weights.tolist()
    [1.0, 0.20000000298023224]
    """
    return Method(encoder=Fixed(tasks, weights))
