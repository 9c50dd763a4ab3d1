"""Constant weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sidetask_core import Equal, Fixed, Method, Task


def equal(tasks: Sequence[Task]) -> Method:
    """Weight one for every task, above and below the cut: the plain sum of losses."""
    rule = Equal(tasks)
    return Method(encoder=rule, decoder=rule)


def fixed(tasks: Sequence[Task], weights: Mapping[str, float]) -> Method:
    """Constant weights, above and below the cut.

    >>> tasks = [Task("seg", loss=abs), Task("depth", loss=abs)]
    >>> fixed(tasks, {"seg": 1.0, "depth": 0.2}).encoder.weights.tolist()
    [1.0, 0.20000000298023224]
    """
    rule = Fixed(tasks, weights)
    return Method(encoder=rule, decoder=rule)
