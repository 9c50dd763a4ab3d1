"""Every weighting and combiner that the papers compare with, one file each."""

from sidetask_core import Equal, Fixed

from sidetask_baselines.cagrad import CAGrad
from sidetask_baselines.dwa import DWA
from sidetask_baselines.graddrop import GradDrop
from sidetask_baselines.mgda import MGDA
from sidetask_baselines.pcgrad import PCGrad
from sidetask_baselines.rlw import RLW
from sidetask_baselines.simplex import SolverFailure
from sidetask_baselines.uncertainty import Uncertainty

__all__ = ["DWA", "MGDA", "RLW", "CAGrad", "Equal", "Fixed", "GradDrop", "PCGrad", "SolverFailure", "Uncertainty"]
