"""What rules have in common that learn their weights from the loss after the step."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from sidetask_core.adam import Adam
from sidetask_core.method import Weighting
from sidetask_core.signals import Mode, Signals
from sidetask_core.task import Task, _listed

When = Literal["before", "after", "online"]
Rule = TypeVar("Rule", bound="BilevelWeighting")


class BilevelWeighting(Weighting):
    """Weights under which a step on the training losses lowers the primaries' validation loss most.

    The upper of two levels: the network learns from losses that are weighed, the weights from what that does to the
    unweighted validation loss of the primary tasks (Liu et al., "Auto-λ", TMLR 2022). The rule's own Adam moves its
    `weights` against the derivative that `Signals.lookahead` or `Signals.hindsight` gives.

    `when` says which step is looked at, and from when on the new weights hold:

    - ``"before"``: the step that would be taken now; it is then taken with the new weights.
    - ``"after"``: the same step, which is taken as it was looked at; the new weights hold from the next on.
    - ``"online"``: the previous step, judged by this batch's training loss before this step is taken with the new
      weights. No validation batch, and no pass over one.

    A task whose derivative is exactly zero, because it has no labels or is not drawn, or not finite, keeps its weight
    and moments. Weights and moments follow tasks by name, into a rule of other tasks or of another order.

    A subclass says by `applied` what of its weights the step takes, and by `moved` what Adam moves them along.

    Args:
        tasks: the tasks, at least one of them primary.
        lr: Adam's step size.
        init: first value of every weight.
        when: see above.
        every: weights are learned in each n-th step, counted by `Signals.iteration`; the others need no validation
            batch. With ``"online"`` every step still keeps for the next what `Signals.hindsight` keeps.
        mode: how the look ahead differentiates, see `Signals.lookahead`.
        weight_decay: of the weights, added to the derivative.
        sample: how many tasks, drawn each time, learn their weight; all if None.
        seed: seeds the draws.

    Attributes:
        weights: what is learned ``[T]``.
        by_task: the other tensors ``[T]`` of the state, and where a new task starts in them.

    Raises:
        ValueError: for an option that is out of its range, or if no task is primary.
    """

    weights: Tensor

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        lr: float,
        init: float,
        when: When,
        every: int,
        mode: Mode,
        weight_decay: float = 0.0,
        sample: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(tasks, seed=seed)
        if not any(self.primary):
            raise ValueError(
                "no task is primary, so there is no validation loss to lower; "
                f"the tasks are: {_listed(self.tasks)}, all with primary=False"
            )
        for option, value, known in (("when", when, get_args(When)), ("mode", mode, get_args(Mode))):
            if value not in known:
                raise ValueError(f"{option} must be one of {_listed(known)}; not {value!r}")
        for option, count in (("every", every), ("sample", 1 if sample is None else sample)):
            if type(count) is not int or count < 1:
                raise ValueError(f"{option} must be a whole number of at least 1, not {count!r}")
        if sample is not None and sample > len(self.tasks):
            raise ValueError(f"sample must be at most the number of tasks, {len(self.tasks)}, not {sample}")
        for option, number in (("lr", lr), ("init", init), ("weight_decay", weight_decay)):
            if not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"{option} must be a finite number, not {number!r}")
        self.when, self.every, self.mode, self.sample, self.start = when, every, mode, sample, float(init)
        self.adam = Adam(len(self.tasks), lr=lr, weight_decay=weight_decay)
        self.register_buffer("weights", torch.full((len(self.tasks),), self.start, dtype=torch.float64))
        self.by_task = {"adam.first": 0.0, "adam.second": 0.0, "adam.updates": 0.0}
        self.register_load_state_dict_pre_hook(_by_name)
        self.options: dict[str, Any] = {}

    def forward(self, signals: Signals) -> Tensor:
        """The weights that the step takes ``[T]``."""
        learns = not signals.iteration % self.every
        among = self._drawn() if learns else None
        if self.when == "online":
            derivative = signals.hindsight(mode=self.mode, among=among) if learns else None
            if derivative is not None:
                self.weights = self.moved(derivative.to(self.weights))
            return self.applied(signals)
        # The step saves a pass if it gets the very tensor that was looked ahead with.
        now = self.applied(signals)
        if not learns:
            return now
        derivative = signals.lookahead(now, mode=self.mode, among=among, taken=self.when == "after")
        self.weights = self.moved(derivative.to(self.weights))
        return now if self.when == "after" else self.applied(signals)

    def applied(self, signals: Signals) -> Tensor:
        """What a step takes of the weights ``[T]``, in the losses' type."""
        return self.weights.to(signals.losses)

    def moved(self, derivative: Tensor) -> Tensor:
        """The weights after Adam's step ``[T]``, from the derivative by what was applied last."""
        return self.adam(self.weights, derivative, derivative.isfinite() & (derivative != 0))

    def renamed(self, weights: Tensor) -> Tensor:
        """Saved weights as they start among other tasks ``[T]``."""
        return weights

    def _drawn(self) -> list[str] | None:
        if self.sample is None:
            return None
        order = torch.randperm(len(self.tasks), generator=self.generator).tolist()
        return [self.tasks[t] for t in order[: self.sample]]

    def for_tasks(self: Rule, tasks: Sequence[Task]) -> Rule:
        """The rule of a run that goes on with other tasks: same options, weights and moments by name."""
        rule = type(self)(tasks, **self.options)
        rule.load_state_dict(self.state_dict())
        return rule.to(self.weights)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a saved generator; whatever goes by tasks has been put into their order before."""
        self.generator.set_state(state["generator"].cpu())


def _by_name(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: object) -> None:
    """Put the entries of a state that is about to be loaded into the order of the rule's tasks."""
    assert isinstance(module, BilevelWeighting)
    extra = state.get(f"{prefix}_extra_state")
    if extra is None or tuple(extra["tasks"]) == module.tasks:
        return
    kept = [name for name in module.tasks if name in extra["tasks"]]
    here, there = [module.tasks.index(name) for name in kept], [extra["tasks"].index(name) for name in kept]
    for name, start in {"weights": module.start, **module.by_task}.items():
        if f"{prefix}{name}" in state:
            saved = state[f"{prefix}{name}"]
            entries = saved.new_full((len(module.tasks),), start)
            entries[here] = saved[there]
            state[f"{prefix}{name}"] = module.renamed(entries) if name == "weights" else entries
