"""SAAL: knowledge that flows one way, from a task to the branch of another."""

from sidetask_saal.auxiliaries import SelfAuxiliaries
from sidetask_saal.estimates import (
    Frozen,
    coefficient_relations,
    gradient_angles,
    lookahead_relations,
    rank_correlation,
)
from sidetask_saal.names import ends
from sidetask_saal.relations import Relations, enumerate_transfers, feature_relations
from sidetask_saal.saal import ChosenTransfers, LearnedTransfers, saal_e, saal_ew, saal_w
from sidetask_saal.shares import Shares

__all__ = [
    "ChosenTransfers",
    "Frozen",
    "LearnedTransfers",
    "Relations",
    "SelfAuxiliaries",
    "Shares",
    "coefficient_relations",
    "ends",
    "enumerate_transfers",
    "feature_relations",
    "gradient_angles",
    "lookahead_relations",
    "rank_correlation",
    "saal_e",
    "saal_ew",
    "saal_w",
]
