"""Compact storage of one input or target for every sample, and what a batch sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy
import torch
from torch import Tensor

Kind = Literal["image", "classes", "depth", "disparity", "normals", "binary", "label", "soft", "tokens", "vector"]


@dataclass(frozen=True, eq=False)
class Column:
    """One input or target of every sample: few bytes at rest, what losses expect when read.

    ========= ========================================== =====================================================
    kind      stored                                     in a batch
    ========= ========================================== =====================================================
    image     uint8 ``[N, C, H, W]``                     float32 ``[n, C, H, W]``: (value / 255 − mean) / std
    classes   uint8 ``[N, H, W]``, 255 unlabelled        int64 ``[n, H, W]``, −1 unlabelled
    depth     16 bit or float32 ``[N, H, W]``            float32 ``[n, 1, H, W]``, metres, 0 unlabelled
    disparity 16 bit or float32 ``[N, H, W]``            float32 ``[n, 1, H, W]``, pixels or 1/m, 0 unlabelled
    normals   int8 or int16 ``[N, 3, H, W]``, any scale  float32 ``[n, 3, H, W]``, unit or 0 = unlabelled
    binary    uint8 ``[N, H, W]``, 255 unlabelled        int64 ``[n, 1, H, W]``: 1, 0, or −1 unlabelled
    label     int16 ``[N]``, negative unlabelled         int64 ``[n]``
    soft      float16 ``[N, K]``, 0 unlabelled           float32 ``[n, K]``: a distribution, or 0 = unlabelled
    tokens    float16 ``[N, K, h, w]``, 0 unlabelled     float32 ``[n, K, h, w]``: the same for every patch
    vector    float32 ``[N, K]``                         float32 ``[n, K]``, as it is
    ========= ========================================== =====================================================

    Depth and disparity of 16 bits are held in an int16 tensor as the bits of an unsigned number, in steps of `scale`:
    torch has few operations for uint16. Disparity is whatever grows as depth falls, inverse depth too: to bring a scene
    nearer divides the one and multiplies the other. At infinity it is 0, and counts as unlabelled.

    Args:
        data: the stored tensor.
        kind: a row of the table.
        mean: of an image, one number per channel, after division by 255; 0 if empty.
        std: likewise its standard deviation; 1 if empty.
        scale: of 16-bit depth and disparity: what 1 stands for. 0.001: millimetres, up to 65.535 m.

    Raises:
        ValueError: for an unknown kind, or a tensor that does not have the kind's dimensions and type.

    >>> depth = Column(torch.tensor([[[1500, 0]]], dtype=torch.int16), "depth")
    >>> depth.read(torch.tensor([0]))
    tensor([[[[1.5000, 0.0000]]]])
    """

    data: Tensor
    kind: Kind
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    scale: float = 0.001

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"a column's kind is one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        ndim, dtypes = _STORED[self.kind]
        if self.data.ndim != ndim or self.data.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(
                f"a column of {self.kind} is stored as {wanted} with {ndim} dimensions, "
                f"found {self.data.dtype} {list(self.data.shape)}"
            )

    def __len__(self) -> int:
        return len(self.data)

    @property
    def nbytes(self) -> int:
        """Bytes at rest."""
        return self.data.numel() * self.data.element_size()

    def to(self, device: torch.device | str) -> Column:
        """The same column on `device`."""
        return replace(self, data=self.data.to(device))

    def read(self, ids: Tensor) -> Tensor:
        """The samples `ids` (``[n]``, on the column's device) as a batch has them."""
        return self.expand(self.data.index_select(0, ids))

    def room(self, count: int, rows: Tensor) -> Tensor:
        """An empty tensor for so many samples as a batch has them; of their size, and where they are, are `rows`."""
        shape = [count, *rows.shape[1:]]
        if self.kind in ("binary", "depth", "disparity"):
            shape.insert(1, 1)
        integer = self.kind in ("classes", "binary", "label")
        if rows.device.type == "cpu":
            # numpy asks the system for large pages, torch does not, and finding small ones takes a third of the time.
            return torch.from_numpy(numpy.empty(shape, numpy.int64 if integer else numpy.float32))
        return torch.empty(shape, dtype=torch.int64 if integer else torch.float32, device=rows.device)

    def expand(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows of the stored tensor, on any device, as a batch has them: in `out`, or in memory of its own.

        Images may have been interpolated before, and are then floating; `out` may be these themselves.
        """
        if out is None:
            out = self.room(len(rows), rows)
        match self.kind:
            case "image":
                channels = rows.shape[1]
                scale = out.new_tensor(self.std or (1.0,) * channels).view(-1, 1, 1)
                shift = out.new_tensor(self.mean or (0.0,) * channels).view(-1, 1, 1)
                return out.copy_(rows).mul_(1.0 / (255.0 * scale)).sub_(shift / scale)
            case "classes":
                return out.copy_(_signed(rows))
            case "binary":
                return out.copy_(_signed(rows).unsqueeze(1))
            case "depth" | "disparity":
                if rows.is_floating_point():
                    return out.copy_(rows.unsqueeze(1))
                return out.copy_((rows.to(torch.int32) & 0xFFFF).unsqueeze(1)).mul_(self.scale)
            case "normals":
                return unit_(out.copy_(rows))
            case "soft" | "tokens":
                out.copy_(rows)
                total = out.sum(dim=1, keepdim=True)
                return out.div_(torch.where(total > 0, total, 1.0))
            case "label" | "vector":
                return out.copy_(rows)


_STORED: dict[str, tuple[int, tuple[torch.dtype, ...]]] = {
    "image": (4, (torch.uint8,)),
    "classes": (3, (torch.uint8,)),
    "depth": (3, (torch.int16, torch.float32)),
    "disparity": (3, (torch.int16, torch.float32)),
    "normals": (4, (torch.int8, torch.int16)),
    "binary": (3, (torch.uint8,)),
    "label": (1, (torch.int16,)),
    "soft": (2, (torch.float16,)),
    "tokens": (4, (torch.float16,)),
    "vector": (2, (torch.float32,)),
}


def lengths(vectors: Tensor) -> Tensor:
    """Lengths along dimension 1, which stays: ``[n, 3, *]`` to ``[n, 1, *]``.

    `torch.linalg.vector_norm` over so short a dimension took forty times as long on the CPU.
    """
    return vectors.square().sum(dim=1, keepdim=True).sqrt()


def unit_(vectors: Tensor) -> Tensor:
    """``[n, 3, H, W]`` at length 1, in place; the zero vector, which means unlabelled, stays zero."""
    # By components: a sum over so short a dimension, and a square of its own, take twice as long.
    x, y, z = vectors.unbind(1)
    inverse = (x * x).addcmul_(y, y).addcmul_(z, z).clamp_(min=1e-24).rsqrt_()
    return vectors.mul_(inverse.unsqueeze(1))


def pack_depth(metres: Tensor) -> Tensor:
    """Depth ``[N, H, W]`` in metres as a column stores it: whole millimetres, at most 65.535 m."""
    return (metres * 1000.0).round().clamp(0, 65535).to(torch.int32).to(torch.int16)


def pack_normals(vectors: Tensor) -> Tensor:
    """Unit vectors ``[N, 3, H, W]`` as int16: direction to 0.003°."""
    return (vectors * 32767.0).round().to(torch.int16)


def _signed(rows: Tensor) -> Tensor:
    # In bytes, 255 + 1 is 0. In 16 bits, since what comes of it takes 64.
    return (rows + 1).to(torch.int16).sub_(1)
