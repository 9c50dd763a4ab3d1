import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sidetask_bench import ExperimentError, compare, load_experiment, papers, tables
from sidetask_bench.cli import app
from sidetask_bench.document import dump
from typer.testing import CliRunner

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


def test_each_size_has_its_own_columns(pair: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    result = CliRunner().invoke(app, ["table", str(pair), "--small", "--runs", str(runs)])
    assert result.exit_code == 0, result.output
    text = (runs / "saal-small" / "paper.md").read_text()
    assert text.splitlines()[2] == "|  | improvement, paper | improvement, small | time, paper | time, small |"
    assert re.search(r"\| equal \| .* \| 1\.00 to 1\.20 \| 1\.00 \|", text), text
    assert "Paper: A. Author 2020, Table 1; big pictures, 200 epochs." in text
    assert "Here, small: digits (train 48, validation 20, test 24), small (widths 4×8), 1 epochs, 2 seeds" in text
    found = json.loads((runs / "saal-small" / "comparison.json").read_text())
    (equal,) = (row for row in found["rows"] if row["name"] == "equal")
    mean = f"{equal['improvement']['mean']:+.1f}".replace("-", "−")
    assert f"| equal | +6.4 | {mean} ± " in text
    assert "| single | – |" in text, "the paper says nothing of it"

    full, small = papers.sizes(pair)
    compare(full, runs / "saal")
    table = papers.Table.of([full, small], runs)
    assert [title for title, _ in table.columns] == ["full", "small"]
    assert "2 epochs" in table.columns[0][1]


def test_what_was_run_otherwise_is_left_out(pair: Path, tmp_path: Path) -> None:
    _, small = papers.sizes(pair)
    compare(small, tmp_path / "runs" / "saal-small")
    other = papers.sizes(pair, ["training.epochs=3"])
    assert papers.Table.of(other, tmp_path / "runs").columns == []
    assert len(papers.Table.of(papers.sizes(pair), tmp_path / "runs").columns) == 1


def test_either_size_names_both(pair: Path) -> None:
    for source in (pair, pair.with_name("saal-small.yaml")):
        assert [experiment.name for experiment in papers.sizes(source)] == ["saal", "saal-small"]


def test_mistakes_are_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny(name="a")
    (tmp_path / "tiny-small.yaml").write_text(path.read_text())
    with pytest.raises(ExperimentError, match="a has no key paper"):
        papers.sizes(path)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(dump({**load_plain(path), "paper": {**PAPER, "improvement": {"eqal": 1.0}}}))
    with pytest.raises(ExperimentError, match=r"paper\.improvement\.eqal: unknown row; did you mean 'equal'"):
        load_experiment(wrong)


def load_plain(path: Path) -> dict[str, Any]:
    from sidetask_bench.document import read

    found: dict[str, Any] = read(path)
    return found


def test_relations_are_made_for_a_table_that_reads_them(pair: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    reads = {"name": "saal-e", "relations": str(runs / "saal-small" / "relations" / "relations.json")}
    path = pair.with_name("saal-small.yaml")
    content = load_plain(path)
    content["rows"]["saal-e"] = {"method": reads}
    content["network"]["cut"] = 1
    path.write_text(dump(content))
    # The small one by its own name: it is what is run, not the other.
    result = CliRunner().invoke(app, ["table", str(path), "--runs", str(runs)])
    assert result.exit_code == 0, result.output
    assert Path(reads["relations"]).exists()
    assert not (runs / "saal").exists()
    assert "| saal-e | " in (runs / "saal-small" / "paper.md").read_text()
    _, small = papers.sizes(path)
    assert not papers.needs_relations(small, runs)
    assert papers.needs_relations(small, tmp_path / "elsewhere") is False


def test_time_is_in_units_of_equal_weighting_under_any_name(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rows = {"single": {"network": {"cut": 0}}, "shared": {}, "rlw": {"method": "rlw"}}
    found = compare(load_experiment(tiny(rows=rows)), tmp_path / "runs")
    seconds = {row["name"]: row["seconds_per_step"] for row in found["rows"]}
    assert tables.unit(found) == seconds["shared"]
    text = (tmp_path / "runs" / "table.md").read_text()
    assert " × equal |" in text
    assert f"| {seconds['rlw'] / seconds['shared']:.2f} |" in text
    assert tables.unit({**found, "rows": found["rows"][:1]}) is None
