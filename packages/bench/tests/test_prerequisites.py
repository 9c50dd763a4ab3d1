"""What rows read and other trainings make is made first, kept while its configuration is the same, and never mixed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sidetask_bench import ExperimentError, compare, load_experiment
from sidetask_bench.cli import app
from sidetask_bench.document import dump, presets, read
from sidetask_bench.prerequisites import reads_relations
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.thorough

READS = {"name": "saal-e", "relations": "$folder/relations/relations.json"}
ROWS = {"single": {"network": {"cut": 0}}, "saal-e": {"method": READS}}
PAPER = {"source": "A. Author 2020", "size": "big pictures"}
EPOCHS = ("--set", "training.epochs=1")


@pytest.fixture
def sidetask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command, in an empty folder; reports, which take longest, are not what is tested here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sidetask_bench.report.write", lambda folder: folder / "report.html")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def saal(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A paper's table at two sizes, with a row that reads relations."""
    for name in ("saal", "saal-small"):
        network = {"name": "small", "widths": [4, 8], "cut": 1}
        (tmp_path / f"{name}.yaml").write_text(tiny(name=name, rows=ROWS, network=network, paper=PAPER).read_text())
    return tmp_path / "saal.yaml"


def epochs_of(folder: Path) -> set[int]:
    """Of every run below."""
    return {read(path)["training"]["epochs"] for path in folder.rglob("config.yaml")}


def test_relations_are_made_wherever_the_runs_are(saal: Path, sidetask: Callable[..., Result]) -> None:
    done = sidetask("table", saal, "--small", "--runs", "elsewhere", *EPOCHS)
    assert done.exit_code == 0, done.output
    assert "| saal-e | " in Path("elsewhere/saal-small/paper.md").read_text()
    assert Path("elsewhere/saal-small/relations/relations.json").exists()
    assert not Path("runs").exists()
    assert not Path("elsewhere/saal").exists(), "the other size has its own"
    config = read("elsewhere/saal-small/saal-e/seed0/config.yaml")
    assert config["method"]["relations"] == "elsewhere/saal-small/relations/relations.json"
    assert list(config["files"]) == ["method.relations"]


def test_relations_of_another_configuration_are_refused_or_made_again(
    saal: Path, sidetask: Callable[..., Result]
) -> None:
    relations = Path("runs/saal/relations")
    assert sidetask("table", saal, *EPOCHS).exit_code == 0
    assert epochs_of(relations) == {1}
    other = sidetask("table", saal, "--set", "training.epochs=2")
    assert other.exit_code == 2
    assert "seed0 holds a run of another configuration (training.epochs: 1 -> 2)" in other.stderr
    assert "relations" in other.stderr
    assert sidetask("table", saal, "--set", "training.epochs=2", "--overwrite").exit_code == 0
    assert epochs_of(relations) == epochs_of(Path("runs/saal")) == {2}
    # Of the right configuration they are kept.
    before = {path: path.stat().st_mtime_ns for path in relations.rglob("result.json")}
    assert sidetask("table", saal, "--set", "training.epochs=2").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in relations.rglob("result.json")} == before


def test_relations_that_failed_are_repeated(saal: Path, sidetask: Callable[..., Result]) -> None:
    assert sidetask("relations", saal, *EPOCHS).exit_code == 0
    path = Path("runs/saal/relations/relations.json")
    whole = json.loads(path.read_text())
    pair = "+".join(whole["tasks"])
    path.write_text(json.dumps({**whole, "failed": {pair: "OSError: no space"}}))
    shutil.rmtree(path.parent / pair)
    assert sidetask("compare", saal, *EPOCHS).exit_code == 0
    assert (path.parent / pair / "seed0" / "result.json").exists()
    assert json.loads(path.read_text()) == whole


def test_a_stored_comparison_can_be_made_again(saal: Path, sidetask: Callable[..., Result]) -> None:
    assert sidetask("compare", saal, *EPOCHS).exit_code == 0
    first = json.loads(Path("runs/saal/comparison.json").read_text())
    Path("stored.yaml").write_text(dump(first["config"]))
    again = sidetask("compare", "stored.yaml", "--folder", "again")
    assert again.exit_code == 0, again.output
    assert (
        Path("again/relations/relations.json").read_bytes() == Path("runs/saal/relations/relations.json").read_bytes()
    )
    second = json.loads(Path("again/comparison.json").read_text())
    assert second["config"] == first["config"]
    for one, other in zip(first["rows"], second["rows"], strict=True):
        assert (one["mean"], one["improvement"]) == (other["mean"], other["improvement"])
    one = sidetask("train", "stored.yaml", "--row", "saal-e")
    assert one.exit_code == 0, one.output
    assert "run: runs/saal/saal-e/seed0" in one.output


def test_two_processes_make_relations_together(saal: Path, tmp_path: Path, python: Any) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sidetask_bench"]
    done = python(*launch, "compare", str(saal), *EPOCHS)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "runs/saal").rglob("result.json"):
        assert json.loads(path.read_text())["processes"] == 2
    assert (tmp_path / "runs/saal/comparison.json").exists()


def test_train_says_what_makes_what_is_not_there(saal: Path, sidetask: Callable[..., Result]) -> None:
    done = sidetask("train", saal, "--row", "saal-e")
    assert done.exit_code == 2
    assert "no file of relations runs/saal/relations/relations.json; `sidetask relations` writes one" in done.stderr


def test_a_file_elsewhere_is_the_readers_own(saal: Path, tmp_path: Path) -> None:
    experiment = load_experiment(saal)
    assert reads_relations(experiment.at(tmp_path), tmp_path)
    assert not reads_relations(experiment.at(tmp_path / "other"), tmp_path)
    given = load_experiment(saal, ["rows.saal-e.method.relations=$folders/relations/relations.json"])
    assert given.at(tmp_path) == given


def test_presets_read_relations_of_their_own(tmp_path: Path) -> None:
    named = [name for name in presets() if "saal" in name]
    assert len(named) == 8
    for name in named:
        assert reads_relations(load_experiment(name).at(tmp_path / name), tmp_path / name), name


SMALL = {"name": "small", "widths": [4, 8], "head_width": 4}
TRAINING = {"epochs": 1, "batch_size": 4, "optimizer": {"name": "adam", "lr": 0.01}, "threads": 1}


def rooms(seed: int, task: str) -> dict[str, Any]:
    return {"name": "scenes", "size": [16, 24], "train": 8, "validation": 4, "test": 4, "seed": seed, "tasks": [task]}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """An experiment whose two pseudo tasks one teacher labels."""
    teacher = {"name": "teacher", "dataset": rooms(1, "segmentation"), "network": SMALL, "training": TRAINING}
    (tmp_path / "teacher.yaml").write_text(dump(teacher))
    labels = {"rooms": "$folder/labels/rooms", "patches": "$folder/labels/patches"}
    asked = {"experiment": "teacher.yaml", "task": "segmentation"}
    data = {
        "name": "student",
        "dataset": {"name": "pseudo", "of": rooms(0, "depth"), "labels": labels},
        "network": SMALL,
        "training": TRAINING,
        "teachers": {"rooms": {**asked, "threshold": 0.0}, "patches": {**asked, "kind": "tokens", "patch": 4}},
        "rows": {"equal": {}},
    }
    (tmp_path / "student.yaml").write_text(dump(data))
    return tmp_path / "student.yaml"


def test_a_teacher_is_trained_and_labels_first(student: Path, sidetask: Callable[..., Result]) -> None:
    done = sidetask("compare", student)
    assert done.exit_code == 0, done.output
    runs = Path("runs/student")
    assert [path.parent for path in runs.glob("teachers/**/result.json")] == [runs / "teachers/teacher/base/seed0"]
    found = json.loads((runs / "comparison.json").read_text())
    assert [task["name"] for task in found["tasks"]] == ["depth", "rooms", "patches"]
    files = sorted(runs.rglob("*.npz"))
    assert len(files) == 6
    before = [path.stat().st_mtime_ns for path in files]
    assert sidetask("compare", student).exit_code == 0
    assert [path.stat().st_mtime_ns for path in files] == before
    # A teacher that says otherwise is refused, until all is made again.
    other = ("--set", "teachers.rooms.threshold=0.5")
    refused = sidetask("compare", student, *other)
    assert refused.exit_code == 2
    assert "train.npz: holds segmentation above 0.0 of task 'segmentation'" in refused.stderr
    assert sidetask("compare", student, *other, "--overwrite").exit_code == 0
    assert all(path.stat().st_mtime_ns > time for path, time in zip(files, before, strict=True))


def test_a_teacher_is_of_a_pseudo_task(student: Path) -> None:
    content = read(student)
    content["teachers"]["room"] = content["teachers"].pop("rooms")
    with pytest.raises(ExperimentError, match=r"teachers\.room: unknown pseudo task; did you mean 'rooms'"):
        compare(load_experiment(dump_to(student, content)), student.parent)


def dump_to(path: Path, content: Any) -> Path:
    path.write_text(dump(content))
    return path


def test_the_small_experiment_with_pseudo_tasks_needs_nothing() -> None:
    for name in ("ial-nyuv2-pseudo-small", "scenes-pseudo"):
        experiment = load_experiment(name)
        assert list(experiment.teachers) == list(experiment.dataset.options["labels"])
        assert all(path.startswith("$folder/labels/") for path in experiment.dataset.options["labels"].values())
