"""Pareto MTL: its quadratic problems against brute force, its phases, and the fronts that it traces."""

import itertools
import math

import numpy as np
import pytest
import torch
from sidetask_baselines import MGDA, SolverFailure
from sidetask_baselines.pareto_mtl import (
    ParetoMTL,
    constraints,
    pareto_front,
    pareto_mtl,
    preference_vectors,
    restricted,
)
from sidetask_baselines.simplex import min_norm_weights
from sidetask_core import Batch, Equal, MissingKey, Step
from sidetask_core.testing import batches, conformance, problem, tiny_tasks, train

pytestmark = pytest.mark.thorough

AXES = [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"a": 1.0, "b": 2.0, "c": 1.0}]

TestParetoMTL = conformance(pareto_mtl)
TestParetoMTLAtFeatures = conformance(pareto_mtl, at="features")
TestParetoMTLWithoutFirstPhase = conformance(pareto_mtl, preferences=AXES, preference=3, feasibility_steps=0)
TestParetoMTLByName = conformance(pareto_mtl, preferences=AXES, preference=1, feasibility_steps=3, epsilon=0.01)
TestParetoMTLOfAnEvenSpread = conformance(pareto_mtl, equivariant=False, preferences=7, preference=5)
TestParetoMTLOfAllParameters = conformance(pareto_mtl, scale="paper", decoder="same", at="features")

TASKS = tiny_tasks()
PAIR = tiny_tasks(("a", "b"))


def shortest_by_enumeration(columns):
    """The shortest convex combination of the columns [D, J]: the shortest of those that are stationary on a face."""
    best = None
    count = columns.shape[1]
    for size in range(1, count + 1):
        for face in itertools.combinations(range(count), size):
            part = columns[:, face]
            system = np.block([[part.T @ part, -np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            weights = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=None)[0][:size]
            if weights.min() >= -1e-9 and abs(weights.sum() - 1) < 1e-9:
                point = part @ weights
                best = point if best is None or point @ point < best @ best else best
    return best


def cases(matrices, slack=0.0):
    """Task gradients, rows of constraints counted as violated and whether the tasks take part."""
    for i, g in enumerate(matrices):
        count, rng = len(g), np.random.default_rng(i)
        for directions in (preference_vectors(count, count + 1), rng.random((2 * count, count))):
            rows = constraints(directions, int(rng.integers(len(directions))))
            losses = rng.random(count)
            active = rows[rows @ losses / np.linalg.norm(losses) > -slack]
            yield g, active, True
            if len(active):
                yield g, active, False


@pytest.mark.parametrize("slack", [0.0, 0.1])
def test_both_phases_meet_the_kkt_conditions_of_their_problem(matrices, slack):
    checked = 0
    for g, active, tasks in cases(matrices, slack):
        weights = restricted(g @ g.T, active, tasks=tasks)
        vectors = np.vstack([g, active @ g]) if tasks else active @ g
        lengths, step = np.linalg.norm(vectors, axis=1), weights @ g
        length = np.linalg.norm(step)
        # Where it is zero up to the rounding of inner products, the next test tells how long it may be.
        cancelled = np.abs(weights) @ np.linalg.norm(g, axis=1)
        if length > 1e-6 * cancelled and length > 1e-7 * lengths[lengths > 0].min():
            miss = (vectors @ step - length**2) / (length * np.maximum(lengths, length))
            assert miss.min() > -1e-6
            checked += 1
    assert checked


@pytest.mark.parametrize("slack", [0.0, 0.1])
def test_both_phases_find_the_shortest_combination_by_enumeration(matrices, slack):
    for g, active, tasks in cases([g[:3] for g in matrices[:5]], slack):
        vectors = np.vstack([g, active @ g]) if tasks else active @ g
        # In the space of the gradients, at their size, for the sake of the enumeration.
        basis = np.linalg.qr(g.T)[0]
        scale = np.linalg.norm(vectors, axis=1).max() or 1.0
        expected = shortest_by_enumeration((vectors @ basis / scale).T)
        found = restricted(g @ g.T, active, tasks=tasks) @ g @ basis / scale
        np.testing.assert_allclose(found, expected, atol=3e-7)


def violation(losses, directions, chosen):
    """How much nearer the losses are to another direction, in cosines."""
    cosines = directions @ np.asarray(losses) / np.linalg.norm(losses)
    return cosines.max() - cosines[chosen]


def test_weights_are_those_of_differentiated_constraints(given):
    """Losses, constraints and their gradients by autograd, the combination by enumeration."""
    directions = torch.from_numpy(preference_vectors(3, 7))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
        centres = torch.randn(3, 6, generator=generator, dtype=torch.float64)

        def losses(x, centres=centres):
            return (x - centres).square().sum(dim=1)

        def constrain(x, losses=losses, chosen=seed % 7):
            return ((directions - directions[chosen]) @ losses(x)) / losses(x).detach().norm()

        gradients = torch.autograd.functional.jacobian(losses, x)
        of_constraints = torch.autograd.functional.jacobian(constrain, x) * losses(x).detach().norm()
        violated = constrain(x) > 0
        for steps in (100, 0):
            rule = ParetoMTL(TASKS, preferences=7, preference=seed % 7, feasibility_steps=steps, scale="paper")
            weights = rule(given(losses(x).tolist(), gradients))
            vectors = of_constraints[violated]
            if steps == 0 or not violated.any():
                vectors = torch.cat([gradients, vectors])
            np.testing.assert_allclose(weights @ gradients, shortest_by_enumeration(vectors.T.numpy()), atol=1e-9)


def test_the_first_phase_ends_for_good_where_no_constraint_is_violated(given):
    g = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rule = ParetoMTL(PAIR, preferences=2, preference=0)
    # The region of (1, 0): the first loss is the larger one. Raise it, lower the second.
    assert rule(given((1.0, 2.0), g)).tolist() == [-1, 1]
    assert rule.searching
    torch.testing.assert_close(rule(given((2.0, 1.0), g, iteration=1)), MGDA(PAIR)(given((2.0, 1.0), g)))
    assert not rule.searching
    late = rule(given((1.0, 2.0), g, iteration=2))
    expected = shortest_by_enumeration(np.stack([*g.numpy(), (g[1] - g[0]).numpy()], axis=1))
    found = (late @ g).numpy()
    np.testing.assert_allclose(found / np.linalg.norm(found), expected / np.linalg.norm(expected), atol=1e-9)
    assert late.abs().sum() == pytest.approx(2)


def test_the_first_phase_ends_after_its_steps_or_two_epochs(given):
    g = torch.eye(2, dtype=torch.float64)
    ends = {"feasibility_steps": 3, "preferences": 2, "preference": 0}
    by_step, by_epoch = ParetoMTL(PAIR, **ends), ParetoMTL(PAIR, **{**ends, "feasibility_steps": None})
    first = [by_step(given((1.0, 2.0), g, iteration=i)).tolist() == [-1, 1] for i in range(6)]
    assert first == [True, True, True, False, False, False]
    first = [by_epoch(given((1.0, 2.0), g, iteration=i, epoch=i // 2)).tolist() == [-1, 1] for i in range(6)]
    assert first == [True, True, True, True, False, False]
    assert not by_step.searching
    assert not by_epoch.searching


def test_epsilon_counts_constraints_near_the_border(given):
    g, losses = torch.eye(2, dtype=torch.float64), (1.1, 1.0)
    far, near = (ParetoMTL(PAIR, preferences=2, preference=0, epsilon=e) for e in (0.01, 0.1))
    torch.testing.assert_close(far(given(losses, g)), torch.ones(2, dtype=torch.float64))
    # The shortest combination of (1, 0), (0, 1) and (-1, 1) has no part of (0, 1).
    torch.testing.assert_close(near(given(losses, g)), torch.tensor([0.4, 0.8], dtype=torch.float64) / 0.6)


def test_constraints_that_cancel_the_tasks_move_nothing(given):
    """With a large epsilon all constraints count, and some of their combinations rise wherever the losses fall."""
    rule = ParetoMTL(TASKS, epsilon=2.0)
    g = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert rule(given(gradients=g)).tolist() == [0, 0, 0]


def test_absolute_weights_sum_to_the_tasks_in_both_phases(given):
    g = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for losses in ((3.0, 1.0, 1.0), (1.0, 1.0, 3.0)):
        plain, paper = (ParetoMTL(TASKS, preference=0, scale=scale) for scale in ("sum", "paper"))
        a, b = plain(given(losses, g)), paper(given(losses, g))
        assert plain.searching == (losses[0] == 1)
        assert a.abs().sum() == pytest.approx(3)
        torch.testing.assert_close(a, 3 * b / b.abs().sum())


def test_one_preference_is_mgda(given, matrices):
    for g in map(torch.from_numpy, matrices):
        tasks = tiny_tasks("abcdefghijklmnopqrstuvwxyz"[: len(g)])
        losses = tuple(float(i + 1) for i in range(len(g)))
        a, b = (rule(tasks, **o)(given(losses, g)) for rule, o in ((MGDA, {}), (ParetoMTL, {"preferences": 1})))
        # Duplicates may share their weight in any way.
        torch.testing.assert_close(a @ g, b @ g, rtol=1e-7, atol=1e-7 * float(g.norm(dim=1).min()))


def test_scaling_all_losses_changes_nothing_and_scaling_one_moves_its_points(given):
    g = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def weights(losses, factors=(1.0, 1.0)):
        factors = torch.tensor(factors, dtype=torch.float64)
        rule = ParetoMTL(PAIR, preferences=3, preference=1)
        found = rule(given((torch.tensor(losses, dtype=torch.float64) * factors).tolist(), g * factors[:, None]))
        return rule.searching, found

    feasible, moved = weights((1.0, 1.2)), weights((1.0, 1.2), (1.0, 10.0))
    assert not feasible[0]
    assert (feasible[1] >= 0).all()
    # The second loss is now too large for the region of equal losses: raise the first, lower the second.
    assert moved[0]
    assert moved[1][0] < 0 < moved[1][1]
    both = weights((1.0, 12.0), (1e6, 1e6))
    torch.testing.assert_close(both[1], weights((1.0, 12.0))[1])


def test_a_task_without_labels_is_as_if_it_were_not_there():
    directions = [[1.0, 2.0, 1.0], [1.0, 0.0, 3.0], [3.0, 1.0, 1.0], [0.0, 1.0, 0.0]]
    cut = [[1.0, 1.0], [1.0, 3.0], [3.0, 1.0]]
    tasks, rest = tiny_tasks(), [TASKS[0], TASKS[2]]
    searched = set()
    for chosen in range(3):
        whole = Step(problem(), tasks, pareto_mtl(tasks, preferences=directions, preference=chosen))
        part = Step(problem().restricted_to(["a", "c"]), rest, pareto_mtl(rest, preferences=cut, preference=chosen))
        optimizers = [torch.optim.SGD(step.parameters(), lr=0.05) for step in (whole, part)]
        for batch in batches(6):
            absent = {"b": torch.full_like(batch.targets["a"], math.nan)}
            for optimizer in optimizers:
                optimizer.zero_grad()
            report = whole.backward(Batch(batch.inputs, {**batch.targets, **absent}))
            part.backward(batch)
            for key, p in part.model.named_parameters():
                torch.testing.assert_close(whole.model.get_parameter(key).grad, p.grad, rtol=1e-9, atol=1e-12)
            for optimizer in optimizers:
                optimizer.step()
            # What the losses of two tasks are does not end the search for a point that is right for three.
            assert whole.encoder.searching
            searched.add(part.encoder.searching)
            part.encoder.searching = True
            assert report.encoder_weights["b"] == 0
    assert searched == {True, False}


def test_a_preference_for_absent_tasks_alone_constrains_nothing(given):
    g = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rule = ParetoMTL(TASKS, preferences=3, preference=1)
    weights = rule(given((3.0, 0.0, 1.0), g, labelled=(True, False, True)))
    torch.testing.assert_close(weights, MGDA(TASKS)(given(gradients=g, labelled=(True, False, True))))
    assert rule.searching


def test_the_host_waits_once(given, monkeypatch):
    waits = []
    for name in ("cpu", "item", "tolist", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _of=original, _name=name: (waits.append(_name), _of(self, *a))[1]
        )
    rule, signals = ParetoMTL(TASKS, preference=0), given((1.0, 1.0, 3.0), torch.eye(3, dtype=torch.float64))
    rule(signals)
    assert waits == ["cpu"]


def bump(centres, x):
    """The paper's losses 1 − exp(−‖x − c‖²) and their gradients."""
    away = x - centres
    falls = torch.exp(-away.square().sum(dim=1))
    return 1 - falls, 2 * away * falls[:, None]


def bowl(centres, x):
    """Half squared distances and their gradients."""
    away = x - centres
    return away.square().sum(dim=1) / 2, away


def descend(given, rule, shape, centres, x, lr, steps=150):
    """Where a rule leads from x by plain gradient descent on a cosine schedule, and the losses there, step by step."""
    points, seen = [x], [shape(centres, x)[0]]
    for i in range(steps):
        losses, gradients = shape(centres, x)
        rate = lr * (1 + math.cos(math.pi * i / steps)) / 2
        x = x - rate * rule(given(losses.tolist(), gradients, iteration=i)) @ gradients
        points.append(x)
        seen.append(shape(centres, x)[0])
    return torch.stack(points).numpy(), torch.stack(seen).numpy()


SIZE = 20
ENDS = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, SIZE) / math.sqrt(SIZE)


def anywhere(seed):
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5


@pytest.mark.parametrize(("scale", "lr"), [("paper", 1.0), ("sum", 0.5)])
def test_ten_preferences_trace_the_concave_front_of_the_paper(given, scale, lr):
    """The Pareto set is the segment between the two minima."""
    directions, spots = preference_vectors(2, 10), []
    for k in range(10):
        rule = ParetoMTL(PAIR, preferences=10, preference=k, feasibility_steps=40, scale=scale)
        points, losses = descend(given, rule, bump, ENDS, anywhere(k), lr)
        assert violation(losses[-1], directions, k) < 1e-9
        spot = points[-1].mean()
        np.testing.assert_allclose(points[-1], spot, atol=1e-6)
        spots.append(spot * math.sqrt(SIZE))
    assert -1 <= spots[0] < -0.7
    assert 0.7 < spots[-1] <= 1
    # From the second task's minimum to the first's, without a gap.
    assert np.diff(spots).min() > 0
    assert np.diff(spots).max() < 0.5


def test_mgda_from_the_same_starts_keeps_to_the_middle(given):
    directions = preference_vectors(2, 10)
    ends = [descend(given, MGDA(PAIR), bump, ENDS, anywhere(k), 0.5)[1][-1] for k in range(10)]
    assert {int((directions @ losses).argmax()) for losses in ends} <= {3, 4, 5, 6}


@pytest.mark.parametrize("chosen", [0, 3, 9])
def test_the_first_phase_reaches_its_region_from_outside(given, chosen):
    rule = ParetoMTL(PAIR, preferences=10, preference=chosen, feasibility_steps=500)
    x, seen = anywhere(0), []
    while rule.searching:
        losses, gradients = bump(ENDS, x)
        seen.append(violation(losses.numpy(), rule.preferences, chosen))
        x = x - 0.02 * rule(given(losses.tolist(), gradients, iteration=len(seen) - 1)) @ gradients
    assert seen[0] > 0.01
    assert 2 < len(seen) < 200
    assert min(seen[:-1]) > 0 == seen[-1]
    assert np.diff(seen).max() < 0


def test_seven_preferences_spread_over_the_front_of_three_convex_losses(given):
    """The Pareto set is the triangle between the three minima."""
    corners = torch.eye(3, 5, dtype=torch.float64)
    start = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.8, 0.8], dtype=torch.float64)
    directions, ends = preference_vectors(3, 7), []
    for k in range(7):
        rule = ParetoMTL(TASKS, preferences=7, preference=k, feasibility_steps=60)
        points, losses = descend(given, rule, bowl, corners, start, 0.2)
        assert violation(losses[-1], directions, k) < 1e-9
        to_corners = (corners.numpy() - points[-1]).T
        assert np.linalg.norm(to_corners @ min_norm_weights(to_corners)) < 1e-9
        ends.append(points[-1])
    distances = np.linalg.norm(np.array(ends)[:, None] - np.array(ends), axis=2)
    assert distances[~np.eye(7, dtype=bool)].min() > 0.2
    # Swapping tasks swaps ends.
    np.testing.assert_allclose(ends[0][:3], ends[1][[1, 0, 2]], atol=1e-6)
    np.testing.assert_allclose(ends[4][:3], ends[5][[0, 2, 1]], atol=1e-6)
    plain = descend(given, MGDA(TASKS), bowl, corners, start, 0.2)[0][-1]
    np.testing.assert_allclose(plain, [1 / 3, 1 / 3, 1 / 3, 0, 0], atol=1e-6)


def test_a_region_off_the_front_is_left_at_its_border(given):
    """On the front the largest loss is at most three times either other: too little for this region."""
    corners = torch.eye(3, 5, dtype=torch.float64)
    start = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.8, 0.8], dtype=torch.float64)
    rule = ParetoMTL(TASKS, preferences=10, preference=0, feasibility_steps=60)
    points, losses = descend(given, rule, bowl, corners, start, 0.2)
    assert 0 < violation(losses[-1], rule.preferences, 0) < 0.01
    to_corners = (corners.numpy() - points[-1]).T
    assert np.linalg.norm(to_corners @ min_norm_weights(to_corners)) > 0.1


@pytest.mark.parametrize("saved_after", [1, 8])
def test_a_run_resumes_bit_for_bit_in_both_phases(saved_after, tmp_path):
    tasks, data = tiny_tasks(), batches(14)

    def start():
        directions = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
        step = Step(problem(), tasks, pareto_mtl(tasks, preferences=directions, preference=0, feasibility_steps=100))
        return step, torch.optim.Adam(step.parameters(), lr=0.01)

    def resume(forget=False):
        step, optimizer = start()
        state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
        step.load_state_dict(state)
        optimizer.load_state_dict(optimizer_state)
        assert step.encoder.searching == (saved_after == 1)
        if forget:
            step.encoder.searching = not step.encoder.searching
        train(step, data[saved_after:], optimizer)
        return step

    whole, optimizer = start()
    train(whole, data, optimizer)
    half, optimizer = start()
    train(half, data[:saved_after], optimizer)
    torch.save([half.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resume().parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), resume(True).parameters(), strict=True))


@pytest.mark.parametrize(
    ("tasks", "count"), [(2, 2), (2, 5), (3, 3), (3, 4), (3, 8), (3, 10), (5, 16), (9, 46), (20, 21)]
)
def test_vectors_are_unit_nonnegative_distinct_and_start_at_the_axes(tasks, count):
    found = preference_vectors(tasks, count)
    assert found.shape == (count, tasks)
    assert (found >= 0).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    cosines = found @ found.T - 2 * np.eye(count)
    assert cosines.max() < math.cos(math.radians(10))
    assert {tuple(row) for row in np.eye(tasks)} <= {tuple(row) for row in found.round(12)}


def test_vectors_of_two_tasks_are_evenly_spaced_and_lattices_are_symmetric():
    angles = np.degrees(np.arctan2(*preference_vectors(2, 10).T[::-1]))
    np.testing.assert_allclose(angles, np.linspace(0, 90, 10), atol=1e-12)
    for count in (3, 4, 6, 7, 10):
        found = {tuple(row) for row in preference_vectors(3, count).round(9)}
        assert {tuple(row[i] for i in (2, 0, 1)) for row in found} == found
    assert {(0.0, 1.0, 2.0), (1.0, 1.0, 1.0)} <= {
        tuple((row / row[row > 0].min()).round(9)) for row in preference_vectors(3, 10)
    }


def test_a_front_has_a_method_for_every_preference():
    methods = pareto_front(TASKS, at="features", decoder="same")
    assert [method.encoder.preference for method in methods] == [0, 1, 2, 3]
    assert all(method.encoder is method.decoder and method.encoder.at == "features" for method in methods)
    assert isinstance(pareto_front(PAIR, 2)[0].decoder, Equal)
    assert ParetoMTL(TASKS).preference == 3
    assert ParetoMTL(PAIR).preference == 2
    assert len(ParetoMTL(PAIR).preferences) == 5


def test_vectors_by_name_are_vectors_in_order():
    by_name = ParetoMTL(TASKS, preferences=[{"c": 2.0, "a": 1}, {"b": 1e-300}])
    in_order = ParetoMTL(TASKS, preferences=[[3, 0, 6], [0.0, 1e300, 0.0]])
    np.testing.assert_array_equal(by_name.preferences, in_order.preferences)
    np.testing.assert_allclose(np.linalg.norm(by_name.preferences, axis=1), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "heads"}, "at must be 'features' or 'parameters', not 'heads'"),
        ({"preferences": 2}, "preferences must be 1, at least the number of tasks, 3, or given vectors, not 2"),
        ({"preferences": []}, r"preferences must be vectors or their number, not \[\]"),
        ({"preferences": [[1.0, 2.0]]}, r"one number for each of the 3 tasks, not \[1.0, 2.0\]"),
        ({"preferences": [[1, 0, 0], [0, -1, 1]]}, r"positive for one, not \[0, -1, 1\]"),
        ({"preferences": [[0, 0, 0]]}, r"positive for one, not \[0, 0, 0\]"),
        ({"preferences": [[1, 0, math.inf]]}, "positive for one, not"),
        ({"preferences": [[1, 2, 3], [1, 0, 0], [2, 4, 6]]}, r"\[1, 2, 3\] and \[2, 4, 6\] are the same direction"),
        ({"preferences": 7, "preference": 7}, "preference must be one of 0 … 6, not 7"),
        ({"preference": -1}, "preference must be one of 0 … 3, not -1"),
        ({"preference": 1.0}, "preference must be one of 0 … 3, not 1.0"),
        ({"feasibility_steps": -1}, "feasibility_steps must be at least 0, not -1"),
        ({"epsilon": -0.1}, "epsilon must be at least 0, not -0.1"),
        ({"scale": "mean"}, "scale must be 'sum' or 'paper', not 'mean'"),
        ({"decoder": "ones"}, "decoder must be 'equal' or 'same', not 'ones'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pareto_mtl(TASKS, **options)


def test_one_task_has_no_trade_off():
    with pytest.raises(ValueError, match="preferences are between two tasks or more, not 1"):
        ParetoMTL(TASKS[:1])


def test_a_preference_for_an_unknown_task():
    with pytest.raises(MissingKey, match="there is a preference for 'd', but the tasks are: a, b, c"):
        ParetoMTL(TASKS, preferences=[{"a": 1.0, "d": 1.0}])


def test_losses_that_are_not_finite_are_refused(given):
    with pytest.raises(SolverFailure, match="the losses are not finite"):
        ParetoMTL(PAIR)(given((1.0, math.nan), torch.eye(2, dtype=torch.float64)))
