"""How often a step makes the host wait for a CUDA device: `torch.cuda.set_sync_debug_mode` counts.

    python benchmarks/synchronizations.py

Expected: one for the finite check and one more for a rule that solves on the host; none of the first kind with
``check="deferred"``, whose check reads the step before.
"""

from __future__ import annotations

import warnings

import torch
from sidetask_core import Step
from sidetask_core.plugins import make_method
from sidetask_core.testing import batches, problem, tiny_tasks


def count(method: str, check: str) -> int:
    """Waits of one step, after two to warm up."""
    tasks = tiny_tasks()
    step = Step(problem(dtype=torch.float32), tasks, make_method(method, tasks), check=check).cuda()
    data = [batch.to("cuda") for batch in batches(3, dtype=torch.float32)]
    for batch in data[:2]:
        step.backward(batch)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step.backward(data[2])
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def main() -> None:
    """Print a table."""
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}", end="\n\n")
    print("| method | immediate | deferred |\n|---|---:|---:|")
    for method in ("equal", "uncertainty", "dwa", "rlw", "pcgrad", "cagrad", "mgda", "graddrop"):
        print(f"| {method} | {count(method, 'immediate')} | {count(method, 'deferred')} |")


if __name__ == "__main__":
    main()
