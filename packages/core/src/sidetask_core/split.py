"""A network in three pieces: what all tasks share, what some share, what each has alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from sidetask_core.task import MissingKey, _listed


class SplitModel(nn.Module):
    """A multi-task network ``shared -> branches[route[task]] -> heads[task]``.

    The shared bottom, hard parameter sharing with partly private layers and single-task learning differ only in
    where the split is (`from_stages`).

    Args:
        shared: the encoder; may return any nested tuple, list or dict of tensors (skip connections, pyramids). One
            whose layers are not alike for all tasks (a normalisation for each domain) has an attribute ``reads_tasks``
            that is true, and is called with the names of the tasks that read the input as a second argument.
        heads: task name to head. A head takes its branch's output, or the shared features without a branch.
        branches: branch name to the layers between the shared features and the heads that ride the branch.
            However many heads ride it, a branch is computed once.
        route: task name to branch name; None as the name lets a head read the shared features. A task that
            it does not mention rides the branch of its own name.

    Raises:
        ValueError: for a head without a branch in a model with branches, a route to a branch that does not
            exist, a branch that no head rides, or a name that cannot be a module's.

    >>> import torch
    >>> model = SplitModel(nn.Linear(3, 4), {"a": nn.Linear(4, 1), "b": nn.Linear(4, 2)})
    >>> {name: tuple(y.shape) for name, y in model(torch.zeros(5, 3)).items()}
    {'a': (5, 1), 'b': (5, 2)}
    """

    def __init__(
        self,
        shared: nn.Module,
        heads: Mapping[str, nn.Module],
        branches: Mapping[str, nn.Module] | None = None,
        route: Mapping[str, str | None] | None = None,
    ) -> None:
        super().__init__()
        if not heads:
            raise ValueError("a SplitModel needs at least one head")
        branches, route = dict(branches or {}), dict(route or {})
        for name in route:
            if name not in heads:
                raise ValueError(f"route names task {name!r}, which has no head; the heads are: {_listed(heads)}")
        self.route: dict[str, str | None] = {}
        for task in heads:
            branch = route.get(task, task if branches else None)
            if branch is not None and branch not in branches:
                raise ValueError(
                    f"head {task!r} has no branch {branch!r}; the branches are: {_listed(branches)} "
                    f"(route={{{task!r}: None}} lets it read the shared features)"
                )
            self.route[task] = branch
        idle = [name for name in branches if name not in self.route.values()]
        if idle:
            raise ValueError(f"no head rides branch {_listed(idle)}; the route is: {self.route}")
        self.shared = shared
        self.branches = _module_dict("branch", branches)
        self.heads = _module_dict("head", heads)

    @classmethod
    def from_stages(cls, stages: Sequence[nn.Module], cut: int, heads: Mapping[str, nn.Module]) -> SplitModel:
        """Share ``stages[:cut]`` and give every task its own copy of the rest.

        Args:
            stages: the encoder as a sequence of modules, each fed by the one before.
            cut: 0 is single-task learning, ``len(stages)`` the shared bottom, anything between is half-shared.
            heads: task name to head; each reads the output of the last stage.

        The copies start from one initialisation, that of the given stages.

        Raises:
            ValueError: if `cut` is not in ``0 .. len(stages)``.
        """
        stages = list(stages)
        if not 0 <= cut <= len(stages):
            raise ValueError(f"cut must be in 0..{len(stages)} for {len(stages)} stages, found {cut}")
        shared = nn.Sequential(*stages[:cut])
        rest = nn.Sequential(*stages[cut:])
        branches = {task: copy.deepcopy(rest) for task in heads} if len(rest) else {}
        return cls(shared, heads, branches)

    def encode(self, inputs: Any, tasks: Iterable[str] | None = None) -> Any:
        """The shared features of `inputs`, which `tasks` (default: all) read."""
        if getattr(self.shared, "reads_tasks", False):
            return self.shared(inputs, tuple(self.heads if tasks is None else tasks))
        return self.shared(inputs)

    def decode(self, features: Any, tasks: Iterable[str] | None = None) -> dict[str, Any]:
        """The predictions of `tasks` (default: all) from shared features; every branch is computed once."""
        tasks = list(self.heads if tasks is None else tasks)
        for task in tasks:
            self.check_head(task)
        rode: dict[str | None, Any] = {None: features}
        for branch in dict.fromkeys(self.route[task] for task in tasks):
            if branch is not None:
                rode[branch] = self.branches[branch](features)
        return {task: self.heads[task](rode[self.route[task]]) for task in tasks}

    def forward(self, inputs: Any, tasks: Iterable[str] | None = None) -> dict[str, Any]:
        """The predictions of `tasks` (default: all) for one input."""
        tasks = None if tasks is None else list(tasks)
        return self.decode(self.encode(inputs, tasks), tasks)

    def with_heads(self, heads: Mapping[str, nn.Module], route: Mapping[str, str | None] | None = None) -> SplitModel:
        """This model with further heads; every module is shared with it."""
        for name in heads:
            if name in self.heads:
                raise ValueError(f"the model has a head {name!r} already")
        return SplitModel(self.shared, {**self.heads, **heads}, {**self.branches}, {**self.route, **(route or {})})

    def restricted_to(self, tasks: Iterable[str]) -> SplitModel:
        """What `tasks` need of this model and nothing else, for inference; modules are shared with it."""
        tasks = list(tasks)
        for task in tasks:
            self.check_head(task)
        route = {task: self.route[task] for task in tasks}
        used = {branch: self.branches[branch] for branch in self.branches if branch in route.values()}
        return SplitModel(self.shared, {task: self.heads[task] for task in tasks}, used, route)

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters of the encoder."""
        return list(self.shared.parameters())

    def specific_parameters(self, task: str) -> list[nn.Parameter]:
        """The parameters of a task's branch and head, each once."""
        self.check_head(task)
        branch = self.route[task]
        own = [] if branch is None else list(self.branches[branch].parameters())
        return list(dict.fromkeys([*own, *self.heads[task].parameters()]))

    def check_head(self, task: str) -> None:
        """Raise MissingKey, listing the heads there are, if `task` has none."""
        if task not in self.heads:
            raise MissingKey(f"task {task!r} has no head; the model has: {_listed(self.heads.keys())}")


def _module_dict(kind: str, modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    result = nn.ModuleDict()
    for name, module in modules.items():
        try:
            result[name] = module
        except (KeyError, TypeError) as error:
            raise ValueError(f"{kind} {name!r} cannot be registered as a module: {error}") from error
    return result
