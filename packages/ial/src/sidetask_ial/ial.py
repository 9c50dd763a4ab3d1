"""IAL: Li, Feng, Wang, Yang, Zuo, "Unprejudiced training auxiliary tasks makes primary better", 2024, arXiv 2412.19547.

Below the cut, every task is trained impartially, by the uncertainty weighting that core brings; above it, the primary
task stays in charge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from sidetask_core import FrozenHeads, Method, MissingKey, Signals, Task, Uncertain, Uncertainty, Weighting
from torch import Tensor
from torch.nn import functional

Name = Literal["uncertainty", "speed", "norm", "cosine"]
Measure = Name | float | Mapping[str, float] | Callable[[Signals], Tensor]
Activation = Literal["relu", "softplus", "sigmoid"] | Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "softplus": functional.softplus,
    "sigmoid": torch.sigmoid,
}
# How much of the running mean of a gradient's norm stays in each step.
_DECAY = 0.99


class ImpartialEncoder(Weighting):
    """Bring every auxiliary gradient to the primary's length, then shorten it by how well its task is learned.

    With g_t the gradients of the raw losses at the shared features, and g_pri that of the primaries' sum, the encoder
    gets

        g_pri + Σ_t f(σ_t) · (‖g_pri‖ / ‖g_t‖) · g_t over the auxiliary tasks,   f(σ) = min(1, g(1 − σ)),

    so that no auxiliary gradient is longer than the primary's, and one that is not known yet (σ ≥ 1) is not followed.
    σ_t² settles at the task's loss: unlike the alignment, f knows the unit of a loss. The σ are those of a rule that
    learns them, of a decoder rule that has a `sigma` (`sidetask_core.Uncertain`), or its own.

    Norms are over all elements of the features and all processes. They come from one plain backward pass; only
    ``measure="cosine"`` reads inner products besides. An auxiliary task whose gradient is zero, or which has no labels
    in a batch, gets weight 0. If the primaries' gradient is zero, or they have no labels, so do all auxiliary tasks;
    without alignment, where only labels are looked at, if they have no labels. The device is never waited for.

    Args:
        tasks: the tasks, at least one of them primary.
        measure: what stands for f(σ_t):

            - ``"uncertainty"``, the paper;
            - a number for all auxiliary tasks, or one for each by name: fixed. With 1, gradient norms alone decide;
            - ``"speed"``: min(1, r_pri / r_t), where r is the loss divided by the task's first positive one. A task
              gets less while it lags behind the primaries' sum;
            - ``"norm"``: min(1, n_pri / n_t), where n is the running mean of the gradient's norm, over about the last
              hundred steps with labels. A task whose gradients are expected to be longer than the primary's gets less,
              so that, unlike the others, this measure depends on the units of the losses;
            - ``"cosine"``: max(0, cos(g_t, g_pri));
            - a function of the signals that gives ``[T]``, floating; cut to 0 and 1, and 0 for what is not a number.

            The paper compares the first with measures of these kinds, of which it is not known here how they were
            written; these are ours.
        align: whether the auxiliaries' gradients are brought to the primary's length; True (the paper). With False,
            the measure alone weighs the raw gradients.
        activation: g, which the paper leaves open; ``"relu"``, ``"softplus"``, ``"sigmoid"``, or a function of 1 − σ
            ``[T]``; what it gives is cut as that of a function of the signals.
        init: first value of log σ² of a rule of its own; −0.7, as in `Uncertainty`.
        uncertainty: the rule that learns σ; one of its own if None. Read by ``measure="uncertainty"`` alone.

    Raises:
        ValueError: if no task is primary, for an unknown measure or activation, a fixed weight that is negative or not
            finite, an `init` that is not finite, an activation that gives another shape or what is no number, or a rule
            made for other tasks; from the step, for a measure of another shape than ``[T]``.
        MissingKey: for a fixed weight of an unknown auxiliary task, or one that lacks.
        TypeError: for a rule without `sigma`, or a fixed weight or `init` that is no number; for an activation or, from
            the step, a measure that gives no floating tensor.

    >>> seg, depth = Task("seg", loss=abs), Task("depth", loss=abs, primary=False)
    >>> encoder = ImpartialEncoder([seg, depth])
    >>> encoder.uncertainty.sigma()
    tensor([0.7047, 0.7047])
    """

    primaries: Tensor
    fixed: Tensor
    first: Tensor
    expected: Tensor
    seen: Tensor
    uncertainty: Any

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        measure: Measure = "uncertainty",
        align: bool = True,
        activation: Activation = "relu",
        init: float = -0.7,
        uncertainty: Uncertain | None = None,
    ) -> None:
        super().__init__(tasks)
        if not any(self.primary):
            raise ValueError(
                f"{type(self).__name__} aligns auxiliary tasks with primary ones and needs at least one task with "
                f"primary=True; auxiliary are all of: {', '.join(self.tasks)}"
            )
        if not isinstance(align, bool):
            raise ValueError(f"align is true or false, not {align!r}")
        self.align = align
        self.activation = _activation(activation)
        _check_number("init", init)
        # Buffers, so that no step copies them to the device; not saved, for they follow from tasks and options.
        self.register_buffer("primaries", torch.tensor(self.primary), persistent=False)
        self.measure = measure
        if isinstance(measure, Mapping) or (isinstance(measure, int | float) and not isinstance(measure, bool)):
            self.register_buffer("fixed", self._fixed(measure), persistent=False)
        elif not callable(measure) and measure not in get_args(Name):
            raise ValueError(
                f"measure must be one of {', '.join(get_args(Name))}, a number, a number for each auxiliary task, or "
                f"a function of the signals; not {measure!r}"
            )
        if measure == "speed":
            self.register_buffer("first", torch.zeros(len(self.tasks), dtype=torch.float64))
        if measure == "norm":
            # The last entry is the norm of the primaries' sum.
            self.register_buffer("expected", torch.zeros(len(self.tasks) + 1, dtype=torch.float64))
            self.register_buffer("seen", torch.zeros(len(self.tasks) + 1, dtype=torch.float64))
        self.uncertainty = self._uncertainty(tasks, init, uncertainty) if measure == "uncertainty" else None

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]`` of the raw gradients: 1 for primary tasks, at least 0 for auxiliary ones."""
        if all(self.primary):
            return torch.ones_like(signals.losses)
        weights = self._measured(signals).to(torch.float64)
        primaries = self.primaries.to(weights.device)
        labelled = signals.labelled.to(weights.device)
        weights = torch.where(labelled & (labelled & primaries).any(), weights, 0.0)
        if self.align:
            norms = signals.norms("features").to(torch.float64)
            # A primary's gradient may be any number of times as long, and a weight has to stay a number, even where the
            # squares of both lengths are beyond their precision.
            most = torch.finfo(signals.losses.dtype).max
            ratio = (self._primary_norm(signals) / norms).nan_to_num(nan=0.0, posinf=most).clamp(max=most)
            weights = torch.where(norms > 0, (weights * ratio).clamp(max=most), 0.0)
        return torch.where(primaries, 1.0, weights).to(signals.losses)

    def follow(self, rule: Uncertain) -> None:
        """Go by the σ of this rule, such as the decoder's; without effect under another measure.

        Raises:
            TypeError: for a rule without `sigma`.
            ValueError: for a rule made for other tasks.
        """
        self._check_uncertain(rule)
        if self.uncertainty is not None:
            self.uncertainty = rule

    def objective(self, signals: Signals) -> Tensor | None:
        """What trains σ; None for other measures.

        Of a rule that is the decoder's as well it is that rule's own, and says the same twice.
        """
        found: Tensor | None = None if self.uncertainty is None else self.uncertainty.objective(signals)
        return found

    def _measured(self, signals: Signals) -> Tensor:
        """What stands for f(σ) ``[T]``; the primaries' entries are not read."""
        if callable(self.measure):
            return _cut(_checked("measure", self.measure(signals), signals.losses))
        match self.measure:
            case "uncertainty":
                doubt = 1 - self.uncertainty.sigma().to(torch.float64)
                return _cut(_checked("activation", self.activation(doubt), doubt))
            case "speed":
                return self._speed(signals)
            case "norm":
                return self._expected(signals)
            case "cosine":
                return self._cosine(signals)
        return self.fixed.to(signals.losses.device)

    def _speed(self, signals: Signals) -> Tensor:
        """How far the primaries' sum has fallen beside each task."""
        losses = signals.losses.to(torch.float64)
        first = self.first.to(losses)
        present = signals.labelled & losses.isfinite()
        first = torch.where((first == 0) & present & (losses > 0), losses, first)
        self._keep("first", first)
        counted = self.primaries.to(losses.device) & present & (first > 0)
        primary = torch.where(counted, losses, 0.0).sum() / torch.where(counted, first, 0.0).sum()
        return _at_most_one(primary * first, losses)

    def _expected(self, signals: Signals) -> Tensor:
        """The primary's expected gradient norm over each task's."""
        norms = signals.norms("features").to(torch.float64)
        now = torch.cat([norms, self._primary_norm(signals).reshape(1)])
        there = (now > 0) & now.isfinite()
        expected, seen = self.expected.to(now), self.seen.to(now)
        expected = torch.where(there, _DECAY * expected + (1 - _DECAY) * now, expected)
        seen = torch.where(there, _DECAY * seen + (1 - _DECAY), seen)
        self._keep("expected", expected)
        self._keep("seen", seen)
        # Both begin at zero, so that the mean of what was seen is their ratio.
        mean = expected / seen
        return _at_most_one(mean[-1], mean[:-1])

    def _cosine(self, signals: Signals) -> Tensor:
        """The cosine to the primaries' sum, at least 0."""
        # Norms first: those of tiny gradients are no longer in the squares on the Gramian's diagonal.
        lengths = signals.norms("features").to(torch.float64) * self._primary_norm(signals)
        gramian = signals.gramian("features").to(torch.float64)
        primary = self.primaries.to(gramian.device)
        along = torch.where(primary, gramian, 0.0).sum(dim=1)
        return _cut(torch.where(lengths > 0, along / lengths, 0.0))

    def _primary_norm(self, signals: Signals) -> Tensor:
        """Length of the gradient of the primaries' sum (0-dim)."""
        if sum(self.primary) == 1:
            return signals.norms("features")[self.primary.index(True)].to(torch.float64)
        return signals.norm_of_sum(self.primaries.to(signals.losses.device), "features").to(torch.float64)

    def _keep(self, name: str, value: Tensor) -> None:
        # In the buffer's own type, which is what a saved state is read back into.
        setattr(self, name, value.to(getattr(self, name).dtype))

    def _fixed(self, measure: float | Mapping[str, float]) -> Tensor:
        auxiliary = [name for name, primary in zip(self.tasks, self.primary, strict=True) if not primary]
        weights = measure if isinstance(measure, Mapping) else dict.fromkeys(auxiliary, measure)
        for name in (*auxiliary, *weights):
            if name not in auxiliary or name not in weights:
                what = "is no auxiliary task" if name in weights else "has no fixed weight"
                raise MissingKey(f"{name!r} {what}; the auxiliary tasks are: {', '.join(auxiliary) or 'none'}")
            _check_number(f"the fixed weight of {name!r}", weights[name])
            if weights[name] < 0:
                raise ValueError(f"the fixed weight of {name!r} must be finite and at least 0, not {weights[name]!r}")
        return torch.tensor([float(weights.get(name, 1.0)) for name in self.tasks], dtype=torch.float64)

    def _uncertainty(self, tasks: Sequence[Task], init: float, given: Uncertain | None) -> Uncertain:
        if given is None:
            return Uncertainty(tasks, init=init)
        self._check_uncertain(given)
        return given

    def _check_uncertain(self, given: object) -> None:
        if not isinstance(given, Uncertain):
            raise TypeError(f"{type(given).__name__} does not say how uncertain it is: it has no sigma()")
        if given.tasks != self.tasks:
            raise ValueError(f"the uncertainty is of tasks {', '.join(given.tasks)}, not of {', '.join(self.tasks)}")


def _activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    if callable(activation):
        doubt = torch.tensor([1.0, 0.3, 0.0, -9.0], dtype=torch.float64)
        found = _checked("activation", activation(doubt), doubt)
        if not found.isfinite().all():
            raise ValueError(f"activation gives {found.tolist()} for 1 − σ = {doubt.tolist()}")
        return activation
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)} or a function, not {activation!r}")
    return _ACTIVATIONS[activation]


def _checked(what: str, found: object, like: Tensor) -> Tensor:
    """What a function of the caller's gave, if it is a floating tensor of this shape."""
    if not isinstance(found, Tensor) or not found.is_floating_point():
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"{what} gives a floating tensor {list(like.shape)}, found {kind}")
    if found.shape != like.shape:
        raise ValueError(f"{what} gives a tensor {list(like.shape)}, found {list(found.shape)}")
    return found


def _cut(weights: Tensor) -> Tensor:
    """Between 0 and 1, where f is; 0 for what is not a number, which would be every gradient's weight in the sum."""
    return weights.nan_to_num(nan=0.0).clamp(0, 1)


def _check_number(what: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{what} is a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{what} must be finite, not {value!r}")


def _at_most_one(above: Tensor, below: Tensor) -> Tensor:
    """The ratio of the two, at most 1; 1 where it is not known."""
    ratio = above / below
    return torch.where(ratio.isnan(), 1.0, ratio).clamp(0, 1)


def ial(
    tasks: Sequence[Task],
    *,
    measure: Measure = "uncertainty",
    align: bool = True,
    activation: Activation = "relu",
    init: float = -0.7,
    frozen: Sequence[str] = (),
) -> Method:
    """IAL: uncertainty weighting below the cut, `ImpartialEncoder` above it, which reads the same σ.

    Args:
        tasks: the tasks, at least one of them primary.
        measure: see `ImpartialEncoder`.
        align: see `ImpartialEncoder`.
        activation: see `ImpartialEncoder`.
        init: first value of log σ²; −0.7.
        frozen: auxiliary tasks whose heads do not learn, see `sidetask_core.FrozenHeads`.

    Raises:
        ValueError: see `ImpartialEncoder`; from the step, for a primary task in `frozen`.
        MissingKey: see `ImpartialEncoder`; from the step, for a task in `frozen` without a head.
        TypeError: see `ImpartialEncoder`; for a name where `frozen` is a list of names.

    >>> method = ial([Task("seg", loss=abs), Task("depth", loss=abs, primary=False)])
    >>> method.encoder.uncertainty is method.decoder
    True
    """
    _check_number("init", init)
    decoder = Uncertainty(tasks, init=init)
    encoder = ImpartialEncoder(tasks, measure=measure, align=align, activation=activation, uncertainty=decoder)
    return Method(augment=FrozenHeads(frozen) if frozen else None, encoder=encoder, decoder=decoder)
