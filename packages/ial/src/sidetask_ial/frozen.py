"""A broken auxiliary task: its head never learns."""

from __future__ import annotations

from collections.abc import Sequence

from sidetask_core import SplitModel, Task


class FrozenHeads:
    """An augment that stops the heads of some auxiliary tasks from learning: what is left of a task that is broken?

    A frozen head keeps the parameters it has, and its gradient still reaches the encoder.

    Args:
        names: the auxiliary tasks.

    Raises:
        MissingKey: from the step, for a task that the model has no head for.
        ValueError: from the step, for a primary task.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(self, model: SplitModel, tasks: Sequence[Task]) -> tuple[SplitModel, Sequence[Task]]:
        """The same model and tasks, with the heads' parameters out of training."""
        for name in self.names:
            model.check_head(name)
            if name in [task.name for task in tasks if task.primary]:
                raise ValueError(f"task {name!r} is primary; only heads of auxiliary tasks may be frozen")
        for name in self.names:
            model.heads[name].requires_grad_(False)
        return model, tasks
