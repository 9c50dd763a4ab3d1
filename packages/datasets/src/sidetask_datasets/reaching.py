"""A point on a plane that reaches, carries and retreats, shown by a script: behaviour cloning without a download.

A white ring moves over a square with a red, a green and a blue disc, as fast as `SPEED` a step. Where it closes on a
disc it holds it, and takes it along until it opens; a ring that holds is filled. Every task has demonstrations of its
own, in places of its own. The script knows where everything is; who learns from it sees pictures of 32×32 pixels, and
the ring's own state. The script says at each step what it would do, and the ring does that with some noise, so that
demonstrations also show how to go on after a mistake.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sidetask_datasets import draws
from sidetask_datasets import tasks as task_kinds
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import Dataset, check_counts, check_seed, check_switches, choose, choose_primary
from sidetask_datasets.joined import JoinedSplit
from sidetask_datasets.noise import with_noise
from sidetask_datasets.rlbench import STATE, StateSplit
from sidetask_datasets.split import Split
from sidetask_datasets.stored import ResidentSplit
from sidetask_datasets.view import View

COLOURS = {"red": (220, 50, 40), "green": (50, 190, 70), "blue": (60, 90, 230)}
TASKS = (
    *(f"reach_{one}" for one in COLOURS),
    *(f"carry_{one}_to_{other}" for one, other in itertools.permutations(COLOURS, 2)),
    "retreat",
)
SIZE, STEPS = 32, 24
SPEED = 0.08  # of the square's side, in each step
NEAR = 0.04  # the same: where the ring can close on a disc, and where it has arrived
_DISC, _RING, _HOLE = 0.08, 0.06, 0.035  # radii
_NOISE = 0.3  # of the speed, in each direction, standard deviation
_PAPER = 40
MEAN, STD = (0.2, 0.2, 0.2), (0.2, 0.2, 0.2)


def reaching(
    train: int = 20,
    validation: int = 5,
    test: int = 10,
    *,
    tasks: Sequence[str] = TASKS,
    state: bool = True,
    loss: str = "l1",
    primary: Iterable[str] | None = None,
    seed: int = 0,
    noise: bool = False,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Ten tasks of behaviour cloning: a frame in, and what the script would do next, float32 ``[N, 3]``.

    An action is a movement in units of `SPEED`, between −1 and 1 along each axis, and whether to hold: 1 or 0. Frames
    come with the ring's place and whether it holds, each as a constant map beside the three colours, as of `rlbench`. A
    demonstration has 24 frames, and is in one split.

    Args:
        train: demonstrations of each task to train on.
        validation: demonstrations of each to select models on.
        test: demonstrations of each for the final numbers.
        tasks: among "reach_red", …, "carry_red_to_green", … and "retreat", to the corner farthest from all discs.
        state: whether the ring's state is part of the input.
        loss: "l1" or "mse".
        primary: the tasks that count; None for all.
        seed: of where discs lie, where the ring begins, how it trembles, and of `noise`.
        noise: add an auxiliary task "noise", see `with_noise`.
        device: where the frames live.

    Raises:
        ValueError: for an unknown task or loss, or a switch that is neither true nor false.

    >>> data = reaching(train=2, validation=1, test=1, tasks=["reach_red", "retreat"])
    >>> batch = next(data.train.batches(4))
    >>> batch.inputs["retreat"].shape, batch.targets["retreat"].shape
    (torch.Size([4, 6, 32, 32]), torch.Size([4, 3]))
    """
    names = choose("task", tasks, TASKS)
    wanted = choose_primary(primary, names)
    check_counts(train=train, validation=validation, test=test)
    check_seed(seed)
    check_switches(state=state, noise=noise)
    splits = {}
    for split, count in {"train": train, "validation": validation, "test": test}.items():
        parts: dict[str, Split] = {}
        for name in names:
            pictures, known, actions = demonstrate(name, count, draws.key(seed, "reaching", name, split))
            columns = {name: Column(actions, "vector")}
            if state:
                columns[name + STATE] = Column(4 * known - 2, "vector")  # about as large as the picture's values
            part = ResidentSplit(Column(pictures, "image", MEAN, STD), columns)
            parts[name] = StateSplit(part, name + STATE) if state else part
        splits[split] = JoinedSplit(parts)
    data = Dataset(
        name="reaching",
        tasks=tuple(replace(task_kinds.regression(name, name in wanted, loss), input=name) for name in names),
        **splits,
        outputs=dict.fromkeys(names, 3),
        views={name: View("vector", limits=(-1.0, 1.0)) for name in names},
        input_view=View("image", mean=MEAN, std=STD),
        dense=False,
    )
    return (with_noise(data, seed) if noise else data).to(device)


def demonstrate(task: str, count: int, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """Demonstrations of a task, one after the other, `STEPS` frames each.

    Returns:
        Pictures ``[N, 3, 32, 32]`` uint8; states ``[N, 3]``: the ring's place in the square (right and down, 0 to 1)
        and 1 or 0 as it holds a disc or not; and actions ``[N, 3]``.
    """
    episodes = torch.arange(count)
    # Of four draws of all places the one that lies widest apart.
    drawn = draws.uniform(key, episodes, 4 * 8).view(count, 4, 4, 2)
    apart = (drawn[:, :, :, None] - drawn[:, :, None]).norm(dim=-1) + 9 * torch.eye(4)
    best = apart.flatten(2).amin(dim=2).argmax(dim=1)
    places = 0.1 + 0.8 * drawn[episodes, best]
    ring, discs = places[:, 0].clone(), places[:, 1:].clone()
    held = torch.full((count,), -1)
    noise = draws.normal(draws.key(key, "noise"), episodes, 2 * STEPS).view(count, STEPS, 2)
    frames, states, actions = [], [], []
    for step in range(STEPS):
        action = act(task, ring, discs, held)
        frames.append(picture(ring, discs, held))
        states.append(torch.cat([ring, (held >= 0).float()[:, None]], dim=1))
        actions.append(action)
        # Who has arrived stays.
        shaken = action[:, :2] + _NOISE * noise[:, step] * (action[:, :2].norm(dim=1, keepdim=True) > 0)
        ring, discs, held = move(ring, discs, held, torch.cat([shaken, action[:, 2:]], dim=1))
    pictures = torch.stack(frames, dim=1).flatten(0, 1)
    return pictures, torch.stack(states, dim=1).flatten(0, 1), torch.stack(actions, dim=1).flatten(0, 1)


def act(task: str, ring: Tensor, discs: Tensor, held: Tensor) -> Tensor:
    """What the script does: movements in units of `SPEED` and whether to hold, ``[E, 3]``."""
    hold = torch.zeros(len(ring))
    names = list(COLOURS)
    if task == "retreat":
        corners = torch.tensor([[0.1, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.9]])
        nearest = (corners[None, :, None] - discs[:, None]).norm(dim=-1).amin(dim=2)
        goal = corners[nearest.argmax(dim=1)]
    elif task.startswith("reach_"):
        goal = discs[:, names.index(task.removeprefix("reach_"))]
    else:
        one, other = (discs[:, names.index(name)] for name in task.removeprefix("carry_").split("_to_"))
        there = (one - other).norm(dim=1) < NEAR
        holds = held >= 0
        goal = torch.where((holds & ~there)[:, None], other, torch.where(there[:, None], ring, one))
        hold = ((holds | ((ring - one).norm(dim=1) < NEAR)) & ~there).float()
    way = (goal - ring) / SPEED
    way = way / way.norm(dim=1, keepdim=True).clamp(min=1.0)
    return torch.cat([torch.where((goal - ring).norm(dim=1, keepdim=True) < NEAR / 2, 0.0, way), hold[:, None]], dim=1)


def move(ring: Tensor, discs: Tensor, held: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The square a step later: the ring ``[E, 2]``, the discs ``[E, 3, 2]``, and which of them is held, −1 for none."""
    distance = (discs - ring[:, None]).norm(dim=-1)
    near, nearest = distance.min(dim=1)
    closes = action[:, 2] > 0.5
    held = torch.where(closes & (held < 0) & (near < NEAR), nearest, torch.where(closes, held, -1))
    ring = (ring + SPEED * action[:, :2]).clamp(0.0, 1.0)
    taken = torch.arange(discs.shape[1]) == held[:, None]
    return ring, torch.where(taken[:, :, None], ring[:, None], discs), held


def picture(ring: Tensor, discs: Tensor, held: Tensor) -> Tensor:
    """The square from above, ``[E, 3, 32, 32]`` uint8."""
    line = (torch.arange(SIZE) + 0.5) / SIZE
    pixels = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    image = torch.full((len(ring), 3, SIZE, SIZE), float(_PAPER))
    for place, colour in zip(discs.unbind(1), COLOURS.values(), strict=True):
        ink = _inside(pixels, place, _DISC)
        image = image + ink * (torch.tensor(colour).view(3, 1, 1) - image)
    hole = _inside(pixels, ring, _HOLE) * (held < 0)[:, None, None, None]
    ink = (_inside(pixels, ring, _RING) - hole).clamp(min=0.0)
    return (image + ink * (255.0 - image)).round().to(torch.uint8)


def _inside(pixels: Tensor, centre: Tensor, radius: float) -> Tensor:
    """How much of each pixel is in a disc, ``[E, 1, 32, 32]``."""
    distance = (pixels - centre[:, None, None]).norm(dim=-1)
    return ((radius - distance) * SIZE + 0.5).clamp(0.0, 1.0).unsqueeze(1)
