"""What a training step of each method costs, as a ratio to equal weighting, measured side by side in one run.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --device cuda --write

Two settings: three dense tasks (segmentation, depth, normals) on a ResNet-18 with DeepLabV3 heads, and twenty
classification tasks with small heads on the same trunk. One round times one step of every method, in an order drawn
anew; a ratio is taken within its round, and the table gives its median and quartiles over the rounds. Memory is the
most that a step holds at a time on top of the parameters and the batch, gradients included. `plain` is the sum of
losses and one ``backward()``, without this project.

A second table has the methods that TorchJD or LibMTL have too, on the same model and batch, in the same rounds
(`peers.py`; those libraries are optional). A ratio there is ours to theirs, again within a round.

A figure over its goal is marked with an exclamation mark; beside a peer the goal is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import installed, losses_of, peers, versions
from sidetask_bench.networks.resnet import AtrousHead, resnet_stages
from sidetask_core import Batch, SplitModel, Step, Task, plugins
from torch import nn

Run = Callable[[], None]
Key = tuple[str, str]  # a row, and the library whose step it is: none for ours

# What a method reads decides what it may cost: goals for time at T = 3 dense and T = 20, as ratios to equal.
GOALS = {"losses": (1.06, 1.06), "features": (1.06, 1.06), "pcgrad over parameters": (1.8, 11.0)}
MEMORY_GOAL = 1.4
PATIENCE = 300  # seconds for two steps of a peer
METHODS: dict[str, tuple[Any, str | None]] = {
    "equal": ("equal", None),
    **{name: (name, "losses") for name in ("uncertainty", "dwa", "rlw", "imtl-l", "atw", "puw")},
    "famo": ("famo", None),  # another forward pass, to see what the last step did to the losses
    "per-objective-uncertainty": ("per-objective-uncertainty", "losses"),
    **{
        f"{name} {where}": ({"name": name, "at": at}, reads)
        for at, where, reads in (("features", "at features", "features"), ("parameters", "over parameters", None))
        for name in (
            "graddrop",
            "pcgrad",
            "cagrad",
            "mgda",
            "imtl-g",
            "imtl",
            "nash-mtl",
            "aligned-mtl",
            "gradnorm",
            "gcs",
            "ol-aux",
            "pareto-mtl",
        )
    },
    "pcgrad over parameters": ({"name": "pcgrad", "at": "parameters"}, "pcgrad over parameters"),
    "upgrad, adapted, at features": ({"name": "torchjd", "aggregator": "UPGrad", "at": "features"}, "features"),
    "upgrad, adapted, over parameters": ({"name": "torchjd", "aggregator": "UPGrad"}, None),
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
    tasks = [kinds.segmentation("segmentation", 13), kinds.depth(primary=False), kinds.normals(primary=False)]
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
    tasks = [kinds.classification(f"task{i:02}", 5, primary=i == 0) for i in range(20)]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    heads = {t.name: nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 5)) for t in tasks}
    model = SplitModel(nn.Sequential(*resnet_stages(18), pool), heads)
    targets = {t.name: torch.randint(0, 5, (images,)) for t in tasks}
    batch = Batch(torch.rand(images, 3, *size), targets)
    return Setting("T = 20, classification", tasks, model.to(device), batch.to(device))


def plain(setting: Setting) -> Run:
    """The sum of losses and one backward pass, as one writes it by hand."""
    model, batch = setting.model, setting.batch

    def step() -> None:
        model.zero_grad()
        torch.stack(losses_of(setting, model(batch.inputs))).sum().backward()

    return step


def ours(setting: Setting, spec: Any) -> Run:
    """A step of one method."""
    step = Step(setting.model, setting.tasks, plugins.make_method(spec, setting.tasks)).to(setting.batch.inputs.device)

    def run() -> None:
        step.zero_grad()
        step.backward(setting.batch)

    return run


def timed(step: Run, device: str) -> float:
    """Seconds of one step; of the processor's time on one thread, which other programs do not add to."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(step: Run, device: str) -> int:
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


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError when the time is over: LibMTL's MGDA has a loop without an end."""

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def methods(wanted: Sequence[str]) -> dict[str, Any]:
    """The methods to measure: installed, and with one of the `wanted` texts in their name; always `equal`."""
    names = plugins.installed("methods")
    found = {}
    for row, (spec, _) in METHODS.items():
        name = spec if isinstance(spec, str) else spec["name"]
        if row != "equal" and wanted and not any(text in row for text in wanted):
            continue
        if name in names:
            if name != "torchjd" or installed("TorchJD"):
                found[row] = spec
        else:
            print(f"no installed package offers {name}: {row} is left out", file=sys.stderr)
    return found


def steps_of(setting: Setting, wanted: Sequence[str], beside_peers: bool) -> tuple[dict[Key, Run], dict[Key, str]]:
    """A step of every method and peer, warm; and why there is none of some peers."""
    steps: dict[Key, Run] = {(row, ""): ours(setting, spec) for row, spec in methods(wanted).items()}
    steps["plain", ""] = plain(setting)
    for step in steps.values():
        step()
    failed: dict[Key, str] = {}
    for key, build in peers(setting).items() if beside_peers else ():
        if (key[0], "") not in steps:
            continue
        try:
            with limit(PATIENCE):
                steps[key] = build()
                for _ in range(2):
                    steps[key]()
        except Exception as error:  # noqa: BLE001  # other libraries raise anything
            steps.pop(key, None)
            failed[key] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{key[1]} cannot take a step of {key[0]}: {failed[key]}", file=sys.stderr)
    return steps, failed


def measure(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of every method and peer in one setting."""
    steps, failed = steps_of(setting, options.methods, options.peers)
    seconds: dict[Key, list[float]] = {key: [] for key in steps}
    order = list(steps)
    for _ in range(options.rounds):
        random.shuffle(order)
        for key in order:
            seconds[key].append(timed(steps[key], options.device))
    memory = {}
    for key, step in steps.items():
        setting.model.zero_grad()
        memory[key] = peak_bytes(step, options.device)

    def against(key: Key, base: Key) -> dict[str, Any]:
        ratios = [a / b for a, b in zip(seconds[key], seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return {
            "ratio": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "milliseconds": round(1000 * statistics.median(seconds[key]), 1),
            "memory": round(memory[key] / memory[base], 3),
            "megabytes": round(memory[key] / 1e6, 1),
        }

    order = sorted(steps, key=lambda key: [*["plain"], *METHODS].index(key[0]))
    rows = [
        {"setting": setting.name, "method": row} | against((row, ""), ("equal", ""))
        for row, library in order
        if not library
    ]
    beside = []
    for row, library in order:
        if library:
            theirs = against((row, library), ("equal", ""))
            compared = {"setting": setting.name, "method": row, "library": library} | against((row, ""), (row, library))
            beside.append(compared | {"theirs": {key: theirs[key] for key in ("milliseconds", "megabytes")}})
    left_out = [{"method": row, "library": library, "why": why} for (row, library), why in failed.items()]
    return {"rows": rows, "peers": beside, "left out": left_out}


def table(measured: dict[str, Any], column: int) -> str:
    """The figures of one setting as Markdown."""
    rows = measured["rows"]
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
    if measured["peers"]:
        lines += [
            "",
            "| method | beside | time, ours / theirs | quartiles | ms, ours | theirs | memory, ours / theirs |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
    for row in measured["peers"]:
        slow, big = (" !" if round(row[key], 2) > 1 else "" for key in ("ratio", "memory"))
        low, high = row["quartiles"]
        lines.append(
            f"| {row['method']} | {row['library']} | {row['ratio']:.2f}{slow} | {low:.2f}–{high:.2f} | "
            f"{row['milliseconds']:.0f} | {row['theirs']['milliseconds']:.0f} | {row['memory']:.2f}{big} |"
        )
    if measured["left out"]:
        lines.append("")
    lines += [f"- {one['library']} takes no step of {one['method']}: {one['why']}" for one in measured["left out"]]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write what was measured if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--setting", choices=["dense", "classification"], help="only one of the two")
    parser.add_argument("--methods", nargs="+", default=[], help="only rows with one of these texts in their name")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="only our own methods")
    parser.add_argument("--write", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    random.seed(0)
    on_cpu = options.device == "cpu"
    name = f"CPU, {options.threads} thread{'s' * (options.threads > 1)}" if on_cpu else torch.cuda.get_device_name()
    software = f"torch {torch.__version__.split('+')[0]}; Python {platform.python_version()}"
    if options.peers and versions():
        software += f"; {versions()}"
    head = f"{name}; {software}; {options.rounds} rounds"
    for column, build in enumerate((dense, classification)):
        if options.setting not in (None, build.__name__):
            continue
        measured = measure(build(options.device), options)
        text = f"{table(measured, column)}\n\n{head}\n"
        print(text, flush=True)
        if options.write:
            device = "cpu" if on_cpu else name.lower().replace(" ", "-")
            stem = Path(__file__).parent / "results" / f"step_cost-{device}-{build.__name__}"
            stem.parent.mkdir(exist_ok=True)
            stem.with_suffix(".md").write_text(text)
            stem.with_suffix(".json").write_text(json.dumps({"where": head} | measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
