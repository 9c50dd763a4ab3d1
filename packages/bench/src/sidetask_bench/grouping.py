"""Which tasks should be trained together? Every combination of them, fixed, against methods that learn weights."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidetask_core import Task

from sidetask_bench import drawing, plots, storage
from sidetask_bench.assemble import make_dataset, make_step
from sidetask_bench.compare import Results, improvements, mean_of_runs
from sidetask_bench.config import Experiment, RunConfig
from sidetask_bench.records import Entry, Groupings
from sidetask_bench.relations import chosen_validation, csv_text, definition_of, run_of
from sidetask_bench.schema import ExperimentError
from sidetask_bench.workers import Running, one_at_a_time, train_all

if TYPE_CHECKING:
    from typing_extensions import Unpack

MOST = 6  # tasks; 63 combinations


@one_at_a_time
def compare_groupings(
    experiment: Experiment,
    folder: str | Path,
    *,
    rows: Iterable[str] | None = None,
    **how: Unpack[Running],
) -> Groupings:
    """Train every combination of an experiment's tasks with equal weights, and rows of it on all tasks.

    Networks are the experiment's own, in every run, and seeds those of the experiment. What is shown is the test split,
    against the task alone; `Groupings.best` is chosen on the validation split, as a user would have to choose. The
    folder gets a run for each, ``grouping.json``, ``grouping.csv`` and ``grouping.png``. Finished runs are kept and
    interrupted ones resumed.

    Args:
        experiment: its data set must take the option ``tasks``.
        folder: see above.
        rows: those whose methods are compared; all on the experiment's network but equal weighting, if None.
        how: jobs, overwrite, display and pool; see `sidetask_bench.workers.Running`.

    Raises:
        ExperimentError: for fewer than two tasks or more than `MOST`, a row that there is not or that is named as a
            combination is, if another comparison goes on in the folder, or if a task's runs by itself failed.
    """
    folder = Path(folder)
    dataset = make_dataset(experiment.dataset)
    names = [task.name for task in dataset.tasks]
    if not 2 <= len(names) <= MOST:
        raise ExperimentError(
            f"dataset.tasks: combinations are of 2 to {MOST} tasks, found {len(names)}; choose some of them"
        )
    groups = [group for size in range(1, len(names) + 1) for group in itertools.combinations(names, size)]
    learned = list(_learning_rows(experiment) if rows is None else rows)
    _check_names(learned, {"+".join(group) for group in groups})
    configs: dict[str, list[RunConfig]] = {}
    for seed in experiment.seeds:
        base = experiment.run(None, seed)
        for group in groups:
            configs.setdefault("+".join(group), []).append(run_of(base, group, shared_bottom=False))
        for row in learned:
            configs.setdefault(row, []).append(changed(experiment.run(row, seed), row=_folder_of(row), breakdown={}))
    for of_row in configs.values():
        make_step(of_row[0], make_dataset(of_row[0].dataset))
    places = [(config, folder / config.label) for of_row in configs.values() for config in of_row]
    done = {
        config.label: outcome
        for config, outcome in train_all(places, dataset, experiment.dataset, failures=Exception, **how)
    }
    failed = {label: outcome["error"] for label, outcome in done.items() if "error" in outcome}
    tests = {
        name: [done[config.label]["test"] for config in of_row if config.label not in failed]
        for name, of_row in configs.items()
    }
    for task in names:
        if not tests[task]:
            raise ExperimentError(f"no run of {task} by itself finished; there is nothing to compare with")
    definition = definition_of(experiment)
    found = _against_alone(tests, dataset.tasks, definition)
    chosen = {
        name: [
            chosen_validation(folder / config.label, done[config.label])
            for config in of_row
            if config.label not in failed
        ]
        for name, of_row in configs.items()
        if name not in learned
    }
    result = Groupings(
        tuple(names),
        tuple(Entry(name, name in learned, found[name]) for name in configs if found[name]),
        _best(_against_alone(chosen, dataset.tasks, definition), names),
        failed,
    )
    storage.write_json(folder / "grouping.json", result)
    storage.write_text(folder / "grouping.csv", csv_text(result.rows()))
    drawing.png(plots.grouping_panels(result), folder / "grouping.png", columns=len(names))
    return result


def _check_names(rows: Sequence[str], combinations: Collection[str]) -> None:
    """A row and a combination of one name could not be told apart, neither in the folder nor in the table."""
    for row in rows:
        if rows.count(row) > 1:
            raise ExperimentError(f"row {row!r} is given twice")
        if {row, _folder_of(row)} & set(combinations):
            raise ExperimentError(
                f"rows.{row}: a combination of tasks has this name; give the row another, or name others (--row)"
            )


def _folder_of(row: str) -> str:
    return f"row-{row}"


def _learning_rows(experiment: Experiment) -> list[str]:
    """Rows on the experiment's network with its training, whose method is not equal weighting."""
    base = experiment.run(None, experiment.seeds[0])
    runs = [experiment.run(row, experiment.seeds[0]) for row in experiment.rows]
    same = [run for run in runs if (run.network, run.training) == (base.network, base.training)]
    return [run.row for run in same if run.method not in ("equal", {"name": "equal"})]


def _against_alone(
    results: Mapping[str, Sequence[Results]], tasks: Sequence[Task], definition: Any
) -> dict[str, dict[str, dict[str, float | None]]]:
    """For each entry and task of it the improvement over the mean of the task's runs by itself."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, of_seeds in results.items():
        found[name] = {}
        for task in tasks:
            if of_seeds and task.name in of_seeds[0]:
                alone = mean_of_runs([{task.name: one[task.name]} for one in results[task.name]])
                own = [{task.name: one[task.name]} for one in of_seeds]
                found[name][task.name] = improvements(own, alone, [changed(task, primary=True)], definition)["by_task"][
                    task.name
                ]
    return found


def _best(found: Mapping[str, Mapping[str, Mapping[str, float | None]]], names: Sequence[str]) -> dict[str, str]:
    best = {}
    for task in names:
        means = {name: of[task]["mean"] for name, of in found.items() if task in of}
        known = {name: mean for name, mean in means.items() if mean is not None}
        if known:
            best[task] = max(known, key=lambda name: known[name])
    return best
