"""Sums over the processes of `torch.distributed`; without it, everything here does nothing.

The loss of a step is the mean over the labelled elements of *all* processes, so that what each process
computes is a share of one number, and shares add up. Every process must call these in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The index of this process, 0 without `torch.distributed`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def add(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over the processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sum over the processes of each parameter's gradient, in one message per data type.

    A parameter that has a gradient on any process gets one on all; one that has none anywhere keeps None, so that
    an optimizer skips it as it would on one process.
    """
    if world() == 1:
        return list(gradients)
    summed: list[Tensor | None] = [None] * len(parameters)
    kinds = dict.fromkeys((p.device, p.dtype) for p in parameters)
    for kind in kinds:
        places = [i for i, p in enumerate(parameters) if (p.device, p.dtype) == kind]
        parts = [
            g.flatten() if (g := gradients[i]) is not None else parameters[i].new_zeros(parameters[i].numel())
            for i in places
        ]
        used = torch.tensor([gradients[i] is not None for i in places], dtype=kind[1], device=kind[0])
        flat = add(torch.cat([*parts, used]))
        *sums, used = flat.split([p.numel() for p in parts] + [len(places)])
        for i, total, flag in zip(places, sums, used.tolist(), strict=True):
            if flag:
                summed[i] = total.view_as(parameters[i])
    return summed


def broadcast(module: nn.Module) -> None:
    """Give every process the parameters, buffers and random generators of process 0; call it once, before training."""
    if world() == 1:
        return
    tensors = [*module.parameters(), *module.buffers()]
    with torch.no_grad():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
    for part in module.modules():
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            # On the device of the rest, since not every backend sends what lies on the host.
            state = generator.get_state().to(tensors[0].device if tensors else "cpu")
            dist.broadcast(state, 0)
            generator.set_state(state.cpu())
