"""What each connection of a network with self-auxiliaries gives its target: the same run with it switched off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sidetask_core import StepFailure, relative_improvement_by_task

from sidetask_bench import drawing, plots, storage
from sidetask_bench.assemble import make_dataset, make_step
from sidetask_bench.config import Experiment, RunConfig
from sidetask_bench.relations import Finished, Group, csv_text, definition_of
from sidetask_bench.schema import ExperimentError
from sidetask_bench.workers import Running, one_at_a_time

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Ablation:
    """The effect of every connection.

    Attributes:
        tasks: the names of the T tasks.
        effect: ``[T, T]``, by how many percent the target (column) is better with the connection from the source (row)
            than without; NaN where there is none, or a run failed.
        rows: for each connection, task and metric its value ``with`` and ``without`` the connection.
        failed: the error of a run, by the connection that was off; ``"none"`` is the run with all of them.
    """

    tasks: tuple[str, ...]
    effect: npt.NDArray[np.float64]
    rows: list[dict[str, Any]]
    failed: dict[str, str]


@one_at_a_time
def ablate_transfers(
    experiment: Experiment,
    folder: str | Path,
    *,
    row: str | None = None,
    seed: int | None = None,
    **how: Unpack[Running],
) -> Ablation:
    """Train a row with all its transfers, and once more for each of them with its gate off.

    The network is the same in all runs, with the same initial values; a connection that is off is not run. Metrics are
    those of the validation split at each run's chosen epoch. The folder gets a run for each, ``ablation.csv`` and
    ``ablation.png``. Finished runs are kept and interrupted ones resumed.

    Args:
        experiment: whose row has a method with self-auxiliaries.
        folder: see above.
        row: which; the experiment's base if None.
        seed: instead of the experiment's first.
        how: jobs, overwrite, display and pool; see `sidetask_bench.workers.Running`.

    Raises:
        ExperimentError: if the row's method adds no self-auxiliaries, or for what the experiment asks for and does not
            exist.
    """
    try:
        from sidetask_saal import SelfAuxiliaries, ends
    except ImportError as error:
        raise ExperimentError("transfers need the package sidetask-saal; pip install sidetask-saal") from error
    folder = Path(folder)
    dataset = make_dataset(experiment.dataset)
    base = experiment.run(row, experiment.seeds[0] if seed is None else seed)
    augment = make_step(base, dataset).augment
    if not isinstance(augment, SelfAuxiliaries) or not augment.transfers:
        raise ExperimentError(
            f"method {base.method!r} has no transfers to switch off; --row names a row of a method that has some"
        )
    pairs = {name: pair for name in augment.transfers if (pair := ends(name)) is not None}
    runs: dict[Group, RunConfig] = {("none",): changed(base, row="all")}
    for name, (source, target) in pairs.items():
        off = changed(base, row=f"without-{source}-to-{target}", method=_without(base.method, name))
        runs[name,] = off
    done = Finished.train(runs, folder, dataset, experiment.dataset, **how)
    tasks = tuple(task.name for task in dataset.tasks)
    effect = np.full((len(tasks), len(tasks)), np.nan)
    found, failed = {}, {}
    for group in runs:
        try:
            found[group[0]] = done(group)
        except StepFailure as error:
            failed[group[0]] = str(error)
    rows: list[dict[str, Any]] = []
    for name, (source, target) in pairs.items():
        if not {name, "none"} <= set(found):
            continue
        with_all, without = found["none"], found[name]
        judged = next(task for task in dataset.tasks if task.name == target)
        try:
            gain = relative_improvement_by_task(with_all, without, [judged], definition_of(experiment))[target]
        except ValueError as error:  # a metric that is zero without the connection
            failed[name] = str(error)
            continue
        effect[tasks.index(source), tasks.index(target)] = gain
        rows += [
            {
                "source": source,
                "target": target,
                "effect": gain,
                "task": task.name,
                "metric": metric,
                "higher_is_better": about.higher_is_better,
                "with": with_all[task.name][metric],
                "without": without[task.name][metric],
            }
            for task in dataset.tasks
            for metric, about in task.metrics.items()
        ]
    if rows:
        storage.write_text(folder / "ablation.csv", csv_text(rows))
        panel = plots.matrix_panel("Gain by each connection (%)", tasks, effect)
        drawing.png([panel], folder / "ablation.png", columns=1)
    return Ablation(tasks, effect, rows, failed)


def _without(method: Any, name: str) -> dict[str, Any]:
    """The same method, one of whose transfers is never on."""
    from sidetask_saal import ends  # here, because it may not be installed

    spec = {"name": method} if isinstance(method, str) else dict(method)
    if "name" not in spec:
        return {**spec, "augment": _without(spec["augment"], name)}
    schedule = spec.get("schedule")
    others = {} if not isinstance(schedule, Mapping) else {k: v for k, v in schedule.items() if ends(k) != ends(name)}
    return {**spec, "schedule": {**others, name: []}}
