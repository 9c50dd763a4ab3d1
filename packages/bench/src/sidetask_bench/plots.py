"""Which charts a comparison has: bars of improvement, one task against another, weights and curves over training."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sidetask_bench import shapes
from sidetask_bench.drawing import LIGHT, Mark, Panel, of_row, room, short, signed
from sidetask_bench.records import ByClass, Comparison, Curve, Entry, Groupings, RowRecord, TaskRecord
from sidetask_bench.shapes import SOURCE_TARGET, Bar, End, Matrix

# Between source and target in the name of a transfer, a task that a method has added.
ARROW = "→"
# More curves than this cannot be told apart in one chart.
_PAIRS = 10


def improvement_panels(comparison: Comparison) -> list[Panel]:
    """The overall improvement of every row, then that of each task, against the baseline."""
    rows = comparison.rows
    label = f"improvement on {short(comparison.baseline)} (%)"
    overall = [_bar(row.improvement, row.values if len(row.runs) > 1 else []) for row in rows]
    left = room(row.name for row in rows)
    draw = partial(shapes.bars, names=[row.name for row in rows], label=label, rows=True)
    title = "All primary tasks" + ("" if comparison.higher_is_better else " (lower is better)")
    panels = [Panel(title, partial(draw, values=overall), _in_words([row.name for row in rows], overall), left, 0.15)]
    for task in comparison.tasks:
        bars = [_bar(row.improvement.get("by_task", {}).get(task.name)) for row in rows]
        if any(bars):
            panels.append(
                Panel(task.name, partial(draw, values=bars), _in_words([row.name for row in rows], bars), left, 0.15)
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
    for index, row in enumerate(comparison.rows):
        # Transfers have a matrix of their own.
        if own := {name: curve for name, curve in values.get(row.name, {}).items() if ARROW not in name}:
            pooled = max(curve.pooled for curve in own.values())
            x = "step" if pooled == 1 else f"step (means of {pooled}; band: least to most)"
            draw = partial(shapes.lines, curves=own, places=places, x=x, y=y, rule=rule)
            panels.append(Panel(row.name, draw, _ends_in_words(f"{y} at the end", own), right=room(own), row=index))
    return panels


def cosine_panels(comparison: Comparison, cosines: Mapping[str, Mapping[str, Curve]]) -> list[Panel]:
    """How the tasks' gradients lie to one another, a panel per row: over the steps, or on average of many tasks."""
    if max((len(of_pairs) for of_pairs in cosines.values()), default=0) <= _PAIRS:
        return step_panels(comparison, cosines, "cosine of gradients", rule=0.0)
    panels = []
    for index, row in enumerate(comparison.rows):
        means = {tuple(pair.split(", ")): np.nanmean(curve.mean) for pair, curve in cosines.get(row.name, {}).items()}
        if means:
            names = list(dict.fromkeys(itertools.chain.from_iterable(means)))
            table = np.array([[means.get((a, b), means.get((b, a), math.nan)) for b in names] for a in names])
            panels.append(matrix_panel(row.name, names, table, ("", ""), index))
    return panels


def condition_panels(comparison: Comparison, condition: Mapping[str, Mapping[str, Curve]]) -> list[Panel]:
    """The condition number of the gradients' Gramian over the steps, a line per row."""
    places = {row.name: index for index, row in enumerate(comparison.rows)}
    curves = {row: of_row["gramian"] for row, of_row in condition.items() if "gramian" in of_row}
    if not curves:
        return []
    draw = partial(shapes.lines, curves=curves, places=places, x="step", y="condition number", rows=True)
    return [Panel("All rows", draw, _ends_in_words("at the end", curves), right=room(curves))]


def shaper_panels(weights: Mapping[str, Mapping[str, Mapping[str, Curve]]]) -> list[Panel]:
    """The weights that shapers name, of classes for instance, over the epochs: one panel for every row and task."""
    panels = []
    for index, (row, tasks) in enumerate(weights.items()):
        for task, curves in tasks.items():
            places = {name: index for index, name in enumerate(curves)}
            draw = partial(shapes.lines, curves=curves, places=places, x="epoch", y="weight", rule=1.0)
            title = row if len(tasks) == 1 else f"{row}, {task}"
            panels.append(
                Panel(title, draw, _ends_in_words("weights at the end", curves), right=room(curves), row=index)
            )
    return panels


def class_panels(comparison: Comparison, found: ByClass) -> list[Panel]:
    """How much better each row is than the baseline on the points of each class: bars in percent, a panel for each."""
    metric = next(task for task in comparison.tasks if task.name == found.task)
    sign = 1.0 if metric.headline is None or metric.metrics[metric.headline] else -1.0
    baseline = found.values[comparison.baseline].mean(axis=0)
    panels = []
    for index, row in enumerate(comparison.rows):
        if row.name == comparison.baseline:
            continue
        change = 100 * sign * (found.values[row.name] - baseline) / np.abs(baseline)
        means, several = change.mean(axis=0), len(change) > 1
        stds = change.std(axis=0, ddof=1) if several else np.zeros_like(means)
        bars = [
            Bar(float(mean), float(std) if several else None) if np.isfinite(mean) else None
            for mean, std in zip(means, stds, strict=True)
        ]
        label = f"improvement on {short(comparison.baseline)} (%)"
        draw = partial(shapes.bars, names=found.classes, values=bars, label=label)
        left = room(found.classes)
        panels.append(Panel(row.name, draw, _in_words(found.classes, bars), left, 0.15, row=index))
    return panels


def curve_panels(
    comparison: Comparison, curves: Mapping[str, Mapping[str, Curve]], label: Callable[[TaskRecord], str]
) -> list[Panel]:
    """A curve per row over the epochs, one panel per task; `label` names the vertical axis."""
    places = {row.name: index for index, row in enumerate(comparison.rows)}
    panels = []
    for task in comparison.tasks:
        if of_task := curves.get(task.name):
            draw = partial(shapes.lines, curves=of_task, places=places, x="epoch", y=label(task), rows=True)
            panels.append(Panel(task.name, draw, _ends_in_words("at the end", of_task), right=room(of_task)))
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
            right = room([*points, *comparison.fronts])
            panels.append(Panel(f"{one.name} and {other.name}", draw, "; ".join(words), right=right))
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
) -> list[Mark]:
    ax.set_xlabel(f"{short(tasks[0].name)}: {label(tasks[0])}", color=LIGHT.muted, fontsize=9)
    ax.set_ylabel(f"{short(tasks[1].name)}: {label(tasks[1])}", color=LIGHT.muted, fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    places = {row.name: index for index, row in enumerate(comparison.rows)}
    fronts = {name: [row for row in rows if row in points] for name, rows in comparison.fronts.items()}
    alone = [name for name in points if not any(name in rows for rows in fronts.values())]
    for task, axis in zip(tasks, (ax.xaxis, ax.yaxis), strict=True):
        axis.set_inverted(task.headline is not None and not task.metrics[task.headline])
    ends, marks = [], []
    for name, rows in {**{name: [name] for name in alone}, **fronts}.items():
        if not rows:
            continue
        look = LIGHT.point(places[rows[0]])
        means = np.array([[x.mean() for x in points[row]] for row in rows])
        if len(rows) > 1:
            ax.plot(*means.T, color=look["color"], linewidth=1.2)
        for row, (x, y) in zip(rows, means, strict=True):
            drawn: list[Any] = ax.plot(x, y, markersize=5.5, linewidth=0, **look)
            said = [f"{x:.4g}", f"{y:.4g}"]
            if len(points[row][0]) > 1:
                spread = [values.std(ddof=1) for values in points[row]]
                said = [f"{mean} ± {std:.2g}" for mean, std in zip(said, spread, strict=True)]
                cross = ax.errorbar(x, y, yerr=spread[1], xerr=spread[0], color=look["color"], linewidth=0.8, alpha=0.5)
                drawn += cross.get_children()
            for artist in drawn:
                of_row(artist, places[row])
            words = "; ".join(f"{task.name} {value}" for task, value in zip(tasks, said, strict=True))
            marks.append(Mark(float(x), float(y), f"{row}: {words}", places[row]))
        # Rows of a front by what sets them apart, a number often.
        alike = len(os.path.commonprefix(rows)) if len(rows) > 1 else None  # noqa: RUF071 (letters are wanted)
        for row, point in zip(rows if alike is not None else [], means, strict=False):
            named = ax.annotate(
                short(row[alike:]),
                point,
                (4, 4),
                textcoords="offset points",
                color=look["color"],
                fontsize=8,
                weight="bold",
            )
            of_row(named, places[row])
        # A front is named at the end that is nearer to the names.
        end = max(means, key=lambda point: -point[0] if ax.xaxis.get_inverted() else point[0])
        row_of_name = places[name] if name in alone else None
        ends.append(End(name, float(end[0]), float(end[1]), look["color"], row_of_name))
    shapes.name_ends(ax, ends)
    return marks


def grouping_panels(found: Groupings) -> list[Panel]:
    """What a task gains in every combination of tasks and by every method: bars in percent, a panel for each task."""
    panels = []
    for task in found.tasks:
        entries = [entry for entry in found.entries if task in entry.improvement]
        names = [_beside(entry, task, found.best.get(task)) for entry in entries]
        bars = [_bar(entry.improvement[task]) for entry in entries]
        draw = partial(shapes.bars, names=names, values=bars, label="improvement on the task alone (%)")
        left = room(names)
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


def matrix_panel(
    title: str, tasks: Sequence[str], values: Matrix, sides: tuple[str, str] = SOURCE_TARGET, row: int | None = None
) -> Panel:
    """Values ``[T, T]``, source by target or whatever the `sides` are, as a heat map; what is NaN stays white."""
    left = _beside_matrix(tasks)
    most = float(np.nanmax(np.abs(values), initial=0.0))
    # Two digits of the largest that is below one.
    places = 1 if most >= 1 or most == 0 else min(6, 1 - math.floor(math.log10(most)))
    pairs = [
        f"{source} to {target} {signed(values[s, t], places)}"
        for (s, source), (t, target) in itertools.permutations(enumerate(tasks), 2)
        if math.isfinite(values[s, t])
    ]
    draw = partial(shapes.heat_map, names=tasks, values=values, places=places, sides=sides)
    return Panel(title, draw, "; ".join(pairs), left, 0.15, row=row)


def _beside_matrix(tasks: Sequence[str]) -> float:
    """Inches for the names of a matrix's rows, their numbers, and what the side says."""
    return room(tasks) + 0.4


def transfer_panels(comparison: Comparison, weights: Mapping[str, Mapping[str, Curve]]) -> list[Panel]:
    """The coefficients of tasks and transfers over training as a matrix of small curves, a panel for each row.

    In the cell of source and target is the weight that the source's loss has on the target's branch, in that of a task
    with itself the weight of its own; all cells have one scale, from zero or the least to the largest.
    """
    tasks = [task.name for task in comparison.tasks]
    panels = []
    for index, row in enumerate(comparison.rows):
        curves = weights.get(row.name, {})
        cells = {
            (s, t): curves[name]
            for s, source in enumerate(tasks)
            for t, target in enumerate(tasks)
            if (name := source if s == t else f"{source}{ARROW}{target}") in curves
        }
        if any(s != t for s, t in cells):
            names = {f"{tasks[s]} to {tasks[t]}" if s != t else tasks[s]: curve for (s, t), curve in cells.items()}
            left = _beside_matrix(tasks)
            draw = partial(shapes.matrix_of_curves, names=tasks, cells=cells)
            panels.append(
                Panel(row.name, draw, _ends_in_words("coefficients at the end", names), left, 0.15, row=index)
            )
    return panels


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
            draw = partial(shapes.lines, curves=curves, places=places, x="stages that are shared", y=label(task))
            panels.append(
                Panel(task.name, draw, _ends_in_words("with the most stages shared", curves), right=room(curves))
            )
    return panels


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _bar(found: Mapping[str, Any] | None, seeds: Sequence[float] = ()) -> Bar | None:
    return None if not found or found["mean"] is None else Bar(found["mean"], found["std"], seeds)


def _in_words(names: Sequence[str], bars: Sequence[Bar | None]) -> str:
    return "; ".join(f"{name} {signed(bar.mean)} %" for name, bar in zip(names, bars, strict=True) if bar)


def _ends_in_words(what: str, curves: Mapping[str, Curve]) -> str:
    parts = [f"{name} {curve.mean[np.isfinite(curve.mean)][-1]:.3g}" for name, curve in curves.items()]
    return f"{what}: {'; '.join(parts)}"
