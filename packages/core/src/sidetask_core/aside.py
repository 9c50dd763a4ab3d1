"""Passes on the side: the network evaluated once more, in a world that stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sidetask_core.split import SplitModel

Result = TypeVar("Result")


class _Holder(nn.Module):
    """Lets `functional_call` run any function of a model."""

    def __init__(self, model: SplitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[SplitModel], Any]) -> Any:
        return compute(self.model)


def aside(
    model: SplitModel, compute: Callable[[SplitModel], Result], parameters: Mapping[str, Tensor] | None = None
) -> Result:
    """``compute(model)``, with other tensors in place of some parameters, and without a trace.

    Buffers (BatchNorm statistics among them) and random state are afterwards, and if `compute` raises, what they were.
    Modules that keep state elsewhere than in buffers cannot be guarded. Compiled modules run as they were written.

    Args:
        model: the network.
        compute: what to do with it.
        parameters: name, as in ``model.named_parameters()``, to the tensor that takes its place.
    """
    # Fresh tensors, never an in-place change: the graph of the training pass is waiting for its backward pass.
    others = {f"model.{name}": buffer.clone() for name, buffer in model.named_buffers()}
    others |= {f"model.{name}": tensor for name, tensor in (parameters or {}).items()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        torch.compiler.set_stance("force_eager"),
    ):
        result: Result = functional_call(_Holder(model), others, (compute,))
    return result
