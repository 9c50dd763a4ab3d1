"""How the loss after a step depends on the weight that each task, or each element of its loss, had in it."""

from __future__ import annotations

import functools
import re
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from sidetask_core import parallel
from sidetask_core.aside import RandomState, aside, device_of
from sidetask_core.combine import Weights, combine
from sidetask_core.passes import Cut, Passes, losses_of
from sidetask_core.products import Product, Reused
from sidetask_core.signals import ElementSlopes, Mode, Part
from sidetask_core.split import SplitModel
from sidetask_core.task import Batch, Task

Group = dict[str, Any]

# Work in forward passes: of a backward pass, and of a derivative along a direction.
_BACKWARD = 2
_DERIVATIVE: dict[Mode, int] = {"exact": 3, "difference": 2, "one-sided": 1}
# Backward for the direction and for the step, and the exact derivative in the next step.
HINDSIGHT = 2 * _BACKWARD + _DERIVATIVE["exact"]


class NoForwardDerivative(RuntimeError):
    """An operator of the network has no forward-mode derivative, which mode ``"exact"`` needs; `operator` names it."""

    def __init__(self, operator: str) -> None:
        self.operator = operator
        super().__init__(
            f"operator {operator} has no forward-mode derivative, which mode 'exact' needs; use mode 'difference'"
        )


@dataclass(frozen=True)
class Move:
    """The step that an optimizer is about to take on one parameter, as a function of its gradient.

    SGD is followed exactly, with momentum, dampening, Nesterov's rule and weight decay. Any other optimizer is taken to
    follow the gradient at its learning rate, with weight decay, as in Auto-λ's released code. What the caller does to
    gradients before the optimizer's step, clipping above all, is not known here and left out.

    Attributes:
        after: the parameter after the step.
        rate: how far one unit of gradient moves it, against the gradient; 0 for a parameter that is not trained.
    """

    after: Tensor
    rate: float | Tensor

    @classmethod
    def of(
        cls, parameter: nn.Parameter, gradient: Tensor | None, optimizer: torch.optim.Optimizer, group: Group | None
    ) -> Move:
        """The move of `parameter`, which stays where it is without a gradient or beyond the optimizer's groups."""
        here = parameter.detach()
        if gradient is None or group is None:
            return cls(here, 0.0)
        step = _plus(gradient, group.get("weight_decay", 0.0), here)
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
            momentum, velocity = group["momentum"], optimizer.state.get(parameter, {}).get("momentum_buffer")
            if velocity is None:
                velocity = step
            else:
                kept = 1 - group["dampening"]
                velocity = _plus(step if kept == 1 else kept * step, momentum, velocity)
            step = _plus(step, momentum, velocity) if group["nesterov"] else velocity
        return cls(_plus(here, -group["lr"], step), rate_of(parameter, optimizer, group))


def groups_of(optimizer: torch.optim.Optimizer, model: SplitModel) -> dict[int, Group]:
    """The options of each parameter of an optimizer, by its id.

    Raises:
        ValueError: if it trains no parameter of the model: then no weight would seem to matter; or if its step is not
            one along a gradient that is there before it.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates the loss many times in a step, so there is no one step to look ahead at")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in groups for p in model.parameters()):
        raise ValueError("the optimizer given to step.backward trains no parameter of the step's model")
    return groups


def rate_of(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, group: Group | None) -> float | Tensor:
    """How far a unit of gradient moves a parameter in the optimizer's next step, against the gradient.

    Raises:
        ValueError: if the optimizer maximizes.
    """
    if group is None:
        return 0.0
    if group.get("maximize"):
        raise ValueError("the optimizer maximizes; a lookahead is for losses that are minimized")
    rate = 1.0
    if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
        if optimizer.state.get(parameter, {}).get("momentum_buffer") is not None:
            rate = 1.0 - group["dampening"]
        rate = 1.0 + group["momentum"] * rate if group["nesterov"] else rate
    moved: float | Tensor = group["lr"] * rate
    return moved


@dataclass(frozen=True)
class Place:
    """Where the gradients of some tasks are known: at the shared features, or at the output of a branch they ride.

    Attributes:
        branch: the branch's name; None for the shared features.
        random: the random state before the branch was computed.
        tasks: which tasks these are.
        cut: where the tensors that were cut are in the flattened output.
        tensors: these tensors.
        gradients: the tasks' gradients there, of this process ``[tasks, D]``.
        products: those of the branch that were noted; without them all are computed once more.
    """

    branch: str | None
    random: RandomState
    tasks: list[int]
    cut: list[int]
    tensors: list[Tensor]
    gradients: Tensor
    products: list[Product] = field(default_factory=list)


@dataclass(frozen=True)
class Encoded:
    """One input of a step, and what is known of the tasks that read it.

    Attributes:
        input: what was encoded.
        readers: the tasks that read it, by name.
        random: the random state before.
        places: where their gradients are known, each task's at one of them.
        products: those of the encoder that were noted; without them all are computed once more.
    """

    input: Any
    readers: tuple[str, ...]
    random: RandomState
    places: list[Place]
    products: list[Product] = field(default_factory=list)


@dataclass(frozen=True)
class Trail:
    """What a step leaves behind, from which the slope of its losses along any direction follows without its graph.

    Attributes:
        above: the parameters above the places, the encoder's and those of some branches, by their names in
            ``model.named_parameters()``.
        own: for each task its gradients of what is below its place, of this process, by name.
        encoded: one for every input.
        ambient: the precision of the forward pass.
    """

    above: dict[str, Tensor]
    own: list[dict[str, Tensor]]
    encoded: list[Encoded]
    ambient: torch.autocast

    @classmethod
    def of(cls, model: SplitModel, passes: Passes, ambient: torch.autocast) -> Trail:
        """The trail of a step that was prepared for it. It holds on to what the step holds."""
        names = {id(p): name for name, p in model.named_parameters()}
        own: list[dict[str, Tensor]] = [{} for _ in passes.losses]
        above = {names[id(p)]: p.detach() for p in passes.shared}
        encoded = []
        for domain in passes.domains:
            if domain.gradients is not None:
                places = [_place(None, domain.random, domain.tasks, domain.cut, domain.gradients)]
            else:
                alone = [t for t in domain.tasks if passes.branch_of[t] is None]
                found = passes.head_gradients(domain.cut, alone)
                places = [_place(None, domain.random, alone, domain.cut, found)] if alone else []
                for branch in domain.branches:
                    found = passes.head_gradients(branch.cut, branch.riders)
                    place = _place(branch.name, branch.random, branch.riders, branch.cut, found)
                    places.append(replace(place, products=branch.products))
                    above |= {names[id(p)]: p.detach() for p in branch.parameters}
            encoded.append(Encoded(domain.input, domain.readers, domain.random, places, domain.products))
            for t in domain.tasks:
                pairs = list(zip(passes.own[t], passes.head(t, keep=True)[0], strict=True))
                branch_of = passes.branch_of[t]
                if branch_of is not None and domain.gradients is not None:
                    pairs += zip(branch_of.parameters, branch_of.gradients[t], strict=True)
                for parameter, gradient in pairs:
                    if gradient is not None:
                        name = names[id(parameter)]
                        more = passes.unscaled(gradient)
                        own[t][name] = own[t][name] + more if name in own[t] else more
        return cls(above, own, encoded, ambient)

    def of_tasks(self, names: Sequence[str], wanted: Sequence[str]) -> Trail:
        """The same for the tasks `wanted` of a step of tasks `names`, by name; new tasks have no gradients."""
        if list(names) == list(wanted):
            return self
        own = [self.own[names.index(name)] if name in names else {} for name in wanted]

        def kept(place: Place) -> Place:
            rows = [i for i, t in enumerate(place.tasks) if names[t] in wanted]
            tasks = [wanted.index(names[place.tasks[i]]) for i in rows]
            return replace(place, tasks=tasks, gradients=place.gradients[rows])

        encoded = [replace(one, places=[kept(place) for place in one.places]) for one in self.encoded]
        return replace(self, own=own, encoded=encoded)

    def slopes(
        self,
        model: SplitModel,
        along: Mapping[str, Tensor],
        part: Part,
        mode: Mode,
        among: Collection[int],
    ) -> Tensor:
        """⟨direction, ∇L_t⟩ of the tasks `among`, zero for others ``[T]``, over all processes; no head is run again.

        Below a task's place they are dot products with its gradients. Above it, what is moved along the direction moves
        the features there, and that meets the task's gradient.
        """
        like = next(iter(self.above.values()), next(model.parameters()))
        slopes = [torch.zeros((), dtype=torch.float64, device=like.device) for _ in self.own]
        above = {name: along[name] for name in self.above if name in along}
        for one in self.encoded:
            # What a head adds to the gradient of a parameter that is shared, too, is weighed by the decoders' rule.
            for t in [t for place in one.places for t in place.tasks if t in among and part != "shared"]:
                for name, gradient in self.own[t].items():
                    if name in along:
                        slopes[t] = slopes[t] + _dot(along[name], gradient)
            places = [place for place in one.places if place.tensors and any(t in among for t in place.tasks)]
            if not places or not above:
                continue
            moved = self._moved(model, one, places, above, mode)
            for place, at_place in zip(
                places, moved.split([place.gradients.shape[1] for place in places]), strict=True
            ):
                for t, gradient in zip(place.tasks, place.gradients, strict=True):
                    if t in among:
                        slopes[t] = slopes[t] + _dot(at_place, gradient)
        return parallel.add(torch.stack(slopes))

    def _moved(
        self,
        model: SplitModel,
        one: Encoded,
        places: Sequence[Place],
        along: Mapping[str, Tensor],
        mode: Mode,
    ) -> Tensor:
        """The derivative along the direction of what there is at some places, flattened."""
        exact = mode == "exact"  # a difference wants the values elsewhere

        def at_places(moved: Mapping[str, Tensor]) -> list[Tensor]:
            def compute(model: SplitModel) -> list[Tensor]:
                found = []
                with Reused(one.products if exact else []):
                    features = model.encode(one.input, one.readers)
                for place in places:
                    output = features
                    if place.branch is not None:
                        place.random.restore(device_of(model))
                        with Reused(place.products if exact else []):
                            output = model.branches[place.branch](features)
                    tensors, _ = tree_flatten(output)
                    found += [tensors[i] for i in place.cut]
                return found

            with self.ambient:
                return aside(model, compute, {**self.above, **moved}, one.random)

        return derivative_along(at_places, self.above, [x for place in places for x in place.tensors], along, mode)


def _place(branch: str | None, random: RandomState, tasks: list[int], cut: Cut, gradients: Tensor) -> Place:
    return Place(branch, random, tasks, cut.places, [x.detach() for x in cut.below], gradients)


@dataclass(frozen=True)
class Rerun:
    """What it takes to run one task of a step again with other parameters: from its input to its element losses.

    Attributes:
        input: what was encoded.
        target: the labels.
        random: the random state before the encoder, before the branch and before the head.
        losses: the element losses of each objective, before shaping.
        masks: which of them are labelled.
        parameters: those of encoder, branch and head that are trained, by name.
        ambient: the precision of the forward pass.
        products: those of encoder, branch and head that were noted; without them all are computed once more.
    """

    input: Any
    target: Any
    random: tuple[RandomState, RandomState, RandomState]
    losses: list[Tensor]
    masks: list[Tensor | None]
    parameters: dict[str, Tensor]
    ambient: torch.autocast
    products: tuple[list[Product], list[Product], list[Product]] = ([], [], [])

    @classmethod
    def of(cls, model: SplitModel, task: Task, t: int, passes: Passes, ambient: torch.autocast) -> Rerun | None:
        """The rerun of task `t` of a step; None if its batch has no labels here. It copies nothing."""
        elements, domain = passes.elements[t], passes.domain_of[t]
        if elements is None or domain is None:
            return None
        above = {id(p) for p in [*model.shared_parameters(), *model.specific_parameters(task.name)]}
        parameters = {n: p.detach() for n, p in model.named_parameters() if id(p) in above and p.requires_grad}
        losses, masks = zip(*elements, strict=True)
        random = (domain.random, *passes.random[t])
        products = (domain.products, *passes.products[t])
        return cls(domain.input, passes.targets[t], random, [*losses], [*masks], parameters, ambient, products)

    def slopes(self, model: SplitModel, task: Task, along: Mapping[str, Tensor], mode: Mode) -> list[ElementSlopes]:
        """−⟨direction, ∇d_i⟩ of every element loss d_i of each objective, from one pass of encoder, branch and head."""
        above = {name: along[name] for name in self.parameters if name in along}
        # A difference wants the values elsewhere.
        of_encoder, of_branch, of_head = self.products if mode == "exact" else ([], [], [])

        def elements(moved: Mapping[str, Tensor]) -> list[Tensor]:
            def compute(model: SplitModel) -> list[Tensor]:
                device, branch = device_of(model), model.route[task.name]
                with Reused(of_encoder):
                    read = model.encode(self.input, [task.name])
                self.random[1].restore(device)
                if branch is not None:
                    with Reused(of_branch):
                        read = model.branches[branch](read)
                self.random[2].restore(device)
                with Reused(of_head):
                    prediction = model.heads[task.name](read)
                return [losses for losses, _ in task.elements(prediction, self.target)]

            with self.ambient:
                return aside(model, compute, {**self.parameters, **moved}, self.random[0])

        if above:
            moved = derivative_along(elements, self.parameters, self.losses, above, mode)
        else:
            moved = torch.zeros_like(_flat(self.losses))
        slopes = moved.neg().split([x.numel() for x in self.losses])
        found = []
        for slope, losses, mask in zip(slopes, self.losses, self.masks, strict=True):
            there = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
            of_elements = torch.where(there, slope.view_as(losses), 0.0)
            found.append(ElementSlopes(of_elements, there, self.target))
        return found


def derivative_along(
    compute: Callable[[Mapping[str, Tensor]], list[Tensor]],
    parameters: Mapping[str, Tensor],
    here: Sequence[Tensor],
    along: Mapping[str, Tensor],
    mode: Mode,
) -> Tensor:
    """The derivative of what is computed from parameters along a direction, flattened.

    What is computed under `torch.no_grad`, or detached, is constant to ``"exact"``, as it is to a gradient. A
    difference follows it like everything else, and is another number there.

    A difference is taken over a displacement ε^⅔ times as long as the parameters, ε the precision. A fixed length, as
    in Auto-λ's code (0.01), lies across kinks of ReLU and max-pooling, an error that no precision mends.

    Args:
        compute: of other tensors in place of parameters, by name.
        parameters: where it is differentiated.
        here: what it is there.
        along: the direction; parameters that it lacks stay.
        mode: as in `Signals.lookahead`.
    """
    if mode == "exact":
        _load_forward_mode()
        # Nothing here requires a gradient; grad mode tells what is computed outside it.
        with forward_ad.dual_level(), _named_missing_derivative(), torch.enable_grad(), _NoTangentsWithoutGrad():
            duals = {name: forward_ad.make_dual(p := parameters[name], u.to(p)) for name, u in along.items()}
            parts = [forward_ad.unpack_dual(x) for x in compute(duals)]
            return _flat([torch.zeros_like(x) if dx is None else dx for x, dx in parts])
    length = _length(along.values())
    precision = max(torch.finfo(x.dtype).eps for x in here)
    reach = precision ** (2 / 3) * _length(parameters[name] for name in along)
    step = reach / length.clamp(min=torch.finfo(length.dtype).tiny)

    def displaced(sign: int) -> Tensor:
        with torch.no_grad():
            return _flat(compute({n: (p := parameters[n]) + sign * step.to(p) * u.to(p) for n, u in along.items()}))

    before = displaced(-1) if mode == "difference" else _flat(here)
    slope = (displaced(1) - before) / (step * (2 if mode == "difference" else 1))
    # Where nothing moves there is no slope.
    return torch.where(length > 0, slope, 0.0)


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


def _plus(a: Tensor, factor: float | Tensor, b: Tensor) -> Tensor:
    """Give a + factor · b, in one pass over the memory unless the factor is a tensor, which would be waited for."""
    return a + factor * b if isinstance(factor, Tensor) else torch.add(a, b, alpha=factor)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten().to(torch.promote_types(x.dtype, torch.float32)) for x in tensors])


def _length(tensors: Iterable[Tensor]) -> Tensor:
    """The length of several tensors taken as one vector."""
    return torch.stack([torch.linalg.vector_norm(x.detach()).float() for x in tensors]).square().sum().sqrt()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten().to(a))


class _NoTangentsWithoutGrad(TorchFunctionMode):
    """Lets what is computed under `torch.no_grad` be constant, which forward mode by itself does not."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            args, kwargs = tree_map_only(Tensor, _primal, (args, kwargs))
        return func(*args, **kwargs)


def _primal(tensor: Tensor) -> Tensor:
    parts = forward_ad.unpack_dual(tensor)
    return tensor if parts.tangent is None else parts.primal


@functools.cache
def _load_forward_mode() -> None:
    """Use forward mode once: torch then compiles what it lacks, with a deprecation warning about its own code."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def _named_missing_derivative() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        missing = re.search(r"forward AD with (\S+) that does not support it", str(error))
        if missing is not None:
            raise NoForwardDerivative(missing.group(1)) from error
        if not isinstance(error, NotImplementedError) or "jvp" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        caller = next(frame for frame in reversed(frames) if frame.filename != torch.autograd.function.__file__)
        where = f"{Path(caller.filename).name}, line {caller.lineno}: {caller.line}"
        raise NoForwardDerivative(f"autograd.Function without jvp ({where})") from error
