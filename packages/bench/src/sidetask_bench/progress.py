"""What a person sees while runs go on: a bar with live losses and weights, or a line per run without a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Shows nothing; what training reports to unless it is given another.

    A display is a context manager around one run.
    """

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""

    def begin(self, name: str, done: int, steps: int) -> None:
        """A run of so many steps starts, or goes on where it stopped."""

    def show(self, done: int, epoch: int, epochs: int, latest: Mapping[str, Any]) -> None:
        """The newest step: its losses and weights by task."""

    def finished(self, name: str, result: Mapping[str, Any]) -> None:
        """A run has its result."""


class ConsoleDisplay(Display):
    """A progress bar on a terminal; elsewhere (a log file, CI) one line when a run has finished.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def begin(self, name: str, done: int, steps: int) -> None:
        """Open the bar, on a terminal."""
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[live]}", markup=False),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        self.bar.start()
        self.bar.add_task(name, total=steps, completed=done, live="")

    def show(self, done: int, epoch: int, epochs: int, latest: Mapping[str, Any]) -> None:
        """Move the bar, and write the newest losses and weights beside it."""
        if self.bar is not None:
            live = f"epoch {epoch + 1}/{epochs}  {describe(latest)}"
            self.bar.update(self.bar.task_ids[0], completed=done, live=live)

    def finished(self, name: str, result: Mapping[str, Any]) -> None:
        """Print a line that stays."""
        epoch = result["epoch"] + 1
        line = f"{name}: {result['seconds']:.0f} s, tested after epoch {epoch}"
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
        parts.append(f"{name} {loss:.3f}" + (f" ×{weight:.2f}" if weight is not None else ""))
    return "  ".join(parts)
