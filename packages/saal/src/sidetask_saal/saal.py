"""SAAL-e, SAAL-w and SAAL-ew: Graffeuille, Koh, Wicker, Lehmann, 2024 (arXiv 2410.15875)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal

import torch
from sidetask_core import BilevelWeighting, Method, Signals, Task, Weighting
from sidetask_core.bilevel import When
from sidetask_core.signals import Mode
from torch import Tensor

from sidetask_saal.auxiliaries import SelfAuxiliaries, Windows
from sidetask_saal.names import ends, routed
from sidetask_saal.relations import Relations
from sidetask_saal.shares import Normalization, Shares

Chosen = Sequence[str] | Literal["all"]


class ChosenTransfers(Weighting):
    """Coefficient one for every task and every transfer (SAAL-e), normalised.

    Args:
        tasks: the given tasks and the transfers between them, as `SelfAuxiliaries.extended` says them.
        normalization: see `Shares`.
        route: task name to branch name, of tasks that share a branch.
    """

    def __init__(
        self, tasks: Sequence[Task], *, normalization: Normalization = "target", route: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(tasks)
        self.shares = Shares(tasks, normalization, route)

    def forward(self, signals: Signals) -> Tensor:
        """The weights ``[T]``."""
        ones = torch.ones_like(self.shares.given)
        return self.shares(ones, *_there(signals, ones.device)).to(signals.losses)


class LearnedTransfers(BilevelWeighting):
    """Learn a coefficient for every task and every transfer from the primaries' validation loss (SAAL-w).

    The network takes steps on Σ_t w_t L_t + Σ_{s→t} w_{s→t} L_{s→t}, the weights w being the normalised coefficients ω.
    Adam moves ω against the derivative of the primaries' unweighted validation loss after such a step, through the
    normalisation: a transfer whose gradient, on the branch it rides and on the shared layers, agrees with the
    validation gradient gains beside the others that train that branch. See `sidetask_core.BilevelWeighting` for when,
    and for what tasks without labels do.

    Args:
        tasks: the given tasks and the transfers between them, as `SelfAuxiliaries.extended` says them.
        lr: Adam's step size; 1e-4 (the paper).
        init: first value of every ω; 0.1 (the paper). Not 0, unless normalization is ``"none"``.
        when: ``"before"`` (the paper), ``"after"`` or ``"online"``.
        every: ω learns in each n-th step; 1 (the paper).
        mode: how `Signals.lookahead` differentiates.
        normalization: see `Shares`.
        route: task name to branch name, of tasks that share a branch.

    Raises:
        ValueError: for an option that is out of its range, or if no task is primary.
    """

    present: Tensor
    on: Tensor

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        lr: float = 1e-4,
        init: float = 0.1,
        when: When = "before",
        every: int = 1,
        mode: Mode = "exact",
        normalization: Normalization = "target",
        route: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(tasks, lr=lr, init=init, when=when, every=every, mode=mode)
        if init == 0 and normalization != "none":
            raise ValueError("init must not be 0: shares of nothing have no derivative, and nothing would ever learn")
        self.shares = Shares(tasks, normalization, route)
        # Hindsight is about the step before, in which other tasks may have been there.
        self.register_buffer("present", torch.zeros(len(self.tasks), dtype=torch.bool))
        self.register_buffer("on", torch.zeros(len(self.tasks), dtype=torch.bool))
        self.by_task |= {"present": False, "on": False}
        self.options = {
            "lr": lr,
            "init": init,
            "when": when,
            "every": every,
            "mode": mode,
            "normalization": normalization,
            "route": route,
        }

    def applied(self, signals: Signals) -> Tensor:
        """The normalised coefficients ``[T]``."""
        self.present, self.on = _there(signals, self.weights.device)
        return self.shares(self.weights, self.present, self.on).to(signals.losses)

    def named_weights(self) -> Mapping[str, Tensor]:
        """The coefficients ω, of which the step's weights are shares."""
        return dict(zip(self.tasks, self.weights.clone().unbind(), strict=True))

    def moved(self, derivative: Tensor) -> Tensor:
        """ω after Adam's step ``[T]``."""
        return super().moved(self.shares.pull_back(derivative, self.weights, self.present, self.on))


def saal_e(
    tasks: Sequence[Task],
    *,
    transfers: Chosen | None = None,
    relations: str | PathLike[str] | None = None,
    normalization: Normalization = "target",
    route: Mapping[str, str] | None = None,
    schedule: Mapping[str, Windows] | None = None,
    schedule_by: Literal["iteration", "epoch"] = "iteration",
    seed: int | None = None,
) -> Method:
    """SAAL-e: self-auxiliaries for the transfers that help, all with coefficient one.

    Args:
        tasks: the tasks.
        transfers: the transfers, ``["seg->depth", ...]``.
        relations: instead, a file that `sidetask_saal.Relations.save` wrote: the transfers that it found to help.
        normalization: see `Shares`.
        route: see `SelfAuxiliaries`.
        schedule: see `SelfAuxiliaries`.
        schedule_by: see `SelfAuxiliaries`.
        seed: see `SelfAuxiliaries`.

    Raises:
        ValueError: unless exactly one of `transfers` and `relations` is given; for relations of other tasks.
    """
    auxiliaries, tasks = _augmented(
        tasks, _chosen(tasks, transfers, relations, route), route, schedule, schedule_by, seed
    )
    rule = ChosenTransfers(tasks, normalization=normalization, route=route)
    return Method(augment=auxiliaries, encoder=rule, decoder=rule)


def saal_w(
    tasks: Sequence[Task],
    *,
    transfers: Chosen = "all",
    lr: float = 1e-4,
    init: float = 0.1,
    when: When = "before",
    every: int = 1,
    mode: Mode = "exact",
    normalization: Normalization = "target",
    route: Mapping[str, str] | None = None,
    schedule: Mapping[str, Windows] | None = None,
    schedule_by: Literal["iteration", "epoch"] = "iteration",
    seed: int | None = None,
) -> Method:
    """SAAL-w: self-auxiliaries for all transfers, with coefficients that are learned.

    See `LearnedTransfers` and `SelfAuxiliaries` for the options.
    """
    auxiliaries, tasks = _augmented(tasks, transfers, route, schedule, schedule_by, seed)
    rule = LearnedTransfers(
        tasks, lr=lr, init=init, when=when, every=every, mode=mode, normalization=normalization, route=route
    )
    return Method(augment=auxiliaries, encoder=rule, decoder=rule)


def saal_ew(
    tasks: Sequence[Task],
    *,
    transfers: Chosen | None = None,
    relations: str | PathLike[str] | None = None,
    lr: float = 1e-4,
    init: float = 0.1,
    when: When = "before",
    every: int = 1,
    mode: Mode = "exact",
    normalization: Normalization = "target",
    route: Mapping[str, str] | None = None,
    schedule: Mapping[str, Windows] | None = None,
    schedule_by: Literal["iteration", "epoch"] = "iteration",
    seed: int | None = None,
) -> Method:
    """SAAL-ew: coefficients that are learned, of the transfers that help; no others are built.

    Those of SAAL-w times those of SAAL-e, which are one or zero. See `saal_e` for how transfers are chosen, and
    `LearnedTransfers` and `SelfAuxiliaries` for the other options.
    """
    return saal_w(
        tasks,
        transfers=_chosen(tasks, transfers, relations, route),
        lr=lr,
        init=init,
        when=when,
        every=every,
        mode=mode,
        normalization=normalization,
        route=route,
        schedule=schedule,
        schedule_by=schedule_by,
        seed=seed,
    )


def _there(signals: Signals, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which tasks have labels, and which are not switched off, ``[T]`` each."""
    return signals.labelled.to(device, non_blocking=True), (~signals.resting).to(device, non_blocking=True)


def _chosen(
    tasks: Sequence[Task],
    transfers: Chosen | None,
    relations: str | PathLike[str] | None,
    route: Mapping[str, str] | None,
) -> Chosen:
    if (transfers is None) == (relations is None):
        raise ValueError("give either transfers: [source->target, ...] or relations: a file of enumerated relations")
    if relations is None:
        assert transfers is not None
        return transfers
    names = [task.name for task in tasks if ends(task.name) is None]
    found = Relations.load(relations).chosen(names)
    # What tasks of one branch give each other, they give without a transfer.
    branches = routed(names, route)
    return [name for name in found if (pair := ends(name)) and branches[pair[0]] != branches[pair[1]]]


def _augmented(
    tasks: Sequence[Task],
    transfers: Chosen,
    route: Mapping[str, str] | None,
    schedule: Mapping[str, Windows] | None,
    schedule_by: Literal["iteration", "epoch"],
    seed: int | None,
) -> tuple[SelfAuxiliaries | None, Sequence[Task]]:
    """Self-auxiliaries and the tasks with them; tasks that have some already stay as they are."""
    if any(ends(task.name) for task in tasks):
        return None, tasks
    auxiliaries = SelfAuxiliaries(tasks, transfers, route=route, schedule=schedule, schedule_by=schedule_by, seed=seed)
    return auxiliaries, auxiliaries.extended(tasks)
