"""Runs one after the other, or several at a time in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sidetask_core import StepFailure

from sidetask_bench import runtime
from sidetask_bench.assemble import make_dataset
from sidetask_bench.config import Plugin, RunConfig
from sidetask_bench.progress import Display
from sidetask_bench.run import train
from sidetask_bench.schema import ExperimentError

if TYPE_CHECKING:
    from sidetask_datasets import Dataset

Job = tuple[RunConfig, Path]

# From a worker: a method of `Display`, and its arguments.
Events = SimpleQueue[tuple[str, tuple[Any, ...]]]
_POLL_SECONDS = 0.25

_plugin: Plugin | None = None
_dataset: Dataset | None = None
_display = Display()


def train_all(
    jobs: Sequence[Job],
    dataset: Dataset,
    plugin: Plugin,
    *,
    at_once: int,
    overwrite: bool,
    display: Display,
    failures: type[Exception] = StepFailure,
) -> Iterator[tuple[RunConfig, dict[str, Any]]]:
    """Train every job in its folder; gives each run with its result, or with ``{"error": ...}`` if it failed.

    By default only a `sidetask_core.StepFailure` counts as that: a loss that is not finite, a solver that did not
    converge. Any other error stops every run at once, as does the end of this process, however it comes; they go on
    from their checkpoints.

    Args:
        jobs: runs and folders.
        dataset: the data of those whose configuration says `plugin`; another one's are made for it.
        plugin: how another process makes the same data.
        at_once: so many runs side by side, each in a process that takes its share of the cores; results come in the
            order they are ready. 1 trains here, in order.
        overwrite: start again, whatever the folders hold.
        display: shows progress, also of those in other processes.
        failures: what counts as a run that failed. With `Exception` that is everything but an `ExperimentError`, also
            the death of a worker: the runs that it breaks off go on in new processes, first one at a time, until the
            one that kills is found.
    """
    at_once = min(at_once, len(jobs))
    if at_once <= 1:
        for config, folder in jobs:
            yield config, _attempt(config, folder, overwrite, _data_of(config, dataset, plugin), display, failures)
        return
    left, one_by_one = list(jobs), False
    while left:
        broken: list[tuple[Job, BrokenExecutor]] = []
        some = left[:1] if one_by_one else left[:]
        for job, future in _side_by_side(some, plugin, at_once, overwrite, display, failures):
            error = future.exception()
            if isinstance(error, BrokenExecutor) and isinstance(error, failures):
                broken.append((job, error))
            else:
                left.remove(job)
                yield job[0], future.result()
        if one_by_one:
            for job, error in broken:
                left.remove(job)
                yield job[0], {"error": _named(error)}
        one_by_one = bool(broken) != one_by_one


def _side_by_side(
    jobs: Sequence[Job], plugin: Plugin, at_once: int, overwrite: bool, display: Display, failures: type[Exception]
) -> Iterator[tuple[Job, Future[dict[str, Any]]]]:
    """Each job with its finished future, as they end."""
    threads = max(1, runtime.cores() // at_once)
    # Spawned, since neither CUDA nor OpenMP survives a fork.
    context = multiprocessing.get_context("spawn")
    # Nothing is ever sent here: its closing, which the death of this process brings about too, tells workers to stop.
    alive, held = context.Pipe(duplex=False)
    events: Events = context.SimpleQueue()
    pool = ProcessPoolExecutor(at_once, context, _start, (plugin, threads, alive, events))
    try:
        futures = {pool.submit(_attempt_there, *job, overwrite, failures): job for job in jobs}
        with display:
            for future in _as_they_end(futures, events, display):
                display.end(futures[future][0].label)
                yield futures[future], future
    except BaseException:
        held.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        held.close()
        alive.close()


def _as_they_end(futures: Iterable[Future[Any]], events: Events, display: Display) -> Iterator[Future[Any]]:
    """The futures in the order they are done; meanwhile, what workers report is shown."""
    pending = set(futures)
    while pending:
        ended, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        while not events.empty():
            report, arguments = events.get()
            getattr(display, report)(*arguments)
        yield from ended


class _Sender(Display):
    """The display of a worker: hands on to the parent's."""

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


def _start(plugin: Plugin, threads: int, alive: Connection, events: Events) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent stops this
    threading.Thread(target=_exit_with_parent, args=(alive,), daemon=True).start()
    global _plugin, _dataset, _display
    torch.set_num_threads(threads)
    _plugin, _dataset, _display = plugin, make_dataset(plugin), _Sender(events)


def _exit_with_parent(alive: Connection) -> None:
    alive.poll(None)  # returns when the other end is closed
    os._exit(1)


def _attempt_there(config: RunConfig, folder: Path, overwrite: bool, failures: type[Exception]) -> dict[str, Any]:
    assert _plugin is not None
    assert _dataset is not None
    return _attempt(config, folder, overwrite, _data_of(config, _dataset, _plugin), _display, failures)


def _data_of(config: RunConfig, dataset: Dataset, plugin: Plugin) -> Dataset:
    return dataset if config.dataset == plugin else make_dataset(config.dataset)
