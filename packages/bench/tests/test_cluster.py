"""Runs on a Ray cluster, one that is started here."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sidetask_bench import Experiment, ExperimentError, compare
from sidetask_bench.grouping import compare_groupings
from sidetask_bench.progress import Display
from sidetask_bench.relations import enumerate_relations

ray = pytest.importorskip("ray", reason="Ray is not installed, so that no cluster is tested")
from sidetask_bench.cluster import Cluster  # noqa: E402 (what it needs is known to be there)

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("default")]

Loader = Callable[..., Experiment]
ON_CLUSTER = functools.partial(Cluster, address="auto")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Of two cores, whatever there are."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Recorder(Display):
    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def begin(self, name: str, *arguments: Any) -> None:
        self.seen.append(("begin", name))

    def show(self, name: str, *arguments: Any) -> None:
        self.seen.append(("show", name))

    def finished(self, name: str, *arguments: Any) -> None:
        self.seen.append(("finished", name))


def untimed(comparison: dict[str, Any]) -> dict[str, Any]:
    for row in comparison["rows"]:
        del row["seconds_per_step"]
        for run in row["runs"]:
            del run["seconds"], run["seconds_per_step"]
    return comparison


def test_runs_there_are_the_runs_here(
    load: Loader, tmp_path: Path, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one that fails, a relative folder, and progress that is shown here; a second call finds all finished."""
    wild = "rows.wild={training: {optimizer: {lr: 1e30}}}"
    experiment = load("training.epochs=2", wild)
    here = untimed(compare(experiment, tmp_path / "here"))
    monkeypatch.chdir(tmp_path)
    display = Recorder()
    there = untimed(compare(experiment, Path("there"), jobs=2, pool=ON_CLUSTER, display=display))
    assert there == here
    assert [failure["row"] for failure in there["failed"]] == ["wild"]
    for row in ("single", "equal"):
        assert outcome(tmp_path / "there" / row / "seed0") == outcome(tmp_path / "here" / row / "seed0")
        assert list(dict.fromkeys(e for e, name in display.seen if name == f"{row}/seed0")) == [
            "begin",
            "show",
            "finished",
        ]


def test_relations_and_groupings_there_are_those_here(load: Loader, tmp_path: Path) -> None:
    experiment = load("training.epochs=1")
    here, there = (
        (enumerate_relations(experiment, folder / "r", **how).rows, compare_groupings(experiment, folder / "g", **how))
        for folder, how in ((tmp_path / "here", {}), (tmp_path / "there", {"jobs": 2, "pool": ON_CLUSTER}))
    )
    assert here == there


def holder(lock: Path) -> int | None:
    """The process that has a file open."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and any(file.resolve() == lock for file in (entry / "fd").iterdir()):
                return int(entry.name)
        except OSError:
            continue
    return None


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_run_whose_worker_is_lost_goes_on_in_another(load: Loader, tmp_path: Path, outcome: Any) -> None:
    experiment = load("training.epochs=8", "training.checkpoint_every=4", "method=rlw", "rows={only: null}")
    compare(experiment, tmp_path / "whole")
    run, killed = tmp_path / "lost" / "only" / "seed0", []

    def kill() -> None:
        until = time.monotonic() + 240
        while time.monotonic() < until and not (run / "result.json").exists():
            if (run / "checkpoint.pt").exists() and (worker := holder(run / ".lock")) not in (None, os.getpid()):
                os.kill(worker, signal.SIGKILL)
                killed.append(worker)
                return
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    comparison = compare(experiment, tmp_path / "lost", pool=ON_CLUSTER)
    killer.join()
    assert killed
    assert comparison["failed"] == []
    assert outcome(run) == outcome(tmp_path / "whole" / "only" / "seed0")


def test_a_mistake_comes_back_as_it_is(load: Loader, tmp_path: Path) -> None:
    (tmp_path / "c" / "equal" / "seed0").mkdir(parents=True)
    compare(load("training.epochs=1", "rows={equal: null}"), tmp_path / "c")
    with pytest.raises(ExperimentError, match="holds a run of another configuration"):
        compare(load("training.epochs=2", "rows={equal: null}"), tmp_path / "c", pool=ON_CLUSTER)
