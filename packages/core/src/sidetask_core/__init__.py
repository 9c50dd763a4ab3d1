"""Core of sidetask: encode once, cut at the shared features, weight every task's signal above and below the cut."""

from sidetask_core.augment import ExtraTasks, FrozenHeads
from sidetask_core.bilevel import BilevelWeighting
from sidetask_core.improvement import relative_improvement, relative_improvement_by_task
from sidetask_core.method import Augment, Combiner, Equal, Fixed, Method, Product, Rule, Shaper, Weighting
from sidetask_core.signals import Place, Signals, StepFailure
from sidetask_core.split import SplitModel
from sidetask_core.step import NonFiniteLoss, Report, Step
from sidetask_core.task import Batch, Metric, MissingKey, Task
from sidetask_core.uncertainty import FollowsUncertainty, Uncertain, Uncertainty

__all__ = [
    "Augment",
    "Batch",
    "BilevelWeighting",
    "Combiner",
    "Equal",
    "ExtraTasks",
    "Fixed",
    "FollowsUncertainty",
    "FrozenHeads",
    "Method",
    "Metric",
    "MissingKey",
    "NonFiniteLoss",
    "Place",
    "Product",
    "Report",
    "Rule",
    "Shaper",
    "Signals",
    "SplitModel",
    "Step",
    "StepFailure",
    "Task",
    "Uncertain",
    "Uncertainty",
    "Weighting",
    "relative_improvement",
    "relative_improvement_by_task",
]
