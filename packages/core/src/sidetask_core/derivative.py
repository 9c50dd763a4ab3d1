"""How tensors that are computed from parameters move where the parameters move: in forward mode, or by differences."""

from __future__ import annotations

import functools
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from sidetask_core.signals import Mode


class NoForwardDerivative(RuntimeError):
    """An operator of the network has no forward-mode derivative, which mode ``"exact"`` needs; `operator` names it."""

    def __init__(self, operator: str) -> None:
        self.operator = operator
        super().__init__(
            f"operator {operator} has no forward-mode derivative, which mode 'exact' needs; use mode 'difference'"
        )


def derivative_along(
    compute: Callable[[Mapping[str, Tensor]], list[Tensor]],
    parameters: Mapping[str, Tensor],
    here: Sequence[Tensor],
    along: Mapping[str, Tensor],
    mode: Mode,
) -> Tensor:
    """The derivative of what is computed from parameters along a direction, flattened.

    What is computed under `torch.no_grad`, or detached, is constant to ``"exact"``, as it is to a gradient. A
    difference follows it like everything else, and is another number there.

    A difference is taken over a displacement ε^⅔ times as long as the parameters, ε the precision. A fixed length, as
    in Auto-λ's code (0.01), lies across kinks of ReLU and max-pooling, an error that no precision mends.

    Args:
        compute: of other tensors in place of parameters, by name.
        parameters: where it is differentiated.
        here: what it is there.
        along: the direction; parameters that it lacks stay.
        mode: as in `Signals.lookahead`.
    """
    if mode == "exact":
        _load_forward_mode()
        # Nothing here requires a gradient; grad mode tells what is computed outside it.
        with forward_ad.dual_level(), _named_missing_derivative(), torch.enable_grad(), _NoTangentsWithoutGrad():
            duals = {name: forward_ad.make_dual(p := parameters[name], u.to(p)) for name, u in along.items()}
            parts = [forward_ad.unpack_dual(x) for x in compute(duals)]
            return flat([torch.zeros_like(x) if dx is None else dx for x, dx in parts])
    length = _length(along.values())
    precision = max(torch.finfo(x.dtype).eps for x in here)
    reach = precision ** (2 / 3) * _length(parameters[name] for name in along)
    step = reach / length.clamp(min=torch.finfo(length.dtype).tiny)

    def displaced(sign: int) -> Tensor:
        with torch.no_grad():
            return flat(compute({n: (p := parameters[n]) + sign * step.to(p) * u.to(p) for n, u in along.items()}))

    before = displaced(-1) if mode == "difference" else flat(here)
    slope = (displaced(1) - before) / (step * (2 if mode == "difference" else 1))
    # Where nothing moves there is no slope.
    return torch.where(length > 0, slope, 0.0)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Give several tensors as one vector, of single precision at least."""
    return torch.cat([x.flatten().to(torch.promote_types(x.dtype, torch.float32)) for x in tensors])


def _length(tensors: Iterable[Tensor]) -> Tensor:
    """The length of several tensors taken as one vector."""
    return torch.stack([torch.linalg.vector_norm(x.detach()).float() for x in tensors]).square().sum().sqrt()


class _NoTangentsWithoutGrad(TorchFunctionMode):
    """Lets what is computed under `torch.no_grad` be constant, which forward mode by itself does not."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            args, kwargs = tree_map_only(Tensor, _primal, (args, kwargs))
        return func(*args, **kwargs)


def _primal(tensor: Tensor) -> Tensor:
    parts = forward_ad.unpack_dual(tensor)
    return tensor if parts.tangent is None else parts.primal


@functools.cache
def _load_forward_mode() -> None:
    """Use forward mode once: torch then compiles what it lacks, with a deprecation warning about its own code."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def _named_missing_derivative() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        missing = re.search(r"forward AD with (\S+) that does not support it", str(error))
        if missing is not None:
            raise NoForwardDerivative(missing.group(1)) from error
        if not isinstance(error, NotImplementedError) or "jvp" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        caller = next(frame for frame in reversed(frames) if frame.filename != torch.autograd.function.__file__)
        where = f"{Path(caller.filename).name}, line {caller.lineno}: {caller.line}"
        raise NoForwardDerivative(f"autograd.Function without jvp ({where})") from error
