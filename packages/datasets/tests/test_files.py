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
from sidetask_datasets.files import (
    DataErrors,
    each_line,
    is_file,
    is_folder,
    missing,
    read_ids,
    read_lists,
    read_picture,
    together,
)

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


def problems(read, *arguments):
    with pytest.raises(DataError) as caught:
        read(*arguments)
    assert str(caught.value).startswith(caught.value.problems[0])
    return list(caught.value.problems)


def test_all_bad_lines_of_all_lists_are_named_together(tmp_path):
    paths = {split: tmp_path / f"{split}.txt" for split in ("train", "validation", "test")}
    paths["train"].write_text("1\n../2\n\n1\n" + "x" * 300 + "\n2\n")
    paths["validation"].write_text("3\n")
    paths["test"].write_text("4\n4\n")
    rule = "is not an id: letters, digits, '_', '-' and single dots, not beginning with a dot"
    expected = [
        f"{paths['train']}, line 2: '../2' {rule}",
        f"{paths['train']}, line 4: '1' is there already, in line 1",
        f"{paths['train']}, line 5: an id of 300 characters; 200 at most",
        f"{paths['test']}, line 2: '4' is there already, in line 1",
    ]
    assert problems(read_lists, paths) == expected
    assert problems(read_ids, paths["train"]) == expected[:3]
    paths["train"].write_text("1\n2\n")
    paths["validation"].unlink()
    assert [problem.split(":")[0] for problem in problems(read_lists, paths)] == [
        str(paths["validation"]),
        f"{paths['test']}, line 2",
    ]
    paths["validation"].write_text("5\n2\n1\n")
    paths["test"].write_text("4\n")
    assert problems(read_lists, paths) == [
        f"{paths['validation']}: '1' is also in {paths['train']} (2 shared); splits must be disjoint"
    ]
    paths["validation"].write_text("3\n")
    assert read_lists(paths) == {"train": ["1", "2"], "validation": ["3"], "test": ["4"]}


@pytest.mark.parametrize("bad", [1, 20, 21, 500])
def test_of_many_bad_lines_the_first_are_named_and_the_others_counted(tmp_path, bad):
    path = tmp_path / "list.txt"
    path.write_text("good\n\n" + bad * "bad\n")
    taken = []

    def take(number, line):
        if line != "good":
            raise ValueError("not good")
        taken.append(number)

    found = problems(each_line, path, take)
    assert found[:20] == [f"{path}, line {number}: not good" for number in range(3, 3 + min(bad, 20))]
    assert found[20:] == ([f"{path}: something is wrong with {bad - 20} more lines"] if bad > 20 else [])
    assert taken == [1]


def test_what_is_wrong_with_several_files_comes_together_and_once():
    def fail(*messages):
        raise DataErrors(messages) if len(messages) > 1 else DataError(*messages)

    assert together(lambda: 1, lambda: "two") == [1, "two"]
    assert problems(together, lambda: fail("a: x", "b: y"), lambda: 3, lambda: fail("c: z"), lambda: fail("b: y")) == [
        "a: x",
        "b: y",
        "c: z",
    ]
    with pytest.raises(KeyError):  # what is no fault of a file is not kept for later
        together(lambda: {}["key"], lambda: fail("a: x"))
