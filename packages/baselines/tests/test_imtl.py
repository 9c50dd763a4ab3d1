"""IMTL against its written definition."""

import copy

import pytest
import torch
from sidetask_baselines.imtl import IMTL, imtl
from sidetask_baselines.imtl_g import IMTLG
from sidetask_baselines.imtl_l import IMTLL
from sidetask_core import Equal, Method, Step
from sidetask_core.testing import batches, brute_force, conformance, problem, squared, tiny_tasks, train

TASKS = tiny_tasks()

TestIMTL = conformance(imtl)
TestIMTLAtParameters = conformance(imtl, at="parameters", init=-0.5)
TestIMTLOnThePapersScale = conformance(imtl, scale="paper")


def scaled(log_scale, **options):
    method = imtl(TASKS, **options)
    with torch.no_grad():
        method.decoder.double().log_scale.copy_(torch.tensor(log_scale))
    return method


@pytest.mark.parametrize("scale", ["sum", "paper"])
def test_the_scaled_gradients_are_weighted_by_imtl_g(given, scale):
    g = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method = scaled([0.5, -2.0, 1.0], scale=scale)
    scales = method.decoder(given()).detach()
    weights = method.encoder(given(gradients=g)).detach()
    of_scaled = IMTLG(TASKS, scale=scale)(given(gradients=scales[:, None] * g))
    torch.testing.assert_close(weights, scales * of_scaled)
    assert (weights / scales).sum() == pytest.approx(3 if scale == "sum" else 1)
    projections = (g / g.norm(dim=1, keepdim=True)) @ (weights @ g)
    torch.testing.assert_close(projections, projections.mean().expand(3))
    ratio = weights / IMTLG(TASKS)(given(gradients=g))
    torch.testing.assert_close(ratio, ratio[0].expand(3))


def test_decoders_are_weighted_by_the_scales_and_s_is_trained_once():
    method, (batch, *_) = scaled([0.5, -2.0, 1.0]), batches(1)
    step = Step(problem(), TASKS, method)
    report = step.backward(batch)
    scales = method.decoder.log_scale.detach().exp()
    assert torch.equal(torch.stack([*report.decoder_weights.values()]), scales)
    expected = brute_force(step.model, TASKS, batch, [*report.encoder_weights.values()], scales)
    for name, p in step.model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12)
    losses = torch.stack([squared(p, batch.targets[n]).mean() for n, p in step.model(batch.inputs).items()])
    torch.testing.assert_close(method.decoder.log_scale.grad, (scales * losses - 1).detach())


def test_there_is_one_s():
    step = Step(problem(), TASKS, imtl(TASKS))
    copied = copy.deepcopy(step).double()
    for one in (step, copied):
        assert one.encoder.losses is one.decoder
        own = set(one.parameters()) - set(one.model.parameters())
        assert own == {one.decoder.log_scale}
        assert [*one.rule_parameters()] == [one.decoder.log_scale]
        assert len([*one.parameters()]) == len([*one.model.parameters()]) + 1
    state = {name: value for name, value in step.state_dict().items() if name.endswith("log_scale")}
    assert {value.data_ptr() for value in state.values()} == {step.decoder.log_scale.data_ptr()}


@pytest.mark.parametrize("slots", ["encoder", "decoder", "both, of two methods"])
def test_a_slot_alone_trains_its_s(slots):
    """As in ``{encoder: imtl, decoder: equal}``; both slots of two methods run alike."""
    encoder = imtl(TASKS).encoder if slots != "decoder" else Equal(TASKS)
    decoder = imtl(TASKS).decoder if slots != "encoder" else Equal(TASKS)
    step = Step(problem(), TASKS, Method(encoder=encoder, decoder=decoder)).double()
    whole = Step(problem(), TASKS, imtl(TASKS)).double()
    for one in (step, whole):
        train(one, batches(3))
    found = [value for name, value in step.state_dict().items() if name.endswith("log_scale")]
    assert len(found) == (2 if slots.startswith("both") else 1)
    assert all(value.any() for value in found)
    if slots.startswith("both"):
        for value in found:
            torch.testing.assert_close(value, whole.decoder.log_scale.detach())


def test_the_s_of_a_task_without_labels_stays(given):
    method = scaled([0.5, -2.0, 1.0])
    signals = given((3.0, 0.0, 1.0), torch.eye(3, dtype=torch.float64), labelled=(True, False, True))
    method.encoder.objective(signals).backward()
    assert method.decoder.log_scale.grad[1] == 0
    assert method.encoder(signals)[1] == 0


def test_scales_of_other_tasks_are_refused():
    with pytest.raises(ValueError, match="losses scales the tasks c, b, a, not a, b, c"):
        IMTL(TASKS, losses=IMTLL(TASKS[::-1]))
