"""IMTL-G against its written definition."""

import itertools

import numpy as np
import pytest
import torch
from sidetask_baselines.imtl_g import IMTLG, equal_projections, imtl_g
from sidetask_baselines.simplex import SolverFailure
from sidetask_core.testing import conformance, tiny_tasks

pytestmark = pytest.mark.thorough

TestIMTLG = conformance(imtl_g)
TestIMTLGAtParameters = conformance(imtl_g, at="parameters")
TestIMTLGOnThePapersScale = conformance(imtl_g, scale="paper")


@pytest.fixture
def weigh(given):
    """``weigh(gradients, **options)``: the rule's weights for a matrix of task gradients."""

    def weights(gradients, **options):
        gradients = torch.as_tensor(gradients)
        signals = given((1.0,) * len(gradients), gradients)
        return IMTLG(tiny_tasks(signals.tasks), **options)(signals).numpy()

    return weights


def test_projections_on_all_directions_are_equal(matrices, weigh):
    for g in matrices:
        weights = weigh(g)
        lengths = np.linalg.norm(g, axis=1)
        some = lengths > 0
        assert (weights[~some] == 0).all()
        assert weights.sum() == pytest.approx(some.sum(), rel=1e-12)
        projections = (g[some] / lengths[some, None]) @ (weights @ g)
        rounding = 1e-14 * (np.abs(weights) * lengths).sum()
        assert np.ptp(projections) <= 1e-6 * abs(projections.mean()) + rounding
        assert projections.mean() >= -rounding


def test_the_combination_is_along_the_direction_with_unit_projections_or_zero_where_there_is_none(matrices, weigh):
    for g in matrices:
        units = g[g.any(axis=1)]
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        direction, *_ = np.linalg.lstsq(units, np.ones(len(units)), rcond=1e-7)
        weights = weigh(g)
        combined = weights @ g
        if np.abs(units @ direction - 1).max() < 1e-7:
            along = combined @ direction / np.linalg.norm(direction)
            assert along == pytest.approx(np.linalg.norm(combined), rel=1e-9)
            assert along > 0
        else:
            # Lengths are known to the root of what inner products are known to.
            assert np.linalg.norm(combined) < 1e-6 * (np.abs(weights) * np.linalg.norm(g, axis=1)).sum()


@pytest.mark.parametrize("count", [2, 3, 9])
def test_it_is_the_papers_closed_form(sample, weigh, count):
    for seed in range(5):
        g = sample("random", count, seed)
        u = g / np.linalg.norm(g, axis=1, keepdims=True)
        # Its weights of tasks 2 to T: g_1 Uᵀ (D Uᵀ)⁻¹ with rows u_1 − u_t of U and g_1 − g_t of D.
        later = g[0] @ (u[0] - u[1:]).T @ np.linalg.inv((g[0] - g[1:]) @ (u[0] - u[1:]).T)
        expected = np.append(1 - later.sum(), later)
        np.testing.assert_allclose(weigh(g, scale="paper"), expected, rtol=1e-8)
        np.testing.assert_allclose(weigh(g), count * expected, rtol=1e-8)


def test_two_tasks_are_weighted_by_their_inverse_lengths(weigh):
    np.testing.assert_allclose(weigh([[3.0, 0.0], [0.3, 0.4]]), [2 / 7, 12 / 7], rtol=1e-12)


def test_duplicates_share_alike(sample, weigh):
    g = sample("random", 4, 0)
    alone = weigh(g[:3])
    g[3] = 5 * g[2]
    weights = weigh(g)
    assert weights[2] == pytest.approx(5 * weights[3], rel=1e-9)
    combined = weights @ g
    np.testing.assert_allclose(combined / np.linalg.norm(combined), alone @ g[:3] / np.linalg.norm(alone @ g[:3]))


@pytest.mark.parametrize(("precision", "close"), [(np.float64, 1e-6), (np.float32, 1e-2)])
@pytest.mark.parametrize("length", [1.0, 1.1, 1e4])
def test_near_duplicates_are_solved_for_whatever_tells_them_apart(sample, weigh, length, precision, close):
    for seed, count in itertools.product(range(10), (3, 9)):
        for left in (*np.geomspace(1e-1, 1e-9, 9), *np.geomspace(5e-8, 5e-7, 5)):
            g = sample("random", count, seed)
            g[1] = length * (g[0] + left * g[1])
            g[2] = 0.4 * g[2] - 0.8 * g[0]
            g = g.astype(precision)
            combined = weigh(g).astype(float) @ g
            projections = g @ combined / np.linalg.norm(g.astype(float), axis=1)
            assert abs(projections.mean()) > 0.1 * np.linalg.norm(combined)
            assert np.ptp(projections) <= 2 * close * abs(projections.mean())


@pytest.mark.parametrize(("precision", "least", "close"), [(np.float64, 5e-4, 1e-6), (np.float32, 6e-2, 1e-2)])
def test_nearly_opposing_gradients_are_solved_for_until_rounding_hides_what_is_left(
    sample, weigh, precision, least, close
):
    for count in (2, 3, 9):
        for left in np.geomspace(1, 1e-9, 37):
            g = sample("random", count, 0, 2000)
            g[1] = 2 * (left * g[1] - g[0])
            g = g.astype(precision)
            lengths = np.linalg.norm(g.astype(float), axis=1)
            weights = weigh(g).astype(float)
            projections = g @ (weights @ g) / lengths
            if np.ptp(projections) > close * projections.mean():
                assert left < least
                assert np.linalg.norm(weights @ g) <= least * np.linalg.norm(weights * lengths)


def test_opposing_gradients_stand_still(weigh):
    g = np.array([[1.0, 0.0], [-3.0, 0.0], [0.0, 2.0]])
    np.testing.assert_allclose(weigh(g), [2.25, 0.75, 0], atol=1e-12)
    # Of two pairs, one is twice as long: (1, 1, 1/2, 1/2) is the shortest x whose weights x_t / |g_t| sum to 2.5.
    pairs = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    np.testing.assert_allclose(weigh(pairs), [1.6, 1.6, 0.4, 0.4], atol=1e-12)


def test_the_weights_permute_with_the_tasks(matrices, weigh):
    for g in matrices[:4]:
        order = np.random.default_rng(0).permutation(len(g))
        weights = weigh(g)
        np.testing.assert_allclose(weigh(g[order]), weights[order], rtol=1e-6, atol=1e-6 * np.abs(weights).max())


def test_scaling_a_loss_leaves_the_direction_of_the_step(sample, weigh):
    g = sample("random", 3, 0)
    scaled = g * np.array([[1.0], [1e3], [1.0]])
    first, second = weigh(g) @ g, weigh(scaled) @ scaled
    np.testing.assert_allclose(first / np.linalg.norm(first), second / np.linalg.norm(second), rtol=1e-9)


def between(shortest):
    """Three nearly coplanar gradients, the last of length `shortest` between the others."""
    middle = np.array([1.0, 1.0, 0.1])
    return np.stack([np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0]), shortest * middle / np.linalg.norm(middle)])


def test_a_negative_common_projection_is_turned_round_if_asked_for(weigh):
    g = between(0.1)
    paper, descending = weigh(g), weigh(g, descend=True)
    assert paper.sum() == pytest.approx(3)
    assert (g @ (paper @ g) < 0).all()
    np.testing.assert_array_equal(descending, -paper)
    agreeing = between(3.0)
    np.testing.assert_array_equal(weigh(agreeing, descend=True), weigh(agreeing))


def test_weights_that_sum_to_zero_are_refused(weigh):
    units = between(1.0)
    x = np.linalg.solve(units @ units.T, np.ones(3))
    with pytest.raises(SolverFailure, match=r"sum to zero.*condition number of the 3x3 Gramian: [0-9]"):
        weigh(between(-x[2] / (x[0] + x[1])))


def test_rounding_in_single_precision_does_not_tell_duplicates_apart(sample, weigh):
    for seed in range(6):
        g = sample("random", 4, seed)
        g[3] = 3.3 * g[0]
        np.testing.assert_allclose(weigh(g.astype(np.float32)), weigh(g), rtol=1e-5)


def test_unequal_projections_are_refused():
    with pytest.raises(SolverFailure, match=r"projections differ .*condition number"):
        equal_projections(np.array([[1.0, 0.9], [0.1, 1.0]]), np.ones(2))


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="at must be 'features' or 'parameters', not 'heads'"):
        IMTLG(tiny_tasks(), at="heads")
    with pytest.raises(ValueError, match="scale must be 'sum' or 'paper', not 'mean'"):
        IMTLG(tiny_tasks(), scale="mean")
