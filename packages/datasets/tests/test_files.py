"""What may not be read is named, whoever asks."""

import errno
import os
from pathlib import Path

import pytest
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
from sidetask_datasets.files import is_file, is_folder, missing

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
