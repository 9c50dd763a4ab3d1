"""The step that an optimizer is about to take, as a function of its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidetask_core.split import SplitModel

Group = dict[str, Any]


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


def _plus(a: Tensor, factor: float | Tensor, b: Tensor) -> Tensor:
    """Give a + factor · b, in one pass over the memory unless the factor is a tensor, which would be waited for."""
    return a + factor * b if isinstance(factor, Tensor) else torch.add(a, b, alpha=factor)
