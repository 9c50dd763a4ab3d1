"""Find methods, datasets and networks by name, in whatever distributions are installed.

A distribution offers them as entry points of the groups ``sidetask.methods``, ``sidetask.datasets`` and
``sidetask.networks``. A method's entry point is a callable ``(tasks, **options) -> Method``. One that fits something on
the data has a parameter ``labels``, which is no option: a function that gives the training labels of a task.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sidetask_core.method import Augment, Method
from sidetask_core.task import MissingKey, Task, _listed, check_tasks
from sidetask_core.uncertainty import FollowsUncertainty, Uncertain

# Of a task, batch by batch.
Labels = Callable[[str], Iterable[Any]]

SLOTS = ("augment", "shapers", "decoder", "encoder")
# Where the project's own names live, so that a missing one can be answered with the command that brings it.
_HOMES = {
    "methods": {
        "sidetask-baselines": "equal fixed uncertainty per-objective-uncertainty dwa rlw imtl-l atw puw famo gradnorm "
        "pcgrad cagrad mgda imtl-g imtl graddrop pareto-mtl nash-mtl aligned-mtl gcs ol-aux torchjd",
        "sidetask-autolambda": "autolambda",
        "sidetask-ial": "ial",
        "sidetask-saal": "saal-e saal-w saal-ew",
        "sidetask-classwise": "classwise",
    },
    "datasets": {
        "sidetask-datasets": "celeba cifar100_domains cityscapes digits frames nyuv2 pascal_context pseudo "
        "rlbench scenes virtual_kitti"
    },
    "networks": {"sidetask-bench": "small deeplabv3 unet"},
}


def installed(group: str) -> dict[str, str]:
    """What is installed in a group, ``"methods"``, ``"datasets"`` or ``"networks"``: name to distribution.

    Raises:
        ValueError: for an unknown group, or two distributions that claim one name.
    """
    return {name: _distribution(_only(group, name, points)) for name, points in sorted(_found(group).items())}


def find(group: str, name: str) -> Any:
    """Load what is installed under `name`.

    Raises:
        MissingKey: if nothing of that name is installed; says what to install, or which name comes nearest.
        ValueError: for an unknown group, or if two distributions claim the name.
    """
    found = _found(group)
    if name in found:
        return _only(group, name, found[name]).load()
    kind = group.removesuffix("s")
    for distribution, names in _HOMES[group].items():
        if name in names.split():
            raise MissingKey(f"{kind} {name!r} is not installed; pip install {distribution}")
    hint = _hint(name, found)
    raise MissingKey(f"no installed package offers a {kind} {name!r}; {hint}installed are: {_listed(sorted(found))}")


def make_method(spec: Any, tasks: Sequence[Task], labels: Labels | None = None) -> Method:
    """Build a method from its name, or slot by slot from the names of several.

    Args:
        spec: ``"pcgrad"``; or ``{"name": "cagrad", **options}``; or slots, each given in one of these two
            forms: ``{"encoder": "autolambda", "decoder": "ial", "shapers": {"seg": "classwise"}}``. Tasks that
            the augment adds are weighed by the other slots' rules like the given ones, and named there in any way that
            the augment knows (`Augment.known_as`). What two slots give alike is
            built once, so that they share its rules and their state; and an encoder's rule that goes by an uncertainty
            goes by the decoder's if it has one (`FollowsUncertainty`).
        tasks: what the method is built for.
        labels: gives the training labels of a task by its name, batch by batch, None for a batch without; for methods
            that fit something on them, quantiles for instance.

    Raises:
        MissingKey: for a name that is not installed, or a method that leaves the asked slot empty.
        TypeError: for a spec of another form, or options that the method does not take.
        ValueError: for a slot of a method that has shapers besides which no slot takes, or an augment, unless the slot
            augment holds one of its type, whose options then count.

    >>> make_method({"encodr": "pcgrad"}, [Task("a", loss=abs)])
    Traceback (most recent call last):
    ...
    TypeError: a method has no slot 'encodr'; did you mean 'encoder'? the slots are: augment, shapers, decoder, encoder
    """
    tasks = check_tasks(tasks)
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise TypeError(f"a method is a name, a name with options or slots, not {spec!r}")
    if "name" in spec:
        return _call(spec, tasks, labels)
    slots: dict[str, Any] = {}
    built: list[_Built] = []
    for slot in sorted(spec, key=lambda slot: slot != "augment"):
        inner = spec[slot]
        if slot not in SLOTS:
            raise TypeError(f"a method has no slot {slot!r}; {_hint(slot, SLOTS)}the slots are: {_listed(SLOTS)}")
        if slot == "shapers":
            if not isinstance(inner, Mapping):
                raise TypeError(f"shapers map a task's name to a method, not {inner!r}")
            slots[slot] = {task: _slot("shapers", one, tasks, built, labels, task) for task, one in inner.items()}
        elif inner is not None:
            slots[slot] = _slot(slot, inner, tasks, built, labels)
            if slot == "augment":
                tasks = check_tasks(slots[slot].extended(tasks))
                spec = _renamed(spec, slots[slot])
                for one in built:
                    one.spec = _renamed(one.spec, slots[slot])
    names = tuple(task.name for task in tasks)
    for slot in ("encoder", "decoder"):
        if slot in slots and slots[slot].tasks != names:
            raise ValueError(
                f"the {slot} {spec[slot]!r} weighs the tasks {_listed(slots[slot].tasks)}, but there are "
                f"{_listed(names)}; name the method that adds tasks in the slot augment, too"
            )
    for one in built:
        # Of two augments of one type the slot's counts: rules made for the tasks that it adds come with their own.
        without = type(slots.get("augment")) is not type(one.method.augment)
        if one.method.augment is not None and without:
            raise one.loses("augment")
        if one.method.shapers and "shapers" not in one.slots:
            raise one.loses("shapers")
    encoder, decoder = slots.get("encoder"), slots.get("decoder")
    if isinstance(encoder, FollowsUncertainty) and isinstance(decoder, Uncertain):
        encoder.follow(decoder)
    return Method(**slots)


@dataclass
class _Built:
    """A method that slots are taken from, and which."""

    spec: Mapping[str, Any]
    method: Method
    slots: list[str] = field(default_factory=list)

    def loses(self, slot: str) -> ValueError:
        where = " and ".join(dict.fromkeys(self.slots))
        return ValueError(
            f"the method {dict(self.spec)!r} has something for the slot {slot}, which is lost in the slot {where} "
            f"alone; name it in the slot {slot}, too"
        )


def _slot(
    slot: str, spec: Any, tasks: Sequence[Task], built: list[_Built], labels: Labels | None, task: str | None = None
) -> Any:
    wanted = {"name": spec} if isinstance(spec, str) else spec
    found = next((one for one in built if one.spec == wanted), None)
    if found is None:
        found = _Built(wanted, make_method(spec, tasks, labels))
        built.append(found)
    found.slots.append(slot)
    filled = getattr(found.method, slot)
    if task is not None:
        filled = filled.get(task)
    if filled is None:
        where = f"shapers of task {task!r}" if task else slot
        raise MissingKey(f"method {spec!r} leaves the slot {where} empty")
    return filled


def _renamed(spec: Any, augment: Augment) -> Any:
    """What was given for the slots, with the names of added tasks as the augment writes them."""
    if isinstance(spec, str):
        return augment.known_as(spec)
    if isinstance(spec, Mapping):
        return {_renamed(key, augment): _renamed(value, augment) for key, value in spec.items()}
    return [_renamed(value, augment) for value in spec] if isinstance(spec, list | tuple) else spec


def _call(spec: Mapping[str, Any], tasks: Sequence[Task], labels: Labels | None) -> Method:
    name = spec["name"]
    options = {key: value for key, value in spec.items() if key != "name"}
    factory = find("methods", name)
    signature = inspect.signature(factory)
    given = {}
    if "labels" in signature.parameters:
        given = {"labels": labels}
        signature = signature.replace(parameters=[p for p in signature.parameters.values() if p.name != "labels"])
    try:
        signature.bind(tasks, **options)
    except TypeError as error:
        takes = list(signature.parameters)[1:]
        hints = "".join(_hint(option, takes) for option in options if option not in takes)
        raise TypeError(f"method {name!r}: {error}; {hints}its options are: {_listed(takes)}") from error
    method = factory(tasks, **options, **given)
    if not isinstance(method, Method):
        raise TypeError(f"the entry point {name!r} returned {type(method).__name__}, expected a Method")
    return method


def _hint(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _found(group: str) -> dict[str, list[EntryPoint]]:
    if group not in _HOMES:
        raise ValueError(f"the groups are: {_listed(_HOMES)}; not {group!r}")
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=f"sidetask.{group}"):
        found.setdefault(point.name, []).append(point)
    return found


def _only(group: str, name: str, points: Sequence[EntryPoint]) -> EntryPoint:
    claims = sorted({(_distribution(point), point.value) for point in points})
    if len(claims) > 1:
        who = " and ".join(f"{distribution} ({value})" for distribution, value in claims)
        raise ValueError(f"the {group.removesuffix('s')} {name!r} is claimed by {who}; uninstall one of them")
    return points[0]


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
