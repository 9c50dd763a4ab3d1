"""Any feature extractor of the library timm as the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sidetask_core import SplitModel
from sidetask_datasets import Dataset
from torch import Tensor, nn

from sidetask_bench.networks.classifiers import MeanHead
from sidetask_bench.networks.convolutional import PyramidHead
from sidetask_bench.networks.parts import check_cut, image_shape, typical_label
from sidetask_bench.networks.weights import read_weights


def timm(
    dataset: Dataset,
    *,
    cut: int | None = None,
    model: str = "resnet18",
    pretrained: bool = False,
    weights: str | Path | None = None,
    head_width: int = 128,
    hidden: int = 0,
) -> SplitModel:
    """An encoder of timm by its name, shared whole or copied for each task.

    Dense heads are feature pyramids over the maps that timm hands out; classification heads average the last one.

    Args:
        dataset: says how large the images are, which heads there are, and whether they are dense.
        cut: 1 (the default) shares the encoder, 0 is single-task learning: timm's encoders are one piece here.
        model: timm's name of it, ``timm.list_models()``; it must be one that gives features (``features_only``).
        pretrained: download timm's weights.
        weights: a local file with weights instead, a `state_dict` or safetensors of timm's.
        head_width: channels inside a dense head.
        hidden: width of a classification head's hidden layer; 0: none.

    Returns:
        A model from ``[N, C, H, W]`` to ``[N, outputs, H, W]`` (dense) or ``[N, outputs]`` for each task.

    Raises:
        ValueError: if timm is not installed or has no such model, or for an impossible cut or weights that do not fit.
    """
    try:
        from timm import create_model
    except ImportError as error:
        raise ValueError("the network 'timm' needs timm; pip install 'sidetask-bench[timm]'") from error
    channels, height, width = image_shape(dataset)
    options: dict[str, Any] = {"features_only": True, "in_chans": channels}
    try:
        encoder: Any = create_model(model, pretrained=pretrained, **options)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"timm's model {model!r} cannot be made: {error}") from error
    if weights is not None:
        state = read_weights(Path(weights))
        # timm passes over names that do not fit without a word, and joins the first parts of them by underscores.
        there = {name.replace(".", "_") for name in state}
        needed = [name for name in encoder.state_dict() if not name.endswith("num_batches_tracked")]
        missing = [name for name in needed if name.removeprefix("model.").replace(".", "_") not in there]
        if missing:
            raise ValueError(f"{weights}: {len(missing)} tensors of timm's {model!r} are missing, {missing[0]!r} first")
        encoder = create_model(model, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **options)
    widths = encoder.feature_info.channels()
    stage = Features(encoder, widths)
    heads: dict[str, nn.Module] = {}
    for task in dataset.tasks:
        outputs = dataset.outputs[task.name]
        if dataset.dense:
            start = typical_label(dataset, task)
            heads[task.name] = PyramidHead(widths, head_width, outputs, (height, width), start)
        else:
            heads[task.name] = nn.Sequential(Last(), MeanHead(widths[-1], hidden, outputs))
    return SplitModel.from_stages([stage], check_cut(cut, 1), heads)


class Features(nn.Module):
    """timm's list of maps, finest first, channels before height and width."""

    def __init__(self, encoder: nn.Module, widths: list[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.widths = widths

    def forward(self, x: Tensor) -> list[Tensor]:
        """From an image to maps ``[N, C, h, w]``."""
        # Some families hand out [N, h, w, C].
        maps = zip(self.encoder(x), self.widths, strict=True)
        return [one if one.shape[1] == width else torch.movedim(one, -1, 1) for one, width in maps]


class Last(nn.Module):
    """The coarsest of several maps."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        """The last one."""
        return maps[-1]
