"""What an experiment is: typed records read from YAML, and the single runs that its rows and seeds make."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sidetask_bench import document
from sidetask_bench.breakdown import Breakdown
from sidetask_bench.schema import ExperimentError, as_mapping, build, join, limited, plain, unknown, wrong


@dataclass(frozen=True)
class Plugin:
    """A data set or network by its entry-point name, with the options of its factory; a bare name is enough."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, data: Any, path: str) -> Plugin:
        """Read ``small`` or ``{name: small, cut: 3}``."""
        data = {"name": data} if isinstance(data, str) else as_mapping(data, path)
        if not isinstance(data.get("name"), str):
            raise wrong(join(path, "name"), "the name of an installed plug-in", data.get("name"))
        return cls(data.pop("name"), data)

    def to_plain(self) -> dict[str, Any]:
        """One flat mapping, the name first."""
        return {"name": self.name, **self.options}


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    lr: float = limited(0.1, above=0)
    momentum: float = limited(0.9, minimum=0)
    weight_decay: float = limited(1e-4, minimum=0)
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")


@dataclass(frozen=True)
class Adam:
    """Adam, with the weight decay added to the gradient."""

    name: Literal["adam"] = "adam"
    lr: float = limited(1e-4, above=0)
    betas: tuple[float, float] = limited((0.9, 0.999), minimum=0, below=1)
    eps: float = limited(1e-8, above=0)
    weight_decay: float = limited(0.0, minimum=0)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    lr: float = limited(1e-3, above=0)
    betas: tuple[float, float] = limited((0.9, 0.999), minimum=0, below=1)
    eps: float = limited(1e-8, above=0)
    weight_decay: float = limited(1e-2, minimum=0)


@dataclass(frozen=True)
class Constant:
    """The learning rate as given, after `warmup` epochs of linear rise."""

    name: Literal["constant"] = "constant"
    warmup: float = limited(0.0, minimum=0)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the learning rate to `final` times it; changes `per` epoch (as the papers do) or step."""

    name: Literal["cosine"] = "cosine"
    per: Literal["epoch", "step"] = "epoch"
    final: float = limited(0.0, minimum=0)
    warmup: float = limited(0.0, minimum=0)


@dataclass(frozen=True)
class Poly:
    """``(1 - progress) ** power``; 0.9 is the segmentation literature's."""

    name: Literal["poly"] = "poly"
    per: Literal["epoch", "step"] = "epoch"
    power: float = limited(0.9, above=0)
    warmup: float = limited(0.0, minimum=0)


@dataclass(frozen=True)
class StepDecay:
    """Times `factor` at each epoch of `at`, or every `every` epochs."""

    name: Literal["step"] = "step"
    at: tuple[int, ...] = limited((), minimum=1)
    every: int | None = limited(None, minimum=1)
    factor: float = limited(0.5, above=0)
    warmup: float = limited(0.0, minimum=0)

    def __post_init__(self) -> None:
        if bool(self.at) == (self.every is not None):
            raise ValueError("give either at: [epochs] or every: epochs")


@dataclass(frozen=True)
class Gradients:
    """How often the tasks' gradients are compared while training, and where (`sidetask_bench.conflict`).

    Each comparison costs a forward pass on the step's batch and a backward pass for every task over the encoder; at the
    shared ``features``, which tasks with inputs of their own do not have in common, one over the heads alone.
    """

    every: int = limited(50, minimum=1)
    at: Literal["parameters", "features"] = "parameters"


@dataclass(frozen=True)
class Training:
    """How to train.

    `batch_size` is what one optimizer step sees over all processes, before `accumulate` multiplies it: gradients of
    `accumulate` micro-batches are averaged. `clip` bounds the norm of the whole gradient. `device: auto` is CUDA
    where there is one. `deterministic` asks CUDA for repeatable kernels; on the CPU they are repeatable anyway.
    `select: best` tests the epoch with the best validation score (`sidetask_bench.evaluate.score`), and of tasks that
    share no parameter each one's own best (`sidetask_bench.selection`); `last` tests the last one, and with `average`
    the last so many, of which the test metrics are means (the literature's choice where nothing is held out). The score
    is of the primary tasks, or of those that `select_by` names: where only one of the tasks is wanted of a row.
    Methods that look ahead want to do well on batches of the split `lookahead`; its training batches are not those of
    the step. A checkpoint is written after every epoch, and every `checkpoint_every` optimizer steps if given.
    With `gradients`, the conflict between the tasks' gradients is recorded at some of the steps, which changes no other
    number of the run.
    """

    epochs: int = limited(10, minimum=1)
    batch_size: int = limited(16, minimum=1)
    evaluation_batch_size: int | None = limited(None, minimum=1)
    optimizer: SGD | Adam | AdamW = field(default_factory=SGD)
    schedule: Constant | Cosine | Poly | StepDecay = field(default_factory=Cosine)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    clip: float | None = limited(None, above=0)
    accumulate: int = limited(1, minimum=1)
    select: Literal["best", "last"] = "best"
    select_by: tuple[str, ...] | None = None
    average: int = limited(1, minimum=1)
    lookahead: Literal["validation", "train"] = "validation"
    checkpoint_every: int | None = limited(None, minimum=1)
    gradients: Gradients | None = None
    device: str = "auto"
    threads: int | None = limited(None, minimum=1)
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.average > 1 and self.select == "best":
            raise ValueError("average is of the last epochs; it needs select: last")
        if self.select_by is not None and self.select == "last":
            raise ValueError("select_by names tasks that choose the best epoch; it needs select: best")
        if self.average > self.epochs:
            raise ValueError(f"average is of {self.average} epochs, and there are {self.epochs}")


@dataclass(frozen=True)
class RunConfig:
    """One run: everything that decides its outcome. Stored as ``config.yaml`` in the run's folder.

    `files` has the SHA-256 of each file that an option of the method names, by the option, once the run has begun.
    """

    experiment: str
    row: str
    seed: int
    dataset: Plugin
    network: Plugin
    method: Any
    training: Training
    breakdown: Mapping[str, Breakdown] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def with_files(self) -> RunConfig:
        """The same, with what the method's files hold now."""
        options = document.flatten({"method": self.method}).items()
        named = {key: Path(value) for key, value in options if isinstance(value, str) and Path(value).suffix}
        found = {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in named.items() if path.is_file()}
        return replace(self, files=found)

    @property
    def label(self) -> str:
        """Row and seed, as people read them and folders are called."""
        return f"{self.row}/seed{self.seed}"


@dataclass(frozen=True)
class Span:
    """A figure, or the lowest and the highest of several."""

    low: float
    high: float

    @classmethod
    def from_plain(cls, data: Any, path: str) -> Span:
        """Read ``1.01`` or ``[1.26, 1.46]``."""
        if isinstance(data, list | tuple):
            low, high = build(tuple[float, float], data, path)
            if low > high:
                raise wrong(path, "the lowest figure first", data)
            return cls(low, high)
        value = build(float, data, path)
        return cls(value, value)

    def to_plain(self) -> float | list[float]:
        """One number, or both."""
        return self.low if self.low == self.high else [self.low, self.high]


@dataclass(frozen=True)
class Paper:
    """What a paper reports of an experiment's rows, to be shown beside what they give here.

    `improvement` is in percent over the paper's single-task learning, `time` a step's in units of equal weighting's:
    numbers, or ``[lowest, highest]``. Rows without one are those of which the figure is not known. `note` is shown with
    them.
    """

    source: str
    size: str
    improvement: Mapping[str, Span] = field(default_factory=dict)
    time: Mapping[str, Span] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Teacher:
    """A run of another experiment, which labels images for a pseudo task (`sidetask_bench.label`).

    `experiment` is a preset or a file, `row` one of its rows, or its base; the run has its first seed.
    """

    experiment: str
    task: str
    row: str | None = None
    kind: Literal["segmentation", "soft", "tokens"] = "segmentation"
    threshold: float = limited(0.5, minimum=0, below=1)
    patch: int = limited(8, minimum=1)
    domain: str | None = None


ROW_KEYS = ("network", "method", "training")
BASE = "base"
LARGEST_SEED = 2**32 - 1  # what every library's generator takes


@dataclass(frozen=True)
class Experiment:
    """An experiment file.

    `rows` name what `compare` sets side by side; each overrides `network`, `method` or `training` of the base
    (`sidetask_bench.document.merge`; a method is replaced as a whole). Single-task learning is the row
    ``{network: {cut: 0}}``: networks that share nothing. `baseline` is the row that relative improvement is
    measured against, the first one by default; `improvement` is one of the definitions of
    `sidetask_core.relative_improvement`. `breakdown` says of tasks by the classes of which other task their headline
    metric is shown too: ``{depth: {by: segmentation}}`` (`sidetask_bench.breakdown`). `fronts` name rows that together
    trace a trade-off between tasks, in their order: ``{pareto: [pareto-0, pareto-1]}``; they are drawn as one line.
    `teachers` label the images of a dataset ``pseudo``, each for the pseudo task of its name, before rows are trained.
    A path that begins with ``$folder`` is in the experiment's own folder, ``runs/<name>`` (`at`): ``relations:
    $folder/relations/relations.json`` are the relations of this experiment's tasks, which are made first, too.
    `paper` has the figures that ``sidetask table`` sets beside those of here.
    """

    name: str
    dataset: Plugin
    network: Plugin
    method: Any = "equal"
    training: Training = field(default_factory=Training)
    seeds: tuple[int, ...] = limited((0,), minimum=0, maximum=LARGEST_SEED)
    rows: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    improvement: Literal["mean-of-tasks", "one-metric", "flat"] = "mean-of-tasks"
    breakdown: Mapping[str, Breakdown] = field(default_factory=dict)
    fronts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    teachers: Mapping[str, Teacher] = field(default_factory=dict)
    paper: Paper | None = None

    def __post_init__(self) -> None:
        for name in (self.name, *self.rows):
            if not re.fullmatch(r"[\w+][\w.+-]*", name):
                raise ValueError(f"{name!r} names a folder: use letters, digits, and . _ + - after the first")
        if BASE in self.rows:
            raise ExperimentError(f"rows.{BASE}: the name means the experiment without a row's changes; take another")
        _check_seeds(self.seeds)
        if self.baseline is not None and self.baseline not in self.rows:
            raise unknown(self.baseline, self.rows, "baseline", "row")
        for front, rows in self.fronts.items():
            for row in rows:
                if row not in self.rows:
                    raise unknown(row, self.rows, f"fronts.{front}", "row")
        labels = self.dataset.options.get("labels")
        for name in self.teachers:
            if not isinstance(labels, Mapping) or name not in labels:
                raise unknown(name, labels if isinstance(labels, Mapping) else (), "teachers", "pseudo task")
        for row in self.rows:
            self.run(row, self.seeds[0])
        for figures, key in ((self.paper.improvement, "improvement"), (self.paper.time, "time")) if self.paper else ():
            for row in figures:
                if row not in self.rows:
                    raise unknown(row, self.rows, f"paper.{key}", "row")

    def at(self, folder: str | Path) -> Experiment:
        """The same, where ``$folder`` is this folder."""
        return build(Experiment, document.placed(plain(self), folder))

    def run(self, row: str | None, seed: int) -> RunConfig:
        """The run of one row and seed; row None (or ``base``) is the experiment without any row's changes.

        Raises:
            ExperimentError: if there is no such row, it changes what a row may not, or the seed is none.
        """
        if not 0 <= seed <= LARGEST_SEED:
            raise wrong("seed", f"0 to {LARGEST_SEED}", seed)
        parts = {key: plain(getattr(self, key)) for key in ROW_KEYS}
        if row is not None and row != BASE:
            if row not in self.rows:
                raise unknown(row, self.rows, "rows", "row")
            changes = as_mapping(self.rows[row] if self.rows[row] is not None else {}, f"rows.{row}")
            for key, value in changes.items():
                if key not in ROW_KEYS:
                    raise unknown(key, ROW_KEYS, f"rows.{row}")
                parts[key] = value if key == "method" else document.merge(parts[key], value)
        path = f"rows.{row}." if row in self.rows else ""
        return RunConfig(
            self.name,
            row or BASE,
            seed,
            self.dataset,
            network=build(Plugin, parts["network"], f"{path}network"),
            method=_method(parts["method"], f"{path}method"),
            training=build(Training, parts["training"], f"{path}training"),
            breakdown=self.breakdown,
        )

    def runs(self, seeds: Iterable[int] | None = None) -> dict[str, list[RunConfig]]:
        """All runs by row, in the file's order.

        Args:
            seeds: instead of the experiment's.

        Raises:
            ExperimentError: if there are no rows to compare, or the seeds are none or not all different.
        """
        if not self.rows:
            raise ExperimentError(f"{self.name} has no rows to compare; add rows: {{name: changes}} or use train")
        seeds = self.seeds if seeds is None else _check_seeds(tuple(seeds))
        return {row: [self.run(row, seed) for seed in seeds] for row in self.rows}


def load_experiment(source: str | Path, assignments: Iterable[str] = ()) -> Experiment:
    """Read an experiment file or preset, with ``key.path=value`` overrides.

    >>> experiment = load_experiment("digits", ["training.epochs=3"])
    >>> experiment.name, experiment.training.epochs
    ('digits', 3)

    Raises:
        ExperimentError: naming what is wrong with the file or an override.
    """
    return build(Experiment, document.override(document.read(source), assignments))


def load_run_config(path: Path) -> RunConfig:
    """Read the ``config.yaml`` of a run's folder."""
    return build(RunConfig, document.read(path))


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """What differs between two runs, one line per dotted key.

    >>> base = load_experiment("digits")
    >>> changed_keys(base.run(None, 0), base.run(None, 1))
    ['seed: 0 -> 1']
    """
    before, after = document.flatten(plain(old)), document.flatten(plain(new))
    missing = "(absent)"
    return [
        f"{key}: {before.get(key, missing)} -> {after.get(key, missing)}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key, missing) != after.get(key, missing)
    ]


def _check_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) != len(seeds):
        raise ExperimentError(f"seeds: expected at least one and all different, found {list(seeds)}")
    return seeds


def _method(value: Any, path: str) -> Any:
    if not isinstance(value, str | Mapping):
        raise wrong(path, "a method's name or a mapping with name, or with encoder and decoder", value)
    return value
