"""How far the tasks' gradients disagree: their angles, how unlike their sizes are, how near they are to dependent."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Values = dict[str, dict[str, Tensor]]


def conflict(tasks: Sequence[str], gramian: Tensor, labelled: Tensor) -> Values:
    """What the inner products of the tasks' gradients say of their conflict, each number a 0-dim tensor.

    - ``cosines``: of the angle between any two tasks' gradients, by ``"a, b"``; below zero, a small step that follows
      one of them harms the other (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020).
    - ``ratios``: of each task's gradient norm to the mean of all tasks' norms.
    - ``condition``: of the Gramian, its largest eigenvalue over its smallest; infinitely large where gradients are
      linearly dependent, and what is beyond 1/ε of the gradients' data type cannot be told from that and is set to it.
      Tasks that differ in scale alone have the square of their ratio.

    What does not exist is NaN: everything of a task that has no label in the batch, the cosines of a gradient that is
    zero or not finite, and where one is not finite, all ratios and the condition, of which it is part.

    Args:
        tasks: the names of the T tasks.
        gramian: ``[T, T]``.
        labelled: ``[T]`` booleans, which tasks have a label in the batch.

    >>> found = conflict(["a", "b"], torch.tensor([[4.0, -1.0], [-1.0, 1.0]]), torch.tensor([True, True]))
    >>> round(found["cosines"]["a, b"].item(), 4), round(found["ratios"]["a"].item(), 4)
    (-0.5, 1.3333)
    >>> round(found["condition"]["gramian"].item(), 4)
    6.1713
    """
    most = 1 / torch.finfo(gramian.dtype).eps
    gramian = gramian.double()
    nan = torch.full_like(gramian[0, 0], torch.nan)
    squares = gramian.diagonal()
    finite = squares.isfinite()
    norms = torch.where(labelled & finite, squares.clamp(min=0).sqrt(), nan)
    mean = torch.where((labelled & ~finite).any(), nan, norms.nanmean())
    # A zero gradient has no direction: 0 / 0.
    cosines = (gramian / norms.unsqueeze(1) / norms).clamp(-1, 1)
    pairs = itertools.combinations(range(len(tasks)), 2)
    return {
        "cosines": {f"{tasks[a]}, {tasks[b]}": cosines[a, b] for a, b in pairs},
        "ratios": dict(zip(tasks, (norms / mean).unbind(), strict=True)),
        "condition": {"gramian": _condition(gramian, labelled, most)},
    }


def _condition(gramian: Tensor, labelled: Tensor, most: float) -> Tensor:
    there = torch.where(labelled.unsqueeze(1) & labelled, gramian, 0.0)
    finite = there.isfinite().all() & labelled.any()
    # An absent task gets the mean eigenvalue of the others for its own, which is neither the least nor the greatest:
    # leaving it out would have to wait for the device to say which it is.
    mean = there.diagonal().sum() / labelled.sum().clamp(min=1)
    filled = there + torch.where(labelled, 0.0, mean).diag()
    values = torch.linalg.eigvalsh(torch.where(finite, filled, torch.eye(len(filled)).to(filled)))
    condition = values[-1] / values[0].clamp(min=values[-1] / most)
    return torch.where(finite, condition, torch.nan)
