"""Nash-MTL against its written definition."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from sidetask_baselines import nash_mtl as module
from sidetask_baselines.nash_mtl import NashMTL, bargain, nash_mtl
from sidetask_baselines.simplex import SolverFailure
from sidetask_core import Method
from sidetask_core.testing import conformance, tiny_tasks

TASKS = tiny_tasks()


def official(tasks):
    return Method(encoder=NashMTL(tasks, scale="frobenius", max_norm=1.0))


TestNashMTL = conformance(nash_mtl)
TestNashMTLAtFeatures = conformance(nash_mtl, at="features")
TestNashMTLOnTheSumsScale = conformance(nash_mtl, scale="sum")
TestNashMTLNowAndThen = conformance(nash_mtl, every=3)
TestNashMTLAsInTheOfficialCode = conformance(official)


@pytest.fixture
def weigh(given):
    """``weigh(gradients, **options)``: the rule's weights for a matrix of task gradients."""

    def weights(gradients, **options):
        gradients = torch.as_tensor(gradients)
        signals = given((1.0,) * len(gradients), gradients)
        return NashMTL(tiny_tasks(signals.tasks), **options)(signals).numpy()

    return weights


def unit(g):
    g = g[g.any(axis=1)]
    return g / np.linalg.norm(g, axis=1, keepdims=True)


def agreement(u):
    """The most that a direction, of elements at most 1, can give to the worst-off of all tasks, by a linear program."""
    count, size = u.shape
    found = linprog(
        np.append(np.zeros(size), -1),
        A_ub=np.hstack([-u, np.ones((count, 1))]),
        b_ub=np.zeros(count),
        bounds=[(-1, 1)] * size + [(None, None)],
    )
    assert found.success
    return -found.fun


def test_the_bargaining_equation_holds_wherever_the_tasks_can_agree(matrices, weigh):
    for g in matrices:
        weights = weigh(g)
        lengths = np.linalg.norm(g, axis=1)
        some = lengths > 0
        assert (weights[~some] == 0).all()
        combined = weights @ g
        if agreement(unit(g)) > 1e-3:
            np.testing.assert_allclose(weights[some] * (g @ combined)[some], 1, atol=1e-9)
            assert (weights[some] > 0).all()
            assert np.linalg.norm(combined) == pytest.approx(np.sqrt(some.sum()), rel=1e-9)
        else:
            assert np.linalg.norm(combined) < 1e-6
            assert (weights * lengths).sum() == pytest.approx(some.sum())
            assert (weights >= 0).all()


def test_two_tasks_have_a_closed_form(weigh):
    cosine = 0.5
    g = np.array([[4.0, 0.0], [0.1 * cosine, 0.1 * np.sqrt(1 - cosine**2)]])
    np.testing.assert_allclose(weigh(g), np.array([0.25, 10]) / np.sqrt(1.5), rtol=1e-12)


def test_the_product_of_gains_is_greatest(sample, weigh):
    g = sample("aligned", 5, 0, size=8)
    best = weigh(g) @ g
    rng = np.random.default_rng(0)
    for size in (1e-3, 0.1, 1.0):
        others = best + size * rng.normal(size=(300, 8))
        others *= np.linalg.norm(best) / np.linalg.norm(others, axis=1, keepdims=True)
        gains = others @ g.T
        assert (np.log(gains[(gains > 0).all(axis=1)]).sum(axis=1) < np.log(g @ best).sum()).all()


def test_scaling_a_loss_changes_nothing_but_its_weight(matrices, weigh):
    for g in matrices[:3]:
        scales = np.geomspace(1e-3, 1e3, len(g))
        weights, rescaled = weigh(g), weigh(scales[:, None] * g) * scales
        if np.linalg.norm(weights @ g) > 1e-3:
            np.testing.assert_allclose(rescaled, weights, rtol=1e-9)
        else:
            np.testing.assert_allclose(rescaled @ g, 0, atol=1e-6)


def test_the_weights_permute_with_the_tasks(matrices, weigh):
    for g in matrices[:3]:
        order = np.random.default_rng(0).permutation(len(g))
        weights, permuted = weigh(g), weigh(g[order])
        if np.linalg.norm(weights @ g) > 1e-3:
            np.testing.assert_allclose(permuted, weights[order], rtol=1e-9)
        else:
            np.testing.assert_allclose(permuted @ g[order], 0, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_nearly_opposing_gradients_are_solved_for_until_rounding_hides_what_is_left(sample, weigh, count):
    g = sample("random", count, 0)
    solved = []
    for left in np.geomspace(1e-2, 1e-9, 29):
        g[1] = -2 * g[0] + left * sample("random", 2, 1)[0]
        weights = weigh(g)
        combined = weights @ g
        solved.append(np.linalg.norm(combined) > 1)
        if solved[-1]:
            np.testing.assert_allclose(weights * (g @ combined), 1, atol=1e-6)
        else:
            assert np.linalg.norm(combined) < 2e-4 * count
        # The same in single precision has another Gramian, but a solution too.
        single = weigh(g.astype(np.float32))
        assert (single > 0).all() or np.linalg.norm(single @ g) < 1e-2 * count
    # Solved above, and only above, what the docstring names.
    assert solved[:8] == [True] * 8
    assert solved[16:] == [False] * 13


def test_scales(sample, weigh):
    g = sample("norm ratios of 1e4", 3, 0)
    paper, total, frobenius = (weigh(g, scale=scale) for scale in ("paper", "sum", "frobenius"))
    gramian = g @ g.T
    np.testing.assert_allclose(gramian @ paper * paper, 1, rtol=1e-9)
    np.testing.assert_allclose(total, 3 * paper / paper.sum())
    np.testing.assert_allclose(gramian / np.linalg.norm(gramian) @ frobenius * frobenius, 1, rtol=1e-9)


@pytest.mark.parametrize("scale", ["paper", "sum", "frobenius"])
def test_max_norm_shortens_what_is_longer(sample, weigh, scale):
    g = 5 * sample("random", 3, 0)
    plain = weigh(g, scale=scale)
    length = np.linalg.norm(plain @ g)
    np.testing.assert_array_equal(weigh(g, scale=scale, max_norm=1.1 * length), plain)
    np.testing.assert_allclose(weigh(g, scale=scale, max_norm=0.1 * length), plain / 10)


def test_weights_are_kept_between_solutions(sample, given):
    rule = NashMTL(TASKS, every=3)
    found, read = [], []
    for iteration in range(4, 10):
        signals = given(gradients=torch.tensor(sample("random", 3, iteration)), iteration=iteration)
        gramian = signals.gramian
        signals.gramian = lambda at, asked=iteration, compute=gramian: (read.append(asked), compute(at))[1]
        found.append(rule(signals).tolist())
    # A rule that has no weights yet does not wait for its turn.
    assert read == [4, 6, 9]
    assert found[0] == found[1] != found[2] == found[3] == found[4] != found[5]


def test_a_task_without_labels_keeps_its_weight_for_later(sample, given):
    rule = NashMTL(TASKS, every=2)
    g = torch.tensor(sample("random", 3, 0))
    whole = rule(given(gradients=g, iteration=0))
    away = rule(given(gradients=g, iteration=1, labelled=(True, False, True)))
    assert away.tolist() == [whole[0], 0, whole[2]]
    without = rule(given(gradients=g, iteration=2, labelled=(True, False, True)))
    assert without[1] == 0
    back = rule(given(gradients=g, iteration=3))
    assert back.tolist() == [without[0], whole[1], without[2]]


def test_an_equation_that_is_not_met_is_refused(monkeypatch):
    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    with pytest.raises(
        SolverFailure, match=r"bargaining equation is not met .condition number of the 3x3 Gramian: 1.3"
    ):
        bargain(np.eye(3) + 0.1 * (1 - np.eye(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "heads"}, "at must be 'features' or 'parameters', not 'heads'"),
        ({"scale": "mean"}, "scale must be 'paper', 'sum' or 'frobenius', not 'mean'"),
        ({"max_norm": 0.0}, "max_norm must be positive, not 0.0"),
        ({"every": 0}, "every must be a positive number of steps, not 0"),
        ({"every": 1.5}, "every must be a positive number of steps, not 1.5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NashMTL(TASKS, **options)
