"""Auto-λ: task weights that lower the primary tasks' validation loss."""

from sidetask_autolambda.autolambda import AutoLambda

__all__ = ["AutoLambda"]
