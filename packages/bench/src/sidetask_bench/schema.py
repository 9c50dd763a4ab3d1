"""Plain data to typed records: a mistake is named with its path, what was expected and what was found."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ExperimentError(Exception):
    """Something in the user's hands is wrong (a key, a value, a file); the message says what to change."""


def limited(default: Any = dataclasses.MISSING, **limits: float) -> Any:
    """A field whose numbers `build` checks: at least ``minimum=``, at most ``maximum=``, ``above=``, ``below=``."""
    return dataclasses.field(default=default, metadata=limits)


def build(kind: type[T], data: Any, path: str = "") -> T:
    """Read plain data (what YAML gives) as a value of `kind`, usually a dataclass.

    The annotations are the schema: records, unions with None, literals, mappings, tuples and scalars. An int
    passes for a float, a bool never for a number. A union of records is told apart by their ``name``, and a
    bare string stands for a record of that name. A class with a ``from_plain(data, path)`` reads itself.

    Raises:
        ExperimentError: naming the path, e.g. ``training.optimiser``, and the nearest key.

    >>> @dataclasses.dataclass
    ... class Point:
    ...     x: float
    ...     label: str | None = None
    >>> build(Point, {"x": 1})
    Point(x=1.0, label=None)
    >>> build(Point, {"x": 1, "labl": "a"}, "origin")
    Traceback (most recent call last):
    ...
    sidetask_bench.schema.ExperimentError: origin.labl: unknown key; did you mean 'label'? (keys: x, label)
    """
    return typing.cast(T, _convert(kind, data, path))


def plain(value: Any) -> Any:
    """The inverse of `build`: nested mappings, lists and scalars, fit for YAML and JSON."""
    if hasattr(value, "to_plain"):
        return value.to_plain()
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def unknown(key: Any, known: Iterable[str], path: str, what: str = "key") -> ExperimentError:
    """The error for a name that does not exist, with the nearest one that does."""
    known = list(known)
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    listed = f"({what}s: {', '.join(known)})" if known else f"(there are no {what}s here)"
    return ExperimentError(f"{join(path, key)}: unknown {what}{guess} {listed}")


def first_line(error: BaseException) -> str:
    """What an error says, without the advice that torch appends on further lines."""
    return str(error).partition("\n")[0]


def join(path: str, key: Any) -> str:
    """A dotted path with one more key.

    >>> join("training", "lr"), join("", "name")
    ('training.lr', 'name')
    """
    return f"{path}.{key}" if path else str(key)


def wrong(path: str, expected: str, found: Any) -> ExperimentError:
    """The error for a value of the wrong type or size."""
    names = {dict: "a mapping", list: "a list", str: "the text", bool: "the truth value", type(None): "nothing (null)"}
    name = names.get(type(found), f"the {type(found).__name__}")
    shown = name if found is None or isinstance(found, dict) else f"{name} {found!r}"
    return ExperimentError(f"{path or 'the experiment'}: expected {expected}, found {shown}")


def as_mapping(data: Any, path: str) -> dict[str, Any]:
    """The data, checked to be a mapping with text keys."""
    if not isinstance(data, Mapping):
        raise wrong(path, "a mapping", data)
    for key in data:
        if not isinstance(key, str):
            raise ExperimentError(f"{join(path, key)}: keys are text; put quotes around {key!r}")
    return dict(data)


def _convert(kind: Any, value: Any, path: str) -> Any:
    if kind is Any:
        return value
    if hasattr(kind, "from_plain"):
        return kind.from_plain(value, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool):
            raise wrong(path, "one of " + ", ".join(map(str, arguments)), value)
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong(path, "a list", value)
        if arguments[-1] is not Ellipsis and len(arguments) != len(value):
            raise wrong(path, f"a list of {len(arguments)}", value)
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        return {key: _convert(arguments[1], item, join(path, key)) for key, item in as_mapping(value, path).items()}
    if dataclasses.is_dataclass(kind):
        return _convert_record(typing.cast("type[Any]", kind), value, path)
    return _convert_scalar(kind, value, path)


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _convert(options[0], value, path)
    records = {typing.get_args(typing.get_type_hints(option)["name"])[0]: option for option in options}
    data = {"name": value} if isinstance(value, str) else as_mapping(value, path)
    if "name" not in data:
        raise ExperimentError(f"{join(path, 'name')}: missing; one of {', '.join(records)}")
    if data["name"] not in records:
        raise unknown(data["name"], records, path, "name")
    return _convert_record(records[data["name"]], data, path)


def _convert_record(kind: type[Any], value: Any, path: str) -> Any:
    data, hints = as_mapping(value, path), typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            raise unknown(key, fields, path)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in data:
            raise ExperimentError(f"{join(path, key)}: missing")
    values = {key: _convert(hints[key], item, join(path, key)) for key, item in data.items()}
    for key, item in values.items():
        _check_limits(fields[key].metadata, item, join(path, key))
    try:
        return kind(**values)
    except ValueError as error:
        raise ExperimentError(f"{path or 'the experiment'}: {error}") from error


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong(path, names.get(kind, kind.__name__), value)
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong(path, "a finite number", value)
    return value


_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (lambda value, limit: value >= limit, "at least"),
    "maximum": (lambda value, limit: value <= limit, "at most"),
    "above": (lambda value, limit: value > limit, "more than"),
    "below": (lambda value, limit: value < limit, "less than"),
}


def _check_limits(limits: Mapping[str, float], value: Any, path: str) -> None:
    for name, limit in limits.items():
        holds, words = _LIMITS[name]
        items = {f"{path}[{i}]": item for i, item in enumerate(value)} if isinstance(value, tuple) else {path: value}
        for where, item in items.items():
            if item is not None and not holds(item, limit):
                raise wrong(where, f"{words} {limit}", item)
