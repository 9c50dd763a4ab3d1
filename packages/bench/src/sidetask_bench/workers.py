"""Runs one after the other, or several at a time: in processes of their own, or wherever another pool has them."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypedDict, TypeVar

import torch
from sidetask_core import StepFailure, parallel

from sidetask_bench import runtime, storage
from sidetask_bench.assemble import make_dataset
from sidetask_bench.config import Plugin, RunConfig
from sidetask_bench.progress import Display
from sidetask_bench.run import train
from sidetask_bench.schema import ExperimentError

if TYPE_CHECKING:
    from sidetask_datasets import Dataset

Job = tuple[RunConfig, Path]
P = ParamSpec("P")
R = TypeVar("R")

_POLL_SECONDS = 0.25


class Events(Protocol):
    """A queue of what workers report: a method of `Display`, and its arguments."""

    def empty(self) -> bool:
        """Whether there is nothing to get."""

    def get(self) -> tuple[str, tuple[Any, ...]]:
        """The oldest that is there."""

    def put(self, event: tuple[str, tuple[Any, ...]], /) -> None:
        """Called by workers."""


class Pool(Protocol):
    """Where runs go on side by side. Made for so many at a time, used once, and closed.

    Attributes:
        events: what the workers report.
    """

    events: Events

    def submit(
        self, config: RunConfig, folder: Path, plugin: Plugin, overwrite: bool, failures: type[Exception]
    ) -> Future[dict[str, Any]]:
        """`attempt` a run in a worker; a `BrokenExecutor` if the worker dies and the run with it."""

    def close(self, *, now: bool) -> None:
        """Let go of the workers; `now` stops the runs that still go on, which can be resumed."""


@dataclass
class _Worker:
    """What a worker keeps from run to run."""

    display: Display
    data: tuple[Plugin, Dataset] | None = None


_this = _Worker(Display())


class Running(TypedDict, total=False):
    """How the runs of a comparison, of relations and the like are made: keywords of all that make them.

    Attributes:
        jobs: so many runs at a time, each in a process that takes its share of the cores; 1, the default, trains here.
            Give `training.threads` for results that do not depend on it: sums on several threads round differently.
        overwrite: train again, whatever the folder holds. By default finished runs are kept and interrupted ones
            resumed.
        display: shows progress, also of runs in other processes; nothing by default.
        pool: makes what runs go on in, given `jobs`; processes of this machine by default.
    """

    jobs: int
    overwrite: bool
    display: Display
    pool: Callable[[int], Pool]


def one_at_a_time(make: Callable[P, R]) -> Callable[P, R]:
    """Let a function that trains all runs of its argument `folder` hold the lock there meanwhile.

    A second one is kept out, and who watches knows that this one goes on: also before its first run, and between two.
    """

    @functools.wraps(make)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        folder = inspect.signature(make).bind(*args, **kwargs).arguments["folder"]
        with storage.locked(Path(folder)):
            return make(*args, **kwargs)

    return locked


def train_all(
    places: Sequence[Job],
    dataset: Dataset,
    plugin: Plugin,
    *,
    failures: type[Exception] = StepFailure,
    jobs: int = 1,
    overwrite: bool = False,
    display: Display | None = None,
    pool: Callable[[int], Pool] | None = None,
) -> Iterator[tuple[RunConfig, dict[str, Any]]]:
    """Train every job in its folder; gives each run with its result, or with ``{"error": ...}`` if it failed.

    By default only a `sidetask_core.StepFailure` counts as that: a loss that is not finite, a solver that did not
    converge. Any other error stops every run at once, as does the end of this process, however it comes; they go on
    from their checkpoints.

    The death of a worker, of a signal or for want of memory, stops none. The runs that it breaks off go on in new
    processes from their checkpoints, first side by side again; if that breaks off too, those that come next go on
    alone, one by one, and one that kills its worker even so is a run that failed.

    Args:
        places: runs and folders.
        dataset: the data of those whose configuration says `plugin`; another one's are made for it.
        plugin: how another process makes the same data.
        failures: what counts as a run that failed; with `Exception` everything but an `ExperimentError`.
        jobs: see `Running`, as of those that follow. Of several, or on a pool, results come in the order they are
            ready.
        overwrite: see there.
        display: see there.
        pool: see there.

    Raises:
        ExperimentError: for several jobs or a pool under torchrun.
    """
    if (jobs > 1 or pool is not None) and parallel.world() > 1:
        raise ExperimentError("--jobs, --ray: torchrun's processes share each run already; take one or the other")
    at_once, display = min(jobs, len(places)), display or Display()
    if at_once <= 1 and pool is None:
        for config, folder in places:
            yield config, _attempt(config, folder, overwrite, _data_of(config, dataset, plugin), display, failures)
        return
    left, suspects, again = list(places), list[Job](), False
    while left:
        broken: list[tuple[Job, BrokenExecutor]] = []
        some = suspects[:1] or left[:]
        for job, future in _side_by_side(some, plugin, overwrite, display, failures, (pool or Processes)(at_once)):
            error = future.exception()
            if isinstance(error, BrokenExecutor):
                broken.append((job, error))
            else:
                left.remove(job)
                yield job[0], future.result()
        if suspects:
            del suspects[0]
            for job, error in broken:
                left.remove(job)
                yield job[0], {"error": _named(error)}
        elif broken and again:
            # Runs begin in their order: only the first of those left can have been going on.
            lost = [job for job, _ in broken]
            suspects, again = [job for job in left if job in lost][:at_once], False
        else:
            again = bool(broken)


def _side_by_side(
    jobs: Sequence[Job], plugin: Plugin, overwrite: bool, display: Display, failures: type[Exception], pool: Pool
) -> Iterator[tuple[Job, Future[dict[str, Any]]]]:
    """Each job with its finished future, as they end."""
    done = False
    try:
        futures = {_submitted(pool, *job, plugin, overwrite, failures): job for job in jobs}
        with display:
            for future in _as_they_end(futures, pool.events, display):
                display.end(futures[future][0].label)
                yield futures[future], future
        done = True
    finally:
        pool.close(now=not done)


def _submitted(pool: Pool, *job: Any) -> Future[dict[str, Any]]:
    try:
        return pool.submit(*job)
    except BrokenExecutor as error:  # a worker has died before this one had its turn
        future: Future[dict[str, Any]] = Future()
        future.set_exception(error)
        return future


def _as_they_end(futures: Iterable[Future[Any]], events: Events, display: Display) -> Iterator[Future[Any]]:
    """The futures in the order they are done; meanwhile, what workers report is shown."""
    pending = set(futures)
    while pending:
        ended, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        while not events.empty():
            report, arguments = events.get()
            getattr(display, report)(*arguments)
        yield from ended


class Processes:
    """A `Pool` of processes of this machine, each with its share of the cores."""

    def __init__(self, at_once: int) -> None:
        threads = max(1, runtime.cores() // at_once)
        # Spawned, since neither CUDA nor OpenMP survives a fork.
        context = multiprocessing.get_context("spawn")
        # Nothing is ever sent here: its closing, which the death of this process brings about too, stops the workers.
        self._alive, self._held = context.Pipe(duplex=False)
        self.events: Events = context.SimpleQueue()
        self._begun = context.Event()
        self._pool = ProcessPoolExecutor(at_once, context, _start, (threads, self._alive, self.events, self._begun))

    def submit(
        self, config: RunConfig, folder: Path, plugin: Plugin, overwrite: bool, failures: type[Exception]
    ) -> Future[dict[str, Any]]:
        """See `Pool.submit`; the death of one worker breaks off all."""
        return self._pool.submit(attempt, config, folder, plugin, overwrite, failures)

    def close(self, *, now: bool) -> None:
        """See `Pool.close`.

        Raises:
            ExperimentError: if no worker has come so far that it could have begun a run.
        """
        if now:
            self._held.close()
        self._pool.shutdown(cancel_futures=True)
        self._held.close()
        self._alive.close()
        if not now and not self._begun.is_set():
            raise ExperimentError(
                "no process for --jobs came to life; a script that gives jobs does so below if __name__ == '__main__'"
            )


class _Sender(Display):
    """The display of a worker: hands on to that of who waits for it."""

    def __init__(self, events: Events) -> None:
        self.events = events

    def begin(self, *arguments: Any) -> None:
        self.events.put(("begin", arguments))

    def show(self, *arguments: Any) -> None:
        self.events.put(("show", arguments))

    def finished(self, *arguments: Any) -> None:
        self.events.put(("finished", arguments))


def _attempt(
    config: RunConfig, folder: Path, overwrite: bool, dataset: Dataset, display: Display, failures: type[Exception]
) -> dict[str, Any]:
    try:
        return train(config, folder, dataset=dataset, overwrite=overwrite, display=display)
    except ExperimentError:
        raise  # what was asked for is wrong, which is nothing that one run could fail at
    except failures as error:
        return {"error": _named(error)}


def _named(error: Exception) -> str:
    return str(error) if isinstance(error, StepFailure) else f"{type(error).__name__}: {error}"


def _start(threads: int, alive: Connection, events: Events, begun: Event) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent stops this
    threading.Thread(target=_exit_with_parent, args=(alive,), daemon=True).start()
    begin(threads, events)
    begun.set()


def begin(threads: int, events: Events) -> None:
    """Make this process a worker, which computes on so many threads and reports to `events`."""
    torch.set_num_threads(threads)
    _this.display = _Sender(events)


def _exit_with_parent(alive: Connection) -> None:
    alive.poll(None)  # returns when the other end is closed
    os._exit(1)


def attempt(
    config: RunConfig, folder: Path, plugin: Plugin, overwrite: bool, failures: type[Exception]
) -> dict[str, Any]:
    """Train in this worker, with data that the runs after it find made."""
    if _this.data is None or _this.data[0] != plugin:
        _this.data = plugin, make_dataset(plugin)
    return _attempt(config, folder, overwrite, _data_of(config, _this.data[1], plugin), _this.display, failures)


def _data_of(config: RunConfig, dataset: Dataset, plugin: Plugin) -> Dataset:
    return dataset if config.dataset == plugin else make_dataset(config.dataset)
