"""Uncertainty weighting against its written definition, and where variances have no bottom."""

import types

import pytest
import torch
from sidetask_core import Method, Step, Uncertain, Uncertainty
from sidetask_core.testing import batches, conformance, problem, squared, tiny_tasks

TASKS = tiny_tasks()


def uncertainty(tasks, **options):
    return Method(encoder=Uncertainty(tasks, **options))


TestUncertainty = conformance(uncertainty)
TestUncertaintyFromOne = conformance(uncertainty, init=0.0)


def given(losses, labelled=(True, True, True)):
    return types.SimpleNamespace(losses=torch.tensor(losses, dtype=torch.float64), labelled=torch.tensor(labelled))


def test_it_settles_where_the_variance_is_the_loss():
    rule = Uncertainty(TASKS).double()
    signals = given((0.1, 2.0, 30.0))
    optimizer = torch.optim.LBFGS(rule.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure():
        optimizer.zero_grad()
        loss = rule.objective(signals)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(rule.sigma().square(), signals.losses, rtol=1e-6, atol=0)


def test_network_and_variances_are_trained_on_one_objective():
    model, (batch, *_) = problem(), batches(1)
    rule = Uncertainty(TASKS).double()
    with torch.no_grad():
        rule.log_variance += torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    Step(model, TASKS, Method(encoder=rule)).backward(batch)
    losses = torch.stack([squared(p, batch.targets[n]).mean() for n, p in model(batch.inputs).items()])
    sigma = rule.sigma().requires_grad_()
    # As written in σ, of which s = log σ² is another name: ∂/∂s = (σ/2) ∂/∂σ.
    objective = (losses / (2 * sigma**2) + sigma.log()).sum()
    *of_network, of_sigma = torch.autograd.grad(objective, [*model.parameters(), sigma])
    for p, expected in zip(model.parameters(), of_network, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(of_sigma, (-losses / sigma**3 + 1 / sigma).detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(rule.log_variance.grad, of_sigma * sigma.detach() / 2, rtol=1e-10, atol=0)


def test_a_task_without_labels_keeps_its_variance():
    rule = Uncertainty(TASKS)
    rule.objective(given((1.0, 0.0, 1.0), labelled=(True, False, True))).backward()
    assert rule.log_variance.grad[1] == 0
    assert rule.log_variance.grad[0] != 0


@pytest.mark.parametrize("end", [-1e12, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_variance_that_left_is_finite_and_finds_back(end, dtype):
    rule = Uncertainty(TASKS).to(dtype)
    with torch.no_grad():
        rule.log_variance.fill_(end)
    signals = given((0.0, 1e-6, 1e6))
    weights = rule(signals)
    assert weights.isfinite().all()
    assert (weights * torch.tensor(1e6, dtype=dtype)).isfinite().all()
    objective = rule.objective(signals)
    assert objective.isfinite()
    objective.backward()
    slope = rule.log_variance.grad
    assert slope.isfinite().all()
    # Without a loss s falls; with one, a descent leads back from either end.
    assert (slope[0] - 0.5).abs() < 1e-6
    assert (slope[1:] < 0).all() if end < 0 else (slope[1:] > 0).all()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.thorough
def test_a_loss_that_was_zero_for_long_is_known_again(optimizer):
    rule = Uncertainty(TASKS)
    descent = OPTIMIZERS[optimizer](rule.parameters())

    def learn(losses, steps):
        for _ in range(steps):
            descent.zero_grad()
            rule.objective(given(losses)).backward()
            descent.step()
            assert rule.log_variance.isfinite().all()

    learn((0.0, 0.1, 1.0), 400)
    low = rule.log_variance.detach().clone()
    # Close to the end, however long it lasted.
    assert -17 < low[0] < -15
    # Adam remembers the steep end, and is slow the further it has to go.
    back = 1e-4 if optimizer == "adam" else 0.1
    learn((back, 0.1, 1.0), 1500)
    torch.testing.assert_close(rule.sigma().square(), torch.tensor([back, 0.1, 1.0]), rtol=0.1, atol=0)


def test_where_nothing_leaves_the_ends_do_not_show():
    rule = Uncertainty(TASKS).double()
    with torch.no_grad():
        rule.log_variance.copy_(torch.tensor([-13.8, 0.3, 13.8]))
    s = rule.log_variance.detach()
    assert torch.equal(rule(given((1.0, 1.0, 1.0))), s.neg().exp() / 2)
    assert torch.equal(rule.sigma(), (s / 2).exp())


def test_what_counts_as_uncertain():
    assert isinstance(Uncertainty(TASKS), Uncertain)
    assert not isinstance(object(), Uncertain)
