from pathlib import Path
from typing import Any

import pytest
from sidetask_bench import document
from sidetask_bench.schema import ExperimentError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("-2E+3", -2000.0),
        (".5", 0.5),
        ("3", 3),
        ("-3", -3),
        ("010", 10),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("true", True),
        ("null", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("0x10", "0x10"),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    found = document.parse(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "data",
    [
        {"a": 1e-05, "b": "1e-05", "c": "no", "d": None, "e": "null", "f": "010", "g": [1, {"h": "true"}], "i": True},
        {"text": "a: b # c", "empty": {}, "none": [], "unicode": "λ", "lines": "a\nb", "shared": [[1], [1]]},
    ],
)
def test_what_is_dumped_is_parsed_back(data: Any) -> None:
    assert document.parse(document.dump(data)) == data


def test_a_repeated_key_is_refused_with_its_line() -> None:
    with pytest.raises(ExperimentError, match=r"x\.yaml, line 3: the key 'lr' is given twice"):
        document.parse("a:\n  lr: 1\n  lr: 2\n", "x.yaml")


def test_no_python_objects_are_made() -> None:
    with pytest.raises(ExperimentError, match="not valid YAML"):
        document.parse("a: !!python/object/apply:os.system ['true']")


@pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "\t- x", "a: *nowhere"])
def test_broken_yaml_is_one_line_with_the_name(text: str) -> None:
    with pytest.raises(ExperimentError, match="broken is not valid YAML") as caught:
        document.parse(text, "broken")
    assert "\n" not in str(caught.value)


def test_read_takes_a_file_before_a_preset_and_suggests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert document.read("digits")["name"] == "digits"
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("name: mine")
    assert document.read("digits")["name"] == "mine"
    with pytest.raises(ExperimentError, match="did you mean 'scenes'"):
        document.read("scene")
    with pytest.raises(ExperimentError, match=r"there is no file nowhere\.yaml"):
        document.read("nowhere.yaml")


@pytest.mark.parametrize("text", ["- a", "just text", ""])
def test_an_experiment_is_a_mapping(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ExperimentError, match="expected a mapping"):
        document.read(tmp_path / "x.yaml")


def test_override_leaves_the_document_alone() -> None:
    given = {"a": {"b": 1}}
    assert document.override(given, ["a.b=2", "c.d.e=1e-3"]) == {"a": {"b": 2}, "c": {"d": {"e": 1e-3}}}
    assert given == {"a": {"b": 1}}


@pytest.mark.parametrize("assignment", ["a", "=1", "a..b=1", "a.b.c=1"])
def test_an_impossible_override_is_refused(assignment: str) -> None:
    with pytest.raises(ExperimentError, match="--set"):
        document.override({"a": {"b": 1}}, [assignment])


def test_merge_replaces_what_has_another_name() -> None:
    base = {"network": {"name": "small", "cut": 3}, "seeds": [1, 2]}
    assert document.merge(base, {"network": {"cut": 0}})["network"] == {"name": "small", "cut": 0}
    assert document.merge(base, {"network": {"name": "large"}})["network"] == {"name": "large"}
    assert document.merge(base, {"network": "large"})["network"] == "large"
    assert document.merge(base, {"seeds": [3]}) == base | {"seeds": [3]}
    assert document.merge("small", {"cut": 0}) == {"name": "small", "cut": 0}
    assert base == {"network": {"name": "small", "cut": 3}, "seeds": [1, 2]}
