"""GCS against the cosines of the gradients themselves."""

import math

import numpy as np
import pytest
import torch
from sidetask_baselines.gcs import GCS, gcs
from sidetask_core import Batch, SplitModel, Task
from sidetask_core.step import Step
from sidetask_core.testing import batches, conformance, problem, tiny_tasks
from torch import nn

pytestmark = pytest.mark.thorough

TestGCS = conformance(gcs)
TestGCSAtFeatures = conformance(gcs, at="features")
TestGCSSoft = conformance(gcs, mode="soft")
TestGCSSoftAtFeatures = conformance(gcs, mode="soft", at="features")


def tasks_of(primary):
    return [Task(name, abs, primary=p) for name, p in zip("abcdefghijklmnopqrstuvwxyz", primary, strict=False)]


def weigh(given, gradients, mode, primary=None, **options):
    """Weights for a matrix of gradients, of which the first is the primary's unless said otherwise."""
    primary = [i == 0 for i in range(len(gradients))] if primary is None else primary
    signals = given((1.0,) * len(gradients), torch.as_tensor(gradients), primary=primary, **options)
    return GCS(tasks_of(primary), mode=mode)(signals)


def expected(gradients, primary, mode):
    """The definition, from unit vectors."""
    gradients = np.asarray(gradients, dtype=np.longdouble)
    main = gradients[np.asarray(primary)].sum(0)
    lengths = np.sqrt((gradients**2).sum(1))
    length = np.sqrt((main**2).sum())
    weights = []
    for p, g, n in zip(primary, gradients, lengths, strict=True):
        cosine = (g / n) @ (main / length) if n > 0 and length > 0 else 0
        weights.append(1.0 if p else float(cosine > 0) if mode == "hard" else max(0.0, float(cosine)))
    return torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize("several", [False, True], ids=["one primary", "several primaries"])
def test_weights_are_those_of_the_definition(given, matrices, kind, several):
    count = kind[1]
    primary = [i == 0 or (several and i in (2, 3)) for i in range(count)]
    for g in matrices:
        for mode in ("hard", "soft"):
            found = weigh(given, g, mode, primary)
            torch.testing.assert_close(found, expected(g, primary, mode), rtol=1e-12, atol=1e-12)


def test_by_hand(given):
    g = torch.tensor([[2.0, 0.0], [3.0, 4.0], [-5.0, 12.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert weigh(given, g, "hard").tolist() == [1, 1, 0, 0, 0]
    torch.testing.assert_close(weigh(given, g, "soft"), torch.tensor([1, 0.6, 0, 0, 0], dtype=torch.float64))


def test_several_primaries_are_one_objective(given, sample):
    """The auxiliary tasks see the sum, even where it disagrees with each of the primaries."""
    g = sample("random", 5, 0)
    primary = [True, False, True, False, False]
    summed = np.stack([g[0] + g[2], g[1], g[3], g[4]])
    for mode in ("hard", "soft"):
        several, one = weigh(given, g, mode, primary), weigh(given, summed, mode)
        torch.testing.assert_close(several[[1, 3, 4]], one[1:], rtol=1e-12, atol=1e-14)
        assert several[[0, 2]].tolist() == [1, 1]


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_the_scale_of_a_loss_changes_nothing(given, sample, mode):
    g = sample("random", 9, 1)
    plain = weigh(given, g, mode)
    assert 0 < (plain > 0).sum() - 1 < 8
    for factors in (np.geomspace(1e-4, 1e4, 9), np.geomspace(1e8, 1e-8, 9)):
        torch.testing.assert_close(weigh(given, g * factors[:, None], mode), plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("scale", [1e-15, 1e-12, 1.0, 1e12])
def test_single_precision_keeps_the_angle_of_tiny_and_unequal_gradients(given, sample, mode, scale):
    g = sample("random", 9, 2)
    stretched = torch.as_tensor(g * scale * np.geomspace(1e-4, 1, 9)[:, None]).float()
    found = weigh(given, stretched, mode)
    torch.testing.assert_close(found, expected(stretched, [True] + [False] * 8, mode), rtol=1e-4, atol=1e-6)


def test_no_weight_exceeds_one(given, sample):
    """Rounding takes the cosine of parallel gradients in single precision to either side of one."""
    for seed in range(20):
        g = torch.as_tensor(sample("duplicate", 9, seed)).float()
        weights = weigh(given, g * torch.tensor([[1.0], [0.3]] + [[1.0]] * 7), "soft")
        assert weights.max() <= 1
        assert weights[1].item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_lengths_whose_sum_is_beyond_single_precision(given, mode):
    g = torch.tensor([[1e19, 0.0], [1e19, 0.0], [0.6e19, 0.8e19], [-1e19, 0.0]])
    weights = weigh(given, g, mode, [True, True, False, False])
    assert weights.tolist() == pytest.approx([1, 1, 1 if mode == "hard" else 0.6, 0])


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_main_gradient_no_auxiliary_task_is_followed(given, sample, mode, dtype):
    g = torch.as_tensor(sample("random", 4, 0)).to(dtype)
    g[0] = 0
    absent = weigh(given, g, mode, labelled=[False, True, True, True])
    assert absent.tolist() == [1, 0, 0, 0]
    g = torch.as_tensor(sample("random", 4, 0)).to(dtype)
    g[1] = -1.7 * g[0]
    g[2] = 0.7 * g[0]
    assert weigh(given, g, mode, [True, True, True, False]).tolist() == [1, 1, 1, 0]


def test_without_auxiliary_tasks_it_is_the_plain_sum(given, sample):
    assert weigh(given, sample("opposing", 3, 0), "soft", [True] * 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_gradients_that_overflow_are_not_followed(given, sample, mode):
    g = torch.as_tensor(sample("aligned", 3, 0)).float()
    g[1] *= 1e25
    weights = weigh(given, g, mode)
    assert weights[1] == 0
    assert weights[2] > 0


def test_a_batch_without_any_label_moves_nothing():
    tasks, model, (batch, *_) = tiny_tasks(), problem(), batches(1)
    absent = {n: torch.full_like(y, math.nan) for n, y in batch.targets.items()}
    Step(model, tasks, gcs(tasks)).backward(Batch(batch.inputs, absent))
    assert all((p.grad == 0).all() for p in model.parameters())


def test_decoders_stay_unweighted_and_primaries_too():
    tasks, model, (batch, *_) = tiny_tasks(), problem(), batches(1)
    report = Step(model, tasks, gcs(tasks, mode="soft")).backward(batch)
    assert [w.item() for w in report.decoder_weights.values()] == [1, 1, 1]
    weights = [w.item() for w in report.encoder_weights.values()]
    assert weights[0] == 1
    assert all(0 <= w < 1 for w in weights[1:])


def test_features_and_parameters_agree_behind_an_orthogonal_encoder():
    tasks, (batch,) = tiny_tasks(), batches(1, size=1)
    shared = nn.Linear(4, 4, bias=False).double()
    nn.init.orthogonal_(shared.weight)
    model = SplitModel(shared, {n: nn.Linear(4, 2).double() for n in "abc"})
    found = []
    for at in ("features", "parameters"):
        report = Step(model, tasks, gcs(tasks, at=at, mode="soft")).backward(batch)
        found.append(torch.stack(list(report.encoder_weights.values())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_nothing_waits_for_the_device(given, sample, mode):
    """On tensors without values, whatever asked the host for one would raise."""
    rule = GCS(tiny_tasks(), mode=mode).to("meta")
    signals = given(gradients=torch.as_tensor(sample("random", 3, 0)))
    for name in ("primary", "labelled", "losses", "_gradients"):
        setattr(signals, name, getattr(signals, name).to("meta"))
    for _ in range(3):
        assert rule(signals).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "medium"}, "mode must be 'hard' or 'soft', not 'medium'"),
        ({"at": "heads"}, "at must be 'features' or 'parameters', not 'heads'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GCS(tiny_tasks(), **options)


def test_a_primary_task_is_needed():
    with pytest.raises(ValueError, match=r"GCS .* needs at least one task with primary=True; .* all of: a, b"):
        GCS(tasks_of([False, False]))
