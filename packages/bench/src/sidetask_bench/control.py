"""What a method's weights do where they cannot matter: the same steps on a trained network that is kept as it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from sidetask_bench import runtime, storage
from sidetask_bench.assemble import make_dataset
from sidetask_bench.compare import deviation
from sidetask_bench.config import Experiment
from sidetask_bench.run import load_run
from sidetask_bench.schema import ExperimentError
from sidetask_bench.tables import with_deviation
from sidetask_bench.trainer import Trainer

if TYPE_CHECKING:
    from sidetask_datasets import Dataset

Weights = dict[str, dict[str, list[float]]]


class Still(Trainer):
    """Takes a run's steps, with its batches and learning rates, and puts the network back after each."""

    def _update(self) -> None:
        parameters = list(self.step.model.parameters())
        kept = [p.detach().clone() for p in parameters]
        super()._update()
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)


def control(
    experiment: Experiment, folder: str | Path, *, row: str, of: str, seeds: Iterable[int] | None = None
) -> dict[str, Any]:
    """Let the weights of a row learn on the networks of another one, which do not change.

    Nothing that such a weight does can reach any loss. How far it goes all the same is what an estimate from changes
    between batches makes of chance, and as far as it goes in training it says nothing. (A lookahead asks what a step
    would do, taken or not, so that it has something to find here, too.)

    Args:
        experiment: whose rows they are.
        folder: of the comparison with the trained networks of `of`; gets ``control-<row>.json``.
        row: whose method has shapers that name their weights, such as those of classes.
        of: whose networks, each at its chosen epoch, are trained already.
        seeds: instead of the experiment's.

    Returns:
        What is in ``control-<row>.json``: for each task and name the ``weights`` at the end, of every seed.

    Raises:
        ExperimentError: if there is no such row or trained network, the row's network is another one, or its method
            names no weights.
    """
    folder, seeds = Path(folder), experiment.seeds if seeds is None else tuple(seeds)
    experiment = experiment.at(folder)
    dataset = make_dataset(experiment.dataset)
    found: Weights = {}
    for seed in seeds:
        for task, weights in _of_seed(experiment, folder / of / f"seed{seed}", row, seed, dataset).items():
            for name, weight in weights.items():
                found.setdefault(task, {}).setdefault(name, []).append(weight)
    result = {"row": row, "of": of, "seeds": list(seeds), "weights": found}
    storage.write_json(folder / f"control-{row}.json", result)
    return result


def _of_seed(experiment: Experiment, place: Path, row: str, seed: int, dataset: Dataset) -> dict[str, dict[str, float]]:
    config = experiment.run(row, seed)
    with runtime.settings(config.training) as device:
        trainer = Still(config, dataset.to(device), device)
        if not trainer.named_weights():
            raise ExperimentError(f"rows.{row}.method: {config.method!r} has no shapers that name their weights")
        _, _, network = load_run(place, dataset)
        try:
            trainer.step.model.load_state_dict(network.state_dict())
        except RuntimeError as error:
            raise ExperimentError(f"{place}: its network is not that of the row {row!r}") from error
        for _ in range(config.training.epochs):
            for _ in trainer.steps():
                pass
            trainer.end_epoch()
        return trainer.named_weights()


def table(result: dict[str, Any]) -> Table:
    """The weights at the end: mean and standard deviation over the seeds."""
    title = f"weights of {result['row']} on the networks of {result['of']}, which are kept as they are"
    shown = Table("task", "weight of", "mean ± std", "by seed", title=title, title_justify="left")
    for task, weights in result["weights"].items():
        for name, values in weights.items():
            spread = with_deviation(fmean(values), deviation(values), 3)
            shown.add_row(task, name, spread, " ".join(f"{value:.2f}" for value in values))
    return shown
