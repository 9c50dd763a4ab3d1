"""Cheaper guesses of which task helps which, and how well they rank what enumeration found."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata
from sidetask_core import Batch, SplitModel, Task
from sidetask_core.aside import aside
from sidetask_core.passes import losses_of
from torch import Tensor, nn

from sidetask_saal.names import ends

Matrix = npt.NDArray[np.float64]


def lookahead_relations(
    model: SplitModel,
    tasks: Sequence[Task],
    batches: Iterable[Batch],
    *,
    lr: float,
    validation: Iterable[Batch] | None = None,
) -> Matrix:
    """By how much a step on the source's loss alone lowers the target's: 1 − L_t(θ'_s) / L_t(θ), the mean over batches.

    θ'_s is the shared layers after one plain gradient step on L_s (inter-task affinity: Fifty et al., NeurIPS 2021).
    The model stays as it is, BatchNorm statistics and random state included. One backward pass for each task and
    T + 1 forward passes per batch.

    Args:
        model: with shared layers; in training, or trained.
        tasks: the T tasks.
        batches: what steps are made on.
        lr: of the steps.
        validation: what losses are read on, batch by batch beside `batches`; the same batches if None.

    Returns:
        ``[T, T]``, source by target, the diagonal included; NaN for a target whose loss was never above zero.

    Raises:
        ValueError: for no batch, or fewer of validation; if the tasks share no layer that learns.
    """
    found: list[Tensor] = []
    probes = None if validation is None else iter(validation)
    for batch in batches:
        probe = batch if probes is None else next(probes, None)
        if probe is None:
            raise ValueError(f"validation ended after {len(found)} batches; there must be one for each to step on")
        here = _losses(model, tasks, probe, {})
        gradients = _gradients(model, tasks, batch)
        rows = []
        for of_source in gradients:
            parameters = dict(model.named_parameters())
            moved = {name: parameters[name].detach() - lr * g for name, g in of_source.items()}
            rows.append(1 - _losses(model, tasks, probe, moved) / here)
        found.append(torch.stack(rows).where(here > 0, torch.nan))
    return _mean(found)


def gradient_angles(model: SplitModel, tasks: Sequence[Task], batches: Iterable[Batch]) -> Matrix:
    """The cosine of the angle between two tasks' gradients of the shared layers, the mean over batches.

    Symmetric, so that it cannot tell who helps whom. The model stays as it is.

    Returns:
        ``[T, T]``; NaN for a task whose gradient was always zero.
    """
    found = []
    for batch in batches:
        flat = torch.stack(
            [torch.cat([g.flatten() for g in one.values()]).double() for one in _gradients(model, tasks, batch)]
        )
        unit = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        found.append(unit @ unit.T)
    return _mean(found)


class Frozen(nn.Module):
    """An encoder that learns no more: without gradients, and in evaluation mode whatever its network's mode.

    >>> from sidetask_core import SplitModel
    >>> single = SplitModel(nn.Linear(2, 3), {"seg": nn.Linear(3, 1)})
    >>> head = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> model = SplitModel(Frozen(single, "seg"), {"depth": head})
    >>> [p.requires_grad for p in model.shared_parameters()], single.shared.weight.requires_grad
    ([False, False], True)

    Args:
        model: a network of one task, or of several.
        task: the task whose features are wanted, those that its head reads; they are copied from the model.
    """

    def __init__(self, model: SplitModel, task: str) -> None:
        super().__init__()
        model.check_head(task)
        branch = model.route[task]
        parts = [model.shared] if branch is None else [model.shared, model.branches[branch]]
        self.encoder = copy.deepcopy(nn.Sequential(*parts)).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Frozen:
        """Stay as it is."""
        return super().train(False)

    def forward(self, inputs: Any) -> Any:
        """What the task's head reads."""
        with torch.no_grad():
            return self.encoder(inputs)


def coefficient_relations(tasks: Sequence[str], coefficients: Mapping[str, float]) -> Matrix:
    """What SAAL-w has learned of transfers as relations: their coefficients, or the weights that are shares of them.

    Args:
        tasks: the names of the T tasks.
        coefficients: by names of tasks and transfers, those of `LearnedTransfers.named_weights` or, normalised, of a
            step's report. Of one target, with normalization ``"target"``, both have the same order. The tasks' own are
            left out.

    Returns:
        ``[T, T]``, source by target; NaN for a transfer that there is not.

    >>> coefficient_relations(["a", "b"], {"a": 0.5, "b": 0.5, "a->b": 0.25}).tolist()
    [[nan, 0.25], [nan, nan]]
    """
    matrix = np.full((len(tasks), len(tasks)), math.nan)
    for name, value in coefficients.items():
        pair = ends(name)
        if pair is not None:
            source, target = (tasks.index(end) for end in pair)
            matrix[source, target] = float(value)
    return matrix


def rank_correlation(estimate: Matrix, truth: Matrix, over: Literal["sources", "targets"] = "sources") -> Matrix:
    """Spearman's rank correlation of estimated with enumerated relations, for each target ``[T]``.

    Does the estimate put the sources of a target in the order of how much they help it? The diagonal is left out, and
    so is what either does not know.

    Args:
        estimate: ``[T, T]``, source by target; of any scale.
        truth: ``[T, T]``, `sidetask_saal.Relations.improvement`.
        over: ``"sources"``: one value for each target; ``"targets"``: for each source, of the targets it helps.

    Returns:
        From −1 to 1; NaN where fewer than two relations are known, or either puts all of them on one rank.

    >>> truth = np.array([[0, 1.0, 3.0], [2.0, 0, 1.0], [1.0, 2.0, 0]])
    >>> rank_correlation(truth**3, truth).tolist()
    [1.0, 1.0, 1.0]
    """
    if estimate.shape != truth.shape or estimate.ndim != 2 or estimate.shape[0] != estimate.shape[1]:
        raise ValueError(f"relations are [T, T], found {list(estimate.shape)} and {list(truth.shape)}")
    if over not in ("sources", "targets"):
        raise ValueError(f"over must be 'sources' or 'targets', not {over!r}")
    known = np.isfinite(estimate) & np.isfinite(truth) & ~np.eye(len(truth), dtype=bool)
    if over == "targets":
        estimate, truth, known = estimate.T, truth.T, known.T
    return np.array([_spearman(estimate[k, t], truth[k, t]) for t, k in enumerate(known.T)])


def _spearman(one: Matrix, other: Matrix) -> float:
    if len(one) < 2:
        return math.nan
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (one, other)]
    lengths = math.sqrt(float((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / lengths if lengths else math.nan


def _losses(model: SplitModel, tasks: Sequence[Task], batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
    """The tasks' losses ``[T]`` with other shared parameters; NaN without labels."""

    def compute(model: SplitModel) -> Tensor:
        losses, labelled = losses_of(model, tasks, batch, {})
        return torch.stack([loss.double() for loss in losses]).where(labelled, torch.nan)

    with torch.no_grad():
        return aside(model, compute, parameters)


def _gradients(model: SplitModel, tasks: Sequence[Task], batch: Batch) -> list[dict[str, Tensor]]:
    """Each task's gradient of the shared parameters, by name."""
    above = {id(p) for p in model.shared_parameters()}
    shared = {name: p for name, p in model.named_parameters() if id(p) in above and p.requires_grad}
    if not shared:
        raise ValueError("the tasks share no layer that learns")

    def compute(model: SplitModel) -> list[dict[str, Tensor]]:
        losses, _ = losses_of(model, tasks, batch, {})
        found = []
        for loss in losses:
            some: Sequence[Tensor | None] = [None] * len(shared)
            if loss.requires_grad:
                some = torch.autograd.grad(loss, list(shared.values()), retain_graph=True, allow_unused=True)
            pairs = zip(shared.items(), some, strict=True)
            found.append({name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs})
        return found

    with torch.enable_grad():
        return aside(model, compute)


def _mean(found: Sequence[Tensor]) -> Matrix:
    """The mean of what is known of ``[T, T]``."""
    if not found:
        raise ValueError("there is no batch to look at")
    matrix: Matrix = torch.stack([one.detach().cpu() for one in found]).nanmean(dim=0).numpy()
    return matrix
