"""Estimates of relations against their definitions, and against ranks that are known."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sidetask_core import Batch, SplitModel, Step, Task
from sidetask_core.testing import batches, problem, squared, tiny_tasks
from sidetask_saal import Frozen, coefficient_relations, gradient_angles, lookahead_relations, rank_correlation
from torch import nn


def loss(model, batch, name):
    return squared(model(batch.inputs)[name], batch.targets[name]).mean()


@pytest.mark.parametrize("split", ["shared bottom", "half-shared"])
@pytest.mark.parametrize("beside", [False, True])
def test_looking_ahead_is_a_step_on_one_loss(split, beside):
    model, tasks, data = problem(split, norm=True), tiny_tasks(), batches(6)
    train, probes = data[:3], data[3:]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = lookahead_relations(model, tasks, train, lr=0.3, validation=probes if beside else None)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    expected = np.zeros((3, 3))
    for batch, probe in zip(train, probes if beside else train, strict=True):
        for s, source in enumerate("abc"):
            moved = problem(split, norm=True)
            optimizer = torch.optim.SGD(moved.shared_parameters(), lr=0.3)
            loss(moved, batch, source).backward()
            optimizer.step()
            for t, target in enumerate("abc"):
                expected[s, t] += (
                    1 / 3
                    - loss(moved, probe, target).item() / loss(problem(split, norm=True), probe, target).item() / 3
                )
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_angles_are_those_of_the_shared_gradients():
    model, tasks, data = problem("half-shared"), tiny_tasks(), batches(2)
    found = gradient_angles(model, tasks, data)
    expected = np.zeros((3, 3))
    for batch in data:
        gradients = []
        for name in "abc":
            some = torch.autograd.grad(loss(model, batch, name), model.shared_parameters())
            gradients.append(torch.cat([g.flatten() for g in some]))
        for s, one in enumerate(gradients):
            for t, other in enumerate(gradients):
                expected[s, t] += torch.cosine_similarity(one, other, dim=0).item() / 2
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(found.diagonal(), 1)


def test_what_a_batch_has_no_labels_for_it_says_nothing_about():
    model, tasks, (first, second) = problem(), tiny_tasks(), batches(2)
    gap = Batch(first.inputs, {**first.targets, "b": None})
    some = gradient_angles(model, tasks, [gap])
    assert np.isnan(some[1]).all()
    assert np.isnan(some[:, 1]).all()
    np.testing.assert_allclose(
        gradient_angles(model, tasks, [gap, second])[1], gradient_angles(model, tasks, [second])[1]
    )
    assert np.isnan(lookahead_relations(model, tasks, [gap], lr=0.1)[:, 1]).all()


def test_rank_correlation_is_scipy_s_column_by_column():
    generator = np.random.default_rng(0)
    truth, estimate = generator.normal(size=(2, 6, 6)).round(1)
    found = rank_correlation(estimate, truth)
    for t in range(6):
        others = [s for s in range(6) if s != t]
        assert found[t] == pytest.approx(spearmanr(estimate[others, t], truth[others, t]).statistic)
    np.testing.assert_allclose(rank_correlation(estimate, truth, over="targets"), rank_correlation(estimate.T, truth.T))
    np.testing.assert_allclose(rank_correlation(np.exp(estimate), truth), found)
    np.testing.assert_allclose(rank_correlation(-estimate, truth), -found)
    estimate[1:4, 0] = math.nan
    truth[:, 1] = 2.0
    found = rank_correlation(estimate, truth)
    assert found[0] in (-1, 0, 1)
    assert math.isnan(found[1])


def test_coefficients_of_transfers():
    found = coefficient_relations(["a", "b", "c"], {"a": 1.0, "a→b": 0.3, "c->a": torch.tensor(-0.1)})
    assert found[0, 1] == 0.3
    assert found[2, 0] == pytest.approx(-0.1)
    assert np.isnan(found).sum() == 7


def test_bad_input():
    with pytest.raises(ValueError, match="no batch to look at"):
        gradient_angles(problem(), tiny_tasks(), [])
    with pytest.raises(ValueError, match=r"relations are \[T, T\], found \[2, 2\] and \[3, 3\]"):
        rank_correlation(np.eye(2), np.eye(3))
    with pytest.raises(ValueError, match="'sources' or 'targets', not 'both'"):
        rank_correlation(np.eye(2), np.eye(2), over="both")
    model = problem()
    model.shared.requires_grad_(False)
    with pytest.raises(ValueError, match="share no layer that learns"):
        gradient_angles(model, tiny_tasks(), batches(1))


@pytest.mark.parametrize("split", ["shared bottom", "half-shared"])
def test_a_frozen_encoder_gives_what_the_head_reads_and_learns_nothing(split):
    single, (batch, other) = problem(split, norm=True), batches(2)
    single(other.inputs)
    model = SplitModel(Frozen(single, "b"), {"c": nn.Linear(5, 2).double()})
    single.eval()
    features = single.shared(batch.inputs)
    if split == "half-shared":
        features = single.branches["b"](features)
    before = copy.deepcopy(model.state_dict())
    step = Step(model, [Task("c", squared)]).train()
    assert torch.equal(model.encode(batch.inputs), features)
    step.backward(batch)
    assert model.heads["c"].weight.grad.any()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in model.shared_parameters())


def test_every_batch_needs_one_of_validation():
    data = batches(5)
    with pytest.raises(ValueError, match="validation ended after 2 batches; there must be one for each"):
        lookahead_relations(problem("half-shared"), tiny_tasks(), data[:3], lr=0.1, validation=data[3:])
