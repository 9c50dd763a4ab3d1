"""Where a run computes: device, threads, determinism, processes and random state."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sidetask_core import parallel
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sidetask_bench.config import Training
from sidetask_bench.schema import ExperimentError, first_line


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, if it did, and leave them in the end.

    NCCL between CUDA devices, gloo otherwise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    _join("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _join(backend: str) -> None:
    """Find the other processes, where torchrun has begun them again not by the addresses of those that are dead.

    torchrun keeps one store over all restarts, in which processes leave their addresses
    (https://github.com/pytorch/pytorch/issues/135712). Its count of restarts tells them apart, on one machine; of
    several each counts its own, so that what has been left there cannot be told apart.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend)
        return
    store, rank, world = next(rendezvous("env://"))
    attempt = PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=world)


def barrier() -> None:
    """Wait for every process."""
    if parallel.world() > 1:
        dist.barrier()


def cores() -> int:
    """How many cores this process may use, which in a container can be fewer than there are.

    >>> cores() >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of what a result depends on: the installed sidetask distributions, torch and Python."""
    names = {dist.metadata["Name"] for dist in metadata.distributions()}
    ours = sorted(name for name in names if name and name.startswith("sidetask-"))
    found = {name: metadata.version(name) for name in [*ours, "torch", "torchvision", "numpy"] if name in names}
    return {**found, "python": platform.python_version()}


@contextlib.contextmanager
def settings(training: Training) -> Iterator[torch.device]:
    """Apply `device`, `threads` and `deterministic` for the length of a run; gives the device.

    Raises:
        ExperimentError: for a device that is not there.
    """
    device = find_device(training.device)
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if training.threads:
            torch.set_num_threads(training.threads)
        if training.deterministic:
            # cuBLAS reads this when it is first used.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.benchmark = False
        yield device
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def find_device(name: str, path: str = "training.device") -> torch.device:
    """The device of a name; ``auto`` is this process's CUDA device where there is one, else the CPU.

    `path` is the key that an error names.

    >>> find_device("cpu")
    device(type='cpu')

    Raises:
        ExperimentError: for a device that is not there.
    """
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ExperimentError(f"{path}: {name!r} cannot be used here: {first_line(error)}") from error
    return device


def memory_bytes(device: torch.device) -> int | None:
    """The most memory that was held so far: of the device, or of this process where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def random_state(device: torch.device) -> list[dict[str, Any]]:
    """The global random generators of every process, in plain values and tensors."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002 (the legacy state is what a plug-in might use)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if parallel.world() == 1:
        return [state]
    states: list[Any] = [None] * parallel.world()
    dist.all_gather_object(states, state)
    return states


def set_random_state(states: list[dict[str, Any]], device: torch.device) -> None:
    """Go on drawing where `random_state` was taken.

    Raises:
        ExperimentError: if that was with another number of processes.
    """
    if len(states) != parallel.world():
        raise ExperimentError(
            f"the checkpoint was written by {len(states)} process(es), and this is {parallel.world()}: "
            "resume with as many as began"
        )
    state = states[parallel.rank()]
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
