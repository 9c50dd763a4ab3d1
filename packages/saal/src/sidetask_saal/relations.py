"""Which task helps which: enumerated by training all pairs, kept in a file."""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from sidetask_core import Task, relative_improvement_by_task
from sidetask_core.improvement import Definition
from tqdm import tqdm  # type: ignore[import-untyped]

from sidetask_saal.names import ends, transfer

Results = Mapping[str, Mapping[str, float]]
Names = tuple[str, ...]
Train = Callable[[Names], Results]
Progress = Callable[[int, int, Names], None]
Executors: TypeAlias = Executor | Callable[[], Executor]

_FORMAT = 1


@dataclass(frozen=True)
class Relations:
    """How much each task improves by training beside each other one.

    Attributes:
        tasks: the names of the T tasks.
        improvement: ``[T, T]``, of the target (column) by the source (row), in percent of its single training; NaN on
            the diagonal and where it is not known.
        rows: for every ordered pair and metric of the target one mapping with the same keys: ``source``, ``target``,
            ``metric``, ``higher_is_better``, its value in the ``single`` and the ``paired`` training, the target's
            ``improvement``, whether that is a ``transfer``, and the error if a training ``failed``.
        failed: what went wrong, by the names of a training's tasks joined by ``+``.
    """

    tasks: Names
    improvement: npt.NDArray[np.float64]
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def transfers(self) -> npt.NDArray[np.bool_]:
        """``[T, T]``, whether the source (row) helps the target (column): a positive improvement."""
        return np.nan_to_num(self.improvement) > 0

    def chosen(self, tasks: Sequence[str] | None = None) -> list[str]:
        """The names of the transfers that help, by targets and then by sources.

        Args:
            tasks: the tasks that are asked about, which must be these; in any order.

        Raises:
            ValueError: for other tasks, or if a training failed, about which nothing is known.
        """
        if tasks is not None and set(tasks) != set(self.tasks):
            raise ValueError(f"the relations are those of tasks {', '.join(self.tasks)}, not of {', '.join(tasks)}")
        if self.failed:
            what = "; ".join(f"{names}: {error}" for names, error in self.failed.items())
            raise ValueError(f"trainings failed ({what}); enumerate again, which repeats only these")
        for (s, source), (t, target) in itertools.permutations(enumerate(self.tasks), 2):
            if not math.isfinite(self.improvement[s, t]):
                raise ValueError(f"it is not known whether {source!r} helps {target!r}; enumerate again")
        helps = self.transfers
        return [
            transfer(source, target)
            for t, target in enumerate(self.tasks)
            for s, source in enumerate(self.tasks)
            if helps[s, t]
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON, which `load` and the methods' option ``relations`` read."""
        matrix = [[_plain(x) for x in row] for row in self.improvement]
        content = {"format": _FORMAT, "tasks": list(self.tasks), "improvement": matrix}
        _write(Path(path), {**content, "rows": self.rows, "failed": self.failed})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Relations:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is none, saying what writes it.
            ValueError: if the file is not of that kind, saying what is wrong with it.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"there is no file of relations {path}; `sidetask relations` writes one, as does Relations.save"
            )
        content = _read(path)
        tasks, matrix = content.get("tasks"), content.get("improvement")
        if content.get("format") != _FORMAT or not isinstance(tasks, list) or not isinstance(matrix, list):
            raise ValueError(f"{path} does not hold enumerated relations")
        if not all(isinstance(name, str) for name in tasks) or len({*tasks}) < max(2, len(tasks)):
            raise ValueError(f"{path}: tasks must be two or more different names, found {json.dumps(tasks)}")
        for row in matrix:
            if not isinstance(row, list) or len(row) != len(tasks) or not all(_number(x) for x in row):
                raise ValueError(
                    f"{path}: a row of improvement must be {len(tasks)} numbers or null, found {json.dumps(row)}"
                )
        if len(matrix) != len(tasks):
            raise ValueError(f"{path}: improvement has {len(matrix)} rows for {len(tasks)} tasks")
        rows, failed = content.get("rows", []), content.get("failed", {})
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: rows must be a list of objects")
        if not isinstance(failed, dict) or not all(isinstance(error, str) for error in failed.values()):
            raise ValueError(f"{path}: failed must map trainings to errors, found {json.dumps(failed)}")
        values = np.array([[math.nan if x is None else x for x in row] for row in matrix], dtype=np.float64)
        return cls(tuple(tasks), values, rows, failed)


def enumerate_transfers(
    train: Train,
    tasks: Iterable[Task],
    *,
    executor: Executors | None = None,
    cache: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    definition: Definition = "mean-of-tasks",
    progress: Progress | None = None,
) -> Relations:
    """Train every task alone and every pair on a shared bottom, and see which task helps which (SAAL-e).

    The source s helps the target t if training both improves t over training t alone, by t's own relative improvement.
    T (T + 1) / 2 trainings, none of which needs another.

    Args:
        train: ``train(names)`` trains the tasks of these names together and gives their metrics,
            ``{task: {metric: value}}``. An executor of processes has to be able to import it by name.
        tasks: the tasks; their metrics say what counts and which way is better.
        executor: where trainings run, any of `concurrent.futures`; one after the other in this process if None. Give a
            function that makes one, ``lambda: ProcessPoolExecutor(4)``, where a worker may die (out of memory, say):
            that breaks the executor, and another is made for what is left, first for one training at a time, until the
            one that kills is found.
        cache: a folder that keeps the result of every finished training, so that the same call goes on after a kill
            with what is missing.
        settings: what else the results depend on (seed, epochs, ...), kept with the cache, which refuses other settings
            or tasks; anything that JSON can say.
        definition: of a task's improvement, see `sidetask_core.relative_improvement`.
        progress: called as ``progress(done, total, names)`` after each training, with those from the cache counted
            beforehand; a bar on standard error if None.

    Returns:
        The relations. A training that failed is named in their `failed` with its error, and takes nothing from the
        others: one that raised any exception, gave no such metrics, gave numbers of which no improvement follows (NaN,
        or zero alone), or whose worker died; of an executor that was not made here and broke down, all that it had
        left. The same call tries these again, and no others.

    Raises:
        ValueError: before anything is trained, for fewer than two tasks, a task without metrics, a metric that does not
            say which way is better, an unknown definition, or a cache of other tasks or settings.

    >>> class Accuracy: higher_is_better = True
    >>> tasks = [Task(name, loss=abs, metrics={"accuracy": Accuracy()}) for name in ("a", "b")]
    >>> def train(names):
    ...     together = {"a": {"accuracy": 0.4}, "b": {"accuracy": 0.6}}
    ...     return together if len(names) == 2 else {names[0]: {"accuracy": 0.5}}
    >>> relations = enumerate_transfers(train, tasks, progress=lambda *_: None)
    >>> relations.chosen()
    ['a→b']
    """
    tasks = _checked_tasks(tasks, definition)
    names = tuple(task.name for task in tasks)
    groups: list[Names] = [(name,) for name in names] + list(itertools.combinations(names, 2))
    trainings, baselines = {group: group for group in groups}, {(name,) for name in names}
    folder = None if cache is None else _Cache(Path(cache), "pairs", tasks, settings or {})
    done, failed = _train_all(train, trainings, baselines, tasks, executor, folder, definition, progress)

    def single(target: str) -> Names:
        return (target,)

    def paired(source: str, target: str) -> Names:
        return tuple(sorted((source, target), key=names.index))

    return _relations(tasks, done, failed, single, paired, definition)


def feature_relations(
    train: Train,
    tasks: Iterable[Task],
    *,
    executor: Executors | None = None,
    cache: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    definition: Definition = "mean-of-tasks",
    progress: Progress | None = None,
) -> Relations:
    """How good the source's features are for the target, beside the target's own: an estimate of relations.

    For every ordered pair, a small head (two layers) for the target is trained on the encoder that was trained on the
    source alone and learns no more (`sidetask_saal.Frozen`); the relation is the target's relative improvement over the
    same with its own encoder. T² trainings.

    Args:
        train: ``train((source, target))`` trains such a head and gives ``{target: {metric: value}}``; source and target
            may be the same.
        tasks: as of `enumerate_transfers`, like all the rest.
        executor: where trainings run.
        cache: a folder that keeps results; not the one of `enumerate_transfers`.
        settings: what else the results depend on.
        definition: of a task's improvement.
        progress: called after each training.

    Returns:
        The relations; the rows' ``single`` is the value on the target's own encoder, ``paired`` that on the source's.

    Raises:
        ValueError: as `enumerate_transfers`.
    """
    tasks = _checked_tasks(tasks, definition)
    trainings: dict[Names, Names] = {(s.name, t.name): (t.name,) for s, t in itertools.product(tasks, repeat=2)}
    baselines: set[Names] = {(task.name, task.name) for task in tasks}
    folder = None if cache is None else _Cache(Path(cache), "features", tasks, settings or {})
    done, failed = _train_all(train, trainings, baselines, tasks, executor, folder, definition, progress)
    return _relations(tasks, done, failed, lambda t: (t, t), lambda s, t: (s, t), definition)


def _checked_tasks(tasks: Iterable[Task], definition: Definition) -> tuple[Task, ...]:
    tasks = tuple(tasks)
    names = [task.name for task in tasks]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"relations are between two or more different tasks, not {', '.join(names) or 'none'}")
    if definition not in get_args(Definition):
        raise ValueError(f"definition must be one of {', '.join(get_args(Definition))}, not {definition!r}")
    for task in tasks:
        if not task.metrics:
            raise ValueError(f"task {task.name!r} has no metrics by which it could improve")
        for name, metric in task.metrics.items():
            if metric.higher_is_better is None:
                raise ValueError(f"metric {name!r} of task {task.name!r} does not say whether higher is better")
        if ends(task.name) is not None:
            raise ValueError(f"task {task.name!r} has the name of a transfer")
    return tasks


def _train_all(
    train: Train,
    trainings: Mapping[Names, Names],
    baselines: Collection[Names],
    tasks: Sequence[Task],
    executor: Executors | None,
    cache: _Cache | None,
    definition: Definition,
    progress: Progress | None,
) -> tuple[dict[Names, Results], dict[Names, str]]:
    """The results of all trainings, and the errors of those that failed.

    Args:
        train: the training.
        trainings: what it is given, and the tasks whose metrics it has to give.
        baselines: those to which others are relative.
        tasks: say which metrics those are.
        executor: where.
        cache: what is done already.
        definition: which metrics count.
        progress: as of `enumerate_transfers`.
    """
    wanted = {group: [t for t in tasks if t.name in names] for group, names in trainings.items()}

    def undefined(group: Names, results: Results) -> str | None:
        return _undefined(results, wanted[group], group in baselines, definition)

    done: dict[Names, Results] = {}
    if cache is not None:
        kept = {group: cache.get(group, wanted[group]) for group in trainings}
        # Numbers of which no improvement follows are as good as none.
        done = {group: found for group, found in kept.items() if found is not None and not undefined(group, found)}
    missing = [group for group in trainings if group not in done]
    failed: dict[Names, str] = {}
    show, close = _shown(progress, len(trainings), len(done))
    ended = len(done)
    try:
        for group, future in _run(train, missing, executor):
            try:
                done[group] = _checked(future.result(), group, wanted[group])
            except (KeyboardInterrupt, GeneratorExit):
                raise
            except BaseException as error:  # noqa: BLE001 (whatever it is, a process's SystemExit among them)
                failed[group] = f"{type(error).__name__}: {error}"
            else:
                if cache is not None:
                    cache.put(group, done[group])
                if problem := undefined(group, done[group]):
                    failed[group] = problem
            ended += 1
            show(ended, len(trainings), group)
    finally:
        close()
    return done, failed


def _undefined(results: Results, tasks: Sequence[Task], baseline: bool, definition: Definition) -> str | None:
    """Why no improvement follows of these results, if none does."""
    for task in tasks:
        for i, name in enumerate(task.metrics):
            value = results[task.name][name]
            if math.isnan(value) and not (definition == "one-metric" and i):
                return f"metric {name!r} of task {task.name!r} is not a number"
            if baseline and value == 0:
                return f"metric {name!r} of task {task.name!r} is 0, and no improvement is relative to that"
    return None


def _relations(
    tasks: Sequence[Task],
    done: Mapping[Names, Results],
    failed: Mapping[Names, str],
    single_of: Callable[[str], Names],
    pair_of: Callable[[str, str], Names],
    definition: Definition,
) -> Relations:
    names = tuple(task.name for task in tasks)
    matrix = np.full((len(names), len(names)), math.nan)
    rows: list[dict[str, Any]] = []
    errors = {"+".join(group): error for group, error in failed.items()}
    for (s, source), (t, target) in itertools.permutations(enumerate(tasks), 2):
        alone, pair = single_of(target.name), pair_of(source.name, target.name)
        single, paired = done.get(alone), done.get(pair)
        error = errors.get("+".join(pair)) or errors.get("+".join(alone))
        if error is None and single is not None and paired is not None:
            matrix[s, t] = relative_improvement_by_task(paired, single, [target], definition)[target.name]
        for metric, about in target.metrics.items():
            rows.append(
                {
                    "source": source.name,
                    "target": target.name,
                    "metric": metric,
                    "higher_is_better": about.higher_is_better,
                    "single": None if single is None else _plain(single[target.name][metric]),
                    "paired": None if paired is None else _plain(paired[target.name][metric]),
                    "improvement": _plain(matrix[s, t]),
                    "transfer": bool(matrix[s, t] > 0),
                    "failed": error,
                }
            )
    return Relations(names, matrix, rows, errors)


def _run(train: Train, groups: Sequence[Names], executor: Executors | None) -> Iterator[tuple[Names, Future[Results]]]:
    """Each group with its finished future, in the order they are ready."""
    if executor is None:
        for group in groups:
            yield group, _here(train, group)
        return
    if isinstance(executor, Executor):
        yield from _submitted(train, groups, executor)
        return
    left, one_by_one = list(groups), False
    while left:
        pool, broken = executor(), {}
        try:
            for group, future in _submitted(train, left[:1] if one_by_one else left[:], pool):
                if not future.cancelled() and isinstance(future.exception(), BrokenExecutor):
                    broken[group] = future
                else:
                    left.remove(group)
                    yield group, future
        finally:
            pool.shutdown(cancel_futures=True)
        # A worker that dies takes all that was under way with it: only what was alone is known to be the cause.
        if one_by_one:
            for group, future in broken.items():
                left.remove(group)
                yield group, future
        one_by_one = bool(broken) != one_by_one


def _submitted(train: Train, groups: Sequence[Names], executor: Executor) -> Iterator[tuple[Names, Future[Results]]]:
    futures: dict[Future[Results], Names] = {}
    try:
        for group in groups:
            try:
                futures[executor.submit(train, group)] = group
            except BrokenExecutor as error:
                future: Future[Results] = Future()
                future.set_exception(error)
                futures[future] = group
        for future in as_completed(futures):
            yield futures[future], future
    finally:
        for future in futures:
            future.cancel()


def _here(train: Train, group: Names) -> Future[Results]:
    future: Future[Results] = Future()
    try:
        future.set_result(train(group))
    except Exception as error:  # noqa: BLE001 (as an executor does: whatever it is, the caller gets it with its pair)
        future.set_exception(error)
    return future


def _checked(results: Any, group: Names, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """The metrics that count, as plain numbers."""
    found: dict[str, dict[str, float]] = {}
    for task in tasks:
        given = results.get(task.name) if isinstance(results, Mapping) else None
        for metric in task.metrics:
            if not isinstance(given, Mapping) or metric not in given:
                have = ", ".join(given) if isinstance(given, Mapping) else "nothing"
                raise ValueError(
                    f"train({group}) gave no metric {metric!r} of task {task.name!r}; of that task there is: {have}"
                )
            try:
                value = float(given[metric])
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"train({group}) gave {given[metric]!r} for metric {metric!r} of task {task.name!r}, not a number"
                ) from error
            found.setdefault(task.name, {})[metric] = value if math.isfinite(value) else math.nan
    return found


def _shown(progress: Progress | None, total: int, done: int) -> tuple[Progress, Callable[[], None]]:
    """What to call after each training, and at the end."""
    if progress is not None:
        return progress, lambda: None
    bar = tqdm(total=total, initial=done, unit="training")

    def show(done: int, total: int, names: Names) -> None:
        bar.set_postfix_str(" + ".join(names), refresh=False)
        bar.update()

    return show, bar.close


class _Cache:
    """A folder with one file for each training, and one that says what they are trainings of."""

    def __init__(self, folder: Path, kind: str, tasks: Sequence[Task], settings: Mapping[str, Any]) -> None:
        self.folder, self.names = folder, tuple(task.name for task in tasks)
        metrics = {task.name: {name: m.higher_is_better for name, m in task.metrics.items()} for task in tasks}
        # As it reads back, so that tuples and lists are one.
        ours = json.loads(
            json.dumps({"format": _FORMAT, "trainings": kind, "tasks": metrics, "settings": dict(settings)})
        )
        path = folder / "settings.json"
        if path.exists():
            theirs = _read(path)
            changed = [key for key in ours if theirs.get(key) != ours[key]]
            if changed:
                key = changed[0]
                raise ValueError(
                    f"{folder} holds trainings of other {key}: {json.dumps(theirs.get(key))}, not "
                    f"{json.dumps(ours[key])}; take another folder"
                )
        else:
            if folder.is_dir() and any(folder.glob("[0-9]*.json")):
                raise ValueError(
                    f"{folder} holds trainings, but no settings.json that says of what; take another folder"
                )
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, ours)

    def get(self, group: Names, tasks: Sequence[Task]) -> dict[str, dict[str, float]] | None:
        """The result of a training of which the metrics of `tasks` are wanted, None if there is none."""
        path = self._path(group)
        if not path.exists():
            return None
        content = _read(path)
        results = content.get("results")
        if content.get("names") != list(group) or not isinstance(results, dict):
            raise ValueError(f"{path} is not the training of {', '.join(group)}; delete it to train again")
        found: dict[str, dict[str, float]] = {}
        for task in tasks:
            given = results.get(task.name)
            for metric in task.metrics:
                if not isinstance(given, dict) or metric not in given or not _number(given[metric]):
                    raise ValueError(
                        f"{path}: expected a number or null for metric {metric!r} of task {task.name!r}, found "
                        f"{json.dumps(given)}; delete it to train again"
                    )
                found.setdefault(task.name, {})[metric] = math.nan if given[metric] is None else given[metric]
        return found

    def put(self, group: Names, results: Results) -> None:
        """Keep the result of a training."""
        plain = {
            name: {metric: _plain(value) for metric, value in metrics.items()} for name, metrics in results.items()
        }
        _write(self._path(group), {"names": list(group), "results": plain})

    def _path(self, group: Names) -> Path:
        # By place, since a name may hold what no file name may.
        return self.folder / f"{'-'.join(str(self.names.index(name)) for name in group)}.json"


def _number(value: Any) -> bool:
    """Whether it is what JSON says of a number that may be unknown."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _plain(value: float) -> float | None:
    """As JSON can say it."""
    return None if math.isnan(value) else float(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a kill leaves the old file or the new one."""
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
