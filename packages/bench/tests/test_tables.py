import io
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from sidetask_bench import Experiment, papers, tables
from sidetask_bench.compare import summarize
from sidetask_bench.config import Paper, Span
from sidetask_core import Task

LONG = "depth-helps-segmentation-by-differences"


def printed(blocks: tables.Blocks, width: int) -> str:
    file = io.StringIO()
    Console(width=width, file=file).print(blocks)
    return file.getvalue()


def cells(text: str) -> dict[tuple[str, str], str]:
    """What a reader finds: for each row and heading its cell."""
    found: dict[tuple[str, str], str] = {}
    head: list[list[str]] = []
    for line in text.splitlines():
        parts = [part.strip() for part in re.split("[┃│]", line)[1:-1]]
        if line.startswith("┏"):
            head = []
        elif line.startswith("┃"):
            head.append(parts)
        elif line.startswith("│"):
            names = [" ".join(filter(None, column)) for column in zip(*head, strict=True)]
            for name, cell in zip(names[1:], parts[1:], strict=True):
                assert (parts[0], name) not in found, "said twice"
                found[parts[0], name] = cell
    return found


def in_markdown(text: str) -> dict[tuple[str, str], str]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    head, _, *rows = lines
    return {(row[0], name): cell for row in rows for name, cell in zip(head[1:], row[1:], strict=True)}


def compared(experiment: Experiment, tasks: int) -> dict[str, Any]:
    accuracy = SimpleNamespace(higher_is_better=True)
    names = [f"attribute_of_faces_{i}" for i in range(tasks)]
    data: Any = SimpleNamespace(
        tasks=[Task(name, loss=abs, metrics={"accuracy": accuracy}) for name in names],
        input_shape=(1, 36, 36),
        **dict.fromkeys(("train", "validation", "test"), range(9)),
    )
    results = {
        row: [
            {
                "seed": seed,
                "test": {name: {"accuracy": 0.5 + 0.01 * i + 0.02 * seed * k} for i, name in enumerate(names)},
                "seconds_per_step": 0.1 + 0.1 * k,
            }
            for seed in (0, 1)
        ]
        for k, row in enumerate(experiment.rows)
    }
    return summarize(experiment, data, experiment.runs([0, 1]), results)


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("tasks", [3, 20])
def test_nothing_is_lost_at_any_width(load: Callable[..., Experiment], tasks: int, width: int) -> None:
    comparison = compared(load(f"rows.{LONG}={{}}"), tasks)
    text = printed(tables.terminal(comparison), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert cells(text) == in_markdown(tables.markdown(comparison))
    assert {row for row, _ in cells(text)} == {"single", "equal", LONG}


@pytest.mark.parametrize("width", [80, 160])
def test_nothing_is_lost_of_a_papers_table(load: Callable[..., Experiment], tmp_path: Path, width: int) -> None:
    experiment = load(f"rows.{LONG}={{}}")
    paper = Paper("A. Author", "big", {LONG: Span(-101.5, 102.5)}, {LONG: Span(1.26, 1.46)}, note="word " * 50)
    sizes = [("full", "large"), ("small", "less")]
    measure = tables.MEASURES["one-metric"]
    table = papers.Table(
        "saal", paper, measure, list(experiment.rows), sizes, [compared(experiment, tasks) for tasks in (20, 3)]
    )
    table.write(tmp_path / "paper.md")
    text = printed(table.terminal(), width)
    assert max(map(cell_len, text.splitlines())) <= width
    found = cells(text)
    assert found == in_markdown((tmp_path / "paper.md").read_text())
    assert len(found) == 3 * 6
    assert found[LONG, "time ↓, paper"] == "1.26 to 1.46"


def test_columns_go_on_below_only_where_they_must() -> None:
    table = tables.Blocks(["", "long name", "c"], [["row", "1", "2"], None, ["other", "3", "4"]], "title", "caption")
    wide = printed(table, 80).splitlines()
    assert [line.rstrip() for line in (wide[0], wide[-1])] == ["title", "caption"]
    assert sum(line.startswith("┏") for line in wide) == 1
    assert wide[2] == "┃       ┃ long name ┃ c ┃"
    assert wide[5].startswith("├")
    for width, blocks in ((20, 1), (19, 2), (10, 2)):
        assert printed(table, width).count("┏") == blocks, width


@pytest.mark.parametrize("width", [12, 20])
def test_what_is_wider_than_the_terminal_is_broken_not_cut(width: int) -> None:
    text = printed(tables.Blocks(["", "value"], [[LONG, "0.123456789"]]), width)
    parts = [[part.strip() for part in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert ["".join(column) for column in zip(*parts, strict=True)] == [LONG, "0.123456789"]
