"""Puts charts on pages: colours, and panels as SVG or PNG.

A panel is a function of a set of axes in LIGHT's colours. A report shows panels one by one, so that they can flow on a
narrow screen; a picture file shows all of them together. Figures are made without pyplot: nothing global is read or
changed.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from sidetask_bench import storage

PANEL = (4.4, 3.1)
DPI = 150
SMALL = 9  # points, of names and numbers
_POINTS_PER_INCH = 72

# Okabe and Ito's colours, told apart under the common colour vision deficiencies; yellow is too faint for lines, and
# black would vanish on a dark page. Past the last colour they begin again with another dash.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46")
_COLOURS_ON_DARK = ("#4DA3DB", "#F0803C", "#2CC295", "#DE96BC", "#F0B43C", "#8CCFF2", "#C2A27A")
_MARKERS = ("o", "s", "D", "^")
# How an artist says in matplotlib's output which row it is of.
_ROW = "row-"
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

    def point(self, index: int) -> dict[str, Any]:
        """Colour and shape of the `index`-th row where it is a point."""
        marker = _MARKERS[index // len(self.colours) % len(_MARKERS)]
        return {"color": self.colours[index % len(self.colours)], "marker": marker}

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
class Mark:
    """A value that a reader can point at: where it is in the axes' data, what it says, and the row that it is of."""

    x: float
    y: float
    words: str
    row: int | None = None


@dataclass(frozen=True)
class Panel:
    """One small chart: its title, how to draw it, and in words what it shows (for those who cannot see it).

    `draw` gives the values that can be pointed at. `left` and `right` are the inches beside the axes that names and
    numbers need. `row` is the index of the comparison's row that all of it is about.
    """

    title: str
    draw: Callable[[Axes], list[Mark]]
    words: str
    left: float = 0.8
    right: float = 0.15
    row: int | None = None


@dataclass(frozen=True)
class Drawing:
    """A panel as an SVG element, and its marks as ``[x, y, words, row or None]`` in the element's coordinates."""

    svg: str
    marks: list[tuple[float, float, str, int | None]]


def svg(panel: Panel, name: str) -> Drawing:
    """A panel alone, as an SVG element to stand inside a page.

    It needs no font, has no ground, and takes its colours from the page's CSS variables (`Style.variables`), so that
    they follow the page's light or dark. What belongs to a row has the attribute ``data-row``. `name` sets its ids
    apart from those of other panels.
    """
    figure = Figure(figsize=PANEL, dpi=_POINTS_PER_INCH)
    ax, marks = place(figure, panel, 0, 0, top=0.04)
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": "sidetask", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    drawing = out.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<!--.*?-->\s*", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", drawing))
    drawing = re.sub(rf'id="{_ROW}(\d+)"', r'data-row="\1"', drawing)
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawing)
    for variable, colour in LIGHT.variables().items():
        drawing = drawing.replace(colour.lower(), f"var(--{variable})")
    # Known once the axes are drawn. SVG counts from the top.
    height = PANEL[1] * _POINTS_PER_INCH
    at = [ax.transData.transform((mark.x, mark.y)) for mark in marks]
    return Drawing(
        drawing,
        [
            (round(float(x), 1), round(height - float(y), 1), mark.words, mark.row)
            for (x, y), mark in zip(at, marks, strict=True)
        ],
    )


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
        ax, _ = place(figure, panel, index % columns, rows - 1 - index // columns, top=0.12)
        ax.set_title(panel.title.replace("$", r"\$"), loc="left", color=LIGHT.ink, fontsize=11, fontweight="bold")
    return save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, with nothing in it that changes from time to time."""
    storage.write_atomically(
        path, lambda file: figure.savefig(file, format="png", metadata={"Software": None}), durable=False
    )
    return path


def place(figure: Figure, panel: Panel, column: int, row: int, top: float) -> tuple[Axes, list[Mark]]:
    """Draw a panel into its cell, counted from the lower left, with room for what stands around the axes.

    Gives the axes and what the panel marks in them.
    """
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
    ax.tick_params(colors=LIGHT.muted, labelsize=SMALL, length=0)
    ax.grid(color=LIGHT.grid, linewidth=0.7)
    ax.set_axisbelow(True)
    return ax, panel.draw(ax)


def of_row(artist: Artist, row: int | None) -> None:
    """Let readers hide an artist with its row; None is of no row."""
    if row is not None:
        artist.set_gid(f"{_ROW}{row}")


def signed(value: float, places: int = 1) -> str:
    """A number with its sign and so many places, none from a thousand on."""
    shown = f"{value:+.{0 if abs(value) >= 1000 else places}f}"
    return f"{0:.{places}f}" if float(shown) == 0 else shown.replace("-", "−")


def short(name: str, limit: int = 20) -> str:
    """A name that fits beside a panel, without its middle, since names of a kind begin alike.

    A dollar sign would begin mathematics.

    >>> short("autolambda-impartial"), short("segmentation-helps-lookahead")
    ('autolambda-impartial', 'segmentat…-lookahead')
    """
    head = (limit - 1) // 2
    shown = name if len(name) <= limit else name[:head] + "…" + name[head + 1 - limit :]
    return shown.replace("$", r"\$")


def room(names: Iterable[str]) -> float:
    """The inches that names take beside a panel, shortened as there, with a little more."""
    widths = [TextPath((0, 0), short(name), size=SMALL).get_extents().width for name in names if name.strip()]
    return 0.2 + max(widths, default=0.0) / _POINTS_PER_INCH
