"""Per-objective uncertainty: Miraliev et al., IEEE Transactions on Intelligent Vehicles 2024; a reconstruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sidetask_core import Method, Shaper, Signals, Task
from torch import Tensor, nn


class PerObjectiveUncertainty(Shaper):
    """Weigh each objective of a task by the inverse of a variance of its own, learned with the network.

    With L_k the objectives of a task and s_k = log σ_k², the objective is Σ_k L_k / (2 e^{s_k}) + s_k / 2, so that the
    weights are e^{−s_k} / 2 and settle where σ_k² = L_k. `log_variance` ``[K]`` is trained by the caller's optimizer
    (``step.parameters()``). A task whose loss is one tensor has one objective, and is weighed as by `Uncertainty`.

    The weights are part of the loss: a step reports, and other rules see, the losses as weighed.

    Reconstruction: of "Real-time memory efficient multitask learning model for autonomous driving" the abstract is
    public, the equations are not; that each objective, such as a detector's box, class and confidence, learns a weight
    is how it is described. Decided here: the variances, their objective and first value are those of `Uncertainty`;
    weights of the tasks besides are one; an objective without a labelled element in the batch leaves its variance as
    it is.

    Args:
        task: the task.
        init: first value of every s_k; −0.7, at which the weights are close to one.

    >>> box = Task("box", loss=lambda p, y: {"l1": (p - y).abs(), "l2": (p - y) ** 2}, objectives=("l1", "l2"))
    >>> weights = PerObjectiveUncertainty(box)({"l1": torch.ones(4), "l2": torch.ones(4)}, None)
    >>> {name: round(weight.item(), 3) for name, weight in weights.items()}
    {'l1': 1.007, 'l2': 1.007}
    """

    elementwise = False

    def __init__(self, task: Task, *, init: float = -0.7) -> None:
        super().__init__()
        self.task = self.name = task.name
        self.objectives = tuple(task.objectives)
        self.log_variance = nn.Parameter(torch.full((max(1, len(self.objectives)),), float(init)))

    def forward(self, losses: Tensor | Mapping[str, Tensor], target: Any) -> Tensor | dict[str, Tensor]:
        """The weight e^{−s} / 2 of each objective, by name; of a task without objectives, the one weight."""
        weights = self.log_variance.neg().exp() / 2
        return dict(zip(self.objectives, weights, strict=True)) if self.objectives else weights[0]

    def objective(self, signals: Signals) -> Tensor:
        """Σ_k L_k / (2 e^{s_k}) + s_k / 2 over the objectives that have labels in this batch."""
        losses, labelled = signals.objectives(self.name)
        terms = losses * self.log_variance.neg().exp() + self.log_variance
        return (terms * labelled).sum() / 2

    def get_extra_state(self) -> dict[str, Any]:
        """The objectives, in the order of `log_variance`."""
        return {"objectives": list(self.objectives)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Check that a saved state is one of the same objectives in the same order."""
        if tuple(state["objectives"]) != self.objectives:
            raise ValueError(
                f"the state is for objectives {', '.join(state['objectives']) or 'none'} of task {self.task!r}, "
                f"not for {', '.join(self.objectives) or 'none'}"
            )


def per_objective_uncertainty(tasks: Sequence[Task], *, init: float = -0.7) -> Method:
    """Uncertainty weighting of every task's objectives; tasks with one objective are weighed as by `uncertainty`."""
    return Method(shapers={task.name: PerObjectiveUncertainty(task, init=init) for task in tasks})
