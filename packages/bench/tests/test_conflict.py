import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sidetask_bench import Experiment, compare, records, report, train
from sidetask_bench.conflict import conflict
from sidetask_bench.storage import StepLog
from sidetask_core import Batch, Report, Step
from sidetask_core.testing import batches, problem, tiny_tasks

pytestmark = pytest.mark.thorough

NAMES = ("a", "b", "c")
ALL = torch.tensor([True, True, True])
Loader = Callable[..., Experiment]


def of(matrix: torch.Tensor, labelled: torch.Tensor = ALL) -> dict[str, dict[str, float]]:
    found = conflict(NAMES, matrix @ matrix.T, labelled)
    return {group: {name: value.item() for name, value in values.items()} for group, values in found.items()}


def by_hand(step: Step, batch: Batch) -> np.ndarray:
    """Gradients of the shared parameters, a backward pass for each task."""
    rows = []
    for task in step.tasks:
        loss = task.loss(step.model(batch.inputs)[task.name], batch.targets[task.name]).mean()
        gradients = torch.autograd.grad(loss, step.model.shared_parameters())
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).numpy())
    return np.stack(rows)


def test_it_is_what_one_finds_by_hand() -> None:
    step = Step(problem(), tiny_tasks())
    for batch in batches(3):
        rows = by_hand(step, batch)
        norms = np.linalg.norm(rows, axis=1)
        found = step.inspect(batch, lambda s: conflict(s.tasks, s.gramian("parameters"), s.labelled))
        for i, j in ((0, 1), (0, 2), (1, 2)):
            cosine = found["cosines"][f"{NAMES[i]}, {NAMES[j]}"].item()
            assert cosine == pytest.approx(rows[i] @ rows[j] / norms[i] / norms[j], rel=1e-9)
        for name, norm in zip(NAMES, norms, strict=True):
            assert found["ratios"][name].item() == pytest.approx(norm / norms.mean(), rel=1e-9)
        # The singular values of the gradients themselves, squared.
        assert found["condition"]["gramian"].item() == pytest.approx(np.linalg.cond(rows) ** 2, rel=1e-6)


def test_what_scales_and_turns_change() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    whole = of(matrix)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.float64))[0]
    for other in (1e6 * matrix, 1e-6 * matrix, matrix @ turn):
        for group, values in of(other).items():
            assert values == pytest.approx(whole[group], rel=1e-8)
    scaled = of(matrix * torch.tensor([[1.0], [-5.0], [1.0]]))
    signs = {"a, b": -1, "a, c": 1, "b, c": -1}
    assert scaled["cosines"] == pytest.approx({pair: s * whole["cosines"][pair] for pair, s in signs.items()})
    assert scaled["ratios"]["b"] / scaled["ratios"]["a"] == pytest.approx(
        5 * whole["ratios"]["b"] / whole["ratios"]["a"]
    )


def test_an_absent_task_counts_nowhere() -> None:
    matrix = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix[1] = 0
    found = of(matrix, torch.tensor([True, False, True]))
    norms = matrix[[0, 2]].norm(dim=1)
    assert np.isnan([found["cosines"]["a, b"], found["cosines"]["b, c"], found["ratios"]["b"]]).all()
    assert found["ratios"]["c"] == pytest.approx((norms[1] / norms.mean()).item())
    assert found["condition"]["gramian"] == pytest.approx(np.linalg.cond(matrix[[0, 2]].numpy()) ** 2)
    none = of(matrix, torch.zeros(3, dtype=torch.bool))
    assert np.isnan([value for values in none.values() for value in values.values()]).all()


def test_what_cannot_be_told() -> None:
    dependent = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    found = of(dependent)
    assert found["condition"]["gramian"] == pytest.approx(1 / torch.finfo(torch.float32).eps)
    assert found["cosines"]["a, b"] == 1.0
    zero = of(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))
    assert np.isnan(zero["cosines"]["a, b"])
    assert zero["ratios"]["b"] == 0.0


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_of_a_gradient_that_is_not_finite_nothing_can_be_told(value: float) -> None:
    """Neither can of a mean that it is part of, nor of the Gramian; between the others nothing changes."""
    matrix = torch.tensor([[2.0, 1.0], [value, 1.0], [0.0, 2.0]], dtype=torch.float64)
    gramian = matrix @ matrix.T
    some = torch.tensor([[4.0, 1.0, 1.0], [1.0, value, 1.0], [1.0, 1.0, 9.0]], dtype=torch.float64)
    for broken, cosine in ((gramian, 1 / 5**0.5), (some, 1 / 6)):
        found = conflict(NAMES, broken, ALL)
        assert found["cosines"]["a, c"].item() == pytest.approx(cosine)
        nothing = [found["cosines"]["a, b"], found["cosines"]["b, c"], *found["ratios"].values()]
        assert torch.stack([*nothing, found["condition"]["gramian"]]).isnan().all()
        # Without a label it counts nowhere.
        absent = conflict(NAMES, broken, torch.tensor([True, False, True]))
        assert absent["ratios"]["a"] + absent["ratios"]["c"] == pytest.approx(2)
        pair = torch.tensor([0, 2])
        expected = np.linalg.cond(broken[pair][:, pair].numpy())
        assert absent["condition"]["gramian"].item() == pytest.approx(expected)


def test_nothing_waits_for_the_device(tmp_path: Path) -> None:
    """But the eigenvalues, which a meta tensor has too: whatever would read a value raises."""
    values = conflict(NAMES, torch.ones(3, 3, device="meta"), torch.ones(3, dtype=torch.bool, device="meta"))
    StepLog(None).add({"step": 0}, values)  # type: ignore[arg-type]


SAMPLED = "training.gradients={every: 4}"
GROUPS = {"cosines", "ratios", "condition"}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "weights.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["equal", "pcgrad", "dwa", "graddrop"])
def test_a_run_that_is_sampled_is_the_same_run(load: Loader, tmp_path: Path, outcome: Any, method: str) -> None:
    changes = [f"method={method}", "training.accumulate=2"]
    train(load(*changes).run(None, 0), tmp_path / "plain")
    train(load(*changes, SAMPLED).run(None, 0), tmp_path / "sampled")
    found = lines(tmp_path / "sampled")
    assert [line["step"] for line in found if GROUPS & set(line)] == [0, 4, 8]
    for line in found:
        assert set(line) >= GROUPS or not GROUPS & set(line)
        if "cosines" in line:
            assert set(line["cosines"]) == {"top_left, bottom_right"}
            assert abs(line["cosines"]["top_left, bottom_right"]) <= 1
            assert sum(line["ratios"].values()) == pytest.approx(2)
            assert line["condition"]["gramian"] >= 1
    rest = [{key: value for key, value in line.items() if key not in GROUPS} for line in found]
    assert rest == lines(tmp_path / "plain")
    (*metrics, _, tensors), (*sampled, _, sampled_tensors) = (outcome(tmp_path / n) for n in ("plain", "sampled"))
    assert metrics == sampled
    assert tensors == sampled_tensors


def test_an_interrupted_run_is_sampled_at_the_same_steps(
    load: Loader, tmp_path: Path, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(SAMPLED, "training.checkpoint_every=3", "training.gradients.at=features").run(None, 0)
    train(config, tmp_path / "whole")
    backward, left = Step.backward, 9

    def interrupted(step: Step, batch: Batch, **kwargs: Any) -> Report:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return backward(step, batch, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "resumed")
    train(config, tmp_path / "resumed")
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "whole")


def test_the_report_draws_it_at_the_steps_where_it_is_known(load: Loader, tmp_path: Path) -> None:
    compare(load("training.epochs=1", "seeds=[0, 1]", "training.gradients={every: 2, at: features}"), tmp_path)
    assert not any(GROUPS & set(line) for line in lines(tmp_path / "single/seed0")), "nothing is shared there"
    comparison = records.load(tmp_path)
    pair = "top_left, bottom_right"
    curve = records.steps(comparison, "cosines")["equal"][pair]
    written = [
        [line["cosines"][pair] for line in lines(tmp_path / f"equal/seed{seed}") if "cosines" in line]
        for seed in (0, 1)
    ]
    np.testing.assert_array_equal(curve.x, [1, 3, 5])
    np.testing.assert_allclose(curve.mean, np.mean(written, axis=0))
    np.testing.assert_array_equal(curve.low, np.min(written, axis=0))
    text = report.write(tmp_path).read_text("utf-8")
    assert "<h2>Gradient conflict</h2>" in text
    assert "gradients at the shared features, at some of the steps" in text
    for name in ("cosines", "ratios", "condition"):
        assert (tmp_path / "pictures" / f"{name}.png").is_file()
