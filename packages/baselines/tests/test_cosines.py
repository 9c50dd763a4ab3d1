"""What holds for every rule that looks at directions and lengths apart."""

import copy
import math

import numpy as np
import pytest
import torch
from sidetask_baselines.aligned_mtl import AlignedMTL, aligned_mtl
from sidetask_baselines.imtl import IMTL, imtl
from sidetask_baselines.imtl_g import IMTLG, imtl_g
from sidetask_baselines.nash_mtl import NashMTL, nash_mtl
from sidetask_baselines.simplex import SolverFailure
from sidetask_core import Batch, Equal, Method, SplitModel, Step
from sidetask_core.testing import batches, problem, tiny_tasks
from torch import nn

RULES = [IMTLG, IMTL, NashMTL, AlignedMTL]
FACTORIES = [imtl_g, imtl, nash_mtl, aligned_mtl]


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_is_refused(rule, given, sample):
    bad = torch.tensor(sample("random", 3, 0))
    bad[0, 0] = math.nan
    with pytest.raises(SolverFailure, match=r"not finite .condition number of the 3x3 Gramian: undefined"):
        rule(tiny_tasks())(given(gradients=bad))


@pytest.mark.parametrize(("rule", "expected"), [*zip(RULES, [1, 1, 0.2, 1], strict=True)])
def test_one_task(rule, expected, given):
    g = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert rule(tiny_tasks("a"))(given((1.0,), g)).tolist() == pytest.approx([expected], rel=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["zero", "denormal in single precision", "without labels"])
def test_a_task_whose_gradient_has_no_length_is_as_if_it_were_not_there(rule, how, given, sample):
    dtype = torch.float32 if how.startswith("denormal") else torch.float64
    g = torch.tensor(sample("random", 4, 0), dtype=dtype)
    g[1] *= 0 if how != "denormal in single precision" else 1e-20
    labelled = (True, how != "without labels", True, True)
    found = rule(tiny_tasks("abcd"))(given((1.0,) * 4, g, labelled=labelled))
    alone = rule(tiny_tasks("acd"))(given((1.0,) * 3, g[[0, 2, 3]]))
    assert found[1] == 0
    torch.testing.assert_close(found[[0, 2, 3]], alone, rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_without_any_gradient_there_are_no_weights(rule, given):
    assert rule(tiny_tasks())(given(gradients=torch.zeros(3, 5, dtype=torch.float64))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("rule", RULES)
def test_features_and_parameters_agree_behind_an_orthogonal_encoder(rule):
    """With a square orthogonal encoder and one sample, the two Gramians are proportional."""
    tasks = tiny_tasks()
    shared = nn.Linear(4, 4, bias=False).double()
    nn.init.orthogonal_(shared.weight)
    model = SplitModel(shared, {n: nn.Linear(4, 2).double() for n in "abc"})
    (batch,) = batches(1, size=1)
    # The samples' length is the ratio of the gradients' lengths: Nash's weights are inverse to it on the paper's scale.
    options = {"scale": "sum"} if rule is NashMTL else {}
    weights = [
        torch.stack(
            [
                *Step(model, tasks, Method(encoder=rule(tasks, at=at, **options)))
                .backward(batch)
                .encoder_weights.values()
            ]
        )
        for at in ("features", "parameters")
    ]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("how", ["nan", "none"])
def test_a_step_without_labels_of_a_task_is_a_step_without_the_task(factory, how):
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    absent = None if how == "none" else torch.full_like(batch.targets["b"], math.nan)
    whole = Step(problem(), tasks, factory(tasks))
    whole.backward(Batch(batch.inputs, {**batch.targets, "b": absent}))
    rest = [tasks[0], tasks[2]]
    part = Step(problem().restricted_to(["a", "c"]), rest, factory(rest))
    part.backward(batch)
    for key, p in part.model.named_parameters():
        torch.testing.assert_close(whole.model.get_parameter(key).grad, p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_batch_without_any_label_moves_nothing(factory):
    tasks, model, (batch, *_) = tiny_tasks(), problem(), batches(1)
    absent = {n: torch.full_like(y, math.nan) for n, y in batch.targets.items()}
    Step(model, tasks, factory(tasks)).backward(Batch(batch.inputs, absent))
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("factory", [imtl_g, nash_mtl, aligned_mtl])
def test_decoders_are_not_weighted(factory):
    assert isinstance(factory(tiny_tasks()).decoder, Equal)


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_step_that_has_run_can_be_copied(factory):
    tasks, data = tiny_tasks(), batches(2)
    step = Step(problem(), tasks, factory(tasks))
    step.backward(data[0])
    copied = copy.deepcopy(step)
    first, second = (one.backward(data[1]).encoder_weights for one in (step, copied))
    assert first == second


def test_a_loss_in_single_precision_gives_weights_in_single_precision(given, sample):
    signals = given(gradients=torch.tensor(sample("random", 3, 0), dtype=torch.float32))
    signals.losses = signals.losses.float()
    for rule in RULES:
        weights = rule(tiny_tasks())(signals)
        assert weights.dtype == torch.float32
        assert np.isfinite(weights.detach().numpy()).all()
