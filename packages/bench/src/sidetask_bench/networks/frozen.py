"""A small head on the encoder of a trained run: how good are its features for another task?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from sidetask_core import SplitModel
from sidetask_datasets import Dataset
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from sidetask_bench.networks.parts import Prediction, resize, typical_label


def frozen(dataset: Dataset, *, run: str | Path, task: str, width: int = 32) -> SplitModel:
    """Two layers for each task, on what a trained network's head reads.

    The encoder is that of another run, at its chosen epoch, and learns no more; there is nothing to split.

    Args:
        dataset: says which heads there are; its images have the size that the run's had.
        run: folder of the run.
        task: the task of the run whose features are read.
        width: channels between the two layers.

    Raises:
        ValueError: for features that are not maps ``[N, C, H, W]`` or vectors ``[N, C]``.
    """
    from sidetask_bench.run import load_run  # here, for a run is made of networks

    try:
        from sidetask_saal import Frozen
    except ImportError as error:
        raise ImportError("the network frozen needs the package sidetask-saal") from error

    _, _, model = load_run(run)
    encoder = Frozen(model, task)
    features, _ = tree_flatten(encoder(dataset.validation[0].inputs))
    shapes = [list(x.shape) for x in features if isinstance(x, Tensor)]
    if not shapes or any(len(shape) not in (2, 4) for shape in shapes) or (dataset.dense and 2 in map(len, shapes)):
        raise ValueError(
            f"the features of {run} are {shapes}; expected {'maps' if dataset.dense else 'maps or vectors'}"
        )
    channels = sum(shape[1] for shape in shapes)
    size = dataset.input_shape[-2:] if dataset.dense else None
    heads = {
        one.name: TransferHead(channels, dataset.outputs[one.name], width, size, typical_label(dataset, one))
        for one in dataset.tasks
    }
    return SplitModel(encoder, heads)


class TransferHead(nn.Module):
    """Two layers. Dense: all maps are brought to the finest, joined, and read pixel by pixel. Otherwise averaged."""

    def __init__(self, channels: int, outputs: int, width: int, size: Sequence[int] | None, start: float) -> None:
        super().__init__()
        self.size = size
        last = nn.Linear(width, outputs) if size is None else Prediction(width, outputs, start)
        first = nn.Linear(channels, width) if size is None else nn.Conv2d(channels, width, 1)
        self.layers = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, features: object) -> Tensor:
        """``[N, outputs]``, or ``[N, outputs, H, W]``."""
        maps = [x for x in tree_flatten(features)[0] if isinstance(x, Tensor)]
        if self.size is None:
            vectors = [x.mean(dim=(2, 3)) if x.ndim == 4 else x for x in maps]
            found: Tensor = self.layers(torch.cat(vectors, dim=1))
            return found
        height, width = max((x.shape[-2], x.shape[-1]) for x in maps)
        joined = torch.cat([resize(x, (height, width)) for x in maps], dim=1)
        return resize(self.layers(joined), (self.size[0], self.size[1]))
