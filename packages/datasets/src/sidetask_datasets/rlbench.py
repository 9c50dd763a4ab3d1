"""Demonstrations of robot tasks by RLBench, for behaviour cloning: what to do next, from what the cameras see.

The tree: RLBench's own folders of pictures, and beside them two arrays instead of its pickle::

    root/TASK/[VARIATION/episodes/]episode*/front_rgb/0.png, 1.png, …    8-bit RGB, and so for other cameras
    root/TASK/[VARIATION/episodes/]episode*/state.npy                    floats [L, S], the robot's state at each step
    root/TASK/[VARIATION/episodes/]episode*/action.npy                   floats [L, A], what was done then

RLBench writes states and actions into ``low_dim_obs.pkl``. Opening a pickle runs whatever is in it, so that is left to
you: docs/datasets/rlbench.md has the few lines that write the arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from sidetask_core import Batch
from torch import Tensor

from sidetask_datasets import draws
from sidetask_datasets import tasks as task_kinds
from sidetask_datasets.adapter import MEAN, STD, Folder, read_splits
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import SPLITS, Dataset, check_seed, check_size, check_switches, choose, choose_primary
from sidetask_datasets.files import (
    DataError,
    first_size,
    is_file,
    is_folder,
    listed,
    missing,
    picture_size,
    read_array,
    read_picture,
    single,
)
from sidetask_datasets.joined import JoinedSplit
from sidetask_datasets.noise import with_noise
from sidetask_datasets.source import Field, Item, Source
from sidetask_datasets.split import DerivedSplit, Split
from sidetask_datasets.view import View

# Those of Auto-λ.
TASKS = (
    "reach_target",
    "push_button",
    "pick_and_lift",
    "pick_up_cup",
    "put_knife_on_chopping_board",
    "take_money_out_safe",
    "put_money_in_safe",
    "take_umbrella_out_of_umbrella_stand",
    "stack_wine",
    "slide_block_to_target",
)
CAMERAS = ("front", "wrist", "left_shoulder", "right_shoulder", "overhead")
_TASK = re.compile(r"[A-Za-z0-9_-]{1,200}")
STATE = " state"  # no name of a task begins with a space


def rlbench(
    root: Folder,
    tasks: Sequence[str] = TASKS,
    *,
    cameras: Sequence[str] = ("front",),
    size: Sequence[int] | None = (128, 128),
    state: bool = True,
    loss: str = "l1",
    every: int = 1,
    primary: Iterable[str] | None = None,
    seed: int = 0,
    noise: bool = False,
    cache: Folder | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """One task for each folder of demonstrations, with images of its own; targets are actions, float32 ``[N, A]``.

    Whole episodes are divided, seeded: a tenth of each task's for the test split, a tenth for validation, at least one
    each. The pictures of several cameras, and the state, a constant map for each of its numbers, are channels of one
    input. States are standardised by the training frames of all tasks. Nothing is augmented: an action belongs to its
    picture as it is.

    Args:
        root: the folder.
        tasks: names of its folders; the ten of Auto-λ by default.
        cameras: among "front", "wrist", "left_shoulder", "right_shoulder" and "overhead".
        size: height and width to bring pictures to, by averaging; None: as they are. RLBench's own default is 128×128.
        state: whether the state is part of the input.
        loss: "l1" or "mse".
        every: so many steps apart are the frames that are taken.
        primary: the tasks that count; None for all.
        seed: of the division, and of `noise`. Another seed is decoded anew.
        noise: add an auxiliary task "noise", see `with_noise`.
        cache: where decoded pictures are kept, see `cache.cache_folder`.
        device: where the frames live.

    Raises:
        DataError: beginning with the path at fault: a folder or file that is missing, fewer than three episodes, a
            pickle in place of arrays, arrays that are no floats [L, S], hold what is not finite, or are of other
            lengths, a picture that is missing, surplus, damaged or of another size.
        ValueError: for an unknown camera or loss, a task that is no name of a folder, or a switch that is neither true
            nor false.
    """
    names = choose("task", tasks, tasks)
    wanted = choose_primary(primary, names)
    check_switches(state=state, noise=noise)
    source, episodes = _find(root, names, cameras, size, every, seed)
    images = read_splits(source, cache=cache)
    shown = {
        split: {name: [e for e in episodes if (e.task, e.split) == (name, split)] for name in names} for split in SPLITS
    }
    known = numpy.concatenate([episode.state for found in shown["train"].values() for episode in found])
    mean, std = known.mean(axis=0, dtype=numpy.float64), known.std(axis=0, dtype=numpy.float64)
    # What never moves says nothing, and is not to be blown up.
    scale = numpy.where(std > 1e-6, std, 1.0)
    splits = {}
    for split, found in shown.items():
        parts: dict[str, Split] = {}
        for name, own in found.items():
            columns = {name: Column(_stacked([e.action for e in own]), "vector")}
            if state:
                columns[name + STATE] = Column(_stacked([(e.state - mean) / scale for e in own]), "vector")
            part: Split = images[f"{name}-{split}"].with_targets(columns)
            parts[name] = StateSplit(part, name + STATE) if state else part
        splits[split] = JoinedSplit(parts)
    channels = len(cameras)
    widths = {name: found[0].action.shape[1] for name, found in shown["train"].items()}
    data = Dataset(
        name="rlbench",
        tasks=tuple(replace(task_kinds.regression(name, name in wanted, loss), input=name) for name in names),
        **splits,
        outputs=widths,
        views={name: View("vector", limits=(-1.0, 1.0)) for name in names},
        input_view=View("image", mean=MEAN * channels, std=STD * channels),
        dense=False,
    )
    return (with_noise(data, seed) if noise else data).to(device)


def rlbench_source(
    root: Folder,
    tasks: Sequence[str] = TASKS,
    *,
    cameras: Sequence[str] = ("front",),
    size: Sequence[int] | None = (128, 128),
    every: int = 1,
    seed: int = 0,
) -> Source:
    """The pictures of `rlbench`, which says what the arguments are and what is raised."""
    return _find(root, tasks, cameras, size, every, seed)[0]


class StateSplit(DerivedSplit):
    """A split one of whose targets is part of the input: for each of its numbers a constant map beside the image.

    Args:
        split: what the rest comes from.
        state: the target ``[N, S]``.
    """

    def __init__(self, split: Split, state: str) -> None:
        super().__init__(split)
        self.state = state

    def derive(self, split: Split) -> StateSplit:
        """The same of another split, which has that target, too."""
        return StateSplit(split, self.state)

    def change(self, batch: Batch, ids: Tensor, epoch: int) -> Batch:
        """The batch with the state beside the image."""
        targets = dict(batch.targets)
        maps = targets.pop(self.state)[:, :, None, None].expand(-1, -1, *batch.inputs.shape[-2:])
        return replace(batch, inputs=torch.cat([batch.inputs, maps], dim=1), targets=targets)


@dataclass(frozen=True)
class _Episode:
    """One demonstration: the pictures of each frame, and what belongs to them, ``[n, S]`` and ``[n, A]``."""

    folder: Path
    task: str
    split: str
    pictures: list[tuple[Path, ...]]
    state: NDArray[numpy.float32]
    action: NDArray[numpy.float32]


def _find(
    root: Folder, tasks: Sequence[str], cameras: Sequence[str], size: Sequence[int] | None, every: int, seed: int
) -> tuple[Source, list[_Episode]]:
    """The files, and what the arrays among them hold."""
    cameras = choose("camera", cameras, CAMERAS)
    wanted = check_size(size)
    check_seed(seed)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every is a number of steps, at least 1, found {every!r}")
    root = Path(root)
    names = choose("task", tasks, tasks)
    problems: list[str] = []
    episodes: list[_Episode] = []
    for task in names:
        if not _TASK.fullmatch(task):
            raise ValueError(f"a task is the name of a folder: letters, digits, '_' and '-', found {task!r}")
        try:
            folders = _episode_folders(root / task)
        except DataError as error:
            problems.append(str(error))
            continue
        order = draws.permutation(draws.key(seed, "rlbench", task), len(folders)).tolist()
        tenth = max(len(folders) // 10, 1)
        splits_of = {index: place // tenth for place, index in enumerate(order)}
        for index, folder in enumerate(folders):
            split = {0: "test", 1: "validation"}.get(splits_of[index], "train")
            try:
                episode, wrong = _read_episode(folder, task, split, cameras, every)
                episodes.append(episode)
                problems += wrong
            except DataError as error:
                problems.append(str(error))
    for what in ("state", "action"):
        widths: dict[int, Path] = {}
        for episode in episodes:
            widths.setdefault(getattr(episode, what).shape[1], episode.folder / f"{what}.npy")
        if len(widths) > 1:
            (width, path), (other, first) = list(widths.items())[1], next(iter(widths.items()))
            problems.append(f"{path}: has {width} numbers a step, {first} has {other}")
    images = (path for episode in episodes for pictures in episode.pictures for path in pictures)
    shape = wanted or first_size(images, picture_size, problems)
    splits: dict[str, list[dict[str, Item]]] = {f"{task}-{split}": [] for split in SPLITS for task in names}
    for episode in episodes:
        splits[f"{episode.task}-{episode.split}"] += [{"image": pictures} for pictures in episode.pictures]
    reader = partial(read_pictures, shape=shape, resize=wanted is not None)
    count = len(cameras)
    field = Field("image", (3 * count, *shape), "uint8", reader, MEAN * count, STD * count)
    settings = {"size": wanted, "cameras": list(cameras)}
    return Source("rlbench", root, {"image": field}, splits, settings, problems=sorted(problems)), episodes


def read_pictures(*paths: Path, shape: tuple[int, int], resize: bool) -> NDArray[Any]:
    """What all cameras see at a step, ``[3 cameras, H, W]`` uint8."""
    found = []
    for path in paths:
        original = picture_size(path) if resize else shape
        found.append(read_picture(path, "colour", shape if resize else None, original).transpose(2, 0, 1))
    return numpy.concatenate(found)


def _episode_folders(folder: Path) -> list[Path]:
    """The episodes of a task, in order of their numbers.

    Raises:
        DataError: if there are fewer than three, one for each split.
    """
    found = []
    variations = [folder / name / "episodes" for name in listed(folder)] if is_folder(folder) else []
    for place in filter(is_folder, [folder, *variations]):
        found += [place / name for name in listed(place) if re.fullmatch("episode[0-9]+", name)]
    if len(found) < len(SPLITS):
        raise DataError(f"{folder}: holds {len(found)} folders episode0, episode1, …; three splits need three at least")
    return sorted(found, key=lambda path: (path.parent, int(path.name.removeprefix("episode"))))


def _read_episode(
    folder: Path, task: str, split: str, cameras: Sequence[str], every: int
) -> tuple[_Episode, list[str]]:
    """An episode, and which of its pictures are missing or surplus."""
    pickled = folder / "low_dim_obs.pkl"
    if is_file(pickled) and not is_file(folder / "state.npy"):
        raise DataError(
            f"{pickled}: a pickle runs whatever is in it, and is not opened; write its states and actions to state.npy "
            "and action.npy, as docs/datasets/rlbench.md shows"
        )
    arrays = {what: _read_floats(folder / f"{what}.npy") for what in ("state", "action")}
    steps = len(arrays["state"])
    if len(arrays["action"]) != steps:
        raise DataError(f"{folder / 'action.npy'}: has {len(arrays['action'])} steps, state.npy has {steps}")
    problems = []
    for camera in cameras:
        place = folder / f"{camera}_rgb"
        problems += missing(place / f"{step}.png" for step in range(steps))
        there = {name for name in listed(place) if name.endswith(".png")} if is_folder(place) else set()
        surplus = there - {f"{step}.png" for step in range(steps)}
        problems += [f"{place / name}: state.npy has no such step" for name in sorted(surplus)]
    episode = _Episode(
        folder,
        task,
        split,
        [tuple(folder / f"{camera}_rgb" / f"{step}.png" for camera in cameras) for step in range(0, steps, every)],
        arrays["state"][::every],
        arrays["action"][::every],
    )
    return episode, problems


def _read_floats(path: Path) -> NDArray[numpy.float32]:
    array = read_array(path)
    if array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
        raise DataError(f"{path}: expected floats [steps, numbers], found {array.dtype} {list(array.shape)}")
    return single(path, array)


def _stacked(arrays: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(numpy.concatenate(arrays).astype(numpy.float32))
