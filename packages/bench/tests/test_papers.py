import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sidetask_bench import ExperimentError, compare, load_experiment, papers, tables
from sidetask_bench.cli import app
from sidetask_bench.document import dump, read
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.thorough

PAPER = {
    "source": "A. Author 2020, Table 1",
    "size": "big pictures, 200 epochs",
    "improvement": {"equal": 6.4},
    "time": {"equal": [1.0, 1.2]},
}


@pytest.fixture
def pair(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A table at two sizes, as files beside each other."""
    for name, epochs in (("saal", 2), ("saal-small", 1)):
        content: dict[str, Any] = {"name": name, "paper": PAPER, "seeds": [0, 1]}
        text = tiny(**content).read_text()
        (tmp_path / f"{name}.yaml").write_text(text.replace("epochs: 3", f"epochs: {epochs}"))
    return tmp_path / "saal.yaml"


@pytest.fixture
def sidetask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command, in an empty folder; reports, which take longest, are not what is tested here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sidetask_bench.report.write", lambda folder: folder / "report.html")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def change(path: Path, **changes: Any) -> Path:
    """The experiment file with other keys."""
    path.write_text(dump(read(path) | changes))
    return path


def rows_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "comparison.json").read_text())
    return {row["name"]: row for row in found["rows"]}


def test_each_size_has_its_own_columns(pair: Path, sidetask: Callable[..., Result]) -> None:
    result = sidetask("table", pair, "--small")
    assert result.exit_code == 0, result.output
    text = Path("runs/saal-small/paper.md").read_text()
    heading = "|  | improvement % ↑, paper | improvement % ↑, small | time ↓, paper | time ↓, small |"
    assert text.splitlines()[2] == heading
    assert re.search(r"\| equal \| .* \| 1\.00 to 1\.20 \| 1\.00 \|", text), text
    assert "Improvement in % against single: mean over each primary task's metrics, then over these tasks." in text
    assert "Paper: A. Author 2020, Table 1; big pictures, 200 epochs." in text
    assert (
        "Here, small: digits, 48 training, 20 validation and 24 test samples of 1×36×36, small (widths 4×8), "
        "1 epoch, 2 seeds.\n" in text
    )
    equal = rows_of(Path("runs/saal-small"))["equal"]
    mean = f"{equal['improvement']['mean']:+.1f}".replace("-", "−")
    assert f"| equal | +6.4 | {mean} ± " in text
    assert "| single | – |" in text, "the paper says nothing of it"

    assert sidetask("table", pair).exit_code == 0
    lines = Path("runs/saal/paper.md").read_text().splitlines()
    assert lines[2].count("full") == lines[2].count("small") == 2
    assert "Here, full: " in lines[-1]
    assert "2 epochs, 2 seeds" in lines[-1]


def test_overrides_are_of_the_size_that_is_run(pair: Path, frames: Path, sidetask: Callable[..., Result]) -> None:
    change(pair, dataset={"name": "frames", "tasks": ["depth"], "validation": 1})
    small = pair.with_name("saal-small.yaml")
    assert sidetask("table", small, "--set", "training.batch_size=4").exit_code == 0
    missing = sidetask("table", pair)
    assert missing.exit_code == 2, "no root"
    done = sidetask("table", pair, "--set", f"dataset.root={frames}", "--set", "training.batch_size=2")
    assert done.exit_code == 0, done.output
    text = Path("runs/saal/paper.md").read_text()
    assert "| improvement % ↑, full | improvement % ↑, small |" in text
    assert (
        "Here, full: frames (tasks depth), 3 training, 1 validation and 2 test samples of 3×6×8, small (widths 4×8), "
        "2 epochs, 2 seeds; otherwise than saal in training.batch_size. Here, small: digits, 48 training, 20 "
        "validation and 24 test samples of 1×36×36, small (widths 4×8), 1 epoch, 2 seeds; otherwise than saal-small in "
        "training.batch_size.\n" in text
    )
    for cells, rows in ((2, rows_of(Path("runs/saal"))), (3, rows_of(Path("runs/saal-small")))):
        (line,) = re.findall(r"^\| equal \|.*$", text, re.MULTILINE)
        found = rows["equal"]["improvement"]
        shown = tables.with_deviation(found["mean"], found["std"], 1, sign=True)
        assert line.split("|")[cells + 1].strip() == shown, line
    # The other way round: the options of one mean nothing to the other.
    assert sidetask("table", small, "--set", "dataset.train=48", "--set", "training.batch_size=4").exit_code == 0
    assert "Here, full: frames" in Path("runs/saal-small/paper.md").read_text()


def test_a_comparison_of_other_rows_is_named_and_left_out(pair: Path, sidetask: Callable[..., Result]) -> None:
    assert sidetask("table", pair, "--small").exit_code == 0
    for path in (pair, pair.with_name("saal-small.yaml")):
        change(path, rows={**read(path)["rows"], "rlw": {"method": "rlw"}})
    assert sidetask("table", pair).exit_code == 0
    text = Path("runs/saal/paper.md").read_text()
    assert "small" not in text.splitlines()[2]
    assert text.endswith("\n- Not shown, small: runs/saal-small has other rows.\n")


def test_a_measure_of_which_less_is_better_says_so(pair: Path, sidetask: Callable[..., Result]) -> None:
    change(pair.with_name("saal-small.yaml"), improvement="flat")
    change(pair, improvement="flat")
    done = sidetask("table", pair, "--small")
    assert done.exit_code == 0, done.output
    text = Path("runs/saal-small/paper.md").read_text()
    assert text.splitlines()[2].startswith("|  | Δm % ↓, paper | Δm % ↓, small |")
    assert (
        "Δm in % against single: how much worse the metrics of all primary tasks are, mean over them; lower is" in text
    )
    assert "mprovement" not in text
    assert "Δm % ↓, small" in done.output


def test_runs_that_failed_are_named(pair: Path, sidetask: Callable[..., Result]) -> None:
    path = pair.with_name("saal-small.yaml")
    boom = {"training": {"optimizer": {"name": "sgd", "lr": 1e30}}}
    change(path, rows={**read(path)["rows"], "boom": boom})
    assert sidetask("table", path).exit_code == 1
    text = Path("runs/saal-small/paper.md").read_text()
    for seed in (0, 1):
        assert re.search(rf"^- small: left out: boom, seed {seed}: .*(nan|inf|finite)", text, re.MULTILINE), text
    assert "| boom | – | – |" in text


def test_either_size_names_both(pair: Path) -> None:
    for source, title in ((pair, "full"), (pair.with_name("saal-small.yaml"), "small")):
        sizes = papers.sizes(source, ["training.epochs=7"])
        assert (sizes.full.name, sizes.small.name, sizes.title) == ("saal", "saal-small", title)
        assert [one.training.epochs for one in (sizes.full, sizes.small, sizes.chosen)] == [2, 1, 7]
    assert papers.sizes(pair, small=True).chosen.name == "saal-small"


def test_mistakes_are_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny(name="a")
    (tmp_path / "tiny-small.yaml").write_text(path.read_text())
    with pytest.raises(ExperimentError, match="a has no key paper"):
        papers.sizes(path)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(dump({**read(path), "paper": {**PAPER, "improvement": {"eqal": 1.0}}}))
    with pytest.raises(ExperimentError, match=r"paper\.improvement\.eqal: unknown row; did you mean 'equal'"):
        load_experiment(wrong)


def test_time_is_in_units_of_equal_weighting_under_any_name(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rows = {"single": {"network": {"cut": 0}}, "shared": {}, "rlw": {"method": "rlw"}}
    found = compare(load_experiment(tiny(rows=rows)), tmp_path / "runs")
    seconds = {row["name"]: row["seconds_per_step"] for row in found["rows"]}
    assert tables.unit(found) == seconds["shared"]
    text = (tmp_path / "runs" / "table.md").read_text()
    assert " × equal |" in text
    assert f"| {seconds['rlw'] / seconds['shared']:.2f} |" in text
    assert tables.unit({**found, "rows": found["rows"][:1]}) is None
