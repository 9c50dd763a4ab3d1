"""All pairs are trained like any run, and what is read of them is their chosen epoch's validation."""

import json

import numpy as np
import pytest
from sidetask_bench.cli import app
from sidetask_bench.config import load_run_config
from sidetask_bench.relations import enumerate_relations
from sidetask_saal import Relations
from typer.testing import CliRunner

SHORT = "training.epochs=2"


def test_tasks_alone_and_in_pairs_share_the_whole_encoder(load, tmp_path):
    experiment = load(SHORT, "network.cut=1", "dataset.primary=[top_left]")
    found = enumerate_relations(experiment, tmp_path)
    names = ("top_left", "bottom_right")
    assert found.tasks == names
    metrics = {}
    for group in (("top_left",), ("bottom_right",), names):
        folder = tmp_path / "+".join(group) / "seed0"
        config = load_run_config(folder / "config.yaml")
        assert config.dataset.options["tasks"] == list(group)
        assert "primary" not in config.dataset.options
        assert "cut" not in config.network.options
        result = json.loads((folder / "result.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metrics[group] = lines[result["epoch"]]["validation"]
    for t, target in enumerate(names):
        single, paired = metrics[target,][target]["accuracy"], metrics[names][target]["accuracy"]
        if single:
            assert found.improvement[1 - t, t] == pytest.approx(100 * (paired - single) / single)
    again = Relations.load(tmp_path / "relations.json")
    np.testing.assert_array_equal(again.improvement, found.improvement)
    assert (tmp_path / "relations.png").stat().st_size > 1000
    assert (tmp_path / "relations.csv").read_text().count("\n") == 1 + len(found.rows)


def test_processes_give_the_same(load, tmp_path):
    here = enumerate_relations(load(SHORT), tmp_path / "here")
    there = enumerate_relations(load(SHORT), tmp_path / "there", jobs=2)
    np.testing.assert_array_equal(here.improvement, there.improvement)
    assert here.rows == there.rows


def test_the_command_names_the_file_for_the_method(tiny, tmp_path):
    done = CliRunner().invoke(app, ["relations", str(tiny()), "--set", SHORT, "--folder", str(tmp_path / "all")])
    found = Relations.load(tmp_path / "all" / "relations.json")
    assert done.exit_code == bool(found.failed), done.output
    assert f"relations: {tmp_path / 'all' / 'relations.json'}" in done.output
    one = CliRunner().invoke(app, ["relations", str(tiny()), "--set", "dataset.tasks=[top_left]"])
    assert one.exit_code == 2
    assert "relations are between two" in one.output
