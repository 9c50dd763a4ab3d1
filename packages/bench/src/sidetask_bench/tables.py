"""One comparison as a table: on the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

IMPROVEMENT_PLACES = 2


@dataclass(frozen=True)
class Measure:
    """A definition of `sidetask_core.relative_improvement`, for people: how it is called, and what it is."""

    name: str
    higher_is_better: bool
    words: str

    @property
    def arrow(self) -> str:
        """Up or down, where better is."""
        return ARROWS[self.higher_is_better]

    @property
    def heading(self) -> str:
        """With its unit, and the way that is better.

        >>> MEASURES["flat"].heading
        'Δm % ↓'
        """
        return f"{self.name} % {self.arrow}"


ARROWS = {True: "↑", False: "↓"}
MEASURES = {
    "mean-of-tasks": Measure("improvement", True, "mean over each primary task's metrics, then over these tasks"),
    "one-metric": Measure("improvement", True, "mean over the primary tasks' headline metrics"),
    "flat": Measure(
        "Δm", False, "how much worse the metrics of all primary tasks are, mean over them; lower is better"
    ),
}


@dataclass(frozen=True)
class Blocks:
    """A table for the terminal, of which nothing is left out or shortened: columns that do not fit go on further below.

    Each block begins with the first column, which says whose the numbers are. Headings are broken between words. Text
    that is wider than the terminal all by itself is broken where it has to be.

    Args:
        head: the headings.
        rows: as many cells each; None is a line across the table.
        title: stands above.
        caption: stands below.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str] | None]
    title: str = ""
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, style="table.title")
        for widths in self._fitting(options.max_width):
            block = Table()
            for i, width in widths.items():
                justify: Literal["left", "right"] = "left" if i == 0 else "right"
                block.add_column(Text(self.head[i]), justify=justify, vertical="bottom", width=width, overflow="fold")
            for row in self.rows:
                if row is None:
                    block.add_section()
                else:
                    block.add_row(*(Text(row[i]) for i in widths))
            yield block
        if self.caption:
            yield Text(self.caption, style="table.caption")

    def _fitting(self, width: int) -> list[dict[int, int]]:
        """The columns of each block, with the widths of their text."""
        cells = [[cell_len(row[i]) for row in self.rows if row is not None] for i in range(len(self.head))]
        # A sign behind a word stays with it.
        words = [[cell_len(word) for word in re.split(r"\s+(?!\S$)", name)] for name in self.head]
        least = [max(1, *sizes, *of_head) for sizes, of_head in zip(cells, words, strict=True)]
        blocks = [[0]]
        for i in range(1, len(self.head)):
            if len(blocks[-1]) > 1 and _width(least[j] for j in [*blocks[-1], i]) > width:
                blocks.append([0])
            blocks[-1].append(i)
        whole = [max(size, cell_len(name)) for size, name in zip(least, self.head, strict=True)]
        found = []
        for block in blocks:
            wanted = whole if _width(whole[i] for i in block) <= width else least
            found.append({i: wanted[i] for i in block})
        return found


def _width(columns: Iterable[int]) -> int:
    """Of a block with text of these widths: a space on either side of each, and lines."""
    return 1 + sum(width + 3 for width in columns)


def terminal(comparison: Mapping[str, Any]) -> Blocks:
    """The headline metric of every task, the relative improvement and the step time."""
    return Blocks(*_cells(comparison, headline=True), comparison["name"], _caption(comparison))


def markdown(comparison: Mapping[str, Any]) -> str:
    """Every metric of every task, as a Markdown table; one more for each task whose metric is broken down by class."""
    head, rows = _cells(comparison, headline=False)
    lines = [f"# {comparison['name']}", "", line(head), line(["---"] + ["---:"] * (len(head) - 1))]
    lines += [line(row) for row in rows]
    lines += ["", _caption(comparison), *mixed_versions(comparison["mixed_versions"]), ""]
    if failures := left_out(comparison):
        lines += [*(f"- {failure}" for failure in failures), ""]
    for broken in by_class(comparison):
        lines += [f"## {broken.task} {broken.metric} {ARROWS[broken.higher_is_better]} by class of {broken.by}", ""]
        lines += [line([broken.by, *broken.rows]), line(["---"] + ["---:"] * len(broken.rows))]
        for name, values in broken.classes.items():
            places = decimals(mean for mean, _ in values)
            lines.append(line([name, *(with_deviation(mean, std, places) for mean, std in values)]))
        lines.append("")
    return "\n".join(lines)


@dataclass(frozen=True)
class Broken:
    """A task's headline metric by class of another task's labels: means and deviations over the seeds.

    `classes` has for each class a pair of every row, both None where a run has no point of it; those that no run has
    are left out.
    """

    task: str
    metric: str
    higher_is_better: bool
    by: str
    rows: list[str]
    classes: dict[str, list[tuple[float | None, float | None]]]


def by_class(comparison: Mapping[str, Any]) -> list[Broken]:
    """What the runs found class by class, for each task that was broken down."""
    rows = comparison["rows"]
    found = []
    for task, about in rows[0]["runs"][0].get("by_class", {}).items():
        (metrics,) = [one["metrics"] for one in comparison["tasks"] if one["name"] == task]
        metric, info = next(iter(metrics.items()))
        classes = {}
        for name in about["classes"]:
            seeds = [[run["by_class"][task]["classes"][name] for run in row["runs"]] for row in rows]
            values = [_mean_and_deviation(of_row) for of_row in seeds]
            if any(mean is not None for mean, _ in values):
                classes[name] = values
        found.append(
            Broken(task, metric, info["higher_is_better"], about["by"], [row["name"] for row in rows], classes)
        )
    return found


def _mean_and_deviation(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return None, None
    return fmean(known), stdev(known) if len(known) > 1 else None


def csv_text(comparison: Mapping[str, Any]) -> str:
    """One line per row and metric, or class: mean, standard deviation, number of seeds, and of those that failed.

    Values are unrounded. A row of which every seed failed has one line, without them.
    """
    failed = Counter(failure["row"] for failure in comparison.get("failed", ()))
    measure = MEASURES[comparison["improvement"]]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "task", "metric", "mean", "std", "seeds", "failed"])
    for row in comparison["rows"]:
        seeds = (len(row["runs"]), failed[row["name"]])
        for task, metrics in row["mean"].items():
            for metric, mean in metrics.items():
                writer.writerow([row["name"], task, metric, mean, row["std"][task][metric], *seeds])
        for task, change in row["improvement"]["by_task"].items():
            writer.writerow([row["name"], task, "improvement %", change["mean"], change["std"], *seeds])
        change = row["improvement"]
        writer.writerow([row["name"], "", f"{measure.name} %", change["mean"], change["std"], *seeds])
    for name in [name for name in failed if name not in {row["name"] for row in comparison["rows"]}]:
        writer.writerow([name, "", f"{measure.name} %", None, None, 0, failed[name]])
    for broken in by_class(comparison):
        for name, values in broken.classes.items():
            metric = f"{broken.metric}, {broken.by}: {name}"
            for row, (mean, std) in zip(comparison["rows"], values, strict=True):
                writer.writerow([row["name"], broken.task, metric, mean, std, len(row["runs"]), failed[row["name"]]])
    return out.getvalue()


def left_out(comparison: Mapping[str, Any]) -> list[str]:
    """A line for each run that failed.

    >>> left_out({"failed": [{"row": "dwa", "seed": 1, "error": "depth: the loss is nan"}]})
    ['left out: dwa, seed 1: depth: the loss is nan']
    """
    return [
        f"left out: {failure['row']}, seed {failure['seed']}: {' '.join(failure['error'].split())}"
        for failure in comparison.get("failed", ())
    ]


def samples(data: Mapping[str, Any]) -> str:
    """How much data there were, of which size.

    >>> samples({"input": [3, 288, 384], "train": 771, "validation": 24, "test": 654})
    '771 training, 24 validation and 654 test samples of 3×288×384'
    """
    size = "×".join(map(str, data["input"]))
    return f"{data['train']} training, {data['validation']} validation and {data['test']} test samples of {size}"


def size(comparison: Mapping[str, Any]) -> str:
    """Data, network and length of training in one line, as a comparison was run."""
    config = comparison["config"]
    said = ("name", "root", "cache", "size", "train", "validation", "test")  # or said by the samples
    data = _options(config["dataset"], said)
    network = _options(config["network"], ("name", "weights"))
    epochs, seeds = config["training"]["epochs"], len(config["seeds"])
    length = f"{epochs} epoch{'s' * (epochs != 1)}, {seeds} seed{'s' * (seeds != 1)}"
    return f"{data}, {samples(comparison['data'])}, {network}, {length}"


def _options(plugin: Mapping[str, Any], without: Iterable[str]) -> str:
    """A plug-in's name, and its options in brackets."""
    options = ", ".join(f"{key} {_short(value)}" for key, value in plugin.items() if key not in without)
    return f"{plugin['name']} ({options})" if options else str(plugin["name"])


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value["name"]) if "name" in value else " and ".join(value)
    if isinstance(value, list | tuple):
        return (" and " if all(isinstance(item, str) for item in value) else "×").join(map(str, value))
    return str(value)


def mixed_versions(mixed: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """A sentence for each distribution that the runs had in different versions.

    >>> mixed_versions({"torch": {"2.6": ["single/seed0", "single/seed1"], "2.7": ["equal/seed0"]}})
    ['Runs were made with different versions of torch: 2.6 (single/seed0, single/seed1); 2.7 (equal/seed0).']
    """
    return [
        f"Runs were made with different versions of {name}: "
        + "; ".join(f"{version} ({', '.join(runs)})" for version, runs in found.items())
        + "."
        for name, found in mixed.items()
    ]


def decimals(values: Iterable[float | None]) -> int:
    """How many decimals a column of numbers gets: four significant digits of the largest, and as many for all.

    >>> decimals([0.51234, None]), decimals([31.4, 2.0]), decimals([1234.5]), decimals([])
    (4, 2, 0, 3)
    """
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return 3 if largest == 0 else min(8, max(0, 3 - math.floor(math.log10(largest))))


def number(value: float | None, places: int, *, sign: bool = False) -> str:
    """A value for people, with so many decimals; a dash for None.

    >>> number(0.51234, 3), number(-2.5, 2), number(2.5, 2, sign=True), number(-0.001, 2, sign=True), number(None, 1)
    ('0.512', '−2.50', '+2.50', '0.00', '–')
    """
    if value is None:
        return "–"
    if round(value, places) == 0:
        return f"{0:.{places}f}"
    return (f"{value:+.{places}f}" if sign else f"{value:.{places}f}").replace("-", "−")


def with_deviation(mean: float | None, std: float | None, places: int, *, sign: bool = False) -> str:
    """A mean and, if there is one, its standard deviation.

    >>> with_deviation(0.51234, 0.0123, 3), with_deviation(31.42, None, 1)
    ('0.512 ± 0.012', '31.4')
    """
    shown = number(mean, places, sign=sign)
    return shown if mean is None or std is None else f"{shown} ± {number(std, places)}"


def unit(comparison: Mapping[str, Any]) -> float | None:
    """Seconds of a step of equal weighting on the experiment's own network; None if no row is that.

    >>> rows = [{"name": "shared", "method": "equal", "network": {"name": "small"}, "seconds_per_step": 0.2}]
    >>> unit({"rows": rows, "config": {"network": {"name": "small"}}})
    0.2
    """
    network = comparison.get("config", {}).get("network")
    for row in comparison["rows"]:
        if row["name"] == "equal" or (row["method"] in ("equal", {"name": "equal"}) and row.get("network") == network):
            return float(row["seconds_per_step"]) if row.get("seconds_per_step") else None
    return None


def _cells(comparison: Mapping[str, Any], headline: bool) -> tuple[list[str], list[list[str]]]:
    columns = [
        (task["name"], metric, info["higher_is_better"])
        for task in comparison["tasks"]
        for metric, info in list(task["metrics"].items())[: 1 if headline else None]
    ]
    head = ["", *(" ".join(filter(None, (task, metric, ARROWS.get(higher)))) for task, metric, higher in columns)]
    head += [MEASURES[comparison["improvement"]].heading, "ms/step"]
    equal = unit(comparison)
    head += ["× equal"] if equal else []
    wanted = max(len(row["runs"]) for row in comparison["rows"])
    places = [decimals(row["mean"][task][metric] for row in comparison["rows"]) for task, metric, _ in columns]
    rows = []
    for row in comparison["rows"]:
        seeds = len(row["runs"])
        name = row["name"] if seeds == wanted else f"{row['name']} ({seeds} of {wanted} seeds)"
        cells = [
            with_deviation(row["mean"][task][metric], row["std"][task][metric], count)
            for (task, metric, _), count in zip(columns, places, strict=True)
        ]
        change = row["improvement"]
        cells.append(with_deviation(change["mean"], change["std"], IMPROVEMENT_PLACES, sign=True))
        seconds = row["seconds_per_step"]
        rows.append([name, *cells, f"{1000 * seconds:.1f}", *([f"{seconds / equal:.2f}"] if equal else [])])
    return head, rows


def _caption(comparison: Mapping[str, Any]) -> str:
    seeds = max(len(row["runs"]) for row in comparison["rows"])
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    epochs = comparison.get("config", {}).get("training", {}).get("average", 1)
    spread += f", each over the last {epochs} epochs" if epochs > 1 else ""
    measure = MEASURES[comparison["improvement"]]
    caption = f"Test split, {spread}; {measure.name} against {comparison['baseline']}: {measure.words}."
    caption += f" Data: {samples(comparison['data'])}."
    gaps = any(row["improvement"]["mean"] is None for row in comparison["rows"])
    return f"{caption} –: undefined in at least one seed, so that there is no mean." if gaps else caption


def line(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
