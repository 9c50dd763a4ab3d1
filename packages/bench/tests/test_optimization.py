import pytest
import torch
from sidetask_bench.config import SGD, Adam, AdamW, Constant, Cosine, Poly, StepDecay
from sidetask_bench.optimization import learning_rate_factor, make_optimizer
from torch import nn


@pytest.mark.parametrize("config", [SGD(weight_decay=0.5), Adam(weight_decay=0.5), AdamW(weight_decay=0.5)])
def test_parameters_of_rules_are_not_decayed(config: SGD | Adam | AdamW) -> None:
    weight, rule = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = make_optimizer(config, [weight], [rule])
    weight.grad, rule.grad = torch.zeros(1), torch.zeros(1)
    optimizer.step()
    assert weight.item() < 1
    assert rule.item() == 1


@pytest.mark.parametrize("schedule", [Cosine(), Poly(), Cosine(per="step"), Poly(per="step")])
def test_decaying_schedules_start_at_one_and_never_rise(schedule: Cosine | Poly) -> None:
    factors = [learning_rate_factor(schedule, epoch, step, 5, 4) for epoch in range(4) for step in range(5)]
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)
    assert 0 < factors[-1] < 0.4
    assert len(set(factors)) == (4 if schedule.per == "epoch" else 20)


def test_cosine_per_epoch_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    for epoch in range(7):
        assert 0.1 * learning_rate_factor(Cosine(), epoch, 3, 5, 7) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_step_decay_at_epochs_and_constant() -> None:
    schedule = StepDecay(at=(2, 3), factor=0.1)
    factors = [learning_rate_factor(schedule, epoch, 4, 5, 5) for epoch in range(5)]
    assert factors == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    assert learning_rate_factor(Constant(), 3, 2, 5, 4) == 1


def test_warmup_rises_in_equal_steps_to_one() -> None:
    schedule = Constant(warmup=2.0)
    factors = [learning_rate_factor(schedule, epoch, step, 2, 4) for epoch in range(4) for step in range(2)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
