"""How the loss after a step depends on the weight that each task had in it."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_map_only

from sidetask_core import parallel
from sidetask_core.aside import RandomState, aside
from sidetask_core.combine import Weights, combine
from sidetask_core.passes import Passes, losses_of
from sidetask_core.signals import Mode, Part
from sidetask_core.split import SplitModel
from sidetask_core.task import Batch, Task

Group = dict[str, Any]


class NoForwardDerivative(RuntimeError):
    """An operator of the encoder has no forward-mode derivative, which mode ``"exact"`` needs; `operator` names it."""

    def __init__(self, operator: str) -> None:
        self.operator = operator
        super().__init__(
            f"operator {operator} has no forward-mode derivative, which mode 'exact' needs; use mode 'difference'"
        )


@dataclass(frozen=True)
class Move:
    """The step that an optimizer is about to take on one parameter, as a function of its gradient.

    SGD is followed exactly, with momentum, dampening, Nesterov's rule and weight decay. Any other optimizer is taken to
    follow the gradient at its learning rate, with weight decay, as in Auto-λ's released code.

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
        step = gradient + group.get("weight_decay", 0.0) * here
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
            momentum, velocity = group["momentum"], optimizer.state.get(parameter, {}).get("momentum_buffer")
            velocity = step if velocity is None else momentum * velocity + (1 - group["dampening"]) * step
            step = step + momentum * velocity if group["nesterov"] else velocity
        return cls(here - group["lr"] * step, rate_of(parameter, optimizer, group))


def groups_of(optimizer: torch.optim.Optimizer, model: SplitModel) -> dict[int, Group]:
    """The options of each parameter of an optimizer, by its id.

    Raises:
        ValueError: if it trains no parameter of the model: then no weight would seem to matter.
    """
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
        if "momentum_buffer" in optimizer.state.get(parameter, {}):
            rate = 1.0 - group["dampening"]
        rate = 1.0 + group["momentum"] * rate if group["nesterov"] else rate
    moved: float | Tensor = group["lr"] * rate
    return moved


@dataclass(frozen=True)
class Encoded:
    """One input of a step, its features, and the gradients that the tasks which read it have there.

    Attributes:
        tasks: which tasks these are.
        input: what was encoded.
        random: the random state before.
        cut: where the tensors that were cut are in the flattened features.
        features: these tensors.
        gradients: the tasks' gradients there, of this process ``[tasks, D]``.
    """

    tasks: list[int]
    input: Any
    random: RandomState
    cut: list[int]
    features: list[Tensor]
    gradients: Tensor


@dataclass(frozen=True)
class Trail:
    """What a step leaves behind, from which the slope of its losses along any direction follows without its graph.

    Attributes:
        shared: the encoder's parameters, by their names in ``model.named_parameters()``.
        own: for each task the gradients of its branch and head, of this process, by name.
        encoded: one for every input.
        ambient: the precision of the forward pass.
    """

    shared: dict[str, Tensor]
    own: list[dict[str, Tensor]]
    encoded: list[Encoded]
    ambient: torch.autocast

    @classmethod
    def of(cls, model: SplitModel, passes: Passes, ambient: torch.autocast) -> Trail:
        """The trail of a step. It holds on to what the step holds, and copies nothing."""
        names = {id(p): name for name, p in model.named_parameters()}
        own: list[dict[str, Tensor]] = [{} for _ in passes.losses]
        encoded = []
        for domain in passes.domains:
            gradients = passes.feature_gradients(domain)
            below = [x.detach() for x in domain.cut.below]
            encoded.append(Encoded(domain.tasks, domain.input, domain.random, domain.cut.places, below, gradients))
            for t in domain.tasks:
                pairs = list(zip(passes.own[t], passes.head(t, keep=True)[0], strict=True))
                branch = passes.branch_of[t]
                if branch is not None:
                    pairs += zip(branch.parameters, branch.gradients[t], strict=True)
                for parameter, gradient in pairs:
                    if gradient is not None:
                        name = names[id(parameter)]
                        more = passes.unscaled(gradient)
                        own[t][name] = own[t][name] + more if name in own[t] else more
        return cls({names[id(p)]: p.detach() for p in passes.shared}, own, encoded, ambient)

    def of_tasks(self, names: Sequence[str], wanted: Sequence[str]) -> Trail:
        """The same for the tasks `wanted` of a step of tasks `names`, by name; new tasks have no gradients."""
        if list(names) == list(wanted):
            return self
        own = [self.own[names.index(name)] if name in names else {} for name in wanted]
        encoded = []
        for one in self.encoded:
            rows = [i for i, t in enumerate(one.tasks) if names[t] in wanted]
            tasks = [wanted.index(names[one.tasks[i]]) for i in rows]
            encoded.append(replace(one, tasks=tasks, gradients=one.gradients[rows]))
        return replace(self, own=own, encoded=encoded)

    def slopes(self, model: SplitModel, along: Mapping[str, Tensor], mode: Mode, among: Collection[int]) -> Tensor:
        """⟨direction, ∇L_t⟩ of the tasks `among`, zero for others ``[T]``, over all processes; no head is run again.

        Below the cut they are dot products with the gradients of branches and heads. Above it, the encoder moved along
        the direction moves the features, and that meets each task's gradient there.
        """
        like = next(iter(self.shared.values()), next(model.parameters()))
        slopes = [torch.zeros((), dtype=torch.float64, device=like.device) for _ in self.own]
        above = {name: along[name] for name in self.shared if name in along}
        for one in self.encoded:
            riders = [(i, t) for i, t in enumerate(one.tasks) if t in among]
            moved = self._moved(model, one, above, mode) if riders and above and one.features else None
            for i, t in riders:
                parts = [_dot(along[name], g) for name, g in self.own[t].items() if name in along]
                if moved is not None:
                    parts.append(_dot(moved, one.gradients[i]))
                for part in parts:
                    slopes[t] = slopes[t] + part
        return parallel.add(torch.stack(slopes))

    def _moved(self, model: SplitModel, one: Encoded, along: Mapping[str, Tensor], mode: Mode) -> Tensor:
        """The derivative of the features along the direction, flattened."""
        if mode != "exact":
            return self._difference(model, one, along, central=mode == "difference")
        _load_forward_mode()
        with forward_ad.dual_level(), _named_missing_derivative():
            duals = {
                name: forward_ad.make_dual(self.shared[name], u.to(self.shared[name])) for name, u in along.items()
            }
            parts = [forward_ad.unpack_dual(x) for x in self._features(model, one, duals)]
            return _flat([torch.zeros_like(x) if dx is None else dx for x, dx in parts])

    def _difference(self, model: SplitModel, one: Encoded, along: Mapping[str, Tensor], central: bool) -> Tensor:
        """The same from features of an encoder displaced a little along the direction, and back or not at all.

        The displacement is ε^⅔ times as long as the parameters, ε their precision. A fixed length, as in Auto-λ's code
        (0.01), lies across kinks of ReLU and max-pooling, an error that no precision mends.
        """
        length = _length(along.values())
        precision = max(torch.finfo(x.dtype).eps for x in one.features)
        reach = precision ** (2 / 3) * _length(self.shared[name] for name in along)
        step = reach / length.clamp(min=torch.finfo(length.dtype).tiny)

        def displaced(sign: int) -> Tensor:
            moved = {name: (p := self.shared[name]) + sign * step.to(p) * u.to(p) for name, u in along.items()}
            return _flat(self._features(model, one, moved))

        here = displaced(-1) if central else _flat(one.features)
        slope = (displaced(1) - here) / (step * (2 if central else 1))
        # Where nothing moves there is no slope.
        return torch.where(length > 0, slope, 0.0)

    def _features(self, model: SplitModel, one: Encoded, moved: Mapping[str, Tensor]) -> list[Tensor]:
        """The features that were cut, of an encoder with other parameters that draws what it drew in the step."""

        def encode(model: SplitModel) -> list[Tensor]:
            tensors, _ = tree_flatten(model.encode(one.input))
            return [tensors[i] for i in one.cut]

        with torch.no_grad(), self.ambient:
            return aside(model, encode, {**self.shared, **moved}, one.random)


@dataclass(frozen=True)
class Lookahead:
    """Looks at the loss after the step that is being taken.

    Attributes:
        model: the network.
        tasks: its tasks.
        ambient: the precision of the forward pass.
        validation: the batch whose loss is to fall, or a function that gives it.
        optimizer: what will take the step.
    """

    model: SplitModel
    tasks: Sequence[Task]
    ambient: torch.autocast
    validation: Batch | Callable[[], Batch]
    optimizer: torch.optim.Optimizer

    def derivative(self, passes: Passes, weights: Tensor, part: Part, mode: Mode, among: Collection[int]) -> Tensor:
        """d(primaries' validation loss after the step)/d(weight) of the tasks `among`, zero for others ``[T]``."""
        governed = parameters_of(self.model, passes, part)
        found = combine(passes, Weights(weights, weights), ahead=True)
        groups = groups_of(self.optimizer, self.model)
        after, rates = {}, {}
        for name, p in governed.items():
            gradient = passes.unscaled(found.pop(p)) if p in found else None
            move = Move.of(p, gradient, self.optimizer, groups.get(id(p)))
            after[name], rates[name] = move.after, move.rate
        along = self._validation_gradient(passes, after)
        # One by one, since each of these is as large as the network.
        for name in along:
            along[name] = along[name] * rates[name]
        return -Trail.of(self.model, passes, self.ambient).slopes(self.model, along, mode, among).to(passes.losses[0])

    def _validation_gradient(self, passes: Passes, after: dict[str, Tensor]) -> dict[str, Tensor]:
        """∇ of the primaries' unweighted validation loss at the parameters `after` the step, over all processes.

        Empties `after`, which nobody needs beyond it.
        """
        primaries = [task for task in self.tasks if task.primary]
        batch = self.validation if isinstance(self.validation, Batch) else self.validation()
        leaves = {name: after.pop(name).detach().requires_grad_() for name in list(after)}

        def compute(model: SplitModel) -> list[Tensor | None]:
            losses, _ = losses_of(model, primaries, batch, {})
            total = torch.stack([loss.to(losses[0]) for loss in losses]).sum() * passes.scale.to(losses[0])
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
        trail: what the step before left behind, in copies of its own.
        rates: how far a unit of gradient moved each parameter in it, by name.
    """

    trail: Trail
    rates: dict[str, float]

    @classmethod
    def of(cls, trail: Trail, model: SplitModel, optimizer: torch.optim.Optimizer) -> Hindsight:
        """What to keep of a step until the next, before the optimizer changes parameters and the caller the batch."""
        groups = groups_of(optimizer, model)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        rates = {name: float(rate_of(p, optimizer, groups.get(id(p)))) for name, p in trained}
        return cls(
            Trail(
                {name: p.clone() for name, p in trail.shared.items()},
                trail.own,
                [replace(one, input=tree_map_only(Tensor, torch.clone, one.input)) for one in trail.encoded],
                trail.ambient,
            ),
            rates,
        )

    def derivative(
        self, model: SplitModel, tasks: Sequence[Task], passes: Passes, part: Part, mode: Mode, among: Collection[int]
    ) -> Tensor:
        """d(primaries' loss in this step)/d(weight in the step before) of `among`, zero for other tasks ``[T]``."""
        ones = torch.tensor([float(task.primary) for task in tasks]).to(passes.losses[0])
        found = combine(passes, Weights(ones, ones), ahead=True)
        # No step has these weights, so that nobody will ask for the gradient again.
        passes.ahead = None
        governed = parameters_of(model, passes, part)
        along = {
            name: passes.unscaled(found.pop(p)) * self.rates[name]
            for name, p in governed.items()
            if p in found and name in self.rates
        }
        return -self.trail.slopes(model, along, mode, among).to(passes.losses[0])


def parameters_of(model: SplitModel, passes: Passes, part: Part) -> dict[str, nn.Parameter]:
    """The trained parameters that a rule weighs the gradients of, by name."""
    shared = {id(p) for p in passes.shared}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p for name, p in trained.items() if part == "all" or (id(p) in shared) == (part == "shared")}


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten().to(torch.promote_types(x.dtype, torch.float32)) for x in tensors])


def _length(tensors: Iterable[Tensor]) -> Tensor:
    """The length of several tensors taken as one vector."""
    return torch.stack([torch.linalg.vector_norm(x.detach()).float() for x in tensors]).square().sum().sqrt()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten().to(a))


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
        if missing is None:
            raise
        raise NoForwardDerivative(missing.group(1)) from error
