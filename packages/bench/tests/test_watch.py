import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sidetask_bench import Experiment, ExperimentError, compare, storage, train
from sidetask_bench.ablation import ablate_transfers
from sidetask_bench.assemble import make_dataset
from sidetask_bench.cli import app
from sidetask_bench.grouping import compare_groupings
from sidetask_bench.progress import Display
from sidetask_bench.relations import enumerate_relations
from sidetask_bench.watch import watch
from typer.testing import CliRunner

pytestmark = pytest.mark.thorough

Loader = Callable[..., Experiment]


class Recorder(Display):
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def begin(self, name: str, done: int, steps: int) -> None:
        self.seen.append(("begin", name, steps))

    def show(self, name: str, done: int, epoch: int, epochs: int, latest: Any) -> None:
        self.seen.append(("show", name, done, latest))

    def end(self, name: str) -> None:
        self.seen.append(("end", name))

    def finished(self, name: str, result: Any) -> None:
        self.seen.append(("finished", name, result))


def test_runs_that_go_on_elsewhere_are_shown_until_they_end(load: Loader, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    work = threading.Thread(target=compare, args=(load(), tmp_path / "c"))
    work.start()
    while not list((tmp_path / "c").rglob("config.yaml")):
        work.join(0.01)
    display = Recorder()
    assert watch(tmp_path / "c", display, poll=0.05) == []
    work.join()
    for row in ("single", "equal"):
        mine = [event for event in display.seen if event[1] == f"{row}/seed0"]
        assert [kind for kind, *_ in mine if kind != "show"] == ["begin", "end", "finished"]
        assert mine[0][2] == 18
        done = [event[2] for event in mine if event[0] == "show"]
        assert done == sorted(done)
        assert done[-1] == 18
        assert mine[-1][2] == json.loads((tmp_path / "c" / row / "seed0" / "result.json").read_text())
        latest = next(event[3] for event in mine if event[0] == "show")
        assert latest["samples_per_second"] > 0
        assert latest["memory_bytes"] > 2**20


def test_scalars_are_those_of_the_journals_each_once(load: Loader, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    train(load("method=rlw").run(None, 0), folder)
    watch(folder, Display(), tensorboard=tmp_path / "board", poll=0.01)
    (place,) = (tmp_path / "board").iterdir()
    found = EventAccumulator(str(place)).Reload()
    steps = [json.loads(line) for line in (folder / "weights.jsonl").read_text().splitlines()]
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for group in ("losses", "encoder"):
        events = found.Scalars(f"step/{group}/top_left")
        assert [event.step for event in events] == list(range(18))
        assert [event.value for event in events] == pytest.approx([record[group]["top_left"] for record in steps])
    events = found.Scalars("epoch/validation/top_left/accuracy")
    assert [e.value for e in events] == pytest.approx([r["validation"]["top_left"]["accuracy"] for r in epochs])


def test_a_run_that_has_stopped_is_named(load: Loader, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(load().run(None, 0), folder)
    (folder / "result.json").unlink()
    # What another process is in the middle of writing is no line yet.
    with (folder / "weights.jsonl").open("a") as file:
        file.write('{"step": 18, "los')
    result = CliRunner().invoke(app, ["watch", str(folder), "--tensorboard", str(tmp_path / "board")])
    assert result.exit_code == 1
    assert "run has stopped without a result" in result.output
    with pytest.raises(ExperimentError, match="holds no run"):
        watch(tmp_path / "board", Display(), poll=0.01)


def test_the_folder_where_one_is_has_a_name(load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(load("training.epochs=1").run(None, 0), tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    result = CliRunner().invoke(app, ["watch", ".", "--tensorboard", str(tmp_path / "board")])
    assert result.exit_code == 0
    assert result.output.startswith("run: ")
    assert [path.name for path in (tmp_path / "board").iterdir()] == ["run"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_comparison_that_prepares_its_runs_is_waited_for(
    load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    folder, experiment = tmp_path / "c", load("training.epochs=1")
    if begun:
        compare(experiment, folder)
        (folder / "equal" / "seed0" / "result.json").unlink()
    preparing, go_on = threading.Event(), threading.Event()

    def slow(plugin: Any) -> Any:
        preparing.set()
        assert go_on.wait(60)
        return make_dataset(plugin)

    monkeypatch.setattr(sys.modules["sidetask_bench.compare"], "make_dataset", slow)
    display, stopped = Recorder(), list[str]()
    work = threading.Thread(target=compare, args=(experiment, folder))
    look = threading.Thread(target=lambda: stopped.extend(watch(folder, display, poll=0.02)))
    try:
        work.start()
        assert preparing.wait(60)
        look.start()
        look.join(1)
        assert look.is_alive()
    finally:
        go_on.set()
        work.join()
        look.join()
    assert stopped == []
    assert {event[1] for event in display.seen if event[0] == "finished"} == {"single/seed0", "equal/seed0"}


@pytest.mark.parametrize("make", [compare, enumerate_relations, compare_groupings, ablate_transfers])
def test_a_second_one_is_kept_out_of_the_folder(load: Loader, tmp_path: Path, make: Callable[..., Any]) -> None:
    split = ("network.cut=1", "network.widths=[4, 8]", "method=saal-w", "training.epochs=1")
    with storage.locked(tmp_path), pytest.raises(ExperimentError, match="another process is training in"):
        make(load(*split), tmp_path)
    assert not list(tmp_path.rglob("config.yaml"))
    make(load(*split), tmp_path)
