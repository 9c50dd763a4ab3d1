"""MNIST's and Fashion-MNIST's idx files, tiny, sound and hostile."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy
import pytest
import torch
from sidetask_datasets import DataError, draws
from sidetask_datasets.digits import CLOTHES, digits, read_idx

COUNTS = {"train": 60, "t10k": 12}
FEW = {"train": 20, "validation": 8, "test": 8}


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder, compress=False):
    """Tiles whose pixels all have the number of the tile, of digit number mod 10."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 1
    for name, count in COUNTS.items():
        numbers = numpy.arange(start, start + count, dtype=numpy.uint8)
        start += count
        images = numpy.broadcast_to(numbers[:, None, None], (count, 28, 28))
        for stem, array in ((f"{name}-images-idx3-ubyte", images), (f"{name}-labels-idx1-ubyte", numbers % 10)):
            content = idx(array)
            (folder / (stem + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("source", "place"), [("mnist", ""), ("mnist", "MNIST/raw"), ("fashion", "FashionMNIST/raw")])
def test_what_was_written_is_paired(tmp_path, source, place, compress):
    write(tmp_path / place, compress)
    data = digits(**FEW, source=source, root=tmp_path)
    assert data.input_shape == (1, 36, 36)
    assert data.views["top_left"].classes == (CLOTHES if source == "fashion" else tuple("0123456789"))
    order = draws.permutation(draws.key(0, "digits"), 60) + 1
    pools = {"validation": set(order[:10].tolist()), "train": set(order[10:].tolist()), "test": set(range(61, 73))}
    for name, pool in pools.items():
        split = getattr(data, name)
        for image, *labels in zip(
            split.inputs.data[:, 0],
            *(split.targets[task].data.tolist() for task in ("top_left", "bottom_right")),
            strict=True,
        ):
            both = set(image.unique().tolist()) - {0}
            assert both <= pool
            assert len(both) == 1 or {number % 10 for number in both} == set(labels)
            # The first four rows are reached by the one tile alone, the last four by the other.
            for rows, label in ((image[:4], labels[0]), (image[32:], labels[1])):
                assert not rows.any() or int(rows.max()) % 10 == label


def test_statistics_fit_the_source(folder):
    mnist, fashion = (digits(**FEW, source=source, root=folder) for source in ("mnist", "fashion"))
    assert torch.equal(mnist.test.inputs.data, fashion.test.inputs.data)
    raw = mnist.test.inputs.data / 255
    torch.testing.assert_close(mnist.test[:].inputs, (raw - 0.1307) / 0.3081)
    torch.testing.assert_close(fashion.test[:].inputs, (raw - 0.2860) / 0.3530)


def fails(root, message, **options):
    with pytest.raises(DataError, match=message):
        digits(**FEW, source="mnist", root=root, **options)


def test_what_is_wrong_with_a_file_is_named(folder):
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    for content, message in (
        (whole[:-1], "has 47039 bytes of 47040"),
        (whole + b"x", "has more than 47040 bytes of 47040"),
        (whole[:9], "does not begin as an idx file of bytes in 3 dimensions"),
        (bytes([0, 0, 13, 3]) + whole[4:], "does not begin as an idx file of bytes in 3 dimensions"),
        (b"\x80\x04." + whole, "does not begin as an idx file"),
        (
            whole[:4] + struct.pack(">3I", 2**32 - 1, 28, 28) + whole[16:],
            r"N up to 100000, found \[4294967295, 28,",
        ),
        (idx(numpy.zeros((60, 20, 20), numpy.uint8)), r"expected shape \['N', 28, 28\].*, found \[60, 20, 20\]"),
        (idx(numpy.zeros((59, 28, 28), numpy.uint8)), "labels-idx1-ubyte: has 60 labels, .* has 59 images"),
    ):
        images.write_bytes(content)
        fails(folder, message)
    images.write_bytes(whole)
    labels.write_bytes(idx(numpy.full(60, 10, numpy.uint8)))
    fails(folder, r"train-labels-idx1-ubyte: label 10; there are 10 classes")
    labels.unlink()
    fails(folder, r"train-labels-idx1-ubyte\.gz: cannot be read: .*No such file")
    fails(folder / "nowhere", r"nowhere: holds no train-images-idx3-ubyte")


def test_a_file_that_swells_is_read_no_further_than_it_says(tmp_path):
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(numpy.zeros(5, numpy.uint8)) + bytes(50_000_000)))
    with pytest.raises(DataError, match="has more than 5 bytes of 5"):
        read_idx(path)


def test_another_shape_is_refused_before_anything_is_decompressed(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 40, 1024, 1024) + bytes(40 << 20), 1))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"found \[40, 1024, 1024\]"):
            read_idx(path, (28, 28))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compress", [False, True])
def test_damage_is_a_data_error_whatever_it_is(tmp_path, compress):
    write(tmp_path, compress)
    path = next(Path(tmp_path).glob("t10k-images*"))
    whole, errors = path.read_bytes(), 0
    generator = numpy.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(whole)
        for place in generator.integers(0, 40, 2):
            broken[place] = generator.integers(0, 256)
        path.write_bytes(broken[: generator.integers(1, len(broken))] if generator.random() < 0.3 else broken)
        try:
            assert read_idx(path, (28, 28)).ndim == 3
        except DataError:
            errors += 1
    assert errors > 50


@pytest.mark.parametrize(("source", "name"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_nothing_is_fetched_unless_asked(tmp_path, monkeypatch, source, name):
    import torchvision.datasets

    calls = []

    def fetch(root, download):
        calls.append((root, download))
        write(tmp_path / name / "raw")

    monkeypatch.setattr(torchvision.datasets, name, fetch)
    with pytest.raises(DataError, match="download=True fetches it"):
        digits(**FEW, source=source, root=tmp_path)
    assert not calls
    for _ in range(2):
        assert len(digits(**FEW, source=source, root=tmp_path, download=True).test) == 8
    assert calls == [(str(tmp_path), True)]


def test_what_is_wrong_with_several_files_comes_together(folder):
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (folder / name).write_bytes(b"short")
    with pytest.raises(DataError) as caught:
        digits(**FEW, source="mnist", root=folder)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        str(folder / "train-images-idx3-ubyte"),
        str(folder / "t10k-labels-idx1-ubyte"),
    ]
