import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sidetask_bench.evaluate import evaluate, score
from sidetask_core import SplitModel, Task
from sidetask_datasets import Column, ResidentSplit, tasks
from torch import Tensor, nn

LABELS = torch.randint(-1, 4, (7, 5, 6), generator=torch.Generator().manual_seed(0))
DEPTH = torch.randint(0, 5000, (7, 5, 6), generator=torch.Generator().manual_seed(1))
DEPTH[2] = 0
TASKS = (tasks.segmentation("segmentation", 4), tasks.depth("depth"))


class Constant(nn.Module):
    """Predicts the same at every pixel, whatever it sees."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.values.expand(len(x), -1, *x.shape[2:])


@pytest.fixture
def split() -> ResidentSplit:
    images = torch.randint(0, 256, (7, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    classes = torch.where(LABELS < 0, 255, LABELS).to(torch.uint8)
    return ResidentSplit(
        Column(images, "image"),
        {"segmentation": Column(classes, "classes"), "depth": Column(DEPTH.to(torch.int16), "depth")},
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_constant_predictions_score_what_the_labels_say(split: ResidentSplit, batch_size: int) -> None:
    heads = {"segmentation": Constant([0.0, 0.0, 1.0, 0.0]), "depth": Constant([2.0])}
    found = evaluate(SplitModel(nn.Identity(), heads), TASKS, split, batch_size)
    labelled, metres = LABELS[LABELS >= 0], DEPTH[DEPTH > 0] / 1000
    right = (labelled == 2).double().mean().item()
    error = (metres - 2).abs()
    assert found["segmentation"]["accuracy"] == pytest.approx(right, abs=1e-6)
    # Three of the four classes are never predicted; the fourth one's union is every labelled pixel.
    assert found["segmentation"]["mIoU"] == pytest.approx(right / 4, abs=1e-6)
    assert found["depth"]["absolute"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert found["depth"]["relative"] == pytest.approx((error / metres).mean().item(), rel=1e-5)
    assert found["depth"]["rmse"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-5)


def test_the_batch_size_changes_nothing(split: ResidentSplit) -> None:
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    model = SplitModel(shared, {"segmentation": nn.Conv2d(4, 4, 1), "depth": nn.Conv2d(4, 1, 1)})
    whole = evaluate(model, TASKS, split, 7)
    for batch_size in (1, 3):
        for task, metrics in evaluate(model, TASKS, split, batch_size).items():
            assert metrics == pytest.approx(whole[task], rel=1e-5)


def test_the_model_is_evaluated_in_evaluation_mode_and_left_as_it_was(split: ResidentSplit) -> None:
    shared = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval(), nn.Dropout(0.9))
    model = SplitModel(shared, {"segmentation": nn.Conv2d(3, 4, 1), "depth": nn.Conv2d(3, 1, 1)})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (evaluate(model, TASKS, split, 4) for _ in range(2))
    assert first == second
    assert [module.training for module in shared] == [True, False, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_metrics_of_the_tasks_stay_untouched(split: ResidentSplit) -> None:
    metric: Any = TASKS[1].metrics["absolute"]
    metric.reset()
    metric.update(torch.tensor([[[[3.0]]]]), torch.tensor([[[[1.0]]]]))
    heads = {"segmentation": Constant([0.0] * 4), "depth": Constant([2.0])}
    evaluate(SplitModel(nn.Identity(), heads), TASKS, split, 4)
    assert metric.compute().item() == 2.0
    metric.reset()


def judged(name: str, higher: bool, primary: bool = True) -> Task:
    metrics: Any = {"headline": SimpleNamespace(higher_is_better=higher), "other": SimpleNamespace()}
    return Task(name, loss=torch.sub, metrics=metrics, primary=primary)


def results(**values: float) -> dict[str, dict[str, float]]:
    return {name: {"headline": value, "other": -1.0} for name, value in values.items()}


def test_score_is_indifferent_to_scale_and_to_auxiliary_tasks() -> None:
    some = [judged("a", True), judged("b", False), judged("c", True, primary=False)]
    gain = score(results(a=0.6, b=1.0, c=0.0), some) - score(results(a=0.5, b=1.0, c=1.0), some)
    same = score(results(a=60, b=0.3, c=9.0), some) - score(results(a=50, b=0.3, c=1.0), some)
    assert gain == pytest.approx(same) == pytest.approx(math.log(1.2) / 2)
    assert score(results(a=0.5, b=0.9, c=0.0), some) > score(results(a=0.5, b=1.0, c=0.0), some)


def test_score_of_nothing_is_the_worst() -> None:
    some = [judged("a", True)]
    assert score(results(a=math.nan), some) == -math.inf
    assert -math.inf < score(results(a=0.0), some) < score(results(a=1e-5), some)
