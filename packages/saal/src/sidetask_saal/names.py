"""The names of transfers, and the branches that tasks ride."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ARROW = "→"
_ASCII = "->"


def transfer(source: str, target: str) -> str:
    """The name of the transfer from `source` to `target`, and of its task.

    >>> transfer("seg", "depth")
    'seg→depth'
    """
    return f"{source}{ARROW}{target}"


def ends(name: str) -> tuple[str, str] | None:
    """Source and target of a transfer; None for any other task's name.

    >>> ends("seg->depth"), ends("seg")
    (('seg', 'depth'), None)
    """
    source, arrow, target = name.replace(_ASCII, ARROW).partition(ARROW)
    return (source, target) if arrow else None


def routed(tasks: Sequence[str], route: Mapping[str, str] | None) -> dict[str, str]:
    """The branch of every task, by default one of its own name.

    Raises:
        ValueError: for a route of a task that is not there.
    """
    for name in route or {}:
        if name not in tasks:
            raise ValueError(f"route names task {name!r}, but the tasks are: {', '.join(tasks)}")
    return {name: (route or {}).get(name, name) for name in tasks}
