"""What solving for the weights of twenty tasks costs the host, as a share of a ResNet-50 training step of the same run.

    python benchmarks/solver_time.py
    python benchmarks/solver_time.py --device cuda --write

Timed is all that a rule does between the Gramian and its weights, for random gradients and for such whose norms range
over four decades, each time others. The step is one of equal weighting with twenty linear heads on torchvision's
ResNet-50, at 224 × 224, optimizer included. A share over the goal of 2 % is marked with an exclamation mark.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from peers import installed
from sidetask_core import Batch, Method, SplitModel, Step, plugins
from sidetask_datasets import tasks as kinds
from step_cost import clock_of
from torch import Tensor, nn

GOAL = 0.02
TASKS = 20
METHODS: dict[str, Any] = {
    **{
        name: name
        for name in (
            "pcgrad",
            "cagrad",
            "mgda",
            "imtl-g",
            "imtl",
            "nash-mtl",
            "aligned-mtl",
            "gcs",
            "ol-aux",
            "pareto-mtl",
        )
    },
    "upgrad, adapted": {"name": "torchjd", "aggregator": "UPGrad"},
}


class Given:
    """Signals of which the Gramian and the losses are known."""

    def __init__(self, tasks: list[Any], gradients: Tensor, iteration: int) -> None:
        self.tasks = tuple(task.name for task in tasks)
        self.primary = torch.tensor([task.primary for task in tasks])
        self.labelled = torch.ones(len(tasks), dtype=torch.bool)
        self.losses = gradients.norm(dim=1)
        self.iteration, self.epoch = iteration, iteration
        self._gramian = gradients @ gradients.T

    def gramian(self, at: str) -> Tensor:
        """The Gramian, wherever."""
        return self._gramian

    def norms(self, at: str) -> Tensor:
        """The norms of the gradients, wherever."""
        return self._gramian.diagonal().sqrt()


def gradients(kind: str, seed: int) -> Tensor:
    """Random gradients of the tasks ``[T, D]``."""
    drawn = torch.randn(TASKS, 1000, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.logspace(-4, 0, TASKS)[:, None] if kind == "norm ratios of 1e4" else drawn


def training_step(tasks: list[Any], images: int, device: str) -> Step:
    """A step of equal weighting, to be called by `trained`."""
    from torchvision.models import resnet50

    encoder = resnet50(weights=None)
    encoder.fc = nn.Identity()
    model = SplitModel(encoder, {task.name: nn.Linear(2048, 5) for task in tasks})
    return Step(model, tasks, Method()).to(device)


def main() -> None:
    """Measure, print, and write what was measured if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=8, help="in the batch of a training step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = clock_of(options.device)
    torch.manual_seed(0)
    tasks = [kinds.classification(f"task{i:02}", 5, primary=i == 0) for i in range(TASKS)]
    step = training_step(tasks, options.images, options.device)
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-3)
    targets = {task.name: torch.randint(0, 5, (options.images,)) for task in tasks}
    batch = Batch(torch.rand(options.images, 3, 224, 224), targets).to(options.device)
    rules = {
        name: plugins.make_method(spec, tasks).encoder
        for name, spec in METHODS.items()
        if "adapted" not in name or installed("TorchJD")
    }

    def train() -> None:
        optimizer.zero_grad()
        step.backward(batch)
        optimizer.step()
        if options.device != "cpu":
            torch.cuda.synchronize()

    train()
    steps: list[float] = []
    solved: dict[tuple[str, str], list[float]] = {}
    for i in range(options.rounds):
        start = clock()
        train()
        steps.append(clock() - start)
        for kind in ("random", "norm ratios of 1e4"):
            for name, rule in rules.items():
                signals = Given(tasks, gradients(kind, i), i)
                start = clock()
                with torch.no_grad():
                    rule(signals)
                if i:
                    solved.setdefault((name, kind), []).append(clock() - start)

    one = statistics.median(steps)
    rows = [
        {
            "method": name,
            "gradients": kind,
            "milliseconds": round(1000 * statistics.median(times), 3),
            "longest": round(1000 * max(times), 3),
            "share": statistics.median(times) / one,
        }
        for (name, kind), times in sorted(solved.items())
    ]
    lines = ["| method | gradients | ms | longest | % of a step |", "|---|---|---:|---:|---:|"]
    for row in rows:
        mark = " !" if row["share"] > GOAL else ""
        lines.append(
            f"| {row['method']} | {row['gradients']} | {row['milliseconds']:.2f} | {row['longest']:.2f} | "
            f"{100 * row['share']:.2f}{mark} |"
        )
    on_cpu = options.device == "cpu"
    name = f"CPU, {options.threads} thread{'s' * (options.threads > 1)}" if on_cpu else torch.cuda.get_device_name()
    software = f"torch {torch.__version__.split('+')[0]}; Python {platform.python_version()}"
    head = f"{name}; {software}; {options.rounds} rounds; a step of {options.images} images takes {1000 * one:.0f} ms"
    text = "\n".join(["### Solvers, T = 20", "", *lines, "", head, ""])
    print(text)
    if options.write:
        device = "cpu" if on_cpu else name.lower().replace(" ", "-")
        stem = Path(__file__).parent / "results" / f"solver_time-{device}"
        stem.parent.mkdir(exist_ok=True)
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".json").write_text(json.dumps({"where": head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
