"""A paper's table beside what its rows give here, at the paper's size and at a small one, never in one column."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import table as rich

from sidetask_bench import storage, tables
from sidetask_bench.config import Experiment, Paper, load_experiment
from sidetask_bench.schema import ExperimentError, plain

_SMALL = "-small"


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
    full = stem.removesuffix(_SMALL)
    names = [path.with_name(path.name.replace(stem, name, 1)) for name in (full, full + _SMALL)]
    found = [load_experiment(str(name), assignments) for name in names]
    for experiment in found:
        if experiment.paper is None:
            raise ExperimentError(
                f"{experiment.name} has no key paper: it is not a paper's table; use sidetask compare"
            )
    return found


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

    def terminal(self) -> rich.Table:
        """For the terminal."""
        table = rich.Table(title=self.name, title_justify="left", caption=self.caption(), caption_justify="left")
        head, rows = self._cells()
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        return table

    def write(self, path: Path) -> None:
        """As Markdown."""
        head, rows = self._cells()
        lines = [f"# {self.name}", "", tables.line(head), tables.line(["---"] + ["---:"] * (len(head) - 1))]
        lines += [tables.line(row) for row in rows]
        storage.write_text(path, "\n".join([*lines, "", self.caption(), ""]))

    def caption(self) -> str:
        """What each column was run at."""
        parts = ["Improvement in % over single-task learning; time of a step in units of equal's."]
        parts += [f" Paper: {self.paper.source}; {self.paper.size}."]
        parts += [f" Here, {title}: {size}." for title, size in self.columns]
        return "".join(parts)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        head = ["", "improvement, paper", *(f"here, {title}" for title, _ in self.columns)]
        head += ["time, paper", *(f"here, {title}" for title, _ in self.columns)]
        found = [{row["name"]: row for row in comparison["rows"]} for comparison in self.comparisons]
        rows = []
        for name in self.rows:
            cells = [_figure(self.paper.improvement.get(name), 1, sign=True)]
            for comparison in found:
                change = comparison[name]["improvement"] if name in comparison else {"mean": None, "std": None}
                cells.append(tables.with_deviation(change["mean"], change["std"], 1, sign=True))
            cells.append(_figure(self.paper.time.get(name), 2))
            for comparison in found:
                both = name in comparison and "equal" in comparison
                ratio = comparison[name]["seconds_per_step"] / comparison["equal"]["seconds_per_step"] if both else None
                cells.append(_figure(ratio, 2))
            rows.append([name, *cells])
        return head, rows


def _figure(value: float | None, places: int, *, sign: bool = False) -> str:
    return tables.number(value, places, sign=sign)


def _as_json(experiment: Experiment) -> Any:
    """As it reads back from a comparison."""
    return json.loads(json.dumps(plain(experiment)))
