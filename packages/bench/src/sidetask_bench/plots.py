"""Draws a comparison: bars of improvement, weights and curves over training.

Every figure is a grid of panels, and every panel is a function of a set of axes and a LIGHT. A report shows the panels
one by one, so that they can flow on a narrow screen; a picture file shows all of them together. Figures are made
without pyplot: nothing global is read or changed.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sidetask_bench.records import ByClass, Comparison, Curve, RowRecord, TaskRecord

if TYPE_CHECKING:
    from sidetask_bench.grouping import Entry, Groupings

Matrix = npt.NDArray[np.float64]

PANEL = (4.4, 3.1)
# Between source and target in the name of a transfer, a task that a method has added.
ARROW = "→"
DPI = 150

# Okabe and Ito's colours, told apart under the common colour vision deficiencies; yellow is too faint for lines, and
# black would vanish on a dark page. Past the last colour they begin again with another dash.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46")
_COLOURS_ON_DARK = ("#4DA3DB", "#F0803C", "#2CC295", "#DE96BC", "#F0B43C", "#8CCFF2", "#C2A27A")
_MARKERS = ("o", "s", "D", "^")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


@dataclass(frozen=True)
class Style:
    """Ink and colours for one background."""

    ink: str
    muted: str
    grid: str
    colours: tuple[str, ...]

    def line(self, index: int) -> dict[str, Any]:
        """Colour and dash of the `index`-th row or task: the same on every panel."""
        dash = _DASHES[index // len(self.colours) % len(_DASHES)]
        return {"color": self.colours[index % len(self.colours)], "linestyle": dash}

    def variables(self) -> dict[str, str]:
        """The colours by the names of the CSS variables that stand for them in `svg`."""
        return {
            "ink": self.ink,
            "muted": self.muted,
            "line": self.grid,
            **{f"c{index}": colour for index, colour in enumerate(self.colours)},
        }


LIGHT = Style("#1b1f24", "#57606a", "#d8dee4", _COLOURS)
DARK = Style("#e6edf3", "#9aa7b3", "#343b44", _COLOURS_ON_DARK)


@dataclass(frozen=True)
class Bar:
    """A mean, its standard deviation over the seeds if there are several, and the seeds' own values."""

    mean: float
    std: float | None
    seeds: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """One small chart: its title, how to draw it, and in words what it shows (for those who cannot see it).

    `left` and `right` are the inches beside the axes that names and numbers need.
    """

    title: str
    draw: Callable[[Axes], None]
    words: str
    left: float = 0.8
    right: float = 1.15


def improvement_panels(comparison: Comparison) -> list[Panel]:
    """The overall improvement of every row, then that of each task, against the baseline."""
    rows = comparison.rows
    label = f"improvement on {_short(comparison.baseline)} (%)"
    overall = [_bar(row.improvement, row.values if len(row.runs) > 1 else []) for row in rows]
    left = 0.2 + 0.085 * max(len(_short(row.name)) for row in rows)
    draw = partial(_bars, names=[row.name for row in rows], label=label)
    title = "All primary tasks" + ("" if comparison.higher_is_better else " (lower is better)")
    panels = [Panel(title, partial(draw, bars=overall), _in_words([row.name for row in rows], overall), left, 0.15)]
    for task in comparison.tasks:
        bars = [_bar(row.improvement.get("by_task", {}).get(task.name)) for row in rows]
        if any(bars):
            panels.append(
                Panel(task.name, partial(draw, bars=bars), _in_words([row.name for row in rows], bars), left, 0.15)
            )
    return panels


def step_panels(
    comparison: Comparison, values: Mapping[str, Mapping[str, Curve]], y: str, rule: float | None = 1.0
) -> list[Panel]:
    """Weights or norms, as `y` says, over the steps, one panel per row that has any; `rule` is drawn across."""
    places = {task.name: index for index, task in enumerate(comparison.tasks)}
    for curves in values.values():  # tasks that a method added come after the dataset's
        for task in [task for task in curves if ARROW not in task]:
            places.setdefault(task, len(places))
    panels = []
    for row in comparison.rows:
        # Transfers have a matrix of their own.
        if of_row := {name: curve for name, curve in values.get(row.name, {}).items() if ARROW not in name}:
            pooled = max(curve.pooled for curve in of_row.values())
            x = "step" if pooled == 1 else f"step (means of {pooled}; band: least to most)"
            draw = partial(_lines, curves=of_row, places=places, x=x, y=y, rule=rule)
            panels.append(Panel(row.name, draw, _ends_in_words(f"{y} at the end", of_row)))
    return panels


def shaper_panels(weights: Mapping[str, Mapping[str, Mapping[str, Curve]]]) -> list[Panel]:
    """The weights that shapers name, of classes for instance, over the epochs: one panel for every row and task."""
    panels = []
    for row, tasks in weights.items():
        for task, curves in tasks.items():
            places = {name: index for index, name in enumerate(curves)}
            draw = partial(_lines, curves=curves, places=places, x="epoch", y="weight", rule=1.0)
            title = row if len(tasks) == 1 else f"{row}, {task}"
            panels.append(Panel(title, draw, _ends_in_words("weights at the end", curves)))
    return panels


def class_panels(comparison: Comparison, found: ByClass) -> list[Panel]:
    """How much better each row is than the baseline on the points of each class: bars in percent, a panel for each."""
    metric = next(task for task in comparison.tasks if task.name == found.task)
    sign = 1.0 if metric.headline is None or metric.metrics[metric.headline] else -1.0
    baseline = found.values[comparison.baseline].mean(axis=0)
    panels = []
    for row in comparison.rows:
        if row.name == comparison.baseline:
            continue
        change = 100 * sign * (found.values[row.name] - baseline) / np.abs(baseline)
        means, several = change.mean(axis=0), len(change) > 1
        stds = change.std(axis=0, ddof=1) if several else np.zeros_like(means)
        bars = [
            Bar(float(mean), float(std) if several else None) if np.isfinite(mean) else None
            for mean, std in zip(means, stds, strict=True)
        ]
        label = f"improvement on {_short(comparison.baseline)} (%)"
        draw = partial(_bars, names=found.classes, bars=bars, label=label)
        left = 0.2 + 0.085 * max(len(_short(name)) for name in found.classes)
        panels.append(Panel(row.name, draw, _in_words(found.classes, bars), left, 0.15))
    return panels


def curve_panels(
    comparison: Comparison, curves: Mapping[str, Mapping[str, Curve]], label: Callable[[TaskRecord], str]
) -> list[Panel]:
    """A curve per row over the epochs, one panel per task; `label` names the vertical axis."""
    places = {row.name: index for index, row in enumerate(comparison.rows)}
    panels = []
    for task in comparison.tasks:
        if of_task := curves.get(task.name):
            draw = partial(_lines, curves=of_task, places=places, x="epoch", y=label(task))
            panels.append(Panel(task.name, draw, _ends_in_words("at the end", of_task)))
    return panels


def trade_off_panels(comparison: Comparison, label: Callable[[TaskRecord], str]) -> list[Panel]:
    """The headline metric of one task against another's: a point per row, a line per front; better is up and right."""
    tasks = [task for task in comparison.tasks if task.headline is not None]
    panels = []
    for one, other in itertools.combinations(tasks, 2):
        points = {row.name: (_of_seeds(row, one), _of_seeds(row, other)) for row in comparison.rows}
        points = {name: xy for name, xy in points.items() if np.isfinite(np.stack(xy)).all()}
        if len(points) > 1:
            draw = partial(_trade_off, comparison=comparison, points=points, tasks=(one, other), label=label)
            words = [f"{name} {x.mean():.4g} and {y.mean():.4g}" for name, (x, y) in points.items()]
            panels.append(Panel(f"{one.name} and {other.name}", draw, "; ".join(words), right=1.4))
    return panels


def _of_seeds(row: RowRecord, task: TaskRecord) -> Matrix:
    """A row's headline metric of a task, of every seed."""
    values = [run["test"][task.name][task.headline] for run in row.runs]
    return np.array([math.nan if value is None else float(value) for value in values])


def _trade_off(
    ax: Axes,
    comparison: Comparison,
    points: Mapping[str, tuple[Matrix, Matrix]],
    tasks: tuple[TaskRecord, TaskRecord],
    label: Callable[[TaskRecord], str],
) -> None:
    ax.set_xlabel(f"{_short(tasks[0].name)}: {label(tasks[0])}", color=LIGHT.muted, fontsize=9)
    ax.set_ylabel(f"{_short(tasks[1].name)}: {label(tasks[1])}", color=LIGHT.muted, fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    places = {row.name: index for index, row in enumerate(comparison.rows)}
    fronts = {name: [row for row in rows if row in points] for name, rows in comparison.fronts.items()}
    alone = [name for name in points if not any(name in rows for rows in fronts.values())]
    for task, axis in zip(tasks, (ax.xaxis, ax.yaxis), strict=True):
        axis.set_inverted(task.headline is not None and not task.metrics[task.headline])
    ends = []
    for name, rows in {**{name: [name] for name in alone}, **fronts}.items():
        if not rows:
            continue
        colour = LIGHT.line(places[rows[0]])["color"]
        marker = _MARKERS[places[rows[0]] // len(LIGHT.colours) % len(_MARKERS)]
        means = np.array([[x.mean() for x in points[row]] for row in rows])
        for row, (x, y) in zip(rows, means, strict=True):
            if len(points[row][0]) > 1:
                spread = [values.std(ddof=1) for values in points[row]]
                ax.errorbar(x, y, yerr=spread[1], xerr=spread[0], color=colour, linewidth=0.8, alpha=0.5)
        ax.plot(*means.T, marker=marker, color=colour, markersize=5.5, linewidth=1.2 if len(rows) > 1 else 0)
        # Rows of a front by what sets them apart, a number often.
        alike = len(os.path.commonprefix(rows)) if len(rows) > 1 else None  # noqa: RUF071 (letters are wanted)
        for row, point in zip(rows if alike is not None else [], means, strict=False):
            ax.annotate(
                _short(row[alike:]), point, (4, 4), textcoords="offset points", color=colour, fontsize=8, weight="bold"
            )
        # A front is named at the end that is nearer to the names.
        end = max(means, key=lambda point: -point[0] if ax.xaxis.get_inverted() else point[0])
        ends.append((name, float(end[0]), float(end[1]), colour))
    _name_ends(ax, ends)


def grouping_panels(found: Groupings) -> list[Panel]:
    """What a task gains in every combination of tasks and by every method: bars in percent, a panel for each task."""
    panels = []
    for task in found.tasks:
        entries = [entry for entry in found.entries if task in entry.improvement]
        names = [_beside(entry, task, found.best.get(task)) for entry in entries]
        bars = [_bar(entry.improvement[task]) for entry in entries]
        draw = partial(_bars, names=names, bars=bars, label="improvement on the task alone (%)")
        left = 0.2 + 0.085 * max(len(_short(name)) for name in names)
        panels.append(Panel(task, draw, _in_words(names, bars), left, 0.15))
    return panels


def _beside(entry: Entry, task: str, best: str | None) -> str:
    """What trains beside a task: other tasks, or a method on all of them; a star where that is best."""
    others = [name for name in entry.name.split("+") if name != task]
    name = entry.name if entry.learned else "+".join(others) or "alone"
    return f"* {name}" if entry.name == best else name


def relations_panel(tasks: Sequence[str], improvement: Matrix) -> Panel:
    """Who gains by whom: the improvement of each target (column) by each source (row) in percent, as a heat map."""
    return matrix_panel("Gain beside another task (%)", tasks, improvement)


def matrix_panel(title: str, tasks: Sequence[str], values: Matrix) -> Panel:
    """Values ``[T, T]``, source by target, as a heat map; what is NaN stays white."""
    left = 0.2 + 0.085 * max(len(_short(name)) for name in tasks)
    most = float(np.nanmax(np.abs(values), initial=0.0))
    # Two digits of the largest that is below one.
    places = 1 if most >= 1 or most == 0 else min(6, 1 - math.floor(math.log10(most)))
    pairs = [
        f"{source} to {target} {_signed(values[s, t], places)}"
        for (s, source), (t, target) in itertools.permutations(enumerate(tasks), 2)
        if math.isfinite(values[s, t])
    ]
    draw = partial(_heat_map, names=[_short(name) for name in tasks], values=values, places=places)
    return Panel(title, draw, "; ".join(pairs), left, 0.15)


def _heat_map(ax: Axes, names: Sequence[str], values: Matrix, places: int) -> None:
    most = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    ax.imshow(np.ma.masked_invalid(values), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    _name_matrix(ax, names)
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            # Ink where the map is pale, white where it is deep.
            colour = "white" if abs(value) > 0.6 * most else LIGHT.ink
            ax.text(column, row, _signed(value, places), ha="center", va="center", color=colour, fontsize=9)


def _name_matrix(ax: Axes, names: Sequence[str]) -> None:
    """Sources from the top down and targets from the left, in cells of one unit around 0, 1, ..."""
    ax.grid(False)
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.set_ylim(len(names) - 0.5, -0.5)
    places = range(len(names))
    ax.set_xticks(places, names)
    ax.set_yticks(places, names)
    ax.set_xlabel("target", color=LIGHT.muted, fontsize=9)
    ax.set_ylabel("source", color=LIGHT.muted, fontsize=9)


def transfer_panels(comparison: Comparison, weights: Mapping[str, Mapping[str, Curve]]) -> list[Panel]:
    """The coefficients of tasks and transfers over training as a matrix of small curves, a panel for each row.

    In the cell of source and target is the weight that the source's loss has on the target's branch, in that of a task
    with itself the weight of its own; all cells have one scale, from zero or the least to the largest.
    """
    tasks = [task.name for task in comparison.tasks]
    panels = []
    for row in comparison.rows:
        curves = weights.get(row.name, {})
        cells = {
            (s, t): curves[name]
            for s, source in enumerate(tasks)
            for t, target in enumerate(tasks)
            if (name := source if s == t else f"{source}{ARROW}{target}") in curves
        }
        if any(s != t for s, t in cells):
            names = {f"{tasks[s]} to {tasks[t]}" if s != t else tasks[s]: curve for (s, t), curve in cells.items()}
            left = 0.2 + 0.085 * max(len(_short(name)) for name in tasks)
            draw = partial(_matrix_of_curves, names=[_short(name) for name in tasks], cells=cells)
            panels.append(Panel(row.name, draw, _ends_in_words("coefficients at the end", names), left, 0.15))
    return panels


def _matrix_of_curves(ax: Axes, names: Sequence[str], cells: Mapping[tuple[int, int], Curve]) -> None:
    _name_matrix(ax, names)
    low = min(0.0, *(float(np.nanmin(curve.low)) for curve in cells.values()))
    high = max(float(np.nanmax(curve.high)) for curve in cells.values())
    last = max(float(curve.x[-1]) for curve in cells.values())
    reach = (high - low) or 1.0
    for edge in np.arange(-0.5, len(names)):
        ax.axhline(edge, color=LIGHT.grid, linewidth=0.7)
        ax.axvline(edge, color=LIGHT.grid, linewidth=0.7)
    for (s, t), curve in cells.items():
        look = LIGHT.line(s)
        x = t - 0.42 + 0.84 * curve.x / last
        # Below the number.
        heights = [s + 0.42 - 0.6 * (y - low) / reach for y in (curve.low, curve.high, curve.mean)]
        ax.plot([t - 0.42, t + 0.42], [s + 0.42 + 0.6 * low / reach] * 2, color=LIGHT.grid, linewidth=0.7)
        ax.fill_between(x, heights[0], heights[1], color=look["color"], alpha=0.16, linewidth=0)
        ax.plot(x, heights[2], linewidth=1.4, **look)
        end = curve.mean[np.isfinite(curve.mean)][-1]
        ax.text(t + 0.42, s - 0.3, f"{end:.2f}".replace("-", "−"), ha="right", color=LIGHT.ink, fontsize=8)


def sharing_panels(comparison: Comparison, label: Callable[[TaskRecord], str]) -> list[Panel]:
    """A task's headline metric over the number of stages that are shared, a line for each method; a panel per task.

    None unless some method was run with several cuts.
    """
    by_method: dict[str, dict[int, RowRecord]] = {}
    for row in comparison.rows:
        cut = row.network.get("cut")
        if isinstance(cut, int):
            by_method.setdefault(row.method_name, {}).setdefault(cut, row)
    if max(map(len, by_method.values()), default=0) < 2:
        return []
    places = {name: index for index, name in enumerate(by_method)}
    panels = []
    for task in comparison.tasks:
        curves: dict[str, Curve] = {}
        for name, rows in by_method.items():
            found = [(cut, rows[cut].mean[task.name], rows[cut].std[task.name]) for cut in sorted(rows)]
            mean = np.array([_or_nan(means[task.headline]) for _, means, _ in found]) if task.headline else np.array([])
            if np.isfinite(mean).any():
                spread = np.array([stds.get(task.headline or "") or 0.0 for _, _, stds in found])
                curves[name] = Curve(np.array([float(cut) for cut, _, _ in found]), mean, mean - spread, mean + spread)
        if curves:
            draw = partial(_lines, curves=curves, places=places, x="stages that are shared", y=label(task))
            panels.append(Panel(task.name, draw, _ends_in_words("with the most stages shared", curves)))
    return panels


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def svg(panel: Panel, name: str) -> str:
    """A panel alone, as an SVG element to stand inside a page.

    It needs no font, has no ground, and takes its colours from the page's CSS variables (`Style.variables`), so that
    they follow the page's light or dark. `name` sets its ids apart from those of other panels.
    """
    figure = Figure(figsize=PANEL)
    _place(figure, panel, 0, 0, top=0.04)
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": "sidetask", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    drawing = out.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<!--.*?-->\s*", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", drawing))
    drawing = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", drawing)
    for variable, colour in LIGHT.variables().items():
        drawing = drawing.replace(colour.lower(), f"var(--{variable})")
    return drawing


def png(panels: Sequence[Panel], path: Path, *, title: str = "", columns: int = 3) -> Path:
    """All panels in a grid on white; ``PANEL`` inches each at ``DPI`` dots per inch."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    # At this size, some eleven letters to the inch.
    lines = textwrap.wrap(title.replace("$", r"\$"), round(11 * PANEL[0] * columns))
    head = 0.1 + 0.25 * len(lines) if lines else 0.0
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + head), dpi=DPI, facecolor="white")
    if title:
        y = 1 - 0.5 * head / (PANEL[1] * rows + head)
        figure.text(0.15 / (PANEL[0] * columns), y, "\n".join(lines), color=LIGHT.ink, fontsize=12, va="center")
    for index, panel in enumerate(panels):
        ax = _place(figure, panel, index % columns, rows - 1 - index // columns, top=0.12)
        ax.set_title(panel.title.replace("$", r"\$"), loc="left", color=LIGHT.ink, fontsize=11, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _place(figure: Figure, panel: Panel, column: int, row: int, top: float) -> Axes:
    """Draw a panel into its cell, counted from the lower left, with room for what stands around the axes."""
    width, height = figure.get_size_inches()
    left, right, bottom = panel.left, panel.right, 0.5
    ax = figure.add_axes(
        (
            (PANEL[0] * column + left) / width,
            (PANEL[1] * row + bottom) / height,
            (PANEL[0] - left - right) / width,
            (PANEL[1] * (1 - top) - bottom) / height,
        )
    )
    ax.patch.set_alpha(0)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LIGHT.grid)
    ax.tick_params(colors=LIGHT.muted, labelsize=9, length=0)
    ax.grid(color=LIGHT.grid, linewidth=0.7)
    ax.set_axisbelow(True)
    panel.draw(ax)
    return ax


def _lines(
    ax: Axes,
    curves: Mapping[str, Curve],
    places: Mapping[str, int],
    x: str,
    y: str,
    rule: float | None = None,
) -> None:
    ax.set_xlabel(x, color=LIGHT.muted, fontsize=9)
    ax.set_ylabel(y, color=LIGHT.muted, fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    lowest = min(float(np.nanmin(curve.low)) for curve in curves.values())
    highest = max(float(np.nanmax(curve.high)) for curve in curves.values())
    means = np.concatenate([curve.mean[np.isfinite(curve.mean)] for curve in curves.values()])
    if means.min() > 0 and means.max() > 50 * means.min():
        ax.set_yscale("log")
    elif rule is not None and highest - lowest < 0.1:  # do not blow rounding errors up to a drama
        ax.set_ylim(min(lowest, rule) - 0.1, max(highest, rule) + 0.1)
    if rule is not None and lowest <= rule <= highest:
        ax.axhline(rule, color=LIGHT.muted, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    ends = []
    for name, curve in curves.items():
        look = LIGHT.line(places[name])
        if np.any(curve.high > curve.low):
            ax.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.16, linewidth=0)
        marker = "o" if len(curve.x) == 1 else None
        ax.plot(curve.x, curve.mean, linewidth=1.7, marker=marker, markersize=4, **look)
        finite = np.flatnonzero(np.isfinite(curve.mean))
        ends.append((name, float(curve.x[finite[-1]]), float(curve.mean[finite[-1]]), look["color"]))
    _name_ends(ax, ends)


def _name_ends(ax: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each line's name beside its end, moved apart where ends are close."""
    # Positions are fractions of the axes' height; a line of text takes this much of it.
    gap = 0.068
    ax.autoscale_view()  # or transData would still be that of empty axes
    to_axes = ax.transData + ax.transAxes.inverted()
    places = sorted((float(to_axes.transform((x, y))[1]), name, (x, y), colour) for name, x, y, colour in ends)
    heights = _spread([place[0] for place in places], gap)
    for height, (_, name, point, colour) in zip(heights, places, strict=True):
        ax.annotate(
            _short(name),
            xy=point,
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending positions at least `gap` apart, near the given ones and, as far as they fit, within 0 and 1.

    >>> [round(place, 2) for place in _spread([0.2, 0.5, 0.5], 0.1)]
    [0.2, 0.45, 0.55]
    >>> [round(place, 2) for place in _spread([0.97, 0.98], 0.1)]
    [0.9, 1.0]
    """
    groups: list[tuple[float, int]] = []  # lines that touch: their centre, and how many
    for place in places:
        groups.append((place, 1))
        while True:
            centre, count = groups.pop()
            half = gap * (count - 1) / 2
            centre = min(max(centre, half), max(1 - half, half))
            if not groups or centre - groups[-1][0] >= gap * (count + groups[-1][1]) / 2:
                groups.append((centre, count))
                break
            below, fewer = groups.pop()
            groups.append(((below * fewer + centre * count) / (fewer + count), fewer + count))
    return [centre + gap * (index - (count - 1) / 2) for centre, count in groups for index in range(count)]


def _bar(found: Mapping[str, Any] | None, seeds: Sequence[float] = ()) -> Bar | None:
    return None if not found or found["mean"] is None else Bar(found["mean"], found["std"], seeds)


def _bars(ax: Axes, names: Sequence[str], bars: Sequence[Bar | None], label: str) -> None:
    ax.set_xlabel(label, color=LIGHT.muted, fontsize=9)
    ax.grid(visible=False, axis="y")
    ax.axvline(0, color=LIGHT.muted, linewidth=1)
    reach = max((abs(bar.mean) + (bar.std or 0) for bar in bars if bar), default=0.0) or 1.0
    for index, bar in enumerate(bars):
        if bar is None:
            continue
        ax.barh(index, bar.mean, height=0.62, color=LIGHT.line(index)["color"], alpha=0.85, linewidth=0)
        if bar.std is not None:
            ax.errorbar(bar.mean, index, xerr=bar.std, color=LIGHT.ink, linewidth=1.2, capsize=3)
        ax.plot(bar.seeds, [index] * len(bar.seeds), "o", color=LIGHT.ink, markersize=2.6, alpha=0.75)
        ax.annotate(
            _signed(bar.mean),
            (max([bar.mean + (bar.std or 0), *bar.seeds]) + 0.03 * reach, index)
            if bar.mean >= 0
            else (min([bar.mean - (bar.std or 0), *bar.seeds]) - 0.03 * reach, index),
            color=LIGHT.ink,
            fontsize=9,
            va="center",
            ha="left" if bar.mean >= 0 else "right",
        )
    ax.set_yticks(range(len(names)), [_short(name) for name in names], color=LIGHT.ink)
    ax.set_ylim(len(names) - 0.5, -0.5)
    widest = max((len(_signed(bar.mean)) for bar in bars if bar), default=0)
    ax.use_sticky_edges = False  # or there is no margin at 0, where the baseline's number stands
    ax.margins(x=max(0.18, 0.06 * widest))


def _signed(value: float, places: int = 1) -> str:
    shown = f"{value:+.{0 if abs(value) >= 1000 else places}f}"
    return f"{0:.{places}f}" if float(shown) == 0 else shown.replace("-", "−")


def _in_words(names: Sequence[str], bars: Sequence[Bar | None]) -> str:
    return "; ".join(f"{name} {_signed(bar.mean)} %" for name, bar in zip(names, bars, strict=True) if bar)


def _ends_in_words(what: str, curves: Mapping[str, Curve]) -> str:
    parts = [f"{name} {curve.mean[np.isfinite(curve.mean)][-1]:.3g}" for name, curve in curves.items()]
    return f"{what}: {'; '.join(parts)}"


def _short(name: str, limit: int = 16) -> str:
    """A name that fits beside a panel; a dollar sign would begin mathematics."""
    return (name if len(name) <= limit else name[: limit - 1] + "…").replace("$", r"\$")
