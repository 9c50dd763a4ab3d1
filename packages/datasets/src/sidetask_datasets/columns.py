"""Compact storage of one input or target for every sample, and what a batch sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

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

    def expand(self, rows: Tensor) -> Tensor:
        """Rows of the stored tensor, on any device, as a batch has them."""
        match self.kind:
            case "image":
                return standardise(rows, self.mean, self.std)
            case "classes":
                return _signed(rows)
            case "binary":
                return _signed(rows).unsqueeze(1)
            case "depth" | "disparity":
                rows = rows.unsqueeze(1)
                return rows if rows.is_floating_point() else (rows.to(torch.int32) & 0xFFFF).float().mul_(self.scale)
            case "normals":
                return unit(rows.to(torch.float32))
            case "label":
                return rows.to(torch.int64)
            case "soft" | "tokens":
                shares = rows.to(torch.float32)
                total = shares.sum(dim=1, keepdim=True)
                return torch.where(total > 0, shares / total, 0.0)
            case "vector":
                return rows


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


def standardise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Values 0 to 255, ``[..., C, H, W]``, to float32 (value / 255 − mean) / std."""
    values = image.to(torch.float32)
    if values is image:
        values = values.clone()
    channels = image.shape[-3]
    scale = values.new_tensor(std or (1.0,) * channels).view(-1, 1, 1)
    shift = values.new_tensor(mean or (0.0,) * channels).view(-1, 1, 1)
    return values.mul_(1.0 / (255.0 * scale)).sub_(shift / scale)


def lengths(vectors: Tensor) -> Tensor:
    """Lengths along dimension 1, which stays: ``[n, 3, *]`` to ``[n, 1, *]``.

    `torch.linalg.vector_norm` over so short a dimension took forty times as long on the CPU.
    """
    return vectors.square().sum(dim=1, keepdim=True).sqrt()


def unit(vectors: Tensor) -> Tensor:
    """``[n, 3, H, W]`` at length 1; the zero vector, which means unlabelled, stays zero."""
    # By components: a sum over so short a dimension, and a square of its own, take twice as long.
    x, y, z = vectors.unbind(1)
    inverse = (x * x).addcmul_(y, y).addcmul_(z, z).sqrt_().clamp_(min=1e-12).reciprocal_()
    return vectors * inverse.unsqueeze(1)


def pack_depth(metres: Tensor) -> Tensor:
    """Depth ``[N, H, W]`` in metres as a column stores it: whole millimetres, at most 65.535 m."""
    return (metres * 1000.0).round().clamp(0, 65535).to(torch.int32).to(torch.int16)


def pack_normals(vectors: Tensor) -> Tensor:
    """Unit vectors ``[N, 3, H, W]`` as int16: direction to 0.003°."""
    return (vectors * 32767.0).round().to(torch.int16)


def _signed(rows: Tensor) -> Tensor:
    # In bytes, 255 + 1 is 0.
    return (rows + 1).to(torch.int64).sub_(1)
