"""Functions run in two processes."""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_two_processes(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments, rank, world)`` in each of two gloo processes, which live as long as this one.

    Function and arguments have to be importable by name.
    """
    try:
        pool = _pair()
        futures = [pool.submit(_ranked, function, arguments) for _ in range(2)]
    except BrokenProcessPool:  # someone has killed one of them meanwhile
        _pair.cache_clear()
        pool = _pair()
        futures = [pool.submit(_ranked, function, arguments) for _ in range(2)]
    done, _ = wait(futures, timeout=300, return_when=FIRST_EXCEPTION)
    if len(done) == 2 and not any(future.exception() for future in done):
        return [future.result() for future in futures]
    # A process that waits for one which failed cannot be asked to stop; the next call gets a new pair.
    _pair.cache_clear()
    for process in list(pool._processes.values()):
        process.kill()
    for future in done:
        future.result()
    raise TimeoutError(f"{getattr(function, '__name__', function)} did not end in two processes")


@functools.cache
def _pair() -> ProcessPoolExecutor:
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    context = get_context("spawn")
    pool = ProcessPoolExecutor(2, context, _join, (str(Path(folder.name, "store")), context.Value("i", 0)))

    def close() -> None:
        pool.shutdown()
        folder.cleanup()

    atexit.register(close)
    return pool


def _join(store: str, counter: Any) -> None:
    with counter.get_lock():
        rank = counter.value
        counter.value += 1
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def _ranked(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments, dist.get_rank(), dist.get_world_size())
