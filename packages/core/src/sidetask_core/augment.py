"""Augments that go with any method: tasks that are added, and heads that do not learn."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from sidetask_core.method import Augment
from sidetask_core.split import SplitModel
from sidetask_core.task import Task


class ExtraTasks(Augment):
    """Add auxiliary tasks, each with a head that reads the shared features; `Step.export` leaves them out again.

    What they learn is up to their labels: pseudo labels of another model, rotations, noise. The method's rules have to
    be made for `extended(tasks)`, those added last.

    Args:
        heads: a task and its head each.

    Raises:
        ValueError: for a primary task; from the step, for one whose name the model has a head of already.

    >>> import torch
    >>> from sidetask_core import Equal, Method, Step
    >>> seg, guess = Task("seg", loss=abs), Task("guess", loss=abs, primary=False)
    >>> model = SplitModel(nn.Linear(2, 3), {"seg": nn.Linear(3, 1)})
    >>> method = Method(augment=ExtraTasks((guess, nn.Linear(3, 4))), encoder=Equal([seg, guess]))
    >>> step = Step(model, [seg], method)
    >>> [task.name for task in step.tasks], list(step.export().heads)
    (['seg', 'guess'], ['seg'])
    """

    def __init__(self, *heads: tuple[Task, nn.Module]) -> None:
        super().__init__()
        for task, _ in heads:
            if task.primary:
                raise ValueError(f"task {task.name!r} is primary; what an augment adds is there to help")
        # In a tuple, so that the heads are parts of the model alone.
        self.heads = heads

    def extended(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """The tasks with those added."""
        return [*tasks, *(task for task, _ in self.heads)]

    def forward(self, model: SplitModel, tasks: Sequence[Task]) -> SplitModel:
        """The model with the heads."""
        heads = {task.name: head for task, head in self.heads}
        return model.with_heads(heads, dict.fromkeys(heads))


class FrozenHeads(Augment):
    """Keep the heads of some auxiliary tasks from learning: what is such a task still worth?

    A frozen head keeps the parameters it has, and its gradient still reaches the encoder. It is a copy: the heads of
    the model that was given can learn as before, in another step.

    Args:
        names: the auxiliary tasks.

    Raises:
        TypeError: for a name where names are wanted.
        MissingKey: from the step, for a task that the model has no head for.
        ValueError: from the step, for a primary task.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"heads to freeze are a list of tasks' names, found {names!r}")
        self.names = tuple(names)

    def forward(self, model: SplitModel, tasks: Sequence[Task]) -> SplitModel:
        """The model with copies of these heads, whose parameters are out of training."""
        for name in self.names:
            model.check_head(name)
            if name in [task.name for task in tasks if task.primary]:
                raise ValueError(f"task {name!r} is primary; only heads of auxiliary tasks may be frozen")
        frozen = {name: copy.deepcopy(model.heads[name]).requires_grad_(False) for name in self.names}
        return SplitModel(model.shared, {**model.heads, **frozen}, {**model.branches}, model.route)
