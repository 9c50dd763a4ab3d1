"""Mixed precision and compiled modules give the gradients of plain float32, up to the precision asked for."""

import pytest
import torch
from sidetask_core import Batch, Combiner, Method, SplitModel, Step, Task, Weighting
from torch import nn


class Records(Weighting):
    """Weights from any signal, and a record of what was seen."""

    def __init__(self, tasks, at):
        super().__init__(tasks)
        self.at, self.seen = at, []

    def forward(self, signals):
        if self.at is None:
            self.seen.append(signals.losses)
            return torch.ones_like(signals.losses)
        self.seen.append(signals.gramian(self.at))
        return signals.norms(self.at) / signals.norms(self.at).sum()


class Sum(Combiner):
    def forward(self, signals):
        return signals.gradients(self.at).sum(0)


def setting(scale=1.0):
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    heads = {name: nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.GroupNorm(2, 4)) for name in ("a", "b")}
    tasks = [Task(name, lambda p, y: scale * (p - y).square()) for name in heads]
    batch = Batch(torch.randn(4, 3, 8, 8), {name: torch.randn(4, 4, 8, 8) for name in heads})
    return SplitModel(shared, heads), tasks, batch


def grads(model):
    return torch.cat([p.grad.flatten().float() for p in model.parameters()])


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0)


@pytest.mark.parametrize("at", [None, "features", "parameters"])
def test_bfloat16_autocast(at):
    model, tasks, batch = setting()
    rule = Records(tasks, at)
    Step(model, tasks, Method(encoder=rule)).backward(batch)
    plain = grads(model)
    model, tasks, batch = setting()
    half = Records(tasks, at)
    with torch.autocast("cpu", torch.bfloat16):
        report = Step(model, tasks, Method(encoder=half)).backward(batch)
    assert half.seen[0].dtype == torch.float32
    assert report.losses["a"].dtype == torch.float32
    torch.testing.assert_close(half.seen[0], rule.seen[0], rtol=0.03, atol=0.03 * rule.seen[0].abs().max().item())
    assert cosine(grads(model), plain) > 0.999
    torch.testing.assert_close(grads(model).norm(), plain.norm(), rtol=0.02, atol=0)


@pytest.mark.parametrize("at", [None, "features", "parameters"])
def test_a_grad_scaler_leaves_signals_unscaled_and_gradients_scaled(at):
    model, tasks, batch = setting()
    rule = Records(tasks, at)
    Step(model, tasks, Method(encoder=rule)).backward(batch)
    plain = grads(model)
    model, tasks, batch = setting()
    half = Records(tasks, at)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step = Step(model, tasks, Method(encoder=half))
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.float16):
        step.backward(batch, scaler=scaler)
    torch.testing.assert_close(half.seen[0], rule.seen[0], rtol=0.01, atol=0.01 * rule.seen[0].abs().max().item())
    torch.testing.assert_close(grads(model).norm(), 256 * plain.norm(), rtol=0.01, atol=0)
    scaler.unscale_(optimizer)
    assert cosine(grads(model), plain) > 0.999
    before = model.shared[0].weight.clone()
    scaler.step(optimizer)
    assert not torch.equal(before, model.shared[0].weight)


@pytest.mark.parametrize("at", ["features", "parameters"])
def test_a_scaled_combiner(at):
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=128.0)):
        model, tasks, batch = setting()
        Step(model, tasks, Method(encoder=Sum(tasks, at=at))).backward(batch, scaler=scaler)
        found.append(grads(model))
    torch.testing.assert_close(found[1], 128 * found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", [None, "features", "parameters"])
def test_an_overflow_is_left_to_the_scaler(at):
    model, tasks, batch = setting(scale=1e3)
    step = Step(model, tasks, Method(encoder=Records(tasks, at)))
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = [p.clone() for p in model.parameters()]
    with torch.autocast("cpu", torch.float16):
        report = step.backward(batch, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() < 2.0**24
    if at:
        assert report.encoder_weights["a"].isnan()


def test_rule_parameters_are_scaled_like_the_rest():
    class Learned(Weighting):
        def __init__(self, tasks):
            super().__init__(tasks)
            self.s = nn.Parameter(torch.zeros(len(self.tasks)))

        def forward(self, signals):
            return self.s.neg().exp()

        def objective(self, signals):
            return (self.s.neg().exp() * signals.losses + self.s).sum()

    model, tasks, batch = setting()
    rule = Learned(tasks)
    step = Step(model, tasks, Method(encoder=rule))
    report = step.backward(batch, scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    losses = torch.stack(list(report.losses.values()))
    torch.testing.assert_close(rule.s.grad, 64 * (1 - losses))


@pytest.mark.parametrize("at", [None, "features", "parameters"])
def test_compiled_encoder_and_heads(at):
    model, tasks, batch = setting()
    Step(model, tasks, Method(encoder=Records(tasks, at))).backward(batch)
    plain = grads(model)
    model, tasks, batch = setting()
    compiled = SplitModel(
        torch.compile(model.shared, backend="aot_eager"),
        {name: torch.compile(head, backend="aot_eager") for name, head in model.heads.items()},
    )
    Step(compiled, tasks, Method(encoder=Records(tasks, at))).backward(batch)
    torch.testing.assert_close(grads(model), plain, rtol=1e-4, atol=1e-6)


def test_code_compiled_before_a_step_is_compiled_again():
    """It might write over the buffers that further backward passes need (donated buffers)."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model, tasks, batch = setting()
    Step(model, tasks, Method(encoder=Records(tasks, "parameters"))).backward(batch)
    plain = grads(model)
    model, tasks, batch = setting()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    compiled_model = SplitModel(torch.compile(model.shared, backend=backend), dict(model.heads))
    compiled_model(batch.inputs)["a"].sum().backward()
    before = len(compiled)
    model.load_state_dict(state)
    model.zero_grad()
    Step(compiled_model, tasks, Method(encoder=Records(tasks, "parameters"))).backward(batch)
    assert len(compiled) > before > 0
    torch.testing.assert_close(grads(model), plain, rtol=1e-4, atol=1e-6)
