"""Any weighting or aggregator of TorchJD: Quinton, Rey, "Jacobian descent for multi-objective optimization", 2024."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from sidetask_core import Combiner, Equal, Method, MissingKey, Place, Signals, StepFailure, Task, parallel
from torch import Tensor, nn

from sidetask_baselines.gramian import Fetched, GramianWeighting
from sidetask_baselines.scale import check_scale, total_weight
from sidetask_baselines.simplex import SolverFailure, vectors

# What a weighting is given, where its class does not follow the rule of `torchjd`.
_READS = {
    "MeanWeighting": "nothing",
    "SumWeighting": "nothing",
    "ConstantWeighting": "nothing",
    "RandomWeighting": "nothing",
    "_NashMTLWeighting": "root",
    "ExcessMTLWeighting": "gradients",
}
# To these the Gramian's scale is nothing, but for taking a small one (a trace below 1e-4), or in IMTLG a large one, for
# zero. They are given one of trace 1.
_SCALE_FREE = {"UPGradWeighting", "DualProjWeighting", "CAGradWeighting", "IMTLGWeighting"}
_TWO_BATCHES = {"MoDoWeighting", "SDMGradWeighting"}
_INTERNAL = frozenset(vars(nn.Module()))


class Held:
    """A module of TorchJD with what it lacks to be part of a run that resumes.

    TorchJD draws from torch's global generator and keeps state in plain attributes and in buffers that are None at
    first, which no strict `load_state_dict` takes back. So the module is hidden from the rule that holds it, runs on a
    fork of the global generator, and is saved attribute by attribute.

    Args:
        tasks: names of the tasks.
        module: the weighting or aggregator.
    """

    def __init__(self, tasks: Sequence[str], module: nn.Module) -> None:
        self.tasks = tuple(tasks)
        self.module = module
        self.name = type(module).__name__.removeprefix("_")
        self.stateful = any(hasattr(part, "reset") for part in module.modules())

    def run(self, matrix: Tensor, present: Sequence[bool], generator: torch.Generator) -> Tensor:
        """What the module makes of the rows of the tasks that are present.

        Raises:
            ValueError: if it keeps state for each task and one is absent.
        """
        module = self.module if all(present) else self._without_absent(present)
        for place, key, value in _data(module):
            if isinstance(value, Tensor) and value.is_floating_point():
                place[key] = value.to(matrix)
            elif isinstance(value, tuple):
                # Shape, type and device of the last matrix: TorchJD starts anew where the next differs.
                place[key] = tuple(
                    matrix.dtype if isinstance(v, torch.dtype) else matrix.device if isinstance(v, torch.device) else v
                    for v in value
                )
        with _forked(generator, matrix.device):
            return module(matrix)

    def state(self) -> dict[str, Any]:
        """All that the module and its parts hold in tensors, arrays, numbers and texts."""
        found: dict[str, Any] = {}
        for path, part in self.module.named_modules():
            found[path] = {key: packed for _, key, value in _own(part) if (packed := _packed(value)) is not _OPAQUE}
        return {"name": self.name, "parts": found}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state, if it is one of the same class."""
        if state["name"] != self.name:
            raise ValueError(f"the state is one of TorchJD's {state['name']}, not of {self.name}")
        for path, values in state["parts"].items():
            part: Any = self.module.get_submodule(path)
            for key, value in values.items():
                place = next((p for p in (part._buffers, part._parameters) if key in p), vars(part))
                place[key] = _unpacked(value)
            # NashMTL states its problem in the first step, and only then.
            if hasattr(part, "_init_optim_problem") and part.step:
                part._init_optim_problem()

    def _without_absent(self, present: Sequence[bool]) -> nn.Module:
        if self.stateful:
            absent = ", ".join(name for name, here in zip(self.tasks, present, strict=True) if not here)
            raise ValueError(
                f"TorchJD's {self.name} keeps state for each task and cannot leave one out of a step; "
                f"this batch has no label for: {absent}"
            )
        module = copy.deepcopy(self.module)
        chosen = torch.tensor(present)
        for place, key, value in _data(module):
            if isinstance(value, Tensor) and value.ndim and len(value) == len(present):
                place[key] = value[chosen.to(value.device)]
        return module


class TorchJDWeighting(GramianWeighting):
    """Weights from a TorchJD weighting, or from the one within a weighted aggregator.

    Args:
        tasks: the tasks.
        module: the weighting.
        reads: ``"gramian"``, ``"root"`` (T vectors with that Gramian, for one that only takes their inner products),
            ``"gradients"`` or ``"nothing"``.
        at: where gradients are read.
        scale: ``"paper"`` leaves the weights as they are, ``"sum"`` multiplies by the number of tasks with labels.
        seed: of the rule's generator.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        module: nn.Module,
        *,
        reads: str = "gramian",
        at: Place = "parameters",
        scale: str = "paper",
        seed: int = 0,
    ) -> None:
        super().__init__(tasks, at=at, seed=seed)
        self.reads = reads
        self.scale = check_scale(scale)
        self.held = Held(self.tasks, module)
        self.unit = any(type(part).__name__ in _SCALE_FREE for part in module.modules())
        if reads == "gradients" and at == "features" and self.held.stateful:
            raise ValueError(
                f"TorchJD's {self.held.name} keeps state for each coordinate, and at 'features' coordinates belong to "
                "samples, which change from batch to batch; use at='parameters'"
            )

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]``, zero for tasks without a label in this batch.

        Raises:
            SolverFailure: if the Gramian or the weights are not finite.
        """
        if self.reads != "gradients":
            return super().forward(signals)
        matrix, present = _rows(signals, self.at, self.held.name)
        weights = torch.zeros_like(signals.losses)
        if len(matrix):
            found = self.held.run(matrix, present, self.generator)
            if not found.isfinite().all():
                raise StepFailure(f"TorchJD's {self.held.name} returned weights that are not finite")
            found = total_weight(self.scale, len(matrix)) * found
            weights[torch.tensor(present, device=weights.device)] = found.to(weights)
        return weights

    def compared(self, signals: Signals) -> Tensor:
        """The Gramian, or zeros for a weighting that does not read it."""
        if self.reads == "nothing":
            return signals.losses.new_zeros(len(self.tasks), len(self.tasks))
        return super().compared(signals)

    def weigh(self, fetched: Fetched) -> np.ndarray:
        """Weights of the tasks that have labels."""
        gramian = fetched.gramian
        trace = np.trace(gramian)
        given = gramian / trace if self.unit and trace > 0 else gramian
        if self.reads == "root":
            given = np.ascontiguousarray(vectors(gramian).T)
        with torch.no_grad():
            found = self.held.run(torch.from_numpy(given), fetched.present.tolist(), self.generator)
        weights = found.to(torch.float64).cpu().numpy()
        if not np.isfinite(weights).all():
            raise SolverFailure(f"TorchJD's {self.held.name} returned weights that are not finite", gramian)
        return total_weight(self.scale, len(gramian)) * weights

    def get_extra_state(self) -> dict[str, Any]:
        """The state of the weighting, besides what every rule saves."""
        return super().get_extra_state() | {"torchjd": self.held.state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on where a saved rule stood."""
        super().set_extra_state(state)
        self.held.restore(state["torchjd"])


class TorchJDCombiner(Combiner):
    """The combined gradient of a TorchJD aggregator that is not a weighted sum.

    Args:
        tasks: the tasks.
        module: the aggregator.
        at: where gradients are combined.
        scale: ``"paper"`` leaves the gradient as it is, ``"sum"`` multiplies by the number of tasks with labels.
        seed: of the rule's generator.
    """

    def __init__(
        self, tasks: Sequence[Task], module: nn.Module, *, at: Place = "parameters", scale: str = "paper", seed: int = 0
    ) -> None:
        super().__init__(tasks, at=at, seed=seed)
        self.scale = check_scale(scale)
        self.held = Held(self.tasks, module)

    def forward(self, signals: Signals) -> Tensor:
        """The combined gradient ``[D]`` of the tasks that have labels.

        Raises:
            StepFailure: if the gradients, or what becomes of them, are not finite.
        """
        matrix, present = _rows(signals, self.at, self.held.name)
        if not len(matrix):
            return matrix.new_zeros(matrix.shape[1])
        combined = total_weight(self.scale, len(matrix)) * self.held.run(matrix, present, self.generator)
        if not combined.isfinite().all():
            raise StepFailure(f"TorchJD's {self.held.name} returned a gradient that is not finite")
        return combined

    def get_extra_state(self) -> dict[str, Any]:
        """The state of the aggregator, besides what every rule saves."""
        return super().get_extra_state() | {"torchjd": self.held.state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on where a saved rule stood."""
        super().set_extra_state(state)
        self.held.restore(state["torchjd"])


def torchjd(
    tasks: Sequence[Task],
    *,
    aggregator: str | nn.Module,
    options: Mapping[str, Any] | None = None,
    at: Place = "parameters",
    scale: str = "paper",
    seed: int = 0,
) -> Method:
    """A TorchJD weighting or aggregator for the shared parameters; task-specific ones keep their own gradients.

    A weighting, and an aggregator that weighs by the Gramian, is given the Gramian in float64 on the host: T² numbers,
    fetched in one wait. So is NashMTL, in the form of T vectors. Mean, Sum, Constant and Random read no gradient. An
    aggregator that weighs by the gradients themselves gives weights too; one that does not weigh (GradDrop,
    TrimmedMean, ConFIG) fills the encoder's slot as a Combiner. Those two kinds are given all gradients, ``[T, D]`` on
    the device, and wait for it several times; at ``"features"`` they work in one process only.

    Weights are TorchJD's own: UPGrad, DualProj, Mean and CAGrad average over the tasks, those of MGDA, IMTLG, Krum and
    Random sum to 1, and PCGrad and GradDrop are sums; ``scale="sum"`` makes sums of the former. PCD takes the first
    task for the primary one. Tasks without labels are left out, with their entry of any vector given in `options`; an
    aggregator with state (one with a `reset`) raises instead. Its state is saved with the rule, all that it draws comes
    from the rule's generator, and torch's global one is left as it was.

    Args:
        tasks: the tasks.
        aggregator: the name of a class in `torchjd.aggregation`, or an object. Objects are used, not copied.
        options: what the class is made with. A list becomes a vector, ``{"name": ..., "options": ...}`` another
            object of TorchJD; `n_tasks` is filled in.
        at: where gradients are read, over the shared ``"parameters"`` or at the shared ``"features"``.
        scale: ``"paper"`` leaves TorchJD's scale, ``"sum"`` multiplies by the number of tasks with labels.
        seed: of the rule's generator.

    Raises:
        ImportError: without TorchJD, or what the class needs of it; says what to install.
        MissingKey: for a name that the installed TorchJD does not have.
        TypeError: for an object that is neither weighting nor aggregator, or options that its class does not take.
        ValueError: for options beside an object, PCD whose first task is not the one primary task, an unknown place or
            scale, or state per coordinate at features.

    >>> tasks = [Task("seg", loss=abs), Task("depth", loss=abs)]
    >>> torchjd(tasks, aggregator="UPGrad").encoder.held.module
    UPGradWeighting(
      (weighting): MeanWeighting()
    )
    >>> torchjd(tasks, aggregator="UPGard")
    Traceback (most recent call last):
    ...
    sidetask_core.task.MissingKey: TorchJD ... has no 'UPGard'; did you mean 'UPGrad'? it has: AlignedMTL, ...
    """
    library = _library()
    if isinstance(aggregator, str):
        aggregator = _build(aggregator, options or {}, len(tasks))
    elif options is not None:
        raise ValueError("options make an object from a name; beside an object they have no meaning")
    if not isinstance(aggregator, (library.Aggregator, library.Weighting)):
        raise TypeError(f"aggregator must be a weighting or an aggregator of TorchJD, not {aggregator!r}")
    parts = {type(part).__name__ for part in aggregator.modules()}
    if "PCDWeighting" in parts and [task.primary for task in tasks] != [True] + [False] * (len(tasks) - 1):
        primary = ", ".join(task.name for task in tasks if task.primary) or "none"
        raise ValueError(f"PCD takes the first task for the one primary task; primary here: {primary}")
    if parts & _TWO_BATCHES:
        warnings.warn(
            f"{', '.join(parts & _TWO_BATCHES)} wants inner products between the gradients of two independent batches "
            "and is given those of one; its guarantee of convergence does not hold",
            stacklevel=2,
        )
    weighting, reads = _weighting(aggregator, library)
    rule: TorchJDWeighting | TorchJDCombiner
    if weighting is None:
        rule = TorchJDCombiner(tasks, aggregator, at=at, scale=scale, seed=seed)
    else:
        rule = TorchJDWeighting(tasks, weighting, reads=reads, at=at, scale=scale, seed=seed)
    return Method(encoder=rule, decoder=Equal(tasks))


def _library() -> Any:
    try:
        return importlib.import_module("torchjd.aggregation")
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "torchjd":
            raise
        raise ImportError("TorchJD is not installed; pip install 'sidetask-baselines[torchjd]'") from error


def _build(name: str, options: Mapping[str, Any], count: int) -> Any:
    """An object of TorchJD from the name of its class."""
    library = _library()
    found = vars(library).get(name) or vars(importlib.import_module("torchjd.linalg")).get(name)
    if not inspect.isclass(found) or inspect.isabstract(found):
        known = [n for n, c in vars(library).items() if inspect.isclass(c) and not inspect.isabstract(c)]
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise MissingKey(f"TorchJD {version('torchjd')} has no {name!r}; {hint}it has: {', '.join(sorted(known))}")
    made: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            if "name" not in value:
                raise MissingKey(f"{name}'s option {key!r} needs the 'name' of a class; it has: {', '.join(value)}")
            made[key] = _build(value["name"], value.get("options") or {}, count)
        elif isinstance(value, (list, tuple)):
            made[key] = torch.tensor(value, dtype=torch.float64)
        else:
            made[key] = value
    if "n_tasks" in inspect.signature(found).parameters:
        made.setdefault("n_tasks", count)
    return found(**made)


def _weighting(module: nn.Module, library: Any) -> tuple[nn.Module | None, str]:
    """The weighting that a module is or wraps, None if it combines otherwise, and what that weighting reads."""
    if isinstance(module, library.Weighting):
        return module, _READS.get(type(module).__name__, "gramian")
    plain = library.WeightedAggregator
    if not isinstance(module, plain) or type(module).forward is not plain.forward:
        return None, "gradients"
    if isinstance(module, library.GramianWeightedAggregator):
        return module.gramian_weighting, "gramian"
    return module.weighting, _READS.get(type(module.weighting).__name__, "gradients")


def _rows(signals: Signals, at: Place, name: str) -> tuple[Tensor, list[bool]]:
    """The gradients of the tasks that have labels, and which of all those are.

    Raises:
        ValueError: at features under several processes, each of which has a part of every gradient only.
        StepFailure: if a gradient is not finite.
    """
    if at == "features" and parallel.world() > 1:
        raise ValueError(
            f"TorchJD's {name} compares whole gradients, of which each of the {parallel.world()} processes has only "
            "its samples' part at 'features'; use at='parameters'"
        )
    # Joined, so that the host waits once.
    norms, labelled = torch.stack([signals.norms(at), signals.labelled.to(signals.losses)]).tolist()
    present = [bool(flag) for flag in labelled]
    bad = [task for task, norm in zip(signals.tasks, norms, strict=True) if not np.isfinite(norm)]
    if bad:
        raise StepFailure(f"the gradients of tasks {', '.join(bad)} are not finite")
    gradients = signals.gradients(at)
    return gradients if all(present) else gradients[torch.tensor(present, device=gradients.device)], present


@contextmanager
def _forked(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Seed the global generators of host and device from `generator`, and put them back afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
        # torch.manual_seed would seed the other devices too.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


def _own(part: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Each datum that a module itself holds, with the dictionary it is in and its name there."""
    for place in (vars(part), part._buffers, part._parameters):
        yield from [(place, key, value) for key, value in place.items() if key not in _INTERNAL]


def _data(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for part in module.modules():
        yield from _own(part)


_OPAQUE = object()


def _packed(value: Any) -> Any:
    """`value` as `torch.load` reads it with `weights_only`; `_OPAQUE` for what comes from options or is derived."""
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        packed = tuple(map(_packed, value))
        return _OPAQUE if any(part is _OPAQUE for part in packed) else packed
    plain = (int, float, str, type(None), torch.dtype, torch.device)
    return value if isinstance(value, plain) else _OPAQUE


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return value["array"].cpu().numpy()
    return tuple(map(_unpacked, value)) if isinstance(value, tuple) else value
