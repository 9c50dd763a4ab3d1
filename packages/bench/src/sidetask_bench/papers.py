"""A paper's table beside what its rows give here, at the paper's size and at a small one, never in one column."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidetask_bench import document, storage, tables
from sidetask_bench.config import Experiment, Paper, Span, load_experiment
from sidetask_bench.schema import ExperimentError, plain

SMALL = "-small"


def sizes(source: str | Path, assignments: Iterable[str] = ()) -> list[Experiment]:
    """The experiment of a paper, and its small variant: the same name or file name with ``-small`` behind it.

    Args:
        source: a preset or a YAML file, of either size.
        assignments: overrides, of both.

    Raises:
        ExperimentError: if the experiment says nothing of a paper, or either has a mistake.
    """
    path = Path(source)
    stem = path.name.removesuffix(path.suffix) if path.suffix in (".yaml", ".yml") else path.name
    full = stem.removesuffix(SMALL)
    found = []
    for name in (full, full + SMALL):
        experiment = load_experiment(str(path.with_name(path.name.replace(stem, name, 1))), assignments)
        found.append(experiment)
        if experiment.paper is None:
            raise ExperimentError(
                f"{experiment.name} has no key paper: it is not a paper's table; use sidetask compare"
            )
    return found


def needs_relations(experiment: Experiment, runs: Path) -> bool:
    """Whether rows read the relations that ``sidetask relations`` would write here, and they are not there."""
    path = runs / experiment.name / "relations" / "relations.json"
    methods = [config[0].method for config in experiment.runs(experiment.seeds[:1]).values()]
    asked = [value for method in methods for key, value in document.flatten({"": method}).items() if "relations" in key]
    return not path.exists() and any(isinstance(value, str) and Path(value) == path for value in asked)


@dataclass(frozen=True)
class Table:
    """The rows of a paper's table: its figures, and those of every size that was run.

    Args:
        name: of the experiment.
        paper: what the paper reports.
        rows: in the order of the experiment.
        columns: title, and the size in words, of each comparison that is there.
        comparisons: as `sidetask_bench.compare` gives them, one for each column.
    """

    name: str
    paper: Paper
    rows: Sequence[str]
    columns: Sequence[tuple[str, str]]
    comparisons: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, experiments: Sequence[Experiment], runs: Path) -> Table:
        """What is there of the experiments in a folder of runs; a comparison of another configuration is left out."""
        full, small = experiments
        assert full.paper is not None
        columns, comparisons = [], []
        for title, experiment in (("full", full), ("small", small)):
            found = storage.read_json(runs / experiment.name / "comparison.json")
            if found is not None and found["config"] == _as_json(experiment):
                columns.append((title, experiment.size))
                comparisons.append(found)
        return cls(full.name, full.paper, list(dict.fromkeys([*full.rows, *small.rows])), columns, comparisons)

    def terminal(self) -> tables.Blocks:
        """For the terminal."""
        return tables.Blocks(*self._cells(), self.name, self.caption())

    def write(self, path: Path) -> None:
        """As Markdown."""
        head, rows = self._cells()
        lines = [f"# {self.name}", "", tables.line(head), tables.line(["---"] + ["---:"] * (len(head) - 1))]
        lines += [tables.line(row) for row in rows]
        storage.write_text(path, "\n".join([*lines, "", self.caption(), ""]))

    def caption(self) -> str:
        """What each column was run at."""
        parts = ["Improvement in % over single-task learning; time of a step in units of equal's."]
        note = f" {self.paper.note}" if self.paper.note else ""
        parts += [f" Paper: {self.paper.source}; {self.paper.size}.{note}"]
        parts += [f" Here, {title}: {size}." for title, size in self.columns]
        return "".join(parts)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        head = ["", "improvement, paper", *(f"improvement, {title}" for title, _ in self.columns)]
        head += ["time, paper", *(f"time, {title}" for title, _ in self.columns)]
        found = [{row["name"]: row for row in comparison["rows"]} for comparison in self.comparisons]
        rows = []
        units = [tables.unit(comparison) for comparison in self.comparisons]
        for name in self.rows:
            cells = [_span(self.paper.improvement.get(name), 1, sign=True)]
            for comparison in found:
                change = comparison[name]["improvement"] if name in comparison else {"mean": None, "std": None}
                cells.append(tables.with_deviation(change["mean"], change["std"], 1, sign=True))
            cells.append(_span(self.paper.time.get(name), 2))
            for comparison, unit in zip(found, units, strict=True):
                there = name in comparison and unit is not None
                cells.append(tables.number(comparison[name]["seconds_per_step"] / unit if there else None, 2))
            rows.append([name, *cells])
        return head, rows


def _span(span: Span | None, places: int, *, sign: bool = False) -> str:
    if span is None:
        return tables.number(None, places)
    ends = [tables.number(value, places, sign=sign) for value in dict.fromkeys([span.low, span.high])]
    return " to ".join(ends)


def _as_json(experiment: Experiment) -> Any:
    """As it reads back from a comparison."""
    return json.loads(json.dumps(plain(experiment)))
