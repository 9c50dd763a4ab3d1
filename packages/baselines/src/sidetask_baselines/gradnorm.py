"""GradNorm: Chen, Badrinarayanan, Lee, Rabinovich, "Gradient normalization for adaptive loss balancing", ICML 2018."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sidetask_core import Method, Place, Signals, Task, Weighting
from sidetask_core.adam import Adam
from torch import Tensor

FLOOR = 1e-6


class GradNorm(Weighting):
    """Learn weights that bring the tasks' gradients to one length, longer for tasks that train slowly.

    With G_t = ‖w_t g_t‖, and r_t the ratio of loss to first loss L_t / L_t(0) over its mean, the weights minimise

        Σ_t |G_t − Ḡ r_t^α|, Ḡ the mean of G (Eq. 2; the targets Ḡ r_t^α are constants),

    by one step of the rule's own Adam per training step, and are then scaled to sum to T. As in Algorithm 1, a step
    uses the weights it found, the first one ones; what it learns holds from the next on. A weight that Adam takes below
    1e-6 is set to that before scaling: negative, it would climb the loss, and the paper has no answer. A gradient far
    shorter than Adam's ε = 1e-8 no longer moves its weight. The device is never waited for.

    A task keeps weight and moments in steps without its labels; the other tasks' weights then keep their sum, and
    means are over them alone. L_t(0) is the first positive loss of a task; one that has none yet, or whose loss is
    negative, counts as training at the mean rate, r_t = 1.

    Args:
        tasks: the tasks.
        at: ``"parameters"``, all shared ones (the paper takes a subset, usually the last shared layer), at one encoder
            backward per task; or ``"features"``, at none.
        alpha: how strongly slow tasks are favoured; 1.5 (the paper, NYUv2). With 0 all gradients get one length.
        lr: of Adam on the weights; 0.025 (the paper).

    Raises:
        ValueError: for an unknown place, a negative `alpha` or an `lr` that is not positive.

    >>> rule = GradNorm([Task("seg", loss=abs), Task("depth", loss=abs)])
    >>> rule.weights.tolist()
    [1.0, 1.0]
    """

    weights: Tensor
    initial: Tensor

    def __init__(
        self, tasks: Sequence[Task], *, at: Place = "parameters", alpha: float = 1.5, lr: float = 0.025
    ) -> None:
        super().__init__(tasks)
        if at not in ("features", "parameters"):
            raise ValueError(f"at must be 'features' or 'parameters', not {at!r}")
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, not {alpha}")
        self.at: Place = at
        self.alpha = alpha
        self.adam = Adam(len(self.tasks), lr=lr)
        self.register_buffer("weights", torch.ones(len(self.tasks), dtype=torch.float64))
        self.register_buffer("initial", torch.zeros(len(self.tasks), dtype=torch.float64))

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]``, positive, that sum to T."""
        norms = signals.norms(self.at).to(torch.float64)
        losses = signals.losses.to(norms)
        # A step that overflows is not to end the run's weights.
        present = signals.labelled & norms.isfinite() & losses.isfinite()
        weights, initial = self.weights.to(norms), self.initial.to(norms)
        initial = torch.where((initial == 0) & present & (losses > 0), losses, initial)
        gradient = self.gradient(weights, norms, losses / initial, present)
        self._keep("initial", initial)
        self._keep("weights", self._adapted(weights, gradient, present))
        return weights.to(signals.losses)

    def gradient(self, weights: Tensor, norms: Tensor, ratios: Tensor, present: Tensor) -> Tensor:
        """∂/∂w Σ |w_t‖g_t‖ − Ḡ r_t^α| ``[T]``, with the targets constant, over the tasks that are present."""
        scaled = torch.where(present, weights * norms, 0.0)
        known = present & ratios.isfinite() & (ratios >= 0)
        rates = ratios / _mean(ratios, known)
        rates = torch.where(known & rates.isfinite(), rates, 1.0)
        target = _mean(scaled, present) * rates**self.alpha
        return torch.where(present, (scaled - target).sign() * norms, 0.0)

    def _adapted(self, weights: Tensor, gradient: Tensor, present: Tensor) -> Tensor:
        """The weights after a step of Adam on those present, whose sum stays."""
        moved = torch.where(present, self.adam(weights, gradient, present).clamp(min=FLOOR), 0.0)
        total = len(self.tasks) - torch.where(present, 0.0, weights).sum()
        return torch.where(present, moved * (total / moved.sum()), weights)

    def _keep(self, name: str, value: Tensor) -> None:
        # In the buffer's own type, which is what a saved state is read back into.
        setattr(self, name, value.to(getattr(self, name).dtype))


def _mean(values: Tensor, among: Tensor) -> Tensor:
    return torch.where(among, values, 0.0).sum() / among.sum().clamp(min=1)


def gradnorm(tasks: Sequence[Task], *, at: Place = "parameters", alpha: float = 1.5, lr: float = 0.025) -> Method:
    """GradNorm above and below the cut, as in the paper, whose weighted sum of losses trains all parameters.

    ``Method(encoder=GradNorm(tasks), decoder=Equal(tasks))`` leaves the task-specific gradients unweighted.
    """
    rule = GradNorm(tasks, at=at, alpha=alpha, lr=lr)
    return Method(encoder=rule, decoder=rule)
