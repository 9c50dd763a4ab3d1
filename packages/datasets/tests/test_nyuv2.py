"""NYUv2 in each of its layouts: tiny trees in the exact format, sound and hostile."""

import pickle
from functools import partial
from pathlib import Path

import h5py
import numpy
import pytest
import torch
from scipy.io import savemat
from sidetask_datasets import DataError, matlab, nyuv2
from sidetask_datasets.cache import prepare
from sidetask_datasets.files import DataErrors
from sidetask_datasets.nyuv2 import _read_depths, nyuv2_source

from .test_frames import TEST, TRAIN, write_frame

SIZE = (6, 8)
COUNTS = {"train": 12, "val": 3}
DTYPES = [(numpy.float32, numpy.int64), (numpy.float64, numpy.float32)]


def write_arrays(root, floats=numpy.float32, integers=numpy.int64, test="val"):
    generator = numpy.random.default_rng(0)
    written = {}
    for split, count in COUNTS.items():
        folder = test if split == "val" else split
        for name in ("image", "label", "depth", "normal"):
            (root / folder / name).mkdir(parents=True)
        for index in range(count):
            vectors = generator.normal(size=(*SIZE, 3))
            vectors /= numpy.linalg.norm(vectors, axis=-1, keepdims=True)
            vectors[0, 0] = 0
            arrays = {
                "image": generator.random((*SIZE, 3)).astype(floats),
                "label": generator.integers(-1, 13, SIZE).astype(integers),
                "depth": generator.random((*SIZE, 1)).astype(floats) * 9,
                "normal": vectors.astype(floats),
            }
            arrays["depth"][0, 0] = 0
            for name, array in arrays.items():
                numpy.save(root / folder / name / f"{index}.npy", array)
            written[split, index] = arrays
    return written


@pytest.fixture
def arrays(tmp_path):
    root = tmp_path / "nyuv2"
    return root, write_arrays(root)


@pytest.mark.parametrize(("floats", "integers"), DTYPES)
@pytest.mark.parametrize("test", ["val", "test"])
def test_arrays_are_read_whatever_their_types(tmp_path, floats, integers, test):
    written = write_arrays(tmp_path, floats, integers, test)
    data = nyuv2(tmp_path, validation=2)
    assert (data.name, len(data.train), len(data.validation), len(data.test)) == ("nyuv2", 10, 2, 3)
    order = [("train", index) for index in range(12)]
    for split, keys in (
        (data.train, order[:10]),
        (data.validation, order[10:]),
        (data.test, [("val", index) for index in range(3)]),
    ):
        batch = split[range(len(keys))]
        for row, key in enumerate(keys):
            truth = written[key]
            label = torch.from_numpy(truth["label"].astype(int))
            assert torch.equal(batch.targets["segmentation"][row], label)
            depth = torch.from_numpy(truth["depth"][..., 0].astype(numpy.float32))
            assert torch.equal(batch.targets["depth"][row, 0], depth)
            normal = torch.from_numpy(truth["normal"]).permute(2, 0, 1).float()
            torch.testing.assert_close(batch.targets["normals"][row], normal, rtol=0, atol=1e-4)
            shown = torch.from_numpy(data.show_input(batch.inputs[row]).copy()).float()
            assert (shown / 255 - torch.from_numpy(truth["image"])).abs().max() < 0.0025


def test_arrays_are_resized(arrays):
    root, written = arrays
    data = nyuv2(root, validation=2, size=(3, 4))
    batch = data.train[0]
    assert batch.inputs.shape == (1, 3, 3, 4)
    assert (batch.targets["segmentation"][0].numpy() == written["train", 0]["label"][1::2, 1::2]).all()
    assert (batch.targets["depth"][0, 0].numpy() == written["train", 0]["depth"][1::2, 1::2, 0]).all()


def test_splits_share_no_frame(arrays):
    data = nyuv2(arrays[0], validation=2)
    inputs = torch.cat([split[range(len(split))].inputs for split in (data.train, data.validation, data.test)])
    assert len(inputs.flatten(1).unique(dim=0)) == 15


def test_the_frames_layout_is_known(tmp_path):
    for folder in ("image", "label", "depth", "normal"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train.txt").write_text("\n".join(TRAIN))
    (tmp_path / "test.txt").write_text("\n".join(TEST))
    for index, id_ in enumerate(TRAIN + TEST):
        write_frame(tmp_path, id_, index)
    assert len(nyuv2(tmp_path, validation=1).train) == 3


def bad(value, dtype=numpy.float32, channels=()):
    array = numpy.full((*SIZE, *channels), 0.5, dtype)
    array.flat[0] = value
    return array


HOSTILE = {
    "NaN depth": ("depth", bad(numpy.nan, channels=(1,)), "holds values that are not finite"),
    "negative depth": ("depth", bad(-1.0, channels=(1,)), "not negative, found -1"),
    "depth beyond single precision": (
        "depth",
        bad(1e300, numpy.float64, (1,)),
        "holds values that are not finite in single precision",
    ),
    "class beyond any integer": ("label", bad(1e300, numpy.float64), "expected whole numbers, found 1e"),
    "normal beyond double precision when squared": ("normal", bad(1e300, numpy.float64, (3,)), "one of length inf"),
    "infinite normal": ("normal", bad(numpy.inf, channels=(3,)), "not finite"),
    "long normal": ("normal", bad(2.0, channels=(3,)), "expected unit vectors, found one of length 2"),
    "short normals": ("normal", numpy.full((*SIZE, 3), 0.03), "unit vectors, found a median length of 0.05196"),
    "class out of range": ("label", bad(13, numpy.int64), "class id 13; there are 13 classes"),
    "class below -1": ("label", bad(-2, numpy.int64), "class id -2; -1 is unlabelled"),
    "half a class": ("label", bad(1.5), "expected whole numbers, found 1.5"),
    "NaN class": ("label", bad(numpy.nan), "not finite"),
    "bright image": ("image", bad(3.0, channels=(3,)), "values between 0 and 1, found 0.5 to 3"),
    "integer image": ("image", bad(3, numpy.int32, (3,)), "expected uint8, or floats between 0 and 1, found int32"),
    "text": ("depth", numpy.full(SIZE, "a"), "expected numbers, found <U1"),
    "complex numbers": ("depth", bad(1j, numpy.complex64), "expected numbers, found complex64"),
    "another size": ("depth", numpy.zeros((6, 9, 1)), r"expected shape \[6, 8\], found \[6, 9\]"),
    "channels first": ("image", numpy.zeros((3, *SIZE)), r"expected shape \[6, 8, 3\], found \[3, 6, 8\]"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_wrong_values_are_named_with_their_file(arrays, case):
    root, _ = arrays
    folder, array, message = HOSTILE[case]
    numpy.save(root / "train" / folder / "4.npy", array)
    with pytest.raises(DataError, match=rf"train/{folder}/4\.npy: .*{message}"):
        nyuv2(root, validation=2)


def test_a_pickle_is_never_opened(arrays):
    root, _ = arrays

    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(root / 'sprung')!r}, 'w').close()",))

    path = root / "train" / "depth" / "4.npy"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"depth/4\.npy: cannot be read as an array"):
        nyuv2(root, validation=2)
    numpy.save(path, numpy.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"depth/4\.npy: cannot be read as an array"):
        nyuv2(root, validation=2)
    with path.open("wb") as file:
        numpy.savez(file, a=numpy.zeros(3))
    with pytest.raises(DataError, match=r"depth/4\.npy: cannot be read as an array: it is an archive"):
        nyuv2(root, validation=2)
    # A header that promises far more than the file holds must not be believed.
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6, 1)}
        numpy.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(DataError, match=r"depth/4\.npy: cannot be read as an array"):
        nyuv2(root, validation=2)
    assert not (root / "sprung").exists()


def test_every_problem_of_the_tree_is_listed_before_anything_is_decoded(arrays, own_cache):
    root, _ = arrays
    (root / "train" / "label" / "3.npy").unlink()
    (root / "val" / "depth" / "7.npy").write_bytes(b"")
    (root / "train" / "image" / "notes.txt").write_text("x")
    loop = root / "train" / "normal" / "5.npy"
    loop.unlink()
    loop.symlink_to(loop)
    with pytest.raises(DataErrors) as caught:
        nyuv2(root, validation=2)
    text = "\n".join(caught.value.problems)
    for expected in (
        "train/label/3.npy: no such file",
        "val/image/7.npy: no such file",
        "train/image/notes.txt: does not belong here; files are ID.npy",
        "train/normal/5.npy: no such file",
    ):
        assert expected in text
    assert not list(own_cache.rglob("*.npy"))


def test_a_damaged_first_image_hides_no_other_problem(arrays):
    root, written = arrays
    (root / "train" / "image" / "0.npy").write_bytes(b"damaged")
    (root / "train" / "label" / "3.npy").unlink()
    numpy.save(root / "train" / "depth" / "5.npy", -written["train", 5]["depth"] - 1)
    with pytest.raises(DataErrors) as caught:
        prepare(nyuv2_source(root))
    found = [problem.removeprefix(f"{root}/").split(": ")[0] for problem in caught.value.problems]
    assert found == ["train/label/3.npy", "train/depth/5.npy", "train/image/0.npy"]
    for path in (root / "train" / "image", root / "val" / "image"):
        for file in path.iterdir():
            file.write_bytes(b"damaged")
    with pytest.raises(DataErrors) as caught:
        prepare(nyuv2_source(root))
    assert len(caught.value.problems) == 1 + 11 + 3


def test_images_without_pixels_are_refused(arrays):
    root, _ = arrays
    for path in root.rglob("*.npy"):
        numpy.save(path, numpy.zeros((0, 8, 3)))
    with pytest.raises(DataErrors, match=r"image/0\.npy: expected an array \[H, W, ...\] of some pixels"):
        nyuv2(root, validation=2)


@pytest.mark.filterwarnings("ignore")
def test_bytes_changed_at_random_raise_nothing_else(arrays):
    root, _ = arrays
    from sidetask_datasets.mtan import read_image, read_normals, read_positive

    generator = numpy.random.default_rng(1)
    for folder, read in (("depth", read_positive), ("image", read_image), ("normal", read_normals)):
        path = root / "train" / folder / "0.npy"
        whole = path.read_bytes()
        for _ in range(100):
            broken = bytearray(whole)
            for place in generator.integers(0, 140, 3):
                broken[place] = generator.integers(0, 256)
            path.write_bytes(broken[: generator.integers(1, len(broken) + 1)])
            try:
                assert read(path, shape=SIZE).shape[-2:] == SIZE
            except DataError as error:
                assert str(error).startswith(str(path))  # noqa: PT017 -- some damage goes unseen


def test_unreadable_and_missing_folders_are_named(arrays, tmp_path):
    root, _ = arrays
    with pytest.raises(DataError, match="holds none of NYUv2's layouts"):
        nyuv2(tmp_path / "nowhere")
    for path in (root / "train" / "depth").iterdir():
        path.unlink()
    (root / "train" / "depth").rmdir()
    (root / "train" / "depth").write_text("no folder")
    with pytest.raises(DataError, match="train/depth: cannot be read as a folder"):
        nyuv2(root, validation=2)
    with pytest.raises(DataError, match="with 12 samples, 12 for validation leave none to train on"):
        nyuv2(root, ["segmentation"], validation=12)


OFFICIAL = (480, 640)


def write_official(root, count=5):
    generator = numpy.random.default_rng(0)
    forty = generator.integers(1, 41, 894)
    thirteen = generator.integers(0, 14, 40)
    labels = generator.integers(0, 895, (count, *OFFICIAL[::-1])).astype(numpy.uint16)
    images = generator.integers(0, 256, (count, 3, *OFFICIAL[::-1]), dtype=numpy.uint8)
    depths = generator.random((count, *OFFICIAL[::-1]), dtype=numpy.float32) * 9
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        for name, array in (("images", images), ("labels", labels), ("depths", depths)):
            file.create_dataset(name, data=array, chunks=(1, *array.shape[1:]), compression=1)
    savemat(root / "splits.mat", {"trainNdxs": [[5], [1], [2]], "testNdxs": [[3], [4]]})
    savemat(root / "classMapping40.mat", {"mapClass": forty[None], "className": numpy.array([["a"]], dtype=object)})
    savemat(root / "class13Mapping.mat", {"classMapping13": {"labels": thirteen[None], "name": "thirteen"}})
    ids = numpy.concatenate([[0], thirteen])[numpy.concatenate([[0], forty])].astype(int) - 1
    return images, labels, depths, ids


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    return root, write_official(root)


def test_the_official_file_is_read_with_its_split_and_classes(official):
    root, (images, labels, depths, ids) = official
    data = nyuv2(root, ["segmentation", "depth"], validation=1, size=OFFICIAL)
    assert (len(data.train), len(data.validation), len(data.test)) == (2, 1, 2)
    for split, numbers in ((data.train, [5, 1]), (data.validation, [2]), (data.test, [3, 4])):
        batch = split[range(len(numbers))]
        for row, number in enumerate(numbers):
            assert (batch.targets["segmentation"][row].numpy() == ids[labels[number - 1].T]).all()
            assert (batch.targets["depth"][row, 0].numpy() == depths[number - 1].T).all()
            shown = data.show_input(batch.inputs[row])
            assert (shown == images[number - 1].transpose(2, 1, 0)).all()
    assert nyuv2(root, ["depth"], validation=1).input_shape == (3, 288, 384)


def test_the_official_file_has_no_normals(official):
    with pytest.raises(DataError, match=r"labeled\.mat: has no normals; the official file is for"):
        nyuv2(official[0], validation=1)


def copied(official, tmp_path, *names):
    root, _ = official
    for name in {path.name for path in root.iterdir()} - set(names):
        (tmp_path / name).symlink_to(root / name)
    return tmp_path


def test_depths_of_the_official_file_beyond_single_precision_are_refused(monkeypatch):
    monkeypatch.setattr(matlab, "read_row", lambda *_: numpy.full(OFFICIAL[::-1], 1e300))
    with pytest.raises(DataError, match=r"labeled\.mat: holds values that are not finite in single precision"):
        _read_depths(Path("nyu_depth_v2_labeled.mat"), 0, size=OFFICIAL)


def test_hostile_lists_and_mappings_are_named(official, tmp_path):
    root = copied(official, tmp_path, "splits.mat", "classMapping40.mat")

    def fails(message):
        with pytest.raises(DataError, match=message):
            nyuv2(root, ["segmentation"], validation=1)

    fails(r"splits\.mat: cannot be read as a MATLAB file")
    savemat(root / "splits.mat", {"trainNdxs": [1, 2, 3], "testNdxs": [3, 4]})
    fails(r"splits\.mat: frame 3 is in both splits")
    savemat(root / "splits.mat", {"trainNdxs": [1, 2, 9], "testNdxs": [3, 4]})
    fails(r"splits\.mat: trainNdxs are not different numbers from 1 to 5")
    savemat(root / "splits.mat", {"trainNdxs": [1, 2, 5]})
    fails(r"splits\.mat: has no testNdxs")
    (root / "splits.mat").write_bytes(pickle.dumps({"trainNdxs": [1]}))
    fails(r"splits\.mat: cannot be read as a MATLAB file of version 5")
    savemat(root / "splits.mat", {"trainNdxs": [1, 2, 5], "testNdxs": [3, 4]})
    savemat(root / "classMapping40.mat", {"mapClass": numpy.arange(17)})
    fails(r"classMapping40\.mat: expected one vector of 894 whole numbers, found 0")
    savemat(root / "classMapping40.mat", {"mapClass": numpy.full(894, 41)})
    fails(r"classMapping40\.mat: expected classes 1 to 40, found 41")


def test_a_hostile_official_file_is_named(official, tmp_path):
    name = "nyu_depth_v2_labeled.mat"
    root = copied(official, tmp_path, name)
    path = root / name

    def fails(message):
        with pytest.raises(DataError, match=rf"labeled\.mat: {message}"):
            nyuv2(root, ["depth"], validation=1)

    path.write_bytes((official[0] / name).read_bytes()[:5000])
    fails("cannot be read as a MATLAB file of version 7.3")
    with h5py.File(path, "w") as file:
        file["images"] = h5py.ExternalLink(str(official[0] / name), "images")
    fails("has no array 'images' of its own")
    with h5py.File(path, "w") as file:
        file["images"] = numpy.zeros((5, 3, 4, 4), numpy.uint8)
        file["depths"] = numpy.zeros((5, 4, 4))
    with pytest.raises(DataErrors, match=r"images: expected \[None, 3, 640, 480\], found uint8 \[5, 3, 4, 4\]"):
        nyuv2(root, ["depth"], validation=1)


def test_further_tasks_join_them(arrays, check_further_tasks):
    check_further_tasks(partial(nyuv2, arrays[0], validation=2))
