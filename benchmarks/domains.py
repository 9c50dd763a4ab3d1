"""What a training step holds when every task has an input of its own, for 5, 10 and 20 tasks.

    python benchmarks/domains.py
    python benchmarks/domains.py --write

Every task is to read the digit in the top left corner of the images of `sidetask_datasets.digits`, in a domain of its
own: turned by quarters, mirrored, inverted and darkened as the bits of its number say. Heads sit on the small residual
encoder of `sidetask_bench`.

Equal weighting and Auto-λ are measured in three ways: on all domains; on all domains, of which two learn their λ
(``sample=2``); and on two domains drawn for each step, whose inputs and labels are all that the batches of that step
hold. Memory is the most that two steps hold at a time, counted from before the first: gradients, and whatever is kept
from one step to the next, on top of parameters and batches.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from sidetask_bench.networks.convolutional import PoolHead, small
from sidetask_core import Batch, SplitModel, Step, Task
from sidetask_core.plugins import make_method
from sidetask_datasets import digits
from step_cost import Run, peak_bytes
from torch import Tensor

COUNTS = (5, 10, 20)
IMAGES = 16  # of each domain
METHODS: dict[str, tuple[Any, bool]] = {
    "equal, all domains": ("equal", False),
    "autolambda before, all domains": ({"name": "autolambda"}, False),
    "autolambda before, all domains, sample=2": ({"name": "autolambda", "sample": 2}, False),
    "autolambda online, all domains": ({"name": "autolambda", "when": "online"}, False),
    "equal, 2 drawn": ("equal", True),
    "autolambda before, 2 drawn": ({"name": "autolambda"}, True),
    "autolambda online, 2 drawn": ({"name": "autolambda", "when": "online"}, True),
}


def domain(images: Tensor, number: int) -> Tensor:
    """The images as they look in one of 32 domains."""
    turned = torch.rot90(images, number % 4, (2, 3))
    mirrored = turned.flip(3) if number // 4 % 2 else turned
    return mirrored * (1.0 - 0.5 * (number // 16)) * (-1 if number // 8 % 2 else 1)


def batch_of(data: Any, tasks: list[Task], chosen: list[int], epoch: int) -> Batch:
    """Images of some domains, and the labels of their tasks alone."""
    inputs, targets = {}, dict.fromkeys(task.name for task in tasks)
    for number, one in zip(chosen, data.batches(IMAGES, seed=0, epoch=epoch), strict=False):
        name = tasks[number].name
        inputs[name] = domain(one.inputs, number)
        targets[name] = one.targets["top_left"]
    return Batch(inputs, targets)


def build(count: int, spec: Any, draw: bool) -> Run:
    """A step on as many domains, with other batches each time."""
    data = digits(train=2 * IMAGES * count, validation=2 * IMAGES * count, test=1, tasks=["top_left"])
    kind = data.tasks[0]
    tasks = [Task(name, kind.loss, kind.valid, input=name) for name in (f"domain{i:02}" for i in range(count))]
    torch.manual_seed(0)
    encoder = small(data).shared
    step = Step(SplitModel(encoder, {task.name: PoolHead(128, 10) for task in tasks}), tasks, make_method(spec, tasks))
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    steps = []
    for epoch in range(2):
        chosen = torch.randperm(count, generator=generator)[: 2 if draw else count].tolist()
        steps.append(tuple(batch_of(split, tasks, chosen, epoch) for split in (data.train, data.validation)))
    left = iter(steps)

    def run() -> None:
        batch, validation = next(left)
        optimizer.zero_grad()
        step.backward(batch, validation=validation, optimizer=optimizer)
        optimizer.step()

    return run


def main() -> None:
    """Measure, print, and write what was measured if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (spec, draw) in METHODS.items():
        megabytes = {}
        for count in COUNTS:
            run = build(count, spec, draw)
            megabytes[count] = round(peak_bytes(lambda ready=run: ready, "cpu")[1] / 1e6, 1)
        rows.append({"method": name, "megabytes": megabytes})
    lines = ["| MB held by a step | " + " | ".join(f"T = {count}" for count in COUNTS) + " |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['method']} | " + " | ".join(f"{x:.1f}" for x in row["megabytes"].values()) + " |" for row in rows
    ]
    head = f"CPU, 1 thread; torch {torch.__version__.split('+')[0]}; Python {platform.python_version()}"
    text = "\n".join(["### Domains", "", *lines, "", head, ""])
    print(text)
    if options.write:
        stem = Path(__file__).parent / "results" / "domains-cpu"
        stem.parent.mkdir(exist_ok=True)
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".json").write_text(json.dumps({"where": head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
