"""Adaptive task weighting: Chen et al., "UMT-Net", IEEE Transactions on Intelligent Vehicles 2024; reconstructed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sidetask_core import Method, Signals, Task, Weighting
from torch import Tensor

from sidetask_baselines.scale import softmax_among

# A loss that varies by less than this, relative to its mean, stands still: what is left may be rounding in float32.
STILL = 1e-6


class ATW(Weighting):
    """Give more weight to tasks whose loss of late is high by the standards of their own history.

    With μ_t and σ_t the mean and standard deviation of all losses of a task so far (long term) and ℓ_t their mean with
    exponentially fading weights (short term), z_t = (ℓ_t − μ_t) / σ_t says by how much the task has come down, in a
    unit that neither the loss's scale nor an added constant changes. The weights are T · softmax(z / temperature).
    DWA compares two short windows with each other; here the yardstick is the whole run, so that weights move little
    once losses do.

    Reconstruction: no equations are public. The abstract says that ATW "accounts for both short-term variation and
    long-term statistics of task losses, leading to a more stable training process". Decided here:

    - the statistics are the mean and standard deviation over every step so far, each counted alike;
    - the variation is that of the faded mean from them. The fading is corrected for its start: weights begin at one
      and part slowly while there is little history;
    - both take in the loss of the step whose weights they give;
    - a task that never varied by more than 1e-6 of its mean has z = 0;
    - the softmax, and that higher losses get more weight, are DWA's, as is the temperature;
    - a task without a label in the batch is left out: its history stays, its weight is zero, and T above is the
      number of the other tasks.

    Args:
        tasks: the tasks.
        decay: what a loss's share in the short-term mean shrinks to in a step, 0 ≤ decay < 1; 0.9 looks back ten steps.
        temperature: 2 (DWA's); lower lets weights differ more.

    Raises:
        ValueError: for a decay outside [0, 1), or a temperature that is not positive.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    recent_count: Tensor
    recent: Tensor

    def __init__(self, tasks: Sequence[Task], *, decay: float = 0.9, temperature: float = 2.0) -> None:
        super().__init__(tasks)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1, not {decay}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.decay = decay
        self.temperature = temperature
        for name in ("count", "mean", "squares", "recent_count", "recent"):
            self.register_buffer(name, torch.zeros(len(self.tasks), dtype=torch.float64))

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]``, which sum to the number of labelled tasks."""
        labelled = signals.labelled.to(signals.losses.device)
        self._remember(signals.losses, labelled)
        spread = (self.squares / self.count).sqrt()
        z = torch.where(spread > STILL * self.mean.abs(), (self.recent - self.mean) / spread, 0.0)
        return (labelled.sum() * softmax_among(z / self.temperature, labelled)).to(signals.losses)

    def _remember(self, losses: Tensor, labelled: Tensor) -> None:
        """Add the losses of labelled tasks to both means and to the sum of squared deviations (Welford)."""
        old = {name: buffer.to(losses.device) for name, buffer in self.named_buffers()}
        losses = losses.to(old["mean"])
        new = {"count": old["count"] + 1, "recent_count": self.decay * old["recent_count"] + 1}
        new["mean"] = old["mean"] + (losses - old["mean"]) / new["count"]
        new["recent"] = old["recent"] + (losses - old["recent"]) / new["recent_count"]
        new["squares"] = old["squares"] + (losses - old["mean"]) * (losses - new["mean"])
        for name, value in new.items():
            setattr(self, name, torch.where(labelled, value, old[name]))


def atw(tasks: Sequence[Task], *, decay: float = 0.9, temperature: float = 2.0) -> Method:
    """Adaptive task weighting above and below the cut."""
    rule = ATW(tasks, decay=decay, temperature=temperature)
    return Method(encoder=rule, decoder=rule)
