"""Dynamic weight average: Liu, Johns, Davison, "End-to-end multi-task learning with attention", CVPR 2019."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from sidetask_core import Method, Signals, Task, Weighting
from torch import Tensor

from sidetask_baselines.scale import softmax_among


class DWA(Weighting):
    """Give more weight to tasks whose loss falls slowly.

    With r_t the ratio of a task's mean loss over the last window to that over the window before it, the weights are
    T · softmax(r / temperature) (Eq. 7); ones during the first two windows. A mean is over the steps that had labels.
    A task without label in one of the two windows, or with a loss of zero in the one before, has no ratio and counts as
    standing still, r = 1. A task without a label in the batch has weight zero, and T is the number of the others.

    The ratio of two negative losses is the larger the more a loss *fell*: add a constant to one that becomes negative.

    Args:
        tasks: the tasks.
        window: ``"epoch"`` (the paper), read from ``step.epoch``, which the training loop sets; or a number of steps.
        temperature: 2 (the paper).

    Raises:
        ValueError: for a window that is neither, or a temperature that is not positive.
    """

    sums: Tensor
    steps: Tensor
    last: Tensor
    before: Tensor

    def __init__(
        self, tasks: Sequence[Task], *, window: int | Literal["epoch"] = "epoch", temperature: float = 2.0
    ) -> None:
        super().__init__(tasks)
        if window != "epoch" and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be 'epoch' or a positive number of steps, not {window!r}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.window = window
        self.temperature = temperature
        for name in ("sums", "steps", "last", "before"):
            self.register_buffer(name, torch.zeros(len(self.tasks), dtype=torch.float64))
        self.closed = 0
        self.current: int | None = None

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]`` that sum to the number of labelled tasks; constant within a window, but for absent ones."""
        now = signals.epoch if self.window == "epoch" else signals.iteration // self.window
        if self.current is not None and now != self.current:
            # NaN for a task without a label in the window.
            self.before, self.last = self.last, self.sums / self.steps
            self.sums, self.steps = torch.zeros_like(self.sums), torch.zeros_like(self.steps)
            self.closed += 1
        self.current = now
        self.sums = self.sums.to(signals.losses.device) + signals.losses
        self.steps = self.steps.to(signals.losses.device) + signals.labelled
        labelled = signals.labelled
        if self.closed < 2:
            return labelled.to(signals.losses)
        ratio = self.last / self.before
        ratio = torch.where(ratio.isfinite(), ratio, 1.0)
        return (labelled.sum() * softmax_among(ratio / self.temperature, labelled)).to(signals.losses)

    def get_extra_state(self) -> dict[str, Any]:
        """Where in the windows the rule stands, besides what every rule saves."""
        return super().get_extra_state() | {"closed": self.closed, "current": self.current}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on where a saved rule stood."""
        super().set_extra_state(state)
        self.closed, self.current = state["closed"], state["current"]


def dwa(tasks: Sequence[Task], *, window: int | Literal["epoch"] = "epoch", temperature: float = 2.0) -> Method:
    """Dynamic weight average above and below the cut."""
    rule = DWA(tasks, window=window, temperature=temperature)
    return Method(encoder=rule, decoder=rule)
