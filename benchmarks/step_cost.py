"""What a training step of each method costs, as a ratio to equal weighting, measured side by side in one run.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --device cuda --write

Two settings: three dense tasks (segmentation, depth, normals) on a ResNet-18 with DeepLabV3 heads, and twenty
classification tasks with small heads on the same trunk. One round times one step of every method, in an order drawn
anew; a ratio is taken within its round, and the table gives its median and quartiles over the rounds. Memory is the
most that a step holds at a time on top of the parameters and the batch, gradients included. `plain` is the sum of
losses and one ``backward()``, without this project.

A figure over its goal is marked with an exclamation mark.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sidetask_bench.networks.resnet import AtrousHead, resnet_stages
from sidetask_core import Batch, SplitModel, Step, Task
from sidetask_core.plugins import make_method
from torch import nn

# What a method reads decides what it may cost: goals for time at T = 3 dense and T = 20, as ratios to equal.
GOALS = {"losses": (1.06, 1.06), "features": (1.06, 1.06), "pcgrad over parameters": (1.8, 11.0)}
MEMORY_GOAL = 1.4
METHODS: dict[str, tuple[Any, str | None]] = {
    "equal": ("equal", None),
    "uncertainty": ("uncertainty", "losses"),
    "dwa": ("dwa", "losses"),
    "rlw": ("rlw", "losses"),
    "mgda at features": ("mgda", "features"),
    "graddrop at features": ("graddrop", "features"),
    "pcgrad at features": ({"name": "pcgrad", "at": "features"}, "features"),
    "cagrad at features": ({"name": "cagrad", "at": "features"}, "features"),
    "pcgrad over parameters": ("pcgrad", "pcgrad over parameters"),
    "cagrad over parameters": ("cagrad", None),
    "mgda over parameters": ({"name": "mgda", "at": "parameters"}, None),
    "graddrop over parameters": ({"name": "graddrop", "at": "parameters"}, None),
}


@dataclass
class Setting:
    """A model, its tasks and one batch, on the device."""

    name: str
    tasks: Sequence[Task]
    model: SplitModel
    batch: Batch


def dense(device: str) -> Setting:
    """Three dense tasks on the ResNet-18 DeepLabV3 of `sidetask_bench`: half of the work is in the heads."""
    from sidetask_datasets import tasks as kinds

    size, images = ((64, 96), 4) if device == "cpu" else ((288, 384), 8)
    tasks = [kinds.segmentation("segmentation", 13), kinds.depth(), kinds.normals()]
    heads = {t.name: AtrousHead(512, c, size) for t, c in zip(tasks, (13, 1, 3), strict=True)}
    stages = resnet_stages(18)
    targets = {
        "segmentation": torch.randint(0, 13, (images, *size)),
        "depth": torch.rand(images, 1, *size) + 0.5,
        "normals": nn.functional.normalize(torch.randn(images, 3, *size), dim=1),
    }
    batch = Batch(torch.rand(images, 3, *size), targets)
    model = SplitModel.from_stages(stages, len(stages), heads)
    return Setting("T = 3, dense", tasks, model.to(device), batch.to(device))


def classification(device: str) -> Setting:
    """Twenty classification tasks with two-layer heads on a ResNet-18."""
    from sidetask_datasets import tasks as kinds

    size, images = ((64, 64), 8) if device == "cpu" else ((224, 224), 64)
    tasks = [kinds.classification(f"task{i:02}", 5) for i in range(20)]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    heads = {t.name: nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 5)) for t in tasks}
    model = SplitModel(nn.Sequential(*resnet_stages(18), pool), heads)
    targets = {t.name: torch.randint(0, 5, (images,)) for t in tasks}
    batch = Batch(torch.rand(images, 3, *size), targets)
    return Setting("T = 20, classification", tasks, model.to(device), batch.to(device))


def plain(setting: Setting) -> Callable[[], None]:
    """The sum of losses and one backward pass, as one writes it by hand."""
    model, batch = setting.model, setting.batch

    def step() -> None:
        model.zero_grad()
        predictions = model(batch.inputs)
        losses = [task.mean(predictions[task.name], batch.target_of(task))[0] for task in setting.tasks]
        torch.stack(losses).sum().backward()

    return step


def ours(setting: Setting, spec: Any) -> Callable[[], None]:
    """A step of one method."""
    step = Step(setting.model, setting.tasks, make_method(spec, setting.tasks)).to(setting.batch.inputs.device)

    def run() -> None:
        step.zero_grad()
        step.backward(setting.batch)

    return run


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """The most bytes a step holds at a time, on top of what it found."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = most = 0
    memory = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(setting: Setting, rounds: int, device: str) -> list[dict[str, Any]]:
    """Time and memory of every method in one setting."""
    steps = {"plain": plain(setting)} | {name: ours(setting, spec) for name, (spec, _) in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    order = list(steps)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            seconds[name].append(timed(steps[name], device))
    memory = {}
    for name, step in steps.items():
        setting.model.zero_grad()
        memory[name] = peak_bytes(step, device)
    rows = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["equal"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "setting": setting.name,
                "method": name,
                "ratio": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "milliseconds": round(1000 * statistics.median(own), 1),
                "memory": round(memory[name] / memory["equal"], 3),
                "megabytes": round(memory[name] / 1e6, 1),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]], column: int) -> str:
    """The rows of one setting as Markdown."""
    lines = [
        f"### {rows[0]['setting']}",
        "",
        "| method | time / equal | quartiles | ms | memory / equal | MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        reads = METHODS.get(row["method"], (None, None))[1]
        goal = GOALS[reads][column] if reads else float("inf")
        slow = " !" if row["ratio"] > goal else ""
        big = " !" if reads == "features" and row["memory"] > MEMORY_GOAL else ""
        low, high = row["quartiles"]
        lines.append(
            f"| {row['method']} | {row['ratio']:.2f}{slow} | {low:.2f}–{high:.2f} | {row['milliseconds']:.0f} | "
            f"{row['memory']:.2f}{big} | {row['megabytes']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write what was measured if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--setting", choices=["dense", "classification"], help="only one of the two")
    parser.add_argument("--write", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    random.seed(0)
    on_cpu = options.device == "cpu"
    name = f"CPU, {options.threads} thread{'s' * (options.threads > 1)}" if on_cpu else torch.cuda.get_device_name()
    versions = f"torch {torch.__version__.split('+')[0]}; Python {platform.python_version()}"
    head = f"{name}; {versions}; {options.rounds} rounds"
    for column, build in enumerate((dense, classification)):
        if options.setting not in (None, build.__name__):
            continue
        rows = measure(build(options.device), options.rounds, options.device)
        text = f"{table(rows, column)}\n\n{head}\n"
        print(text, flush=True)
        if options.write:
            device = "cpu" if on_cpu else name.lower().replace(" ", "-")
            stem = Path(__file__).parent / "results" / f"step_cost-{device}-{build.__name__}"
            stem.parent.mkdir(exist_ok=True)
            stem.with_suffix(".md").write_text(text)
            stem.with_suffix(".json").write_text(json.dumps({"where": head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
