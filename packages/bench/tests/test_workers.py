import contextlib
import io
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sidetask_bench import Experiment, ExperimentError, compare, runtime, storage
from sidetask_bench.progress import ConsoleDisplay, Display
from sidetask_bench.workers import Processes
from sidetask_core import Step, StepFailure

pytestmark = pytest.mark.thorough

Loader = Callable[..., Experiment]


def children(process: int) -> set[int]:
    """The processes whose parent this is."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if int(parent) == process and state != "Z":
                found.add(int(entry.name))
    return found


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], Any], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


class OutOfStep(StepFailure):
    """A plug-in's own."""


@pytest.mark.parametrize("error", [OutOfStep, ZeroDivisionError])
def test_only_a_failed_step_is_a_failed_run(
    load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    backward = Step.backward

    def failing(step: Step, *args: Any, **kwargs: Any) -> Any:
        if tmp_path.joinpath("c", "equal").exists():
            raise error("here")
        return backward(step, *args, **kwargs)

    monkeypatch.setattr(Step, "backward", failing)
    experiment = load("training.epochs=1", "dataset.train=16")
    if error is OutOfStep:
        assert compare(experiment, tmp_path / "c")["failed"] == [{"row": "equal", "seed": 0, "error": "here"}]
    else:
        with pytest.raises(error):
            compare(experiment, tmp_path / "c")


class Recorder(Display):
    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def begin(self, name: str, done: int, steps: int) -> None:
        self.seen.append(("begin", name))
        assert steps == 2

    def show(self, name: str, done: int, epoch: int, epochs: int, latest: Any) -> None:
        self.seen.append(("show", name))
        assert set(latest["losses"]) == {"top_left", "bottom_right"}

    def end(self, name: str) -> None:
        self.seen.append(("end", name))

    def finished(self, name: str, result: Any) -> None:
        self.seen.append(("finished", name))
        assert "test" in result


def test_runs_in_other_processes_show_their_progress_here(load: Loader, tmp_path: Path) -> None:
    display = Recorder()
    experiment = load("training.epochs=1", "dataset.train=16")
    compare(experiment, tmp_path / "c", jobs=2, display=display)
    for row in ("single", "equal"):
        events = [event for event, name in display.seen if name == f"{row}/seed0"]
        assert list(dict.fromkeys(events)) == ["begin", "show", "finished", "end"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_shows_all_of_every_run_that_goes_on(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    display = ConsoleDisplay(console)
    tasks = ("segmentation", "depth", "normals", "edges")
    latest = {
        "losses": {task: 1.25 + i for i, task in enumerate(tasks)},
        "encoder": dict.fromkeys(tasks, 0.5),
        "samples_per_second": 123.4,
        "memory_bytes": 2**31,
    }

    def shown() -> str:
        # On a console of its own, or what is refreshed meanwhile would come between.
        other = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
        with other.capture() as captured:
            other.print(display.view())
        return " ".join(captured.get().split())

    with display:
        display.begin("a/seed0", 0, 4000)
        display.begin("b/seed0", 5, 4000)
        display.show("b/seed0", 600, 1, 2, latest)
        text = shown()
        for words in ("a/seed0", "0/4000", "b/seed0", "600/4000", "epoch 2/2 123 samples/s 2.00 GiB", "━━━"):
            assert words in text
        assert len(re.findall(r"-:--:--|\d:\d\d:\d\d", text)) == 2, "the time that is left"
        assert "segmentation 1.250 ×0.50 depth 2.250 ×0.50 normals 3.250 ×0.50 edges 4.250 ×0.50" in text
        display.end("b/seed0")
        assert "b/seed0" not in shown()
    assert shown() == ""


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert runtime.cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert runtime.cores() == os.cpu_count()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_die_with_a_killed_comparison_and_the_next_one_goes_on(
    load: Loader, tiny: Callable[..., Path], tmp_path: Path, outcome: Any
) -> None:
    changes = ["training.epochs=10", "training.checkpoint_every=4"]
    experiment = load(*changes)
    compare(experiment, tmp_path / "whole")
    sets = [word for change in changes for word in ("--set", change)]
    command = [sys.executable, "-m", "sidetask_bench", "compare", str(tiny()), "--folder", "killed", "-j", "2", *sets]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        try:
            runs = [tmp_path / "killed" / row / "seed0" for row in ("single", "equal")]
            assert wait_until(lambda: any((run / "checkpoint.pt").exists() for run in runs), 240)
            workers = children(process.pid)
            assert len(workers) >= 2
            process.kill()
            process.wait()
            assert wait_until(lambda: not any(map(running, workers)), 10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert not all((run / "result.json").exists() for run in runs)
    comparison = compare(experiment, tmp_path / "killed")
    assert not comparison["failed"]
    for run in runs:
        assert outcome(run) == outcome(tmp_path / "whole" / run.relative_to(tmp_path / "killed"))


def test_a_fatal_error_stops_the_other_runs_at_once(load: Loader, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    # As if another process trained there.
    with storage.locked(folder / "equal" / "seed0"), pytest.raises(ExperimentError, match="another process"):
        compare(load("training.epochs=500"), folder, jobs=2)
    with storage.locked(folder / "single" / "seed0"):
        assert not (folder / "single" / "seed0" / "result.json").exists()


class Killer(Display):
    """Kills workers whenever a run of this row has come to its second epoch, so often."""

    def __init__(self, row: str, times: float) -> None:
        self.row, self.times, self.killed = row, times, 0
        self.resumed: list[str] = []
        self.others = set(multiprocessing.active_children())  # of tests before

    def begin(self, name: str, done: int, steps: int) -> None:
        if done:
            self.resumed.append(name)

    def show(self, name: str, done: int, epoch: int, epochs: int, latest: Any) -> None:
        if name.startswith(f"{self.row}/") and epoch and self.killed < self.times:
            workers = set(multiprocessing.active_children()) - self.others
            if workers:  # or what it showed before its death is still being read
                self.killed += 1
            for worker in workers if self.times > 1 else [*workers][:1]:
                worker.kill()


LONG = ("training.epochs=60", "rows={single: {network: {cut: 0}}, equal: {}, rlw: {method: rlw}}")


def test_a_comparison_survives_the_death_of_a_worker(load: Loader, tmp_path: Path, outcome: Any) -> None:
    experiment, killer, pools = load(*LONG), Killer("equal", 1), []

    def pool(at_once: int) -> Processes:
        pools.append(Processes(at_once))
        return pools[-1]

    whole = compare(experiment, tmp_path / "whole")
    comparison = compare(experiment, tmp_path / "lost", jobs=2, display=killer, pool=pool)
    assert killer.killed == 1
    assert killer.resumed, "from checkpoints"
    assert len(pools) == 2, "all go on side by side"
    assert comparison["failed"] == []
    assert [row["mean"] for row in comparison["rows"]] == [row["mean"] for row in whole["rows"]]
    for row in ("single", "equal", "rlw"):
        assert outcome(tmp_path / "lost" / row / "seed0") == outcome(tmp_path / "whole" / row / "seed0")


def test_a_run_that_always_kills_its_worker_is_a_failed_run(load: Loader, tmp_path: Path) -> None:
    killer = Killer("equal", math.inf)
    comparison = compare(load(*LONG), tmp_path, jobs=2, display=killer)
    assert killer.killed == 3, "beside others, beside others again, alone"
    (failure,) = comparison["failed"]
    assert (failure["row"], failure["seed"]) == ("equal", 0)
    assert "BrokenProcessPool" in failure["error"]
    assert [row["name"] for row in comparison["rows"]] == ["single", "rlw"]


def test_a_script_whose_workers_cannot_begin_says_why(
    tiny: Callable[..., Path], python: Callable[..., Any], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"from sidetask_bench import compare, load_experiment\ncompare(load_experiment({str(tiny())!r}), 'c', jobs=2)\n"
    )
    done = python(str(script))
    assert done.returncode == 1
    assert "ExperimentError: no process for --jobs came to life" in done.stderr.splitlines()[-1]
