"""A task's metric class by class of another's labels, against a loop over points; weights of classes in the records."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from sidetask_bench import ExperimentError, compare, load_experiment, report, train
from sidetask_bench.assemble import make_dataset
from sidetask_bench.breakdown import Breakdown, _class_of, by_class
from sidetask_bench.config import Plugin
from sidetask_bench.records import by_class as read_by_class
from sidetask_bench.records import load, shaper_weights
from sidetask_bench.run import load_run
from sidetask_core import SplitModel, Task
from torch import nn

OPTIONS = {"size": [12, 16], "train": 8, "validation": 4, "test": 6, "tasks": ["depth", "segmentation", "normals"]}


def scenes():
    return make_dataset(Plugin("scenes", OPTIONS))


def model(dataset):
    torch.manual_seed(0)
    heads = {task.name: nn.Conv2d(4, dataset.outputs[task.name], 1) for task in dataset.tasks}
    return SplitModel(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), heads)


@pytest.mark.parametrize("task", ["depth", "normals"])
def test_each_class_has_the_metric_of_its_points(task):
    dataset, batches = scenes(), []
    net = model(dataset)
    found = by_class(net, dataset, {task: Breakdown("segmentation")}, dataset.test, 4)[task]
    assert found["by"] == "segmentation"
    batches = list(dataset.test.batches(6, shuffle=False, augment=False, drop_last=False))
    (batch,) = batches
    prediction = net(batch.inputs)[task].detach()
    labels, target = batch.targets["segmentation"], batch.targets[task]
    seen = 0
    for c, name in enumerate(dataset.views["segmentation"].classes):
        values = []
        for n, y, x in (labels == c).nonzero().tolist():
            p, t = prediction[n, :, y, x].double(), target[n, :, y, x].double()
            if task == "depth" and t > 0:
                values.append(float((p - t).abs()))
            elif task == "normals" and t.any():
                values.append(math.degrees(math.acos(float(p @ t / p.norm() / t.norm()))))
        if values:
            assert found["classes"][name] == pytest.approx(np.mean(values), rel=1e-5)
            seen += 1
        else:
            assert math.isnan(found["classes"][name])
    assert seen > 4


def test_a_continuous_label_is_cut_at_its_edges():
    dataset = scenes()
    net = model(dataset)
    whole = {"segmentation": Breakdown("depth", (2.0, 3.5))}
    found = by_class(net, dataset, whole, dataset.test, 3)["segmentation"]["classes"]
    (batch,) = dataset.test.batches(6, shuffle=False, augment=False, drop_last=False)
    truth, depth = batch.targets["segmentation"], batch.targets["depth"][:, 0]
    right = net(batch.inputs)["segmentation"].argmax(dim=1) == truth
    # Mean IoU, the headline metric, over the points of one bin.
    for name, points in (
        ("< 2", (depth > 0) & (depth < 2)),
        ("2 to 3.5", (depth >= 2) & (depth < 3.5)),
        (">= 3.5", depth >= 3.5),
    ):
        some = points & (truth >= 0)
        guess = net(batch.inputs)["segmentation"].argmax(dim=1)[some]
        shares = [
            float(((guess == c) & (truth[some] == c)).sum() / either)
            for c in range(13)
            if (either := ((guess == c) | (truth[some] == c)).sum())
        ]
        assert found[name] == pytest.approx(np.mean(shares), rel=1e-6)
    assert right.any()


def test_no_bin_holds_what_is_no_number():
    task = Task("depth", lambda p, y: (p - y).abs())
    labels = torch.tensor([0.5, math.nan, 3.0, math.inf])
    assert _class_of(task, labels, (1.0, 2.0)).tolist() == [0, -1, 2, 2]


@pytest.mark.parametrize(
    ("breakdown", "message"),
    [
        ("{deph: {by: segmentation}}", "breakdown.deph: unknown task; did you mean 'depth'"),
        ("{depth: {by: segm}}", "breakdown.depth.by.segm: unknown task"),
        ("{depth: {by: depth}}", "breakdown.depth.by.depth: unknown task"),
        ("{segmentation: {by: depth}}", "breakdown.segmentation.edges: missing"),
        ("{depth: {by: segmentation, edges: [1.0]}}", "breakdown.depth.edges: task 'segmentation' has classes already"),
        ("{segmentation: {by: depth, edges: [2.0, 1.0]}}", "edges ascend"),
    ],
)
def test_what_cannot_be_broken_down_is_said_before_training(breakdown, message, tmp_path):
    with pytest.raises(ExperimentError, match=message):
        train(load_experiment("scenes-classwise", [f"breakdown={breakdown}", *small()]).run(None, 0), tmp_path / "run")


def small():
    options = {"train": 8, "validation": 4, "test": 4, "size": [16, 16]}
    return [f"dataset.{key}={value}" for key, value in options.items()] + [
        "training.epochs=2",
        "training.batch_size=4",
        "network.widths=[4, 4]",
    ]


@pytest.mark.thorough
def test_a_run_records_it_and_a_report_shows_it(tmp_path):
    experiment = load_experiment("scenes-classwise", [*small(), "rows={single: {network: {cut: 0}}, equal: {}}"])
    compare(experiment, tmp_path / "c", seeds=[0, 1])
    # Weights of classes, as a shaper would name them.
    for run in (tmp_path / "c" / "equal").iterdir():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line["shapers"] = {"segmentation": {"floor": 1.0 + line["epoch"], "wall": 0.5}}
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    comparison = load(tmp_path / "c")
    (found,) = read_by_class(comparison)
    assert (found.task, found.by) == ("depth", "segmentation")
    for row in ("single", "equal"):
        for seed in (0, 1):
            folder = tmp_path / "c" / row / f"seed{seed}"
            _, dataset, net = load_run(folder)
            again = by_class(net, dataset, experiment.breakdown, dataset.test, 4)["depth"]["classes"]
            np.testing.assert_allclose(found.values[row][seed], [again[name] for name in found.classes], rtol=1e-5)
    # Table and CSV have the means over the seeds, class by class.
    lines = (tmp_path / "c" / "table.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("## depth absolute ↓ by class of segmentation")
    assert lines[start + 2] == "| segmentation | single | equal |"
    assert [line.split(" | ")[0][2:] for line in lines[start + 4 :] if line] == found.classes
    for c, line in enumerate(lines[start + 4 : start + 4 + len(found.classes)]):
        for cell, row in zip(line.strip("| ").split(" | ")[1:], ("single", "equal"), strict=True):
            mean, std = map(float, cell.split(" ± "))
            values = found.values[row][:, c]
            np.testing.assert_allclose([mean, std], [values.mean(), values.std(ddof=1)], atol=1e-3)
    scattered = list(csv.DictReader((tmp_path / "c" / "table.csv").read_text(encoding="utf-8").splitlines()))
    name = f"absolute, segmentation: {found.classes[0]}"
    (one,) = [float(line["mean"]) for line in scattered if line["row"] == "equal" and line["metric"] == name]
    assert one == pytest.approx(found.values["equal"][:, 0].mean())
    curves = shaper_weights(comparison)
    assert curves["single"] == {}
    assert curves["equal"]["segmentation"]["floor"].mean.tolist() == [1.0, 2.0]
    text = report.write(tmp_path / "c").read_text(encoding="utf-8")
    assert "depth by class of segmentation" in text
    assert "Weights of classes" in text
    assert {"shapers.png", "by_class_0.png"} <= {path.name for path in (tmp_path / "c" / "pictures").iterdir()}
