"""What a task is, what a batch is, and how element losses become one number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class MissingKey(KeyError):
    """A name that a batch, a model or a mapping lacks; reads as a sentence, unlike a plain KeyError."""

    def __str__(self) -> str:
        return str(self.args[0])


class Metric(Protocol):
    """What evaluation needs of a metric; every `torchmetrics.Metric` satisfies it."""

    @property
    def higher_is_better(self) -> bool | None:
        """Which way is better."""

    def update(self, prediction: Any, target: Any, /) -> None:
        """Add one batch."""

    def compute(self) -> Tensor:
        """The value over everything added since the last reset."""

    def reset(self) -> None:
        """Forget everything added."""


@dataclass(frozen=True, eq=False)
class Task:
    """One thing to learn: a loss, which labels count, how it is judged, and whether it is wanted for itself.

    Args:
        name: unique among the tasks of a model; the key of its head. Not empty, without a dot.
        loss: ``loss(prediction, target)``, *unreduced*: a tensor ``[N, *]`` of element losses. A 0-dim
            tensor is accepted as a ready mean, whose elements cannot be weighed.
        valid: ``valid(target)`` gives a boolean mask of the labelled elements: the shape of the loss, or
            its leading dimensions only (``[N]`` rules whole samples in or out). None: everything is labelled.
        objectives: names of the parts of a loss that is a sum: `loss` then returns a mapping from each of them to its
            element losses, and the task's loss is the sum of their masked means. Empty: the loss is one tensor.
        metrics: name to metric, the headline metric first; read by evaluation, never by a step.
        primary: False for an auxiliary task, which exists to help and is not deployed.
        target: key of its labels in ``batch.targets``; its own name if None.
        input: key of its input in ``batch.inputs``; the only input if None. Tasks with different input
            keys are the multi-domain (many-to-many) setting.

    Raises:
        ValueError: for a name that cannot be a module's name, or objectives that are not names.
        TypeError: for a loss or mask that cannot be called.

    >>> task = Task("depth", loss=lambda p, y: (p - y).abs(), valid=lambda y: y > 0, primary=False)
    >>> loss, count = task.mean(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 0.0]))
    >>> loss.item(), count.item()
    (2.0, 1.0)
    >>> both = Task("box", loss=lambda p, y: {"l1": (p - y).abs(), "l2": (p - y) ** 2}, objectives=("l1", "l2"))
    >>> both.mean(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 5.0]))[0].item()
    3.0
    """

    name: str
    loss: Callable[[Any, Any], Tensor | Mapping[str, Tensor]]
    valid: Callable[[Any], Tensor] | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    primary: bool = True
    target: str | None = None
    input: str | None = None
    objectives: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "." in self.name:
            raise ValueError(f"a task's name is a non-empty string without a dot, not {self.name!r}")
        if not callable(self.loss):
            raise TypeError(f"task {self.name!r}: loss must be callable as loss(prediction, target), not {self.loss!r}")
        if self.valid is not None and not callable(self.valid):
            raise TypeError(f"task {self.name!r}: valid must be callable as valid(target), not {self.valid!r}")
        names = list(self.objectives)
        named = all(isinstance(name, str) and name for name in names)
        if isinstance(self.objectives, str) or not named or len(set(names)) < len(names):
            raise ValueError(f"task {self.name!r}: objectives are distinct names, not {self.objectives!r}")

    def elements(self, prediction: Any, target: Any) -> list[tuple[Tensor, Tensor | None]]:
        """Element losses and the mask of the labelled ones, expanded to their shape: a pair for every objective.

        A task without objectives has one pair. The loss never sees what the mask rules out: those targets are replaced
        by a labelled one (in tensors, and in tensors within tuples, lists and dicts), so that a NaN or an out-of-range
        class id that marks a missing label can neither raise nor reach a gradient.
        """
        if self.valid is None:
            return [(losses, None) for losses in self._call_loss(prediction, target)]
        mask = self.valid(target)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = f"{mask.dtype} tensor" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"task {self.name!r}: valid(target) must return a boolean tensor, found {found}")
        tensors = self._call_loss(prediction, _fill_unlabelled(target, mask))
        return [(losses, self._fit(mask, losses, i)) for i, losses in enumerate(tensors)]

    def mean(self, prediction: Any, target: Any) -> tuple[Tensor, Tensor]:
        """The masked mean of the element losses and how many elements it is over.

        Of several objectives, the sum of their means and the number of all elements. Without a labelled element the
        mean is 0, and so is its gradient.
        """
        sums = [masked_sum(losses, mask) for losses, mask in self.elements(prediction, target)]
        means = [total / count.clamp(min=1) for total, count in sums]
        return torch.stack(means).sum(), torch.stack([count for _, count in sums]).sum()

    def _call_loss(self, prediction: Any, target: Any) -> list[Tensor]:
        found = self.loss(prediction, target)
        if self.objectives:
            if not isinstance(found, Mapping) or set(found) != set(self.objectives):
                have = _listed(found) if isinstance(found, Mapping) else type(found).__name__
                raise TypeError(
                    f"task {self.name!r}: loss must return a mapping of its objectives, {_listed(self.objectives)}; "
                    f"found {have}"
                )
            tensors = [found[name] for name in self.objectives]
        else:
            tensors = [cast(Tensor, found)]
        for i, losses in enumerate(tensors):
            if not isinstance(losses, Tensor):
                raise TypeError(f"{self._called(i)}: loss must return a tensor, found {type(losses).__name__}")
        # Sums over many elements and everything a rule reads want at least single precision.
        return [losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses for losses in tensors]

    def _called(self, i: int) -> str:
        """The task, and which of its objectives."""
        return f"task {self.name!r}" + (f", objective {self.objectives[i]!r}" if self.objectives else "")

    def _fit(self, mask: Tensor, losses: Tensor, i: int) -> Tensor:
        if losses.ndim == 0:
            raise ValueError(
                f"{self._called(i)}: valid needs one loss per element, but the loss returned a scalar; "
                "use reduction='none'"
            )
        try:
            return _append_dims(mask, losses.ndim).expand_as(losses)
        except RuntimeError as error:
            raise ValueError(
                f"{self._called(i)}: the mask of labelled elements {list(mask.shape)} does not fit "
                f"the losses {list(losses.shape)}"
            ) from error


def masked_sum(losses: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the element losses under the mask, and the number of elements summed."""
    if mask is None:
        return losses.sum(), losses.detach().new_full((), losses.numel())
    return torch.where(mask, losses, 0.0).sum(), mask.sum().to(losses.dtype)


def _append_dims(mask: Tensor, ndim: int) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim)) if mask.ndim < ndim else mask


def _fill_unlabelled(target: Any, mask: Tensor) -> Any:
    """Replace what the mask rules out by the first labelled element, a whole vector where labels are vectors.

    A constant would be wrong for losses that take a logarithm, an inverse or a norm of the target: the derivative of a
    masked infinity is NaN, and zero times NaN is NaN. Without any label, 1 (the class 0) takes its place.
    """
    return tree_map_only(Tensor, lambda tensor: _fill_tensor(tensor, mask), target)


def _fill_tensor(target: Tensor, mask: Tensor) -> Tensor:
    for aligned in (_append_dims(mask, target.ndim), mask.unsqueeze(1) if mask.ndim else mask):
        shapes = list(zip(aligned.shape, target.shape, strict=False))
        if aligned.ndim != target.ndim or any(m not in (1, n) for m, n in shapes) or not target.numel():
            continue
        vector = [d for d, (m, n) in enumerate(shapes) if m == 1 and n > 1]
        place = [d for d in range(target.ndim) if d not in vector]
        rows = target.permute(*place, *vector).reshape(aligned.numel(), -1)
        first = rows[aligned.flatten().to(torch.uint8).argmax()]
        first = first.reshape([n if d in vector else 1 for d, (_, n) in enumerate(shapes)])
        nothing = torch.ones_like(first) if target.is_floating_point() else torch.zeros_like(first)
        return torch.where(aligned, target, torch.where(aligned.any(), first, nothing))
    return target


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs and labels of one step.

    Args:
        inputs: a tensor (or any structure the encoder takes), or a mapping from input name to such. An input may be
            left out if no task that names it has a label here.
        targets: target name to labels, ``[N, *]``. None says that the batch has no label for that task.

    >>> Batch(torch.zeros(2, 3), {"a": torch.ones(2)}).to("cpu").targets["a"]
    tensor([1., 1.])
    """

    inputs: Any
    targets: Mapping[str, Any]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return Batch(tree_map_only(Tensor, move, self.inputs), tree_map_only(Tensor, move, dict(self.targets)))

    def input_of(self, task: Task) -> Any:
        """The input of a task; None if the batch has neither that input nor a label for the task.

        Raises:
            MissingKey: naming the task and the inputs there are.
        """
        if task.input is None:
            if not isinstance(self.inputs, Mapping):
                return self.inputs
            if len(self.inputs) == 1:
                return next(iter(self.inputs.values()))
            raise MissingKey(f"task {task.name!r} names no input, but the batch has several: {_listed(self.inputs)}")
        if isinstance(self.inputs, Mapping) and task.input not in self.inputs and self.target_of(task) is None:
            return None
        if not isinstance(self.inputs, Mapping) or task.input not in self.inputs:
            have = _listed(self.inputs) if isinstance(self.inputs, Mapping) else "one unnamed input"
            raise MissingKey(f"task {task.name!r} has no input {task.input!r}; the batch has: {have}")
        return self.inputs[task.input]

    def target_of(self, task: Task) -> Any:
        """The labels of a task.

        Raises:
            MissingKey: naming the task and the targets there are.
        """
        key = task.target or task.name
        if not isinstance(self.targets, Mapping):
            raise TypeError(f"targets must map names to labels, found {type(self.targets).__name__}")
        if key not in self.targets:
            raise MissingKey(f"task {task.name!r} has no target {key!r}; the batch has: {_listed(self.targets)}")
        return self.targets[key]


def check_tasks(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The tasks as a tuple, after checking that there is one, that all are tasks and that names are unique."""
    tasks = tuple(tasks)
    if not tasks:
        raise ValueError("at least one task is needed")
    for task in tasks:
        if not isinstance(task, Task):
            raise TypeError(f"expected a Task, found {type(task).__name__}: {task!r}")
    names = [task.name for task in tasks]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"duplicate task: {_listed(duplicates)}; every task needs its own name")
    return tasks


def _listed(names: Iterable[str]) -> str:
    return ", ".join(str(name) for name in names) or "none"
