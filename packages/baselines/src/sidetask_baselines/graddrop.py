"""GradDrop: Chen et al., "Just pick a sign: optimizing deep multitask models", NeurIPS 2020."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from sidetask_core import Combiner, Equal, Method, MissingKey, Place, Signals, Task, parallel
from torch import Tensor


class GradDrop(Combiner):
    """Let every coordinate of the shared gradient follow one sign, drawn in proportion to what the tasks want.

    The share of the positive sign is P = ½ (1 + Σ_t g_t / Σ_t |g_t|) (Eq. 1). A positive gradient survives where P
    exceeds a uniform draw, a negative one elsewhere, and the survivors are added up (Algorithm 1).

    At features, gradients belong to samples: what is compared is the sum over the batch of sign(z) · g_t, and all
    samples of a feature share one draw (Section 3.1). Over parameters, gradients are compared as they are.

    Args:
        tasks: the tasks.
        at: ``"features"`` (the paper) or ``"parameters"``.
        leak: task name to the share of its gradient that passes whatever was drawn, 0 to 1; 0 where not given.
        seed: of the rule's generator.

    Raises:
        ValueError: for a leak outside [0, 1].
        MissingKey: for a leak of an unknown task.
    """

    leak: Tensor

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        at: Place = "features",
        leak: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(tasks, at=at, seed=seed)
        leak = dict(leak or {})
        for name, value in leak.items():
            if name not in self.tasks:
                raise MissingKey(f"there is a leak for {name!r}, but the tasks are: {', '.join(self.tasks)}")
            if not 0 <= value <= 1:
                raise ValueError(f"the leak of task {name!r} must be between 0 and 1, not {value}")
        self.register_buffer("leak", torch.tensor([float(leak.get(name, 0.0)) for name in self.tasks]))

    def forward(self, signals: Signals) -> Tensor:
        """The combined gradient ``[D]``."""
        gradients = signals.gradients(self.at)
        # One seed per step from the rule's own generator; the many numbers come from the device.
        seed = int(torch.randint(2**62, (), generator=self.generator))
        draws = torch.Generator(gradients.device).manual_seed(seed)
        leak = self.leak.to(gradients)[:, None]
        if self.at == "parameters":
            return pick_sign(gradients, gradients, leak, draws)
        features = signals.features()
        combined = []
        for tensor, part in zip(features, gradients.split([f.numel() for f in features], dim=1), strict=True):
            samples = tensor.shape[0] if tensor.ndim else 1
            per_sample = part.view(len(part), samples, -1)
            purity = parallel.add((tensor.sign().view(1, samples, -1).to(part) * per_sample).sum(dim=1))
            combined.append(pick_sign(purity[:, None], per_sample, leak[..., None], draws).flatten())
        return torch.cat(combined)


def pick_sign(compared: Tensor, gradients: Tensor, leak: Tensor, draws: torch.Generator) -> Tensor:
    """The sum over tasks of the gradients whose sign, in `compared`, is the one drawn.

    Args:
        compared: what the tasks want of each coordinate ``[T, *]``.
        gradients: what is added up, of a shape that `compared` broadcasts to.
        leak: share of each task's gradient that always passes, broadcasts likewise.
        draws: source of the uniform numbers, one for each coordinate of `compared`.
    """
    total = torch.zeros_like(compared[0])
    for wanted in compared:
        total += wanted.abs()
    positive = (1 + torch.where(total > 0, compared.sum(dim=0) / total, 0.0)) / 2
    # Always in single precision, so that another precision of the network sees the same draws.
    drawn = torch.rand(positive.shape, generator=draws, device=positive.device, dtype=torch.float32) < positive
    combined = torch.zeros_like(gradients[0])
    # Task by task: what is in memory at a time is of the size of one gradient, not of T.
    for wanted, gradient, passes in zip(compared, gradients, leak, strict=True):
        kept = torch.where(drawn, wanted > 0, wanted < 0).to(gradient)
        combined += (passes + (1 - passes) * kept) * gradient
    return combined


def graddrop(
    tasks: Sequence[Task],
    *,
    at: Place = "features",
    leak: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Method:
    """GradDrop for the shared parameters; task-specific ones keep their own gradients."""
    return Method(encoder=GradDrop(tasks, at=at, leak=leak, seed=seed), decoder=Equal(tasks))
