import json

import numpy as np
import pytest
from sidetask_bench import records
from sidetask_bench.verdict import _T95, difference, verdict


def comparison(tmp_path, values, definition="mean-of-tasks"):
    """A comparison of rows with these improvements per seed; the first is the baseline."""
    rows = [
        {
            "name": name,
            "method": name,
            "runs": [{"seed": seed, "folder": f"{name}/seed{seed}"} for seed in range(len(found))],
            "mean": {},
            "std": {},
            "improvement": {"mean": None if None in found else float(np.mean(found)), "std": None, "values": found},
        }
        for name, found in values.items()
    ]
    tasks = [{"name": name, "primary": name != "c", "metrics": {}} for name in "abc"]
    data = {"name": "x", "baseline": next(iter(values)), "improvement": definition, "tasks": tasks, "rows": rows}
    data["higher_is_better"] = definition != "flat"
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    return records.load(tmp_path)


def test_quantiles_are_students():
    stats = pytest.importorskip("scipy.stats")
    assert pytest.approx(stats.t.ppf(0.975, range(1, 31)), abs=5e-4) == _T95


def test_difference_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    first, second = [2.0, 2.5, 3.5, 2.2], [1.0, 1.1, 1.4]
    found = difference(first, second)
    theirs = stats.ttest_ind(first, second, equal_var=False)
    assert found.error == pytest.approx(found.mean / theirs.statistic)
    # The table is read at the next lower whole number of degrees of freedom: never less cautious than the exact one.
    assert found.margin >= (theirs.confidence_interval().high - theirs.confidence_interval().low) / 2
    assert found.is_noise is False


def test_identical_runs_leave_no_doubt():
    assert difference([1.0, 1.0], [0.5, 0.5]).is_noise is False
    assert difference([1.0, 1.0], [1.0, 1.0]).is_noise is True


def test_a_clear_winner(tmp_path):
    rows = {"single": [-0.1, 0.0, 0.1], "equal": [1.0, 1.1, 0.9], "pcgrad": [5.0, 5.1, 4.9]}
    sentences = verdict(comparison(tmp_path, rows))
    assert sentences[0].startswith("pcgrad comes out best, 5.0 % better than single (2 primary tasks, 3 seeds")
    assert "gain on single is more than chance explains" in sentences[1]
    assert "lead of 4.0 points on equal" in sentences[2]
    assert "more than chance" in sentences[2]


def test_a_lead_within_noise_is_called_so(tmp_path):
    rows = {"single": [-0.1, 0.0, 0.1], "equal": [3.0, 5.0, 4.0], "pcgrad": [3.5, 5.4, 4.3]}
    sentences = verdict(comparison(tmp_path, rows))
    assert "more than chance" in sentences[1]
    assert "within noise" in sentences[2]


def test_nobody_beats_the_baseline(tmp_path):
    sentences = verdict(comparison(tmp_path, {"single": [-1.0, 1.0], "equal": [-2.0, -3.0], "b": [-4.0, -5.0]}))
    assert sentences[0].startswith("No row beats single; the closest is equal, 2.5 % worse")
    assert "This loss on single is within noise" in sentences[1]


def test_of_the_flat_definition_less_is_better(tmp_path):
    rows = {"single": [-0.1, 0.0, 0.1], "equal": [6.0, 7.0, 8.0], "pcgrad": [-5.0, -5.1, -4.9]}
    sentences = verdict(comparison(tmp_path, rows, "flat"))
    assert sentences[0].startswith("pcgrad comes out best, 5.0 % better than single")
    assert "gain on single is more than chance explains" in sentences[1]
    assert "lead of 12.0 points on equal" in sentences[2]
    worse = verdict(comparison(tmp_path, {"single": [-1.0, 1.0], "equal": [2.0, 3.0], "b": [4.0, 5.0]}, "flat"))
    assert worse[0].startswith("No row beats single; the closest is equal, 2.5 % worse")


def test_one_seed(tmp_path):
    sentences = verdict(comparison(tmp_path, {"single": [0.0], "equal": [3.0]}))
    assert len(sentences) == 2
    assert "one seed" in sentences[0]
    assert "says nothing about chance" in sentences[1]


def test_a_row_alone(tmp_path):
    assert "nothing to compare" in verdict(comparison(tmp_path, {"single": [0.0]}))[0]


def test_a_row_without_an_improvement_is_passed_over(tmp_path):
    sentences = verdict(comparison(tmp_path, {"single": [0.0, 0.1], "equal": [1.0, 2.0], "b": [None, 9.0]}))
    assert sentences[0].startswith("equal comes out best")
    assert len(sentences) == 2
