"""Self-auxiliaries: copies of a task's training that ride another task's branch."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, TypeGuard

import torch
from sidetask_core import Augment, Method, SplitModel, Task
from torch import nn

from sidetask_saal.names import ARROW, ends, routed, transfer
from sidetask_saal.shares import Shares

Windows = Sequence[Sequence[int | None]]


class SelfAuxiliaries(Augment):
    """Let chosen tasks train the branches of others, in one direction each.

    The transfer s→t is an auxiliary task that learns what s learns (same input, labels and loss) on the branch of t,
    with a head of its own: one of the architecture of s's head, with new initial values. Its gradient reaches t's
    branch and the shared layers, and no other branch: t is taught by s, and s is not taught by t. After training the
    copies are dropped (`sidetask_core.Step.export`), and the network is what it would be without them
    (Graffeuille et al., 2024).

    Tasks that ride one branch share the transfers to it; `route` says so, for tasks and rules are made before there is
    a model. Such a transfer is named by the first of its targets, and answers to the others' names too.

    A shaper is one task's alone. Where the source has one, its copy needs one, too, for it is to learn the same.

    Args:
        tasks: the given tasks.
        transfers: their names, ``"s→t"`` or ``"s->t"``; ``"all"`` is every pair whose target is primary.
        route: task name to branch name, as in `sidetask_core.SplitModel`, of tasks that share a branch; a task that it
            does not mention has a branch of its own.
        schedule: transfer name to windows ``[start, stop)`` of time in which it is on; a stop of None is never.
            Transfers that are not mentioned are always on.
        schedule_by: what time is counted in, ``"iteration"`` or ``"epoch"``, those of the step.
        seed: seeds the new heads' values; None takes torch's own seed (`torch.manual_seed`), without drawing. What a
            head begins with depends on the seed and its transfer's name alone.

    Attributes:
        transfers: the transfers' names, by targets and then by sources, in the order of the tasks.

    Raises:
        ValueError: for a transfer that is not one, is named twice, or goes from a task to itself or to another of the
            same branch; for a schedule or windows that are none; from the step, for a shaper of a source and none of
            its copy, or a rule of another route; for a model without a branch of its own for a target,
            or a head that cannot be made anew.

    >>> tasks = [Task("seg", loss=abs), Task("depth", loss=abs)]
    >>> auxiliaries = SelfAuxiliaries(tasks, ["seg->depth"], schedule={"seg->depth": [[100, None]]})
    >>> [task.name for task in auxiliaries.extended(tasks)]
    ['seg', 'depth', 'seg→depth']
    >>> auxiliaries.resting(99, 0), auxiliaries.resting(100, 0)
    ({'seg→depth'}, set())
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        transfers: Sequence[str] | Literal["all"],
        *,
        route: Mapping[str, str] | None = None,
        schedule: Mapping[str, Windows] | None = None,
        schedule_by: Literal["iteration", "epoch"] = "iteration",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.given = tuple(task.name for task in tasks)
        for name in self.given:
            if ends(name) is not None:
                raise ValueError(f"task {name!r} has the name of a transfer; tasks are given without their copies")
        if schedule_by not in ("iteration", "epoch"):
            raise ValueError(f"schedule_by must be 'iteration' or 'epoch', not {schedule_by!r}")
        self.route = routed(self.given, route)
        if isinstance(transfers, str):
            if transfers != "all":
                raise ValueError(f"transfers must be 'all' or a list of names such as 'seg→depth', not {transfers!r}")
            pairs = [
                (s, t.name) for s in self.given for t in tasks if t.primary and self.route[s] != self.route[t.name]
            ]
        else:
            pairs = [self._pair(name) for name in transfers]
            _check_once([transfer(*pair) for pair in pairs])
        # Every target of a branch stands for the first of them that was chosen with the source.
        self._named: dict[str, str] = {}
        chosen: dict[tuple[str, str], str] = {}
        for source, target in sorted(pairs, key=lambda p: (self.given.index(p[1]), self.given.index(p[0]))):
            chosen.setdefault((source, self.route[target]), transfer(source, target))
        for (source, branch), name in chosen.items():
            self._named |= {transfer(source, t): name for t in self.given if self.route[t] == branch}
        self.transfers = tuple(chosen.values())
        self.seed = seed
        self.schedule_by = schedule_by
        if not isinstance(schedule, Mapping | None):
            raise ValueError(f"a schedule maps names of transfers to windows, not {schedule!r}")
        scheduled = [(self.named(name), _windows(name, given)) for name, given in (schedule or {}).items()]
        _check_once([name for name, _ in scheduled], "has two schedules")
        self.schedule = dict(scheduled)
        self._off: set[str] = set()

    def named(self, name: str) -> str:
        """The name of a transfer as it is in `transfers`, from any way of writing it.

        Raises:
            ValueError: if it is not among them.
        """
        found = self.known_as(name)
        if found not in self.transfers:
            raise ValueError(f"there is no transfer {name!r}; the transfers are: {', '.join(self.transfers) or 'none'}")
        return found

    def known_as(self, name: str) -> str:
        """The name of a transfer among `transfers`, from any way of writing it; any other name as it is."""
        pair = ends(name)
        return name if pair is None else self._named.get(transfer(*pair), name)

    def check(self, method: Method) -> None:
        """Raise ValueError for a rule of another route, or a shaper of a task whose copy would learn without one."""
        for rule in (method.encoder, method.decoder):
            for part in () if rule is None else rule.modules():
                if isinstance(part, Shares) and part.normalization == "target" and part.route != self.route:
                    raise ValueError(
                        f"the rule {type(rule).__name__} was made for branches {part.route}, the self-auxiliaries for "
                        f"{self.route}; give both the same route"
                    )
        for name in self.transfers:
            source = _source(name)
            if source in method.shapers and name not in method.shapers:
                raise ValueError(
                    f"task {source!r} has a shaper, but its copy {name!r} would learn from the plain loss; give "
                    f"{name!r} a shaper, too, or leave that transfer out"
                )

    def switch(self, name: str, on: bool) -> None:
        """Switch a transfer off or on again, from the next step on. On, it still keeps to its schedule."""
        (self._off.discard if on else self._off.add)(self.named(name))

    def resting(self, iteration: int, epoch: int) -> set[str]:
        """The transfers that are off, by hand or by schedule."""
        now = iteration if self.schedule_by == "iteration" else epoch
        return self._off | {
            name
            for name, windows in self.schedule.items()
            if not any(start <= now and (stop is None or now < stop) for start, stop in windows)
        }

    def extended(self, tasks: Sequence[Task]) -> list[Task]:
        """The given tasks, and an auxiliary one for each transfer.

        Raises:
            ValueError: for other tasks than those it was made for.
        """
        names = tuple(task.name for task in tasks)
        if names != self.given:
            raise ValueError(
                f"these self-auxiliaries were made for tasks {', '.join(self.given)}, not for {', '.join(names)}"
            )
        by_name = {task.name: task for task in tasks}
        return [*tasks, *(_copied(name, by_name[_source(name)]) for name in self.transfers)]

    def forward(self, model: SplitModel, tasks: Sequence[Task]) -> SplitModel:
        """The model with a head for each transfer; what it had is shared with the given one."""
        self._check_branches(model)
        seed = torch.initial_seed() if self.seed is None else self.seed
        heads: dict[str, nn.Module] = {}
        route: dict[str, str | None] = {}
        for name in self.transfers:
            source = _source(name)
            heads[name] = fresh(model.heads[source], _seed_of(seed, name), f"the head of task {source!r}")
            route[name] = model.route[_target(name)]
        return model.with_heads(heads, route)

    def get_extra_state(self) -> dict[str, Any]:
        """The transfers, and which of them are switched off."""
        return {"transfers": list(self.transfers), "off": sorted(self._off)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what was switched off; transfers that are not there now are forgotten, new ones are on."""
        self._off = {name for name in state["off"] if name in self.transfers}

    def _pair(self, name: Any) -> tuple[str, str]:
        pair = ends(name) if isinstance(name, str) else None
        if pair is None:
            raise ValueError(f"a transfer is written as 'source→target' or 'source->target', not {name!r}")
        for end in pair:
            if end not in self.given:
                near = get_close_matches(end, self.given, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"transfer {name!r}: there is no task {end!r}; {hint}the tasks are: {', '.join(self.given)}"
                )
        source, target = pair
        if source == target:
            raise ValueError(f"transfer {name!r} goes from a task to itself")
        if self.route[source] == self.route[target]:
            raise ValueError(
                f"transfer {name!r}: both tasks ride branch {self.route[target]!r}, which {source!r} trains already"
            )
        return pair

    def _check_branches(self, model: SplitModel) -> None:
        """Raise ValueError if the model's branches are not those that names and rules were made for."""
        for name in self.transfers:
            target = _target(name)
            if model.route[target] is None:
                raise ValueError(
                    f"transfer {name!r}: task {target!r} has no branch, and all tasks train the shared layers already; "
                    "split the network earlier (SplitModel.from_stages with a smaller cut)"
                )
        for one, other in itertools.combinations(self.given if self.transfers else (), 2):
            together = model.route[one] == model.route[other] is not None
            if together != (self.route[one] == self.route[other]):
                shared = {task: model.route[task] for task in self.given if model.route[task] not in (None, task)}
                have = "one branch" if together else "branches of their own"
                raise ValueError(f"tasks {one!r} and {other!r} ride {have} in the model; give route={shared}")


def fresh(module: nn.Module, seed: int, what: str) -> nn.Module:
    """A module of the same architecture, with new initial values for whatever is trained.

    Every part that has `reset_parameters` is asked for it, the innermost first, so that a module that wants a beginning
    of its own has the last word. Drawn in single precision on the CPU, values do not depend on where the module is.

    Raises:
        ValueError: naming the parameters that nothing has set.
    """
    anew = copy.deepcopy(module)
    trained = {name: p for name, p in anew.named_parameters() if p.requires_grad}
    kept = {name: p.detach().clone() for name, p in anew.named_parameters() if not p.requires_grad}
    homes = {name: (p.device, p.dtype) for name, p in trained.items()}
    for p in trained.values():
        p.data = torch.full(p.shape, torch.nan)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in reversed(list(anew.modules())):
            reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
            if callable(reset):
                reset()
    unset = [name for name, p in trained.items() if p.isnan().any()]
    if unset:
        parts = {name.rpartition(".")[0]: None for name in unset}
        modules = ", ".join(type(anew.get_submodule(part)).__name__ for part in parts)
        raise ValueError(
            f"{what} cannot be made anew: nothing sets {', '.join(unset)}; give the module ({modules}) a "
            "reset_parameters()"
        )
    with torch.no_grad():
        for name, p in trained.items():
            device, dtype = homes[name]
            p.data = p.data.to(device, dtype)
        for name, value in kept.items():
            anew.get_parameter(name).copy_(value)
    return anew


def _copied(name: str, source: Task) -> Task:
    """The task of a transfer."""
    return Task(
        name,
        source.loss,
        valid=source.valid,
        primary=False,
        target=source.target or source.name,
        input=source.input,
        objectives=source.objectives,
    )


def _source(name: str) -> str:
    return name.partition(ARROW)[0]


def _target(name: str) -> str:
    return name.partition(ARROW)[2]


def _seed_of(seed: int, name: str) -> int:
    """A seed for each transfer, whatever others there are."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _check_once(names: Collection[str], what: str = "is given twice") -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"transfer {', '.join(twice)} {what}")


def _windows(name: str, windows: Windows) -> list[tuple[int, int | None]]:
    """Checked windows of a schedule."""
    found: list[tuple[int, int | None]] = []
    for window in windows if isinstance(windows, Sequence) else [windows]:
        start, stop = window if isinstance(window, Sequence) and len(window) == 2 else (None, None)
        if not _whole(start) or not (stop is None or (_whole(stop) and stop > start)):
            raise ValueError(
                f"schedule of {name!r}: a window is [start, stop] of whole numbers, start < stop, or [start, null]; "
                f"not {window!r}"
            )
        found.append((start, stop))
    return found


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
