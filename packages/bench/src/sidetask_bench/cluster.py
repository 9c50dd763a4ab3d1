"""Runs on the machines of a Ray cluster."""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sidetask_bench import storage
from sidetask_bench.config import Plugin, RunConfig
from sidetask_bench.run import discard
from sidetask_bench.schema import ExperimentError
from sidetask_bench.workers import Events, attempt, begin

# So often Ray begins a run again of which it lost the worker; a run that kills every one ends.
_RETRIES = 3


class Cluster:
    """A `sidetask_bench.workers.Pool` on a Ray cluster, each run with an equal share of its cores and accelerators.

    All machines see the same files under the same paths: runs are where they would be without a cluster, go on from
    their checkpoints on whatever machine, and end in the same numbers. A run whose worker or machine is lost is begun
    again elsewhere, and so goes on from its last checkpoint.

    Args:
        at_once: how many runs at a time.
        address: of the cluster: ``auto`` for the one that this machine is part of, or ``local`` to start one here.

    Raises:
        ExperimentError: if Ray is not installed, or there is no such cluster.
    """

    events: Events

    def __init__(self, at_once: int, address: str) -> None:
        try:
            import ray
            from ray.util.queue import Queue
        except ImportError as error:
            raise ExperimentError("Ray is not installed; pip install 'sidetask-bench[ray]'") from error
        self._ray = ray
        self._joined = not ray.is_initialized()
        if self._joined:
            try:
                ray.init(address, log_to_driver=False)
            except (ConnectionError, ValueError) as error:
                raise ExperimentError(f"there is no Ray cluster at {address!r}: {error}") from error
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores, devices = ([machine.get(kind, 0) for machine in machines] for kind in ("CPU", "GPU"))
        # A run is on one machine.
        share = max(1, min(int(sum(cores)) // at_once, int(max(cores))))
        device = 1 / math.ceil(at_once / sum(devices)) if sum(devices) else 0
        self._queue = self.events = Queue(actor_options={"num_cpus": 0})
        self._begin = ray.remote(num_cpus=share, num_gpus=device, max_retries=_RETRIES)(_attempt_here).remote
        self._given = (Path.cwd(), share, self._queue)
        self._threads = ThreadPoolExecutor(at_once)
        self._lock, self._closed = threading.Lock(), False
        self._running: list[Any] = []

    def submit(
        self, config: RunConfig, folder: Path, plugin: Plugin, overwrite: bool, failures: type[Exception]
    ) -> Future[dict[str, Any]]:
        """See `Pool.submit`; workers die alone."""
        if overwrite:  # here and once, or a run that is begun again would lose what it has done
            with storage.locked(folder):
                discard(folder)
        return self._threads.submit(self._wait_for, config, folder, plugin, False, failures)

    def _wait_for(self, *job: Any) -> dict[str, Any]:
        with self._lock:
            if self._closed:
                raise BrokenExecutor("the cluster is closed")
            run = self._begin(*self._given, *job)
            self._running.append(run)
        try:
            found: dict[str, Any] = self._ray.get(run)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise BrokenExecutor(f"Ray lost the worker: {str(error).partition(chr(10))[0]}") from error
        return found

    def close(self, *, now: bool) -> None:
        """See `Pool.close`."""
        if now:
            with self._lock:
                self._closed = True
            for run in self._running:
                self._ray.cancel(run, force=True)
        self._threads.shutdown(cancel_futures=now)
        self._queue.shutdown(force=True)
        if self._joined:
            self._ray.shutdown()


def _attempt_here(here: Path, cores: int, events: Events, *job: Any) -> dict[str, Any]:
    os.chdir(here)  # what relative paths are relative to
    begin(cores, events)
    return attempt(*job)
