"""What a step keeps for the next, if a rule asked for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sidetask_core import parallel
from sidetask_core.aside import RandomState, aside, device_of
from sidetask_core.lookahead import Encoded, Hindsight, Trail
from sidetask_core.passes import Passes, losses_of
from sidetask_core.signals import Mode, Part, Progress
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
        trail = Trail.of(self.model, passes, ambient)
        self.hindsight = Hindsight.of(trail, self.model, optimizer)

    def keep_batch(self, batch: Batch, passes: Passes, losses: Tensor) -> None:
        """Keep what progress will need."""
        inputs, targets = tree_map_only(Tensor, torch.clone, (batch.inputs, dict(batch.targets)))
        self.past = Past(Batch(inputs, targets), losses.clone(), passes.labelled, passes.domains[0].random)

    def state(self) -> dict[str, Any]:
        """All of it, in tensors, lists, dicts and numbers; batches that hold anything else are left out."""
        past = hindsight = None
        if self.past is not None and _plain((self.past.batch.inputs, self.past.batch.targets)):
            random = (self.past.random.host, self.past.random.device)
            past = (self.past.batch.inputs, self.past.batch.targets, self.past.losses, self.past.labelled, random)
        if self.hindsight is not None and _plain([one.input for one in self.hindsight.trail.encoded]):
            trail, ambient = self.hindsight.trail, self.hindsight.trail.ambient
            inputs = [{field.name: getattr(one, field.name) for field in fields(Encoded)} for one in trail.encoded]
            for one in inputs:
                one["random"] = (one["random"].host, one["random"].device)
            precision = (ambient.device, str(ambient.fast_dtype).removeprefix("torch."), ambient._enabled)
            hindsight = (trail.shared, trail.own, inputs, precision, self.hindsight.rates)
        names = [task.name for task in self.tasks]
        wants = (self.wants_progress, self.wants_hindsight)
        return {"tasks": names, "past": past, "hindsight": hindsight, "rank": parallel.rank(), "wants": wants}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state, of another process's only what it was asked for.

        A rule that asks in every n-th step would otherwise miss the first time after a resume.
        """
        self.past, self.hindsight, self.agreed = None, None, False
        self.wants_progress, self.wants_hindsight = state["wants"]
        if state["rank"] != parallel.rank():
            return
        device = device_of(self.model)

        def there(saved: Any) -> Any:
            return tree_map_only(Tensor, lambda tensor: tensor.to(device), saved)

        names = [task.name for task in self.tasks]
        if state["past"] is not None and names == state["tasks"]:
            *known, random = state["past"]
            inputs, targets, losses, labelled = there(known)
            self.past = Past(Batch(inputs, targets), losses, labelled, RandomState(*random))
        if state["hindsight"] is not None:
            shared, own, inputs, (kind, precision, enabled), rates = state["hindsight"]
            ambient = torch.autocast(kind, getattr(torch, precision), enabled)
            held = [Encoded(**(there(one) | {"random": RandomState(*one["random"])})) for one in inputs]
            trail = Trail(there(shared), there(own), held, ambient)
            self.hindsight = Hindsight(trail.of_tasks(state["tasks"], names), dict(rates))


@dataclass
class Recall:
    """The memory of the previous step, as the rules of this one may ask for it."""

    memory: Memory
    past: Past | None
    last: Hindsight | None
    passes: Passes
    ambient: torch.autocast

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
        if self.last is None:
            return None
        return self.last.derivative(memory.model, memory.tasks, self.passes, part, mode, among)


def _plain(structure: Any) -> bool:
    """Whether `torch.load` reads it back with ``weights_only=True``."""
    if type(structure) is dict:
        return all(_plain(key) and _plain(value) for key, value in structure.items())
    if type(structure) in (list, tuple):
        return all(map(_plain, structure))
    return structure is None or type(structure) in (Tensor, bool, int, float, str)
