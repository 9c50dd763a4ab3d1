"""A trained run labels images, and an experiment trains on what it said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sidetask_bench import Experiment, ExperimentError, compare, label, load_experiment, load_run, report, train
from sidetask_bench.cli import app
from sidetask_bench.document import dump
from typer.testing import CliRunner

pytestmark = pytest.mark.thorough

SMALL = {"name": "small", "widths": [4, 8], "head_width": 4}
TRAINING = {"epochs": 1, "batch_size": 4, "optimizer": {"name": "adam", "lr": 0.01}, "threads": 1}


def rooms(seed: int, *tasks: str) -> dict[str, Any]:
    counts = {"train": 8, "validation": 4, "test": 4}
    return {"name": "scenes", "size": [16, 24], **counts, "seed": seed, "tasks": list(tasks)}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """The folder of a run that knows segmentation and depth, of rooms with seed 1."""
    data = {"name": "teacher", "dataset": rooms(1, "segmentation", "depth"), "network": SMALL, "training": TRAINING}
    (tmp_path / "teacher.yaml").write_text(dump(data))
    train(load_experiment(tmp_path / "teacher.yaml").run(None, 0), tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def student(tmp_path: Path) -> Callable[..., Experiment]:
    """An experiment on rooms with seed 0, where only depth is known, and labels in folders of a name each."""

    def build(**folders: str) -> Experiment:
        labels = {name: str(tmp_path / folder) for name, folder in folders.items()}
        dataset = {"name": "pseudo", "of": rooms(0, "depth"), "labels": labels}
        rows = {"single": {"network": {"cut": 0}}, "equal": None}
        data = {"name": "student", "dataset": dataset, "network": SMALL, "training": TRAINING, "rows": rows}
        (tmp_path / "student.yaml").write_text(dump(data))
        return load_experiment(tmp_path / "student.yaml")

    return build


def labels_of(folder: Path, split: str = "train") -> Any:
    with np.load(folder / f"{split}.npz", allow_pickle=False) as archive:
        return archive["labels"]


def test_an_experiment_trains_on_what_a_run_said(
    tmp_path: Path, teacher: Path, student: Callable[..., Experiment]
) -> None:
    experiment = student(rooms="rooms", patches="patches", image="image")
    for kind, folder in (("segmentation", "rooms"), ("tokens", "patches"), ("soft", "image")):
        label(teacher, tmp_path / folder, task="segmentation", of=experiment.dataset, kind=kind, threshold=0.1, patch=4)
    assert labels_of(tmp_path / "rooms").shape == (8, 16, 24)
    assert labels_of(tmp_path / "patches").shape == (8, 13, 4, 6)
    assert labels_of(tmp_path / "image", "test").shape == (4, 13)
    mean = labels_of(tmp_path / "patches").astype(float).mean(axis=(2, 3))
    np.testing.assert_allclose(labels_of(tmp_path / "image"), mean, atol=2e-3)
    comparison = compare(experiment, tmp_path / "student")
    assert [task["name"] for task in comparison["tasks"]] == ["depth", "rooms", "patches", "image"]
    for row in comparison["rows"]:
        assert set(row["mean"]["patches"]) == {"agreement"}
        assert 0 <= row["mean"]["image"]["agreement"] <= 1
    page = report.write(tmp_path / "student").read_text()
    assert "agreement" in page
    assert "The likeliest class" in page
    config, dataset, model = load_run(tmp_path / "student/equal/seed0")
    assert set(model.heads) == {"depth", "rooms", "patches", "image"}
    assert config.dataset.options["of"]["name"] == "scenes"
    assert [task.primary for task in dataset.tasks] == [True, False, False, False]


def test_the_command(tmp_path: Path, teacher: Path, student: Callable[..., Experiment]) -> None:
    student(rooms="rooms")
    arguments = ["label", teacher, tmp_path / "rooms", "--task", "segmentation", "--of", tmp_path / "student.yaml"]

    def run(*more: str) -> Any:
        return CliRunner().invoke(app, [*map(str, arguments), *more])

    done = run("--threshold", "0")
    assert done.exit_code == 0, done.output
    assert (labels_of(tmp_path / "rooms") != 255).all()
    before = (tmp_path / "rooms/train.npz").stat().st_mtime_ns
    assert run("--threshold", "0").exit_code == 0
    assert (tmp_path / "rooms/train.npz").stat().st_mtime_ns == before
    for more, asked in (
        (("--threshold", "0.9"), "segmentation above 0.9 of"),
        (("--kind", "tokens"), "tokens of task"),
    ):
        other = run(*more)
        assert other.exit_code == 2
        assert "train.npz: holds segmentation above 0.0 of task 'segmentation' of SplitModel" in other.stderr
        assert asked in other.stderr
    arguments[2] = tmp_path / "own"
    del arguments[-2:]
    assert run().exit_code == 0
    assert run("--kind", "boxes").exit_code == 2
    arguments[2] = tmp_path / "rooms"
    other = run()
    assert other.exit_code == 2
    assert "train.npz: its labels are of other images" in other.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "segmentatoin"}, "segmentatoin: unknown task; did you mean 'segmentation'"),
        ({"task": "depth"}, "task 'depth' has no classes"),
        ({"run": "nowhere"}, "nowhere has no trained network"),
        ({"kind": "tokens", "patch": 5}, "--patch: patches of 5×5 do not divide images of 16×24 pixels"),
        ({"kind": "tokens", "patch": 16}, "--patch: patches of 16×16 do not divide images of 16×24 pixels"),
        ({"kind": "tokens", "patch": 0}, "--patch: patches of 0×0 do not divide images of 16×24 pixels"),
        ({"threshold": 1.0}, "threshold is a probability, at least 0 and below 1, not 1.0"),
    ],
)
def test_what_cannot_label(tmp_path: Path, teacher: Path, changes: dict[str, Any], message: str) -> None:
    options = {"run": teacher, "task": "segmentation", **changes}
    with pytest.raises(ExperimentError, match=message):
        label(options.pop("run"), tmp_path / "labels", **options)
    assert not (tmp_path / "labels").exists()


def test_patches_of_another_size_are_other_labels(tmp_path: Path, teacher: Path) -> None:
    label(teacher, tmp_path / "labels", task="segmentation", kind="tokens", patch=4)
    label(teacher, tmp_path / "labels", task="segmentation", kind="tokens", patch=4)
    with pytest.raises(ExperimentError, match=r"holds tokens of .* in patches of 4, not tokens of .* in patches of 8"):
        label(teacher, tmp_path / "labels", task="segmentation", kind="tokens", patch=8)


def test_images_of_another_size(tmp_path: Path, teacher: Path, student: Callable[..., Experiment]) -> None:
    data = json.loads(json.dumps({"name": "big", "dataset": rooms(0, "depth") | {"size": [32, 32]}, "network": SMALL}))
    (tmp_path / "big.yaml").write_text(dump(data))
    with pytest.raises(ExperimentError, match=r"sees images \[3, 16, 24\], those to label are \[3, 32, 32\]"):
        label(teacher, tmp_path / "labels", task="segmentation", of=load_experiment(tmp_path / "big.yaml").dataset)
    with pytest.raises(ExperimentError, match=r"dataset.*train.npz: no such file"):
        train(student(rooms="rooms").run(None, 0), tmp_path / "student")
