"""What weightings that compare auxiliary tasks with the primary ones have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sidetask_core import Place, Task, Weighting
from torch import Tensor


class AuxiliaryWeighting(Weighting):
    """Weights of auxiliary tasks from their gradients beside that of the primaries, the gradient of their sum.

    Args:
        tasks: the tasks, of which at least one is primary.
        at: where gradients are compared, at the shared ``"features"`` or over the shared ``"parameters"``.

    Raises:
        ValueError: if no task is primary, or for an unknown place.
    """

    primaries: Tensor

    def __init__(self, tasks: Sequence[Task], *, at: Place) -> None:
        super().__init__(tasks)
        if at not in ("features", "parameters"):
            raise ValueError(f"at must be 'features' or 'parameters', not {at!r}")
        if not any(self.primary):
            raise ValueError(
                f"{type(self).__name__} compares auxiliary tasks with primary ones and needs at least one task with "
                f"primary=True; auxiliary are all of: {', '.join(self.tasks)}"
            )
        self.at: Place = at
        # A buffer, so that no step copies it to the device; not saved, for it follows from the tasks.
        self.register_buffer("primaries", torch.tensor(self.primary), persistent=False)

    def over_primaries(self, values: Tensor) -> Tensor:
        """The sum of the primaries' entries along the last dimension ``[..., T]``, whatever the others hold."""
        return torch.where(self.primaries.to(values.device, non_blocking=True), values, 0.0).sum(dim=-1)
