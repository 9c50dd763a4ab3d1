"""Cityscapes in each of its layouts: tiny trees in the exact format, sound and hostile."""

from functools import partial

import numpy
import pytest
import torch
from PIL import Image
from sidetask_datasets import DataError, cityscapes
from sidetask_datasets.cityscapes import CLASSES, parts_of
from sidetask_datasets.files import DataErrors

SIZE = (4, 8)
IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
COUNTS = {"train": 5, "val": 2}


def sample(generator, size=SIZE):
    semantic = generator.choice([*IDS, 0, 4, 29, 255], size).astype(numpy.uint8)
    disparity = generator.integers(1, 32000, size).astype(numpy.uint16)
    disparity[0, 0] = 0
    uids = generator.choice([7, 24, 24001, 2400103, 2500104, 2600101, 2799905, 2600109, 3300102], size)
    return {
        "image": generator.integers(0, 256, (*size, 3), dtype=numpy.uint8),
        "segmentation": semantic,
        "part_segmentation": uids.astype(numpy.int32),
        "disparity": disparity,
    }


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.dtype == numpy.uint16:
        Image.frombytes("I;16", array.shape[::-1], array.tobytes()).save(path)
    else:
        Image.fromarray(array).save(path)


PICTURES = {
    "image": "{split}/image/{id}.png",
    "segmentation": "{split}/seg/{id}.png",
    "part_segmentation": "{split}/part_seg/{id}.tif",
    "disparity": "{split}/depth/{id}.png",
}
OFFICIAL = {
    "image": "leftImg8bit/{split}/{city}/{city}_{id}_leftImg8bit.png",
    "segmentation": "gtFine/{split}/{city}/{city}_{id}_gtFine_labelIds.png",
    "part_segmentation": "gtFinePanopticParts/{split}/{city}/{city}_{id}_gtFinePanopticParts.tif",
    "disparity": "disparity/{split}/{city}/{city}_{id}_disparity.png",
}
CITIES = {"train": ("aachen", "bochum"), "val": ("ulm",)}


def write(root, patterns, size=SIZE):
    generator = numpy.random.default_rng(0)
    written = {}
    for split, count in COUNTS.items():
        for index in range(count):
            city = CITIES[split][index % len(CITIES[split])]
            arrays = sample(generator, size)
            for name, array in arrays.items():
                save(root / patterns[name].format(split=split, id=index, city=city), array)
            written[split, city, index] = arrays
    return written


def check(data, written, order, scale):
    for split, keys in order.items():
        batch = getattr(data, split)[range(len(keys))]
        for row, key in enumerate(keys):
            truth = written[key]
            expected = [[IDS.index(i) if i in IDS else -1 for i in line] for line in truth["segmentation"].tolist()]
            assert batch.targets["segmentation"][row].tolist() == expected
            assert (batch.targets["part_segmentation"][row].numpy() == parts_of(truth["part_segmentation"])).all()
            pixels = numpy.where(truth["disparity"] > 0, truth["disparity"].astype(float) - 1, 0) * scale
            numpy.testing.assert_allclose(batch.targets["disparity"][row, 0], pixels, rtol=1e-6)
            assert (data.show_input(batch.inputs[row]) == truth["image"]).all()


def test_pictures_are_read(tmp_path):
    written = write(tmp_path, PICTURES)
    data = cityscapes(tmp_path, validation=2)
    train = [key for key in written if key[0] == "train"]
    order = {"train": train[:3], "validation": train[3:], "test": [key for key in written if key[0] == "val"]}
    check(data, written, order, 8 / 2048 / 256)
    assert [task.name for task in data.tasks] == ["segmentation", "part_segmentation", "disparity"]
    assert data.outputs == {"segmentation": 19, "part_segmentation": 10, "disparity": 1}
    batch = data.train[[0, 1]]
    for task in data.tasks:
        assert task.mean(torch.randn(2, data.outputs[task.name], *SIZE), batch.target_of(task))[0].isfinite()
        assert data.views[task.name].image(batch.target_of(task)[0]).shape == (*SIZE, 3)


def test_the_official_tree_is_paired_by_name_over_cities(tmp_path):
    written = write(tmp_path, OFFICIAL, (8, 16))
    folder = tmp_path / "gtFine" / "train" / "aachen"
    (folder / "aachen_0_gtFine_polygons.json").write_text("{}")
    save(folder / "aachen_0_gtFine_instanceIds.png", written["train", "aachen", 0]["disparity"])
    data = cityscapes(tmp_path, validation=1, size=(8, 16))
    train = sorted(key for key in written if key[0] == "train")
    order = {"train": train[:4], "validation": train[4:], "test": [("val", "ulm", 0), ("val", "ulm", 1)]}
    check(data, written, order, 16 / 2048 / 256)
    half = cityscapes(tmp_path, ["segmentation", "disparity"], validation=1, size=(4, 8))
    near = half.train[0].targets["disparity"][0, 0]
    torch.testing.assert_close(near, data.train[0].targets["disparity"][0, 0, 1::2, 1::2] / 2)
    assert cityscapes(tmp_path, ["disparity"], validation=1).input_shape == (3, 256, 512)


@pytest.mark.parametrize("classes", [19, 7])
def test_arrays_of_two_tasks_are_read(tmp_path, classes):
    generator = numpy.random.default_rng(0)
    label = "label_7" if classes == 7 else "label"
    written = {}
    for split, count in COUNTS.items():
        for name in ("image", "label", "label_7", "depth"):
            (tmp_path / split / name).mkdir(parents=True)
        for index in range(count):
            arrays = {
                "image": generator.random((*SIZE, 3), dtype=numpy.float32),
                "label": generator.integers(-1, 19, SIZE),
                "label_7": generator.integers(-1, 7, SIZE).astype(numpy.float64),
                "depth": generator.random((*SIZE, 1)) * 0.4,
            }
            arrays["depth"][0, 0] = 0
            for name, array in arrays.items():
                numpy.save(tmp_path / split / name / f"{index}.npy", array)
            written[split, index] = arrays
    data = cityscapes(tmp_path, validation=1, classes=classes)
    assert data.outputs == {"segmentation": classes, "disparity": 1}
    batch = data.test[[0, 1]]
    for row in range(2):
        assert (batch.targets["segmentation"][row].numpy() == written["val", row][label]).all()
        depth = written["val", row]["depth"][..., 0].astype(numpy.float32)
        assert (batch.targets["disparity"][row, 0].numpy() == depth).all()
    with pytest.raises(DataError, match="the layout of arrays has no parts"):
        cityscapes(tmp_path, ["part_segmentation"])


def test_panoptic_ids_as_the_protocol_has_them():
    """Every class with every part, of one instance and of another, against the rule read digit by digit."""
    for semantic in range(34):
        for part in (*range(12), 99):
            expected = 0
            if semantic in (24, 25) and 1 <= part <= 4:
                expected = part
            elif semantic in (26, 27, 28) and 1 <= part <= 5:
                expected = part + 4
            for instance in (0, 17, 999):
                uid = int(f"{semantic}{instance:03d}{part:02d}")
                if uid > 99_999:
                    assert parts_of(numpy.array([uid]))[0] == expected
            assert parts_of(numpy.array([semantic, semantic * 1000 + 999])).tolist() == [0, 0]


def test_training_ids_are_those_of_the_protocol():
    assert len(CLASSES) == len(IDS) == 19


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("seg/1.png", numpy.full(SIZE, 34, numpy.uint8), "label id 34; they are 0 to 33, and 255"),
        ("seg/1.png", numpy.zeros((4, 9), numpy.uint8), "expected 4×8 pixels, found 4×9"),
        ("part_seg/1.tif", numpy.full(SIZE, 10**7, numpy.int32), "panoptic id 10000000; they have at most 7 digits"),
        ("part_seg/1.tif", numpy.full(SIZE, -1, numpy.int32), "panoptic id -1"),
        ("part_seg/1.tif", numpy.zeros(SIZE, numpy.float32), "expected integer pixels, found mode 'F'"),
        ("depth/1.png", numpy.zeros(SIZE, numpy.uint8), "expected 16-bit grey pixels, found mode 'L'"),
        ("image/1.png", numpy.zeros(SIZE, numpy.uint8), "expected 8-bit RGB pixels, found mode 'L'"),
    ],
)
def test_wrong_pixels_are_named(tmp_path, name, array, message):
    write(tmp_path, PICTURES)
    save(tmp_path / "train" / name, array)
    with pytest.raises(DataError, match=rf"train/{name}: {message}"):
        cityscapes(tmp_path, validation=1)


def test_trees_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(DataError, match="holds none of Cityscapes' layouts"):
        cityscapes(tmp_path)
    write(tmp_path, OFFICIAL)
    (tmp_path / OFFICIAL["disparity"].format(split="train", id=1, city="bochum")).unlink()
    (tmp_path / "leftImg8bit" / "train" / "aachen" / "odd.png").write_bytes(b"")
    with pytest.raises(DataErrors) as caught:
        cityscapes(tmp_path)
    first, second = caught.value.problems
    assert first.endswith("aachen/odd.png: does not belong here; files are ID_leftImg8bit.png")
    assert second.endswith("bochum/bochum_1_disparity.png: no such file")
    with pytest.raises(ValueError, match="classes is 19 or 7, found 8"):
        cityscapes(tmp_path, classes=8)
    with pytest.raises(DataError, match="7 categories are in the layout of arrays only"):
        cityscapes(tmp_path, classes=7)


@pytest.mark.filterwarnings("ignore")
def test_truncated_pictures_are_named(tmp_path):
    write(tmp_path, PICTURES)
    for name in ("part_seg/0.tif", "depth/0.png"):
        path = tmp_path / "train" / name
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataErrors) as caught:
        cityscapes(tmp_path, validation=1)
    assert [problem.split(": ")[0].split("train/")[1] for problem in caught.value.problems] == [
        "depth/0.png",
        "part_seg/0.tif",
    ]


def test_further_tasks_join_them(tmp_path, check_further_tasks):
    write(tmp_path, PICTURES)
    check_further_tasks(partial(cityscapes, tmp_path, validation=2))
