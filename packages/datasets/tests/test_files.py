"""What may not be read is named, whoever asks."""

import errno
import os
import struct
from pathlib import Path

import numpy
import pytest
from PIL import Image
from sidetask_datasets import (
    DataError,
    celeba,
    cifar100_domains,
    cityscapes,
    digits,
    frames,
    nyuv2,
    pascal_context,
    rlbench,
    virtual_kitti,
)
from sidetask_datasets.files import is_file, is_folder, missing, read_picture

READERS = {
    "nyuv2": nyuv2,
    "celeba": celeba,
    "cityscapes": cityscapes,
    "cifar100_domains": cifar100_domains,
    "frames": frames,
    "pascal_context": pascal_context,
    "rlbench": lambda root: rlbench(root, ["reach_target"]),
    "virtual_kitti": virtual_kitti,
    "digits": lambda root: digits(source="mnist", root=root),
}


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """A folder that may not be entered; to an administrator, no folder of the disk is one."""
    folder = tmp_path / "closed"
    folder.mkdir()

    def refuse(real):
        def guarded(path, *args, **kwargs):
            if (folder == Path(path) and real is os.listdir) or folder in Path(path).parents:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        return guarded

    monkeypatch.setattr(Path, "stat", refuse(Path.stat))
    monkeypatch.setattr(Path, "open", refuse(Path.open))
    monkeypatch.setattr(os, "listdir", refuse(os.listdir))
    return folder


@pytest.mark.parametrize("name", READERS)
def test_a_folder_that_may_not_be_entered_is_a_data_error(closed, name):
    with pytest.raises(DataError, match=r"closed.*: .*Permission denied"):
        READERS[name](closed)


@pytest.mark.parametrize("name", READERS)
def test_a_path_that_is_too_long_is_a_data_error(tmp_path, name):
    with pytest.raises(DataError, match="File name too long"):
        READERS[name](tmp_path / ("x" * 300))


SIZE = (12, 16)


def write_pictures(folder):
    """A picture of each format and compression, and the kind of its pixels."""
    values = numpy.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=numpy.uint8)
    Image.fromarray(values).save(folder / "a.png")
    Image.fromarray(values).save(folder / "a.jpg")
    kinds = {folder / "a.png": "colour", folder / "a.jpg": "colour"}
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        path = folder / f"{compression}.tif"
        Image.fromarray(values[..., 0].astype(numpy.int32)).save(path, compression=compression)
        kinds[path] = "numbers"
    return kinds


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_are_data_errors_whatever_the_damage(tmp_path):
    generator = numpy.random.default_rng(2)
    for path, kind in write_pictures(tmp_path).items():
        whole, errors = path.read_bytes(), 0
        assert read_picture(path, kind, None, SIZE).shape[:2] == SIZE
        for _ in range(60):
            broken = bytearray(whole)
            for place in generator.integers(0, len(broken), generator.integers(1, 6)):
                broken[place] = generator.choice([0, 1, 127, 128, 255])
            path.write_bytes(broken[: generator.integers(1, len(broken))] if generator.random() < 0.2 else broken)
            for original in (SIZE, None):
                try:
                    assert read_picture(path, kind, (6, 8), original).shape[:2] == (6, 8)
                except DataError as error:
                    errors += 1
                    assert str(error).startswith(str(path))  # noqa: PT017 -- some damage goes unseen
        assert errors > 10


@pytest.mark.filterwarnings("ignore")
def test_a_size_that_so_few_bytes_cannot_hold_is_refused_before_it_is_decoded(tmp_path):
    for path, kind in write_pictures(tmp_path).items():
        if path.suffix != ".tif":
            continue
        content = bytearray(path.read_bytes())
        (start,) = struct.unpack_from("<I", content, 4)
        (count,) = struct.unpack_from("<H", content, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            if struct.unpack_from("<H", content, entry)[0] in (256, 257):  # width and height
                struct.pack_into("<HII", content, entry + 2, 4, 1, 12000)
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"claims 12000×12000 pixels in {len(content)} bytes"):
            read_picture(path, kind, (6, 8))


def test_what_is_there_is_told_from_what_is_not_and_from_what_cannot_be_known(tmp_path):
    file, loop = tmp_path / "file", tmp_path / "loop"
    file.write_text("")
    loop.symlink_to(loop)
    assert (is_file(file), is_folder(file), is_file(tmp_path), is_folder(tmp_path)) == (True, False, False, True)
    for nothing in (loop, tmp_path / "nothing", file / "below"):
        assert not is_file(nothing)
        assert not is_folder(nothing)
    with pytest.raises(DataError, match="null byte"):
        is_file(Path("a\0b"))
    too_long = tmp_path / ("x" * 300)
    assert missing([file, loop, too_long]) == [f"{loop}: no such file", f"{too_long}: File name too long"]
