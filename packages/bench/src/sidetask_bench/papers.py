"""A paper's table beside what its rows give here, at the paper's size and at a small one, never in one column."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sidetask_bench import document, storage, tables
from sidetask_bench.config import Experiment, Paper, Span, load_experiment
from sidetask_bench.schema import ExperimentError, plain

SMALL = "-small"
# Where the data are says nothing of what they are.
_PLACES = ("root", "cache")


@dataclass(frozen=True)
class Sizes:
    """The experiment of a paper, and its small variant, each as it is written.

    Attributes:
        full: at the paper's size.
        small: the same name or file name with ``-small`` behind it.
        chosen: the one that is run, with overrides, which say nothing of the other.
        title: which that is, ``"full"`` or ``"small"``.
    """

    full: Experiment
    small: Experiment
    chosen: Experiment
    title: str


def sizes(source: str | Path, assignments: Iterable[str] = (), *, small: bool = False) -> Sizes:
    """Read both sizes of a paper's experiment.

    Args:
        source: a preset or a YAML file, of either size.
        assignments: overrides of the size that is run.
        small: run the small one, also where the source is the other.

    Raises:
        ExperimentError: if the experiment says nothing of a paper, or either has a mistake.
    """
    path = Path(source)
    stem = path.name.removesuffix(path.suffix) if path.suffix in (".yaml", ".yml") else path.name
    name = stem.removesuffix(SMALL)
    files = {
        title: str(path.with_name(path.name.replace(stem, name + end, 1)))
        for title, end in (("full", ""), ("small", SMALL))
    }
    found = {}
    for title, file in files.items():
        found[title] = experiment = load_experiment(file)
        if experiment.paper is None:
            raise ExperimentError(
                f"{experiment.name} has no key paper: it is not a paper's table; use sidetask compare"
            )
    title = "small" if small or stem.endswith(SMALL) else "full"
    return Sizes(found["full"], found["small"], load_experiment(files[title], assignments), title)


@dataclass(frozen=True)
class Table:
    """The rows of a paper's table: its figures, and those of every size that was run.

    Args:
        name: of the experiment.
        paper: what the paper reports.
        measure: by which it does.
        rows: in the order of the experiment.
        columns: title, and the size in words, of each comparison that is there.
        comparisons: as `sidetask_bench.compare` gives them, one for each column.
        notes: what else is to be said.
    """

    name: str
    paper: Paper
    measure: tables.Measure
    rows: Sequence[str]
    columns: Sequence[tuple[str, str]]
    comparisons: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, sizes: Sizes, runs: Path) -> Table:
        """What is there of both sizes in a folder of runs, each as its comparison says that it was run.

        A column says where its comparison differs from the experiment as it is written. A comparison of other rows is
        left out, and named.
        """
        full = sizes.full
        assert full.paper is not None
        columns, comparisons, notes = [], [], []
        for title, written in (("full", full), ("small", sizes.small)):
            folder = runs / (sizes.chosen.name if title == sizes.title else written.name)
            found = storage.read_json(folder / "comparison.json")
            if found is None:
                continue
            if list(found["config"]["rows"]) != list(written.rows):
                notes.append(f"Not shown, {title}: {folder} has other rows.")
                continue
            columns.append((title, tables.size(found) + _changes(written, found["config"])))
            comparisons.append(found)
            notes += [f"{title}: {failure}." for failure in tables.left_out(found)]
        rows = list(dict.fromkeys([*full.rows, *sizes.small.rows]))
        return cls(full.name, full.paper, tables.MEASURES[full.improvement], rows, columns, comparisons, notes)

    def terminal(self) -> tables.Blocks:
        """For the terminal."""
        return tables.Blocks(*self._cells(), self.name, " ".join([self.caption(), *self.notes]))

    def write(self, path: Path) -> None:
        """As Markdown."""
        head, rows = self._cells()
        lines = [f"# {self.name}", "", tables.line(head), tables.line(["---"] + ["---:"] * (len(head) - 1))]
        lines += [tables.line(row) for row in rows]
        lines += ["", self.caption(), ""]
        if self.notes:
            lines += [*(f"- {note}" for note in self.notes), ""]
        storage.write_text(path, "\n".join(lines))

    def caption(self) -> str:
        """What is measured, and what each column was run at."""
        measures = dict.fromkeys([self.measure, *self._measures()])
        against = " and ".join(dict.fromkeys(comparison["baseline"] for comparison in self.comparisons))
        parts = [
            f"{one.name[0].upper()}{one.name[1:]} in % against {against or 'single-task learning'}: {one.words}."
            for one in measures
        ]
        parts += ["Time of a step in units of equal's.", f"Paper: {self.paper.source}; {self.paper.size}."]
        parts += [self.paper.note] if self.paper.note else []
        return " ".join([*parts, *(f"Here, {title}: {size}." for title, size in self.columns)])

    def _measures(self) -> list[tables.Measure]:
        return [tables.MEASURES[comparison["improvement"]] for comparison in self.comparisons]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        titles = [title for title, _ in self.columns]
        head = ["", f"{self.measure.heading}, paper"]
        head += [f"{one.heading}, {title}" for one, title in zip(self._measures(), titles, strict=True)]
        head += ["time ↓, paper", *(f"time ↓, {title}" for title in titles)]
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


def _changes(written: Experiment, config: Mapping[str, Any]) -> str:
    """In what a comparison differs from its experiment as it is written, but for the figures of the paper."""
    before, after = (
        {key: value for key, value in document.flatten(one).items() if key.split(".")[-1] not in _PLACES}
        for one in (_as_json(replace(written, paper=None)), {**config, "paper": None})
    )
    changed = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    return f"; otherwise than {written.name} in {', '.join(changed)}" if changed else ""


def _span(span: Span | None, places: int, *, sign: bool = False) -> str:
    if span is None:
        return tables.number(None, places)
    ends = [tables.number(value, places, sign=sign) for value in dict.fromkeys([span.low, span.high])]
    return " to ".join(ends)


def _as_json(experiment: Experiment) -> Any:
    """As it reads back from a comparison."""
    return json.loads(json.dumps(plain(experiment)))
