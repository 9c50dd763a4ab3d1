"""The cache: decoded once, whole or not at all, and never believed when it is stale or damaged."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
from sidetask_datasets.cache import prepare
from sidetask_datasets.files import DataError, DataErrors
from sidetask_datasets.source import Field, Source

COUNT = 70  # three chunks


def read_number(path, *rest):
    """A sample of a field: the number in a file, and another one after it."""
    with (path.parent / "reads").open("a") as log:
        log.write(f"{path.name}\n")
    text = path.read_text()
    if text == "slow":
        time.sleep(60)
    if not text.isdigit():
        raise DataError(f"{path}: expected a number, found {text!r}")
    return numpy.array([int(text), sum(rest)], numpy.float32)


def read_wrongly(path):
    return numpy.zeros(3, numpy.float32)


def make(folder, fields=("a", "b"), **options):
    for index in range(COUNT):
        for name in ("a", "b"):
            path = folder / f"{name}{index}"
            if not path.exists():
                path.write_text(str(index))
    rows = [{name: (folder / f"{name}{index}", index) for name in fields} for index in range(COUNT)]
    splits = {"train": rows[:40], "test": rows[40:]}
    named = {name: Field("vector", (2,), "float32", read_number) for name in fields}
    return Source("numbers", folder, named, splits, **options)


def reads(folder):
    log = folder / "reads"
    found = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return found


def check(cache):
    expected = torch.arange(COUNT, dtype=torch.float32)
    for name in cache.arrays["train"]:
        both = torch.cat([cache.arrays["train"][name], cache.arrays["test"][name]])
        assert torch.equal(both, expected[:, None].expand(-1, 2))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def files(cache):
    return sorted(cache.folder.glob("*/*.npy"))


def test_files_are_read_once(folder):
    check(prepare(make(folder)))
    assert len(reads(folder)) == 2 * COUNT
    check(prepare(make(folder)))
    assert reads(folder) == []


def test_fields_are_cached_apart(folder):
    check(prepare(make(folder, ["a"])))
    assert len(reads(folder)) == COUNT
    check(prepare(make(folder, ["b", "a"])))
    assert {name[0] for name in reads(folder)} == {"b"}


@pytest.mark.parametrize("jobs", [1, 2, None])
@pytest.mark.thorough
def test_processes_and_threads_decode_alike(folder, jobs):
    check(prepare(make(folder), jobs=jobs))


def test_arrays_are_mapped_and_writing_to_them_changes_no_file(folder):
    cache = prepare(make(folder))
    cache.arrays["train"]["a"].zero_()
    check(prepare(make(folder)))
    assert reads(folder).count("a0") == 1


def test_a_changed_file_is_decoded_anew_and_the_old_arrays_go(folder):
    cache = prepare(make(folder))
    before = files(cache)
    reads(folder)
    (folder / "a3").write_text("333")
    cache = prepare(make(folder))
    assert cache.arrays["train"]["a"][3, 0] == 333
    assert {name[0] for name in reads(folder)} == {"a"}
    assert len(files(cache)) == len(before) == 4


def test_a_file_whose_time_of_change_was_set_back_is_decoded_anew(folder):
    prepare(make(folder))
    before = (folder / "a3").stat()
    (folder / "a3").write_text("7")
    os.utime(folder / "a3", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prepare(make(folder)).arrays["train"]["a"][3, 0] == 7


@pytest.mark.parametrize("options", [{"settings": {"size": 3}}, {"version": 2}])
def test_other_rules_are_another_cache(folder, options):
    prepare(make(folder))
    reads(folder)
    check(prepare(make(folder, **options)))
    assert len(reads(folder)) == 2 * COUNT
    prepare(make(folder))
    assert reads(folder) == []


def test_a_damaged_cache_is_rebuilt(folder):
    def flip(path):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    damages = [
        flip,
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.with_name("index.json").unlink(),
        lambda path: path.with_name("index.json").write_text("[]"),
        lambda path: path.with_name("index.json").write_text('{"format": 1'),
        lambda path: numpy.save(path, numpy.zeros((40, 2))),
    ]
    for damage in damages:
        cache = prepare(make(folder))
        reads(folder)
        damage(next(path for path in files(cache) if path.parent.name.startswith("a") and path.name == "train.npy"))
        check(prepare(make(folder)))
        assert {name[0] for name in reads(folder)} == {"a"}


def test_all_problems_are_listed_and_only_their_chunks_are_read_again(folder):
    source = make(folder)
    for name in ("a1", "a69", "b2"):
        (folder / name).write_text("oops")
    with pytest.raises(DataErrors) as caught:
        prepare(source)
    assert [problem.split(": ")[0].rsplit("/")[-1] for problem in caught.value.problems] == ["a1", "a69", "b2"]
    assert not list(folder.parent.rglob("index.json"))
    reads(folder)
    for name, text in (("a1", "1"), ("a69", "69"), ("b2", "2")):
        (folder / name).write_text(text)
    check(prepare(make(folder)))
    # Chunks of 32: the first and the last of a, the first of b.
    assert sorted(set(reads(folder))) == sorted(
        [f"a{i}" for i in range(32)] + [f"a{i}" for i in range(40, 70)] + [f"b{i}" for i in range(32)]
    )


@pytest.mark.thorough
def test_a_killed_preparation_goes_on(folder, own_cache):
    source = make(folder, ["a"])
    (folder / "a39").write_text("slow")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, '.')\n"
        "from packages.datasets.tests.test_cache import make, prepare\n"
        f"prepare(make(Path({str(folder)!r}), ['a']), jobs=1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "SIDETASK_CACHE": str(own_cache)})
    while process.poll() is None and (not (folder / "reads").exists() or "a39" not in (folder / "reads").read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(own_cache.rglob("index.json"))
    reads(folder)
    (folder / "a39").write_text("39")
    check(prepare(source))
    assert "a0" not in reads(folder)


@pytest.mark.thorough
def test_of_two_processes_that_ask_at_once_one_works(folder, own_cache):
    make(folder, ["a"])
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, '.')\n"
        "from packages.datasets.tests.test_cache import check, make, prepare\n"
        f"folder = Path({str(folder)!r}); (folder / f'ready{{sys.argv[1]}}').touch()\n"
        "while not (folder / 'go').exists(): time.sleep(0.01)\n"
        "check(prepare(make(folder, ['a']), jobs=1))\n"
    )
    environment = {**os.environ, "SIDETASK_CACHE": str(own_cache)}
    both = [subprocess.Popen([sys.executable, "-c", code, str(rank)], env=environment) for rank in range(2)]
    while not all((folder / f"ready{rank}").exists() for rank in range(2)):
        assert all(process.poll() is None for process in both)
        time.sleep(0.05)
    (folder / "go").touch()
    assert [process.wait(60) for process in both] == [0, 0]
    assert sorted(reads(folder)) == sorted(f"a{index}" for index in range(COUNT))


def part_of(folder, own_cache):
    """A preparation that was stopped after all but one of its chunks; what is written down of it."""
    source = make(folder, ["a"])
    (folder / "a39").write_text("oops")
    with pytest.raises(DataErrors):
        prepare(source, jobs=1)
    (folder / "a39").write_text("39")
    reads(folder)
    (done,) = own_cache.rglob("done.jsonl")
    return done


def test_what_is_done_is_written_down_in_a_line_each(folder, own_cache):
    lines = [json.loads(line) for line in part_of(folder, own_cache).read_text().splitlines()]
    assert lines[0]["splits"] == {"train": 40, "test": 30}
    assert [chunk for chunk, _, _ in lines[1:]] == ["train 0 32", "test 0 30"]


@pytest.mark.parametrize(
    "end", ['["train 32 40', '["train 32 40", 7]\n', '["train 32 40", "a", "7"]\n', "\x00\xff", '{"a": 1}\n']
)
def test_an_end_that_was_cut_short_is_not_believed(folder, own_cache, end):
    done = part_of(folder, own_cache)
    done.write_bytes(done.read_bytes() + end.encode("latin1"))
    check(prepare(make(folder, ["a"])))
    assert set(reads(folder)) == {f"a{i}" for i in range(32, 40)}


def test_rows_that_were_damaged_in_the_meantime_are_read_again(folder, own_cache):
    path = part_of(folder, own_cache).with_name("train.npy")
    array = numpy.load(path, mmap_mode="r+")
    array[3] = 77
    array.flush()
    check(prepare(make(folder, ["a"])))
    assert set(reads(folder)) == {f"a{i}" for i in range(40)}


def test_a_beginning_that_cannot_be_read_is_none(folder, own_cache):
    done = part_of(folder, own_cache)
    done.write_bytes(b"\xff" + done.read_bytes())
    check(prepare(make(folder, ["a"])))
    assert len(reads(folder)) == COUNT


def test_a_wrong_shape_is_named(folder):
    source = make(folder, ["a"])
    rows = {split: [{"a": (row["a"][0],)} for row in samples] for split, samples in source.splits.items()}
    wrong = Source("numbers", folder, {"a": Field("vector", (2,), "float32", read_wrongly)}, rows)
    with pytest.raises(DataErrors, match=r"a0: expected shape \[2\], found \[3\]"):
        prepare(wrong)


@pytest.mark.parametrize("jobs", [1, None])
def test_what_is_damaged_is_listed_beside_what_is_missing(folder, own_cache, jobs):
    source = make(folder, problems=["x: no such file"])
    (folder / "a3").unlink()
    for name in ("b3", "b4", "a69"):
        (folder / name).write_text("oops")
    with pytest.raises(DataErrors) as caught:
        prepare(source, jobs=jobs)
    # Sample 3 lacks a file, and is not read.
    assert [problem.split(": ")[0].rsplit("/")[-1] for problem in caught.value.problems] == ["x", "a69", "b4"]
    assert not list(own_cache.rglob("*.npy"))


def test_an_empty_split_is_refused(folder, own_cache):
    source = make(folder)
    empty = Source("numbers", folder, source.fields, {**source.splits, "test": []})
    with pytest.raises(DataErrors, match="data: the split 'test' is empty"):
        prepare(empty)
    assert not list(own_cache.rglob("*.npy"))


def test_problems_of_the_tree_and_missing_files_stop_it(folder, own_cache):
    with pytest.raises(DataError, match="x: no such file"):
        prepare(make(folder, problems=["x: no such file"]))
    source = make(folder)
    (folder / "b5").unlink()
    with pytest.raises(DataError, match="b5: No such file"):
        prepare(source)
    assert not list(own_cache.rglob("*.npy"))


def test_the_index_says_what_it_is_of(folder):
    cache = prepare(make(folder))
    index = json.loads(next(cache.folder.glob("a-*/index.json")).read_text())
    assert index["root"] == str(folder)
    assert index["layout"]["splits"] == {"train": 40, "test": 30}
    assert set(index["checksums"]) == {"train", "test"}
