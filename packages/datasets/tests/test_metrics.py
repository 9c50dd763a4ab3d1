import copy
import math

import pytest
import torch
import torchmetrics.classification
from sidetask_datasets import metrics
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, mean_absolute_error

GENERATOR = torch.Generator().manual_seed(0)
COUNT = 37


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def integers(low, high, *shape):
    return torch.randint(low, high, shape, generator=GENERATOR)


def directions():
    vectors = random(COUNT, 3, 3, 4)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    vectors[integers(0, 4, COUNT) == 0] = 0
    return vectors


CASES = {
    "mIoU": (metrics.MeanIoU(6), random(COUNT, 6, 3, 4), integers(-1, 6, COUNT, 3, 4)),
    "accuracy": (metrics.accuracy(6), random(COUNT, 6, 3, 4), integers(-1, 6, COUNT, 3, 4)),
    "class accuracy": (metrics.accuracy(6), random(COUNT, 6), integers(-1, 6, COUNT)),
    "absolute": (metrics.DepthError("absolute"), random(COUNT, 1, 3, 4), random(COUNT, 1, 3, 4).clamp(min=0) * 5),
    "relative": (metrics.DepthError("relative"), random(COUNT, 1, 3, 4), random(COUNT, 1, 3, 4).clamp(min=0) * 5),
    "rmse": (metrics.DepthError("rmse"), random(COUNT, 1, 3, 4), random(COUNT, 1, 3, 4).clamp(min=0) * 5),
    "mean angle": (metrics.MeanAngle(), random(COUNT, 3, 3, 4), directions()),
    "median angle": (metrics.MedianAngle(), random(COUNT, 3, 3, 4), directions()),
    "within": (metrics.WithinAngle(60.0), random(COUNT, 3, 3, 4), directions()),
    "F1": (metrics.f1(6), random(COUNT, 6), integers(-1, 6, COUNT)),
    "IoU": (metrics.BestIoU(), random(COUNT, 1, 3, 4), integers(-1, 2, COUNT, 1, 3, 4)),
    "odsF": (metrics.EdgeF(), random(COUNT, 1, 3, 4), integers(-1, 2, COUNT, 1, 3, 4)),
    "noise": (metrics.AbsoluteError(), random(COUNT, 1, 3, 4), random(COUNT, 1, 3, 4)),
}
EVERYTHING_LABELLED = {"noise"}


@pytest.fixture(params=CASES)
def case(request):
    metric, prediction, target = CASES[request.param]
    metric.reset()
    return metric, prediction, target


def value(metric, prediction, target, size=COUNT):
    metric.reset()
    for p, t in zip(prediction.split(size), target.split(size), strict=True):
        metric.update(p, t)
    return metric.compute().double().item()


@pytest.mark.parametrize("size", [1, 5, 36])
def test_batch_size_and_order_change_nothing(case, size):
    metric, prediction, target = case
    whole = value(metric, prediction, target)
    assert 0 < whole < 180
    order = torch.randperm(COUNT, generator=GENERATOR)
    assert value(metric, prediction, target, size) == pytest.approx(whole, rel=1e-12)
    assert value(metric, prediction[order], target[order], size) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name not in EVERYTHING_LABELLED])
def test_unlabelled_elements_change_nothing(name):
    metric, prediction, target = CASES[name]
    whole = value(metric, prediction, target)
    nothing = torch.zeros_like(target) if target.is_floating_point() else torch.full_like(target, -1)
    more = torch.cat([prediction, 100 * random(*prediction.shape)])
    assert value(metric, more, torch.cat([target, nothing]), 2 * COUNT) == pytest.approx(whole, rel=1e-12)


def test_processes_add_up(case):
    """What torchmetrics does over processes: each state gathered, then reduced as the state says."""
    metric, prediction, target = case
    whole = value(metric, prediction, target)
    shares = []
    for p, t in zip(prediction.split(20), target.split(20), strict=True):
        share = copy.deepcopy(metric)
        share.reset()
        share.update(p, t)
        shares.append(share)
    metric.reset()
    for name, reduce in metric._reductions.items():
        gathered = torch.stack([getattr(share, name) for share in shares])
        setattr(metric, name, reduce(gathered))
    metric._update_count = 1
    assert metric.compute().double().item() == pytest.approx(whole, rel=1e-12)


def test_half_precision_predictions_are_taken(case):
    metric, prediction, target = case
    rounded = prediction.bfloat16()
    assert value(metric, rounded, target) == pytest.approx(value(metric, rounded.float(), target), rel=1e-6)


def test_metrics_say_which_way_is_better(case):
    metric, _, _ = case
    assert metric.higher_is_better is (
        not isinstance(metric, metrics.AbsoluteError | metrics.DepthError | metrics.MeanAngle | metrics.MedianAngle)
    )
    assert metric.full_state_update is False


@pytest.mark.parametrize(
    "name", [name for name in CASES if "accuracy" not in name and name != "F1" and name not in EVERYTHING_LABELLED]
)
def test_nothing_labelled_is_not_a_number(name):
    metric, prediction, target = CASES[name]
    nothing = torch.zeros_like(target) if target.is_floating_point() else torch.full_like(target, -1)
    assert math.isnan(value(metric, prediction, nothing))


def test_mean_iou_leaves_out_classes_that_are_nowhere():
    metric = metrics.MeanIoU(4)
    prediction = torch.nn.functional.one_hot(torch.tensor([[0, 0, 1, 1]]), 4).movedim(-1, 1).float()
    metric.update(prediction, torch.tensor([[0, 1, 1, -1]]))
    # Class 0: 1 of 2; class 1: 1 of 2; classes 2 and 3 are in neither.
    assert metric.compute() == 0.5
    metric.update(prediction[..., :1], torch.tensor([[2]]))
    # Class 0: 1 of 3; class 1: 1 of 2; class 2 is in truth only: 0 of 1.
    assert metric.compute().item() == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)


def test_segmentation_metrics_agree_with_sklearn_and_torchmetrics():
    _, prediction, target = CASES["mIoU"]
    known = target >= 0
    guess, truth = prediction.argmax(1)[known], target[known]
    found = value(metrics.MeanIoU(6), prediction, target)
    assert found == pytest.approx(jaccard_score(truth, guess, average="macro"))
    theirs = torchmetrics.classification.MulticlassJaccardIndex(6, ignore_index=-1)
    assert found == pytest.approx(theirs(prediction, target).item())
    assert value(metrics.accuracy(6), prediction, target) == pytest.approx(accuracy_score(truth, guess))


def test_absolute_errors_agree_with_sklearn():
    metric, prediction, target = CASES["noise"]
    expected = mean_absolute_error(target.double().flatten(), prediction.double().flatten())
    assert value(metric, prediction, target) == pytest.approx(expected, rel=1e-12)


def test_depth_errors_agree_with_sklearn():
    _, prediction, target = CASES["absolute"]
    guess, truth = prediction[target > 0], target[target > 0]
    assert value(metrics.DepthError("absolute"), prediction, target) == pytest.approx(mean_absolute_error(truth, guess))
    relative = ((guess - truth).abs() / truth).double().mean().item()
    assert value(metrics.DepthError("relative"), prediction, target) == pytest.approx(relative, rel=1e-5)
    root = (guess - truth).double().square().mean().sqrt().item()
    assert value(metrics.DepthError("rmse"), prediction, target) == pytest.approx(root)
    with pytest.raises(ValueError, match="one of absolute, relative, rmse, not 'squared'"):
        metrics.DepthError("squared")


def test_a_hundred_million_pixels_are_summed_exactly():
    metric = metrics.DepthError("absolute")
    metric.update(torch.tensor([1.0]), torch.tensor([2.0]))
    metric.total += 1e8
    metric.count += 10**8
    metric.update(torch.tensor([1.0]), torch.tensor([2.0]))
    assert metric.total == 1e8 + 2
    assert metric.compute() == 1


def turned(degrees):
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.sin(), torch.zeros_like(angle), -angle.cos()]).T.reshape(-1, 3, 1, 1)


def test_angles_by_hand():
    degrees = [0.0, 1e-4, 10.0, 11.3, 25.0, 90.0, 180.0]
    truth = turned([0.0] * 7)
    for scale in (1e-3, 1.0, 1e3):
        assert value(metrics.MeanAngle(), scale * turned(degrees), truth) == pytest.approx(sum(degrees) / 7, rel=1e-9)
    assert value(metrics.MedianAngle(), turned(degrees), truth) == pytest.approx(11.3, abs=1e-3)
    assert [value(metrics.WithinAngle(a), turned(degrees), truth) for a in (11.25, 22.5, 30.0)] == pytest.approx(
        [3 / 7, 4 / 7, 5 / 7]
    )
    small, _ = metrics.angles(turned([1e-4]), turned([0.0]))
    assert small.item() == pytest.approx(1e-4, rel=1e-6)


def test_the_median_angle_is_the_median():
    _, prediction, target = CASES["median angle"]
    degrees, mask = metrics.angles(prediction, target)
    found = value(metrics.MedianAngle(), prediction, target)
    assert found == pytest.approx(degrees[mask].median().item(), abs=1e-3)


def test_edge_f_is_the_best_over_thresholds():
    _, prediction, target = CASES["odsF"]
    known = target >= 0
    score, truth = prediction.double().sigmoid()[known], target[known]
    best = max(f1_score(truth, score >= k / 100, zero_division=0.0) for k in range(100))
    assert value(metrics.EdgeF(), prediction, target) == pytest.approx(best)
    perfect = torch.where(target > 0, 9.0, -9.0)
    assert value(metrics.EdgeF(), perfect, target) == 1


def test_f1_agrees_with_sklearn():
    _, prediction, target = CASES["F1"]
    known = target >= 0
    expected = f1_score(target[known], prediction.argmax(1)[known], average="macro")
    assert value(metrics.f1(6), prediction, target) == pytest.approx(expected, rel=1e-6)


def test_the_saliency_measure_is_the_best_over_thresholds_of_the_mean_over_images():
    _, prediction, target = CASES["IoU"]
    target = target.clone()
    target[0] = -1
    target[1] = 0
    means = []
    for k in range(100):
        shares = []
        for score, truth in zip(prediction.double().sigmoid(), target, strict=True):
            found, known = (score >= k / 100)[truth >= 0], truth[truth >= 0] == 1
            if len(known):
                either = (known | found).sum().item()
                shares.append((known & found).sum().item() / either if either else 1.0)
        means.append(sum(shares) / len(shares))
    assert value(metrics.BestIoU(), prediction, target) == pytest.approx(max(means))
    assert value(metrics.BestIoU(), torch.where(target > 0, 9.0, -9.0), target) == 1
