"""Optimizers and learning-rate schedules of the configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from sidetask_bench.config import SGD, Adam, AdamW, Constant, Cosine, Poly, StepDecay


def make_optimizer(
    config: SGD | Adam | AdamW, model: Iterable[nn.Parameter], rules: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer over a model's parameters and those of rules, which are never decayed.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> make_optimizer(Adam(lr=0.01), [weight]).param_groups[0]["lr"]
    0.01
    """
    groups = [{"params": list(model)}]
    if rules := list(rules):
        groups.append({"params": rules, "weight_decay": 0.0})  # type: ignore[dict-item]
    if isinstance(config, SGD):
        return torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
    kind = torch.optim.Adam if isinstance(config, Adam) else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def learning_rate_factor(
    schedule: Constant | Cosine | Poly | StepDecay, epoch: int, step: int, steps: int, epochs: int
) -> float:
    """What the base learning rate is multiplied by in one step; a function of the position, hence without state.

    Args:
        schedule: which one.
        epoch: from 0.
        step: of `steps` in this epoch, from 0.
        steps: optimizer steps in an epoch.
        epochs: epochs in all.

    >>> [round(learning_rate_factor(Cosine(), epoch, 0, 10, 4), 3) for epoch in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    >>> [learning_rate_factor(StepDecay(every=2), epoch, 0, 10, 4) for epoch in range(4)]
    [1.0, 1.0, 0.5, 0.5]
    """
    passed = epoch + (step / steps if getattr(schedule, "per", "epoch") == "step" else 0.0)
    factor = 1.0
    if isinstance(schedule, Cosine):
        factor = schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * passed / epochs)) / 2
    elif isinstance(schedule, Poly):
        factor = (1 - passed / epochs) ** schedule.power
    elif isinstance(schedule, StepDecay):
        drops = epoch // schedule.every if schedule.every else sum(epoch >= at for at in schedule.at)
        factor = schedule.factor**drops
    if schedule.warmup:
        factor *= min(1.0, (epoch + (step + 1) / steps) / schedule.warmup)
    return factor
