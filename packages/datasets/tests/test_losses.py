import pytest
import torch
from sidetask_core import Task
from sidetask_datasets import losses, tasks

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64).float()


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


CASES = {
    "segmentation": (
        tasks.segmentation("t", 5),
        random(2, 5, 4, 6),
        torch.randint(-1, 5, (2, 4, 6), generator=GENERATOR),
        (2, 4, 6),
    ),
    "classification": (tasks.classification("t", 5), random(8, 5), torch.tensor([0, 1, -1, 3, 4, 4, -1, 2]), (8,)),
    "depth": (tasks.depth(), random(2, 1, 4, 6), random(2, 1, 4, 6).clamp(min=0), (2, 1, 4, 6)),
    "cosine": (tasks.normals(), random(2, 3, 4, 6), unit(random(2, 3, 4, 6)), (2, 1, 4, 6)),
    "l1": (tasks.normals(loss="l1"), random(2, 3, 4, 6), unit(random(2, 3, 4, 6)), (2, 1, 4, 6)),
    "elements": (tasks.normals(loss="elements"), random(2, 3, 4, 6), unit(random(2, 3, 4, 6)), (2, 3, 4, 6)),
    "disparity": (tasks.disparity(), random(2, 1, 4, 6), random(2, 1, 4, 6).clamp(min=0), (2, 1, 4, 6)),
    "saliency": (
        tasks.saliency(),
        random(2, 1, 4, 6),
        torch.randint(-1, 2, (2, 1, 4, 6), generator=GENERATOR),
        (2, 1, 4, 6),
    ),
    "edges": (
        tasks.edges(),
        random(2, 1, 4, 6),
        torch.randint(-1, 2, (2, 1, 4, 6), generator=GENERATOR),
        (2, 1, 4, 6),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_losses_come_per_element_and_are_not_negative(case):
    task, prediction, target, shape = case
    ((found, mask),) = task.elements(prediction, target)
    assert found.shape == shape
    assert mask is None or mask.shape == shape
    assert (found > -1e-6).all()


def test_unlabelled_elements_change_neither_loss_nor_gradient(case):
    """Labels hidden one by one: the mean is over the others, and no gradient reaches the hidden ones' predictions."""
    task, prediction, target, _ = case
    hidden = target.clone()
    hidden[0] = 0 if target.is_floating_point() else -1
    prediction = prediction.clone().requires_grad_()
    mean, count = task.mean(prediction, hidden)
    alone, count_alone = task.mean(prediction[1:], target[1:])
    assert count == count_alone
    torch.testing.assert_close(mean, alone)
    mean.backward()
    assert not prediction.grad[0].any()
    assert prediction.grad[1:].any()


def test_no_label_at_all_gives_zero(case):
    task, prediction, target, _ = case
    prediction = prediction.clone().requires_grad_()
    nothing = torch.zeros_like(target) if target.is_floating_point() else torch.full_like(target, -1)
    mean, count = task.mean(prediction, nothing)
    mean.backward()
    assert mean == 0
    assert count == 0
    assert not prediction.grad.any()


def test_half_precision_predictions_are_scored_in_single_precision(case):
    task, prediction, target, _ = case
    rounded = prediction.bfloat16()
    ((found, _),) = task.elements(rounded, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, task.elements(rounded.float(), target)[0][0], rtol=0, atol=0)


def test_values_by_hand():
    logits = torch.tensor([[[2.0], [0.0]]])
    assert losses.cross_entropy(logits, torch.tensor([[1]])).item() == pytest.approx(2.126928)
    assert losses.cross_entropy(logits, torch.tensor([[-7]])).item() == 0
    assert losses.absolute(torch.tensor([[1.0]]), torch.tensor([[3.5]])).item() == 2.5
    up, right = torch.tensor([0.0, -1.0, 0.0]).view(1, 3, 1, 1), torch.tensor([3.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert losses.normals_cosine(right, up).item() == pytest.approx(1)
    assert losses.normals_cosine(7 * up, up).item() == pytest.approx(0, abs=1e-6)
    assert losses.normals_l1(right, up).item() == pytest.approx(2)
    assert losses.normals_elements(right, up).flatten().tolist() == pytest.approx([1, 1, 0])
    ln2 = 0.6931472
    edges = losses.balanced_edges(torch.zeros(1, 1, 1, 2), torch.tensor([[[[1, 0]]]]))
    assert edges.flatten().tolist() == pytest.approx([0.95 * ln2, 0.05 * ln2])


@pytest.mark.parametrize("loss", losses.NORMALS.values())
def test_a_zero_normal_has_a_finite_bounded_gradient(loss):
    prediction = torch.zeros(1, 3, 2, 2, requires_grad=True)
    target = unit(random(1, 3, 2, 2))
    loss(prediction, target).sum().backward()
    assert prediction.grad.isfinite().all()
    assert prediction.grad.abs().max() <= 2e3


def test_losses_pass_a_numerical_check_of_their_gradients():
    target = unit(random(1, 3, 2, 2)).double()
    # Losses compute in single precision; their formula is checked in double.
    prediction = random(1, 3, 2, 2).double().requires_grad_()
    direction = prediction * (prediction.square().sum(1, keepdim=True) + 1e-6).rsqrt()
    (expected,) = torch.autograd.grad((1 - (direction * target).sum(1)).sum(), prediction)
    (found,) = torch.autograd.grad(losses.normals_cosine(prediction, target.float()).sum(), prediction)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [losses.absolute, losses.normals_cosine, losses.balanced_edges])
def test_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises(ValueError, match=r"prediction \[2, 3, 4, 4\] and target \[2, 4, 4\] differ"):
        loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4))


def test_an_unknown_loss_of_normals_is_named():
    with pytest.raises(ValueError, match="unknown loss of normals 'l2'; there are: cosine, l1, elements"):
        tasks.normals(loss="l2")


def test_tasks_are_made_by_their_usual_names():
    made = {
        name: tasks.dense(name, 4)
        for name in ("segmentation", "parts", "depth", "disparity", "normals", "edges", "saliency")
    }
    assert all(isinstance(task, Task) and task.name == name for name, task in made.items())
    assert {name: next(iter(task.metrics)) for name, task in made.items()} == {
        "segmentation": "mIoU",
        "parts": "mIoU",
        "depth": "absolute",
        "normals": "mean",
        "edges": "odsF",
        "disparity": "absolute",
        "saliency": "IoU",
    }
    assert all(metric.higher_is_better in (True, False) for task in made.values() for metric in task.metrics.values())


def test_saliency_weighs_both_sides_of_an_image_alike():
    """Against the definition, image by image; what is in the batch beside an image changes nothing."""
    prediction, target = random(4, 1, 5, 6), torch.randint(-1, 2, (4, 1, 5, 6), generator=GENERATOR)
    target[3] = 0
    found = losses.balanced_saliency(prediction, target)
    for row in range(4):
        known, salient = target[row] >= 0, target[row] == 1
        share = (salient.sum() / known.sum()).item()
        for place in known.nonzero().tolist():
            logit = prediction[row][tuple(place)].double()
            p = logit.sigmoid()
            one = -(1 - share) * p.log() if salient[tuple(place)] else -share * (1 - p).log()
            assert found[row][tuple(place)].item() == pytest.approx(one.item(), rel=1e-4, abs=1e-6)
        alone = losses.balanced_saliency(prediction[row : row + 1], target[row : row + 1])
        assert torch.equal(alone[0], found[row])
    assert not found[3].any()
