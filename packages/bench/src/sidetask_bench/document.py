"""Experiment files: YAML with its traps closed, overrides by dotted path, and the merging of rows into the base."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from sidetask_bench.schema import ExperimentError, as_mapping, join, unknown, wrong

FOLDER = "$folder"  # of the experiment, at the head of a path


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader with the scalars of YAML 1.2: ``1e-4`` is a number, ``no`` and ``on`` are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise ExperimentError(f"{self.name}, line {line}: the key {key.value!r} is given twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            kind = {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(node.tag.split(":")[-1])
            shown = repr(node.value) if len(str(node.value)) <= 40 else "something long"
            line = node.start_mark.line + 1
            raise ExperimentError(f"{self.name}, line {line}: expected {kind or node.tag}, found {shown}") from error


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes what `_Loader` reads back unchanged: text that looks like a number to it is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCALARS = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
]
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
# The safe loader reads 010 as eight and 1_000 as a number; a whole number here is decimal, as it looks.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def parse(text: str, name: str = "<text>") -> Any:
    """YAML text as plain data.

    Differs from ``yaml.safe_load`` where YAML 1.1 surprises: numbers need no dot before an exponent, only
    true and false are truth values, dates and base-60 numbers do not exist, and a repeated key is an error.

    >>> parse("{lr: 1e-4, name: no, seeds: [0, 010]}")
    {'lr': 0.0001, 'name': 'no', 'seeds': [0, 10]}

    Raises:
        ExperimentError: naming the line that is not YAML, or the repeated key.
    """
    try:
        loader = _Loader(text)
        loader.name = name
        return _copy(loader.get_single_data())
    except yaml.YAMLError as error:
        raise ExperimentError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ExperimentError(f"{name} is nested too deep, or contains itself") from error


def dump(data: Any) -> str:
    r"""Plain data as YAML that `parse` reads back to the same data.

    >>> dump({"lr": 1e-05, "name": "no", "text": "1e-4"})
    "lr: 1.0e-05\nname: no\ntext: '1e-4'\n"
    """
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def presets() -> dict[str, str]:
    """Name and text of the experiments that ship with the package."""
    folder = resources.files("sidetask_bench") / "presets"
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {entry.name.removesuffix(".yaml"): entry.read_text("utf-8") for entry in sorted(files, key=str)}


def read(source: str | Path) -> dict[str, Any]:
    """The document of an experiment: a path to a YAML file, or the name of a preset.

    A document with ``extends: NAME``, or several in a list, is laid over those, each over the ones before it (`lay`). A
    name is that of a preset, or a path from the folder of the file.

    Raises:
        ExperimentError: if there is neither, the file is not a mapping, or it extends itself.
    """
    return _extended(source, ())


def lay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """One experiment over another: each key is merged (`merge`); a breakdown, fronts and a paper are replaced.

    >>> nyuv2 = {"name": "nyuv2", "training": {"epochs": 200, "batch_size": 4}, "rows": {"equal": {}}}
    >>> lay(nyuv2, {"name": "nyuv2-small", "training": {"epochs": 2}, "rows": {"dwa": {"method": "dwa"}}})["training"]
    {'epochs': 2, 'batch_size': 4}
    """
    whole = {"breakdown", "fronts", "paper"}
    return {**_copy(below), **{k: merge(below[k], v) if k in below and k not in whole else v for k, v in above.items()}}


def _extended(source: str | Path, through: tuple[str, ...]) -> dict[str, Any]:
    if str(source) in through:
        raise ExperimentError(f"{through[0]}: extends: leads from {source} back to {source}")
    document = _one(source)
    names = document.pop("extends", [])
    below: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names if isinstance(names, list) else [names]:
        if not isinstance(name, str):
            raise wrong("extends", "the name of a preset or file, or a list of them", names)
        beside = Path(source).parent / name
        below = lay(below, _extended(beside if beside.is_file() else name, (*through, str(source))))
    return lay(below, document)


def _one(source: str | Path) -> dict[str, Any]:
    """A document by itself."""
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ExperimentError(f"cannot read {path}: {error}") from error
        return as_mapping(parse(text, str(path)), "")
    known = presets()
    if str(source) in known:
        return as_mapping(parse(known[str(source)], str(source)), "")
    if path.suffix in {".yaml", ".yml"} or path.parent != Path():
        raise ExperimentError(f"there is no file {path}")
    raise unknown(source, known, "", "preset")


def override(document: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """The document with ``key.path=value`` assignments applied; values are YAML.

    A missing mapping on the way is created, and the shorthand ``method: pcgrad`` becomes ``{name: pcgrad}``.

    >>> override({"dataset": "digits"}, ["dataset.train=64", "seeds=[0, 1]"])
    {'dataset': {'name': 'digits', 'train': 64}, 'seeds': [0, 1]}

    Raises:
        ExperimentError: for an assignment without ``=``, or a path through something that is no mapping.
    """
    result = _copy(document)
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ExperimentError(f"--set {assignment}: expected key.path=value")
        here = result
        for depth, key in enumerate(keys[:-1]):
            inner = here.get(key)
            if isinstance(inner, str):
                inner = {"name": inner}
            if inner is None:
                inner = {}
            if not isinstance(inner, dict):
                raise ExperimentError(f"--set {assignment}: {'.'.join(keys[: depth + 1])} is not a mapping")
            here[key] = inner
            here = inner
        here[keys[-1]] = parse(value, f"--set {path}")
    return result


def placed(data: Any, folder: str | Path) -> Any:
    """The data with every path that begins with ``$folder`` in this folder.

    >>> placed({"name": "saal-e", "relations": "$folder/relations/relations.json"}, "runs/rooms")
    {'name': 'saal-e', 'relations': 'runs/rooms/relations/relations.json'}
    """
    if isinstance(data, Mapping):
        return {key: placed(value, folder) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [placed(value, folder) for value in data]
    if isinstance(data, str) and (data == FOLDER or data.startswith(f"{FOLDER}/")):
        return Path(folder, *data.split("/")[1:]).as_posix()
    return data


def merge(base: Any, row: Any) -> Any:
    """A row laid over the base: mappings merge key by key, everything else is replaced.

    A mapping that gives another ``name`` replaces the whole of the base's: the options of SGD mean nothing to Adam.

    >>> merge({"optimizer": {"name": "sgd", "lr": 0.1}, "epochs": 3}, {"optimizer": {"lr": 0.2}})
    {'optimizer': {'name': 'sgd', 'lr': 0.2}, 'epochs': 3}
    >>> merge({"optimizer": {"name": "sgd", "momentum": 0.9}}, {"optimizer": {"name": "adam"}})
    {'optimizer': {'name': 'adam'}}
    """
    if isinstance(base, str) and isinstance(row, Mapping):
        base = {"name": base}
    if not isinstance(base, Mapping) or not isinstance(row, Mapping):
        return _copy(row)
    if row.get("name", base.get("name")) != base.get("name"):
        return _copy(row)
    result = _copy(base)
    for key, value in row.items():
        result[key] = merge(base[key], value) if key in base else _copy(value)
    return result


def flatten(data: Any, path: str = "") -> dict[str, Any]:
    """Dotted paths to leaves.

    >>> flatten({"training": {"epochs": 3}, "seed": 0})
    {'training.epochs': 3, 'seed': 0}
    """
    if not isinstance(data, Mapping) or not data:
        return {path: data}
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        leaves.update(flatten(value, join(path, key)))
    return leaves


def _copy(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _copy(value) for key, value in data.items()}
    return [_copy(value) for value in data] if isinstance(data, list | tuple) else data
