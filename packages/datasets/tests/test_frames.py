"""The folder layout `frames`: tiny trees in the exact format, sound and hostile."""

import contextlib
import io
import pickle
from functools import partial

import numpy
import pytest
import torch
from PIL import Image
from sidetask_datasets import DataError, frames
from sidetask_datasets.files import read_ids, read_picture

SIZE = (6, 8)
TRAIN, TEST = ["0003", "0004", "a-1", "b_2.x"], ["0001", "0002"]


def picture(array, mode=None):
    return Image.fromarray(array) if mode is None else Image.frombytes(mode, array.shape[::-1], array.tobytes())


def write_frame(root, id_, index, size=SIZE):
    generator = numpy.random.default_rng(index)
    colour = numpy.full((*size, 3), 40 * index + 20, numpy.uint8)
    picture(colour).save(root / "image" / f"{id_}.jpg", quality=95)
    label = generator.integers(0, 13, size).astype(numpy.uint8)
    label[0, 0] = 255
    picture(label).save(root / "label" / f"{id_}.png")
    depth = generator.integers(700, 40000, size).astype(numpy.uint16)
    depth[0, 0] = 0
    picture(depth, "I;16").save(root / "depth" / f"{id_}.png")
    vectors = generator.normal(size=(*size, 3))
    vectors /= numpy.linalg.norm(vectors, axis=-1, keepdims=True)
    normal = numpy.round(128 + 124 * vectors).astype(numpy.uint8)
    normal[0, 0] = 0
    picture(normal).save(root / "normal" / f"{id_}.png")
    return {"colour": colour, "label": label, "depth": depth, "vectors": vectors}


@pytest.fixture
def tree(tmp_path):
    for folder in ("image", "label", "depth", "normal"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train.txt").write_text("\n".join(TRAIN) + "\n\n")
    (tmp_path / "test.txt").write_text("\r\n".join(TEST))
    written = {id_: write_frame(tmp_path, id_, index) for index, id_ in enumerate(TRAIN + TEST)}
    return tmp_path, written


def test_what_was_written_is_read(tree):
    root, written = tree
    data = frames(root, validation=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (3, 1, 2)
    assert data.input_shape == (3, *SIZE)
    for split, ids in ((data.train, TRAIN[:3]), (data.validation, TRAIN[3:]), (data.test, TEST)):
        batch = split[range(len(ids))]
        for row, id_ in enumerate(ids):
            truth = written[id_]
            label = torch.from_numpy(truth["label"].astype(int))
            assert torch.equal(batch.targets["segmentation"][row], torch.where(label == 255, -1, label))
            depth = torch.from_numpy(truth["depth"].astype(numpy.float32)) / 1000
            torch.testing.assert_close(batch.targets["depth"][row, 0], depth)
            normals = torch.from_numpy(truth["vectors"]).permute(2, 0, 1).float()
            found = batch.targets["normals"][row]
            assert not found[:, 0, 0].any()
            torch.testing.assert_close(found[:, 1:], normals[:, 1:], rtol=0, atol=0.01)
            colour = torch.from_numpy(data.show_input(batch.inputs[row]).copy()).int()
            assert (colour - torch.from_numpy(truth["colour"]).int()).abs().max() <= 3


def test_losses_and_metrics_take_what_was_read(tree):
    data = frames(tree[0], validation=1, primary=["segmentation"])
    assert [(task.name, task.primary) for task in data.tasks] == [
        ("segmentation", True),
        ("depth", False),
        ("normals", False),
    ]
    batch = next(data.train.batches(3))
    for task in data.tasks:
        prediction = torch.randn(3, data.outputs[task.name], *SIZE)
        loss, count = task.mean(prediction, batch.target_of(task))
        assert loss.isfinite()
        assert 0 < count <= 3 * 48
        assert data.views[task.name].image(batch.target_of(task)[0]).shape == (*SIZE, 3)


def test_further_tasks_join_them(tree, check_further_tasks):
    check_further_tasks(partial(frames, tree[0], validation=1))


def test_only_the_folders_asked_for_are_read(tree):
    root, _ = tree
    for path in (root / "normal").iterdir():
        path.unlink()
    data = frames(root, ["depth"], validation=1)
    assert [task.name for task in data.tasks] == ["depth"]


def test_frames_are_resized_labels_by_the_nearest_pixel(tree):
    root, written = tree
    write_frame(root, "0004", 1, size=(12, 16))
    data = frames(root, validation=1, size=(3, 4))
    batch = data.train[0]
    assert batch.inputs.shape == (1, 3, 3, 4)
    label = torch.from_numpy(written["0003"]["label"].astype(int))[1::2, 1::2]
    assert torch.equal(batch.targets["segmentation"][0], torch.where(label == 255, -1, label))
    lengths = batch.targets["normals"].norm(dim=1)
    assert ((lengths < 1e-6) | ((lengths - 1).abs() < 1e-5)).all()
    assert frames(root, validation=1, size=(24, 32)).input_shape == (3, 24, 32)


def test_classes_may_have_other_names(tree):
    data = frames(tree[0], ["segmentation"], validation=1, classes=[f"class {i}" for i in range(20)])
    assert data.outputs == {"segmentation": 20}
    assert data.views["segmentation"].classes[19] == "class 19"


def fails(root, message, **options):
    with pytest.raises(DataError, match=message):
        frames(root, **{"validation": 1, **options})


@pytest.mark.parametrize("id_", ["../secret", "a/b", "..", ".hidden", "a..b", "a\\b", "/etc/passwd", "a b", "\x00"])
def test_an_id_cannot_leave_the_folder(tree, id_):
    root, _ = tree
    (root / "train.txt").write_text(f"0003\n{id_}\n")
    fails(root, r"train\.txt, line 2: .* is not an id")


def test_lists_are_checked(tree):
    root, _ = tree
    (root / "train.txt").write_text("0003\n0004\n0003\n")
    fails(root, r"train\.txt, line 3: '0003' is there already, in line 1")
    (root / "train.txt").write_text("0003\n0001\n0004\n")
    fails(root, r"test\.txt: '0001' is also in .*train\.txt \(1 shared\); splits must be disjoint")
    (root / "train.txt").write_text("\n \n")
    fails(root, r"train\.txt: holds no id")
    (root / "train.txt").write_bytes(b"\xff\xfe\x00")
    fails(root, r"train\.txt: cannot be read as text")
    (root / "train.txt").unlink()
    fails(root, r"train\.txt: cannot be read as text: .*No such file")


def test_a_missing_root_is_named(tmp_path):
    fails(tmp_path / "nowhere", r"nowhere: no such folder; it should hold train\.txt")


def test_nothing_left_to_train_on(tree):
    with pytest.raises(ValueError, match=r"with 4 samples, 4 for validation leave none to train on"):
        frames(tree[0], validation=4)


def test_missing_pictures_are_named_before_anything_is_decoded(tree):
    root, _ = tree
    (root / "label" / "a-1.png").unlink()
    fails(root, r"label/a-1\.png: no such file$")
    (root / "label" / "0001.png").unlink()
    fails(root, r"label/a-1\.png: no such file \(and 1 more problems\)\n.*label/0001\.png: no such file")


def test_wrong_pixels_are_named(tree):
    root, _ = tree
    label = root / "label" / "0004.png"
    picture(numpy.full(SIZE, 13, numpy.uint8)).save(label)
    fails(root, r"label/0004\.png: class id 13; there are 13 classes, and 255 is unlabelled")
    picture(numpy.zeros((*SIZE, 3), numpy.uint8)).save(label)
    fails(root, r"label/0004\.png: expected 8-bit grey pixels, found mode 'RGB'")
    picture(numpy.zeros((6, 9), numpy.uint8)).save(label)
    fails(root, r"label/0004\.png: expected 6×8 pixels, found 6×9")
    fails(root, r"label/0004\.png: expected 6×8 pixels, found 6×9", size=(3, 4))
    write_frame(root, "0004", 1, size=(12, 16))
    fails(root, r"image/0004\.jpg: expected 6×8 pixels, found 12×16")
    write_frame(root, "0004", 1)
    picture(numpy.zeros(SIZE, numpy.uint8)).save(root / "depth" / "0004.png")
    fails(root, r"depth/0004\.png: expected 16-bit grey pixels, found mode 'L'")


def test_files_in_disguise_are_refused_and_nothing_is_executed(tree):
    root, _ = tree
    path = root / "depth" / "0002.png"

    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(root / 'sprung')!r}, 'w').close()",))

    path.write_bytes(pickle.dumps(Trap()))
    fails(root, r"depth/0002\.png: cannot be decoded as PNG")
    assert not (root / "sprung").exists()
    bmp = io.BytesIO()
    picture(numpy.zeros(SIZE, numpy.uint8)).save(bmp, "BMP")
    path.write_bytes(bmp.getvalue())
    fails(root, r"depth/0002\.png: cannot be decoded as PNG")


def test_damaged_pictures_raise_a_data_error_whatever_the_damage(tree):
    root, _ = tree
    generator = numpy.random.default_rng(0)
    for path, kind in ((root / "depth" / "0001.png", "words"), (root / "image" / "0001.jpg", "colour")):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"0001\.(png|jpg): cannot be decoded"):
            read_picture(path, kind)
        for _ in range(60):
            broken = bytearray(whole)
            for place in generator.integers(0, len(broken), 4):
                broken[place] = generator.integers(0, 256)
            path.write_bytes(broken)
            # Some damage goes unseen; any other error than this one would end the test.
            with contextlib.suppress(DataError):
                assert read_picture(path, kind, original=SIZE).shape[:2] == SIZE


def test_a_loop_of_links_is_a_missing_file(tree):
    root, _ = tree
    path = root / "image" / "0001.jpg"
    path.unlink()
    path.symlink_to(path)
    fails(root, r"image/0001\.jpg: (no such file|cannot be)")


def test_an_id_too_long_for_a_file_is_named(tree):
    root, _ = tree
    (root / "train.txt").write_text("0003\n" + 300 * "a" + "\n")
    fails(root, "train.txt, line 2: an id of 300 characters")


def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes(b"\xef\xbb\xbf1\r\n2\r\n")
    assert read_ids(path) == ["1", "2"]


def test_ids_are_read_in_order(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("b\n\na\n  c  \n")
    assert read_ids(path) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["edges"]}, "unknown task 'edges'; there are: segmentation, depth, normals"),
        ({"size": (3,)}, "size is a height and a width"),
        ({"validation": 0}, "validation is a number of samples"),
        ({"primary": ["flow"]}, "unknown primary task 'flow'"),
        ({"noise": "off"}, "noise is true or false, found 'off'"),
    ],
)
def test_wrong_options_are_named(tree, options, message):
    with pytest.raises(ValueError, match=message):
        frames(tree[0], **{"validation": 1, **options})
