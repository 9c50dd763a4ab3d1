"""Every weighting and combiner that the papers compare with, one file each."""

from sidetask_core import Equal, Fixed, Uncertainty

from sidetask_baselines.aligned_mtl import AlignedMTL
from sidetask_baselines.atw import ATW
from sidetask_baselines.cagrad import CAGrad
from sidetask_baselines.dwa import DWA
from sidetask_baselines.famo import FAMO
from sidetask_baselines.gcs import GCS
from sidetask_baselines.graddrop import GradDrop
from sidetask_baselines.gradnorm import GradNorm
from sidetask_baselines.imtl import IMTL
from sidetask_baselines.imtl_g import IMTLG
from sidetask_baselines.imtl_l import IMTLL
from sidetask_baselines.mgda import MGDA
from sidetask_baselines.nash_mtl import NashMTL
from sidetask_baselines.ol_aux import OLAUX
from sidetask_baselines.pareto_mtl import ParetoMTL, pareto_front, preference_vectors
from sidetask_baselines.pcgrad import PCGrad
from sidetask_baselines.per_objective_uncertainty import PerObjectiveUncertainty
from sidetask_baselines.puw import PUW
from sidetask_baselines.rlw import RLW
from sidetask_baselines.simplex import SolverFailure

__all__ = [
    "ATW",
    "DWA",
    "FAMO",
    "GCS",
    "IMTL",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "OLAUX",
    "PUW",
    "RLW",
    "AlignedMTL",
    "CAGrad",
    "Equal",
    "Fixed",
    "GradDrop",
    "GradNorm",
    "NashMTL",
    "PCGrad",
    "ParetoMTL",
    "PerObjectiveUncertainty",
    "SolverFailure",
    "Uncertainty",
    "pareto_front",
    "preference_vectors",
]
