"""Uncertainty weighting, which core brings: `sidetask_core.Uncertainty`."""

from __future__ import annotations

from collections.abc import Sequence

from sidetask_core import Method, Task, Uncertainty


def uncertainty(tasks: Sequence[Task], *, init: float = -0.7) -> Method:
    """Uncertainty weighting above and below the cut.

    Args:
        tasks: the tasks.
        init: see `sidetask_core.Uncertainty`.
    """
    rule = Uncertainty(tasks, init=init)
    return Method(encoder=rule, decoder=rule)
