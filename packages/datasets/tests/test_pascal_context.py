"""PASCAL-Context's folders, tiny, sound and hostile."""

from functools import partial

import numpy
import pytest
import scipy.io
import torch
from PIL import Image
from sidetask_datasets import DataError, cache
from sidetask_datasets.adapter import find_source
from sidetask_datasets.cache import prepare
from sidetask_datasets.pascal_context import CLASSES, PARTS, pascal_context, pascal_context_source

SIZES = {"2008_000001": (6, 8), "2008_000002": (10, 7), "2009_3": (8, 8), "2010_000004": (9, 5), "2010_000005": (6, 8)}
TRAIN, VAL = list(SIZES)[:3], list(SIZES)[3:]
SHAPE = (10, 12)
TASKS = ("segmentation", "human_parts", "normals", "saliency", "edges")


def png(path, array):
    Image.fromarray(array).save(path)


def anno(objects):
    """What PASCAL's part annotations hold: a struct of an image name and objects, each with masks of parts."""
    made = numpy.zeros((1, len(objects)), [("class", "O"), ("class_ind", "O"), ("mask", "O"), ("parts", "O")])
    for index, (class_ind, mask, parts) in enumerate(objects):
        found = numpy.zeros((1, len(parts)), [("part_name", "O"), ("mask", "O")]) if parts else numpy.zeros((0, 0))
        for place, (name, part) in enumerate(parts):
            found[0, place] = (name, part)
        made[0, index] = ("thing", float(class_ind), mask, found)
    outer = numpy.zeros((1, 1), [("imname", "O"), ("objects", "O")])
    outer[0, 0] = ("name", made)
    return {"anno": outer}


def write_one(root, id_, index):
    size = SIZES[id_]
    generator = numpy.random.default_rng(index)
    truth = {"image": numpy.full((*size, 3), 30 * index + 20, numpy.uint8)}
    Image.fromarray(truth["image"]).save(root / "JPEGImages" / f"{id_}.jpg", quality=95)
    truth["segmentation"] = generator.integers(0, 21, size).astype(numpy.uint8)
    truth["segmentation"][0, 0] = 255
    png(root / "semseg/VOC12" / f"{id_}.png", truth["segmentation"])
    truth["normals"] = generator.integers(0, 256, (*size, 3)).astype(numpy.uint8)
    png(root / "normals_distill" / f"{id_}.png", truth["normals"])
    truth["saliency"] = generator.integers(0, 256, size).astype(numpy.uint8)
    png(root / "sal_distill" / f"{id_}.png", truth["saliency"])
    labels = numpy.full(size, 440, numpy.uint16)  # a wall, whose normals count
    labels[:, 4:] = 360  # the sky, whose do not
    labels[3:, :2] = 158
    truth["labels"] = labels
    compress = index % 2 == 0
    scipy.io.savemat(root / "pascal-context/trainval" / f"{id_}.mat", {"LabelMap": labels}, do_compression=compress)
    head, foot = numpy.zeros(size, numpy.uint8), numpy.zeros(size, numpy.uint8)
    head[:2, 1:3], foot[-1, :] = 1, 1
    person = (15, head | foot, [("hair", head), ("rfoot", foot)])
    other = (12, numpy.ones(size, numpy.uint8), [("head", numpy.ones(size, numpy.uint8))])
    truth["human_parts"] = head + 6 * foot
    objects = {0: [person, other], 1: [other], 2: [(15, head, [])]}.get(index, [other, person])
    if index in (1, 2):
        truth["human_parts"] = numpy.full(size, 255, numpy.uint8)
    scipy.io.savemat(root / "human_parts" / f"{id_}.mat", anno(objects), do_compression=not compress)
    return truth


@pytest.fixture
def tree(tmp_path):
    folders = (
        "JPEGImages semseg/VOC12 human_parts normals_distill sal_distill pascal-context/trainval ImageSets/Context"
    )
    for folder in folders.split():
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Context/train.txt").write_text("\n".join(TRAIN) + "\n")
    (tmp_path / "ImageSets/Context/val.txt").write_text("\n".join(VAL) + "\n")
    return tmp_path, {id_: write_one(tmp_path, id_, index) for index, id_ in enumerate(SIZES)}


def framed(array, fill):
    """By hand: in the middle, rounded up and left."""
    height, width = array.shape[:2]
    out = numpy.full((*SHAPE, *array.shape[2:]), fill, numpy.int64)
    top, left = (SHAPE[0] - height) // 2, (SHAPE[1] - width) // 2
    out[top : top + height, left : left + width] = array
    return out


def unlabelled(array):
    return torch.from_numpy(numpy.where(array == 255, -1, array))


def test_what_was_written_is_read(tree):
    root, truths = tree
    data = pascal_context(root, size=SHAPE, validation=1)
    assert [task.name for task in data.tasks] == list(TASKS)
    assert data.outputs == {"segmentation": 21, "human_parts": 7, "normals": 3, "saliency": 1, "edges": 1}
    assert data.views["segmentation"].classes == CLASSES
    assert data.views["human_parts"].classes == PARTS
    for split, ids in ((data.train, TRAIN[:2]), (data.validation, TRAIN[2:]), (data.test, VAL)):
        assert len(split) == len(ids)
        batch = split[range(len(ids))]
        for row, id_ in enumerate(ids):
            truth = truths[id_]
            found = {name: batch.targets[name][row] for name in TASKS}
            assert torch.equal(found["segmentation"], unlabelled(framed(truth["segmentation"], 255)))
            assert torch.equal(found["human_parts"], unlabelled(framed(truth["human_parts"], 255)))
            assert torch.equal(found["saliency"][0], unlabelled(framed(truth["saliency"] / 255 > 0.5, 255)))
            vectors = truth["normals"] / 127.5 - 1
            vectors /= numpy.linalg.norm(vectors, axis=-1, keepdims=True)
            vectors[truth["labels"] == 360] = 0
            expected = numpy.zeros((*SHAPE, 3))
            top, left = ((a - b) // 2 for a, b in zip(SHAPE, SIZES[id_], strict=True))
            expected[top : top + SIZES[id_][0], left : left + SIZES[id_][1]] = vectors
            torch.testing.assert_close(
                found["normals"].double(), torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-6
            )
            edges = numpy.zeros(SIZES[id_], int)
            edges[:, 3] = edges[3:, 1] = edges[2, :2] = 1
            assert torch.equal(found["edges"][0], unlabelled(framed(edges, 255)))
            image = torch.from_numpy(data.show_input(batch.inputs[row]).copy()).int()
            colour = framed(truth["image"], -1)
            around = numpy.array([124, 116, 104])
            difference = image - torch.from_numpy(numpy.where(colour < 0, around, colour))
            assert difference.abs().max() <= 3


def test_losses_and_metrics_take_what_was_read(tree):
    data = pascal_context(tree[0], size=SHAPE, validation=1, primary=["saliency"], noise=True)
    assert [task.primary for task in data.tasks] == [False, False, False, True, False, False]
    batch = next(data.train.batches(2))
    for task in data.tasks:
        prediction = torch.randn(2, data.outputs[task.name], *SHAPE)
        loss, count = task.mean(prediction, batch.target_of(task))
        assert loss.isfinite()
        assert count > 0
        for metric in task.metrics.values():
            metric.update(prediction, batch.target_of(task))
            assert metric.compute().isfinite()
        assert data.views[task.name].image(batch.target_of(task)[0]).shape == (*SHAPE, 3)


def test_larger_pictures_are_brought_down_in_proportion(tree):
    root, truths = tree
    data = pascal_context(root, ["segmentation", "edges"], size=(5, 5), validation=1)
    found = data.train[1].targets["segmentation"][0]  # 10×7 becomes 5×4
    whole = truths[TRAIN[1]]["segmentation"].astype(int)
    rows, columns = [1, 3, 5, 7, 9], [0, 2, 4, 6]
    expected = torch.from_numpy(whole[rows][:, columns])
    assert torch.equal(found[:, :4], expected)
    assert (found[:, 4] == -1).all()
    assert (data.train[1].targets["edges"] == 1).any()


def test_the_other_folder_of_classes_serves_too(tree):
    root, _ = tree
    expected = pascal_context(root, ["segmentation"], size=SHAPE, validation=1).test[:].targets["segmentation"]
    (root / "semseg/VOC12").rename(root / "semseg/pascal-context")
    found = pascal_context(root, ["segmentation"], size=SHAPE, validation=1).test[:].targets["segmentation"]
    assert torch.equal(found, expected)


def fails(root, message, **options):
    with pytest.raises(DataError, match=message):
        pascal_context(root, **{"validation": 1, "size": SHAPE, **options})


def test_what_is_wrong_with_a_file_is_named(tree):
    root, _ = tree
    id_ = TRAIN[0]
    png(root / f"semseg/VOC12/{id_}.png", numpy.full((6, 8), 21, numpy.uint8))
    png(root / f"sal_distill/{id_}.png", numpy.zeros((6, 8, 3), numpy.uint8))
    scipy.io.savemat(root / f"pascal-context/trainval/{id_}.mat", {"LabelMap": numpy.zeros((5, 8))})
    scipy.io.savemat(root / f"human_parts/{id_}.mat", anno([(15, 0, [("wing", numpy.zeros((6, 8)))])]))
    scipy.io.savemat(root / f"human_parts/{TRAIN[1]}.mat", anno([(15, 0, [("hair", numpy.zeros((6, 8)))])]))
    scipy.io.savemat(root / f"human_parts/{TRAIN[2]}.mat", {"anno": numpy.zeros((2, 2))})
    scipy.io.savemat(root / f"pascal-context/trainval/{TRAIN[1]}.mat", {"Other": numpy.zeros((10, 7))})
    scipy.io.savemat(root / f"pascal-context/trainval/{TRAIN[2]}.mat", {"LabelMap": numpy.full((8, 8), 460)})
    with pytest.raises(DataError) as caught:
        pascal_context(root, size=SHAPE, validation=1)
    for message in (
        f"semseg/VOC12/{id_}.png: class id 21; there are 21 classes",
        f"sal_distill/{id_}.png: expected 8-bit grey pixels, found mode 'RGB'",
        f"trainval/{id_}.mat: expected LabelMap of 6×8 ids, found uint8 [5, 8]",
        f"human_parts/{id_}.mat: unknown part of a person 'wing'",
        f"human_parts/{TRAIN[1]}.mat: expected a mask of 10×7 pixels, found [6, 8]",
        f"human_parts/{TRAIN[2]}.mat: 'anno' is not what PASCAL's part annotations are",
        f"trainval/{TRAIN[1]}.mat: has no variable 'LabelMap'",
        f"trainval/{TRAIN[2]}.mat: an id that is not between 0 and 459",
    ):
        assert message in str(caught.value).replace("float64", "uint8")


def test_lists_and_missing_files_are_named(tree):
    root, _ = tree
    (root / f"human_parts/{VAL[0]}.mat").unlink()
    path = root / f"normals_distill/{VAL[0]}.png"
    path.unlink()
    path.symlink_to(path)
    fails(root, rf"human_parts/{VAL[0]}\.mat: no such file .*\n.*normals_distill/{VAL[0]}\.png: no such file")
    (root / "ImageSets/Context/train.txt").write_text("../../secret\n")
    fails(root, r"train\.txt, line 1: '../../secret' is not an id")
    (root / "ImageSets/Context/train.txt").write_text(f"{TRAIN[0]}\n{VAL[0]}\n")
    fails(root, r"val\.txt: '2010_000004' is also in")
    (root / "ImageSets/Context/train.txt").write_text(f"{TRAIN[0]}\n")
    fails(root, "with 1 samples, 1 for validation leave none to train on", tasks=["segmentation"])
    fails(root / "nowhere", r"train\.txt: cannot be read as text")


def test_only_the_files_asked_for_are_needed(tree):
    root, _ = tree
    for path in (root / "human_parts").iterdir():
        path.unlink()
    source = pascal_context_source(root, ["segmentation", "normals"], size=SHAPE)
    assert not source.problems
    assert list(source.fields) == ["image", "segmentation", "normals"]


def test_what_was_prepared_is_not_decoded_again(tree, monkeypatch):
    options = {"size": SHAPE, "validation": 1, "normals_loss": "cosine"}
    prepare(find_source(pascal_context, tree[0], options))
    monkeypatch.setattr(cache, "_decode", None)
    assert len(pascal_context(tree[0], **options).train)


def test_further_tasks_join_them(tree, check_further_tasks):
    check_further_tasks(partial(pascal_context, tree[0], size=SHAPE, validation=1))
