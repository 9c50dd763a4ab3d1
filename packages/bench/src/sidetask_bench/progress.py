"""What a person sees while runs go on: bars with live losses and weights, or a line per run without a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text


class Display:
    """Shows nothing; what training reports to unless it is given another.

    A display is a context manager around one run, or around several that go on side by side.
    """

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""

    def begin(self, name: str, done: int, steps: int) -> None:
        """A run of so many steps starts, or goes on where it stopped."""

    def show(self, name: str, done: int, epoch: int, epochs: int, latest: Mapping[str, Any]) -> None:
        """The newest step of a run: its losses and weights by task."""

    def end(self, name: str) -> None:
        """A run goes on no more, whatever came of it."""

    def finished(self, name: str, result: Mapping[str, Any]) -> None:
        """A run has its result."""


class ConsoleDisplay(Display):
    """On a terminal a bar per run, with the time that is left, and what it is at below; elsewhere one line at its end.

    Elsewhere is a log file, or CI.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
        )
        self.runs: dict[str, TaskID] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
        self.live = None
        for name in list(self.runs):
            self.end(name)

    def begin(self, name: str, done: int, steps: int) -> None:
        """Open the run's bar, on a terminal."""
        if not self.console.is_terminal:
            return
        self.runs[name] = self.bars.add_task(name, total=steps, completed=done, pace="", values="")
        if self.live is None:
            self.live = Live(get_renderable=self.view, console=self.console, transient=True, refresh_per_second=4)
            self.live.start()

    def show(self, name: str, done: int, epoch: int, epochs: int, latest: Mapping[str, Any]) -> None:
        """Move the run's bar, and write where it is and the newest losses and weights below."""
        if name in self.runs:
            pace = "  ".join([f"epoch {epoch + 1}/{epochs}", *_pace(latest)])
            self.bars.update(self.runs[name], completed=done, pace=pace, values=describe(latest))

    def end(self, name: str) -> None:
        """Take the run's bar away."""
        if name in self.runs:
            self.bars.remove_task(self.runs.pop(name))

    def view(self) -> RenderableType:
        """What is on the terminal now."""
        parts: list[RenderableType] = []
        for task in self.bars.tasks:
            parts.append(self.bars.make_tasks_table([task]))
            # On lines of their own, or they would squeeze the bar and the time to nothing.
            parts += [
                Padding(Text(task.fields[part]), (0, 0, 0, 2)) for part in ("pace", "values") if task.fields[part]
            ]
        return Group(*parts)

    def finished(self, name: str, result: Mapping[str, Any]) -> None:
        """Print a line that stays."""
        chosen = result["epoch"]
        if isinstance(chosen, Mapping):
            epochs = ", ".join(f"{epoch + 1} ({task})" for task, epoch in chosen.items())
        else:
            epochs = str(chosen + 1)
        line = f"{name}: {result['seconds']:.0f} s, tested after epoch {epochs}"
        self.console.print(line, markup=False, highlight=False)


def describe(latest: Mapping[str, Any]) -> str:
    """One line of the newest losses, each with its encoder weight where there is one.

    >>> describe({"losses": {"depth": 0.4, "seg": 1.2}, "encoder": {"depth": 1.1, "seg": 0.9}})
    'depth 0.400 ×1.10  seg 1.200 ×0.90'
    """
    weights = latest.get("encoder") or latest.get("decoder") or {}
    parts = []
    for name, loss in latest.get("losses", {}).items():
        weight = weights.get(name)
        shown = "–" if loss is None else f"{loss:.3f}"
        parts.append(f"{name} {shown}" + (f" ×{weight:.2f}" if weight is not None else ""))
    return "  ".join(parts)


def _pace(latest: Mapping[str, Any]) -> list[str]:
    """Speed and memory, if they are known.

    >>> _pace({"samples_per_second": 123.4, "memory_bytes": 2**29})
    ['123 samples/s', '0.50 GiB']
    """
    parts = []
    if speed := latest.get("samples_per_second"):
        parts.append(f"{speed:.3g} samples/s")
    if memory := latest.get("memory_bytes"):
        parts.append(f"{memory / 2**30:.2f} GiB")
    return parts
