"""The few kinds of drawing that charts are made of: lines, bars, matrices of numbers and of small curves.

Each draws into axes in the colours of LIGHT, and gives the values that a reader can point at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sidetask_bench.drawing import LIGHT, SMALL, Mark, of_row, room, short, signed
from sidetask_bench.records import Curve

Matrix = npt.NDArray[np.float64]

SOURCE_TARGET = ("source", "target")


@dataclass(frozen=True)
class Bar:
    """A mean, its standard deviation over the seeds if there are several, and the seeds' own values."""

    mean: float
    std: float | None
    seeds: Sequence[float] = ()


@dataclass(frozen=True)
class End:
    """Where a line ends, and how its name is written there."""

    name: str
    x: float
    y: float
    colour: str
    row: int | None = None


def lines(
    ax: Axes,
    curves: Mapping[str, Curve],
    places: Mapping[str, int],
    x: str,
    y: str,
    rule: float | None = None,
    rows: bool = False,
) -> list[Mark]:
    """Lines with bands and names at their ends; `places` says which colour and, if they are `rows`, which row each has.

    `rule` is drawn across.
    """
    ax.set_xlabel(x, color=LIGHT.muted, fontsize=SMALL)
    ax.set_ylabel(y, color=LIGHT.muted, fontsize=SMALL)
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
    ends, marks = [], []
    what = x.partition(" (")[0]
    for name, curve in curves.items():
        look, row = LIGHT.line(places[name]), places[name] if rows else None
        if np.any(curve.high > curve.low):
            band = ax.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.16, linewidth=0)
            of_row(band, row)
        marker = "o" if len(curve.x) == 1 else None
        (line,) = ax.plot(curve.x, curve.mean, linewidth=1.7, marker=marker, markersize=4, **look)
        of_row(line, row)
        marks += curve_marks(curve, f"{name}, {what}", row)
        finite = np.flatnonzero(np.isfinite(curve.mean))
        ends.append(End(name, float(curve.x[finite[-1]]), float(curve.mean[finite[-1]]), look["color"], row))
    name_ends(ax, ends)
    return marks


def curve_marks(curve: Curve, what: str, row: int | None = None) -> list[Mark]:
    """A mark at each point of a curve: what it is of, the value, and from where to where its band goes."""
    marks = []
    for x, mean, low, high in zip(curve.x, curve.mean, curve.low, curve.high, strict=True):
        if math.isfinite(mean):
            band = f" ({_four(low)} to {_four(high)})" if high > low else ""
            marks.append(Mark(float(x), float(mean), f"{what} {x:g}: {_four(mean)}{band}", row))
    return marks


def name_ends(ax: Axes, ends: Sequence[End]) -> None:
    """Write each line's name beside its end, moved apart where ends are close."""
    # Positions are fractions of the axes' height; a line of text takes this much of it.
    gap = 0.068
    ax.autoscale_view()  # or transData would still be that of empty axes
    to_axes = ax.transData + ax.transAxes.inverted()
    places = sorted((float(to_axes.transform((end.x, end.y))[1]), end.name, i) for i, end in enumerate(ends))
    heights = _spread([place[0] for place in places], gap)
    for height, (*_, i) in zip(heights, places, strict=True):
        end = ends[i]
        text = ax.annotate(
            short(end.name),
            xy=(end.x, end.y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=end.colour,
            fontsize=SMALL,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )
        of_row(text, end.row)
        if text.arrow_patch is not None:
            of_row(text.arrow_patch, end.row)


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


def bars(ax: Axes, names: Sequence[str], values: Sequence[Bar | None], label: str, rows: bool = False) -> list[Mark]:
    """A horizontal bar for each name, from the top down, with its number; the names may be of the `rows` in order."""
    ax.set_xlabel(label, color=LIGHT.muted, fontsize=SMALL)
    ax.grid(visible=False, axis="y")
    ax.axvline(0, color=LIGHT.muted, linewidth=1)
    marks: list[Mark] = []
    reach = max((abs(bar.mean) + (bar.std or 0) for bar in values if bar), default=0.0) or 1.0
    for index, bar in enumerate(values):
        if bar is None:
            continue
        drawn: list[Artist] = [
            *ax.barh(index, bar.mean, height=0.62, color=LIGHT.line(index)["color"], alpha=0.85, linewidth=0)
        ]
        if bar.std is not None:
            whisker = ax.errorbar(bar.mean, index, xerr=bar.std, color=LIGHT.ink, linewidth=1.2, capsize=3)
            drawn += [artist for artist in whisker.get_children() if isinstance(artist, Artist)]
        drawn += ax.plot(bar.seeds, [index] * len(bar.seeds), "o", color=LIGHT.ink, markersize=2.6, alpha=0.75)
        number = ax.annotate(
            signed(bar.mean),
            (max([bar.mean + (bar.std or 0), *bar.seeds]) + 0.03 * reach, index)
            if bar.mean >= 0
            else (min([bar.mean - (bar.std or 0), *bar.seeds]) - 0.03 * reach, index),
            color=LIGHT.ink,
            fontsize=SMALL,
            va="center",
            ha="left" if bar.mean >= 0 else "right",
        )
        for artist in (*drawn, number):
            of_row(artist, index if rows else None)
        marks += _bar_marks(names[index], bar, index, index if rows else None)
    ax.set_yticks(range(len(names)), [short(name) for name in names], color=LIGHT.ink)
    for index, text in enumerate(ax.get_yticklabels()):
        of_row(text, index if rows else None)
    ax.set_ylim(len(names) - 0.5, -0.5)
    widest = max((len(signed(bar.mean)) for bar in values if bar), default=0)
    ax.use_sticky_edges = False  # or there is no margin at 0, where the baseline's number stands
    ax.margins(x=max(0.18, 0.06 * widest))
    return marks


def _bar_marks(name: str, bar: Bar, index: int, row: int | None) -> list[Mark]:
    spread = "" if bar.std is None else f" ± {bar.std:.2f}"
    seeds = "; seeds " + ", ".join(signed(value, 2) for value in bar.seeds) if bar.seeds else ""
    words = f"{name}: {signed(bar.mean, 2)}{spread} %{seeds}"
    # Along the bar, so that any part of it can be pointed at.
    return [Mark(bar.mean * part, index, words, row) for part in (0.0, 0.25, 0.5, 0.75, 1.0)]


def heat_map(
    ax: Axes, names: Sequence[str], values: Matrix, places: int, sides: tuple[str, str] = SOURCE_TARGET
) -> list[Mark]:
    """Values ``[T, T]``, red below zero and blue above, with their numbers; what is NaN stays white."""
    most = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    ax.imshow(np.ma.masked_invalid(values), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    name_matrix(ax, names, sides)
    numbers = {at: signed(value, places) for at, value in np.ndenumerate(values) if math.isfinite(value)}
    size = _fitting(ax, len(names), numbers.values())
    for (row, column), number in numbers.items():
        # Ink where the map is pale, white where it is deep.
        colour = "white" if abs(values[row, column]) > 0.6 * most else LIGHT.ink
        ax.text(column, row, number, ha="center", va="center", color=colour, fontsize=size)
    return [
        Mark(column, row, f"{names[row]} to {names[column]}: {signed(value, places + 1)}")
        for (row, column), value in np.ndenumerate(values)
        if math.isfinite(value)
    ]


def matrix_of_curves(ax: Axes, names: Sequence[str], cells: Mapping[tuple[int, int], Curve]) -> list[Mark]:
    """A small curve in each cell of source and target, all on one scale, with its last value."""
    marks: list[Mark] = []
    name_matrix(ax, names)
    low = min(0.0, *(float(np.nanmin(curve.low)) for curve in cells.values()))
    high = max(float(np.nanmax(curve.high)) for curve in cells.values())
    last = max(float(curve.x[-1]) for curve in cells.values())
    reach = (high - low) or 1.0
    ended = {at: curve.mean[np.isfinite(curve.mean)][-1] for at, curve in cells.items()}
    numbers = {at: f"{value:.2f}".replace("-", "−") for at, value in ended.items()}
    size = _fitting(ax, len(names), numbers.values())
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
        ax.text(t + 0.42, s - 0.3, numbers[s, t], ha="right", va="center", color=LIGHT.ink, fontsize=size)
        said = curve_marks(curve, f"{names[s]} to {names[t]}, step" if s != t else f"{names[s]}, step")
        known = np.isfinite(curve.mean)
        marks += [
            Mark(float(at), float(height), mark.words)
            for at, height, mark in zip(x[known], heights[2][known], said, strict=True)
        ]
    return marks


def name_matrix(ax: Axes, names: Sequence[str], sides: tuple[str, str] = SOURCE_TARGET) -> None:
    """What the `sides` say from the top down and from the left, in cells of one unit around 0, 1, ...

    Where names do not fit above one another's columns, they are numbered.
    """
    ax.grid(False)
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.set_ylim(len(names) - 0.5, -0.5)
    places = range(len(names))
    if room(names) <= _inches(ax) / len(names):
        ax.set_xticks(places, [short(name) for name in names])
        ax.set_yticks(places, [short(name) for name in names])
    else:
        ax.set_xticks(places, [str(place + 1) for place in places])
        ax.set_yticks(places, [f"{short(name)} {place + 1}" for place, name in enumerate(names)])
    ax.set_xlabel(sides[1], color=LIGHT.muted, fontsize=SMALL)
    ax.set_ylabel(sides[0], color=LIGHT.muted, fontsize=SMALL)


def _inches(ax: Axes) -> float:
    """How wide axes are."""
    return float(ax.bbox.width / ax.figure.dpi)


def _fitting(ax: Axes, columns: int, numbers: Iterable[str]) -> float:
    """The size at which numbers fit into so many columns, at most `SMALL`; a digit is two thirds as wide as high."""
    most = max(map(len, numbers), default=1)
    return min(SMALL, 0.95 * 72 * _inches(ax) / columns / (0.66 * most))


def _four(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")
