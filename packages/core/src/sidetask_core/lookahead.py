"""How the loss after a step depends on the weight that each task, or each element of its loss, had in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sidetask_core import parallel
from sidetask_core.aside import aside
from sidetask_core.combine import Weights, combine
from sidetask_core.moves import Move, groups_of, rate_of
from sidetask_core.passes import Passes, losses_of
from sidetask_core.reruns import Rerun, Trail
from sidetask_core.signals import ElementSlopes, Mode, Part
from sidetask_core.split import SplitModel
from sidetask_core.task import Batch, Task

# there, takes one more than the exact one here, but a resumed run has to go the same way as one that was not.
_BACKWARD = 2
_DERIVATIVE: dict[Mode, int] = {"exact": 2, "difference": 2, "one-sided": 1}
# Backward for the direction and for the step, and the exact derivative in the next step.
HINDSIGHT = 2 * _BACKWARD + _DERIVATIVE["exact"]


@dataclass
class Lookahead:
    """Looks at the loss after the step that is being taken.

    Attributes:
        model: the network.
        tasks: its tasks.
        passes: the step's own.
        ambient: the precision of the forward pass.
        validation: the batch whose loss is to fall, or a function that gives it.
        optimizer: what will take the step.
        noted: whose elements were differentiated in any step, by name; None if losses were.
        decided: the weights of the step, once its rules were asked.
        loss: the validation loss after the step that was looked at last, over all processes.
        directions: those found for the step that was decided on, by the tasks whose loss is to fall.
    """

    model: SplitModel
    tasks: Sequence[Task]
    passes: Passes
    ambient: torch.autocast
    validation: Batch | Callable[[], Batch]
    optimizer: torch.optim.Optimizer
    noted: set[str | None]
    decided: Weights | None = None
    loss: Tensor | None = None
    directions: dict[Collection[int], dict[str, Tensor]] = field(default_factory=dict)

    def derivative(self, weights: Tensor, part: Part, mode: Mode, among: Collection[int], taken: bool) -> Tensor:
        """d(primaries' validation loss after the step)/d(weight) of the tasks `among`, zero for others ``[T]``."""
        self.passes.prepare(_DERIVATIVE[mode] + _BACKWARD * (1 if taken else 2))
        along = self._direction(Weights(weights, weights), part, [task for task in self.tasks if task.primary])
        if mode == "exact":
            self.noted.add(None)
        trail = Trail.of(self.model, self.passes, self.ambient)
        return -trail.slopes(self.model, along, part, mode, among).to(weights)

    def elements(self, t: int, of: Collection[int], mode: Mode) -> list[ElementSlopes] | None:
        """See `Signals.lookahead_elements`, for each objective."""
        if self.decided is None:
            raise ValueError("element losses are looked at once the step's weights are decided, in a shaper's update")
        if of not in self.directions:
            self.directions[of] = self._direction(self.decided, "all", [self.tasks[i] for i in sorted(of)])
        if mode == "exact":
            self.noted.add(self.tasks[t].name)
        rerun = Rerun.of(self.model, self.tasks[t], t, self.passes, self.ambient)
        return None if rerun is None else rerun.slopes(self.model, self.tasks[t], self.directions[of], mode)

    def _direction(self, weights: Weights, part: Part, of: Sequence[Task]) -> dict[str, Tensor]:
        """α ∇ of the validation loss of tasks `of` after the step with these weights, by name."""
        passes = self.passes
        governed = parameters_of(self.model, passes, part)
        # What the validation loss does not read may stay where it is.
        read = {id(p) for task in of for p in self.model.specific_parameters(task.name)}
        read |= {id(p) for p in self.model.shared_parameters()}
        governed = {name: p for name, p in governed.items() if id(p) in read}
        found = combine(passes, weights, ahead=True)
        groups = groups_of(self.optimizer, self.model)
        after, rates = {}, {}
        for name, p in governed.items():
            gradient = passes.unscaled(found.pop(p)) if p in found else None
            move = Move.of(p, gradient, self.optimizer, groups.get(id(p)))
            after[name], rates[name] = move.after, move.rate
        # What is left, gradients of heads that the validation loss does not read, is not held through its passes.
        found.clear()
        along = self._validation_gradient(of, after)
        # One by one, since each of these is as large as the network.
        for name in along:
            along[name] = along[name] * rates[name]
        return along

    def _validation_gradient(self, of: Sequence[Task], after: dict[str, Tensor]) -> dict[str, Tensor]:
        """∇ of the unweighted validation loss of tasks `of` at the parameters `after` the step, over all processes.

        Empties `after`, which nobody needs beyond it.
        """
        batch = self.validation if isinstance(self.validation, Batch) else self.validation()
        leaves = {name: after.pop(name).detach().requires_grad_() for name in list(after)}
        passes = self.passes

        def compute(model: SplitModel) -> list[Tensor | None]:
            losses, _ = losses_of(model, of, batch, {})
            loss = torch.stack([loss.to(losses[0]) for loss in losses]).sum()
            self.loss = parallel.add(loss.detach().clone())
            total = loss * passes.scale.to(loss)
            if not total.requires_grad or not leaves:
                return [None] * len(leaves)
            return list(torch.autograd.grad(total, list(leaves.values()), allow_unused=True))

        with torch.enable_grad(), self.ambient:
            found = aside(self.model, compute, leaves)
        summed = parallel.add_gradients(list(leaves.values()), found)
        return {name: passes.unscaled(g) for name, g in zip(leaves, summed, strict=True) if g is not None}


@dataclass(frozen=True)
class Hindsight:
    """Looks from a step back at the one before: what did each weight there do to the loss here?

    Attributes:
        trail: what the step before left behind, in copies of its own; None if no rule asked for it.
        reruns: the same of single tasks, by name; those that were asked for and have labels here.
        rates: how far a unit of gradient moved each parameter in it, by name.
    """

    trail: Trail | None
    reruns: dict[str, Rerun]
    rates: dict[str, float]

    @classmethod
    def of(
        cls, trail: Trail | None, reruns: Mapping[str, Rerun], model: SplitModel, optimizer: torch.optim.Optimizer
    ) -> Hindsight:
        """What to keep of a step until the next, before the optimizer changes parameters and the caller the batch."""
        groups = groups_of(optimizer, model)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        rates = {name: float(rate_of(p, optimizer, groups.get(id(p)))) for name, p in trained}
        # Once each, whoever needs them.
        parameters: dict[str, Tensor] = {}
        batches: dict[int, Any] = {}

        def kept(some: Mapping[str, Tensor]) -> dict[str, Tensor]:
            parameters.update({name: p.clone() for name, p in some.items() if name not in parameters})
            return {name: parameters[name] for name in some}

        def copied(structure: Any) -> Any:
            if id(structure) not in batches:
                batches[id(structure)] = tree_map_only(Tensor, torch.clone, structure)
            return batches[id(structure)]

        if trail is not None:
            encoded = [replace(one, input=copied(one.input)) for one in trail.encoded]
            trail = replace(trail, above=kept(trail.above), encoded=encoded)
        again = {
            name: replace(one, input=copied(one.input), target=copied(one.target), parameters=kept(one.parameters))
            for name, one in reruns.items()
        }
        return cls(trail, again, rates)

    def batches(self) -> list[Any]:
        """The caller's data in it."""
        reruns = [(one.input, one.target) for one in self.reruns.values()]
        return [*reruns, *([] if self.trail is None else [one.input for one in self.trail.encoded])]

    def direction(self, model: SplitModel, passes: Passes, part: Part, of: Collection[int]) -> dict[str, Tensor]:
        """α ∇ of the unweighted loss of tasks `of` in this step, by name."""
        ones = torch.tensor([float(t in of) for t in range(len(passes.losses))]).to(passes.losses[0])
        passes.prepare(HINDSIGHT)
        found = combine(passes, Weights(ones, ones), ahead=True, among=of)
        # No step has these weights, so that nobody will ask for the gradient again.
        passes.ahead = None
        governed = parameters_of(model, passes, part)
        return {
            name: passes.unscaled(found.pop(p)) * self.rates[name]
            for name, p in governed.items()
            if p in found and name in self.rates
        }


def parameters_of(model: SplitModel, passes: Passes, part: Part) -> dict[str, nn.Parameter]:
    """The trained parameters that a rule weighs the gradients of, by name."""
    shared = {id(p) for p in passes.shared}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p for name, p in trained.items() if part == "all" or (id(p) in shared) == (part == "shared")}
