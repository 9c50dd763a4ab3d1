"""What every dataset of this package is: tasks, three splits, and how to draw what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from sidetask_core import Task
from torch import Tensor

from sidetask_datasets.split import Split
from sidetask_datasets.view import Pixels, View

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Tasks with their losses and metrics, seeded disjoint splits, and views.

    Args:
        name: of the dataset.
        tasks: losses, validity and metrics (name to metric, headline first) in place.
        train: the only split that is ever augmented or made noisy; the three are disjoint.
        validation: what model selection reads.
        test: what nothing but a final number reads.
        outputs: task name to the number of channels (dense) or logits that its head must give.
        views: task name to how its target or prediction is drawn.
        input_view: how an input is drawn.
        dense: whether tasks label pixels (then heads give ``[N, C, H, W]`` of the input's size) or whole images.

    Raises:
        ValueError: if a task has no entry in `outputs` or `views`.
    """

    name: str
    tasks: tuple[Task, ...]
    train: Split
    validation: Split
    test: Split
    outputs: Mapping[str, int]
    views: Mapping[str, View]
    input_view: View
    dense: bool

    def __post_init__(self) -> None:
        for task in self.tasks:
            for field, mapping in (("outputs", self.outputs), ("views", self.views)):
                if task.name not in mapping:
                    raise ValueError(f"dataset {self.name!r}: task {task.name!r} has no entry in {field}")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, ``(C, H, W)``; where tasks have inputs of their own, these are of one shape."""
        inputs = self.validation[0].inputs
        return tuple((next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs).shape[1:])

    def show_input(self, sample: Tensor) -> Pixels:
        """The picture of one input ``[C, H, W]`` as it is in a batch: ``[H, W, 3]`` uint8."""
        return self.input_view.image(sample)

    def to(self, device: torch.device | str, memory: int | None = None) -> Dataset:
        """The same dataset with its samples on `device`; metrics stay where they are.

        Args:
            device: where batches appear.
            memory: so many bytes of the device are for samples: first train, then validation and test live there if
                they fit into what is left, and are streamed batch by batch if not. None: half of what is free on a CUDA
                device; on any other there is no limit.
        """
        if memory is None and torch.device(device).type == "cuda":
            memory = torch.cuda.mem_get_info(device)[0] // 2
        splits = {}
        for name in SPLITS:
            splits[name] = getattr(self, name).to(device, memory)
            memory = None if memory is None else memory - splits[name].nbytes
        return replace(self, **splits)


def choose(kind: str, asked: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """The names asked for, after checking that there is one, that each is known and none comes twice.

    Args:
        kind: what they are, for the message, in the singular.
        asked: the names wanted.
        known: the names there are.

    Raises:
        ValueError: naming the unknown or repeated one and what there is.

    >>> choose("task", ["depht"], ("depth", "normals"))
    Traceback (most recent call last):
    ...
    ValueError: unknown task 'depht'; there are: depth, normals
    """
    names = (asked,) if isinstance(asked, str) else tuple(asked)
    if not names:
        raise ValueError(f"at least one {kind} is needed; there are: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; there are: {', '.join(known)}")
        if names.count(name) > 1:
            raise ValueError(f"{kind} {name!r} is named twice")
    return names


def choose_primary(primary: Iterable[str] | None, tasks: Sequence[str]) -> frozenset[str]:
    """The primary ones among `tasks`: all for None."""
    return frozenset(tasks if primary is None else choose("primary task", primary, tasks))


def check_seed(seed: object) -> None:
    """Refuse a seed that is not a whole number (text would be hashed without a word)."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed is a whole number, found {seed!r}")


def check_switches(**switches: object) -> None:
    """Refuse what is neither true nor false, naming which; ``off`` is a text in YAML, and a text would mean yes."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is true or false, found {value!r}")


def check_size(size: Sequence[int] | None) -> tuple[int, int] | None:
    """A height and a width in pixels as a pair, after checking that it is one; None stays."""
    if size is None:
        return None
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"size is a height and a width in pixels, found {size!r}")
    return size[0], size[1]


def check_counts(**counts: object) -> None:
    """Refuse a number of samples below 1, naming which."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} is a number of samples, at least 1, found {count!r}")
