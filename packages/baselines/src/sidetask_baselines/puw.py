"""Task weighting by a particle filter: Aghajanzadeh et al., Pattern Recognition 2023; a reconstruction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sidetask_core import Method, Signals, Task, Weighting
from torch import Tensor


class PUW(Weighting):
    """Estimate the weights of uncertainty weighting with a particle filter instead of learning them.

    The particles of a task are candidates for its log variance s. A step lets them wander, weighs each by how well it
    explains the task's loss, exp(−(L e^{−s} + s) / 2), which is the likelihood whose logarithm `Uncertainty` maximises,
    and draws them anew where too few carry the weight. The estimate is the mean of e^{−s} over the weighted particles:
    at a constant loss that is 1 / L, where σ² = L, up to what the wandering (1 % at the default) and the number of
    particles leave. The estimates are scaled to sum to T.

    Reconstruction: of "Task weighting based on particle filter in deep multi-task learning with a view to uncertainty
    and performance" (doi:10.1016/j.patcog.2023.109587) the abstract is public, the equations are not. It says that a
    state of the tasks' coefficients is a particle, that the filter converges to an optimum recursively and apart from
    the network's own training, and that it is to respect uncertainty as well as performance. Decided here:

    - performance and uncertainty are the two terms of the likelihood, L e^{−s} and s, and it reads training losses;
    - particles wander by normal steps in s, so that no coefficient can become negative;
    - the likelihood is a product over tasks, and so is what the filter tracks: every task has its own particle weights
      and is resampled by itself, which keeps the number of particles that is needed from growing with T;
    - all tasks share the random numbers. Weights relative to each other carry less noise, tasks with equal losses have
      equal weights, and the order of the tasks does not matter;
    - a task's particles start around the logarithm of its first positive loss, so that scaling a loss by c divides
      its estimate by c, with nothing to search for;
    - the estimate averages coefficients, not logarithms, which would be off by the skewness of the likelihood;
    - resampling is systematic, where the effective number 1 / Σ w² falls below a share of the particles;
    - a task without a label in the batch is left out: its particles stay, its weight is zero, and T above is the
      number of the other tasks. A loss that is not positive has no variance that explains it; it leaves the particles
      as they are, and before its first positive loss a task has weight one.

    Args:
        tasks: the tasks.
        particles: their number N for each task. Estimates of log σ² scatter by at most about 1 / √N, most of it in
            common.
        walk: standard deviation of a particle's step in s; small changes of a loss are followed in √2 / walk steps.
        spread: standard deviation of the particles of s at the start.
        resample: share of N below which the effective number has to fall, 0 to 1.
        seed: of the rule's generator, whose state is saved with the rule.

    Raises:
        ValueError: for fewer than two particles, a walk or spread that is not positive, or a share outside [0, 1].
    """

    particles: Tensor
    log_weights: Tensor
    started: Tensor

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        particles: int = 1000,
        walk: float = 0.05,
        spread: float = 1.0,
        resample: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(tasks, seed=seed)
        if not isinstance(particles, int) or particles < 2:
            raise ValueError(f"particles must be a number of at least 2, not {particles!r}")
        for name, value in (("walk", walk), ("spread", spread)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if not 0 <= resample <= 1:
            raise ValueError(f"resample must be between 0 and 1, not {resample}")
        self.walk = walk
        self.resample = resample
        start = spread * torch.randn(particles, generator=self.generator, dtype=torch.float64)
        self.register_buffer("particles", start.repeat(len(self.tasks), 1))
        self.register_buffer("log_weights", torch.full_like(self.particles, 1 / particles).log())
        self.register_buffer("started", torch.zeros(len(self.tasks), dtype=torch.bool))

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]``, which sum to the number of labelled tasks."""
        losses = signals.losses.double()
        labelled = signals.labelled.to(losses.device)
        precision = self._filter(losses, labelled & (losses > torch.finfo(torch.float32).tiny))
        known = labelled & self.started
        shared = torch.where(known, precision, 0.0)
        weights = torch.where(known, known.sum() * shared / shared.sum(), labelled.double())
        return weights.to(signals.losses)

    def _filter(self, losses: Tensor, seen: Tensor) -> Tensor:
        """Advance the particles of the tasks that are `seen`; every task's estimate of 1 / σ² ``[T]``."""
        kind = self.particles.dtype
        particles, log_weights = (x.to(losses.device, torch.float64) for x in (self.particles, self.log_weights))
        self.started = self.started.to(losses.device)
        count = particles.shape[1]
        # As many numbers in every step, whatever the losses, and from the host's generator: no rank or device differs.
        steps = torch.randn(count, generator=self.generator, dtype=torch.float64).to(losses.device, non_blocking=True)
        offset = torch.rand(1, generator=self.generator, dtype=torch.float64).to(losses.device, non_blocking=True)

        level = torch.where(seen, losses, 1.0)[:, None]
        first = (seen & ~self.started)[:, None]
        moved = particles + self.walk * steps + torch.where(first, level.log(), 0.0)
        likelihood = -(level * moved.neg().exp() + moved) / 2
        weighed = (log_weights + likelihood).log_softmax(dim=1)
        weights = weighed.exp()
        few = (1 / weights.square().sum(dim=1, keepdim=True)) < self.resample * count
        drawn = moved.gather(1, systematic(weights, offset))
        estimate = (weights * moved.neg().exp()).sum(dim=1)

        even = torch.full_like(weighed, 1 / count).log()
        update = seen[:, None]
        self.particles = torch.where(update, torch.where(few, drawn, moved), particles).to(kind)
        self.log_weights = torch.where(update, torch.where(few, even, weighed), log_weights).to(kind)
        self.started = self.started | seen
        before = (log_weights.exp() * particles.neg().exp()).sum(dim=1)
        return torch.where(seen, estimate, before)


def systematic(weights: Tensor, offset: Tensor) -> Tensor:
    """Indices ``[T, N]`` of the particles that N equidistant pointers, moved by one random number, fall on.

    A particle of weight w is drawn N w times, rounded up or down, and N w times in the mean over offsets.

    Args:
        weights: of the particles ``[T, N]``, positive or zero.
        offset: uniform in [0, 1), ``[1]``.

    >>> systematic(torch.tensor([[0.5, 0.1, 0.4, 0.0]]), torch.tensor([0.5]))
    tensor([[0, 0, 2, 2]])
    """
    total, shift = weights, 1
    # Sums by doubling: torch.cumsum may add in any order on a GPU, and processes would drift apart.
    while shift < weights.shape[1]:
        total = torch.cat([total[:, :shift], total[:, shift:] + total[:, :-shift]], dim=1)
        shift *= 2
    count = weights.shape[1]
    pointers = (torch.arange(count, device=weights.device) + offset) / count * total[:, -1:]
    return torch.searchsorted(total, pointers.contiguous(), right=True).clamp(max=count - 1)


def puw(
    tasks: Sequence[Task],
    *,
    particles: int = 1000,
    walk: float = 0.05,
    spread: float = 1.0,
    resample: float = 0.5,
    seed: int = 0,
) -> Method:
    """Weights from a particle filter above and below the cut."""
    rule = PUW(tasks, particles=particles, walk=walk, spread=spread, resample=resample, seed=seed)
    return Method(encoder=rule, decoder=rule)
