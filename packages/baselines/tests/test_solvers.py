"""Optimality conditions of the solvers, over gradient matrices of chosen kinds, in float64."""

from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import brentq
from sidetask_baselines import cagrad, simplex
from sidetask_baselines.cagrad import conflict_averse
from sidetask_baselines.pcgrad import project
from sidetask_baselines.simplex import SolverFailure, min_norm_weights, shortest, vectors

pytestmark = pytest.mark.thorough


def test_vectors_reproduce_the_gramian(matrices):
    for g in matrices:
        lengths = np.linalg.norm(g, axis=1)
        lengths[lengths == 0] = 1
        found = vectors(g @ g.T)
        np.testing.assert_allclose(
            found.T @ found / np.outer(lengths, lengths), g @ g.T / np.outer(lengths, lengths), atol=1e-13
        )


def cancelling(count, seed, longest):
    """Gradients of lengths up to `longest` and one that cancels a combination of them, all but a vector beside them."""
    rng = np.random.default_rng([seed, count])
    g = rng.normal(size=(count, count + 3))
    g[:-1] *= np.geomspace(1, longest, count - 1)[:, None] / np.linalg.norm(g[:-1], axis=1, keepdims=True)
    g[-1] = 10 ** rng.uniform(-6, -1) * g[-1] - rng.uniform(0.3, 1, count - 1) @ g[:-1]
    return g


def exactly(gramian, weights):
    """What each inner product with the combination is above its squared length, and that squared length."""
    exact = [Fraction(x) for x in weights]
    inner = [sum(x * Fraction(k) for x, k in zip(exact, row, strict=True)) / sum(exact) for row in gramian]
    squared = sum(x * y for x, y in zip(exact, inner, strict=True)) / sum(exact)
    return np.array([float(y - squared) for y in inner]), float(squared)


def missed(inner, squared, weights):
    """How far each inner product with the shortest combination is on the wrong side of its squared length."""
    return np.maximum(np.abs(inner - squared) * (weights > 0), squared - inner)


def rounding(weights, lengths):
    """What a relative rounding error of the weights makes of the inner product of their combination with each task."""
    return np.finfo(float).eps * (weights * lengths).max() * lengths


def test_the_shortest_combination_meets_its_kkt_conditions(matrices):
    for g in matrices:
        w = shortest(g @ g.T)
        assert (w >= 0).all()
        assert w.sum() == pytest.approx(1, abs=1e-12)
        p, lengths = w @ g, np.linalg.norm(g, axis=1)
        assert (missed(g @ p, p @ p, w) <= 1e-6 * (p @ p) + 8 * rounding(w, lengths)).all()


@pytest.mark.parametrize("kind", ["random", "nearly opposing", "nearly opposing with norm ratios of 1e4"])
@pytest.mark.parametrize("count", [2, 9, 20])
def test_the_given_inner_products_meet_them_as_exactly_as_weights_can_be_written(sample, kind, count):
    for seed in range(5):
        g = sample(kind, count, seed)
        gramian = g @ g.T
        w = shortest(gramian)
        above, _ = exactly(gramian, w)
        assert (missed(above, 0.0, w) <= 2 * rounding(w, np.linalg.norm(g, axis=1))).all()


@pytest.mark.parametrize("longest", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("count", [2, 3, 9, 20])
def test_gradients_that_all_but_cancel_meet_them_on_the_given_inner_products(count, longest):
    for seed in range(10):
        g = cancelling(count, seed, longest)
        gramian, lengths = g @ g.T, np.linalg.norm(g, axis=1)
        w = shortest(gramian)
        above, squared = exactly(gramian, w)
        # The shortest that ten times the rounding of as many cosines does not hide.
        least = 10 * count * np.finfo(float).eps * (w @ lengths) ** 2
        assert (missed(above, 0.0, w) <= 1e-6 * np.sqrt(max(squared, least)) * lengths).all()
        assert (missed(above, 0.0, w) <= 4 * rounding(w, lengths)).all()


@pytest.mark.parametrize("scale", [1e-150, 1e-75, 1e75, 1e150])
def test_no_scale_of_all_gradients_changes_their_shares(scale):
    g = cancelling(5, 0, 1e2)
    power = 2.0 ** np.round(np.log2(scale))
    np.testing.assert_array_equal(shortest(g @ g.T * power * power), shortest(g @ g.T))


@pytest.mark.parametrize("longest", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("count", [2, 3, 9, 20])
def test_inner_products_in_single_precision_find_the_combination_to_a_hundredth(count, longest):
    for seed in range(10):
        g = cancelling(count, seed, longest).astype(np.float32)
        gramian, lengths = (g @ g.T).astype(float), np.linalg.norm(g, axis=1)
        eps = float(np.finfo(np.float32).eps)
        w = shortest(gramian, eps)
        above, squared = exactly(gramian, w)
        least = 10 * count * eps * (w @ lengths) ** 2
        hidden = 10 * count * eps * (w @ lengths) * (w @ lengths + lengths)
        assert (missed(above, 0.0, w) <= 1e-2 * np.sqrt(max(squared, least)) * lengths + hidden).all()


@pytest.mark.parametrize("found", [[1.0, 0.0, 0.0], [0.2, 0.8, 0.0]])
def test_a_combination_that_is_not_the_shortest_is_refused(sample, monkeypatch, found):
    g = sample("random", 3, 0)
    monkeypatch.setattr(simplex, "nnls", lambda points, _: (np.array(found), 0.0))
    for solve in (lambda: shortest(g @ g.T), lambda: min_norm_weights(g.T)):
        with pytest.raises(SolverFailure, match=r"misses its optimality conditions .condition number of the 3x3"):
            solve()


def test_two_tasks_have_a_closed_form(matrices):
    for a, b in (g[:2] for g in matrices):
        w = shortest(np.array([[a @ a, a @ b], [a @ b, b @ b]]))
        distance = (a - b) @ (a - b)
        # Sener and Koltun, Equation 6; equal gradients allow any weights.
        expected = np.clip((b - a) @ b / distance, 0, 1) if distance > 0 else w[0]
        np.testing.assert_allclose(w, [expected, 1 - expected], atol=1e-9)


def test_a_zero_gradient_is_the_shortest_combination(sample):
    g = sample("random", 5, 0)
    g[2] = 0
    np.testing.assert_array_equal(shortest(g @ g.T), [0, 0, 1, 0, 0])


def test_opposing_gradients_cancel():
    g = np.array([[1.0, 0.0], [-3.0, 0.0]])
    np.testing.assert_allclose(shortest(g @ g.T) @ g, 0, atol=1e-12)


def test_the_shortest_combination_is_equivariant(matrices):
    for g in matrices[:3]:
        order = np.random.default_rng(0).permutation(len(g))
        p = shortest(g @ g.T) @ g
        permuted = g[order]
        q = shortest(permuted @ permuted.T) @ permuted
        np.testing.assert_allclose(p, q, atol=1e-7 * np.linalg.norm(g, axis=1).min())
        scaled = shortest(9 * (g @ g.T)) @ (3 * g)
        np.testing.assert_allclose(scaled, 3 * p, atol=1e-7 * np.linalg.norm(g, axis=1).min())


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
def test_cagrad_closes_the_duality_gap_on_the_ball_around_the_mean(matrices, c):
    for g in matrices:
        mean, lengths = g.mean(axis=0), np.linalg.norm(g, axis=1)
        radius, least = c * np.linalg.norm(mean), lengths[lengths > 0].min()
        weights = conflict_averse(g @ g.T, c)
        assert (weights > 0).all()
        step = weights @ g
        # Without a mean there is no direction to stay near, and no ball.
        if np.linalg.norm(mean) <= 1e-12 * lengths.max():
            np.testing.assert_array_equal(weights, 1 / len(g))
            mean, radius = step, 0.0
        tilt = weights - 1 / len(g)
        worst = tilt @ g / tilt.sum() if radius and tilt.sum() > 0 else step
        if not lengths.all() and worst @ mean + radius * np.linalg.norm(worst) > 0:
            # A gradient of zero is a combination, too, and the bound that it gives is zero.
            worst = np.zeros_like(step)
        off = np.linalg.norm(step - mean) - radius
        assert off <= 1e-6 * radius
        # Inside only where the combination that the worst-off tasks pull along vanishes.
        assert off >= -1e-6 * radius or np.linalg.norm(worst) <= 1e-6 * least
        gap = worst @ mean + radius * np.linalg.norm(worst) - (g @ step).min()
        assert gap <= 1e-6 * np.linalg.norm(step) * least + 1e-12 * least**2


@pytest.mark.parametrize("spoiled", ["the search", "the combination"])
def test_cagrad_refuses_what_misses_its_optimum(sample, monkeypatch, spoiled):
    g = sample("random", 3, 0)
    if spoiled == "the search":
        monkeypatch.setattr(cagrad, "brentq", lambda *a, **k: (1.1 * brentq(*a, **k)[0], brentq(*a, **k)[1]))
    else:
        monkeypatch.setattr(cagrad, "min_norm_weights", lambda points: np.array([1.0, 0.0, 0.0]))
    with pytest.raises(SolverFailure, match=r"off the ball, or misses .*condition number of the 3x3 Gramian: [0-9]"):
        conflict_averse(g @ g.T, 0.4)


def test_cagrad_gives_a_gradient_of_zero_the_weight_that_the_mean_gives_it(sample):
    g = sample("random", 3, 0)
    g[1] = 0
    weights = conflict_averse(g @ g.T, 0.4)
    assert weights[1] == 1 / 3
    assert weights.max() < 2
    assert (g @ (weights @ g)).min() >= -1e-9


@pytest.mark.parametrize("ratio", [1e-6, 1e-12, 1e-18])
def test_cagrad_of_a_gradient_that_is_all_but_zero(sample, ratio):
    for seed in range(5):
        g = sample("nearly opposing", 5, seed)
        g[0] *= ratio
        step, mean = conflict_averse(g @ g.T, 0.4) @ g, g.mean(axis=0)
        assert np.linalg.norm(step - mean) <= 0.4 * np.linalg.norm(mean) * (1 + 1e-6)
        rounding = 1e-12 * np.linalg.norm(step) * np.linalg.norm(g, axis=1)
        assert (g @ step + rounding).min() >= (g @ mean).min()


def test_cagrad_of_opposing_gradients_is_their_mean():
    np.testing.assert_array_equal(conflict_averse(np.array([[1.0, -1.0], [-1.0, 1.0]]), 0.4), [0.5, 0.5])


def test_cagrad_without_radius_is_the_mean(matrices):
    for g in matrices[:2]:
        np.testing.assert_allclose(conflict_averse(g @ g.T, 0.0), 1 / len(g))


def test_pcgrad_equals_projecting_the_gradients_themselves(matrices):
    for g in matrices:
        rng = np.random.default_rng(1)
        orders = [rng.permutation(len(g)) for _ in g]
        expected = np.zeros(g.shape[1])
        for i, order in enumerate(orders):
            projected = g[i].copy()
            for j in order:
                if j != i and projected @ g[j] < 0:
                    projected -= projected @ g[j] / (g[j] @ g[j]) * g[j]
            expected += projected
        found = project(g @ g.T, orders) @ g
        np.testing.assert_allclose(found, expected, atol=1e-9 * np.linalg.norm(g, axis=1).max() * len(g))


def test_pcgrad_with_a_zero_gradient(sample):
    g = sample("random", 4, 0)
    g[1] = 0
    assert np.isfinite(project(g @ g.T, [[0, 1, 2, 3]] * 4)).all()
