"""CIFAR-100 in both of its formats, tiny, sound and hostile."""

import pickle
import struct
import sys
import tracemalloc
from functools import partial
from itertools import chain

import numpy
import pytest
import torch
from sidetask_datasets import DataError
from sidetask_datasets.cifar100_domains import MEAN, STD, TASKS, cifar100_domains, read_pickle

COUNTS = {"train": 100 * 4, "test": 100 * 2}


def make(split, generator):
    """Images of every fine class; class f belongs to domain 7 f mod 20."""
    fine = numpy.tile(numpy.arange(100), COUNTS[split] // 100)
    generator.shuffle(fine)
    pixels = generator.integers(0, 256, (len(fine), 3072)).astype(numpy.uint8)
    return pixels, (7 * fine % 20).astype(int), fine


def names(kind):
    return list(TASKS) if kind == "coarse" else [f"thing {i}" for i in range(100)]


def write_binary(folder, data):
    folder.mkdir(parents=True)
    for split, (pixels, coarse, fine) in data.items():
        records = numpy.concatenate([coarse[:, None], fine[:, None], pixels], axis=1).astype(numpy.uint8)
        records.tofile(folder / f"{split}.bin")
    for kind in ("coarse", "fine"):
        (folder / f"{kind}_label_names.txt").write_text("\n".join(names(kind)) + "\n\n")


def write_python(folder, data, encode=str.encode, protocol=2):
    folder.mkdir(parents=True)
    for split, (pixels, coarse, fine) in data.items():
        content = {"data": pixels, "coarse_labels": coarse.tolist(), "fine_labels": fine.tolist(), "batch_label": "x"}
        pickled = pickle.dumps({encode(k): v for k, v in content.items()}, protocol)
        # As numpy 1 wrote it, and with it those who made the files.
        (folder / split).write_bytes(pickled.replace(b"numpy._core", b"numpy.core") if protocol == 2 else pickled)
    meta = {encode(f"{kind}_label_names"): [encode(n) for n in names(kind)] for kind in ("coarse", "fine")}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol))


@pytest.fixture
def data(monkeypatch):
    monkeypatch.setattr(sys.modules["sidetask_datasets.cifar100_domains"], "COUNTS", COUNTS)
    generator = numpy.random.default_rng(0)
    return {split: make(split, generator) for split in COUNTS}


@pytest.fixture
def binary(tmp_path, data):
    write_binary(tmp_path / "cifar-100-binary", data)
    return tmp_path


def test_every_image_is_in_the_domain_of_its_coarse_class_and_in_one_split(binary, data):
    found = cifar100_domains(binary, validation=3)
    assert [task.name for task in found.tasks] == [task.input for task in found.tasks] == list(TASKS)
    assert (len(found.train), len(found.validation), len(found.test)) == (17, 3, 10)
    assert found.input_shape == (3, 32, 32)
    pixels, coarse, fine = data["train"]
    for c, name in enumerate(TASKS):
        mine = {pixels[i].tobytes(): fine[i] for i in numpy.flatnonzero(coarse == c)}
        expected = sorted({int(f) for f in mine.values()})
        assert found.views[name].classes == tuple(f"thing {f}" for f in expected)
        seen = []
        for split in (found.train, found.validation):
            part = split.parts[name]
            for image, label in zip(part.inputs.data, part.targets[name].data, strict=True):
                assert expected[label] == mine[image.numpy().tobytes()]
                seen.append(image.numpy().tobytes())
        assert sorted(seen) == sorted(mine)
    image = found.test.parts["fish"]
    raw = data["test"][0][numpy.flatnonzero(data["test"][1] == 1)].reshape(-1, 3, 32, 32) / 255
    expected = (raw - numpy.array(MEAN).reshape(3, 1, 1)) / numpy.array(STD).reshape(3, 1, 1)
    torch.testing.assert_close(image[:].inputs.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_what_is_held_out_depends_on_the_seed_alone(binary):
    def held(**options):
        return [cifar100_domains(binary, ["fish"], validation=5, **options).validation.parts["fish"].inputs.data]

    assert torch.equal(*chain(held(), held(seed=0)))
    assert not torch.equal(*chain(held(), held(seed=1)))


@pytest.mark.parametrize("options", [{"encode": str.encode}, {"encode": str}, {"encode": str, "protocol": 4}])
def test_the_python_version_gives_the_same(binary, data, tmp_path, options):
    folder = tmp_path / "other" / "cifar-100-python"
    write_python(folder, data, **options)
    one = cifar100_domains(binary, ["trees", "fish"], validation=3)
    for root in (folder, folder.parent):
        other = cifar100_domains(root, ["trees", "fish"], validation=3)
        assert other.views["fish"].classes == one.views["fish"].classes
        for split in ("train", "validation", "test"):
            for name in ("trees", "fish"):
                a, b = (getattr(found, split).parts[name] for found in (one, other))
                assert torch.equal(a.inputs.data, b.inputs.data)
                assert torch.equal(a.targets[name].data, b.targets[name].data)


def test_a_batch_holds_images_of_every_domain(binary):
    found = cifar100_domains(binary, validation=3, primary=["fish"])
    batch = next(found.train.batches(8))
    assert {tuple(image.shape) for image in batch.inputs.values()} == {(8, 3, 32, 32)}
    assert [task.name for task in found.tasks if task.primary] == ["fish"]
    loss, count = found.tasks[0].mean(torch.zeros(8, 5), batch.target_of(found.tasks[0]))
    assert (round(loss.item(), 4), count) == (1.6094, 8)


def fails(root, message, **options):
    with pytest.raises(DataError, match=message):
        cifar100_domains(root, **{"validation": 3, **options})


def test_what_is_wrong_with_a_file_is_named(binary, data):
    folder = binary / "cifar-100-binary"
    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(whole[:-1])
    fails(binary, r"train\.bin: expected 1229600 bytes, 400 images of 3074; found 1229599")
    (folder / "train.bin").write_bytes(bytes([0, 100]) + whole[2:])
    fails(binary, r"train\.bin: fine id 100; there are 100 fine classes")
    (folder / "train.bin").write_bytes(bytes([20]) + whole[1:])
    fails(binary, r"train\.bin: coarse id 20; there are 20 coarse classes")
    (folder / "train.bin").write_bytes(bytes([(whole[0] + 1) % 20]) + whole[1:])
    fails(binary, r"train\.bin: a coarse class does not have 5 fine classes of its own")
    (folder / "train.bin").write_bytes(whole)
    (folder / "coarse_label_names.txt").write_text("fish\nflowers\n")
    fails(binary, r"_label_names\.txt: the coarse classes are not CIFAR-100's: fish, flowers")
    (folder / "coarse_label_names.txt").unlink()
    fails(binary, r"coarse_label_names\.txt: cannot be read as text: .*No such file")
    (folder / "test.bin").unlink()
    (folder / "coarse_label_names.txt").write_text("\n".join(TASKS))
    fails(binary, r"test\.bin: cannot be read: .*No such file")
    fails(binary / "nowhere", r"nowhere: holds neither cifar-100-binary nor cifar-100-python")
    write_binary(binary / "new" / "cifar-100-binary", data)
    with pytest.raises(ValueError, match="fish: with 20 images, 20 for validation leave none"):
        cifar100_domains(binary / "new", ["fish"], validation=20)


def test_what_is_wrong_with_several_files_comes_together(binary):
    folder = binary / "cifar-100-binary"
    (folder / "test.bin").write_bytes(b"short")
    (folder / "coarse_label_names.txt").write_text("fish\n")
    (folder / "fine_label_names.txt").write_text("\n".join(names("fine")[:99]))
    with pytest.raises(DataError) as caught:
        cifar100_domains(binary)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        str(folder / name) for name in ("coarse_label_names.txt", "fine_label_names.txt", "test.bin")
    ]


def test_a_pickle_that_would_run_something_runs_nothing(tmp_path):
    sprung = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(sprung)!r}, 'w').close()",))

    class Deep:
        def __reduce__(self):
            return (getattr, (numpy.ndarray, "tofile"))

    path = tmp_path / "train"
    for trap, asked in ((Trap(), "builtins.exec"), ({"data": [Trap()]}, "builtins.exec"), (Deep(), "builtins.getattr")):
        path.write_bytes(pickle.dumps(trap))
        with pytest.raises(DataError, match=rf"train: cannot be read as a pickle of plain data: .*it asks for {asked}"):
            read_pickle(path)
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(sprung).encode() + b"'\ntR.")
    with pytest.raises(DataError, match=r"it asks for os\.system"):
        read_pickle(path)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "expected a mapping, found list"),
        ({"data": numpy.zeros((2, 3), numpy.float32)}, "'data' is no array of bytes"),
        ({"data": numpy.zeros((2, 3), numpy.uint8).T.copy(order="F")}, "'data' is no array of bytes"),
        ({"data": numpy.array([{}], object)}, "'data' is no array of bytes"),
    ],
)
def test_pickles_of_other_things_are_named(tmp_path, value, message):
    path = tmp_path / "train"
    path.write_bytes(pickle.dumps(value, 2))
    with pytest.raises(DataError, match=message):
        read_pickle(path)


def test_python_files_are_checked(tmp_path, data):
    folder = tmp_path / "cifar-100-python"
    write_python(folder, data)
    pixels, coarse, fine = data["train"]

    def write(**changes):
        content = {"data": pixels, "coarse_labels": coarse.tolist(), "fine_labels": fine.tolist()} | changes
        (folder / "train").write_bytes(pickle.dumps(content, 2))

    write(data=pixels[:3])
    fails(tmp_path, r"train: expected 'data' of shape \[400, 3072\], found \[3, 3072\]")
    write(data="text")
    fails(tmp_path, r"train: expected 'data' of shape \[400, 3072\], found str")
    write(fine_labels=fine.tolist()[:-1])
    fails(tmp_path, r"train: expected 'fine_labels', a list of 400 ids")
    write(coarse_labels=[-1] * 400)
    fails(tmp_path, "train: coarse ids from -1 to -1")
    (folder / "meta").write_bytes(pickle.dumps({"coarse_label_names": 3}))
    fails(tmp_path, "meta: expected 'coarse_label_names', a list of names")


@pytest.mark.parametrize("code", [pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8, pickle.FRAME])
def test_no_more_memory_is_taken_than_the_file_has(tmp_path, code):
    path = tmp_path / "train"
    path.write_bytes(b"\x80\x05" + code + struct.pack("<Q", 1 << 28) + b"x.")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="cannot be read as a pickle of plain data"):
            read_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_damaged_pickle_is_a_data_error_whatever_the_damage(tmp_path):
    generator = numpy.random.default_rng(0)
    content = {b"data": numpy.zeros((4, 6), numpy.uint8), b"fine_labels": [0, 1, 2, 3], b"names": [b"a", b"b"]}
    wholes = [pickle.dumps(content, protocol) for protocol in (2, 5)]
    path = tmp_path / "train"
    errors = 0
    for number in range(400):
        whole = wholes[number % 2]
        broken = bytearray(whole)
        for place in generator.integers(0, len(broken), generator.integers(1, 4)):
            broken[place] = generator.integers(0, 256)
        path.write_bytes(broken[: generator.integers(1, len(broken) + 1)] if generator.random() < 0.3 else broken)
        try:
            assert isinstance(read_pickle(path), dict)
        except DataError:
            errors += 1
    assert errors > 200


def test_nothing_is_fetched_unless_asked(tmp_path, data, monkeypatch):
    import torchvision.datasets

    calls = []

    def fetch(root, download):
        calls.append((root, download))
        write_python(tmp_path / "cifar-100-python", data)

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fetch)
    fails(tmp_path, "download=True fetches the latter")
    assert not calls
    assert len(cifar100_domains(tmp_path, ["fish"], validation=3, download=True).test) == 10
    assert calls == [(str(tmp_path), True)]
    cifar100_domains(tmp_path, ["fish"], validation=3, download=True)
    assert len(calls) == 1


def test_further_tasks_join_them(binary, check_further_tasks):
    check_further_tasks(partial(cifar100_domains, binary, TASKS[3:5], validation=3))
