import base64
import hashlib
import html
import itertools
import json
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sidetask_bench import drawing, plots, records, report, shapes, tables
from sidetask_bench.gallery import Gallery, Legend, Picture, Strip
from sidetask_bench.schema import ExperimentError

pytestmark = pytest.mark.thorough

TASKS = {
    "segmentation": {"mIoU": True, "accuracy": True},
    "depth": {"absolute": False, "rmse": False},
    "normals": {"mean": False, "within 30": True},
}
HOSTILE = "<script>alert(1)</script>"


def make(folder, rows=("single", "equal", "pcgrad"), seeds=(0, 1, 2), steps=450, epochs=5, combiners=(), impartial=()):
    """A comparison's folder, as if trained, and its summary."""
    generator = np.random.default_rng(0)
    summary = []
    for number, row in enumerate(rows):
        runs = []
        for seed in seeds:
            place = folder / f"row{number}" / f"seed{seed}"
            place.mkdir(parents=True)
            decay = np.exp(-np.arange(epochs) / 2)
            lines = [
                {
                    "epoch": epoch,
                    "losses": {task: float(decay[epoch] + 0.1 * generator.random()) for task in TASKS},
                    "validation": {
                        task: {metric: float(1 - decay[epoch] + 0.05 * generator.random()) for metric in metrics}
                        for task, metrics in TASKS.items()
                    },
                    "lr": 0.1,
                    "seconds": 1.0,
                }
                for epoch in range(epochs)
            ]
            (place / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
            encoder = {} if row in combiners else dict.fromkeys(TASKS, 1.0 + 0.3 * number)
            lines = [
                {
                    "step": step,
                    "epoch": 0,
                    "losses": dict.fromkeys(TASKS, 1.0),
                    "encoder": {task: w + 0.2 * float(generator.random()) for task, w in encoder.items()},
                    "decoder": dict.fromkeys(TASKS, 2.0 + step / steps if row in impartial else 1.0),
                    "norms": dict.fromkeys(TASKS, 0.1 + step) if row in impartial else {},
                }
                for step in range(steps)
            ]
            (place / "weights.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
            test = {
                task: {
                    metric: float((0.5 + 0.03 * number + 0.01 * generator.random()) * (40 if metric == "mean" else 1))
                    for metric in metrics
                }
                for task, metrics in TASKS.items()
            }
            runs.append(
                {
                    "seed": seed,
                    "folder": f"row{number}/seed{seed}",
                    "test": test,
                    "seconds_per_step": 0.05 * (1 + number),
                }
            )
        values = [2.0 * number + 0.3 * float(generator.standard_normal()) for _ in seeds]

        def spread(found):
            return stdev(found) if len(found) > 1 else None

        def over(summarise, runs=runs):
            return {
                task: {metric: summarise([run["test"][task][metric] for run in runs]) for metric in metrics}
                for task, metrics in TASKS.items()
            }

        summary.append(
            {
                "name": row,
                "method": row,
                "runs": runs,
                "mean": over(fmean),
                "std": over(spread),
                "seconds_per_step": 0.05 * (1 + number),
                "improvement": {
                    "mean": fmean(values),
                    "std": spread(values),
                    "values": values,
                    "by_task": {task: {"mean": fmean(values), "std": spread(values)} for task in TASKS},
                },
            }
        )
    data = {
        "name": "synthetic",
        "baseline": rows[0],
        "improvement": "mean-of-tasks",
        "tasks": [
            {
                "name": task,
                "primary": task != "normals",
                "metrics": {metric: {"higher_is_better": up} for metric, up in metrics.items()},
            }
            for task, metrics in TASKS.items()
        ],
        "rows": summary,
        "versions": {"sidetask-core": "0.1.0", "sidetask-theirs": "3.1", "torch": "2.6.0+cpu", "python": "3.12.1"},
        "config": {"name": "synthetic", "training": {"epochs": epochs}},
        "data": {"input": [3, 36, 48], "train": 70, "validation": 20, "test": 50},
        "command": "sidetask compare synthetic.yaml",
    }
    (folder / "comparison.json").write_text(json.dumps(data))
    return data


def pictures(rows=("single", "equal")):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    shown = [Picture("input", pixels), Picture("truth", pixels)]
    strips = [
        Strip("depth", index, [*shown, *(Picture(row, pixels, "wrong", i) for i, row in enumerate(rows))])
        for index in (1, 5)
    ]
    return Gallery(strips, {"depth": Legend("black has no label", [(HOSTILE, "#010203")], pixels, (0.0, 9.5))})


class Page(HTMLParser):
    """Tags, attributes and the cells of every table of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.tables, self._cell = [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key.split(":")[-1] in {"src", "href", "srcset", "action"}]
        self.ids += [value for key, value in attrs if key == "id"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in {"td", "th"}:
            self.tables[-1][-1].append(" ".join(self._cell.split()))
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    data = make(folder, rows=("single", "equal", HOSTILE), combiners=(HOSTILE,))
    before = dict(mpl.rcParams)
    path = report.write(folder, pictures())
    assert dict(mpl.rcParams) == before, "drawing leaves matplotlib as it was"
    return folder, data, path.read_text(encoding="utf-8")


def test_report_needs_nothing_but_itself(written):
    page = Page(written[2])
    assert page.links
    assert all(link.startswith(("data:image/", "data:text/yaml", "#")) for link in page.links)
    assert "@import" not in written[2]
    assert not re.search(r"url\((?!#)", written[2])
    assert set(re.findall(r"https?://[^\"' >]*", written[2])) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }  # names of XML vocabularies, which nothing opens
    assert not {"link", "iframe", "object"} & set(page.tags)
    (script,) = re.findall(r"<script>(.*?)</script>", written[2], re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in written[2], "the browser runs this script and no other"
    assert len(page.ids) == len(set(page.ids)), "charts keep to their own ids"
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_it_says_how_to_repeat_it_from_a_checkout(written):
    commands = "python -m pip install sidetask-theirs==3.1 torch==2.6.0\npython -m pip install ./packages/core\n"
    assert f'<pre class="command">{commands}sidetask compare synthetic.yaml</pre>' in written[2]


def test_names_are_escaped(written):
    text = written[2]
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text


def test_report_names_every_row_task_and_metric(written):
    _, data, text = written
    page = Page(text)
    first = page.tables[0]
    assert [row[0] for row in first[1:]] == ["single baseline", "equal", HOSTILE]
    assert all(len(row) == 2 + len(TASKS) + 1 for row in first)
    headers = " ".join(cell for table in page.tables for cell in table[0])
    for label in ("mean IoU", "accuracy", "absolute error (m)", "RMSE (m)", "mean angle (°)", "within 30°"):
        assert label in headers
    for task in TASKS:
        assert task in headers
    assert data["command"] in text


def test_numbers_are_those_of_the_comparison(written):
    _, data, text = written
    table = Page(text).tables[0]
    for index, (cells, row) in enumerate(zip(table[1:], data["rows"], strict=True)):
        wanted = [(row["improvement"]["mean"], row["improvement"]["std"])]
        for task, metrics in TASKS.items():
            metric = next(iter(metrics))
            wanted.append((row["mean"][task][metric], row["std"][task][metric]))
        wanted.append(((1 + index) / 2,))  # a step takes 0.05 · (1 + index) seconds, and equal is the second row
        for cell, numbers in zip(cells[1:], wanted, strict=True):
            shown = cell.replace("−", "-").split(" ± ")
            decimals = len(shown[0].partition(".")[2])
            assert [float(text) for text in shown] == [float(f"{number:.{decimals}f}") for number in numbers]
    exact = {float(value) for value in re.findall(r'data-value="([^"]+)"', text)}
    for row in data["rows"]:
        for task, metrics in TASKS.items():
            assert {row["mean"][task][metric] for metric in metrics} <= exact


def test_the_best_of_a_column_follows_the_direction(tmp_path):
    data = make(tmp_path)
    for column in report.table(records.load(tmp_path)):
        means = [row["mean"][column.task.name][column.metric] for row in data["rows"]]
        best = max(means) if TASKS[column.task.name][column.metric] else min(means)
        assert [cell.best for cell in column.cells] == [mean == best for mean in means]
        assert column.arrow == ("↑" if TASKS[column.task.name][column.metric] else "↓")


@pytest.mark.parametrize("definition", ["mean-of-tasks", "flat"])
def test_the_improvement_follows_its_direction(tmp_path, definition):
    data = make(tmp_path)
    data |= {"improvement": definition, "higher_is_better": definition != "flat"}
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    up = definition != "flat"
    text = report.write(tmp_path, pictures()).read_text(encoding="utf-8")
    assert Page(text).tables[0][0][1].startswith("improvement ↑" if up else "Δm ↓")
    assert tables.MEASURES[definition].words in html.unescape(text)
    assert "Data: 70 training, 20 validation and 50 test samples of 3×36×48." in text
    assert ("lower is better" in text) is not up
    cells = report._improvement_cells(records.load(tmp_path))
    means = [row["improvement"]["mean"] for row in data["rows"]]
    assert [cell.best for cell in cells] == [mean == (max if up else min)(means) for mean in means]


def test_report_and_table_show_the_same_numbers(written):
    _, data, text = written
    data = data | {"higher_is_better": True, "mixed_versions": {}}
    lines = [line for line in tables.markdown(data).splitlines() if line.startswith("| ")]
    # But for the last two columns, a step's time in milliseconds and in units of equal weighting's.
    in_table = {cell.strip() for line in lines[2:] for cell in line.split("|")[2:-3]}
    in_report = {cell for table in Page(text).tables for row in table for cell in row}
    assert len(in_table) > 10
    assert in_table <= in_report


def test_pictures_have_the_size_they_should(written):
    folder = written[0]
    width, height = (round(side * drawing.DPI) for side in drawing.PANEL)
    sizes = {}
    for name in ("improvement", "weights", "losses", "validation", "gallery"):
        with Image.open(folder / "pictures" / f"{name}.png") as image:
            sizes[name] = image.size
            assert len(np.unique(np.asarray(image.convert("L")))) > 10, f"{name} is empty"
    head = round(0.35 * drawing.DPI)
    assert sizes["losses"] == sizes["validation"] == pytest.approx((3 * width, height + head), abs=2)
    assert sizes["improvement"] == pytest.approx((3 * width, 2 * height + head), abs=2)
    assert sizes["weights"] == pytest.approx((2 * width, height + head), abs=2)  # a combiner has no panel


def test_a_method_without_weights_is_named(written):
    text = re.sub(r"\s+", " ", written[2])
    assert "No weights to draw" in text
    assert text.split("No weights to draw")[1].split("</p>")[0].endswith(": &lt;script&gt;alert(1)&lt;/script&gt;.")


def test_one_seed_has_no_spread(tmp_path):
    make(tmp_path, rows=("single", "equal"), seeds=(0,), steps=3, epochs=1)
    text = report.write(tmp_path, pictures()).read_text(encoding="utf-8")
    assert "One seed per row says nothing about chance" in text
    assert not any("±" in cell for table in Page(text).tables for row in table for cell in row)
    assert "whisker" not in text


def test_gaps_become_dashes(tmp_path):
    data = make(tmp_path, rows=("single", "equal"), seeds=(0, 1), steps=3, epochs=2)
    data["rows"][1]["mean"]["depth"]["absolute"] = None
    data["rows"][1]["std"]["depth"]["absolute"] = None
    data["rows"][1]["improvement"] |= {"mean": None, "std": None, "values": [None, None]}
    data["failed"] = [{"row": HOSTILE, "seed": 1, "error": "task 'depth': loss is nan at iteration 7"}]
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    for run in data["rows"][0]["runs"]:
        (tmp_path / run["folder"] / "metrics.jsonl").unlink()
        (tmp_path / run["folder"] / "weights.jsonl").unlink()
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert Page(text).tables[0][2][3] == Page(text).tables[0][2][1] == "–"
    assert "&lt;script&gt;alert(1)&lt;/script&gt;, seed 1: task &#39;depth&#39;: loss is nan at iteration 7" in text
    assert "No gallery: " in text, "there are no trained networks"
    assert not (tmp_path / "pictures" / "gallery.png").exists()


def test_decoder_weights_and_norms_are_drawn_where_they_say_something(tmp_path):
    make(tmp_path, rows=("equal", "pcgrad", "ial"), seeds=(0, 1), steps=20, combiners=("pcgrad",), impartial=("ial",))
    comparison = records.load(tmp_path)
    for group, first in (("decoder", 2.0), ("norms", 0.1)):
        found = records.steps(comparison, group)
        assert [row for row, curves in found.items() if curves] == ["ial"], group
        curve = found["ial"]["depth"]
        assert len(curve.x) == 20
        assert curve.mean[0] == pytest.approx(first)
        assert (np.diff(curve.mean) > 0).all()
    text = report.write(tmp_path, pictures()).read_text(encoding="utf-8")
    assert "<h2>Gradient norms</h2>" in text
    assert "<h2>Weights in the decoders</h2>" in text
    for name in ("decoders", "norms"):
        with Image.open(tmp_path / "pictures" / f"{name}.png") as image:
            # One panel, and two lines of title above it.
            assert image.size == pytest.approx(
                (drawing.PANEL[0] * drawing.DPI, (drawing.PANEL[1] + 0.6) * drawing.DPI), abs=2
            )


def test_coefficients_of_transfers_are_a_matrix_over_training(tmp_path):
    data = make(tmp_path, rows=("equal", "saal-w"), seeds=(0, 1), steps=20)
    curves = {"depth": -0.2, "depth→normals": 0.4, "normals→depth": 0.1}
    for run in data["rows"][1]["runs"]:
        path = tmp_path / run["folder"] / "weights.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        weights = [{name: w * step / 19 for name, w in curves.items()} for step in range(20)]
        path.write_text("\n".join(json.dumps(x | {"encoder": w}) for x, w in zip(lines, weights, strict=True)))
    comparison = records.load(tmp_path)
    (panel,) = plots.transfer_panels(comparison, records.steps(comparison))
    lines = plots.step_panels(comparison, records.steps(comparison), "weight")
    assert [p.words for p in lines if p.title == "saal-w"] == ["weight at the end: depth -0.2"]
    assert panel.title == "saal-w"
    assert panel.words == "coefficients at the end: depth -0.2; depth to normals 0.4; normals to depth 0.1"
    ax = Figure().subplots()
    panel.draw(ax)
    assert [label.get_text() for label in ax.get_xticklabels()] == list(TASKS)
    # Tasks are segmentation, depth, normals: a curve from the left to the right of its cell, sources from the top down.
    drawn = {text.get_text(): text.get_position() for text in ax.texts}
    assert set(drawn) == {"−0.20", "0.40", "0.10"}
    assert [tuple(map(round, drawn[text])) for text in ("−0.20", "0.40", "0.10")] == [(1, 1), (2, 1), (1, 2)]
    rise = next(line for line in ax.lines if len(line.get_xdata()) == 20 and np.ptp(line.get_ydata()) > 0.35)
    assert rise.get_xdata()[-1] == pytest.approx(2.42)
    # From zero, a third of the way up from the least to the largest, to the largest's height.
    assert rise.get_ydata()[[0, -1]] == pytest.approx([1.42 - 0.6 / 3, 0.82], abs=1e-6)
    text = report.write(tmp_path, pictures()).read_text(encoding="utf-8")
    assert "<h2>Transfers over training</h2>" in text
    assert (tmp_path / "pictures/transfers.png").exists()


def test_the_sharing_sweep_has_a_line_for_each_method(tmp_path):
    rows = ("cut0", "cut1", "cut3", "one", "two", "elsewhere")
    data = make(tmp_path, rows=rows, seeds=(0, 1), steps=3)
    method = {"name": "saal-e", "transfers": "all"}
    cuts = [("equal", 3), ("equal", 0), ("equal", 1), (method, 1), (method, 0), ("equal", None)]
    for row, (how, cut) in zip(data["rows"], cuts, strict=True):
        row |= {"method": how, "network": {"name": "small", **({} if cut is None else {"cut": cut})}}
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    panels = plots.sharing_panels(records.load(tmp_path), lambda task: task.name)
    assert [panel.title for panel in panels] == list(TASKS)
    ax = Figure().subplots()
    panels[1].draw(ax)
    equal, saal = (line for line in ax.lines if len(line.get_xdata()) > 1)
    means = [row["mean"]["depth"]["absolute"] for row in data["rows"]]
    assert [*equal.get_xdata()] == [0, 1, 3]
    assert [*equal.get_ydata()] == [means[1], means[2], means[0]]
    assert [*saal.get_xdata()] == [0, 1]
    assert [*saal.get_ydata()] == [means[4], means[3]]
    assert "<h2>How much to share</h2>" in report.write(tmp_path, pictures()).read_text(encoding="utf-8")


def test_without_transfers_or_several_cuts_neither_is_drawn(tmp_path):
    make(tmp_path, steps=3)
    text = report.write(tmp_path, pictures()).read_text(encoding="utf-8")
    assert "Transfers over training" not in text
    assert "How much to share" not in text


def test_decoder_weights_that_are_the_encoders_are_not_drawn_twice(tmp_path):
    data = make(tmp_path, rows=("equal", "uncertainty"), seeds=(0,), steps=5, impartial=("uncertainty",))
    for run in data["rows"][1]["runs"]:
        path = tmp_path / run["folder"] / "weights.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps(line | {"encoder": line["decoder"], "norms": {}}) for line in lines))
    text = report.write(tmp_path, pictures()).read_text(encoding="utf-8")
    assert "Weights in the decoders" not in text
    assert "Gradient norms" not in text
    assert not (tmp_path / "pictures" / "decoders.png").exists()


def test_weights_keep_their_mean_and_their_extremes(tmp_path):
    data = make(tmp_path, steps=450)
    curve = records.steps(records.load(tmp_path))["equal"]["depth"]
    raw = []
    for run in data["rows"][1]["runs"]:
        lines = (tmp_path / run["folder"] / "weights.jsonl").read_text().splitlines()
        raw.append([json.loads(line)["encoder"]["depth"] for line in lines])
    assert curve.pooled == 8
    assert len(curve.x) == 57
    np.testing.assert_allclose(curve.mean[:-1], np.reshape(np.array(raw)[:, :448], (3, 56, 8)).mean(axis=(0, 2)))
    np.testing.assert_allclose(curve.mean[-1], np.array(raw)[:, 448:].mean())
    assert curve.low.min() == np.min(raw)
    assert curve.high.max() == np.max(raw)


def test_curves_are_means_over_seeds(tmp_path):
    data = make(tmp_path)
    curve = records.validation(records.load(tmp_path))["depth"]["pcgrad"]
    raw = []
    for run in data["rows"][2]["runs"]:
        lines = (tmp_path / run["folder"] / "metrics.jsonl").read_text().splitlines()
        raw.append([json.loads(line)["validation"]["depth"]["absolute"] for line in lines])
    np.testing.assert_allclose(curve.mean, np.mean(raw, axis=0))
    np.testing.assert_allclose(curve.high - curve.mean, np.std(raw, axis=0, ddof=1))


@pytest.mark.parametrize(("change", "message"), [("tasks", "no 'tasks'"), ("baseline", "no 'baseline'")])
def test_a_comparison_that_lacks_something(tmp_path, change, message):
    data = make(tmp_path, rows=("single",), seeds=(0,), steps=1, epochs=1)
    del data[change]
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    with pytest.raises(ExperimentError, match=message):
        report.write(tmp_path)


def test_no_comparison(tmp_path):
    with pytest.raises(ExperimentError, match="sidetask compare"):
        report.write(tmp_path)


@pytest.mark.parametrize("means", [[0.0, -2426.7], [12.3, -98.7], [0.0, 31.4]], ids=str)
def test_numbers_beside_bars_stay_inside_the_axes(tmp_path, means):
    make(tmp_path)
    names = [row.name for row in records.load(tmp_path).rows[: len(means)]]
    bars = [shapes.Bar(mean, abs(mean)) for mean in means]
    draw = partial(shapes.bars, names=names, values=bars, label="improvement")
    figure = Figure(figsize=drawing.PANEL, dpi=drawing.DPI)
    ax, _ = drawing.place(figure, drawing.Panel("", draw, "", 1.6, 0.15), 0, 0, top=0.04)
    ax.autoscale_view()
    whole = ax.get_window_extent()
    assert len(ax.texts) == len(bars)
    for text in ax.texts:
        assert whole.x0 <= text.get_window_extent().x0 < text.get_window_extent().x1 <= whole.x1


def test_a_front_is_a_line_through_its_rows_and_better_is_to_the_upper_right(tmp_path):
    rows = ("single", "p0", "p1", "p2")
    make(tmp_path, rows=rows)
    data = json.loads((tmp_path / "comparison.json").read_text())
    data["config"]["fronts"] = {"pareto": ["p2", "gone", "p0", "p1"]}
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    comparison = records.load(tmp_path)
    panels = plots.trade_off_panels(comparison, lambda task: task.headline)
    assert [panel.title for panel in panels] == [
        "segmentation and depth",
        "segmentation and normals",
        "depth and normals",
    ]
    axes = Figure().subplots()
    panels[0].draw(axes)
    assert (axes.xaxis.get_inverted(), axes.yaxis.get_inverted()) == (False, True)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("segmentation: mIoU", "depth: absolute")
    means = {
        row["name"]: (row["mean"]["segmentation"]["mIoU"], row["mean"]["depth"]["absolute"]) for row in data["rows"]
    }
    points = [line.get_xydata()[0] for line in axes.lines if line.get_marker() in drawing._MARKERS]
    np.testing.assert_allclose(points, [means[row] for row in ("single", "p2", "p0", "p1")])
    (front,) = (line.get_xydata() for line in axes.lines if len(line.get_xydata()) == 3)
    np.testing.assert_allclose(front, [means[row] for row in ("p2", "p0", "p1")])
    assert {text.get_text(): text.xy for text in axes.texts if text.get_text() in "012"} == {
        row[1]: pytest.approx(means[row]) for row in ("p2", "p0", "p1")
    }
    assert {text.get_text() for text in axes.texts} == {"single", "pareto", *"012"}
    text = report.write(tmp_path, pictures()).read_text(encoding="utf-8")
    assert "pareto (p2, p0, p1)." in text
    assert (tmp_path / "pictures" / "trade_offs.png").is_file()


def test_a_row_without_a_value_has_no_point(tmp_path):
    make(tmp_path)
    data = json.loads((tmp_path / "comparison.json").read_text())
    data["rows"][1]["runs"][0]["test"]["depth"]["absolute"] = None
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    panels = plots.trade_off_panels(records.load(tmp_path), lambda task: task.headline)
    assert ["equal" in panel.words for panel in panels] == [False, True, False]


def test_spread_keeps_order_and_distance():
    generator = np.random.default_rng(1)
    for count in (1, 2, 7):
        places = sorted(generator.random(count))
        moved = shapes._spread(places, 0.1)
        assert all(b - a > 0.1 - 1e-9 for a, b in itertools.pairwise(moved))
        assert all(-1e-9 < place < 1 + 1e-9 for place in moved)
    assert shapes._spread([0.0, 0.5, 1.0], 0.1) == [0.0, 0.5, 1.0]
    assert shapes._spread([0.4, 0.4], 0.1) == pytest.approx([0.35, 0.45])


def test_a_report_that_is_interrupted_keeps_what_was_there(tmp_path, monkeypatch):
    make(tmp_path, steps=2, epochs=1)
    report.write(tmp_path, pictures())
    files = {*tmp_path.glob("report.html"), *tmp_path.glob("pictures/*.png")}
    assert {"report.html", "gallery.png", "improvement.png"} <= {path.name for path in files}
    for path in files:
        path.write_text("of before")
    replaced = set()
    monkeypatch.setattr(Path, "replace", lambda self, target: replaced.add(target))
    report.write(tmp_path, pictures())
    assert {path.read_text() for path in files} == {"of before"}
    assert replaced == files
