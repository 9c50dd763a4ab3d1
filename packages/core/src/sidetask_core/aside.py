"""Passes on the side: the network evaluated once more, in a world that stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sidetask_core.split import SplitModel

Result = TypeVar("Result")


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
    device = device_of(model)
    devices = [] if device.type == "cpu" else [device]
    with (
        _other_tensors(model, parameters or {}),
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        torch.compiler.set_stance("force_eager"),
    ):
        if random is not None:
            random.restore(device)
        return compute(model)


def unnoticed(module: nn.Module) -> AbstractContextManager[None]:
    """Passes over `module` leave its buffers, BatchNorm statistics among them, as they were."""
    return _other_tensors(module, {})


@contextmanager
def _other_tensors(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Put copies in place of all buffers, and the given tensors in place of parameters.

    `torch.func.functional_call` would do, but for modules that are used in two places, which it does not restore, and
    for recurrent ones, which hold their weights in a list besides.
    """
    # Fresh tensors, never an in-place change: the graph of the training pass is waiting for its backward pass.
    others = {id(model.get_parameter(name)): tensor for name, tensor in parameters.items()}
    others |= {id(buffer): buffer.clone() for buffer in model.buffers()}
    modules = list(model.modules())
    before: list[tuple[dict[str, Any], dict[str, Any]]] = [(dict(m._parameters), dict(m._buffers)) for m in modules]
    recurrent = {module: module._flat_weights for module in modules if isinstance(module, nn.RNNBase)}
    try:
        for module, (own, buffers) in zip(modules, before, strict=True):
            _refill(module, *({name: others.get(id(x), x) for name, x in some.items()} for some in (own, buffers)))
        for layer in recurrent:
            layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]
        yield
    finally:
        for module, (own, buffers) in zip(modules, before, strict=True):
            _refill(module, own, buffers)
        for layer, flat in recurrent.items():
            layer._flat_weights = flat


def _refill(module: nn.Module, parameters: Mapping[str, Any], buffers: Mapping[str, Any]) -> None:
    # Past `__setattr__`, which takes no plain tensor for a parameter.
    for held, tensors in ((module._parameters, parameters), (module._buffers, buffers)):
        held.clear()
        held.update(tensors)
