"""How many floating-point operations a step that looks ahead does, as a multiple of equal weighting: its time's floor.

    python benchmarks/operations.py
    python benchmarks/operations.py --write
    python benchmarks/operations.py --transfers --write
    python benchmarks/operations.py --growth --write

With ``--transfers`` it is counted of the methods that add transfers, for several numbers of tasks, and
``docs/images/transfers.svg`` draws how it grows, with the times that `step_cost.py` has measured; with ``--growth`` it
is counted and drawn (``docs/images/growth.svg``) of one method of each kind, for classifications with small heads.
Counted are the convolutions and matrix products of one step in the settings of `step_cost.py`, forward, backward and
forward-mode; of a method that learns in every fifth step, those of five steps by five. The count is the same on every
machine of one release of PyTorch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peers import losses_of, peers
from step_cost import METHODS, TRANSFERS, Run, Setting, classification, decoders, dense, half_shared, methods, ours
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

LIBRARY = "as published"
TASKS = (3, 5, 7, 9)
MANY_TASKS = (2, 5, 10, 20, 40)
# One of each kind: what it reads decides how its cost grows. The others of a kind differ by their solver alone.
KINDS: dict[str, Any] = {
    "uncertainty (losses)": "uncertainty",
    "ial (norms at features)": "ial",
    "pcgrad (gradients at features)": {"name": "pcgrad", "at": "features"},
    "pcgrad (gradients over parameters)": {"name": "pcgrad", "at": "parameters"},
    "autolambda before": {"name": "autolambda"},
    "autolambda before, sample=2": {"name": "autolambda", "sample": 2},
    "autolambda after": {"name": "autolambda", "when": "after"},
    "autolambda online": {"name": "autolambda", "when": "online"},
}
RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"


class Operations(TorchDispatchMode):
    """Counts floating-point operations; torch's own counter does not go with `torch.autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator, and add what it does."""
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.count += count(*args, **(kwargs or {}), out_val=out)
        return out


def operations(step: Run, steps: int = 1) -> float:
    """Operations of one of some steps."""
    with Operations() as counted:
        for _ in range(steps):
            step()
    return counted.count / steps


def share_of_heads(setting: Setting) -> float:
    """The heads' share of a plain step."""

    def whole() -> None:
        torch.stack(losses_of(setting, setting.model(setting.batch.inputs))).sum().backward()

    features = tree_map(lambda x: x.detach().requires_grad_(), setting.model.encode(setting.batch.inputs))

    def heads() -> None:
        torch.stack(losses_of(setting, setting.model.decode(features))).sum().backward()

    return operations(heads) / operations(whole)


def of_transfers() -> tuple[list[float], dict[str, list[float]]]:
    """The share of branches and heads in a plain step, and the operations with transfers, for each of `TASKS`."""
    shares: list[float] = []
    rows: dict[str, list[float]] = {row: [] for row in TRANSFERS if row != "equal"}
    for tasks in TASKS:
        setting = half_shared("cpu", images=2, tasks=tasks, size=(32, 48))
        shares.append(share_of_heads(setting))
        equal = operations(ours(setting, "equal", "equal"))
        for row, ratios in rows.items():
            step = ours(setting, row, TRANSFERS[row][0])
            for _ in range(2):
                step()
            ratios.append(operations(step) / equal)
    return shares, rows


def of_kinds() -> dict[str, list[float]]:
    """The operations of every kind of method, for each of `MANY_TASKS`."""
    rows: dict[str, list[float]] = {row: [] for row in KINDS}
    for tasks in MANY_TASKS:
        setting = classification("cpu", images=2, count=tasks)
        equal = operations(ours(setting, "equal", "equal"))
        for row, ratios in rows.items():
            step = ours(setting, row, KINDS[row])
            for _ in range(2):
                step()
            ratios.append(operations(step) / equal)
    return rows


def draw_kinds(rows: dict[str, list[float]], path: Path) -> None:
    """How operations grow with the number of tasks, both on logarithmic scales."""
    figure = Figure(figsize=(6.6, 4.0), layout="constrained")
    ax: Axes = figure.subplots()
    for index, (row, ratios) in enumerate(rows.items()):
        ax.plot(MANY_TASKS, ratios, marker="osD^v<>x"[index % 8], markersize=4, linewidth=1.2, label=row)
    ax.set_xscale("log")
    ax.set_yscale("log", base=2)
    ax.minorticks_off()
    ax.set_xticks(MANY_TASKS, [str(tasks) for tasks in MANY_TASKS])
    ticks = [1, 2, 4, 8, 16, 32]
    ax.set_yticks(ticks, [str(tick) for tick in ticks])
    ax.set_xlabel("tasks T, classifications with small heads on a ResNet-18")
    ax.set_ylabel("operations, of equal weighting's step")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def draw(rows: dict[str, list[float]], path: Path) -> None:
    """How operations grow with the number of tasks; dots are measured times."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax: Axes = figure.subplots()
    lines = {row: ax.plot(TASKS, ratios, label=row)[0].get_color() for row, ratios in rows.items()}
    for tasks in TASKS:
        measured = RESULTS / f"step_cost-cpu-half_shared{'' if tasks == 3 else f'-{tasks}'}.json"
        if measured.exists():
            for row in json.loads(measured.read_text())["rows"]:
                if row["method"] in lines:
                    ax.plot(tasks, row["ratio"], "o", color=lines[row["method"]], markersize=4)
    ax.set_xticks(TASKS)
    ax.set_xlabel("tasks T, with T (T − 1) transfers (half: half of them)")
    ax.set_ylabel("of equal weighting's step")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Count, print, and write what was counted if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the figures to benchmarks/results/")
    parser.add_argument("--transfers", action="store_true", help="of the methods that add transfers, and growth")
    parser.add_argument(
        "--growth", action="store_true", help="of one method of each kind, for several numbers of tasks"
    )
    options = parser.parse_args()
    if options.transfers:
        with_transfers(options.write)
        return
    if options.growth:
        growth(options.write)
        return
    # The ratios do not depend on how many images there are.
    settings = [dense("cpu", images=2), classification("cpu", images=2), decoders("cpu", images=2)]
    torch.set_num_threads(1)
    shares = [share_of_heads(setting) for setting in settings]
    rows: dict[str, dict[str, float]] = {}
    for setting in settings:
        equal = operations(ours(setting, "equal", "equal"))
        found = methods(setting, METHODS, ("autolambda", "classwise", "pareto-mtl over parameters"))
        for row, spec in found.items():
            step = ours(setting, row, spec)
            for _ in range(2):  # what a second look costs is what all others cost
                step()
            rows.setdefault(row, {})[setting.name] = operations(step, 5 if "fifth" in row else 1) / equal
        for (row, library), build in peers(setting).items():
            if library == LIBRARY and row in found:
                rows.setdefault(f"{row.split()[0]} {LIBRARY}", {})[setting.name] = operations(build()) / equal
    names = [setting.name for setting in settings]
    figures = {
        row: [f"{of_row[name]:.2f}" if name in of_row else "–" for name in names] for row, of_row in rows.items()
    }
    lines = [
        "| operations / equal | " + " | ".join(names) + " |",
        "|---" + "|---:" * len(names) + "|",
        "| (in the heads) | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + " |",
        *(f"| {row} | " + " | ".join(texts) + " |" for row, texts in figures.items()),
    ]
    report("operations", lines, {"shares": shares, "rows": rows}, options.write)


def with_transfers(write: bool) -> None:
    """Count, print, write and draw those of the methods that add transfers."""
    torch.set_num_threads(1)
    many, transfers = of_transfers()
    lines = [
        "| operations / equal, half-shared | " + " | ".join(f"T = {tasks}" for tasks in TASKS) + " |",
        "|---|" + "---:|" * len(TASKS),
        "| (in branches and heads) | " + " | ".join(f"{100 * share:.0f} %" for share in many) + " |",
        *(f"| {row} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |" for row, ratios in transfers.items()),
    ]
    report("transfers", lines, {"tasks": TASKS, "shares": many, "rows": transfers}, write)
    if write:
        draw(transfers, IMAGES / "transfers.svg")


def growth(write: bool) -> None:
    """Count, print, write and draw how one method of each kind grows with the number of tasks."""
    torch.set_num_threads(1)
    rows = of_kinds()
    lines = [
        "| operations / equal, classification | " + " | ".join(f"T = {tasks}" for tasks in MANY_TASKS) + " |",
        "|---|" + "---:|" * len(MANY_TASKS),
        *(f"| {row} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |" for row, ratios in rows.items()),
    ]
    report("growth", lines, {"tasks": MANY_TASKS, "rows": rows}, write)
    if write:
        draw_kinds(rows, IMAGES / "growth.svg")


def report(name: str, lines: Sequence[str], figures: dict[str, Any], write: bool) -> None:
    """Print a table, and write it with its figures if asked to."""
    head = f"torch {torch.__version__.split('+')[0]}"
    text = "\n".join(["### Operations", "", *lines, "", head, ""])
    print(text)
    if write:
        stem = RESULTS / name
        stem.parent.mkdir(exist_ok=True)
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".json").write_text(json.dumps({"where": head} | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
