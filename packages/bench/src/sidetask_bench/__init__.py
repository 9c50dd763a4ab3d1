"""Experiments for sidetask: train, resume, evaluate and compare methods; what the ``sidetask`` command calls."""

from sidetask_bench.compare import compare
from sidetask_bench.config import Experiment, RunConfig, Training, load_experiment
from sidetask_bench.evaluate import evaluate, score
from sidetask_bench.label import label
from sidetask_bench.run import load_run, train
from sidetask_bench.schema import ExperimentError

__all__ = [
    "Experiment",
    "ExperimentError",
    "RunConfig",
    "Training",
    "compare",
    "evaluate",
    "label",
    "load_experiment",
    "load_run",
    "score",
    "train",
]
