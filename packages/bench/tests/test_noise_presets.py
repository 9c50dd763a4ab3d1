import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sidetask_bench import Experiment, compare, load_experiment, report, train
from sidetask_bench.assemble import make_dataset
from sidetask_core import Batch, Report, Step

from .test_run import KILLED

pytestmark = pytest.mark.thorough

TASKS = ["segmentation", "depth", "normals", "noise"]
# 4 steps an epoch, 3 epochs.
TINY = [
    "dataset.size=[16, 24]",
    "dataset.train=16",
    "dataset.validation=6",
    "dataset.test=6",
    "network={name: small, widths: [4, 8], head_width: 4}",
    "training.epochs=3",
    "training.batch_size=4",
]
ROWS = list(load_experiment("scenes-noise").rows)


def tiny(*changes: str) -> Experiment:
    return load_experiment("scenes-noise", [*TINY, *changes])


def weights(folder: Path) -> list[dict[str, dict[str, float]]]:
    return [json.loads(line) for line in (folder / "weights.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A folder of frames, each of one grey."""
    root = tmp_path / "frames"
    kinds = {"image": ("RGB", "jpg"), "label": ("L", "png"), "depth": ("I;16", "png"), "normal": ("RGB", "png")}
    for split, ids in (("train", range(12)), ("test", range(12, 16))):
        root.mkdir(exist_ok=True)
        (root / f"{split}.txt").write_text("\n".join(map(str, ids)))
        for kind, (mode, ending) in kinds.items():
            (root / kind).mkdir(exist_ok=True)
            for i in ids:
                grey = {"RGB": (9 * i, 9 * i, 9 * i + 1), "L": i % 13, "I;16": 500 * i + 500}[mode]
                Image.new(mode, (24, 16), grey).save(root / kind / f"{i}.{ending}")
    return root


@pytest.mark.parametrize("name", ["scenes-noise", "frames-noise"])
def test_noise_alone_is_auxiliary_and_each_lambda_can_move_as_in_the_paper(name: str, frames: Path) -> None:
    experiment = load_experiment(name)
    assert list(experiment.rows) == ["equal", "uncertainty", "autolambda", "autolambda-online"] == ROWS
    if name == "frames-noise":
        small = {"root": str(frames), "validation": 4}
    else:
        small = {"train": 4, "validation": 2, "test": 2}
    options = experiment.dataset.options | small
    data = make_dataset(type(experiment.dataset)(experiment.dataset.name, options))
    assert [(task.name, task.primary) for task in data.tasks] == [(task, task != "noise") for task in TASKS]
    samples = experiment.dataset.options.get("train", 795 - 159)
    for row, when in (("autolambda", "before"), ("autolambda-online", "online")):
        method, training = experiment.run(row, 0).method, experiment.run(row, 0).training
        assert method["when"] == when
        assert method["lr"] * training.epochs * (samples // training.batch_size) == pytest.approx(4, rel=0.05)
        assert training.lookahead == "train"


def test_a_comparison_shows_what_noise_weighs(tmp_path: Path) -> None:
    comparison = compare(tiny("seeds=[0]", "training.epochs=1"), tmp_path)
    assert not comparison["failed"]
    assert [(task["name"], task["primary"]) for task in comparison["tasks"]][-1] == ("noise", False)
    for row in ROWS:
        lines = weights(tmp_path / row / "seed0")
        assert len(lines) == 4
        assert all(list(line["encoder"]) == TASKS for line in lines)
        assert all(line["encoder"] == line["decoder"] for line in lines)
        moves = row.startswith("autolambda")
        assert (len({json.dumps(line["encoder"]) for line in lines}) > 1) is (row != "equal")
        if moves:  # Adam's first step is as long as its learning rate, whatever the derivative is
            step = load_experiment("scenes-noise").run(row, 0).method["lr"]
            first = next(line["encoder"] for line in lines if line["encoder"]["depth"] != pytest.approx(0.1))
            assert all(abs(value - 0.1) == pytest.approx(step, rel=1e-3) for value in first.values())
    page = report.write(tmp_path).read_text("utf-8")
    assert "noise" in page
    assert (tmp_path / "pictures" / "weights.png").exists()


def test_folders_of_frames_take_it(frames: Path, tmp_path: Path) -> None:
    data = ["dataset.size=[16, 24]", "dataset.validation=4", f"dataset.root={frames}"]
    changes = [*data, *TINY[4:], "training.epochs=1"]
    train(load_experiment("frames-noise", changes).run("autolambda", 0), tmp_path / "run")
    (first, *_) = weights(tmp_path / "run")
    assert list(first["encoder"]) == TASKS


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["training.lookahead=validation"],
        ["rows.autolambda.method.when=after", "rows.autolambda.method.every=2"],
        ["rows.autolambda.method.when=online"],
        ["rows.autolambda.method.when=online", "rows.autolambda.method.every=3"],
        ["rows.autolambda.method.sample=2", "training.accumulate=2"],
        ["rows.autolambda.method={encoder: autolambda, decoder: uncertainty}"],
        ["rows.autolambda.method={name: autolambda, lr: 0.1, constraint: softmax}", "training.optimizer=sgd"],
        ["dataset.stream=true"],
    ],
    ids=lambda changes: " ".join(changes) or "preset",
)
def test_an_interrupted_run_with_auto_lambda_ends_as_if_it_had_not(
    tmp_path: Path, outcome: Any, monkeypatch: pytest.MonkeyPatch, changes: list[str]
) -> None:
    config = tiny("training.checkpoint_every=2", *changes).run("autolambda", 1)
    train(config, tmp_path / "whole")
    backward, left = Step.backward, 6

    def interrupted(step: Step, batch: Batch, **kwargs: Any) -> Report:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return backward(step, batch, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "resumed")
    train(config, tmp_path / "resumed")
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("row", ["autolambda", "autolambda-online"])
def test_a_killed_run_of_the_preset_ends_as_if_it_had_not(
    row: str, tmp_path: Path, python: Callable[..., Any], outcome: Any
) -> None:
    changes = ["training.checkpoint_every=3"]
    config = tiny(*changes).run(row, 0)
    train(config, tmp_path / "whole")
    sets = [word for change in [*TINY, *changes] for word in ("--set", change)]
    # Before any checkpoint; two steps after one; while one is half written.
    points = "backward:2 backward:6 checkpoint:2"
    done = python("-c", KILLED, points, str(tmp_path / "killed"), "scenes-noise", "--row", row, *sets)
    assert done.returncode == 0, done.stderr
    assert 0 < len(weights(tmp_path / "killed")) < 12
    train(config, tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
