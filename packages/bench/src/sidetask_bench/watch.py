"""Follow runs from another terminal, by the files that they write."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidetask_bench import storage
from sidetask_bench.progress import Display
from sidetask_bench.schema import ExperimentError

_POLL_SECONDS = 0.5
_PATIENCE = 4  # looks at which nothing goes on; a comparison has moments between two runs


def watch(
    folder: str | Path, display: Display, *, tensorboard: str | Path | None = None, poll: float = _POLL_SECONDS
) -> list[str]:
    """Show a run, or all runs of a comparison, until none goes on.

    What goes on holds a lock (`sidetask_bench.storage.locked`), also while it prepares its runs, or between two.

    Args:
        folder: of a run or of several.
        display: shows them, as it does for the process that trains.
        tensorboard: also write losses, weights, norms and validation metrics of every step and epoch so far, and of
            those that follow, as TensorBoard scalars into this folder, a subfolder for each run.
        poll: seconds between two looks.

    Returns:
        The names of runs that have stopped without a result; the command that began them goes on with them.

    Raises:
        ExperimentError: if there is no run, or TensorBoard is asked for and not installed.
    """
    folder = Path(folder).resolve()  # "." has no name
    followed: dict[Path, _Followed] = {}
    idle = 0
    with display:
        while idle < _PATIENCE:
            for path in sorted(folder.rglob("config.yaml")):
                if path.parent not in followed:
                    name = path.parent.relative_to(folder).as_posix() if path.parent != folder else folder.name
                    scalars = None if tensorboard is None else _Scalars(Path(tensorboard), name)
                    followed[path.parent] = _Followed(path.parent, name, display, scalars)
            # Looked at before the files are, or what is written in between would be missed.
            idle = 0 if any(storage.is_locked(lock.parent) for lock in folder.rglob(".lock")) else idle + 1
            for one in followed.values():
                one.look()
            if idle and followed and all(one.done for one in followed.values()) and (folder / "config.yaml").exists():
                break
            time.sleep(poll)
        for one in followed.values():
            one.close()
    if not followed:
        raise ExperimentError(f"{folder} holds no run; sidetask train and sidetask compare begin them")
    return [one.name for one in followed.values() if not one.done]


class _Followed:
    """One run, and how much of it has been seen."""

    def __init__(self, folder: Path, name: str, display: Display, scalars: _Scalars | None) -> None:
        self.folder, self.name, self.display, self.scalars = folder, name, display, scalars
        self.begun = self.done = False
        self.last: Any = None

    def look(self) -> None:
        """Show what is new."""
        status = storage.read_json(self.folder / "status.json")
        if status is not None and status != self.last:
            self.last = status
            if not self.begun:
                self.display.begin(self.name, status["step"], status["steps"])
                self.begun = True
            self.display.show(self.name, status["step"], status["epoch"], status["epochs"], status["latest"])
        if self.scalars is not None:
            self.scalars.update(self.folder)
        result = storage.read_json(self.folder / "result.json")
        if result is not None and not self.done:
            self.display.end(self.name)
            self.display.finished(self.name, result)
            self.done = True

    def close(self) -> None:
        """Nothing more will come."""
        if not self.done:
            self.display.end(self.name)
        if self.scalars is not None:
            self.scalars.writer.close()


class _Scalars:
    """The journals of a run as TensorBoard scalars, each line once."""

    def __init__(self, folder: Path, name: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ExperimentError("TensorBoard is not installed; pip install 'sidetask-bench[tensorboard]'") from error
        self.writer = SummaryWriter(str(folder / name))
        self.next = {"weights.jsonl": 0, "metrics.jsonl": 0}

    def update(self, folder: Path) -> None:
        """Write what the journals have beyond what was written."""
        for file, key in (("weights.jsonl", "step"), ("metrics.jsonl", "epoch")):
            for record in storage.Journal(folder / file).read(partial=True):
                # A run that goes on after a kill writes its last lines again, and the same.
                if record[key] < self.next[file]:
                    continue
                self.next[file] = record[key] + 1
                self._write("step" if key == "step" else "epoch", record, record[key])
        self.writer.flush()

    def _write(self, prefix: str, value: Any, step: int) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                if name not in ("step", "epoch"):
                    self._write(f"{prefix}/{name}", inner, step)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            self.writer.add_scalar(prefix, value, step)
