"""What a step keeps for the next, if a rule asked for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sidetask_core import parallel
from sidetask_core.aside import RandomState, aside, device_of
from sidetask_core.lookahead import HINDSIGHT, Hindsight
from sidetask_core.passes import Passes, losses_of
from sidetask_core.reruns import Encoded, Place, Rerun, Trail
from sidetask_core.signals import ElementSlopes, Mode, Part, Progress
from sidetask_core.split import SplitModel
from sidetask_core.task import Batch, Task


@dataclass(frozen=True)
class Past:
    """A batch, its losses, and the random state before it was encoded.

    In copies: the caller may fill the same tensors with the next batch.
    """

    batch: Batch
    losses: Tensor
    labelled: Tensor
    random: RandomState


class Memory:
    """The previous step's batch and losses, and what its weights did; each only once it was asked for.

    Whatever is there is handed out once, so that a step which fails leaves nothing to the next.
    """

    def __init__(self, model: SplitModel, tasks: Sequence[Task], shapers: Mapping[str, nn.Module]) -> None:
        self.model, self.tasks, self.shapers = model, tasks, shapers
        self.wants_progress = False
        self.wants_hindsight = False
        # The tasks whose element losses are asked for in hindsight.
        self.wants_elements: set[str] = set()
        # Those that were differentiated for it, or for what lies ahead: in later steps their products are noted.
        # None stands for what is above the cuts, which losses are differentiated through.
        self.noted: set[str | None] = set()
        self.past: Past | None = None
        self.hindsight: Hindsight | None = None
        # After a resume, only the process whose state was saved may have anything, and all have to know.
        self.agreed = True

    def recall(self, passes: Passes, ambient: torch.autocast) -> Recall:
        """What there is, for the rules of a step."""
        past, hindsight = self.past, self.hindsight
        if not self.agreed and parallel.world() > 1:
            have = torch.tensor([past is not None, hindsight is not None], dtype=torch.float32)
            both = (parallel.add(have.to(device_of(self.model))) == parallel.world()).tolist()
            past, hindsight = past if both[0] else None, hindsight if both[1] else None
        self.past, self.hindsight, self.agreed = None, None, True
        return Recall(self, past, hindsight, passes, ambient)

    def keep_trail(self, passes: Passes, ambient: torch.autocast, optimizer: torch.optim.Optimizer) -> None:
        """Keep what hindsight will need. Comes before gradients are combined, for they are handed out once."""
        trail = None
        if self.wants_hindsight:
            passes.prepare(HINDSIGHT)
            trail = Trail.of(self.model, passes, ambient)
        reruns = {
            task.name: rerun
            for t, task in enumerate(self.tasks)
            if task.name in self.wants_elements
            and (rerun := Rerun.of(self.model, task, t, passes, ambient)) is not None
        }
        self.hindsight = Hindsight.of(trail, reruns, self.model, optimizer)

    def keep_batch(self, batch: Batch, passes: Passes, losses: Tensor) -> None:
        """Keep what progress will need."""
        for domain in passes.domains:
            domain.for_another_run()
        inputs, targets = tree_map_only(Tensor, torch.clone, (batch.inputs, dict(batch.targets)))
        kept = Batch(inputs, targets, batch.without)
        self.past = Past(kept, losses.clone(), passes.labelled, passes.domains[0].random)

    def state(self) -> dict[str, Any]:
        """All of it, in tensors, lists, dicts and numbers; batches that hold anything else are left out."""
        past = hindsight = None
        if self.past is not None and _plain((self.past.batch.inputs, self.past.batch.targets)):
            random = (self.past.random.host, self.past.random.device)
            batch = self.past.batch
            known = (batch.inputs, batch.targets, sorted(batch.without), self.past.losses, self.past.labelled)
            past = (*known, random)
        if self.hindsight is not None and _plain(self.hindsight.batches()):
            trail = self.hindsight.trail
            reruns = {name: _saved(one) for name, one in self.hindsight.reruns.items()}
            hindsight = (None if trail is None else _saved(trail), reruns, self.hindsight.rates)
        names = [task.name for task in self.tasks]
        wants = (self.wants_progress, self.wants_hindsight, sorted(self.wants_elements))
        return {"tasks": names, "wants": wants, "past": past, "hindsight": hindsight, "rank": parallel.rank()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state, of another process's only what it was asked for.

        A rule that asks in every n-th step would otherwise miss the first time after a resume.
        """
        self.past, self.hindsight, self.agreed = None, None, False
        self.wants_progress, self.wants_hindsight, elements = state["wants"]
        self.wants_elements = {*elements}
        if state["rank"] != parallel.rank():
            return
        device = device_of(self.model)

        def there(saved: Any) -> Any:
            return tree_map_only(Tensor, lambda tensor: tensor.to(device), saved)

        names = [task.name for task in self.tasks]
        if state["past"] is not None and names == state["tasks"]:
            *known, random = state["past"]
            inputs, targets, without, losses, labelled = there(known)
            self.past = Past(Batch(inputs, targets, without), losses, labelled, RandomState(*random))
        if state["hindsight"] is not None:
            trail, reruns, rates = state["hindsight"]
            self.hindsight = Hindsight(
                None if trail is None else _loaded_trail(trail, there).of_tasks(state["tasks"], names),
                {name: _loaded_rerun(one, there) for name, one in reruns.items() if name in names},
                dict(rates),
            )


@dataclass
class Recall:
    """The memory of the previous step, as the rules of this one may ask for it."""

    memory: Memory
    past: Past | None
    last: Hindsight | None
    passes: Passes
    ambient: torch.autocast
    directions: dict[Collection[int], dict[str, Tensor]] = field(default_factory=dict)

    def progress(self) -> Progress | None:
        """See `Signals.progress`."""
        memory, past = self.memory, self.past
        memory.wants_progress = True
        if past is None:
            return None
        with self.ambient:
            losses, _ = aside(
                memory.model,
                lambda model: losses_of(model, memory.tasks, past.batch, memory.shapers),
                random=past.random,
            )
        after = parallel.add(torch.stack([loss.to(past.losses) for loss in losses]))
        return Progress(past.losses, after, past.labelled)

    def hindsight(self, part: Part, mode: Mode, among: Collection[int]) -> Tensor | None:
        """See `Signals.hindsight`."""
        memory = self.memory
        memory.wants_hindsight = True
        if mode == "exact":
            memory.noted.add(None)
        if self.last is None or self.last.trail is None:
            return None
        primaries = frozenset(t for t, task in enumerate(memory.tasks) if task.primary)
        along = self.last.direction(memory.model, self.passes, part, primaries)
        return -self.last.trail.slopes(memory.model, along, part, mode, among).to(self.passes.losses[0])

    def elements(self, t: int, of: Collection[int], mode: Mode) -> list[ElementSlopes] | None:
        """See `Signals.hindsight_elements`, for each objective."""
        memory, task = self.memory, self.memory.tasks[t]
        memory.wants_elements.add(task.name)
        if mode == "exact":
            memory.noted.add(task.name)
        if self.last is None:
            return None
        if of not in self.directions:
            self.directions[of] = self.last.direction(memory.model, self.passes, "all", of)
        rerun = self.last.reruns.get(task.name)
        return None if rerun is None else rerun.slopes(memory.model, task, self.directions[of], mode)


def _saved(one: Trail | Rerun | Encoded | Place) -> dict[str, Any]:
    """In tensors, lists, dicts and numbers."""
    state = {field.name: getattr(one, field.name) for field in fields(one)}
    # They are as large as what a step holds, and can be computed again.
    state.pop("products", None)
    state = tree_map_only(RandomState, lambda random: (random.host, random.device), state)
    if isinstance(one, Trail):
        state["encoded"] = [_saved(encoded) for encoded in one.encoded]
    if isinstance(one, Encoded):
        state["places"] = [_saved(place) for place in one.places]
    if isinstance(one, (Trail, Rerun)):
        ambient = one.ambient
        state["ambient"] = (ambient.device, str(ambient.fast_dtype).removeprefix("torch."), ambient._enabled)
    return state


def _loaded_trail(state: Mapping[str, Any], there: Callable[[Any], Any]) -> Trail:
    def loaded(one: Mapping[str, Any]) -> dict[str, Any]:
        # A generator's state is on the host, wherever the generator is.
        return {**there({k: v for k, v in one.items() if k != "random"}), "random": RandomState(*one["random"])}

    encoded = [
        Encoded(**{**loaded(one), "places": [Place(**loaded(place)) for place in one["places"]]})
        for one in state["encoded"]
    ]
    return Trail(there(state["above"]), there(state["own"]), encoded, _ambient(*state["ambient"]))


def _loaded_rerun(state: Mapping[str, Any], there: Callable[[Any], Any]) -> Rerun:
    encoder, branch, head = (RandomState(*random) for random in state["random"])
    known = {"random": (encoder, branch, head), "ambient": _ambient(*state["ambient"])}
    return Rerun(**(there(state) | known))


def _ambient(kind: str, precision: str, enabled: bool) -> torch.autocast:
    return torch.autocast(kind, getattr(torch, precision), enabled)


def _plain(structure: Any) -> bool:
    """Whether `torch.load` reads it back with ``weights_only=True``."""
    if type(structure) is dict:
        return all(_plain(key) and _plain(value) for key, value in structure.items())
    if type(structure) in (list, tuple):
        return all(map(_plain, structure))
    return structure is None or type(structure) in (Tensor, bool, int, float, str)
