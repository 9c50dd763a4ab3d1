"""Reads a finished comparison: its summary, and the curves that its runs recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sidetask_bench.schema import ExperimentError, plain

Array = npt.NDArray[np.float64]

# Weights may jump at every step; means of stretches show their course, and the band how far they jump.
_POINTS = 60


@dataclass(frozen=True)
class Curve:
    """A line with a band: `mean`, between `low` and `high`, at `x`; a point pools `pooled` values of every run."""

    x: Array
    mean: Array
    low: Array
    high: Array
    pooled: int = 1


@dataclass(frozen=True)
class TaskRecord:
    """A task of a comparison: metric name to whether more is better, the headline metric first."""

    name: str
    primary: bool
    metrics: dict[str, bool]

    @property
    def headline(self) -> str | None:
        """The metric that curves show."""
        return next(iter(self.metrics), None)


@dataclass(frozen=True)
class RowRecord:
    """A row of a comparison: test metrics over its seeds, and its improvement in percent against the baseline."""

    name: str
    method: str
    method_name: str
    network: dict[str, Any]
    runs: list[dict[str, Any]]
    mean: dict[str, dict[str, float]]
    std: dict[str, dict[str, float | None]]
    improvement: dict[str, Any]
    seconds_per_step: float | None

    @property
    def values(self) -> list[float]:
        """The improvement of every seed, in percent; those that could not be computed are left out."""
        return [float(value) for value in self.improvement["values"] if value is not None and math.isfinite(value)]

    @property
    def is_complete(self) -> bool:
        """Whether the improvement of every seed is defined, and so its mean."""
        return self.improvement["mean"] is not None


@dataclass(frozen=True)
class Comparison:
    """What ``comparison.json`` says, with the folder that it lies in.

    `higher_is_better` is said of a row's improvement (``flat`` counts losses, so that less is better); that of a single
    task is always better when higher.
    """

    folder: Path
    name: str
    baseline: str
    definition: str
    higher_is_better: bool
    tasks: list[TaskRecord]
    rows: list[RowRecord]
    versions: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    failed: list[dict[str, Any]] = field(default_factory=list)
    mixed_versions: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def fronts(self) -> dict[str, list[str]]:
        """Rows that together trace a trade-off between tasks, of those that finished."""
        done = {row.name for row in self.rows}
        return {name: [row for row in rows if row in done] for name, rows in self.config.get("fronts", {}).items()}

    @property
    def seeds(self) -> int:
        """The seeds of the row that has most."""
        return max(len(row.runs) for row in self.rows)


def load(folder: Path | str) -> Comparison:
    """Read ``comparison.json`` of a comparison's folder.

    Raises:
        ExperimentError: if the folder holds no comparison, or the file is broken, has no rows, or lacks a key, which is
            named.
    """
    folder = Path(folder)
    path = folder / "comparison.json"
    if not path.is_file():
        raise ExperimentError(f"{path} does not exist; sidetask compare writes it")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        tasks = [
            TaskRecord(
                task["name"],
                task.get("primary", True),
                {name: bool(about["higher_is_better"]) for name, about in task["metrics"].items()},
            )
            for task in data["tasks"]
        ]
        rows = [
            RowRecord(
                row["name"],
                _described(row.get("method", row["name"])),
                _named(row.get("method", row["name"])),
                row.get("network", {}),
                row["runs"],
                row["mean"],
                row["std"],
                row["improvement"],
                row.get("seconds_per_step"),
            )
            for row in data["rows"]
        ]
        baseline, definition = data["baseline"], data["improvement"]
        higher_is_better = data.get("higher_is_better", definition != "flat")
    except KeyError as error:
        raise ExperimentError(f"{path}: the comparison has no {error.args[0]!r}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ExperimentError(f"{path} is no comparison; sidetask compare writes it again: {error}") from error
    if not rows:
        raise ExperimentError(f"{path}: the comparison has no rows")
    return Comparison(
        folder,
        data.get("name", folder.name),
        baseline,
        definition,
        higher_is_better,
        tasks,
        rows,
        data.get("versions", {}),
        data.get("config", {}),
        data.get("command"),
        data.get("failed", []),
        data.get("mixed_versions", {}),
        data.get("data", {}),
    )


def losses(comparison: Comparison) -> dict[str, dict[str, Curve]]:
    """Task to row to the training loss per epoch, counted from 1: mean and standard deviation over the seeds."""
    return _per_epoch(comparison, lambda line, task: line.get("losses", {}).get(task.name))


def validation(comparison: Comparison) -> dict[str, dict[str, Curve]]:
    """Task to row to the headline metric per epoch, counted from 1: mean and standard deviation over the seeds."""
    return _per_epoch(
        comparison,
        lambda line, task: line.get("validation", {}).get(task.name, {}).get(task.headline),
    )


StepGroup = Literal["encoder", "decoder", "norms", "cosines", "ratios", "condition"]


def steps(comparison: Comparison, group: StepGroup = "encoder") -> dict[str, dict[str, Curve]]:
    """Row to name to a value at each step that has one: means of equal stretches of them, over all seeds.

    The band is what the values really did in a stretch: from the smallest to the largest of any step and seed.

    Args:
        comparison: whose runs recorded them.
        group: weights in the ``"encoder"``, where a row whose rule combines gradients without weights has no task; in
            the ``"decoder"``, where a row has none if they are all one, or those of the encoder; ``"norms"``, the
            gradients' norms at the features, where a row has some if its method reads them; or what compares the tasks'
            gradients at the steps that were sampled (`sidetask_bench.conflict`), by pairs of tasks, tasks and
            ``gramian``.
    """
    result: dict[str, dict[str, Curve]] = {}
    for row in comparison.rows:
        series: dict[str, list[list[tuple[int, float]]]] = {}
        for run in row.runs:
            of_run: dict[str, list[tuple[int, float]]] = {}
            ones = alike = group == "decoder"
            for line in _lines(comparison.folder / run["folder"] / "weights.jsonl"):
                found = line.get(group, {})
                alike, ones = alike and found == line.get("encoder"), ones and set(found.values()) == {1.0}
                for name, value in found.items():
                    of_run.setdefault(name, []).append((line["step"], _number(value)))
            for name, values in [] if alike or ones else of_run.items():
                series.setdefault(name, []).append(values)
        curves = {name: _pooled(values) for name, values in series.items()}
        result[row.name] = {name: curve for name, curve in curves.items() if np.isfinite(curve.mean).any()}
    return result


def shaper_weights(comparison: Comparison) -> dict[str, dict[str, dict[str, Curve]]]:
    """Row to task to the weights that its shaper names, of classes for instance, after each epoch, counted from 1.

    Mean and standard deviation over the seeds; a row without such weights has no task.
    """
    result: dict[str, dict[str, dict[str, Curve]]] = {row.name: {} for row in comparison.rows}
    for row in comparison.rows:
        epochs, runs = _epochs(comparison, row)
        if not len(epochs):
            continue
        for task, names in runs[0][0].get("shapers", {}).items():
            result[row.name][task] = {
                name: _over_seeds(
                    epochs,
                    np.array([[_number(line["shapers"][task][name]) for line in run] for run in runs]),
                )
                for name in names
            }
    return result


@dataclass(frozen=True)
class ByClass:
    """A task's headline metric by the classes of another: for each row and class the values of the seeds.

    `values` are ``[seeds, classes]``, NaN where a class has no labelled point.
    """

    task: str
    by: str
    classes: list[str]
    values: dict[str, Array]


def by_class(comparison: Comparison) -> list[ByClass]:
    """What the runs found class by class, task by task; classes without a point in any run are left out."""
    first = comparison.rows[0].runs[0].get("by_class", {})
    found = []
    for task, about in first.items():
        tables = {
            row.name: np.array(
                [[_number(run["by_class"][task]["classes"][name]) for name in about["classes"]] for run in row.runs]
            )
            for row in comparison.rows
        }
        seen = np.any([np.isfinite(table).any(axis=0) for table in tables.values()], axis=0)
        classes = [name for name, there in zip(about["classes"], seen, strict=True) if there]
        found.append(ByClass(task, about["by"], classes, {name: table[:, seen] for name, table in tables.items()}))
    return found


def _per_epoch(comparison: Comparison, read: Any) -> dict[str, dict[str, Curve]]:
    result: dict[str, dict[str, Curve]] = {task.name: {} for task in comparison.tasks}
    for row in comparison.rows:
        epochs, runs = _epochs(comparison, row)
        if not len(epochs):
            continue
        for task in comparison.tasks:
            values = np.array([[_number(read(line, task)) for line in run] for run in runs])
            if np.isfinite(values).any():
                result[task.name][row.name] = _over_seeds(epochs, values)
    return result


def _over_seeds(x: Array, values: Array) -> Curve:
    mean = values.mean(axis=0)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
    return Curve(x, mean, mean - spread, mean + spread)


def _pooled(series: list[list[tuple[int, float]]]) -> Curve:
    """Steps, counted from 1, and values of every run, in stretches of so many that few enough points are left."""
    length = min(len(values) for values in series)
    at = np.array([step + 1.0 for step, _ in series[0][:length]])
    table = np.array([[value for _, value in values[:length]] for values in series])
    pooled = max(1, math.ceil(length / _POINTS))
    stretches = [slice(start, start + pooled) for start in range(0, length, pooled)]
    x = np.array([at[part].mean() for part in stretches])
    mean, low, high = (np.array([_known(of, table[:, part]) for part in stretches]) for of in (np.mean, np.min, np.max))
    return Curve(x, mean, low, high, pooled)


def _known(reduce: Callable[[Array], float], values: Array) -> float:
    """Of the values that are known; NaN if none is."""
    known = values[np.isfinite(values)]
    return float(reduce(known)) if known.size else math.nan


def _epochs(comparison: Comparison, row: RowRecord) -> tuple[Array, list[list[Mapping[str, Any]]]]:
    """The epochs that all seeds have completed, counted from 1, and what each seed's journal says of them."""
    runs = [list(_lines(comparison.folder / run["folder"] / "metrics.jsonl")) for run in row.runs]
    length = min((len(run) for run in runs), default=0)
    return np.array([line["epoch"] + 1.0 for run in runs[:1] for line in run[:length]]), [run[:length] for run in runs]


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a file of JSON lines; none if it does not exist."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _named(method: Any) -> str:
    """What a method is called, whatever its options; one that is given slot by slot by all of them."""
    return method["name"] if isinstance(method, dict) and "name" in method else _described(method)


def _described(method: Any) -> str:
    return method if isinstance(method, str) else json.dumps(method)


@dataclass(frozen=True)
class Entry:
    """One combination of tasks with equal weights, or one method on all of them.

    Attributes:
        name: of the row; of a combination its tasks, joined by ``+``.
        learned: whether it is a method.
        improvement: for each of its tasks how much better it is than alone, in percent: mean and deviation over seeds.
    """

    name: str
    learned: bool
    improvement: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Groupings:
    """What every task gains in each combination, and by each method.

    Attributes:
        tasks: the names of the T tasks.
        entries: the combinations, small ones first, then the methods.
        best: for each task the combination in which it does best on the validation split, which may be alone.
        failed: the error of a run, by its label; what needs it is left out.
    """

    tasks: tuple[str, ...]
    entries: tuple[Entry, ...]
    best: dict[str, str]
    failed: dict[str, str]

    def to_plain(self) -> dict[str, Any]:
        """As ``grouping.json`` has it."""
        fields = {name: plain(getattr(self, name)) for name in ("tasks", "best", "failed")}
        return {**fields, "entries": [plain(entry) for entry in self.entries]}

    def rows(self) -> list[dict[str, Any]]:
        """One for each entry and task."""
        return [
            {"name": entry.name, "learned": entry.learned, "task": task, "improvement %": found["mean"]}
            | {"deviation": found["std"], "best for it": self.best.get(task) == entry.name}
            for entry in self.entries
            for task, found in entry.improvement.items()
        ]
