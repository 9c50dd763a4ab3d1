"""Images and exact labels of a batch of scenes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sidetask_datasets.scenes.shade import FRAME, develop, shade
from sidetask_datasets.scenes.trace import Hits, trace
from sidetask_datasets.scenes.world import PANELS, Camera, Scene

_CREASE = 0.866  # cosine of 30°


@dataclass(frozen=True, eq=False)
class Labels:
    """What is true of every pixel's centre.

    Args:
        segmentation: ``[B, H, W]`` int64, class ids (`CLASSES`).
        parts: ``[B, H, W]`` int64, part ids (`PARTS`).
        depth: ``[B, H, W]`` float32, metres along the camera's axis.
        normals: ``[B, 3, H, W]`` float32, of length 1, in camera axes (x right, y down, z forward), towards the camera.
        edges: ``[B, H, W]`` bool: the pixel to the right or below is of another class or shape, or its normal is
            turned by more than 30°.
    """

    segmentation: Tensor
    parts: Tensor
    depth: Tensor
    normals: Tensor
    edges: Tensor


def render(scene: Scene, camera: Camera, samples: int = 1) -> tuple[Tensor, Labels]:
    """See the scenes through their cameras.

    Args:
        scene: ``B`` of them.
        camera: one for each.
        samples: a pixel's colour is the mean over samples × samples rays; labels are those of its centre.

    Returns:
        Images ``[B, 3, H, W]`` float32 between 0 and 1, without noise, and the labels.

    Raises:
        ValueError: if there are not as many cameras as scenes, or `samples` is below 1.
    """
    if len(camera.position) != len(scene):
        raise ValueError(f"{len(scene)} scenes need as many cameras, found {len(camera.position)}")
    if samples < 1:
        raise ValueError(f"samples is at least 1, found {samples}")
    eye, rotation = camera.position.unsqueeze(1), camera.rotation()
    hits = trace(scene, eye, camera.rays() @ rotation.mT)
    labels = _labels(scene, camera, hits, hits.normal @ rotation)
    if samples == 1:
        colour = shade(scene, hits, eye, 1.0 / camera.focal[:, None])
    else:
        fine = Camera(
            camera.position,
            camera.yaw,
            camera.pitch,
            camera.focal * samples,
            camera.principal * samples,
            (camera.size[0] * samples, camera.size[1] * samples),
        )
        colour = shade(scene, trace(scene, eye, fine.rays() @ rotation.mT), eye, 1.0 / fine.focal[:, None])
        colour = colour.view(len(scene), camera.size[0], samples, camera.size[1], samples, 3).mean(dim=(2, 4))
    return develop(colour).view(len(scene), *camera.size, 3).permute(0, 3, 1, 2).contiguous(), labels


def _labels(scene: Scene, camera: Camera, hits: Hits, normal: Tensor) -> Labels:
    image = (len(scene), *camera.size)
    segmentation = scene.labels.gather(1, hits.surface).view(image)
    normals = normal.view(*image, 3).permute(0, 3, 1, 2).contiguous()
    # Whatever is of one class is of one shape as far as edges go, unless it is one of the shapes put into the room.
    shape = torch.where(hits.surface < PANELS + scene.panels.shape[1], 0, hits.surface).view(image)
    edges = torch.zeros(image, dtype=torch.bool, device=normals.device)
    for axis in (1, 2):
        length = camera.size[axis - 1] - 1
        here = [tensor.narrow(axis, 0, length) for tensor in (segmentation, shape)]
        next_ = [tensor.narrow(axis, 1, length) for tensor in (segmentation, shape)]
        turn = (normals.narrow(axis + 1, 0, length) * normals.narrow(axis + 1, 1, length)).sum(1)
        differs = (here[0] != next_[0]) | (here[1] != next_[1]) | (turn < _CREASE)
        edges.narrow(axis, 0, length).logical_or_(differs)
    return Labels(segmentation, _parts(scene, hits).view(image), hits.distance.view(image), normals, edges)


def _parts(scene: Scene, hits: Hits) -> Tensor:
    """Part ids from faces."""
    frame = (hits.face == 1) & (hits.share.abs().amax(-1) > FRAME)
    # Both lists go on alike from "room", "pane", "box top"; "frame" stands before "pane".
    parts = torch.where(hits.face == 0, 0, torch.where(frame, 1, hits.face + 1))
    return torch.where(scene.legs.gather(1, hits.surface), 10, parts)
