"""Runs on the machines of a Ray cluster."""

from __future__ import annotations

import os
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sidetask_bench.config import Plugin, RunConfig
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
        address: of the cluster: ``auto`` for the one that this machine is part of, ``ray://host:port``, or ``local`` to
            start one here.

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
        there = ray.cluster_resources()
        cores, devices = max(1, int(there.get("CPU", 1)) // at_once), there.get("GPU", 0) / at_once
        self.events = Queue(actor_options={"num_cpus": 0})
        share = {"num_cpus": cores, "num_gpus": min(1.0, devices), "max_retries": _RETRIES}
        self._begin = ray.remote(**share)(_attempt_here).remote
        self._arguments = (Path.cwd(), cores, self.events)
        self._threads = ThreadPoolExecutor(at_once)
        self._running: list[Any] = []

    def submit(
        self, config: RunConfig, folder: Path, plugin: Plugin, overwrite: bool, failures: type[Exception]
    ) -> Future[dict[str, Any]]:
        """See `Pool.submit`; workers die alone."""
        return self._threads.submit(self._wait_for, config, folder, plugin, overwrite, failures)

    def _wait_for(self, *job: Any) -> dict[str, Any]:
        exceptions = self._ray.exceptions
        run = self._begin(*self._arguments, *job)
        self._running.append(run)
        try:
            found: dict[str, Any] = self._ray.get(run)
        except exceptions.RayTaskError as error:
            raise error.cause from None
        except exceptions.RayError as error:
            raise BrokenExecutor(f"Ray lost the worker: {str(error).partition(chr(10))[0]}") from error
        return found

    def close(self, *, now: bool) -> None:
        """See `Pool.close`."""
        self._threads.shutdown(wait=not now, cancel_futures=True)
        if now:
            for run in self._running:
                self._ray.cancel(run, force=True)
            self._threads.shutdown()
        if self._joined:
            self._ray.shutdown()


def _attempt_here(here: Path, cores: int, events: Events, *job: Any) -> dict[str, Any]:
    os.chdir(here)  # what relative paths are relative to
    begin(cores, events)
    return attempt(*job)
