import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from sidetask_bench.schema import ExperimentError, build, limited, plain


@dataclasses.dataclass(frozen=True)
class Red:
    name: Literal["red"] = "red"
    depth: float = limited(1.0, above=0)


@dataclasses.dataclass(frozen=True)
class Blue:
    name: Literal["blue"] = "blue"
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Paint:
    color: Red | Blue
    coats: int = limited(1, minimum=1)
    share: float = 0.5
    label: str | None = None
    glossy: bool = False
    sizes: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    extra: Mapping[str, int] = dataclasses.field(default_factory=dict)


FULL = {
    "color": {"name": "blue", "size": 3},
    "coats": 2,
    "share": 0.25,
    "label": "wall",
    "glossy": True,
    "sizes": [1, 2],
    "pair": [0.5, 2.0],
    "extra": {"a": 1},
}


def test_plain_is_the_inverse_of_build() -> None:
    built = build(Paint, FULL)
    assert built.color == Blue(size=3)
    assert plain(built) == FULL
    assert build(Paint, plain(built)) == built


def test_a_bare_name_stands_for_the_record_of_that_name() -> None:
    assert build(Paint, {"color": "red"}).color == Red()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coat": 2}, ["wall.coat", "did you mean 'coats'"]),
        ({"color": {"name": "red", "dept": 1.0}}, ["wall.color.dept", "did you mean 'depth'"]),
        ({"color": {"name": "blue", "depth": 1.0}}, ["wall.color.depth", "keys: name, size"]),
        ({"color": "rad"}, ["wall.color.rad", "did you mean 'red'"]),
        ({"color": {"depth": 1.0}}, ["wall.color.name", "missing", "red, blue"]),
        ({"color": 3}, ["wall.color", "a mapping", "3"]),
        ({"coats": "2"}, ["wall.coats", "a whole number", "the text '2'"]),
        ({"coats": 2.0}, ["wall.coats", "a whole number", "2.0"]),
        ({"coats": True}, ["wall.coats", "a whole number", "True"]),
        ({"coats": 0}, ["wall.coats", "at least 1", "0"]),
        ({"coats": None}, ["wall.coats", "a whole number", "null"]),
        ({"color": {"name": "red", "depth": 0}}, ["wall.color.depth", "more than 0"]),
        ({"share": float("nan")}, ["wall.share", "a finite number"]),
        ({"share": False}, ["wall.share", "a number", "False"]),
        ({"glossy": 1}, ["wall.glossy", "true or false", "1"]),
        ({"sizes": 3}, ["wall.sizes", "a list"]),
        ({"sizes": [1, "x"]}, ["wall.sizes[1]", "a whole number"]),
        ({"pair": [1.0]}, ["wall.pair", "a list of 2"]),
        ({"extra": {"a": "b"}}, ["wall.extra.a", "a whole number"]),
        ({"label": {"a": 1}}, ["wall.label", "text", "a mapping"]),
    ],
)
def test_a_mistake_is_named_with_path_expectation_and_finding(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ExperimentError) as caught:
        build(Paint, FULL | change, "wall")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ExperimentError, match="color: missing"):
        build(Paint, {})


def test_an_int_passes_for_a_float_and_becomes_one() -> None:
    share = build(Paint, {"color": "red", "share": 1}).share
    assert share == 1.0
    assert isinstance(share, float)
