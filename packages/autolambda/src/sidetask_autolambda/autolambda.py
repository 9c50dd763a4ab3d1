"""Auto-λ: Liu, James, Davison, Johns, "Auto-λ: Disentangling dynamic task relationships", TMLR 2022."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any, Literal, get_args

import torch
from sidetask_core import Method, Signals, Task, Weighting
from sidetask_core.adam import Adam
from sidetask_core.signals import Mode
from torch import Tensor, nn

When = Literal["before", "after", "online"]
Constraint = Literal["nonnegative", "softmax"] | Sequence[float] | None


class AutoLambda(Weighting):
    """Learn the weights under which a step on the training losses lowers the validation loss most.

    The network takes steps on Σ_t λ_t L_t. After one with learning rate α from θ to θ', the primary tasks' unweighted
    validation loss has the slope

        ∂L_val(θ') / ∂λ_t = −α ⟨∇L_val(θ'), ∇L_t(θ)⟩,

    against which the rule's own Adam moves λ: a task whose gradient agrees with the validation gradient gains, one that
    opposes it loses. With all tasks primary this is multi-task learning, with some of them auxiliary learning. The
    parameters that take part are those that λ weighs: as encoder rule beside another decoder rule, the shared ones.

    `when` says which step is looked at, and from when on the new λ holds:

    - ``"before"``, the paper: the step that would be taken now; it is then taken with the new λ.
    - ``"after"``: the same step, which is taken as it was looked at; the new λ holds from the next on. One encoder
      backward pass less.
    - ``"online"``: the previous step, judged by this batch's training loss before this step is taken with the new λ.
      No validation batch, and no pass over one.

    A task whose derivative is exactly zero, because it has no labels or is not drawn, or not finite, keeps λ and
    moments. λ = 1 for every task is the plain sum of losses: at 0.1, the paper's start, the gradient is a tenth of
    that, and under plain SGD so is the step. Unconstrained, the sum of λ is learned with the rest, and is a learning
    rate too; ``constraint="softmax"`` keeps it at T. Adam's step does not depend on the length of the derivative, so
    that multiplying one task's loss does not divide its λ; multiplying all losses and dividing α by as much changes
    nothing.

    Args:
        tasks: the tasks, at least one of them primary.
        lr: Adam's step size; 1e-4 (the paper, NYUv2; 3e-5 on Cityscapes, 3e-4 on CIFAR-100).
        init: first value of every λ; 0.1 (the paper). Under ``"softmax"`` every λ starts at 1 instead.
        when: see above; ``"before"`` (the paper).
        every: λ learns in each n-th step, counted by `Signals.iteration`; the others cost what fixed weights cost, and
            need no validation batch. 1 (the paper).
        mode: how `Signals.lookahead` differentiates: ``"exact"``; ``"difference"`` or ``"one-sided"`` where an operator
            of the encoder has no forward-mode derivative.
        constraint: None (the paper); ``"nonnegative"``; a pair of bounds; all of these by cutting off after Adam's
            step; or ``"softmax"``, λ = T softmax(ℓ), where ℓ = log λ is what Adam moves. Tasks that are absent keep
            their λ there too, the others share the rest.
        weight_decay: of λ, or of log λ under ``"softmax"``, added to the derivative; 0 (the paper).
        sample: how many tasks, drawn each time, learn their λ; all if None. Tasks with an input of their own are
            encoded once more only if they are drawn.
        seed: seeds the draws.

    Raises:
        ValueError: for an option that is out of its range, or if no task is primary.

    A state of other tasks, or of another order, is taken over by name: a task that is new starts at `init` (1 under
    ``"softmax"``) without moments, one that is gone is forgotten.

    >>> rule = AutoLambda([Task("seg", loss=abs), Task("depth", loss=abs, primary=False)])
    >>> rule.weights.tolist()
    [0.1, 0.1]
    """

    weights: Tensor

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        lr: float = 1e-4,
        init: float = 0.1,
        when: When = "before",
        every: int = 1,
        mode: Mode = "exact",
        constraint: Constraint = None,
        weight_decay: float = 0.0,
        sample: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(tasks, seed=seed)
        if not any(self.primary):
            raise ValueError(
                "no task is primary, so there is no validation loss to lower; "
                f"the tasks are: {', '.join(self.tasks)}, all with primary=False"
            )
        for option, value, known in (("when", when, get_args(When)), ("mode", mode, get_args(Mode))):
            if value not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}; not {value!r}")
        for option, count in (("every", every), ("sample", 1 if sample is None else sample)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{option} must be a whole number of at least 1, not {count!r}")
        self.softmax = constraint == "softmax"
        if self.softmax and sample == 1:
            raise ValueError("constraint 'softmax' trades one task's weight for another's; sample must be at least 2")
        self.low, self.high = _bounds(constraint)
        if not math.isfinite(init) or not self.low <= init <= self.high:
            raise ValueError(f"init must be finite and within [{self.low}, {self.high}], not {init}")
        self.when, self.every, self.mode, self.sample = when, every, mode, sample
        self.start = 1.0 if self.softmax else float(init)
        self.adam = Adam(len(self.tasks), lr=lr, weight_decay=weight_decay)
        self.register_buffer("weights", torch.full((len(self.tasks),), self.start, dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_by_name)
        self._options: dict[str, Any] = {
            "lr": lr,
            "init": init,
            "when": when,
            "every": every,
            "mode": mode,
            "constraint": constraint,
            "weight_decay": weight_decay,
            "sample": sample,
            "seed": seed,
        }

    def forward(self, signals: Signals) -> Tensor:
        """λ ``[T]``."""
        # The step saves a pass if it gets the very tensor that was looked ahead with.
        now = self.weights.to(signals.losses)
        if signals.iteration % self.every:
            return now
        among = None
        if self.sample is not None:
            order = torch.randperm(len(self.tasks), generator=self.generator).tolist()
            among = [self.tasks[t] for t in order[: self.sample]]
        if self.when == "online":
            derivative = signals.hindsight(mode=self.mode, among=among)
        else:
            derivative = signals.lookahead(now, mode=self.mode, among=among)
        if derivative is not None:
            self.weights = self._moved(derivative.to(self.weights))
        return now if self.when == "after" else self.weights.to(signals.losses)

    def _moved(self, derivative: Tensor) -> Tensor:
        """λ after Adam's step ``[T]``, within its constraint."""
        present = derivative.isfinite() & (derivative != 0)
        if not self.softmax:
            return self.adam(self.weights, derivative, present).clamp(self.low, self.high)
        # With S the sum over those present, λ = S softmax(ℓ), so ∂λ_i/∂ℓ_j = λ_i (δ_ij − λ_j / S); ℓ = log λ is one
        # solution, and saves a state of its own. A λ that underflowed would have no way back.
        weights = self.weights.clamp(min=torch.finfo(self.weights.dtype).tiny)
        total = _sum(weights, present)
        slope = weights * (derivative - _sum(weights * derivative, present) / total)
        logits = self.adam(weights.log(), slope, present)
        shares = torch.where(present, logits, -torch.inf).softmax(dim=0)
        return torch.where(present, total * shares, self.weights)

    def for_tasks(self, tasks: Sequence[Task]) -> AutoLambda:
        """The rule of a run that goes on with other tasks: same options, λ and moments by name.

        >>> seg, depth, noise = (Task(name, loss=abs) for name in ("seg", "depth", "noise"))
        >>> AutoLambda([seg, noise]).for_tasks([depth, seg]).tasks
        ('depth', 'seg')
        """
        rule = AutoLambda(tasks, **self._options)
        rule.load_state_dict(self.state_dict())
        return rule.to(self.weights)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a saved generator; whatever goes by tasks has been put into their order before."""
        self.generator.set_state(state["generator"].cpu())


def _by_name(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: object) -> None:
    """Put the entries of a state that is about to be loaded into the order of the rule's tasks."""
    assert isinstance(module, AutoLambda)
    extra = state.get(f"{prefix}_extra_state")
    if extra is None or tuple(extra["tasks"]) == module.tasks:
        return
    kept = [name for name in module.tasks if name in extra["tasks"]]
    here, there = [module.tasks.index(name) for name in kept], [extra["tasks"].index(name) for name in kept]
    for name, start in (("weights", module.start), ("adam.first", 0.0), ("adam.second", 0.0), ("adam.updates", 0.0)):
        if f"{prefix}{name}" in state:
            saved = state[f"{prefix}{name}"]
            entries = saved.new_full((len(module.tasks),), start)
            entries[here] = saved[there]
            if name == "weights" and module.softmax:
                entries *= len(module.tasks) / entries.sum()
            state[f"{prefix}{name}"] = entries


def _bounds(constraint: Constraint) -> tuple[float, float]:
    """The least and the greatest λ."""
    if constraint is None or constraint == "softmax":
        return -math.inf, math.inf
    if constraint == "nonnegative":
        return 0.0, math.inf
    if isinstance(constraint, str) or not isinstance(constraint, Sequence) or len(constraint) != 2:
        raise ValueError(f"constraint must be 'nonnegative', 'softmax' or a pair of bounds, not {constraint!r}")
    low, high = [float(bound) for bound in constraint]
    if not low < high:
        raise ValueError(f"the bounds of a constraint must be in ascending order, not {constraint!r}")
    return low, high


def _sum(values: Tensor, among: Tensor) -> Tensor:
    return torch.where(among, values, 0.0).sum()


def autolambda(
    tasks: Sequence[Task],
    *,
    lr: float = 1e-4,
    init: float = 0.1,
    when: When = "before",
    every: int = 1,
    mode: Mode = "exact",
    constraint: Constraint = None,
    weight_decay: float = 0.0,
    sample: int | None = None,
    seed: int = 0,
) -> Method:
    """Auto-λ above and below the cut, as in the paper, whose weighted sum of losses trains all parameters.

    ``Method(encoder=AutoLambda(tasks), decoder=another_rule)`` weighs the shared parameters' gradients, and looks at no
    others.
    """
    rule = AutoLambda(
        tasks,
        lr=lr,
        init=init,
        when=when,
        every=every,
        mode=mode,
        constraint=constraint,
        weight_decay=weight_decay,
        sample=sample,
        seed=seed,
    )
    return Method(encoder=rule, decoder=rule)
