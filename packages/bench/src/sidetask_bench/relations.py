"""Which task helps which: every task alone and every pair on a shared bottom, and the matrix of who gains by whom."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sidetask_core import StepFailure, parallel

from sidetask_bench import drawing, plots, runtime, storage
from sidetask_bench.assemble import blaming, make_dataset, make_step
from sidetask_bench.config import Experiment, Plugin, RunConfig
from sidetask_bench.run import discard, read_result
from sidetask_bench.schema import ExperimentError
from sidetask_bench.workers import Running, one_at_a_time, train_all

if TYPE_CHECKING:
    from sidetask_datasets import Dataset
    from sidetask_saal import Relations
    from typing_extensions import Unpack


@one_at_a_time
def enumerate_relations(
    experiment: Experiment,
    folder: str | Path,
    *,
    seed: int | None = None,
    **how: Unpack[Running],
) -> Relations:
    """Train the tasks of an experiment alone and in pairs, with its base's network shared to the heads.

    Relations are read from the validation split, at each run's chosen epoch, for they are going to choose a method. The
    folder gets a run for each training, ``relations.json`` for the methods' option ``relations``, ``relations.csv`` and
    ``relations.png``. Finished runs are kept and interrupted ones resumed. A run that fails, of whatever, is named in
    the relations, and takes nothing from the others; the same call repeats it, as it does one that ended with metrics
    of which no improvement follows.

    Args:
        experiment: its data set must take the option ``tasks``.
        folder: see above.
        seed: instead of the experiment's first.
        how: jobs, overwrite, display and pool; see `sidetask_bench.workers.Running`.

    Raises:
        ExperimentError: if sidetask-saal is not installed, or for what the experiment asks for and does not exist.
    """
    try:
        from sidetask_saal import enumerate_transfers
    except ImportError as error:
        raise ExperimentError("relations need the package sidetask-saal; pip install sidetask-saal") from error
    folder = Path(folder)
    dataset = make_dataset(experiment.dataset)
    names = [task.name for task in dataset.tasks]
    if len(names) < 2:
        raise ExperimentError(
            f"dataset {experiment.dataset.name!r} has one task, {names[0]}; relations are between two"
        )
    base = experiment.run(None, experiment.seeds[0] if seed is None else seed)
    groups = [*((name,) for name in names), *itertools.combinations(names, 2)]
    runs = {group: run_of(base, group) for group in groups}
    for config in runs.values():
        make_step(config, make_dataset(config.dataset))
    if parallel.rank() == 0:
        _discard_undefined(runs, folder)
    runtime.barrier()
    done = Finished.train(runs, folder, dataset, experiment.dataset, **how)
    relations = enumerate_transfers(done, dataset.tasks, definition=definition_of(experiment), progress=lambda *_: None)
    if parallel.rank() == 0:
        relations.save(folder / "relations.json")
        storage.write_text(folder / "relations.csv", csv_text(relations.rows))
        panel = plots.relations_panel(relations.tasks, relations.improvement)
        drawing.png([panel], folder / "relations.png", columns=1)
    runtime.barrier()
    return relations


def _discard_undefined(runs: Mapping[Group, RunConfig], folder: Path) -> None:
    """Have those runs made again of which the enumeration before could not say what improves."""
    from sidetask_saal import Relations

    if not (folder / "relations.json").exists():
        return
    with blaming("relations of before", str(folder / "relations.json")):
        before = Relations.load(folder / "relations.json")
    for group, config in runs.items():
        if "+".join(group) in before.failed and (folder / config.label / "result.json").exists():
            discard(folder / config.label)


Group = tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """Runs that have ended: their folders and outcomes. Called, it gives validation metrics as if it trained now."""

    runs: dict[Group, tuple[Path, dict[str, Any]]]

    @classmethod
    def train(
        cls,
        runs: Mapping[Group, RunConfig],
        folder: Path,
        dataset: Dataset,
        plugin: Plugin,
        **how: Unpack[Running],
    ) -> Finished:
        """Train what is missing, each run in ``folder/<row>/seed<k>``."""
        places = {config.row: folder / config.label for config in runs.values()}
        jobs = [(config, places[config.row]) for config in runs.values()]
        outcomes = train_all(jobs, dataset, plugin, failures=Exception, **how)
        done = {config.row: outcome for config, outcome in outcomes}
        # What process 0 of torchrun has trained, the others read.
        ended = {row: outcome or read_result(places[row]) for row, outcome in done.items()}
        return cls({group: (places[config.row], ended[config.row]) for group, config in runs.items()})

    def __call__(self, group: Group) -> dict[str, dict[str, float]]:
        """The metrics of every task of the run, at its chosen epoch.

        Raises:
            StepFailure: if the run failed, of whatever.
        """
        folder, outcome = self.runs[group]
        if "error" in outcome:
            raise StepFailure(outcome["error"])
        return {
            name: {key: float("nan") if value is None else value for key, value in metrics.items()}
            for name, metrics in chosen_validation(folder, outcome).items()
        }


def chosen_validation(folder: Path, outcome: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """A run's validation metrics at its chosen epoch, or each task's at its own; None for what is undefined."""
    chosen = outcome["epoch"]
    found: dict[str, dict[str, float | None]] = {}
    for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        epochs = chosen if isinstance(chosen, dict) else dict.fromkeys(record["validation"], chosen)
        found |= {name: metrics for name, metrics in record["validation"].items() if record["epoch"] == epochs[name]}
    return found


def run_of(base: RunConfig, tasks: Sequence[str], *, shared_bottom: bool = True) -> RunConfig:
    """The run that trains these tasks, all of them primary, on a shared bottom or on the network as it is."""
    options = {key: value for key, value in base.dataset.options.items() if key != "primary"}
    network = {key: value for key, value in base.network.options.items() if key != "cut" or not shared_bottom}
    return replace(
        base,
        row="+".join(tasks),
        dataset=Plugin(base.dataset.name, {**options, "tasks": list(tasks)}),
        network=Plugin(base.network.name, network),
        method="equal",
        # These may be by a task that is not there.
        training=replace(base.training, select_by=None),
        breakdown={},
    )


def definition_of(experiment: Experiment) -> Literal["mean-of-tasks", "one-metric"]:
    """By which definition one task improves: the experiment's, if it says so of one task."""
    return "one-metric" if experiment.improvement == "one-metric" else "mean-of-tasks"


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Mappings with the same keys as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
