"""One comparison as a table: on the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from rich.table import Table


def terminal(comparison: Mapping[str, Any]) -> Table:
    """The headline metric of every task, the relative improvement and the step time."""
    head, rows = _cells(comparison, headline=True)
    table = Table(title=comparison["name"], title_justify="left", caption=_caption(comparison), caption_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(comparison: Mapping[str, Any]) -> str:
    """Every metric of every task, as a Markdown table."""
    head, rows = _cells(comparison, headline=False)
    lines = [f"# {comparison['name']}", "", _line(head), _line(["---"] + ["---:"] * (len(head) - 1))]
    lines += [_line(row) for row in rows]
    return "\n".join([*lines, "", _caption(comparison), *mixed_versions(comparison["mixed_versions"]), ""])


def csv_text(comparison: Mapping[str, Any]) -> str:
    """One line per row and metric: mean, standard deviation, number of seeds; unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "task", "metric", "mean", "std", "seeds"])
    for row in comparison["rows"]:
        seeds = len(row["runs"])
        for task, metrics in row["mean"].items():
            for metric, mean in metrics.items():
                writer.writerow([row["name"], task, metric, mean, row["std"][task][metric], seeds])
        for task, change in row["improvement"]["by_task"].items():
            writer.writerow([row["name"], task, "improvement %", change["mean"], change["std"], seeds])
        change = row["improvement"]
        writer.writerow([row["name"], "", "improvement %", change["mean"], change["std"], seeds])
    return out.getvalue()


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


def with_deviation(mean: float | None, std: float | None, sign: bool = False) -> str:
    """A value for people.

    >>> with_deviation(0.51234, 0.0123), with_deviation(31.42, None), with_deviation(2.5, 0.25, sign=True)
    ('0.512 ± 0.012', '31.4', '+2.50 ± 0.25')
    """
    if mean is None:
        return "–"
    digits = 3 if abs(mean) < 1 else 2 if abs(mean) < 10 else 1
    shown = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return shown if std is None else f"{shown} ± {std:.{digits}f}"


def _cells(comparison: Mapping[str, Any], headline: bool) -> tuple[list[str], list[list[str]]]:
    columns = [
        (task["name"], metric, info["higher_is_better"])
        for task in comparison["tasks"]
        for metric, info in list(task["metrics"].items())[: 1 if headline else None]
    ]
    arrows = {True: " ↑", False: " ↓", None: ""}
    head = ["", *(f"{task} {metric}{arrows[higher]}" for task, metric, higher in columns)]
    head += [f"improvement %{arrows[comparison['higher_is_better']]}", "ms/step"]
    wanted = max(len(row["runs"]) for row in comparison["rows"])
    rows = []
    for row in comparison["rows"]:
        seeds = len(row["runs"])
        name = row["name"] if seeds == wanted else f"{row['name']} ({seeds} of {wanted} seeds)"
        cells = [with_deviation(row["mean"][task][metric], row["std"][task][metric]) for task, metric, _ in columns]
        change = row["improvement"]
        cells.append(with_deviation(change["mean"], change["std"], sign=True))
        rows.append([name, *cells, f"{1000 * row['seconds_per_step']:.1f}"])
    return head, rows


def _caption(comparison: Mapping[str, Any]) -> str:
    seeds = max(len(row["runs"]) for row in comparison["rows"])
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    caption = f"Test split, {spread}; improvement over {comparison['baseline']} ({comparison['improvement']})."
    gaps = any(row["improvement"]["mean"] is None for row in comparison["rows"])
    return f"{caption} –: undefined in at least one seed, so that there is no mean." if gaps else caption


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
