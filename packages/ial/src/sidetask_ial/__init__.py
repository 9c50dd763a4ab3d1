"""Impartial auxiliary learning: decoders that no task owns, and an encoder that the primary task keeps."""

from sidetask_core import Uncertainty

from sidetask_ial.frozen import FrozenHeads
from sidetask_ial.ial import ImpartialEncoder

__all__ = ["FrozenHeads", "ImpartialEncoder", "Uncertainty"]
