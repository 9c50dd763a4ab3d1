from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sidetask_bench import storage
from sidetask_bench.schema import ExperimentError
from sidetask_bench.selection import Selection, judges, shares_nothing
from sidetask_core import SplitModel, Task
from torch import nn

METRICS: Any = {"f": SimpleNamespace(higher_is_better=True)}
TASKS = [Task("a", loss=abs, metrics=METRICS), Task("b", loss=abs, metrics=METRICS, primary=False)]


def network(cut: int) -> SplitModel:
    stage = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return SplitModel.from_stages([stage], cut, {name: nn.Linear(2, 1) for name in "ab"})


def choose(
    path: Path, cut: int, by_score: bool = True, by: tuple[str, ...] | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """Three epochs, a is best in the second, b in the first; every number of the network is its epoch."""
    model = network(cut)
    epochs = [{"a": 0.5, "b": 0.9}, {"a": 0.7, "b": 0.3}, {"a": 0.6, "b": 0.8}]
    state: dict[str, Any] = {}
    for epoch, values in enumerate(epochs):
        selection = Selection(
            path, model, judges(TASKS, by), by_score
        )  # a new one in every epoch, as if it had been killed
        if state:
            selection.load_state(state)
        with torch.no_grad():
            for value in model.state_dict().values():
                value.fill_(epoch)
        selection.offer(epoch, {name: {"f": value} for name, value in values.items()}, last=epoch == 2)
        state = selection.state()
    best = storage.read_tensors(path)
    return best, {key: float(value.flatten()[0]) for key, value in best["model"].items()}


def test_tasks_that_share_nothing_choose_each_for_itself(tmp_path: Path) -> None:
    best, values = choose(tmp_path / "best.pt", 0)
    assert best["epoch"] == {"a": 1, "b": 0}
    assert any("running_mean" in key for key in values)
    for key, value in values.items():
        assert value == best["epoch"][key.split(".")[1]], key


@pytest.mark.parametrize(("cut", "by_score", "epoch"), [(1, True, 1), (1, False, 2), (0, False, 2)])
def test_otherwise_one_epoch_is_chosen_by_the_primary_tasks(
    tmp_path: Path, cut: int, by_score: bool, epoch: int
) -> None:
    best, values = choose(tmp_path / "best.pt", cut, by_score)
    assert best["epoch"] == epoch
    assert set(values.values()) == {epoch}


@pytest.mark.parametrize(("by", "epoch"), [(None, 1), (("a",), 1), (("b",), 0), (("b", "a"), 2)])
def test_named_tasks_choose_whether_primary_or_not(tmp_path: Path, by: tuple[str, ...] | None, epoch: int) -> None:
    """Products are .45, .21 and .48."""
    best, values = choose(tmp_path / "best.pt", 1, by=by)
    assert best["epoch"] == epoch
    assert set(values.values()) == {epoch}
    # Each task's own best stays its own.
    assert choose(tmp_path / "own.pt", 0, by=by)[0]["epoch"] == {"a": 1, "b": 0}


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ((), "training.select_by: expected at least one task"),
        (("c",), "training.select_by.c: unknown task; .*tasks: a, b"),
        (("none",), "training.select_by.none: the task has no metric"),
    ],
)
def test_mistakes_in_who_chooses_are_named(by: tuple[str, ...], message: str) -> None:
    tasks = TASKS if "none" not in by else [*TASKS, Task("none", loss=abs)]
    with pytest.raises(ExperimentError, match=message):
        judges(tasks, by)


def test_a_head_in_common_or_a_frozen_encoder_with_statistics_is_shared() -> None:
    heads = {name: nn.Linear(2, 1) for name in "ab"}
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert shares_nothing(SplitModel(frozen, heads))
    assert not shares_nothing(SplitModel(nn.Sequential(frozen, nn.BatchNorm1d(2, affine=False)), heads))
    assert not shares_nothing(SplitModel(frozen, dict.fromkeys("ab", heads["a"])))
    assert not shares_nothing(SplitModel(frozen, heads, {"x": nn.Linear(2, 2)}, dict.fromkeys("ab", "x")))
