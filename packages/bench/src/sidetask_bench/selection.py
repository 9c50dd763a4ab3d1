"""Which epoch of a run is tested: its best, and of tasks that share nothing each one's own best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sidetask_core import SplitModel, Task

from sidetask_bench import storage
from sidetask_bench.evaluate import Results, score, task_score
from sidetask_bench.schema import ExperimentError, unknown, wrong


def judges(tasks: Sequence[Task], names: Sequence[str] | None) -> list[Task]:
    """The tasks as epochs are judged by them: those of `names` are primary and no others; as they are for None.

    Raises:
        ExperimentError: if no name is given, or one of no task, or of a task without a metric.
    """
    if names is None:
        return list(tasks)
    path, known = "training.select_by", {task.name: task for task in tasks}
    if not names:
        raise wrong(path, "at least one task", list(names))
    for name in names:
        if name not in known:
            raise unknown(name, known, path, "task")
        if not known[name].metrics:
            raise ExperimentError(f"{path}.{name}: the task has no metric to judge by")
    return [replace(task, primary=task.name in names) for task in tasks]


class Selection:
    """Keeps the network of the best epoch in a file.

    Where tasks share no parameter, a run is as many single-task runs side by side: each task's branch and head are kept
    from the epoch that was best for this task alone. Otherwise one epoch is chosen for all.

    Args:
        path: of the file, ``best.pt``.
        model: whose epochs are offered.
        tasks: judge the epochs (`judges`).
        by_score: False takes the last epoch instead.
    """

    def __init__(self, path: Path, model: SplitModel, tasks: Sequence[Task], by_score: bool) -> None:
        self.path, self.model, self.tasks, self.by_score = path, model, tasks, by_score
        self.by_task = by_score and shares_nothing(model)
        names = [task.name for task in tasks] if self.by_task else [""]
        self.epochs, self.scores = dict.fromkeys(names, -1), dict.fromkeys(names, -math.inf)

    def offer(self, epoch: int, validation: Results, last: bool) -> None:
        """Keep what this epoch is best for; the `last` also for what no epoch has had a score for."""
        found = {"": score(validation, self.tasks)}
        if self.by_task:
            found = {task.name: task_score(validation, task) for task in self.tasks}
        better = [
            name
            for name, value in found.items()
            if (self.by_score and value > self.scores[name]) or (last and self.epochs[name] < 0)
        ]
        if not better:
            return
        state = self.model.state_dict()
        if len(better) < len(found) and self.path.exists():
            kept = storage.read_tensors(self.path)["model"]
            own = tuple(prefix for name in better for prefix in self._prefixes(name))
            state = {key: value if key.startswith(own) else kept[key] for key, value in state.items()}
        for name in better:
            self.epochs[name], self.scores[name] = epoch, found[name]
        epochs = dict(self.epochs) if self.by_task else self.epochs[""]
        scores = dict(self.scores) if self.by_task else self.scores[""]
        storage.write_tensors(self.path, {"model": state, "epoch": epochs, "score": scores})

    def state(self) -> dict[str, Any]:
        """What has been chosen so far, for `load_state`."""
        return {"epochs": dict(self.epochs), "scores": dict(self.scores)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.epochs, self.scores = dict(state["epochs"]), dict(state["scores"])

    def _prefixes(self, task: str) -> list[str]:
        branch = self.model.route[task]
        return [f"heads.{task}.", *([] if branch is None else [f"branches.{branch}."])]


def shares_nothing(model: SplitModel) -> bool:
    """Whether no trained parameter and no running statistic belongs to more than one task.

    >>> from torch import nn
    >>> heads = {"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)}
    >>> [shares_nothing(SplitModel.from_stages([nn.Linear(2, 2)], cut, heads)) for cut in (0, 1)]
    [True, False]
    """
    if any(parameter.requires_grad for parameter in model.shared_parameters()) or [*model.shared.buffers()]:
        return False
    own = [parameter for task in model.heads for parameter in model.specific_parameters(task)]
    branches = [branch for branch in model.route.values() if branch is not None]
    return len({*own}) == len(own) and len({*branches}) == len(branches)
