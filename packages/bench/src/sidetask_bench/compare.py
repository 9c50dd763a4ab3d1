"""Rows times seeds: run what is missing, then put means, deviations and relative improvements side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from sidetask_core import Task, parallel, relative_improvement, relative_improvement_by_task

from sidetask_bench import breakdown, storage, tables
from sidetask_bench.assemble import make_dataset, make_step
from sidetask_bench.config import Experiment, RunConfig
from sidetask_bench.prerequisites import make_prerequisites
from sidetask_bench.schema import ExperimentError, plain
from sidetask_bench.selection import judges
from sidetask_bench.workers import Running, one_at_a_time, train_all

if TYPE_CHECKING:
    from sidetask_datasets import Dataset
    from typing_extensions import Unpack

Results = Mapping[str, Mapping[str, Any]]


@one_at_a_time
def compare(
    experiment: Experiment,
    folder: str | Path,
    *,
    seeds: Iterable[int] | None = None,
    command: str = "",
    **how: Unpack[Running],
) -> dict[str, Any]:
    """Train every row with every seed and compare their test metrics.

    Finished runs are kept and interrupted ones resumed, so that the same call goes on after a kill, and a row or
    seed added later costs only itself. A run that diverges, or whose worker dies again and again, is left out and named
    under ``failed``. What rows read from the experiment's folder is made first (`sidetask_bench.prerequisites`).

    Args:
        experiment: with rows.
        folder: gets ``<row>/seed<k>/`` for the runs, ``comparison.json``, ``table.md`` and ``table.csv``. It is
            ``$folder`` in the experiment's paths.
        seeds: instead of the experiment's.
        command: how a reader can run this again; kept in the comparison.
        how: jobs, overwrite, display and pool; see `sidetask_bench.workers.Running`.

    Returns:
        What is in ``comparison.json``. On other processes than 0 of ``torchrun``, an empty mapping.

    Raises:
        ExperimentError: for a mistake in any row, before the first one is trained; if another comparison goes on in the
            folder; or if no run of the baseline finished.
    """
    folder = Path(folder)
    given, experiment = experiment, experiment.at(folder)
    runs = experiment.runs(seeds)
    make_prerequisites(experiment, folder, **how)
    dataset = make_dataset(experiment.dataset)
    breakdown.check(experiment.breakdown, dataset)
    for configs in runs.values():
        judges(dataset.tasks, configs[0].training.select_by)
        make_step(configs[0], dataset)
    places = [(config, folder / config.label) for configs in runs.values() for config in configs]
    outcomes = train_all(places, dataset, experiment.dataset, **how)
    done = {(config.row, config.seed): outcome for config, outcome in outcomes}
    results: dict[str, list[dict[str, Any]]] = {}
    failed: list[dict[str, Any]] = []
    for config, place in places:
        outcome = done[config.row, config.seed]
        if "error" in outcome:
            failed.append({"row": config.row, "seed": config.seed, **outcome})
        else:
            where = place.relative_to(folder).as_posix()
            results.setdefault(config.row, []).append({"seed": config.seed, "folder": where, **outcome})
    if parallel.rank():
        return {}
    comparison = summarize(experiment, dataset, runs, results)
    comparison |= {"failed": failed, "config": plain(given), "command": command}
    storage.write_json(folder / "comparison.json", comparison)
    storage.write_text(folder / "table.md", tables.markdown(comparison))
    storage.write_text(folder / "table.csv", tables.csv_text(comparison))
    return comparison


def summarize(
    experiment: Experiment,
    dataset: Dataset,
    runs: Mapping[str, Sequence[RunConfig]],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Means and deviations over seeds, and improvements of each run over the baseline row's mean."""
    baseline = experiment.baseline or next(iter(runs))
    if baseline not in results:
        raise ExperimentError(f"no run of the baseline row {baseline!r} finished; there is nothing to compare with")
    reference = mean_of_runs([run["test"] for run in results[baseline]])
    rows = []
    for name, row_results in results.items():
        tests = [run["test"] for run in row_results]
        rows.append(
            {
                "name": name,
                "method": runs[name][0].method,
                "network": plain(runs[name][0].network),
                "runs": [dict(run) for run in row_results],
                "mean": mean_of_runs(tests),
                "std": _by_metric(tests, deviation),
                "improvement": improvements(tests, reference, dataset.tasks, experiment.improvement),
                "seconds_per_step": fmean(run["seconds_per_step"] for run in row_results),
            }
        )
    versions, mixed = versions_of_runs(rows)
    return {
        "name": experiment.name,
        "baseline": baseline,
        "improvement": experiment.improvement,
        "higher_is_better": tables.MEASURES[experiment.improvement].higher_is_better,
        "data": {
            "input": list(dataset.input_shape),
            **{name: len(getattr(dataset, name)) for name in ("train", "validation", "test")},
        },
        "tasks": [
            {
                "name": task.name,
                "primary": task.primary,
                "metrics": {name: {"higher_is_better": m.higher_is_better} for name, m in task.metrics.items()},
            }
            for task in dataset.tasks
        ],
        "rows": rows,
        "versions": versions,
        "mixed_versions": mixed,
    }


def improvements(
    tests: Sequence[Results], reference: Results, tasks: Sequence[Task], definition: Any
) -> dict[str, Any]:
    """Relative improvement of each run over the reference, in percent: values, mean, deviation, and by task.

    A run's value is null where it does not exist: a metric of the run or the reference is undefined, or the reference's
    is zero. Mean and deviation are then null too: those of the other runs would be of a selection.
    """

    def over_runs(improvement: Callable[[Results], float]) -> dict[str, Any]:
        values = [_defined(improvement, test) for test in tests]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return {"mean": None, "std": None, "values": values}
        return {"mean": fmean(known), "std": deviation(known), "values": values}

    def of_task(task: Task) -> dict[str, Any]:
        found = over_runs(lambda test: relative_improvement_by_task(test, reference, [task], definition)[task.name])
        return {"mean": found["mean"], "std": found["std"]}

    overall = over_runs(lambda test: relative_improvement(test, reference, tasks, definition))
    return {**overall, "by_task": {task.name: of_task(task) for task in tasks}}


def _defined(improvement: Callable[[Results], float], test: Results) -> float | None:
    try:
        value = improvement(test)
    except (ValueError, TypeError):  # a reference of zero; a metric that is null
        return None
    return value if math.isfinite(value) else None


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for a single value, which has none.

    >>> deviation([1.0, 2.0, 3.0]), deviation([1.0])
    (1.0, None)
    """
    return stdev(values) if len(values) > 1 else None


def versions_of_runs(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, dict[str, list[str]]]]:
    """What the runs were made with, by name, and where that was not the same for all: name to version to runs.

    Runs that were kept from an earlier call may be of other versions than the rest.

    >>> runs = [{"seed": seed, "versions": {"torch": f"2.{6 + seed}", "python": "3.12"}} for seed in (0, 1)]
    >>> versions_of_runs([{"name": "equal", "runs": runs}])
    ({'torch': '2.6, 2.7', 'python': '3.12'}, {'torch': {'2.6': ['equal/seed0'], '2.7': ['equal/seed1']}})
    """
    made = [(f"{row['name']}/seed{run['seed']}", run.get("versions", {})) for row in rows for run in row["runs"]]
    found: dict[str, dict[str, list[str]]] = {name: {} for _, of_run in made for name in of_run}
    for name, runs in found.items():
        for run, of_run in made:
            runs.setdefault(of_run.get(name, "unknown"), []).append(run)
    mixed = {name: runs for name, runs in found.items() if len(runs) > 1}
    return {name: ", ".join(runs) for name, runs in found.items()}, mixed


def mean_of_runs(tests: Sequence[Results]) -> dict[str, dict[str, Any]]:
    """The mean of every metric; None for one that is undefined in a run."""
    return _by_metric(tests, fmean)


def _by_metric(tests: Sequence[Results], reduce: Any) -> dict[str, dict[str, Any]]:
    """Reduce over runs; a metric that is undefined (null) in one run is undefined."""
    reduced: dict[str, dict[str, Any]] = {}
    for task, metrics in tests[0].items():
        reduced[task] = {}
        for metric in metrics:
            values = [test[task][metric] for test in tests]
            reduced[task][metric] = None if None in values else reduce(values)
    return reduced
