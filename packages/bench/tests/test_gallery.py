import json

import numpy as np
import pytest
import torch
from PIL import Image
from sidetask_bench import gallery, load_experiment, load_run, records, train
from sidetask_bench.schema import ExperimentError

pytestmark = pytest.mark.thorough

DENSE = {"name": "scenes", "size": [16, 24], "train": 4, "validation": 2, "test": 5, "tasks": ["segmentation", "depth"]}
LABELS = {"name": "digits", "train": 16, "validation": 4, "test": 12}


def trained(folder, dataset):
    """A comparison of two rows, each trained for an epoch."""
    experiment = {
        "name": "tiny",
        "dataset": dataset,
        "network": {"name": "small", "widths": [4, 8]},
        "training": {"epochs": 1, "batch_size": 4, "threads": 1},
        "seeds": [0],
        "rows": {"single": {"network": {"cut": 0}}, "equal": {}},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(experiment))
    rows = []
    for row, (config,) in load_experiment(path).runs().items():
        train(config, folder / row / "seed0")
        runs = [{"seed": 0, "folder": f"{row}/seed0"}]
        rows.append(
            {"name": row, "runs": runs, "mean": {}, "std": {}, "improvement": {"mean": 0, "std": None, "values": [0]}}
        )
    data = {"baseline": "single", "improvement": "flat", "tasks": [], "rows": rows}
    (folder / "comparison.json").write_text(json.dumps(data))
    return records.load(folder)


def test_dense_predictions_beside_their_truths(tmp_path):
    comparison = trained(tmp_path, DENSE)
    found = gallery.collect(comparison)
    assert [(strip.task, strip.sample) for strip in found.strips] == [
        (task, sample) for task in DENSE["tasks"] for sample in (0, 2, 4)
    ]
    _, dataset, model = load_run(tmp_path / "equal" / "seed0")
    batch = dataset.test[2]
    strip = next(strip for strip in found.strips if (strip.task, strip.sample) == ("depth", 2))
    assert [picture.caption for picture in strip.pictures] == ["input", "truth", "single", "equal"]
    view = dataset.views["depth"]
    with torch.no_grad():
        predicted = model(batch.inputs)["depth"][0]
    shown = [dataset.show_input(batch.inputs[0]), view.image(batch.targets["depth"][0]), view.image(predicted)]
    for picture, pixels in zip([*strip.pictures[:2], strip.pictures[3]], shown, strict=True):
        np.testing.assert_array_equal(picture.pixels, pixels)
    present = {int(label) for index in (0, 2, 4) for label in dataset.test[index].targets["segmentation"].unique()}
    names = [name for name, _ in found.legends["segmentation"].classes]
    assert names == [dataset.views["segmentation"].classes[label] for label in sorted(present - {-1})]
    assert found.legends["depth"].limits == view.limits
    with Image.open(gallery.png(found, tmp_path / "gallery.png")) as image:
        assert image.width == round((1.5 * 4 + 0.5) * 150)


def test_labels_are_marked_right_or_wrong(tmp_path):
    found = gallery.collect(trained(tmp_path, LABELS), samples=4)
    _, dataset, model = load_run(tmp_path / "single" / "seed0")
    assert len(found.strips) == 2 * 4
    for strip in found.strips:
        batch = dataset.test[strip.sample]
        with torch.no_grad():
            predicted = int(model(batch.inputs)[strip.task].argmax())
        right = predicted == int(batch.targets[strip.task])
        assert strip.pictures[2].note == ("right" if right else "wrong")
        assert strip.kind == "label"


def test_a_run_without_a_network_is_named(tmp_path):
    comparison = trained(tmp_path, LABELS)
    (tmp_path / "equal" / "seed0" / "best.pt").unlink()
    with pytest.raises(ExperimentError, match="no trained network"):
        gallery.collect(comparison)


def test_large_pictures_are_thinned():
    pixels = np.zeros((300, 600, 3), np.uint8)
    assert gallery._thinned(pixels).shape == (100, 200, 3)
    assert gallery._thinned(pixels[:256, :256]).shape == (256, 256, 3)
