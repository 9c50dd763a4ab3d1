"""Aligned-MTL against its written definition."""

import numpy as np
import pytest
import torch
from sidetask_baselines.aligned_mtl import AlignedMTL, align, aligned_mtl
from sidetask_baselines.simplex import SolverFailure
from sidetask_core.testing import conformance, tiny_tasks

pytestmark = pytest.mark.thorough

TestAlignedMTL = conformance(aligned_mtl)
TestAlignedMTLAtFeatures = conformance(aligned_mtl, at="features")
TestAlignedMTLToTheMedian = conformance(aligned_mtl, singular_value="median", scale="paper")


@pytest.fixture
def weigh(given):
    """``weigh(gradients, **options)``: the rule's weights for a matrix of task gradients."""

    def weights(gradients, **options):
        gradients = torch.as_tensor(gradients)
        signals = given((1.0,) * len(gradients), gradients)
        return AlignedMTL(tiny_tasks(signals.tasks), **options)(signals).numpy()

    return weights


@pytest.mark.parametrize("singular_value", ["min", "median", "rmse"])
def test_it_is_the_decomposition_of_the_gradients_themselves(matrices, weigh, singular_value):
    for g in matrices:
        left, values, right = np.linalg.svd(g.T, full_matrices=False)
        rank = (values > 1e-10 * values[0]).sum()
        left, values, right = left[:, :rank], values[:rank], right[:rank]
        # torch.median, which the official code calls, takes the lower one of two.
        median = torch.tensor(values).median().item()
        common = {"min": values[-1], "median": median, "rmse": np.sqrt((values**2).mean())}[singular_value]
        expected = common * left @ right.sum(axis=1)
        # Rounding of the cosines, beside the smallest of their eigenvalues that are not zero.
        some = g[g.any(axis=1)]
        units = np.linalg.svd(some / np.linalg.norm(some, axis=1, keepdims=True), compute_uv=False)
        known = (1e-9 + 20 * np.finfo(float).eps / units[units > 1e-7].min() ** 2) * common
        found = weigh(g, singular_value=singular_value) @ g
        np.testing.assert_allclose(found, expected, rtol=0, atol=known)
        paper = weigh(g, singular_value=singular_value, scale="paper") @ g
        np.testing.assert_allclose(paper, expected / len(some), rtol=0, atol=known)


def test_independent_gradients_become_orthogonal_and_of_one_length(sample):
    for kind, count in (("random", 9), ("aligned", 20), ("norm ratios of 1e4", 20)):
        g = sample(kind, count, 0)
        lengths = np.linalg.norm(g, axis=1)
        aligned = align(g @ g.T / np.outer(lengths, lengths), lengths).T @ g
        smallest = np.linalg.svd(g, compute_uv=False)[-1]
        np.testing.assert_allclose(aligned @ aligned.T, smallest**2 * np.eye(count), rtol=0, atol=1e-9 * smallest**2)


def test_orthogonal_gradients_of_one_length_are_left_alone(weigh):
    np.testing.assert_allclose(weigh(7 * np.eye(4)), 1, rtol=1e-12)


def test_two_tasks_by_hand(weigh):
    # Gramian [[2, 1], [1, 2]]: singular values √3 along (1, 1) and 1 along (1, −1).
    g = np.array([[np.sqrt(2), 0.0], [1 / np.sqrt(2), np.sqrt(3 / 2)]])
    np.testing.assert_allclose(weigh(g), 1 / np.sqrt(3), rtol=1e-12)


def test_duplicates_share_and_opposing_gradients_cancel(weigh):
    np.testing.assert_allclose(weigh([[1.0, 2.0], [1.0, 2.0]]), 1, rtol=1e-12)
    np.testing.assert_allclose(weigh([[1.0, 2.0], [-1.0, -2.0]]), 0, atol=1e-12)


def test_the_weights_permute_with_the_tasks_and_keep_their_size(matrices, weigh):
    for g in matrices[:4]:
        order = np.random.default_rng(0).permutation(len(g))
        weights = weigh(g)
        tolerance = {"rtol": 0, "atol": 1e-9 * np.abs(weights).max() + 1e-14}
        np.testing.assert_allclose(weigh(g[order]), weights[order], **tolerance)
        np.testing.assert_allclose(weigh(1e-3 * g), weights, **tolerance)


def test_repeated_singular_values_permute_with_the_tasks(weigh):
    g = np.diag([2.0, 2.0, 2.0, 5.0])
    np.testing.assert_allclose(weigh(g), [1, 1, 1, 0.4], rtol=1e-12)
    np.testing.assert_allclose(weigh(g[[3, 1, 0, 2]]), [0.4, 1, 1, 1], rtol=1e-12)


def test_rounding_in_single_precision_does_not_make_a_singular_value(sample, weigh):
    for seed in range(6):
        g = sample("random", 4, seed)
        g[3] = 3.3 * g[0]
        np.testing.assert_allclose(weigh(g.astype(np.float32)), weigh(g), rtol=1e-5)


def test_a_gradient_far_shorter_than_the_others_counts_as_zero(sample, weigh):
    g = sample("random", 3, 0)
    g[1] *= 1e-11
    assert weigh(g)[[0, 2]] == pytest.approx(weigh(g[[0, 2]]), rel=1e-6)


def test_unequal_singular_values_are_refused(monkeypatch):
    decompose = np.linalg.svd
    monkeypatch.setattr(
        np.linalg, "svd", lambda *a, **k: [x + 0.1 * (i == 1) for i, x in enumerate(decompose(*a, **k))]
    )
    with pytest.raises(SolverFailure, match=r"unequal singular values .condition number of the 2x2 Gramian: 3"):
        align(np.array([[1.0, 0.5], [0.5, 1.0]]), np.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "heads"}, "at must be 'features' or 'parameters', not 'heads'"),
        ({"singular_value": "max"}, "singular_value must be 'min', 'median' or 'rmse', not 'max'"),
        ({"scale": "mean"}, "scale must be 'sum' or 'paper', not 'mean'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AlignedMTL(tiny_tasks(), **options)
