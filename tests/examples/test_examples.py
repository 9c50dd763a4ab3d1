"""The examples run, and what they train learns."""

import math
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# What others warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")


def run(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_plain_loop():
    assert min(run("plain_loop").values()) > 0.8


def test_lightning_manual():
    weights = run("lightning_manual")
    assert sum(weights.values()) == pytest.approx(3.0, abs=1e-4)
    assert max(weights, key=weights.get) == "wanted"


def test_accelerate_loop():
    first, last = run("accelerate_loop")
    assert last < first / 2


def test_text_objective():
    assert run("text_objective") > 0.8


def test_tabular_targets():
    errors = run("tabular_targets")
    assert set(errors) == {"alone", "equal", "Auto-λ"}
    assert all(math.isfinite(error) and error < 1 for error in errors.values()), "better than the mean"


def test_every_example_is_listed_and_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == set(re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert names == {name.removeprefix("test_") for name in globals() if name.startswith("test_")} - {
        "every_example_is_listed_and_tested"
    }
