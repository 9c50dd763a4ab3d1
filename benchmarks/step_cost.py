"""What a training step of each method costs, as a ratio to equal weighting, measured side by side in one run.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --device cuda --write
    python benchmarks/step_cost.py --setting half_shared --tasks 9 --rounds 3 --write

Four settings: three dense tasks (segmentation, depth, normals) on a ResNet-18 with DeepLabV3 heads of 144 channels,
which do 38 % of the work; twenty classification tasks with small heads on the same trunk; the dense tasks on the
half-shared network, each with layer3 and layer4 of its own, for the methods that add transfers; and segmentation and
depth on a U-Net with a decoder for each, for class-wise weights, as in their paper. One round times one step of every
method, in an order drawn anew; a ratio is taken within its round, and the table gives its median and quartiles over the
rounds. Memory is the most that two steps in a row hold at a time on top of parameters, momentum and batches: gradients,
copies of the network, and whatever is kept from one step to the next. `plain` is the sum of losses and one
``backward()``, without this project.

Methods that look ahead get a validation batch as large as the training batch, and SGD with momentum and weight decay to
follow. In their rows all tasks are primary, unless it says "one primary". Of a method that learns in every fifth step,
the time is a fifth of five steps in a row; where gradients are compared in every tenth, as `training.gradients` does it
in a training, a tenth of ten. Class-wise weights are those of six bins of depth, for segmentation.

A second table has the methods that TorchJD or LibMTL have too, and Auto-λ, SAAL and Pareto MTL as they were published,
on the same model and batch, in the same rounds (`peers.py`; those libraries are optional). A ratio there is ours to
theirs, again within a round.

A figure over its goal is marked with an exclamation mark; beside a peer the goal is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peers import installed, losses_of, peers, versions
from sidetask_bench.conflict import conflict
from sidetask_bench.networks.resnet import AtrousHead, resnet_stages
from sidetask_core import Batch, SplitModel, Step, Task, plugins
from torch import nn

Run = Callable[[], None]
Key = tuple[str, str]  # a row, and the library whose step it is: none for ours


@dataclass(frozen=True)
class Goal:
    """How many times what equal weighting takes a step may take: time by setting, and memory."""

    dense: float = math.inf
    classification: float = math.inf
    half_shared: float = math.inf
    decoders: float = math.inf
    memory: float = math.inf


# What a method reads decides what it may cost.
GOALS = {
    "losses": Goal(1.06, 1.06, decoders=1.06),
    "features": Goal(1.06, 1.06, memory=1.4),
    "ial": Goal(1.06, 1.15, memory=1.4),
    "pcgrad over parameters": Goal(1.8, 11.0),
    "before": Goal(3.0, 3.6, memory=2.2),
    "after": Goal(2.4, memory=2.2),
    "online": Goal(1.8, memory=2.2),
    "every fifth": Goal(1.3, memory=2.2),
    "transfers": Goal(half_shared=1.45),
    "transfers before": Goal(half_shared=4.0),
    "transfers after": Goal(half_shared=3.1),
    "transfers online": Goal(half_shared=2.4),
    "half after": Goal(half_shared=2.8),
    "classwise lookahead": Goal(1.9, decoders=1.9),
    "classwise lookahead, every fifth": Goal(1.3, decoders=1.3),
}
# What Yim and Kim (2020) report in their Table 2.
PAPER = {"classwise difference": 1.69, "pareto-mtl over parameters": 6.2}
PATIENCE = 300  # seconds for two steps of a peer
CLASSWISE = {
    "name": "classwise",
    "main": "segmentation",
    "auxiliary": "depth",
    "classes": {"by": "uniform", "low": 0.5, "high": 1.5, "bins": 6},
    "warmup": 0,
}
LOOKING = {**CLASSWISE, "estimator": "lookahead"}
METHODS: dict[str, tuple[Any, str | None]] = {
    "equal": ("equal", None),
    **{name: (name, "losses") for name in ("uncertainty", "dwa", "rlw", "imtl-l", "atw", "puw")},
    "famo": ("famo", None),  # another forward pass, to see what the last step did to the losses
    "per-objective-uncertainty": ("per-objective-uncertainty", "losses"),
    "ial": ("ial", "ial"),
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
    **{
        f"autolambda {when}" + (f", {mode}" if mode != "exact" else ""): (
            {"name": "autolambda", "when": when, "mode": mode},
            when if mode == "exact" else None,
        )
        for when in ("before", "after", "online")
        for mode in ("exact", "difference", "one-sided")
    },
    "autolambda before, every fifth": ({"name": "autolambda", "every": 5}, "every fifth"),
    "autolambda before, one primary": ({"name": "autolambda"}, "before"),
    "classwise, fixed weights": ({**CLASSWISE, "warmup": 1}, "losses"),
    "classwise difference": (CLASSWISE, "losses"),
    "classwise lookahead, validation batch": (LOOKING, None),
    "classwise lookahead, next batch": ({**LOOKING, "probe": "next"}, "classwise lookahead"),
    "classwise lookahead, next batch, one-sided": ({**LOOKING, "probe": "next", "mode": "one-sided"}, None),
    "classwise lookahead, next batch, every fifth": (
        {**LOOKING, "probe": "next", "every": 5},
        "classwise lookahead, every fifth",
    ),
}
# Equal weighting, the tasks' gradients compared besides: where.
SAMPLED = {
    "equal, conflict at features, every tenth": "features",
    "equal, conflict over parameters, every tenth": "parameters",
}
METHODS |= dict.fromkeys(SAMPLED, ("equal", None))
PERIODS = {"every fifth": 5, "every tenth": 10}
# "half" stands for half of all transfers, as many to every target.
TRANSFERS: dict[str, tuple[Any, str | None]] = {
    "equal": ("equal", None),
    "saal-e, all": ({"name": "saal-e", "transfers": "all"}, "transfers"),
    **{
        f"saal-w {when}": ({"name": "saal-w", "when": when}, f"transfers {when}")
        for when in ("before", "after", "online")
    },
    "saal-ew after, half": ({"name": "saal-ew", "transfers": "half", "when": "after"}, "half after"),
}


ROWS = {"dense": METHODS, "classification": METHODS, "half_shared": TRANSFERS, "decoders": METHODS}


@dataclass
class Setting:
    """A model, its tasks, two batches of one size and what takes the steps, on the device; `rows`: which of METHODS."""

    name: str
    tasks: Sequence[Task]
    model: SplitModel
    batch: Batch
    validation: Batch
    optimizer: torch.optim.SGD
    rows: Sequence[str] = ()


def dense(device: str, images: int | None = None) -> Setting:
    """Three dense tasks on the ResNet-18 DeepLabV3 of `sidetask_bench`, with narrower heads."""
    from sidetask_datasets import tasks as kinds

    size, usual = ((64, 96), 4) if device == "cpu" else ((288, 384), 8)
    images = images or usual
    tasks = [kinds.segmentation("segmentation", 13), kinds.depth(primary=False), kinds.normals(primary=False)]
    heads = {t.name: AtrousHead(512, c, size, width=144) for t, c in zip(tasks, (13, 1, 3), strict=True)}
    stages = resnet_stages(18)

    def batch() -> Batch:
        targets = {
            "segmentation": torch.randint(0, 13, (images, *size)),
            "depth": torch.rand(images, 1, *size) + 0.5,
            "normals": nn.functional.normalize(torch.randn(images, 3, *size), dim=1),
        }
        return Batch(torch.rand(images, 3, *size), targets)

    return prepared("T = 3, dense", tasks, SplitModel.from_stages(stages, len(stages), heads), batch, device)


def classification(device: str, images: int | None = None, count: int = 20) -> Setting:
    """Twenty classification tasks, or another number, with two-layer heads on a ResNet-18."""
    from sidetask_datasets import tasks as kinds

    size, usual = ((64, 64), 8) if device == "cpu" else ((224, 224), 64)
    images = images or usual
    tasks = [kinds.classification(f"task{i:02}", 5, primary=i == 0) for i in range(count)]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    heads = {t.name: nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 5)) for t in tasks}

    def batch() -> Batch:
        targets = {t.name: torch.randint(0, 5, (images,)) for t in tasks}
        return Batch(torch.rand(images, 3, *size), targets)

    model = SplitModel(nn.Sequential(*resnet_stages(18), pool), heads)
    return prepared(f"T = {count}, classification", tasks, model, batch, device)


def half_shared(device: str, images: int | None = None, tasks: int = 3, size: tuple[int, int] | None = None) -> Setting:
    """The dense tasks, or several of each, all primary, on a ResNet-18 of which stem, layer1 and layer2 are shared."""
    from sidetask_datasets import tasks as kinds

    normal, usual = ((64, 96), 4) if device == "cpu" else ((288, 384), 8)
    size = size or normal
    images = images or usual
    makers = [lambda name: kinds.segmentation(name, 13), kinds.depth, kinds.normals]
    outputs = [13, 1, 3]
    wanted = [makers[i % 3](f"task{i}") for i in range(tasks)]
    heads = {t.name: AtrousHead(512, outputs[i % 3], size, width=144) for i, t in enumerate(wanted)}

    def batch() -> Batch:
        labels = [
            torch.randint(0, 13, (images, *size)),
            torch.rand(images, 1, *size) + 0.5,
            nn.functional.normalize(torch.randn(images, 3, *size), dim=1),
        ]
        return Batch(torch.rand(images, 3, *size), {t.name: labels[i % 3] for i, t in enumerate(wanted)})

    model = SplitModel.from_stages(resnet_stages(18), 3, heads)
    return prepared(f"T = {tasks}, dense, half-shared", wanted, model, batch, device)


def decoders(device: str, images: int | None = None) -> Setting:
    """Segmentation and depth of rendered rooms on the U-Net of `sidetask_bench`, a quarter as wide."""
    from sidetask_bench.networks import unet
    from sidetask_datasets import scenes

    size, usual = ((64, 96), 4) if device == "cpu" else ((288, 384), 16)
    count = images or usual
    rooms = scenes(size=size, train=2 * count, validation=1, test=1, tasks=["segmentation", "depth"])
    both = iter(list(rooms.train.batches(count, shuffle=False, augment=False)))
    model = unet(rooms, widths=[16, 32, 64, 128, 256])
    setting = prepared("T = 2, U-Net", rooms.tasks, model, lambda: next(both), device)
    return replace(setting, rows=("equal", "classwise", "pareto-mtl over parameters"))


def prepared(name: str, tasks: Sequence[Task], model: SplitModel, batch: Callable[[], Batch], device: str) -> Setting:
    """A setting whose optimizer has momentum already."""
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    setting = Setting(name, tasks, model, batch().to(device), batch().to(device), optimizer)
    plain(setting)()
    optimizer.step()
    return setting


def plain(setting: Setting) -> Run:
    """The sum of losses and one backward pass, as one writes it by hand."""
    model, batch = setting.model, setting.batch

    def step() -> None:
        model.zero_grad()
        torch.stack(losses_of(setting, model(batch.inputs))).sum().backward()

    return step


def ours(setting: Setting, row: str, spec: Any) -> Run:
    """A step of one method."""
    tasks = setting.tasks
    if row.startswith("autolambda") and "one primary" not in row:
        tasks = [replace(task, primary=True) for task in tasks]
    if isinstance(spec, dict) and spec.get("transfers") == "half":
        # The same number for every target.
        names, each = [task.name for task in tasks], (len(tasks) - 1) // 2
        pairs = [(names[(t + i + 1) % len(names)], target) for t, target in enumerate(names) for i in range(each)]
        spec = {**spec, "transfers": [f"{source}->{target}" for source, target in pairs]}
    step = Step(setting.model, tasks, plugins.make_method(spec, tasks)).to(setting.batch.inputs.device)

    def run() -> None:
        step.zero_grad()
        step.backward(setting.batch, validation=setting.validation, optimizer=setting.optimizer)

    if row not in SAMPLED:
        return run
    numbers = itertools.count()

    def sampled() -> None:
        if next(numbers) % 10 == 0:
            step.inspect(setting.batch, lambda s: conflict(s.tasks, s.gramian(SAMPLED[row]), s.labelled))
        run()

    return sampled


def clock_of(device: str) -> Callable[[], float]:
    """What counts seconds: of the processor's time on one thread, which other programs do not add to."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def timed(step: Run, steps: int, device: str) -> float:
    """Seconds of one of some steps."""
    clock = clock_of(device)
    start = clock()
    for _ in range(steps):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (clock() - start) / steps


def peak_bytes(build: Callable[[], Run], device: str) -> tuple[Run, int]:
    """What takes a step, after two of them, and the most bytes it held at a time on top of what it found."""
    built: list[Run] = []

    def step() -> None:
        built.append(build())
        built[0]()
        built[0]()

    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return built[0], torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = most = 0
    memory = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return built[0], most


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


def methods(setting: Setting, rows: dict[str, tuple[Any, str | None]], wanted: Sequence[str]) -> dict[str, Any]:
    """The methods to measure: installed, and with one of the `wanted` texts in their name; always `equal`."""
    dense = {"segmentation", "depth"} <= {task.name for task in setting.tasks}
    names = plugins.installed("methods")
    found = {}
    for row, (spec, _) in rows.items():
        name = spec if isinstance(spec, str) else spec["name"]
        if row != "equal" and wanted and not any(text in row for text in wanted):
            continue
        if (setting.rows and not row.startswith(setting.rows)) or (name == "classwise" and not dense):
            continue
        if name in names:
            if name != "torchjd" or installed("TorchJD"):
                found[row] = spec
        else:
            print(f"no installed package offers {name}: {row} is left out", file=sys.stderr)
    return found


def builders(
    setting: Setting, rows: dict[str, tuple[Any, str | None]], wanted: Sequence[str], beside_peers: bool
) -> dict[Key, Callable[[], Run]]:
    """What builds a step of every method and peer."""
    specs = methods(setting, rows, wanted)
    found = {(row, ""): functools.partial(ours, setting, row, spec) for row, spec in specs.items()}
    found["plain", ""] = functools.partial(plain, setting)
    if beside_peers:
        found |= {key: build for key, build in peers(setting).items() if (key[0], "") in found}
    return found


def measure(setting: Setting, rows: dict[str, tuple[Any, str | None]], options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of every method and peer in one setting."""
    builds = builders(setting, rows, options.methods, options.peers)
    steps: dict[Key, Run] = {}
    failed: dict[Key, str] = {}
    memory: dict[Key, int] = {}
    for key, build in builds.items():
        try:
            # Ours fail aloud, and have no need of limits.
            with limit(PATIENCE) if key[1] else contextlib.nullcontext():
                setting.model.zero_grad()
                steps[key], memory[key] = peak_bytes(build, options.device)
        except Exception as error:
            if not key[1]:
                raise
            failed[key] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{key[1]} cannot take a step of {key[0]}: {failed[key]}", file=sys.stderr)
    seconds: dict[Key, list[float]] = {key: [] for key in steps}
    order = list(steps)
    for _ in range(options.rounds):
        random.shuffle(order)
        for key in order:
            in_a_row = next((steps for text, steps in PERIODS.items() if text in key[0]), 1)
            seconds[key].append(timed(steps[key], in_a_row, options.device))

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

    order = sorted(steps, key=lambda key: ["plain", *rows].index(key[0]))
    found = [
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
    return {"rows": found, "peers": beside, "left out": left_out}


def table(measured: dict[str, Any], kind: str) -> str:
    """The figures of one setting of a kind as Markdown."""
    rows = measured["rows"]
    lines = [
        f"### {rows[0]['setting']}",
        "",
        "| method | time / equal | quartiles | ms | memory / equal | MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        reads = ROWS[kind].get(row["method"], (None, None))[1]
        goal = GOALS[reads] if reads else Goal()
        # The goals are for three tasks.
        slow = " !" if row["ratio"] > getattr(goal, kind) and not row["setting"].startswith("T = 9") else ""
        big = " !" if row["memory"] > goal.memory else ""
        low, high = row["quartiles"]
        lines.append(
            f"| {row['method']} | {row['ratio']:.2f}{slow} | {low:.2f}–{high:.2f} | {row['milliseconds']:.0f} | "
            f"{row['memory']:.2f}{big} | {row['megabytes']:.0f} |"
        )
    reported = [f"{figure} for {row}" for row, figure in PAPER.items() if row in {row["method"] for row in rows}]
    if PAPER.keys() & {row["method"] for row in rows if row["method"].startswith("classwise")}:
        lines += ["", f"Yim and Kim (2020, Table 2) report {' and '.join(reported)}."]
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
    parser.add_argument("--setting", choices=list(ROWS), help="only one of them")
    parser.add_argument("--tasks", type=int, default=3, help="how many tasks half_shared has")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        help="only rows with one of these texts in their name; written to a file of their own",
    )
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
    for kind, rows in ROWS.items():
        if options.setting not in (None, kind):
            continue
        setting = {
            "dense": dense,
            "classification": classification,
            "half_shared": functools.partial(half_shared, tasks=options.tasks),
            "decoders": decoders,
        }[kind](options.device)
        measured = measure(setting, rows, options)
        text = f"{table(measured, kind)}\n\n{head}\n"
        print(text, flush=True)
        if options.write:
            device = "cpu" if on_cpu else name.lower().replace(" ", "-")
            some = "".join(f"-{text.replace(' ', '-')}" for text in options.methods)
            many = f"-{options.tasks}" if kind == "half_shared" and options.tasks != 3 else ""
            stem = Path(__file__).parent / "results" / f"step_cost-{device}-{kind}{many}{some}"
            stem.parent.mkdir(exist_ok=True)
            stem.with_suffix(".md").write_text(text)
            stem.with_suffix(".json").write_text(json.dumps({"where": head} | measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
