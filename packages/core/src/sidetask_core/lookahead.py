"""How the loss after a step depends on the weight that each task had in it."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten

from sidetask_core import parallel
from sidetask_core.aside import aside
from sidetask_core.combine import Weights, combine
from sidetask_core.passes import Domain, Passes, losses_of
from sidetask_core.signals import Mode, Part
from sidetask_core.split import SplitModel
from sidetask_core.task import Batch, Task

Direction = Mapping[nn.Parameter, Tensor]


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
    def of(cls, parameter: nn.Parameter, gradient: Tensor | None, optimizer: torch.optim.Optimizer) -> Move:
        """The move of `parameter`, which stays where it is without a gradient or beyond the optimizer's groups."""
        here = parameter.detach()
        group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)
        if gradient is None or group is None:
            return cls(here, 0.0)
        if group.get("maximize"):
            raise ValueError("the optimizer maximizes; a lookahead is for losses that are minimized")
        step, rate = gradient + group.get("weight_decay", 0.0) * here, 1.0
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
            momentum, velocity = group["momentum"], optimizer.state.get(parameter, {}).get("momentum_buffer")
            if velocity is not None:
                rate = 1.0 - group["dampening"]
                velocity = momentum * velocity + rate * step
            else:
                velocity = step
            step, rate = (step + momentum * velocity, 1 + momentum * rate) if group["nesterov"] else (velocity, rate)
        return cls(here - group["lr"] * step, group["lr"] * rate)


@dataclass(frozen=True)
class Lookahead:
    """Looks at the loss after the step that is being taken.

    Attributes:
        model: the network.
        tasks: its tasks.
        batch: the training batch.
        shapers: task name to what weighs its elements.
        ambient: the precision of the forward pass.
        validation: the batch whose loss is to fall.
        optimizer: what will take the step.
    """

    model: SplitModel
    tasks: Sequence[Task]
    batch: Batch
    shapers: Mapping[str, nn.Module]
    ambient: torch.autocast
    validation: Batch
    optimizer: torch.optim.Optimizer

    def derivative(self, passes: Passes, weights: Tensor, part: Part, mode: Mode, among: Collection[int]) -> Tensor:
        """d(primaries' validation loss after the step)/d(weight) of the tasks `among`, zero for others ``[T]``."""
        shared = {id(p) for p in passes.shared}
        governed = [p for p in passes.trainable if part == "all" or (id(p) in shared) == (part == "shared")]
        found = combine(passes, Weights(weights, weights), ahead=True)
        moves = [
            Move.of(p, None if (g := found.get(p)) is None else g / passes.scale.to(g), self.optimizer)
            for p in governed
        ]
        slopes = self._validation_gradient(passes.scale, governed, [move.after for move in moves])
        direction = {p: v * m.rate for p, v, m in zip(governed, slopes, moves, strict=True) if v is not None}
        if mode == "exact":
            return -self._exact(passes, direction, among)
        return -self._difference(passes, direction, among, central=mode == "difference")

    def _validation_gradient(
        self, scale: Tensor, parameters: Sequence[nn.Parameter], after: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """∇ of the primaries' unweighted validation loss at the parameters after the step, over all processes."""
        primaries = [task for task in self.tasks if task.primary]
        leaves = [tensor.clone().requires_grad_() for tensor in after]

        def compute(model: SplitModel) -> list[Tensor | None]:
            losses, _ = losses_of(model, primaries, self.validation, {})
            total = torch.stack([loss.to(losses[0]) for loss in losses]).sum() * scale.to(losses[0])
            if not total.requires_grad or not leaves:
                return [None] * len(leaves)
            return list(torch.autograd.grad(total, leaves, allow_unused=True))

        with torch.enable_grad(), self.ambient:
            found = aside(self.model, compute, self._by_name(dict(zip(parameters, leaves, strict=True))))
        summed = parallel.add_gradients(parameters, found)
        return [None if g is None else g / scale.to(g) for g in summed]

    def _exact(self, passes: Passes, direction: Direction, among: Collection[int]) -> Tensor:
        """⟨direction, ∇L_t⟩ of every task: dot products with gradients that the step has computed anyway.

        Below the cut they are those of branches and heads. Above it, moving the encoder along the direction moves the
        features by one directional derivative, and that movement meets each task's gradient at the features.
        """
        inner = [torch.zeros_like(passes.losses[0].detach()) for _ in self.tasks]
        domains = [domain for domain in passes.domains if not set(domain.tasks).isdisjoint(among)]
        for domain, moved in zip(domains, self._moved_features(passes, direction, domains), strict=True):
            for t, at_features in zip(domain.tasks, passes.feature_gradients(domain), strict=True):
                if t not in among:
                    continue
                own, _ = passes.head(t, keep=True)
                pairs = list(zip(passes.own[t], own, strict=True))
                branch = passes.branch_of[t]
                if branch is not None:
                    pairs += zip(branch.parameters, branch.gradients[t], strict=True)
                for parameter, gradient in pairs:
                    if gradient is not None and parameter in direction:
                        inner[t] = inner[t] + _dot(direction[parameter], gradient / passes.scale.to(gradient))
                if moved is not None:
                    inner[t] = inner[t] + _dot(moved, at_features)
        return parallel.add(torch.stack(inner))

    def _moved_features(
        self, passes: Passes, direction: Direction, domains: Sequence[Domain]
    ) -> Iterator[Tensor | None]:
        """The derivative of each domain's features along the direction, flattened; None if they do not move."""
        _load_forward_mode()
        above = {p: direction[p] for p in passes.shared if p in direction}
        for domain in domains:
            if not above or not domain.cut.below:
                yield None
                continue
            with forward_ad.dual_level(), _named_missing_derivative(), self.ambient:
                duals = {p: forward_ad.make_dual(p.detach(), u.to(p)) for p, u in above.items()}
                encode = _Encode(domain)
                tensors = aside(self.model, encode, self._by_name(duals), domain.random)
                parts = [forward_ad.unpack_dual(x) for x in tensors]
                flat = [(torch.zeros_like(x) if dx is None else dx).flatten() for x, dx in parts]
            yield torch.cat([x.to(torch.promote_types(x.dtype, torch.float32)) for x in flat])

    def _difference(self, passes: Passes, direction: Direction, among: Collection[int], central: bool) -> Tensor:
        """⟨direction, ∇L_t⟩ from losses alone, of parameters displaced along the direction.

        The displacement is ε^⅔ times as long as the parameters, ε the precision of the losses. A fixed length, as in
        Auto-λ's code (0.01), lies across kinks of ReLU and max-pooling, whose error no precision mends.
        """
        chosen = torch.tensor([t in among for t in range(len(self.tasks))], device=passes.scale.device)
        length = _length(direction.values(), passes.scale)
        precision = torch.finfo(self.ambient.fast_dtype if self.ambient._enabled else passes.losses[0].dtype).eps
        step = (
            precision ** (2 / 3) * _length(direction, passes.scale) / length.clamp(min=torch.finfo(length.dtype).tiny)
        )

        def displaced(sign: int) -> Tensor:
            moved = {p: p + sign * step.to(p) * u.to(p) for p, u in direction.items()}
            with self.ambient:
                losses, _ = aside(
                    self.model,
                    lambda model: losses_of(model, self.tasks, self.batch, self.shapers),
                    self._by_name(moved),
                    passes.domains[0].random,
                )
            return parallel.add(torch.stack([loss.to(passes.losses[0]) for loss in losses]))

        with torch.no_grad():
            here = (
                None
                if central
                else parallel.add(torch.stack([loss.detach().to(passes.losses[0]) for loss in passes.losses]))
            )
            rise = displaced(1) - (displaced(-1) if here is None else here)
            slope = rise / (step * (2 if central else 1))
        # Where nothing moves, or nothing can be told from rounding, there is no slope.
        return torch.where(chosen & (length > 0), slope, 0.0)

    def _by_name(self, tensors: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[p] for name, p in self.model.named_parameters() if p in tensors}


class _Encode:
    """Encodes a domain's input and picks the tensors that were cut."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain

    def __call__(self, model: SplitModel) -> list[Tensor]:
        tensors, _ = tree_flatten(model.encode(self.domain.input))
        return [tensors[i] for i in self.domain.cut.places]


def _length(tensors: Collection[Tensor], like: Tensor) -> Tensor:
    """The length of several tensors taken as one vector."""
    squares = [_dot(x.detach(), x.detach()).to(like) for x in tensors]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros_like(like)


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
