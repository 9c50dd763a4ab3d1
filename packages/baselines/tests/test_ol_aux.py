"""OL-AUX against inner products counted step by step."""

import math

import pytest
import torch
from sidetask_baselines.ol_aux import OLAUX, ol_aux
from sidetask_core import Batch, Method, Task
from sidetask_core.step import Step
from sidetask_core.testing import batches, conformance, problem, squared, tiny_tasks, train

TestOLAUX = conformance(ol_aux, window=2)
TestOLAUXAtFeatures = conformance(ol_aux, window=1, at="features", lr=0.05, init=0.2)

TASKS = tiny_tasks()


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_three_windows_by_hand(given):
    rule = OLAUX(TASKS, window=2, lr=0.1, beta=10.0, init=1.0)
    # By step, ⟨G_main, G_b⟩ and ⟨G_main, G_c⟩.
    products = [(1, -1), (2, -3), (-1, 5), (-4, -1), (0.5, 1), (0.25, 0)]
    found = [rule(given(gradients=rows([1, 0], [b, 7], [c, -9]))).tolist() for b, c in products]
    one, two = [1, 1, 1], [1, 4, 0]
    assert found == [one, one, two, two, [1, 0, 4], [1, 0, 4]]
    torch.testing.assert_close(rule.weights, rows(1, 0.75, 5))


def test_the_sum_is_that_of_the_steps_of_training():
    """Against gradients of uncut networks, with the weights that a window finds at work in the next."""
    tasks, model = tiny_tasks(), problem()
    rule = OLAUX(tasks, window=3, lr=0.05, beta=8.0, init=0.5)
    step = Step(model, tasks, Method(encoder=rule))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    weights, sums = torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    seen = []
    for i, batch in enumerate(batches(9)):
        shared = list(model.shared_parameters())
        losses = [squared(p, batch.targets[n]).mean() for n, p in model(batch.inputs).items()]
        grads = [torch.cat([g.flatten() for g in torch.autograd.grad(x, shared, retain_graph=True)]) for x in losses]
        optimizer.zero_grad()
        report = step.backward(batch)
        optimizer.step()
        torch.testing.assert_close(torch.stack(list(report.encoder_weights.values())), weights, rtol=1e-12, atol=0)
        sums += 0.05 * torch.stack([grads[0] @ g for g in grads])
        if i % 3 == 2:
            weights = (weights + 8.0 * sums).clamp(min=0)
            weights[0] = 1
            sums.zero_()
            seen.append(weights)
    assert not torch.allclose(seen[0], seen[1])


def test_an_agreeing_task_gains_and_a_conflicting_one_ends_at_zero(given):
    rule = OLAUX(TASKS, window=1, lr=1.0, beta=0.3)
    for _ in range(5):
        rule(given(gradients=rows([1, 1], [1, 0], [-1, 0])))
    torch.testing.assert_close(rule.weights, rows(1, 2.5, 0))


def test_several_primaries_are_one_objective(given, sample):
    tasks = [Task(n, abs, primary=n in "ac") for n in "abcd"]
    g = torch.as_tensor(sample("random", 4, 0))
    rule, one = OLAUX(tasks, window=1, lr=1.0, beta=0.01), OLAUX(TASKS, window=1, lr=1.0, beta=0.01)
    rule(given((1.0,) * 4, g, primary=[True, False, True, False]))
    one(given(gradients=torch.stack([g[0] + g[2], g[1], g[3]])))
    torch.testing.assert_close(rule.weights[[1, 3]], one.weights[1:])
    assert rule.weights[[0, 2]].tolist() == [1, 1]


@pytest.mark.parametrize("absent", [0, 1])
def test_a_task_without_labels_adds_nothing(given, absent):
    """As in the step, a task without labels has a gradient of zero; the window counts steps all the same."""
    rule = OLAUX(TASKS, window=2, lr=1.0, beta=0.5)
    g = rows([1, 0], [2, 0], [3, 0])
    without = g.clone()
    without[absent] = 0
    rule(given(gradients=g))
    rule(given(gradients=without, labelled=[i != absent for i in range(3)]))
    expected = [1, 1 + 1.0, 1 + 1.5] if absent == 0 else [1, 1 + 1.0, 1 + 3.0]
    assert rule.weights.tolist() == expected


def test_absent_tasks_in_training_keep_their_weight():
    tasks, data = tiny_tasks(), batches(2)
    step = Step(problem(), tasks, ol_aux(tasks, window=1, lr=1.0))
    for missing, moves in (("b", [False, False, True]), ("a", [False, False, False])):
        before = step.encoder.weights.clone()
        batch = data.pop()
        step.backward(Batch(batch.inputs, {**batch.targets, missing: None}))
        assert (step.encoder.weights != before).tolist() == moves


def test_only_the_product_of_the_step_sizes_matters(given, sample):
    a, b = OLAUX(TASKS, window=2, lr=1e-3, beta=0.5), OLAUX(TASKS, window=2, lr=0.05, beta=0.01)
    for seed in range(6):
        signals = given(gradients=torch.as_tensor(sample("random", 3, seed)))
        torch.testing.assert_close(a(signals), b(signals))
    assert not torch.allclose(a.weights, torch.ones_like(a.weights))


def test_changes_grow_with_the_scale_of_an_auxiliary_loss(given, sample):
    g = torch.as_tensor(sample("random", 3, 0))
    changes = []
    for factor in (1.0, 3.0):
        rule = OLAUX(TASKS, window=1, lr=1e-3, beta=1.0)
        rule(given(gradients=g * rows([1.0], [factor], [1.0])))
        changes.append(rule.weights - 1)
    torch.testing.assert_close(changes[1], changes[0] * rows(0, 3, 1))


def test_a_step_that_overflows_does_not_end_the_weights(given):
    rule = OLAUX(TASKS, window=2, lr=1.0, beta=1.0)
    rule(given(gradients=rows([1, 0], [math.inf, 0], [1, 0])))
    rule(given(gradients=rows([1, 0], [1, 0], [1, 0])))
    assert rule.weights.tolist() == [1, 2, 3]


def test_without_auxiliary_tasks_it_is_the_plain_sum(given, sample):
    rule = OLAUX([Task(n, abs) for n in "abc"], window=1, lr=1.0)
    signals = given(gradients=torch.as_tensor(sample("opposing", 3, 0)), primary=[True] * 3)
    assert [rule(signals).tolist() for _ in range(2)] == [[1, 1, 1]] * 2


@pytest.mark.parametrize("cast", [torch.float32, torch.float64])
def test_state_is_read_back_as_it_was_saved(cast):
    """The step of a network in single precision may itself have been cast, or not."""
    tasks = tiny_tasks()
    step = Step(problem(dtype=torch.float32), tasks, ol_aux(tasks, window=2, lr=0.1))
    step.encoder.to(cast)
    train(step, batches(3, dtype=torch.float32))
    other = OLAUX(tasks).to(cast)
    other.load_state_dict(step.encoder.state_dict())
    for name, buffer in step.encoder.named_buffers():
        assert buffer.dtype in (cast, torch.bool)
        assert torch.equal(buffer, other.get_buffer(name)), name


def test_nothing_waits_for_the_device(given, sample):
    """On tensors without values, whatever asked the host for one would raise."""
    rule = OLAUX(TASKS, window=2).to("meta")
    signals = given(gradients=torch.as_tensor(sample("random", 3, 0)))
    for name in ("primary", "labelled", "losses", "_gradients"):
        setattr(signals, name, getattr(signals, name).to("meta"))
    for _ in range(3):
        assert rule(signals).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a positive number of steps, not 0"),
        ({"window": 2.5}, "window must be a positive number of steps, not 2.5"),
        ({"lr": 0.0}, "lr must be positive, not 0.0"),
        ({"beta": -1.0}, "beta must be positive, not -1.0"),
        ({"init": -0.1}, "init must be at least 0, not -0.1"),
        ({"at": "heads"}, "at must be 'features' or 'parameters', not 'heads'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        OLAUX(TASKS, **options)


def test_a_primary_task_is_needed():
    with pytest.raises(ValueError, match=r"OLAUX .* needs at least one task with primary=True; .* all of: a, b"):
        ol_aux([Task(n, abs, primary=False) for n in "ab"])
