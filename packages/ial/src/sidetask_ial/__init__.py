"""Impartial auxiliary learning: decoders that no task owns, and an encoder that the primary task keeps."""

from sidetask_ial.ial import ImpartialEncoder

__all__ = ["ImpartialEncoder"]
