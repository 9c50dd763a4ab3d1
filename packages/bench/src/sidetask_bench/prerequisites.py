"""What the rows of an experiment read and other trainings make: relations of its tasks, and labels of its teachers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sidetask_core import parallel

from sidetask_bench import document, runtime
from sidetask_bench.assemble import make_dataset
from sidetask_bench.config import Experiment, RunConfig, load_experiment
from sidetask_bench.label import label
from sidetask_bench.schema import ExperimentError
from sidetask_bench.workers import Running, train_all

if TYPE_CHECKING:
    from typing_extensions import Unpack


def make_prerequisites(experiment: Experiment, folder: Path, **how: Unpack[Running]) -> None:
    """Make what rows read from the experiment's own folder, from trainings that are kept as all others are.

    Relations in ``relations/relations.json``, where a method names that file, are those of
    `sidetask_bench.relations.enumerate_relations` with the experiment's first seed. They are asked for every time:
    finished runs are kept, failed ones repeated, and those of another configuration refused. What `teachers` label goes
    where ``dataset.labels`` says; their runs are in ``teachers/<experiment>/<row>/seed<k>``.

    Args:
        experiment: whose paths are real (`sidetask_bench.Experiment.at`).
        folder: its own.
        how: jobs, overwrite, display and pool; see `sidetask_bench.workers.Running`.

    Raises:
        ExperimentError: if a teacher's run failed, or what is there was made otherwise.
    """
    _label(experiment, folder, **how)
    if reads_relations(experiment, folder):
        from sidetask_bench.relations import enumerate_relations  # here, because matplotlib is slow to import

        enumerate_relations(experiment, folder / "relations", **how)


def reads_relations(experiment: Experiment, folder: Path) -> bool:
    """Whether a row's method reads what ``sidetask relations`` writes into the experiment's folder."""
    path = folder / "relations" / "relations.json"
    methods = [configs[0].method for configs in experiment.runs(experiment.seeds[:1]).values()]
    options = [value for method in methods for value in document.flatten({"method": method}).values()]
    return any(isinstance(value, str) and Path(value) == path for value in options)


def _label(experiment: Experiment, folder: Path, **how: Unpack[Running]) -> None:
    """Train the teachers, and have them label."""
    runs: dict[Path, RunConfig] = {}
    of_task: dict[str, Path] = {}
    for name, teacher in experiment.teachers.items():
        source = load_experiment(teacher.experiment)
        config = source.run(teacher.row, source.seeds[0])
        of_task[name] = folder / "teachers" / config.experiment / config.label
        runs[of_task[name]] = config
    for run, config in runs.items():
        for _, outcome in train_all([(config, run)], make_dataset(config.dataset), config.dataset, **how):
            if "error" in outcome:
                raise ExperimentError(f"the teacher {run} failed: {outcome['error']}")
    if parallel.rank() == 0:
        for name, teacher in experiment.teachers.items():
            labels = Path(experiment.dataset.options["labels"][name])
            if how.get("overwrite"):
                for old in labels.glob("*.npz"):
                    old.unlink()
            label(
                of_task[name],
                labels,
                task=teacher.task,
                of=experiment.dataset,
                domain=teacher.domain,
                kind=teacher.kind,
                threshold=teacher.threshold,
                patch=teacher.patch,
            )
    runtime.barrier()
