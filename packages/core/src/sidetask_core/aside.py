"""Passes on the side: the network evaluated once more, in a world that stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RandomState:
    """The state of the generators that layers draw from, on the host and on the device of the network."""

    host: Tensor
    device: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> RandomState:
        """What it is now."""
        there = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), there)

    def restore(self, device: torch.device) -> None:
        """Make it so again."""
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.get_device_module(device).set_rng_state(self.device, device)


def device_of(model: nn.Module) -> torch.device:
    """Where a network's first parameter lies."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def aside(
    model: SplitModel,
    compute: Callable[[SplitModel], Result],
    parameters: Mapping[str, Tensor] | None = None,
    random: RandomState | None = None,
) -> Result:
    """``compute(model)``, with other tensors in place of some parameters, and without a trace.

    Buffers (BatchNorm statistics among them) and random state are afterwards, and if `compute` raises, what they were.
    Modules that keep state elsewhere than in buffers cannot be guarded. Compiled modules run as they were written.

    Args:
        model: the network.
        compute: what to do with it.
        parameters: name, as in ``model.named_parameters()``, to the tensor that takes its place.
        random: random state to begin with; the present one if None.
    """
    # Fresh tensors, never an in-place change: the graph of the training pass is waiting for its backward pass.
    others = {f"model.{name}": buffer.clone() for name, buffer in model.named_buffers()}
    others |= {f"model.{name}": tensor for name, tensor in (parameters or {}).items()}
    device = device_of(model)
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        torch.compiler.set_stance("force_eager"),
    ):
        if random is not None:
            random.restore(device)
        result: Result = functional_call(_Holder(model), others, (compute,))
    return result
