"""SAAL: knowledge that flows one way, from a task to the branch of another."""

from sidetask_saal.auxiliaries import SelfAuxiliaries
from sidetask_saal.relations import Relations, enumerate_transfers
from sidetask_saal.saal import ChosenTransfers, LearnedTransfers, saal_e, saal_ew, saal_w
from sidetask_saal.shares import Shares

__all__ = [
    "ChosenTransfers",
    "LearnedTransfers",
    "Relations",
    "SelfAuxiliaries",
    "Shares",
    "enumerate_transfers",
    "saal_e",
    "saal_ew",
    "saal_w",
]
