"""Class-wise reweighting: a weight for every class of an auxiliary task."""

from sidetask_classwise.bins import Bins
from sidetask_classwise.classwise import ClassWise

__all__ = ["Bins", "ClassWise"]
