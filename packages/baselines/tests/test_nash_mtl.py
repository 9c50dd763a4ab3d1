"""Nash-MTL against its written definition."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from sidetask_baselines.nash_mtl import NashMTL, bargain, nash_mtl
from sidetask_baselines.simplex import SolverFailure
from sidetask_core import Batch, Method, SplitModel, Step, Task
from sidetask_core.testing import conformance, squared, tiny_tasks

pytestmark = pytest.mark.thorough

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


def known(g, weights):
    """To how much the rounding of cosines determines the solution: the more, the more gradients cancel in it."""
    return 1e-9 + 1e-14 * (weights * np.linalg.norm(g, axis=1)).max() ** 2


def test_scaling_a_loss_changes_nothing_but_its_weight(matrices, weigh):
    for g in matrices[:3]:
        scales = np.geomspace(1e-3, 1e3, len(g))
        weights, rescaled = weigh(g), weigh(scales[:, None] * g) * scales
        if np.linalg.norm(weights @ g) > 1e-3:
            np.testing.assert_allclose(rescaled, weights, rtol=known(g, weights))
        else:
            np.testing.assert_allclose(rescaled @ g, 0, atol=1e-6)


def test_the_weights_permute_with_the_tasks(matrices, weigh):
    for g in matrices[:3]:
        order = np.random.default_rng(0).permutation(len(g))
        weights, permuted = weigh(g), weigh(g[order])
        if np.linalg.norm(weights @ g) > 1e-3:
            np.testing.assert_allclose(permuted, weights[order], rtol=known(g, weights))
        else:
            np.testing.assert_allclose(permuted @ g[order], 0, atol=1e-6)


@pytest.mark.parametrize(("precision", "least", "miss"), [(np.float64, 5e-5, 1e-6), (np.float32, 1e-2, 1e-2)])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_nearly_opposing_gradients_are_solved_for_until_rounding_hides_what_is_left(
    sample, weigh, count, precision, least, miss
):
    g = sample("random", count, 0, 2000)
    noise = g[1].copy()
    solved = []
    for left in np.geomspace(1, 1e-9, 46):
        g[1] = left * noise - 2 * g[0]
        given = g.astype(precision)
        weights = weigh(given).astype(float)
        combined = weights @ given.astype(float)
        shares = weights * np.linalg.norm(g, axis=1)
        short = np.linalg.norm(combined) / shares.sum()
        solved.append(shares.sum() > count * (1 + 1e-6))
        if solved[-1]:
            np.testing.assert_allclose(weights * (given @ combined), 1, atol=miss)
            assert short > 0.5 * least
        else:
            assert shares.sum() == pytest.approx(count, rel=1e-6)
            assert short < least
    # Solved down to some length of what is left, and not below.
    assert solved == sorted(solved, reverse=True)
    assert 0 < sum(solved) < len(solved)


def mirrored(dtype, wrong, count=64):
    """A network of three tasks, of which the second is the first with another loss, but for what is `wrong`."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 1)
    heads = {"a": head, "b": copy.deepcopy(head), "c": torch.nn.Linear(16, 1)}
    below = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))
    x, y, noise = (torch.randn(count, size).to(dtype) for size in (8, 1, 1))
    return SplitModel(below, heads).to(dtype), Batch(x, {"a": y, "b": y + wrong * noise, "c": y})


@pytest.mark.parametrize("at", ["features", "parameters"])
@pytest.mark.parametrize("factor", [-1.0, -3.0, -7e3, 3.0, 7e3])
def test_rounding_of_a_network_in_single_precision_does_not_steer(at, factor):
    def multiple(p, y):
        return factor * (p - y).square()

    def step_of(dtype, wrong):
        model, batch = mirrored(dtype, wrong)
        losses = {"a": squared, "b": multiple, "c": squared}
        tasks = [Task(name, loss) for name, loss in losses.items()]
        step = Step(model, tasks, nash_mtl(tasks, at=at))
        report = step.backward(batch)
        step_taken = torch.cat([p.grad.flatten() for p in model.shared_parameters()]).double()
        return step_taken, torch.stack(list(report.encoder_weights.values())).double()

    for wrong in (0.0, 1e-5):
        (single, weights), (double, exact) = step_of(torch.float32, wrong), step_of(torch.float64, wrong)
        if factor > 0:
            torch.testing.assert_close(weights, exact, rtol=1e-2, atol=0)
            assert (single - double).norm() <= 1e-2 * double.norm()
        else:
            # Bargains are √3 long.
            assert single.norm() <= 3e-2
            torch.testing.assert_close(weights[0], -factor * weights[1], rtol=1e-2, atol=0)


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


def test_a_task_that_had_no_labels_at_the_last_solution_calls_for_a_new_one(sample, given):
    rule = NashMTL(TASKS, every=4)
    g = torch.tensor(sample("random", 3, 0))
    away = (True, False, True)

    def weights(seen, iteration, labelled=(True, True, True), rule=rule):
        return rule(given(gradients=seen, iteration=iteration, labelled=labelled)).tolist()

    whole = weights(g, 0)
    # Gone for a while, and back, at the weights of one solution.
    assert weights(2 * g, 1, away) == [whole[0], 0, whole[2]]
    assert weights(2 * g, 2) == whole
    without = weights(3 * g, 4, away)
    assert without == weights(3 * g, 0, away, NashMTL(TASKS))
    assert weights(4 * g, 5, away) == without
    back = weights(5 * g, 6)
    assert back == weights(5 * g, 0, rule=NashMTL(TASKS))
    assert weights(6 * g, 7) == back
    assert weights(7 * g, 8) != back


def test_a_solution_without_any_labels_is_none(sample, given):
    rule = NashMTL(TASKS, every=4)
    g = torch.tensor(sample("random", 3, 0))
    assert rule(given(gradients=g, labelled=(False,) * 3)).tolist() == [0, 0, 0]
    assert torch.equal(rule(given(gradients=g, iteration=1)), NashMTL(TASKS)(given(gradients=g)))


def test_an_equation_that_is_not_met_is_refused():
    # No gradients have these cosines: those that have the nearest ones are bargained for, but the given ones decide.
    with pytest.raises(SolverFailure, match=r"bargaining equation is not met .condition number of the 3x3 Gramian: "):
        bargain(np.array([[1.0, 0.9, 0.5], [0.9, 1.0, 0.9], [0.5, 0.9, 1.0]]))


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
