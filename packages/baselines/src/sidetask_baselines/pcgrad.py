"""PCGrad: Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sidetask_core import Equal, Method, Place, Task

from sidetask_baselines.gramian import GramianWeighting


class PCGrad(GramianWeighting):
    """Project each task's gradient off those it conflicts with, in random order, and add up (Algorithm 1).

    A projection of g_i off g_j subtracts a multiple of g_j, so that the projected gradients stay combinations of the
    given ones. The rule tracks the combinations, starting from the identity, and needs only the Gramian.

    Args:
        tasks: the tasks.
        at: ``"parameters"`` (the paper) or ``"features"``, which saves the pass over the encoder per task.
        seed: of the generator that draws the order of the projections, anew for every task and step.
    """

    def __init__(self, tasks: Sequence[Task], *, at: Place = "parameters", seed: int = 0) -> None:
        super().__init__(tasks, at=at, seed=seed)

    def solve(self, gramian: np.ndarray) -> np.ndarray:
        """Weights ``[T]``, each at least zero; they reproduce the sum of the projected gradients."""
        count = len(gramian)
        orders = [torch.randperm(count, generator=self.generator).tolist() for _ in range(count)]
        return project(gramian, orders)


def project(gramian: np.ndarray, orders: Sequence[Sequence[int]]) -> np.ndarray:
    """Weights of the tasks in the sum of the projected gradients.

    Args:
        gramian: inner products of the task gradients ``[T, T]``.
        orders: for each task, the tasks in the order in which its gradient is projected off them; its own
            index is passed over.

    >>> project(np.array([[1.0, -1.0], [-1.0, 2.0]]), [[1], [0]])
    array([2. , 1.5])
    """
    combinations = np.eye(len(gramian))
    for i, order in enumerate(orders):
        for j in order:
            inner = combinations[i] @ gramian[:, j]
            # A gradient so short that its square is zero has no direction to project off.
            if j != i and inner < 0 < gramian[j, j]:
                combinations[i, j] -= inner / gramian[j, j]
    return combinations.sum(axis=0)


def pcgrad(tasks: Sequence[Task], *, at: Place = "parameters", seed: int = 0) -> Method:
    """PCGrad for the shared parameters; task-specific ones keep their own gradients, as in the paper."""
    return Method(encoder=PCGrad(tasks, at=at, seed=seed), decoder=Equal(tasks))
