"""Rendered scenes as splits: made once and kept, or made anew for every epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from sidetask_core import Batch
from torch import Tensor

from sidetask_datasets import draws
from sidetask_datasets.augment import Augmentation
from sidetask_datasets.columns import Column, pack_depth, pack_normals
from sidetask_datasets.scenes.layout import furnish
from sidetask_datasets.scenes.render import Labels, render
from sidetask_datasets.scenes.world import CLASSES, PARTS
from sidetask_datasets.split import Split
from sidetask_datasets.stored import ResidentSplit

MEAN, STD = (0.55, 0.55, 0.55), (0.18, 0.18, 0.18)
# Scene ids below this are for training, those of validation and test start at these; ids end at 2³².
TRAINING = 2**31
FIRST = {"train": 0, "validation": TRAINING, "test": TRAINING + 2**30}
_RAYS = 2**15  # at once: what a processor's cache holds
_RAYS_ACCELERATOR = 2**21


@dataclass(frozen=True)
class Recipe:
    """All that decides how scenes look, beside their ids; see `scenes` for the meaning of each."""

    tasks: tuple[str, ...]
    size: tuple[int, int] = (48, 64)
    seed: int = 0
    difficulty: float = 0.5
    label_noise: float = 0.0
    random_classes: int = 0
    samples: int = 1

    def cook(self, ids: Tensor, augmentation: Augmentation | None = None) -> ResidentSplit:
        """Render the scenes `ids` on their device."""
        budget = _RAYS if ids.device.type == "cpu" else _RAYS_ACCELERATOR
        chunk = max(1, budget // (self.size[0] * self.size[1] * self.samples**2))
        parts = [self._cook(some) for some in ids.split(chunk)]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        kinds = {
            "segmentation": "classes",
            "parts": "classes",
            "depth": "depth",
            "normals": "normals",
            "edges": "binary",
        }
        image = Column(joined.pop("image"), "image", MEAN, STD)
        targets = {name: Column(data, kinds[name]) for name, data in joined.items()}  # type: ignore[arg-type]
        return ResidentSplit(image, targets, augmentation)

    def _cook(self, ids: Tensor) -> dict[str, Tensor]:
        scene, camera = furnish(self.seed, ids, size=self.size, difficulty=self.difficulty)
        images, labels = render(scene, camera, self.samples)
        noise = draws.normal(draws.key(self.seed, "sensor"), ids, images[0].numel()).view_as(images)
        images = images + (0.01 + 0.03 * self.difficulty) * noise
        labels = spoil(labels, self.seed, ids, self.label_noise)
        packed = {
            "segmentation": obscure(labels.segmentation, self.seed, ids, self.random_classes).to(torch.uint8),
            "parts": labels.parts.to(torch.uint8),
            "depth": pack_depth(labels.depth),
            "normals": pack_normals(labels.normals),
            "edges": labels.edges.to(torch.uint8),
        }
        return {
            "image": (images * 255.0).round().clamp(0, 255).to(torch.uint8),
            **{name: packed[name] for name in self.tasks},
        }


def spoil(labels: Labels, seed: int, ids: Tensor, amount: float) -> Labels:
    """Labels with noise, the same for a scene whenever it is rendered.

    Args:
        labels: of the scenes `ids`.
        seed: of the world.
        ids: ``[B]``.
        amount: share of pixels whose class, part or edge is replaced by another, chosen evenly; also the standard
            deviation of depth, relative to it, and of each component of the normals before they are made unit again.

    >>> import torch
    >>> ones = torch.ones(1, 8, 8)
    >>> labels = Labels(ones.long(), ones.long(), ones, ones.repeat(3, 1, 1)[None], ones.bool())
    >>> noisy = spoil(labels, 0, torch.tensor([0]), 0.25)
    >>> 0.1 < (noisy.segmentation != 1).float().mean().item() < 0.4
    True
    """
    if amount == 0.0:
        return labels
    pixels = labels.depth[0].numel()

    def flipped(name: str, truth: Tensor, classes: int) -> Tensor:
        numbers = draws.uniform(draws.key(seed, "noise", name), ids, 2 * pixels).view(len(ids), 2, *truth.shape[1:])
        other = (truth + 1 + (numbers[:, 1] * (classes - 1)).long()) % classes
        return torch.where(numbers[:, 0] < amount, other, truth)

    depth = draws.normal(draws.key(seed, "noise", "depth"), ids, pixels).view_as(labels.depth)
    shake = draws.normal(draws.key(seed, "noise", "normals"), ids, 3 * pixels).view_as(labels.normals)
    normals = labels.normals + amount * shake
    return Labels(
        flipped("segmentation", labels.segmentation, len(CLASSES)),
        flipped("parts", labels.parts, len(PARTS)),
        (labels.depth * (1.0 + amount * depth)).clamp(min=0.001),
        normals / normals.norm(dim=1, keepdim=True).clamp(min=1e-9),
        flipped("edges", labels.edges.long(), 2).bool(),
    )


def obscure(segmentation: Tensor, seed: int, ids: Tensor, classes: int) -> Tensor:
    """Half of the pixels given to further classes that say nothing, evenly and the same whenever a scene is rendered.

    >>> import torch
    >>> labels = obscure(torch.zeros(1, 32, 32, dtype=torch.int64), 0, torch.tensor([0]), 2)
    >>> [round((labels == c).float().mean().item(), 1) for c in (0, len(CLASSES), len(CLASSES) + 1)]
    [0.5, 0.3, 0.2]
    """
    if not classes:
        return segmentation
    pixels = segmentation[0].numel()
    numbers = draws.uniform(draws.key(seed, "random classes"), ids, 2 * pixels).view(
        len(ids), 2, *segmentation.shape[1:]
    )
    return torch.where(numbers[:, 0] < 0.5, len(CLASSES) + (numbers[:, 1] * classes).long(), segmentation)


class SceneStream(Split):
    """New scenes in every epoch: epoch e of a stream of n has the scenes e·n to (e + 1)·n − 1, rendered as needed.

    Indexing gives scenes of epoch 0. After 2³¹ scenes they come again.

    Args:
        recipe: how scenes look.
        count: scenes per epoch.
        augmentation: what `batches` does when asked; None, since every image is new anyway: nothing.
        device: where they are rendered.

    >>> stream = SceneStream(Recipe(("depth",), size=(12, 16)), 4)
    >>> first, second = (next(stream.batches(4, epoch=epoch, shuffle=False)) for epoch in (0, 1))
    >>> bool((first.inputs == second.inputs).all())
    False
    """

    def __init__(
        self,
        recipe: Recipe,
        count: int,
        augmentation: Augmentation | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.recipe = recipe
        self.number = count
        self.augmentation = augmentation
        self.place = torch.device(device)

    def __len__(self) -> int:
        return self.number

    @property
    def device(self) -> torch.device:
        """Where scenes are rendered."""
        return self.place

    def to(self, device: torch.device | str, memory: int | None = None) -> SceneStream:
        """The same stream, rendered on `device`, where it keeps nothing."""
        return SceneStream(self.recipe, self.number, self.augmentation, device)

    def identify(self, ids: Tensor, epoch: int) -> Tensor:
        """The numbers of the scenes that have these ids in this epoch."""
        return (ids + epoch * self.number) % TRAINING

    def make(self, ids: Tensor, *, seed: int, epoch: int, augment: bool) -> Batch:
        """The scenes `ids` of this epoch."""
        split = self.recipe.cook(self.identify(ids, epoch), self.augmentation)
        return split.make(torch.arange(len(ids), device=self.device), seed=seed, epoch=epoch, augment=augment)


def clean(recipe: Recipe) -> Recipe:
    """The recipe for validation and test: without label noise and classes that say nothing."""
    return replace(recipe, label_noise=0.0, random_classes=0)
