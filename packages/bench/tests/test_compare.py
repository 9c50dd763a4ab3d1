import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from sidetask_bench import Experiment, ExperimentError, compare, report, runtime, tables
from sidetask_bench.compare import summarize
from sidetask_bench.trainer import Trainer
from sidetask_core import Task

pytestmark = pytest.mark.thorough

Loader = Callable[..., Experiment]


def task(name: str, primary: bool, **metrics: bool | None) -> Task:
    kinds: Any = {key: SimpleNamespace(higher_is_better=higher) for key, higher in metrics.items()}
    return Task(name, loss=abs, metrics=kinds, primary=primary)


DATA: Any = SimpleNamespace(
    tasks=(task("seg", True, miou=True, accuracy=True), task("depth", True, error=False), task("edge", False, f=True)),
    input_shape=(3, 12, 16),
    train=range(7),
    validation=range(2),
    test=range(5),
)


def result(seed: int, miou: float, accuracy: float, error: float, f: float) -> dict[str, Any]:
    test = {"seg": {"miou": miou, "accuracy": accuracy}, "depth": {"error": error}, "edge": {"f": f}}
    return {"seed": seed, "folder": f"x/seed{seed}", "test": test, "seconds_per_step": 0.1}


SINGLE = [result(0, 0.4, 0.7, 1.8, 0.5), result(1, 0.6, 0.9, 2.2, 0.5)]
EQUAL = [result(0, 0.55, 0.8, 1.6, 0.1), result(1, 0.6, 0.88, 2.0, 0.1), result(2, 0.65, 0.96, 1.8, 0.1)]


def summary(load: Loader, single: Any = SINGLE, equal: Any = EQUAL, **kwargs: str) -> dict[str, Any]:
    experiment = load(*(f"{key}={value}" for key, value in kwargs.items()))
    return summarize(experiment, DATA, experiment.runs(), {"single": single, "equal": equal})


def test_mean_std_and_improvement_by_hand(load: Loader) -> None:
    single, equal = summary(load)["rows"]
    assert single["mean"]["seg"]["miou"] == pytest.approx(0.5)
    assert single["std"]["seg"]["miou"] == pytest.approx(0.2 / math.sqrt(2))
    assert equal["mean"]["depth"]["error"] == pytest.approx(1.8)
    assert equal["std"]["depth"]["error"] == pytest.approx(0.2)
    # Against the means of single: miou .5, accuracy .8, error 2. Edges are auxiliary and do not count.
    seg = [(10 + 0) / 2, (20 + 10) / 2, (30 + 20) / 2]
    depth = [20.0, 0.0, 10.0]
    values = [(s + d) / 2 for s, d in zip(seg, depth, strict=True)]
    improvement = equal["improvement"]
    assert improvement["values"] == pytest.approx(values)
    assert improvement["mean"] == pytest.approx(12.5)
    assert improvement["std"] == pytest.approx(math.sqrt((0 + 25 + 25) / 2))
    assert improvement["by_task"]["seg"] == pytest.approx({"mean": 15.0, "std": 10.0})
    assert improvement["by_task"]["depth"]["mean"] == pytest.approx(10.0)
    assert improvement["by_task"]["edge"]["mean"] == pytest.approx(-80.0)
    assert single["improvement"]["mean"] == pytest.approx(0.0, abs=1e-9)


def test_the_definition_and_the_baseline_are_the_experiments(load: Loader) -> None:
    assert summary(load, improvement="one-metric")["rows"][1]["improvement"]["mean"] == pytest.approx(15.0)
    flat = summary(load, improvement="flat")
    assert flat["rows"][1]["improvement"]["mean"] < 0
    assert flat["higher_is_better"] is False
    assert "Δm % ↓" in tables.markdown(flat)
    assert summary(load)["higher_is_better"] is True
    turned = summary(load, baseline="equal")
    assert turned["baseline"] == "equal"
    assert turned["rows"][1]["improvement"]["mean"] == pytest.approx(0.0, abs=1e-9)
    assert turned["rows"][0]["improvement"]["mean"] < 0


def test_one_seed_has_no_deviation(load: Loader) -> None:
    rows = summary(load, SINGLE[:1], EQUAL[:1])["rows"]
    for row in rows:
        assert all(value is None for metrics in row["std"].values() for value in metrics.values())
        assert row["improvement"]["std"] is None
        assert row["improvement"]["by_task"]["seg"]["std"] is None


def test_an_undefined_metric_makes_an_undefined_improvement(load: Loader) -> None:
    broken = [SINGLE[0] | {"test": SINGLE[0]["test"] | {"depth": {"error": None}}}, SINGLE[1]]
    comparison = summary(load, broken)
    assert comparison["rows"][0]["mean"]["depth"]["error"] is None
    assert comparison["rows"][0]["mean"]["seg"]["miou"] == pytest.approx(0.5)
    assert comparison["rows"][1]["improvement"]["values"] == [None, None, None]
    assert "–" in tables.markdown(comparison)
    assert "no mean" in tables.markdown(comparison)
    assert comparison["rows"][1]["improvement"]["by_task"]["seg"]["mean"] == pytest.approx(15.0)


def test_an_undefined_seed_leaves_the_others_their_values(load: Loader) -> None:
    broken = [*EQUAL[:2], EQUAL[2] | {"test": EQUAL[2]["test"] | {"depth": {"error": None}}}]
    improvement = summary(load, equal=broken)["rows"][1]["improvement"]
    assert improvement["values"] == [pytest.approx(12.5), pytest.approx(7.5), None]
    assert improvement["mean"] is None
    assert improvement["std"] is None
    assert improvement["by_task"]["seg"]["mean"] == pytest.approx(15.0)
    assert improvement["by_task"]["depth"] == {"mean": None, "std": None}


def test_a_fresh_comparison_is_the_repeated_one(load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a metric is NaN, which JSON does not have."""

    def undefined(*args: Any) -> dict[str, dict[str, float]]:
        return {"top_left": {"accuracy": math.nan, "F1": 0.5}, "bottom_right": {"accuracy": 0.5, "F1": 0.5}}

    monkeypatch.setattr("sidetask_bench.run.evaluate", undefined)
    experiment = load("training.epochs=1", "dataset.train=16")
    first = compare(experiment, tmp_path / "c")
    assert first["rows"][1]["improvement"]["values"] == [None]
    assert first["rows"][1]["improvement"]["by_task"]["bottom_right"]["mean"] == 0
    assert first == compare(experiment, tmp_path / "c") == json.loads((tmp_path / "c" / "comparison.json").read_text())


def test_a_baseline_without_results_is_an_error(load: Loader) -> None:
    experiment = load()
    with pytest.raises(ExperimentError, match="no run of the baseline row 'single' finished"):
        summarize(experiment, DATA, experiment.runs(), {"equal": EQUAL})


def test_tables_say_the_same_numbers(load: Loader) -> None:
    comparison = summary(load)
    text = tables.markdown(comparison)
    for words in ("seg miou ↑", "depth error ↓", "0.5000 ± 0.1414", "+12.50 ± 5.00", "single (2 of 3 seeds)"):
        assert words in text
    rows = list(csv.DictReader(io.StringIO(tables.csv_text(comparison))))
    (error,) = (row for row in rows if (row["row"], row["metric"]) == ("equal", "error"))
    assert float(error["mean"]) == comparison["rows"][1]["mean"]["depth"]["error"]
    assert error["seeds"] == "3"
    assert "Data: 7 training, 2 validation and 5 test samples of 3×12×16." in text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tables.terminal(comparison))
    shown = console.export_text()
    assert "+12.50 ± 5.00" in shown
    assert "accuracy" not in shown


def test_tables_name_runs_that_failed(load: Loader) -> None:
    comparison = summary(load)
    failed = [{"row": "equal", "seed": 3, "error": "depth: nan\nat step 7"}, {"row": "dwa", "seed": 0, "error": "inf"}]
    comparison |= {"failed": [*failed, {**failed[1], "seed": 1}]}
    lines = tables.markdown(comparison).splitlines()
    assert lines[-4:] == [
        "",
        "- left out: equal, seed 3: depth: nan at step 7",
        "- left out: dwa, seed 0: inf",
        "- left out: dwa, seed 1: inf",
    ]
    rows = list(csv.DictReader(io.StringIO(tables.csv_text(comparison))))
    assert {(row["row"], row["seeds"], row["failed"]) for row in rows} == {
        ("single", "2", "0"),
        ("equal", "3", "1"),
        ("dwa", "0", "2"),
    }
    (dwa,) = (row for row in rows if row["row"] == "dwa")
    assert (dwa["task"], dwa["metric"], dwa["mean"], dwa["std"]) == ("", "improvement %", "", "")


@pytest.mark.parametrize(("definition", "heading"), [("flat", "Δm % ↓"), ("mean-of-tasks", "improvement % ↑")])
def test_tables_say_what_is_measured_and_which_way_is_better(load: Loader, definition: str, heading: str) -> None:
    comparison = summary(load, improvement=definition)
    text = tables.markdown(comparison)
    assert f"| {heading} |" in text
    assert tables.MEASURES[definition].words in text
    assert (f",,{heading[:-2]}," in tables.csv_text(comparison)) is True


def test_compare_runs_what_is_missing(load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["training.epochs=1", "dataset.train=16", "seeds=[0, 1]"]
    built: list[str] = []
    original = Trainer.__init__

    def counting(self: Trainer, config: Any, *args: Any) -> None:
        built.append(f"{config.row}/seed{config.seed}")
        original(self, config, *args)

    monkeypatch.setattr(Trainer, "__init__", counting)
    compare(load(*short), tmp_path / "c")
    assert built == ["single/seed0", "single/seed1", "equal/seed0", "equal/seed1"]
    built.clear()
    wild = "rows.wild={training: {optimizer: {lr: 1e30}}}"
    comparison = compare(load(*short, "rows.rlw={method: rlw}", wild), tmp_path / "c", command="again")
    assert built == ["rlw/seed0", "rlw/seed1", "wild/seed0", "wild/seed1"]
    assert json.loads((tmp_path / "c" / "comparison.json").read_text()) == comparison
    assert [row["name"] for row in comparison["rows"]] == ["single", "equal", "rlw"]
    assert {(failure["row"], failure["seed"]) for failure in comparison["failed"]} == {("wild", 0), ("wild", 1)}
    assert comparison["command"] == "again"
    assert {"sidetask-core", "sidetask-bench", "torch", "python"} <= set(comparison["versions"])
    for row in comparison["rows"]:
        for run in row["runs"]:
            stored = json.loads((tmp_path / "c" / run["folder"] / "result.json").read_text())
            assert run["test"] == stored["test"]
    assert (tmp_path / "c" / "table.md").read_text() == tables.markdown(comparison)


def test_the_versions_are_those_of_the_runs(load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["training.epochs=1", "dataset.train=16"]
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "versions", lambda: {"torch": "1.0", "python": "3.12"})
        alike = compare(load(*short), tmp_path / "c")
    assert alike["versions"] == {"torch": "1.0", "python": "3.12"}
    assert alike["mixed_versions"] == {}
    monkeypatch.setattr(runtime, "versions", lambda: {"torch": "2.0", "python": "3.12"})
    comparison = compare(load(*short, "rows.rlw={method: rlw}"), tmp_path / "c")
    assert comparison["versions"] == {"torch": "1.0, 2.0", "python": "3.12"}
    assert comparison["mixed_versions"] == {"torch": {"1.0": ["single/seed0", "equal/seed0"], "2.0": ["rlw/seed0"]}}
    sentence = "different versions of torch: 1.0 (single/seed0, equal/seed0); 2.0 (rlw/seed0)"
    assert sentence in tables.markdown(comparison)
    assert sentence in report.write(tmp_path / "c").read_text("utf-8")


def test_runs_side_by_side_give_what_runs_in_order_give(load: Loader, tmp_path: Path) -> None:
    wild = "rows.wild={training: {optimizer: {lr: 1e30}}}"
    experiment = load("training.epochs=1", "dataset.train=16", wild)
    found = []
    for jobs in (1, 2):
        comparison = compare(experiment, tmp_path / str(jobs), jobs=jobs)
        for row in comparison["rows"]:
            del row["seconds_per_step"]
            for run in row["runs"]:
                del run["seconds"], run["seconds_per_step"]
        found.append(comparison)
    assert found[0] == found[1]
    assert [failure["row"] for failure in found[1]["failed"]] == ["wild"]


def test_a_mistake_in_the_last_row_is_found_before_the_first_is_trained(load: Loader, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="pcgrade"):
        compare(load("rows.last={method: pcgrade}"), tmp_path / "c")
    assert not list(tmp_path.rglob("config.yaml"))
