"""Writes the report of a comparison: one HTML file that needs nothing else, and pictures for slides."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from sidetask_bench import drawing, plots, records, storage, tables
from sidetask_bench import gallery as galleries
from sidetask_bench.document import dump
from sidetask_bench.records import Comparison, TaskRecord
from sidetask_bench.schema import ExperimentError
from sidetask_bench.verdict import verdict

# Metric name to how people call it, and its unit.
_METRICS = {
    "mIoU": ("mean IoU", ""),
    "accuracy": ("accuracy", ""),
    "absolute": ("absolute error", ""),
    "relative": ("relative error", ""),
    "rmse": ("RMSE", ""),
    "mean": ("mean angle", "°"),
    "median": ("median angle", "°"),
    "within 11.25": ("within 11.25°", ""),
    "within 22.5": ("within 22.5°", ""),
    "within 30": ("within 30°", ""),
    "odsF": ("ODS F", ""),
}
_METRES = {("depth", "absolute"), ("depth", "rmse")}


@dataclass(frozen=True)
class Cell:
    """A number of the table: its text, its standard deviation's, whether it is its column's best."""

    text: str
    std: str | None = None
    best: bool = False
    value: float | None = None


@dataclass(frozen=True)
class Column:
    """A metric of a task, with a cell per row."""

    task: TaskRecord
    metric: str
    label: str
    arrow: str
    cells: list[Cell]


def write(folder: Path | str, gallery: galleries.Gallery | None = None) -> Path:
    """Write ``report.html`` and ``pictures/*.png`` into a comparison's folder.

    Args:
        folder: holds ``comparison.json`` and the runs it names.
        gallery: pictures of predictions; None collects them from the runs' trained networks. Where that cannot be
            done, the report says why and has no gallery.

    Returns:
        The path of the report.

    Raises:
        ExperimentError: if the folder holds no comparison, or one that lacks what a report needs.
    """
    comparison = records.load(folder)
    missing = None
    if gallery is None:
        try:
            gallery = galleries.collect(comparison)
        except (ExperimentError, OSError, ValueError, LookupError) as error:
            missing = str(error)
    weights = records.steps(comparison, "encoder")
    below, norms = records.steps(comparison, "decoder"), records.steps(comparison, "norms")
    groups = {
        "improvement": plots.improvement_panels(comparison),
        "weights": plots.step_panels(comparison, weights, "weight in the encoder"),
        "transfers": plots.transfer_panels(comparison, weights),
        "decoders": plots.step_panels(comparison, below, "weight in the decoder"),
        "sharing": plots.sharing_panels(comparison, _headline_label),
        "norms": plots.step_panels(comparison, norms, "gradient norm", rule=None),
        "cosines": plots.cosine_panels(comparison, records.steps(comparison, "cosines")),
        "ratios": plots.step_panels(comparison, records.steps(comparison, "ratios"), "gradient norm / mean norm"),
        "condition": plots.condition_panels(comparison, records.steps(comparison, "condition")),
        "losses": plots.curve_panels(comparison, records.losses(comparison), lambda task: "training loss"),
        "validation": plots.curve_panels(comparison, records.validation(comparison), _headline_label),
    }
    groups["trade_offs"] = plots.trade_off_panels(comparison, _headline_label) if len(comparison.tasks) <= 3 else []
    groups["shapers"] = plots.shaper_panels(records.shaper_weights(comparison))
    broken_down = records.by_class(comparison)
    titles = dict(_TITLES)
    for i, found in enumerate(broken_down):
        groups[f"by_class_{i}"] = plots.class_panels(comparison, found)
        titles[f"by_class_{i}"] = f"{found.task} by class of {found.by}"
    pictures = comparison.folder / "pictures"
    for name, panels in groups.items():
        if panels:
            drawing.png(panels, pictures / f"{name}.png", title=f"{comparison.name}: {titles[name]}")
    if gallery and gallery.strips:
        galleries.png(gallery, pictures / "gallery.png")
    environment = Environment(
        loader=PackageLoader("sidetask_bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = _png_uri
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    script = _template("report.js")
    columns = table(comparison)
    page = environment.get_template("report.html.j2").render(
        comparison=comparison,
        sentences=verdict(comparison),
        headline=[column for column in columns if column.metric == column.task.headline],
        columns=columns,
        improvement=_improvement_cells(comparison),
        times=_time_cells(comparison),
        light=drawing.LIGHT.variables(),
        dark=drawing.DARK.variables(),
        colours=len(drawing.LIGHT.colours),
        panels={
            name: [(panel, drawing.svg(panel, f"{name}{i}")) for i, panel in enumerate(panels)]
            for name, panels in groups.items()
        },
        by_class=[(found, class_table(comparison, found)) for found in broken_down],
        unweighted=[row.name for row in comparison.rows if not weights[row.name]],
        where=_where_sampled(comparison),
        gallery=gallery if gallery and gallery.strips else None,
        no_gallery=missing,
        marks=galleries.MARKS,
        measure=tables.MEASURES[comparison.definition],
        samples=tables.samples(comparison.data) if comparison.data else "",
        mixed=tables.mixed_versions(comparison.mixed_versions),
        config=dump(comparison.config) if comparison.config else "",
        install=_install(comparison),
        made_with=comparison.versions | _machines(comparison),
        css=_template("report.css"),
        script=script,
        # The page runs this script and no other, whatever names say.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path = comparison.folder / "report.html"
    # Line ends as they are, for the script's hash.
    storage.write_text(path, page)
    return path


def _template(name: str) -> str:
    return (resources.files("sidetask_bench") / "templates" / name).read_text("utf-8").replace("\r\n", "\n")


def _where_sampled(comparison: Comparison) -> str:
    """Where gradients were compared, as rows may set it too."""
    rows = [comparison.config, *(row or {} for row in comparison.config.get("rows", {}).values())]
    set_ = [row["training"]["gradients"] for row in rows if (row.get("training") or {}).get("gradients")]
    places = dict.fromkeys(sampling.get("at", "parameters") for sampling in set_)
    return "at the shared " + " or ".join(places) if places else "at the shared layers"


def _install(comparison: Comparison) -> str:
    """The command that brings what the runs were made with; empty if that was not the same for all."""
    if comparison.mixed_versions:
        return ""
    # What follows a plus is a build of torch, which an index of its own has.
    versions = {name: version.partition("+")[0] for name, version in comparison.versions.items() if name != "python"}
    return " ".join(["pip install", *(f"{name}=={version}" for name, version in versions.items())] if versions else [])


def _machines(comparison: Comparison) -> dict[str, str]:
    """On what the runs were made, and how long they took together."""
    runs = [run for row in comparison.rows for run in row.runs]
    found = [(run["device"], run["processes"]) for run in runs if "processes" in run]
    devices = dict.fromkeys(device if count == 1 else f"{count} × {device}" for device, count in found)
    seconds = sum(run.get("seconds", 0.0) for run in runs)
    spent = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    return {"device": "; ".join(devices), "training, all runs": spent} if devices else {}


_TITLES = {
    "improvement": "relative improvement on the test split (bar: mean, whisker: ± std over seeds)",
    "trade_offs": "one task against another on the test split (cross: ± std over seeds)",
    "weights": "weights in the encoder over training",
    "transfers": "coefficients of tasks (diagonal) and transfers over training, on one scale",
    "sharing": "the headline metric by how many stages are shared (band: ± std over seeds)",
    "shapers": "weights of elements over training (band: ± std over seeds)",
    "decoders": "weights in the decoders over training, where they are others",
    "norms": "norms of the tasks' gradients at the shared features, where a method reads them",
    "cosines": "cosines between the tasks' gradients over training",
    "ratios": "norms of the tasks' gradients over training, relative to their mean",
    "condition": "condition number of the Gramian of the tasks' gradients over training",
    "losses": "training losses (band: ± std over seeds)",
    "validation": "validation metrics (band: ± std over seeds)",
}


def table(comparison: Comparison) -> list[Column]:
    """The test metrics, a column per task and metric, best cells marked."""
    columns = []
    for task in comparison.tasks:
        for metric, higher in task.metrics.items():
            means = [_finite(row.mean.get(task.name, {}).get(metric)) for row in comparison.rows]
            stds = [_finite(row.std.get(task.name, {}).get(metric)) for row in comparison.rows]
            label = _label(task.name, metric)
            columns.append(Column(task, metric, label, "↑" if higher else "↓", _cells(means, stds, higher)))
    return columns


def class_table(comparison: Comparison, found: records.ByClass) -> list[Column]:
    """A task's headline metric by class: a column per class, a cell per row, best cells marked."""
    task = next(task for task in comparison.tasks if task.name == found.task)
    columns = []
    for c, name in enumerate(found.classes):
        values = [found.values[row.name][:, c] for row in comparison.rows]
        means = [_finite(of_row.mean()) for of_row in values]
        stds = [_finite(of_row.std(ddof=1)) if len(of_row) > 1 else None for of_row in values]
        higher = task.headline is not None and task.metrics[task.headline]
        columns.append(Column(task, name, name, "↑" if higher else "↓", _cells(means, stds, higher)))
    return columns


def _cells(means: list[float | None], stds: list[float | None], higher: bool) -> list[Cell]:
    known = [mean for mean in means if mean is not None]
    if not known:
        return [Cell("–") for _ in means]
    places = tables.decimals(known)
    best = max(known) if higher else min(known)
    return [
        Cell("–")
        if mean is None
        else Cell(
            tables.number(mean, places),
            None if std is None else tables.number(std, places),
            mean == best and len(known) > 1,
            mean,
        )
        for mean, std in zip(means, stds, strict=True)
    ]


def _improvement_cells(comparison: Comparison) -> list[Cell]:
    choose = max if comparison.higher_is_better else min
    best = choose((fmean(row.values) for row in comparison.rows if row.is_complete), default=None)
    return [
        Cell(
            tables.number(row.improvement["mean"], tables.IMPROVEMENT_PLACES, sign=True),
            None
            if row.improvement["std"] is None
            else tables.number(row.improvement["std"], tables.IMPROVEMENT_PLACES),
            fmean(row.values) == best and len(comparison.rows) > 1,
            row.improvement["mean"],
        )
        if row.is_complete
        else Cell("–")
        for row in comparison.rows
    ]


def _time_cells(comparison: Comparison) -> tuple[str, list[Cell]] | None:
    """The seconds per step as a ratio to the row called equal; without it, in milliseconds; None if not recorded."""
    times = [row.seconds_per_step for row in comparison.rows]
    if not any(times):
        return None
    unit = tables.unit(storage.read_json(comparison.folder / "comparison.json") or {"rows": []})
    if unit:
        return "step time, × equal", [
            Cell("–") if t is None else Cell(f"{t / unit:.2f}", value=t / unit) for t in times
        ]
    return "step time, ms", [Cell("–") if t is None else Cell(f"{1000 * t:.1f}", value=1000 * t) for t in times]


def _label(task: str, metric: str) -> str:
    name, unit = _METRICS.get(metric, (metric, ""))
    unit = "m" if (task, metric) in _METRES else unit
    return f"{name} ({unit})" if unit else name


def _headline_label(task: TaskRecord) -> str:
    if task.headline is None:
        return ""
    arrow = "higher" if task.metrics[task.headline] else "lower"
    return f"{_label(task.name, task.headline)}, {arrow} is better"


def _png_uri(pixels: galleries.Pixels) -> str:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
