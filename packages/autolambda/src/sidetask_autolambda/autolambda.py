"""Auto-λ: Liu, James, Davison, Johns, "Auto-λ: Disentangling dynamic task relationships", TMLR 2022."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from sidetask_core import BilevelWeighting, Method, Task
from sidetask_core.bilevel import When
from sidetask_core.signals import Mode
from torch import Tensor

Constraint = Literal["nonnegative", "softmax"] | Sequence[float] | None


class AutoLambda(BilevelWeighting):
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
        every: λ learns in each n-th step, counted by `Signals.iteration`; the others cost what fixed weights cost, but
            for the copies that ``"online"`` keeps of every step, and need no validation batch. 1 (the paper).
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

    >>> seg, depth, noise = (Task(name, loss=abs) for name in ("seg", "depth", "noise"))
    >>> rule = AutoLambda([seg, noise])
    >>> rule.weights.tolist()
    [0.1, 0.1]
    >>> rule.for_tasks([depth, seg]).tasks
    ('depth', 'seg')
    """

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
        softmax, (low, high) = constraint == "softmax", _bounds(constraint)
        if softmax and sample == 1:
            raise ValueError("constraint 'softmax' trades one task's weight for another's; sample must be at least 2")
        if isinstance(init, (int, float)) and not low <= init <= high:
            raise ValueError(f"init must be within [{low}, {high}], not {init}")
        super().__init__(
            tasks,
            lr=lr,
            init=1.0 if softmax else init,
            when=when,
            every=every,
            mode=mode,
            weight_decay=weight_decay,
            sample=sample,
            seed=seed,
        )
        self.softmax, self.low, self.high = softmax, low, high
        self.options = {
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

    def moved(self, derivative: Tensor) -> Tensor:
        """λ after Adam's step ``[T]``, within its constraint."""
        if not self.softmax:
            return super().moved(derivative).clamp(self.low, self.high)
        present = derivative.isfinite() & (derivative != 0)
        # With S the sum over those present, λ = S softmax(ℓ), so ∂λ_i/∂ℓ_j = λ_i (δ_ij − λ_j / S); ℓ = log λ is one
        # solution, and saves a state of its own. A λ that underflowed would have no way back.
        weights = self.weights.clamp(min=torch.finfo(self.weights.dtype).tiny)
        total = _sum(weights, present)
        slope = weights * (derivative - _sum(weights * derivative, present) / total)
        logits = self.adam(weights.log(), slope, present)
        shares = torch.where(present, logits, -torch.inf).softmax(dim=0)
        return torch.where(present, total * shares, self.weights)

    def renamed(self, weights: Tensor) -> Tensor:
        """Saved λ as they start among other tasks ``[T]``; under ``"softmax"`` they sum to T again."""
        return weights * (len(self.tasks) / weights.sum()) if self.softmax else weights


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
