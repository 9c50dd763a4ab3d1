"""Procedural rooms with exact labels: five dense tasks on any device, without a download.

A room is furnished by a seeded hash of its number, seen through a pinhole camera by casting rays, lit by one lamp with
shadows, and photographed with noise. Every label is what the ray met, not an estimate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from sidetask_datasets import tasks as task_kinds
from sidetask_datasets.augment import Augmentation
from sidetask_datasets.dataset import Dataset, check_counts, check_seed, check_switches, choose, choose_primary
from sidetask_datasets.noise import with_noise
from sidetask_datasets.scenes.layout import furnish
from sidetask_datasets.scenes.render import Labels, render
from sidetask_datasets.scenes.stream import FIRST, MEAN, STD, Recipe, SceneStream, clean
from sidetask_datasets.scenes.world import CLASSES, COLOURS, PART_COLOURS, PARTS, Camera, Scene, Shapes
from sidetask_datasets.split import Split
from sidetask_datasets.view import View

__all__ = [
    "CLASSES",
    "PARTS",
    "TASKS",
    "Camera",
    "Labels",
    "Recipe",
    "Scene",
    "SceneStream",
    "Shapes",
    "furnish",
    "render",
    "scenes",
]

TASKS = ("segmentation", "parts", "depth", "normals", "edges")
"""The tasks of the rooms."""


def scenes(
    size: Sequence[int] = (48, 64),
    train: int = 400,
    validation: int = 100,
    test: int = 100,
    *,
    seed: int = 0,
    difficulty: float = 0.5,
    label_noise: float = 0.0,
    random_classes: int = 0,
    tasks: Sequence[str] = ("segmentation", "depth", "normals"),
    primary: Iterable[str] | None = None,
    samples: int = 1,
    stream: bool = False,
    normals_loss: str = "cosine",
    noise: bool = False,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Rooms with tables, chairs, cabinets, balls, pillars, lamps, rugs, windows, doors and pictures.

    Args:
        size: height and width in pixels.
        train: scenes to train on, per epoch if streamed.
        validation: scenes to select models on.
        test: scenes for the final numbers.
        seed: of the world: other seeds, other rooms. The splits of one seed never share a room.
        difficulty: 0 to 1: more furniture, less typical colours, less contrast, more varied light, more sensor noise
            (standard deviation 0.01 to 0.04 of white).
        label_noise: 0 to 1, of `train` only: share of pixels whose class, part or edge is wrong; standard deviation of
            depth, relative to it, and of each component of the normals.
        random_classes: so many further classes of segmentation that say nothing: half of the pixels of `train` carry
            one of them at random. For methods that should find out which labels help.
        tasks: among "segmentation" (13 classes), "parts" (11), "depth" (metres), "normals" and "edges".
        primary: the tasks that count; None for all.
        samples: a pixel's colour is the mean over samples × samples rays, at about so many times the cost.
        stream: train on new scenes in every epoch, rendered batch by batch, instead of keeping `train` of them.
        normals_loss: "cosine", "l1" or "elements", see `losses`.
        noise: add an auxiliary task "noise", see `with_noise`.
        device: where scenes are rendered and kept.

    Raises:
        ValueError: for an unknown task or loss, a size that is not two positive numbers, fewer than 1 scene, a
            difficulty or label noise outside 0 to 1, more than 100 random classes, or a switch that is neither true nor
            false.

    >>> data = scenes(size=(12, 16), train=4, validation=2, test=2, tasks=["depth", "edges"], primary=["depth"])
    >>> batch = next(data.train.batches(4))
    >>> batch.inputs.shape, batch.targets["depth"].shape, [task.primary for task in data.tasks]
    (torch.Size([4, 3, 12, 16]), torch.Size([4, 1, 12, 16]), [True, False])
    """
    names = choose("task", tasks, TASKS)
    wanted = choose_primary(primary, names)
    check_counts(train=train, validation=validation, test=test, samples=samples)
    check_seed(seed)
    check_switches(stream=stream, noise=noise)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is a height and a width in pixels, found {size!r}")
    for name, value in (("difficulty", difficulty), ("label_noise", label_noise)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is between 0 and 1, found {value}")
    if not isinstance(random_classes, int) or not 0 <= random_classes <= 100:
        raise ValueError(f"random_classes is a number of classes, 0 to 100, found {random_classes!r}")
    recipe = Recipe(names, (size[0], size[1]), seed, difficulty, label_noise, random_classes, samples)
    outputs = OUTPUTS | {"segmentation": OUTPUTS["segmentation"] + random_classes}
    more = [f"random {i + 1}" for i in range(random_classes)]
    greys = [(level := 255 - 155 * i // random_classes, level, level) for i in range(random_classes)]
    views = VIEWS | {"segmentation": View("classes", classes=(*CLASSES, *more), colours=(*COLOURS, *greys))}
    chosen = tuple(task_kinds.dense(name, outputs[name], name in wanted, normals_loss) for name in names)

    def kept(recipe: Recipe, split: str, count: int, augmentation: Augmentation | None = None) -> Split:
        return recipe.cook(torch.arange(FIRST[split], FIRST[split] + count, device=device), augmentation)

    data = Dataset(
        name="scenes",
        tasks=chosen,
        train=SceneStream(recipe, train, device=device) if stream else kept(recipe, "train", train, Augmentation()),
        validation=kept(clean(recipe), "validation", validation),
        test=kept(clean(recipe), "test", test),
        outputs={name: outputs[name] for name in names},
        views={name: views[name] for name in names},
        input_view=View("image", mean=MEAN, std=STD),
        dense=True,
    )
    return with_noise(data, seed) if noise else data


OUTPUTS = {"segmentation": len(CLASSES), "parts": len(PARTS), "depth": 1, "normals": 3, "edges": 1}
VIEWS = {
    "segmentation": View("classes", classes=CLASSES, colours=COLOURS),
    "parts": View("classes", classes=PARTS, colours=PART_COLOURS),
    "depth": View("scalar", limits=(0.8, 6.5)),
    "normals": View("normals"),
    "edges": View("binary"),
}
