"""Core of sidetask: encode once, cut at the shared features, weight every task's signal above and below the cut."""

from sidetask_core.task import Batch, Metric, MissingKey, Task

__all__ = ["Batch", "Metric", "MissingKey", "Task"]
