"""Two overlapping handwritten digits per image, two tasks: the multi-digits benchmark without a download.

The scans are the 1797 that scikit-learn brings (8×8 pixels, UCI optical recognition of handwritten digits), enlarged
to 20×20 on a 28×28 tile, as MNIST has them. One tile stands in the top left corner of a 36×36 image, another in the
bottom right one, each moved towards the middle by 0 to 4 pixels along both axes; where they overlap, the brighter pixel
shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sidetask_datasets import draws, tasks
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import Dataset, check_counts, check_seed, choose, choose_primary
from sidetask_datasets.split import ResidentSplit
from sidetask_datasets.view import View

TASKS = ("top_left", "bottom_right")
SIZE, TILE, SCAN, SHIFT = 36, 28, 20, 4
# Mean and standard deviation of the pixels of the default training split.
MEAN, STD = (0.16,), (0.31,)


def digits(
    train: int = 4000,
    validation: int = 1000,
    test: int = 1000,
    *,
    seed: int = 0,
    tasks: Sequence[str] = TASKS,
    primary: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Two-digit images, ``[N, 1, 36, 36]``, with a 10-class task for each corner.

    Scans are divided first (60 %, 20 %, 20 %, seeded) and paired within a split only, so that no scan is in two splits.

    Args:
        train: images to train on.
        validation: images to select models on.
        test: images for the final numbers.
        seed: of the division, the pairs and the shifts.
        tasks: among "top_left" and "bottom_right".
        primary: the tasks that count; None for all.
        device: where the images live.

    Raises:
        ValueError: for an unknown task or fewer than 1 image.

    >>> data = digits(train=8, validation=2, test=2)
    >>> batch = next(data.train.batches(4))
    >>> batch.inputs.shape, sorted(batch.targets)
    (torch.Size([4, 1, 36, 36]), ['bottom_right', 'top_left'])
    """
    names = choose("task", tasks, TASKS)
    wanted = choose_primary(primary, names)
    check_counts(train=train, validation=validation, test=test)
    check_seed(seed)
    scans, labels = _scans()
    order = draws.permutation(draws.key(seed, "digits"), len(scans))
    borders = (0, len(scans) * 6 // 10, len(scans) * 8 // 10, len(scans))
    splits = {}
    for index, (split, count) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        pool = order[borders[index] : borders[index + 1]]
        splits[split] = _pairs(scans[pool], labels[pool], count, draws.key(seed, "digits", split), names).to(device)
    return _assemble(names, wanted, splits)


def _assemble(names: Sequence[str], wanted: frozenset[str], splits: dict[str, ResidentSplit]) -> Dataset:
    classes = tuple(str(digit) for digit in range(10))
    return Dataset(
        name="digits",
        tasks=tuple(tasks.classification(name, 10, primary=name in wanted) for name in names),
        **splits,
        outputs=dict.fromkeys(names, 10),
        views={name: View("label", classes=classes, size=(SIZE, SIZE)) for name in names},
        input_view=View("image", mean=MEAN, std=STD),
        dense=False,
    )


def _scans() -> tuple[Tensor, Tensor]:
    """Tiles ``[1797, 28, 28]`` uint8 and their digits ``[1797]`` int16."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) * (255.0 / 16.0)
    large = functional.interpolate(images, size=(SCAN, SCAN), mode="bicubic", align_corners=False)
    margin = (TILE - SCAN) // 2
    tiles = functional.pad(large.round().clamp(0, 255), (margin,) * 4).squeeze(1)
    return tiles.to(torch.uint8), torch.as_tensor(digits, dtype=torch.int16)


def _pairs(scans: Tensor, labels: Tensor, count: int, key: int, names: Sequence[str]) -> ResidentSplit:
    numbers = draws.uniform(key, torch.arange(count), 6)
    chosen = (numbers[:, :2] * len(scans)).long()
    shifts = (numbers[:, 2:] * (SHIFT + 1)).long()
    first = _place(scans[chosen[:, 0]], shifts[:, 0], shifts[:, 1])
    second = _place(scans[chosen[:, 1]], SIZE - TILE - shifts[:, 2], SIZE - TILE - shifts[:, 3])
    images = torch.maximum(first, second).unsqueeze(1)
    found = {name: Column(labels[chosen[:, side]], "label") for side, name in enumerate(TASKS)}
    return ResidentSplit(Column(images, "image", MEAN, STD), {name: found[name] for name in names})


def _place(tiles: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Each tile on its own empty image, its corner at (top, left)."""
    images = tiles.new_zeros(len(tiles), SIZE, SIZE)
    inside = torch.arange(TILE)
    rows = (top[:, None] + inside)[:, :, None]
    columns = (left[:, None] + inside)[:, None, :]
    images[torch.arange(len(tiles))[:, None, None], rows, columns] = tiles
    return images
