"""What a person sees while runs go on: bars with live losses and weights, or a line per run without a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


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
    """A progress bar per run on a terminal; elsewhere (a log file, CI) one line when a run has finished.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars: Progress | None = None
        self.runs: dict[str, TaskID] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()
        self.bars, self.runs = None, {}

    def begin(self, name: str, done: int, steps: int) -> None:
        """Open the run's bar, on a terminal."""
        if not self.console.is_terminal:
            return
        if self.bars is None:
            self.bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[live]}", markup=False),
                console=self.console,
                transient=True,
                refresh_per_second=4,
            )
            self.bars.start()
        self.runs[name] = self.bars.add_task(name, total=steps, completed=done, live="")

    def show(self, name: str, done: int, epoch: int, epochs: int, latest: Mapping[str, Any]) -> None:
        """Move the run's bar, and write the newest losses and weights beside it."""
        if self.bars is not None:
            live = f"epoch {epoch + 1}/{epochs}  {describe(latest)}"
            self.bars.update(self.runs[name], completed=done, live=live)

    def end(self, name: str) -> None:
        """Take the run's bar away."""
        if self.bars is not None and name in self.runs:
            self.bars.remove_task(self.runs.pop(name))

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
    """One line of the newest losses, each with its encoder weight where there is one; speed and memory if known.

    >>> describe({"losses": {"depth": 0.4, "seg": 1.2}, "encoder": {"depth": 1.1, "seg": 0.9}, "memory_bytes": 2**29})
    'depth 0.400 ×1.10  seg 1.200 ×0.90  0.50 GiB'
    """
    weights = latest.get("encoder") or latest.get("decoder") or {}
    parts = []
    for name, loss in latest.get("losses", {}).items():
        weight = weights.get(name)
        parts.append(f"{name} {loss:.3f}" + (f" ×{weight:.2f}" if weight is not None else ""))
    if speed := latest.get("samples_per_second"):
        parts.append(f"{speed:.3g}/s")
    if memory := latest.get("memory_bytes"):
        parts.append(f"{memory / 2**30:.2f} GiB")
    return "  ".join(parts)
