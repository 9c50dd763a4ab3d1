"""Eq. 11 of SAAL: what share of its group each task's coefficient is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from sidetask_core import Task
from torch import Tensor, nn

from sidetask_saal.names import ends, routed

Normalization = Literal["target", "source", "none"]


class Shares(nn.Module):
    """Divide coefficients by the sum over their group, so that no branch and no task gets more for having more copies.

    A group is, with ``"target"``, the tasks that train one branch: t itself and every s→t; with ``"source"``, the tasks
    that learn one thing: s itself and every s→t. In it, weights add up to the number of given tasks: to one, unless
    several tasks ride one branch. Without transfers every task has weight one, the plain sum of losses.

    The paper divides by the sum, which a negative coefficient may bring to zero or below, and every weight of the group
    to infinity or to the other sign. Here it is the sum of absolute values: the same where none is negative, and no
    weight is ever larger than the group's total. Where all of a group's coefficients are zero, so are its weights.

    A task without labels in a batch gets zero, and is counted in the sum: what the others weigh does not depend on
    whose labels a batch happens to have, and a coefficient near zero is not made large for being there alone. Over
    batches that have the labels of one task each, a group's weights add up to its total, as in one batch with all
    labels. A transfer that is switched off gets zero and is not counted, as if it did not exist.

    Args:
        tasks: the given tasks and the transfers between them.
        normalization: ``"target"``, ``"source"``, or ``"none"``, which leaves coefficients as they are.
        route: task name to branch name, of tasks that share a branch.

    Raises:
        ValueError: for an unknown normalization.
    """

    members: Tensor
    given: Tensor

    def __init__(
        self, tasks: Sequence[Task], normalization: Normalization = "target", route: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        if normalization not in get_args(Normalization):
            raise ValueError(
                f"normalization must be one of {', '.join(get_args(Normalization))}, not {normalization!r}"
            )
        self.normalization = normalization
        names = [task.name for task in tasks]
        pairs = [ends(name) or (name, name) for name in names]
        self.route = branches = routed([name for name in names if ends(name) is None], route)
        keys = [source if normalization == "source" else branches.get(target, target) for source, target in pairs]
        groups = list(dict.fromkeys(keys))
        members = torch.tensor([[float(key == group) for key in keys] for group in groups], dtype=torch.float64)
        own = torch.tensor([float(source == target) for source, target in pairs], dtype=torch.float64)
        # Not saved, for they follow from the tasks.
        self.register_buffer("members", members, persistent=False)
        self.register_buffer("given", own, persistent=False)

    def forward(self, coefficients: Tensor, present: Tensor, on: Tensor) -> Tensor:
        """The weights ``[T]`` of coefficients ``[T]`` (float64).

        Args:
            coefficients: of the tasks.
            present: which of them have labels ``[T]``.
            on: which of them are not switched off ``[T]``.
        """
        if self.normalization == "none":
            return coefficients
        counted = torch.where(on, coefficients, 0.0)
        # Divided before it is multiplied: what is alone in its group gets exactly one.
        shares = counted / self._total(counted) * self._count()
        return torch.where(present & (counted != 0), shares, 0.0)

    def pull_back(self, derivative: Tensor, coefficients: Tensor, present: Tensor, on: Tensor) -> Tensor:
        """The derivative by the coefficients ``[T]`` of what has this `derivative` by the weights ``[T]``.

        With n the group's total and S the sum of absolute values, w_i = n ω_i / S, so that
        ∂w_i/∂ω_j = (n / S) (δ_ij − sign(ω_j) ω_i / S) for present tasks i. Zero for absent tasks j: they keep their
        coefficients.
        """
        if self.normalization == "none":
            return derivative
        counted = torch.where(on, coefficients, 0.0)
        there = torch.where(present, derivative, 0.0)
        total = self._total(counted)
        # Exactly zero for one task alone, of which Adam would make a step.
        mean = self._spread(self.members @ torch.where(counted != 0, there * (counted / total), 0.0))
        return torch.where(present & on, self._count() / total * (there - counted.sign() * mean), 0.0)

    def _total(self, counted: Tensor) -> Tensor:
        """The sum S of each task's group."""
        return self._spread(self.members @ counted.abs())

    def _count(self) -> Tensor:
        """The total n of each task's group."""
        return self._spread(self.members @ self.given)

    def _spread(self, of_groups: Tensor) -> Tensor:
        return of_groups @ self.members
