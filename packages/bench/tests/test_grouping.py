import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sidetask_bench import Experiment, ExperimentError
from sidetask_bench.cli import app
from sidetask_bench.grouping import compare_groupings
from sidetask_core import Task, relative_improvement_by_task
from sidetask_datasets import digits
from typer.testing import CliRunner

pytestmark = pytest.mark.thorough

CHANGES = [
    "seeds=[0, 1]",
    "dataset={name: digits, train: 192, validation: 64, test: 200}",
    "training.epochs=2",
    "training.optimizer={name: adam, lr: 3e-3}",
    "rows={equal: {}, rlw: {method: rlw}, single: {network: {cut: 0}}}",
]
PAIR = "top_left+bottom_right"


def result(folder: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / run / "result.json").read_text())
    return found


def tasks() -> tuple[Task, ...]:
    return digits(4, 4, 4).tasks


def test_every_combination_is_trained_and_set_beside_what_learns(
    load: Callable[..., Experiment], tmp_path: Path
) -> None:
    found = compare_groupings(load(*CHANGES), tmp_path)
    assert found.tasks == ("top_left", "bottom_right")
    assert [(entry.name, entry.learned) for entry in found.entries] == [
        ("top_left", False),
        ("bottom_right", False),
        (PAIR, False),
        ("rlw", True),
    ]
    assert [sorted(entry.improvement) for entry in found.entries[:3]] == [
        ["top_left"],
        ["bottom_right"],
        ["bottom_right", "top_left"],
    ]
    for task in tasks():
        name = task.name
        alone = [result(tmp_path, f"{name}/seed{seed}")["test"] for seed in (0, 1)]
        mean = {name: {m: (alone[0][name][m] + alone[1][name][m]) / 2 for m in alone[0][name]}}
        for entry, run in ((found.entries[2], PAIR), (found.entries[3], "row-rlw")):
            gains = [
                relative_improvement_by_task(result(tmp_path, f"{run}/seed{seed}")["test"], mean, [task])[name]
                for seed in (0, 1)
            ]
            assert entry.improvement[name]["mean"] == pytest.approx(sum(gains) / 2)
        assert found.best[name] in (name, PAIR)
    written = json.loads((tmp_path / "grouping.json").read_text())
    assert written == json.loads(json.dumps(found.to_plain()))
    lines = (tmp_path / "grouping.csv").read_text().splitlines()
    assert lines[0] == "name,learned,task,improvement %,deviation,best for it"
    assert len(lines) == 1 + 1 + 1 + 2 + 2
    assert (tmp_path / "grouping.png").stat().st_size > 1000
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(times) == 4 * 2
    assert compare_groupings(load(*CHANGES), tmp_path) == found
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_the_command_prints_what_each_task_gains(tiny: Callable[..., Path], tmp_path: Path) -> None:
    sets = [word for change in [*CHANGES, "seeds=[0]"] for word in ("--set", change)]
    done = CliRunner().invoke(app, ["grouping", str(tiny()), *sets, "--row", "rlw", "--runs", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    for words in ("improves on the task alone by %", PAIR, "rlw", "* the combination that is best", "grouping.png"):
        assert words in done.output
    assert (tmp_path / "runs" / "tiny" / "grouping" / PAIR / "seed0" / "result.json").exists()


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        (["dataset.tasks=[top_left]"], None, "dataset.tasks: combinations are of 2 to 6 tasks, found 1"),
        ([], ["rwl"], "rows.rwl: unknown row"),
        (["rows={top_left: {method: rlw}}"], None, "rows.top_left: a combination of tasks has this name"),
        ([f"rows={{{PAIR}: {{method: rlw}}}}"], None, r"rows.top_left\+bottom_right: a combination"),
        (["rows={equal: {}}"], ["equal", "equal"], "'equal' is given twice"),
    ],
)
def test_what_cannot_be_combined_is_named(
    load: Callable[..., Experiment], tmp_path: Path, changes: list[str], rows: list[str] | None, message: str
) -> None:
    with pytest.raises(ExperimentError, match=message):
        compare_groupings(load(*CHANGES, *changes), tmp_path, rows=rows)
    assert not list(tmp_path.rglob("config.yaml"))
