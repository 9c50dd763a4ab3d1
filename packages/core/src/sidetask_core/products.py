"""Convolutions and linear layers, whose products a derivative along a direction need not compute a second time.

Nearly all of a network's work is in them. A forward-mode derivative wants their values beside their derivatives, and
the values were there when the step itself ran the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Each is linear in its input and in its weight, and a bias is added.
_PRODUCTS = {
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
}
_FACTORS = ("input", "weight", "bias")


@dataclass(frozen=True)
class Product:
    """What one of them gave.

    Attributes:
        func: which it was.
        weight: the name of its weight in the network; None for one that is computed.
        shapes: of its input and weight.
        value: what it gave, where the pass that computed it has it, too.
        version: of that memory, which another one says has been written over; None if that cannot be told.
    """

    func: Callable[..., Tensor]
    weight: str | None
    shapes: Sequence[torch.Size]
    value: Tensor
    version: int | None

    @property
    def intact(self) -> bool:
        """Whether `value` is still what it was."""
        return self.version is not None and self.value._version == self.version


def named(model: nn.Module) -> dict[int, str]:
    """The names of a network's tensors by their id, whatever tensors stand in for them at present."""
    return {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


class Noted(TorchFunctionMode):
    """Notes the products of what runs within it, in `found`; `names` are those of the network (`named`)."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.found: list[Product] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # A compiled function must not depend on this mode's state: it would be compiled again in every step.
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        value = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and not _transformed():
            factors = _factors(args, kwargs or {})[:2]
            there = value.detach()
            version = None if there.is_inference() else there._version
            self.found.append(Product(func, self.names.get(id(factors[1])), _shapes(factors), there, version))
        return value


class Reused(TorchFunctionMode):
    """Takes the values of products from an earlier run of the same, and computes their derivatives alone.

    From one on that is not what it was then, by its function, the shapes of its factors and the name of its weight,
    values are computed, too: a layer may be left out at random, or have run in a compiled function, where it is not
    seen. Where the weight has no name its value is always computed. Derivatives are always computed here, and in one
    way, so that it changes no bit whether values were there: after a resume they are not.
    """

    def __init__(self, noted: Sequence[Product], names: Mapping[int, str]) -> None:
        super().__init__()
        self.noted = iter(noted)
        self.names = names
        self._another = False

    @property
    def same(self) -> bool:
        """Whether what has run within was the same to its end, so that whatever reads its output may go on with it."""
        return not self._another and next(self.noted, None) is None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or _transformed():
            return func(*args, **kwargs)
        factors = _factors(args, kwargs)
        known = next(self.noted, None)
        this = func, self.names.get(id(factors[1])), _shapes(factors[:2])
        if known is None or this != (known.func, known.weight, known.shapes):
            self.noted, known, self._another = iter(()), None, True
        parts = [(None, None) if factor is None else forward_ad.unpack_dual(factor) for factor in factors]
        (x, dx), (weight, dweight), (bias, dbias) = parts
        pairs = [(a, b) for a, b in ((dx, weight), (x, dweight)) if a is not None and b is not None]
        there = known is not None and known.weight is not None and known.intact
        if not pairs:
            return known.value if known is not None and there and dbias is None else func(*args, **kwargs)
        options = {name: option for name, option in kwargs.items() if name not in _FACTORS}
        value = known.value if known is not None and there else func(x, weight, bias, *args[3:], **options)
        # The derivative by the bias is added once.
        moved = [func(*pair, b, *args[3:], **options) for pair, b in zip(pairs, (dbias, None), strict=False)]
        return forward_ad.make_dual(value, moved[0] if len(moved) == 1 else moved[0].add_(moved[1]))


def _transformed() -> bool:
    """Whether a transform of `torch.func` is at work, whose tensors cannot be taken apart."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def can_be_noted(model: nn.Module) -> bool:
    """Whether the products of a network can be seen; those of compiled modules cannot."""
    return not any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules())


def _shapes(factors: Sequence[Tensor]) -> list[torch.Size]:
    return [factor.shape for factor in factors]


def _factors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Input, weight and bias of a product."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(_FACTORS)]
