import math

import numpy as np
import pytest
import torch
from sidetask_baselines.puw import PUW, puw, systematic
from sidetask_core.testing import conformance, tiny_tasks

TASKS = tiny_tasks()

TestPUW = conformance(puw)
TestPUWResamplingAlways = conformance(puw, particles=50, walk=0.3, resample=1.0, seed=3)
TestPUWResamplingNever = conformance(puw, particles=200, resample=0.0)


def precision(rule):
    """Every task's estimate of 1 / σ², from the particles that the rule keeps."""
    return (rule.log_weights.exp() * rule.particles.neg().exp()).sum(dim=1)


def by_hand(history, particles, walk, spread, resample, seed):
    """Weights of every step for one task at a time, in plain numpy, from the same random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(kind, count):
        return kind(count, generator=generator, dtype=torch.float64).numpy()

    start = spread * draw(torch.randn, particles)
    noise = [(draw(torch.randn, particles), draw(torch.rand, 1)[0]) for _ in history]
    estimates = np.full((len(history), 3), np.nan)
    for task in range(3):
        s, w, started = start.copy(), np.full(particles, 1 / particles), False
        for step, (losses, labelled) in enumerate(history):
            loss = losses[task]
            if labelled[task] and loss > 0:
                s = s + walk * noise[step][0] + (0 if started else math.log(loss))
                started = True
                w = w * np.exp(-(loss * np.exp(-s) + s) / 2 + (1 + math.log(loss)) / 2)
                w /= w.sum()
                estimates[step, task] = w @ np.exp(-s)
                if 1 / (w**2).sum() < resample * particles:
                    edges, kept, i = np.cumsum(w), [], 0
                    for j in range(particles):
                        while edges[i] <= (j + noise[step][1]) / particles:
                            i += 1
                        kept.append(s[i])
                    s, w = np.array(kept), np.full(particles, 1 / particles)
            elif started:
                estimates[step, task] = w @ np.exp(-s)
    weights = np.zeros((len(history), 3))
    for step, (_, labelled) in enumerate(history):
        known = labelled & ~np.isnan(estimates[step])
        weights[step, labelled] = 1.0
        weights[step, known] = known.sum() * estimates[step, known] / estimates[step, known].sum()
    return weights


@pytest.mark.parametrize("resample", [0.0, 0.5, 1.0])
def test_weights_follow_the_written_definition(given, resample):
    rng, history = np.random.default_rng(0), []
    for step in range(60):
        losses = rng.gamma(4.0, size=3) * np.array([1.0, 1e-3, 50.0]) * 0.95**step
        labelled = rng.random(3) < 0.8
        losses[~labelled] = 0
        if step in (0, 1, 30):
            losses[1] = -0.5 if step else 0.0
        history.append((losses, labelled))
    options = {"particles": 40, "walk": 0.2, "spread": 0.7, "resample": resample, "seed": 5}
    rule = PUW(TASKS, **options)
    expected = by_hand(history, **options)
    for (losses, labelled), weights in zip(history, expected, strict=True):
        found = rule(given(tuple(losses), labelled=labelled.tolist()))
        np.testing.assert_allclose(found.numpy(), weights, rtol=1e-9)


def limit(walk, steps=2000):
    """What L · E[e^{−s}] settles at for a constant loss without Monte Carlo error: the same recursion on a grid.

    Besides it, the posterior variance of s after a step.
    """
    grid = np.linspace(-4, 4, 801)
    kernel = np.exp(-(((grid[:, None] - grid) / walk) ** 2) / 2)
    kernel /= kernel.sum(axis=0)
    likelihood = np.exp(-(np.exp(-grid) + grid) / 2)
    density = np.exp(-(grid**2) / 2)
    for _ in range(steps):
        density = likelihood * (kernel @ density)
        density /= density.sum()
    mean = density @ grid
    return density @ np.exp(-grid), density @ (grid - mean) ** 2


def test_the_optimum_of_uncertainty_weighting_is_approached_as_the_wandering_shrinks():
    """The predictive density is normal up to the likelihood's skewness, and then E[e^{−s}] = 1 / L exactly."""
    biases = [limit(walk)[0] - 1 for walk in (0.2, 0.1, 0.05)]
    assert biases[0] > biases[1] > biases[2] > 0
    assert biases[2] < 0.015
    # Proportional to the posterior variance √2 · walk, and hence gone in the limit.
    assert biases[2] / biases[1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("walk", "particles"), [(0.05, 1000), (0.2, 200)])
@pytest.mark.thorough
def test_at_constant_losses_the_estimate_settles_at_the_inverse_loss(given, walk, particles):
    rule, losses = PUW(TASKS, walk=walk, particles=particles, seed=11), (0.1, 2.0, 30.0)
    expected, variance = limit(walk)
    settling = math.ceil(8 * math.sqrt(2) / walk)
    found = []
    for step in range(settling + 2000):
        rule(given(losses, iteration=step))
        if step >= settling:
            found.append(precision(rule) * torch.tensor(losses, dtype=torch.float64))
    found = torch.stack(found)
    # A step adds an error of variance (variance + walk²) / N to the particles' mean, and passes on a share `kept` of
    # what was there; R = 2 is the variance of s that one loss leaves. The mean over steps has 1 / (1 − kept) of each.
    kept = 2 / (2 + variance + walk**2)
    per_step = math.sqrt((variance + walk**2) / particles)
    assert (found - expected).abs().max() < 5 * per_step / math.sqrt(1 - kept**2)
    assert (found.mean(dim=0) - expected).abs().max() < 4 * per_step / (1 - kept) / math.sqrt(2000)


def test_weights_at_constant_losses_are_their_inverses_without_noise(given):
    rule, losses = PUW(TASKS), torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64)
    for _ in range(100):
        weights = rule(given(tuple(losses.tolist())))
        torch.testing.assert_close(weights, 3 / losses / (1 / losses).sum(), rtol=1e-9, atol=0)


def test_scaling_a_loss_divides_its_estimate(given):
    rng, plain, scaled = np.random.default_rng(1), PUW(TASKS), PUW(TASKS)
    for a, b, c in rng.gamma(2.0, size=(50, 3)):
        plain(given((a, b, c)))
        scaled(given((1e6 * a, 1e-6 * b, c)))
        ratio = precision(plain) / precision(scaled)
        torch.testing.assert_close(ratio, torch.tensor([1e6, 1e-6, 1.0], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_filter_follows_a_loss_that_jumps(given, factor):
    rule = PUW(TASKS)
    for step in range(600):
        loss = 1.0 if step < 100 else factor
        weights = rule(given((loss, 1.0, 1.0)))
        assert weights.isfinite().all()
        assert weights.sum() == pytest.approx(3)
    assert precision(rule)[0] * factor == pytest.approx(limit(0.05)[0], rel=0.1)


def test_particle_weights_are_normalised_and_enough_particles_carry_them(given):
    rng, rule = np.random.default_rng(2), PUW(TASKS, particles=300, walk=0.3, resample=0.6)
    for losses in rng.gamma(0.5, size=(100, 3)) + 1e-3:
        rule(given(tuple(losses)))
        weights = rule.log_weights.exp()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(3, dtype=torch.float64))
        assert (1 / weights.square().sum(dim=1) >= 0.6 * 300 * (1 - 1e-9)).all()


def test_systematic_resampling_draws_each_particle_as_often_as_its_weight_says():
    count, offsets = 64, 500
    weights = torch.rand(3, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 6
    weights[1, :5] = 0
    weights[2, -5:] = 0
    weights /= weights.sum(dim=1, keepdim=True)
    mean = torch.zeros_like(weights)
    for i in range(offsets):
        drawn = systematic(weights, torch.tensor([(i + 0.5) / offsets], dtype=torch.float64))
        counts = torch.stack([row.bincount(minlength=count) for row in drawn]).double()
        assert counts.sum(dim=1).tolist() == [count] * 3
        assert ((counts - count * weights).abs() < 1).all()
        assert (counts[weights == 0] == 0).all()
        mean += counts / offsets
    # As the offset moves through [0, 1), a count changes once or twice, by one: each costs the mean half a step.
    assert (mean - count * weights).abs().max() <= 1 / offsets + 1e-12


def test_systematic_resampling_never_draws_a_particle_without_weight():
    """Not even where a pointer falls on the edge between two."""
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5], [0.5, 0.0, 0.0, 0.5]], dtype=torch.float64)
    assert systematic(weights, torch.zeros(1, dtype=torch.float64)).tolist() == [[1, 1, 3, 3], [0, 0, 3, 3]]


@pytest.mark.parametrize("count", [2, 3, 64, 100])
def test_systematic_resampling_of_even_weights_keeps_every_particle(count):
    even = torch.full((2, count), 1 / count, dtype=torch.float64)
    assert systematic(even, torch.tensor([0.5], dtype=torch.float64)).tolist() == [[*range(count)]] * 2


def test_an_absent_task_keeps_its_particles_and_steers_nothing(given):
    rng, whole, part = np.random.default_rng(3), PUW(TASKS), PUW(TASKS[:2])
    whole(given((1.0, 1.0, 5.0)))
    part(given((1.0, 1.0)))
    kept = whole.particles[2].clone(), whole.log_weights[2].clone()
    for losses in rng.gamma(2.0, size=(20, 2)):
        weights = whole(given((*losses, 0.0), labelled=(True, True, False)))
        torch.testing.assert_close(weights[:2], part(given(tuple(losses))), rtol=1e-12, atol=0)
        assert weights[2] == 0
    assert torch.equal(whole.particles[2], kept[0])
    assert torch.equal(whole.log_weights[2], kept[1])
    assert whole(given((0.0,) * 3, labelled=(False,) * 3)).tolist() == [0, 0, 0]
    assert whole(given((1.0, 2.0, 3.0))).isfinite().all()


def test_a_loss_that_is_not_positive_says_nothing(given):
    rule = PUW(TASKS)
    assert rule(given((1.0, 0.0, -1.0))).tolist() == [1, 1, 1]
    weights = rule(given((1.0, 4.0, -1.0)))
    assert weights[2] == 1
    assert weights[:2].sum() == pytest.approx(2)
    before = rule.particles[1].clone()
    rule(given((1.0, 0.0, -1.0)))
    assert torch.equal(rule.particles[1], before)


def test_a_step_draws_as_many_numbers_whatever_the_losses(given):
    rules = PUW(TASKS), PUW(TASKS), PUW(TASKS)
    rules[0](given((1.0, 1.0, 1.0)))
    rules[1](given((1e5, 0.0, 1e-5), labelled=(True, False, True)))
    rules[2](given((0.0, 0.0, 0.0), labelled=(False,) * 3))
    states = [rule.generator.get_state() for rule in rules]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], PUW(TASKS).generator.get_state())


def test_the_host_never_waits_for_the_device(given):
    """Tensors without data raise where their values are asked for."""
    rule, signals = PUW(TASKS), given()
    signals.losses, signals.labelled = signals.losses.to("meta"), signals.labelled.to("meta")
    for _ in range(3):
        assert rule(signals).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 1}, "particles must be a number of at least 2, not 1"),
        ({"particles": 10.0}, "particles must be a number of at least 2, not 10.0"),
        ({"walk": 0.0}, "walk must be positive, not 0.0"),
        ({"spread": -1.0}, "spread must be positive, not -1.0"),
        ({"resample": 1.5}, "resample must be between 0 and 1, not 1.5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PUW(TASKS, **options)
