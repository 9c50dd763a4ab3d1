"""Handwritten digits in up to twenty domains, a task for each: the many-to-many setting without a download.

A domain tells five digits apart, 0 to 4 or 5 to 9, in images of its own, and renders them in a way of its own: turned
by a multiple of 36 degrees, in one colour on another. What the scans have in common helps across domains; how they are
turned and coloured does not. The scans are those that scikit-learn brings, 8×8 pixels, enlarged to 32×32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from sidetask_datasets import draws
from sidetask_datasets import tasks as task_kinds
from sidetask_datasets.augment import Augmentation
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import Dataset, check_counts, check_seed, check_switches, choose, choose_primary
from sidetask_datasets.digits import scan_pools
from sidetask_datasets.joined import JoinedSplit
from sidetask_datasets.noise import with_noise
from sidetask_datasets.stored import ResidentSplit
from sidetask_datasets.view import View

CLASSES = 5  # of each task
SIZE = 32
_TURNS = 10
TASKS = tuple(f"{half}_{36 * turn}" for turn in range(_TURNS) for half in ("low", "high"))
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def digit_domains(
    train: int = 200,
    validation: int = 100,
    test: int = 100,
    *,
    tasks: Sequence[str] = TASKS,
    primary: Iterable[str] | None = None,
    seed: int = 0,
    noise: bool = False,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Classifications of five digits, each with images of its own ``[N, 3, 32, 32]``.

    Scans are divided as those of `digits` are, so that none is in two splits. Every domain draws its own from the
    split, each at most once. Training images are padded by 2 pixels and cropped.

    Args:
        train: images of each domain to train on.
        validation: images of each to select models on.
        test: images of each for the final numbers.
        tasks: among "low_0", "high_0", "low_36", …, "high_324": the digits, and by how many degrees they are turned.
        primary: the tasks that count; None for all.
        seed: of the division, of which scans a domain gets, of its colours, and of `noise`.
        noise: add an auxiliary task "noise", see `with_noise`.
        device: where the images live.

    Raises:
        ValueError: for an unknown task, more images than the split has scans of a domain's digits, or a switch that is
            neither true nor false.

    >>> data = digit_domains(train=8, validation=2, test=2, tasks=["low_0", "high_36"])
    >>> batch = next(data.train.batches(4))
    >>> batch.inputs["low_0"].shape, sorted(batch.targets)
    (torch.Size([4, 3, 32, 32]), ['high_36', 'low_0'])
    """
    names = choose("task", tasks, TASKS)
    wanted = choose_primary(primary, names)
    check_counts(train=train, validation=validation, test=test)
    check_seed(seed)
    check_switches(noise=noise)
    pools = scan_pools(seed)
    splits = {}
    for split, count in {"train": train, "validation": validation, "test": test}.items():
        augmentation = Augmentation((1.0,), flip=0.0, pad=2) if split == "train" else None
        parts = {}
        for name in names:
            tiles, digits = _own(*pools[split], name, split, count, seed)
            image = Column(_rendered(tiles, name, seed), "image", MEAN, STD)
            parts[name] = ResidentSplit(image, {name: Column(digits, "label")}, augmentation)
        splits[split] = JoinedSplit(parts)
    data = Dataset(
        name="digit_domains",
        tasks=tuple(
            replace(task_kinds.classification(name, CLASSES, primary=name in wanted), input=name) for name in names
        ),
        **splits,
        outputs=dict.fromkeys(names, CLASSES),
        views={name: View("label", classes=tuple(str(_first(name) + i) for i in range(CLASSES))) for name in names},
        input_view=View("image", mean=MEAN, std=STD),
        dense=False,
    )
    return (with_noise(data, seed) if noise else data).to(device)


def _first(name: str) -> int:
    """The least digit of a domain."""
    return 0 if name.startswith("low") else CLASSES


def _own(tiles: Tensor, digits: Tensor, name: str, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The scans of a domain in a split, and their labels from 0."""
    first = _first(name)
    there = ((digits >= first) & (digits < first + CLASSES)).nonzero().squeeze(1)
    if len(there) < count:
        raise ValueError(f"{name}: {split} is at most {len(there)} images, found {count}")
    ids = there[draws.permutation(draws.key(seed, "digit_domains", name, split), len(there))[:count]]
    return tiles[ids], digits[ids] - first


def _rendered(tiles: Tensor, name: str, seed: int) -> Tensor:
    """Tiles ``[N, 28, 28]`` uint8 turned and coloured, ``[N, 3, 32, 32]`` uint8."""
    angle = torch.tensor(float(name.rpartition("_")[2])).deg2rad()
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    ink = functional.interpolate(tiles[:, None] / 255.0, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    grid = functional.affine_grid(
        torch.cat([turn, torch.zeros(2, 1)], dim=1).expand(len(ink), 2, 3), list(ink.shape), align_corners=False
    )
    ink = functional.grid_sample(ink, grid, align_corners=False)
    colours = draws.uniform(draws.key(seed, "digit_domains", "colours", name), torch.arange(1), 6).view(2, 3, 1, 1)
    # Dark paper and light ink or the reverse, whatever the tint, so that every digit can be read.
    paper, pen = 0.35 * colours[0], 0.65 + 0.35 * colours[1]
    if float(colours.sum()) > 3.0:
        paper, pen = pen, paper
    return (255 * (paper + (pen - paper) * ink)).round().to(torch.uint8)
