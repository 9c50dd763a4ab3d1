"""Cheaper guesses of which task helps which, beside what training all pairs found: the table of task relationships."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from sidetask_core import Batch, StepFailure

from sidetask_bench import drawing, plots, runtime, storage
from sidetask_bench.assemble import make_dataset, make_step
from sidetask_bench.config import Experiment, Plugin, RunConfig
from sidetask_bench.relations import Finished, Group, csv_text, definition_of, enumerate_relations, run_of
from sidetask_bench.run import load_run
from sidetask_bench.workers import Running

if TYPE_CHECKING:
    from sidetask_datasets import Dataset
    from sidetask_saal import Relations
    from typing_extensions import Unpack

Matrix = npt.NDArray[np.float64]

LOOKAHEAD_TRAIN = "look-ahead loss, training"
LOOKAHEAD_VALIDATION = "look-ahead loss, validation"
ANGLES = "gradient angle"
FEATURES = "feature similarity"
COEFFICIENTS = "SAAL coefficients"


@dataclass(frozen=True)
class Estimates:
    """Estimated relations and how well they rank the enumerated ones.

    Attributes:
        truth: what was enumerated.
        matrices: name of the estimate to ``[T, T]``, source by target, each of its own scale; NaN on the diagonal.
        correlations: name of the estimate to Spearman's rank correlation with the truth, for each target ``[T]``.
        failed: the errors of trainings, by name.
    """

    truth: Relations
    matrices: dict[str, Matrix]
    correlations: dict[str, Matrix]
    failed: dict[str, str]


def estimate_relations(
    experiment: Experiment,
    folder: str | Path,
    *,
    seed: int | None = None,
    **how: Unpack[Running],
) -> Estimates:
    """Enumerate the relations between an experiment's tasks, and estimate them in five cheaper ways.

    - Look-ahead loss, on the training or the validation split, and gradient angle: of a network that was trained on
      all tasks together, at its chosen epoch, over one epoch of training batches; the step is one of plain gradient
      descent with the experiment's learning rate.
    - Feature similarity: a head of two layers for the target on the source's single-task encoder, which learns no more,
      relative to the same on the target's own.
    - SAAL coefficients: the mean over the last epoch of the experiment's first row of method ``saal-w``, or of its base
      with that method if there is no such row.

    The folder gets what `enumerate_relations` writes, a run for each further training, ``estimates.csv`` with every
    pair, ``correlations.csv`` and ``estimates.png``. Finished runs are kept and interrupted ones resumed.

    Args:
        experiment: as of `enumerate_relations`, with a network that is split before its last stage.
        folder: see above.
        seed: instead of the experiment's first.
        how: jobs, overwrite, display and pool; see `sidetask_bench.workers.Running`.

    Raises:
        ExperimentError: as `enumerate_relations`; if the network leaves tasks no branch of their own.
    """
    folder = Path(folder)
    dataset = make_dataset(experiment.dataset)
    seed = experiment.seeds[0] if seed is None else seed
    base, learned = experiment.run(None, seed), _learned(experiment, seed)
    make_step(learned, dataset)  # what is wrong with it is said before anything is trained
    truth = enumerate_relations(experiment, folder, seed=seed, **how)
    with storage.locked(folder):
        return _beside(truth, experiment, folder, base, learned, dataset, **how)


def _beside(
    truth: Relations,
    experiment: Experiment,
    folder: Path,
    base: RunConfig,
    learned: RunConfig,
    dataset: Dataset,
    **how: Unpack[Running],
) -> Estimates:
    """Train what the estimates need, and set them beside the truth."""
    from sidetask_saal import coefficient_relations, feature_relations, rank_correlation

    names = truth.tasks
    together, pairs = run_of(base, names), itertools.product(names, repeat=2)
    alone = {name: folder / run_of(base, [name]).label for name in names}
    runs: dict[Group, RunConfig] = {("together",): together, ("learned",): learned}
    # One that failed may have left the network of an earlier epoch.
    trained = {name for name, place in alone.items() if (place / "result.json").exists()}
    runs |= {(s, t): _on_frozen(base, s, t, alone[s]) for s, t in pairs if s in trained}
    done = Finished.train(runs, folder, dataset, experiment.dataset, **how)

    nothing = np.full((len(names), len(names)), np.nan)
    matrices = dict.fromkeys((LOOKAHEAD_TRAIN, LOOKAHEAD_VALIDATION, ANGLES), nothing)
    failed = dict(truth.failed)
    try:
        done(("together",))
        matrices |= _of_gradients(done.runs["together",][0], together, dataset)
    except StepFailure as error:
        failed["together"] = str(error)

    def on_frozen(group: Group) -> dict[str, dict[str, float]]:
        if group not in done.runs:
            raise StepFailure(f"the training of {group[0]} alone failed")
        return done(group)

    features = feature_relations(
        on_frozen, dataset.tasks, definition=definition_of(experiment), progress=lambda *_: None
    )
    matrices[FEATURES] = features.improvement
    failed |= {f"{names} (features)": error for names, error in features.failed.items()}
    try:
        done(("learned",))
        matrices[COEFFICIENTS] = coefficient_relations(names, _last_epoch(done.runs["learned",][0]))
    except StepFailure as error:
        matrices[COEFFICIENTS], failed["saal-w"] = nothing, str(error)
    for name in matrices:
        matrices[name] = np.where(np.eye(len(names), dtype=bool), np.nan, matrices[name])
    correlations = {name: rank_correlation(matrix, truth.improvement) for name, matrix in matrices.items()}
    found = Estimates(truth, matrices, correlations, failed)
    _write(found, folder)
    return found


def _learned(experiment: Experiment, seed: int) -> RunConfig:
    """The run that learns coefficients for all transfers."""
    rows = (experiment.run(row, seed) for row in experiment.rows)
    run = next((run for run in rows if (run.method == "saal-w" or _name(run.method) == "saal-w")), None)
    return replace(experiment.run(None, seed), method="saal-w", row="saal-w") if run is None else run


def _name(method: Any) -> Any:
    return method.get("name") if isinstance(method, Mapping) else None


def _on_frozen(base: RunConfig, source: str, target: str, run: Path) -> RunConfig:
    network = Plugin("frozen", {"run": str(run), "task": source})
    return replace(run_of(base, [target]), row=f"{target}-on-{source}", network=network)


def _of_gradients(place: Path, config: RunConfig, dataset: Dataset) -> dict[str, Matrix]:
    """Look-ahead losses and gradient angles of a trained network."""
    from sidetask_saal import gradient_angles, lookahead_relations

    training = config.training
    with runtime.settings(training) as device:
        data = dataset.to(device)
        model = load_run(place, dataset)[2].to(device).train()
        size = min(training.batch_size, len(data.validation))

        def train() -> Iterator[Batch]:
            return iter(data.train.batches(training.batch_size, seed=config.seed, epoch=0))

        def validation() -> Iterator[Batch]:
            for epoch in itertools.count():
                yield from data.validation.batches(size, seed=config.seed, epoch=epoch)

        rate = training.optimizer.lr
        torch.manual_seed(config.seed)
        return {
            LOOKAHEAD_TRAIN: lookahead_relations(model, data.tasks, train(), lr=rate),
            LOOKAHEAD_VALIDATION: lookahead_relations(model, data.tasks, train(), lr=rate, validation=validation()),
            ANGLES: gradient_angles(model, data.tasks, train()),
        }


def _last_epoch(place: Path) -> dict[str, float]:
    """The mean weights of a run over its last epoch."""
    lines = [json.loads(line) for line in (place / "weights.jsonl").read_text("utf-8").splitlines()]
    last = [line["encoder"] for line in lines if line["epoch"] == lines[-1]["epoch"]]
    return {name: float(np.mean([weights[name] for weights in last])) for name in last[0]}


def _write(found: Estimates, folder: Path) -> None:
    names = found.truth.tasks
    rows = [
        {
            "source": source,
            "target": target,
            "improvement": found.truth.improvement[s, t],
            **{name: matrix[s, t] for name, matrix in found.matrices.items()},
        }
        for (s, source), (t, target) in itertools.permutations(enumerate(names), 2)
    ]
    storage.write_text(folder / "estimates.csv", csv_text(rows))
    ranks = [{"estimate": name, **dict(zip(names, row, strict=True))} for name, row in found.correlations.items()]
    storage.write_text(folder / "correlations.csv", csv_text(ranks))
    panels = [plots.relations_panel(names, found.truth.improvement)]
    panels += [
        plots.matrix_panel(name, names, matrix) for name, matrix in found.matrices.items() if np.isfinite(matrix).any()
    ]
    drawing.png(panels, folder / "estimates.png")
