"""MATLAB's files of version 5 as scipy writes them, sound and hostile."""

import io
import pickle
import struct
import zlib

import numpy
import pytest
import scipy.io
from sidetask_datasets import DataError
from sidetask_datasets.mat5 import parse
from sidetask_datasets.matlab import read_mat

HEAD = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"


def saved(variables, **options):
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, variables, **options)
    return buffer.getvalue()


def same(a, b):
    if a.dtype.names or b.dtype.names:
        return a.shape == b.shape and all(
            same(x[name], y[name]) for x, y in zip(a.flat, b.flat, strict=True) for name in b.dtype.names
        )
    if b.dtype == object:
        return a.shape == b.shape and all(same(x, y) for x, y in zip(a.flat, b.flat, strict=True))
    return a.shape == b.shape and (a == b).all()


def variables():
    generator = numpy.random.default_rng(0)
    nested = numpy.zeros((2, 3), [("name", object), ("values", object)])
    for index, one in enumerate(nested.flat):
        one["name"], one["values"] = f"part {index}", generator.integers(0, 9, (index, 2))
    cells = numpy.empty((1, 2), object)
    cells[0, 0], cells[0, 1] = "text", nested
    return {
        **{
            f"n{kind}": generator.integers(0, 100, (3, 4, 2)).astype(kind)
            for kind in ("u1", "i2", "u2", "i4", "f4", "f8")
        },
        "small": numpy.array([[7]], numpy.uint8),
        "empty": numpy.zeros((0, 5)),
        "truth": numpy.array([[True, False]]),
        "words": numpy.array(["abc", "de "]),
        "nested": nested,
        "cells": cells,
        "a_name_that_is_rather_long": numpy.arange(3.0),
    }


@pytest.mark.parametrize("compress", [False, True])
def test_it_reads_what_scipy_reads(compress):
    content = saved(variables(), do_compression=compress)
    found, expected = parse(content), scipy.io.loadmat(io.BytesIO(content))
    assert set(found) == {name for name in expected if not name.startswith("__")} == set(variables())
    for name, value in found.items():
        assert same(value, expected[name]), name


def test_it_reads_the_other_order_of_bytes():
    array = numpy.arange(6, dtype=">u2").reshape(2, 3)
    body = struct.pack(">IIII", 6, 8, 11, 0) + struct.pack(">IIii", 5, 8, 2, 3) + struct.pack(">HH4s", 1, 1, b"x")
    body += struct.pack(">II", 4, 12) + array.tobytes("F") + bytes(4)
    content = HEAD[:124] + b"\x01\x00MI" + struct.pack(">II", 14, len(body)) + body
    assert (parse(content)["x"] == array).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": 1}), "does not begin as a MATLAB file of version 5"),
        (b"", "does not begin as a MATLAB file of version 5"),
        (HEAD[:124] + b"\x00\x02IM" + bytes(100), "does not begin as a MATLAB file of version 5"),
        (HEAD + b"\x0f\x00\x00\x00\xff\x00\x00\x00", "it is cut short"),
        (HEAD + struct.pack("<II", 9, 8) + bytes(8), "an element of type 9 where a variable should be"),
        (HEAD + struct.pack("<II", 15, 8) + bytes(8), "a compressed variable is damaged"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "a.mat"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.mat: cannot be read as a MATLAB file of version 5: .*{message}"):
        read_mat(path)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        read_mat(path)


def test_a_file_that_swells_is_refused():
    swollen = zlib.compress(bytes(5_000_000))
    content = HEAD + struct.pack("<II", 15, len(swollen)) + swollen
    with pytest.raises(ValueError, match="it unpacks to more than 1000000 bytes"):
        parse(content, most=1_000_000)


def matrix(kind, shape, *parts):
    body = struct.pack("<IIII", 6, 8, kind, 0) + struct.pack("<IIii", 5, 8, *shape) + struct.pack("<HH4s", 1, 1, b"x")
    body += b"".join(parts)
    return struct.pack("<II", 14, len(body)) + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (matrix(6, (2**31 - 1, 2), struct.pack("<II", 9, 8), bytes(8)), "has 1 values"),
        (matrix(1, (2**31 - 1, 2)), "has no room for 4294967294 arrays"),
        (matrix(3, (1, 1)), "'x' is of class 3, which is not read"),
        (matrix(6, (-1, 2), struct.pack("<II", 9, 8), bytes(8)), r"an array of shape \[-1, 2\]"),
    ],
)
def test_claims_are_checked_before_they_are_believed(content, message):
    with pytest.raises(ValueError, match=message):
        parse(HEAD + content)


def test_structures_nested_without_end_are_refused():
    content = struct.pack("<II", 14, 0)
    for _ in range(100):
        content = matrix(1, (1, 1), content)
    with pytest.raises(ValueError, match="nested too deep"):
        parse(HEAD + content)


@pytest.mark.parametrize("compress", [False, True])
def test_damage_is_a_value_error_whatever_it_is(compress):
    whole, errors = saved(variables(), do_compression=compress), 0
    generator = numpy.random.default_rng(0)
    for _ in range(400):
        broken = bytearray(whole)
        for place in generator.integers(100, len(broken), generator.integers(1, 5)):
            broken[place] = generator.integers(0, 256)
        try:
            parse(bytes(broken[: generator.integers(1, len(broken))] if generator.random() < 0.2 else broken))
        except ValueError:
            errors += 1
    assert errors > 80
