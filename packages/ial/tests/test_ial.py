"""IAL against the paper's equations written out, and where they end."""

import functools
import math

import pytest
import torch
from sidetask_core import (
    Batch,
    Equal,
    Fixed,
    Method,
    MissingKey,
    SplitModel,
    Step,
    Task,
    Uncertainty,
    Weighting,
)
from sidetask_core.plugins import installed, make_method
from sidetask_core.testing import (
    SPLITS,
    batches,
    brute_force,
    close,
    conformance,
    gradients,
    in_two_processes,
    labelled,
    problem,
    squared,
    tiny_tasks,
    train,
)
from sidetask_ial import ImpartialEncoder
from sidetask_ial.ial import ial
from torch import nn


def encoder_alone(tasks, **options):
    """The encoder's half, which then learns σ for itself."""
    return Method(encoder=ImpartialEncoder(tasks, **options), decoder=Equal(tasks))


def decoder_alone(tasks):
    """The decoder's half."""
    return Method(encoder=Equal(tasks), decoder=Uncertainty(tasks))


TestIAL = conformance(ial)
TestEncoder = conformance(encoder_alone)
TestDecoder = conformance(decoder_alone)
TestOwnInit = conformance(ial, init=-3.0, activation="softplus")
TestSpeed = conformance(ial, measure="speed")
TestNorm = conformance(ial, measure="norm")
TestCosine = conformance(ial, measure="cosine", init=-2.0)
TestGradientNormOnly = conformance(ial, measure=1.0)
TestUncertaintyOnly = conformance(encoder_alone, align=False)

MEASURES = ("uncertainty", "speed", "norm", "cosine", 0.7)


def tasks_with(primaries="a", scales=(1.0, 1.0, 1.0), **options):
    """The tiny tasks with other primaries, and with losses in other units."""
    return [
        Task(n, functools.partial(scaled, k), valid=labelled, primary=n in primaries, **options)
        for n, k in zip("abc", scales, strict=True)
    ]


def scaled(k, prediction, target):
    return k * squared(prediction, target)


def with_sigma(tasks, sigma, **options):
    """The method, at these σ."""
    method = ial(tasks, **options)
    method.decoder.double()
    with torch.no_grad():
        method.decoder.log_variance.copy_(2 * torch.as_tensor(sigma, dtype=torch.float64).log())
    return method


def task_gradients(model, tasks, batch):
    """Losses, features and the tasks' gradients there, flattened, by plain autograd."""
    features = model.encode(batch.inputs)
    predictions = model.decode(features)
    losses = [task.mean(predictions[task.name], batch.target_of(task))[0] for task in tasks]
    rows = [torch.autograd.grad(loss, features, retain_graph=True)[0].flatten() for loss in losses]
    return losses, features, torch.stack(rows)


def written_out(model, tasks, batch, sigma, g=torch.relu):
    """The gradients of all parameters and of σ, from the paper's two equations."""
    sigma = torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
    losses, features, rows = task_gradients(model, tasks, batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    decoder = sum(loss / (2 * sigma[t] ** 2) + sigma[t].log() for t, loss in enumerate(losses))
    found = dict(zip(names, torch.autograd.grad(decoder, parameters, retain_graph=True), strict=True))
    (of_sigma,) = torch.autograd.grad(decoder, sigma, retain_graph=True)
    primary = sum(row for row, task in zip(rows, tasks, strict=True) if task.primary)
    total = primary.clone()
    for t, task in enumerate(tasks):
        if not task.primary:
            f = min(1.0, g(1 - sigma[t].detach()).item())
            total += f * (primary.norm() / rows[t].norm()) * rows[t]
    shared = [n for n in names if n.startswith("shared.")]
    above = torch.autograd.grad(features, [model.get_parameter(n) for n in shared], total.view_as(features))
    return found | dict(zip(shared, above, strict=True)), of_sigma


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("primaries", ["a", "b", "ac", "abc"])
def test_gradients_are_those_of_the_papers_equations(split, primaries):
    tasks, sigma = tasks_with(primaries, (1.0, 30.0, 0.02)), (0.6, 0.05, 0.9)
    for batch in batches(3):
        step = Step(problem(split), tasks, with_sigma(tasks, sigma))
        step.backward(batch)
        expected, of_sigma = written_out(problem(split), tasks, batch, sigma)
        for name, found in gradients(step.model).items():
            close(found, expected[name], f"{split}: {name}", rtol=1e-10)
        # σ is trained as s = log σ², and ∂/∂s = (σ/2) ∂/∂σ.
        close(step.decoder.log_variance.grad, of_sigma * torch.tensor(sigma, dtype=torch.float64) / 2, "σ", rtol=1e-10)


@pytest.mark.parametrize(
    ("activation", "g"),
    [
        ("softplus", lambda x: (1 + x.exp()).log()),
        ("sigmoid", lambda x: 1 / (1 + (-x).exp())),
        (lambda x: x.square(), torch.square),
    ],
)
def test_any_function_of_one_minus_sigma(activation, g):
    tasks, sigma, (batch, *_) = tiny_tasks(), (0.5, 0.2, 1.7), batches(1)
    step = Step(problem(), tasks, with_sigma(tasks, sigma, activation=activation))
    step.backward(batch)
    expected, _ = written_out(problem(), tasks, batch, sigma, g)
    for name, found in gradients(step.model).items():
        close(found, expected[name], name)


def shares(sigma, scales, batch, primaries="a"):
    """What each weighted auxiliary gradient measures, the primaries' sum being 1."""
    tasks = tasks_with(primaries, scales)
    step = Step(problem(), tasks, with_sigma(tasks, sigma))
    report = step.backward(batch)
    _, _, rows = task_gradients(problem(), tasks, batch)
    primary = sum(row for row, task in zip(rows, tasks, strict=True) if task.primary)
    return {
        task.name: (report.encoder_weights[task.name] * row.norm() / primary.norm()).item()
        for task, row in zip(tasks, rows, strict=True)
        if not task.primary
    }


def test_no_auxiliary_gradient_is_longer_than_the_primarys():
    """So that of A auxiliary tasks, the primary keeps at least a share of 1 / (1 + A) of the lengths."""
    drawn = torch.Generator().manual_seed(0)
    least = 1.0
    for batch in batches(10):
        sigma = (2 * torch.rand(3, generator=drawn, dtype=torch.float64)).tolist()
        scales = (10 ** (8 * torch.rand(3, generator=drawn) - 4)).tolist()
        found = shares(sigma, scales, batch)
        assert all(0 <= share <= 1 + 1e-12 for share in found.values())
        assert found == pytest.approx({n: max(0.0, 1 - s) for n, s in zip("bc", sigma[1:], strict=True)})
        least = min(least, 1 / (1 + sum(found.values())))
        assert least >= 1 / 3
    # The bound is met where both are known for certain.
    certain = pytest.approx({"b": 1.0, "c": 1.0}, abs=4e-4)
    assert shares((0.5, 1e-8, 1e-8), (1.0, 1.0, 1.0), batches(1)[0]) == certain
    assert shares((0.5, 1e-8, 1e-8), (1.0, 1.0, 1.0), batches(1)[0], "ac") == pytest.approx({"b": 1.0}, abs=4e-4)


@pytest.mark.parametrize("k", [1e-6, 0.3, 50.0, 1e6])
@pytest.mark.parametrize("measure", ["uncertainty", "speed", "cosine", 0.7])
def test_the_unit_of_an_auxiliary_loss_does_not_reach_the_encoder(measure, k):
    """At the same σ, that is: σ² will settle at the loss in its new unit."""
    found = []
    for scales in ((1.0, 1.0, 1.0), (1.0, k, 1.0)):
        tasks = tasks_with("a", scales)
        step = Step(problem(), tasks, with_sigma(tasks, (0.5, 0.2, 0.4), measure=measure))
        for batch in batches(3):
            step.zero_grad()
            step.backward(batch)
        found.append({n: g for n, g in gradients(step.model).items() if n.startswith("shared")})
    for name, gradient in found[0].items():
        close(found[1][name], gradient, name)


def test_trained_to_the_end_sigma_knows_the_loss():
    """σ² = L is where the objective is stationary, for every task in its own unit."""
    tasks, (batch, *_) = tasks_with("a", (1.0, 100.0, 0.01)), batches(1)
    # From above, where the slope is gentle.
    method = with_sigma(tasks, (5.0, 50.0, 0.5))
    step = Step(problem(), tasks, method)
    optimizer = torch.optim.SGD(method.decoder.parameters(), lr=1.0)
    for _ in range(60):
        step.zero_grad()
        report = step.backward(batch)
        optimizer.step()
    losses = torch.stack([*report.losses.values()])
    close(method.decoder.sigma().square(), losses, "σ²", rtol=1e-6)
    assert method.decoder.log_variance.grad.abs().max() < 1e-6


class Counted(nn.Module):
    """Counts forward and backward passes."""

    def __init__(self, inner, counts, kind):
        super().__init__()
        self.inner, self.counts, self.kind = inner, counts, kind

    def forward(self, x):
        self.count("forward")
        out = self.inner(x)
        if out.requires_grad:
            out.register_hook(lambda g: self.count("backward"))
        return out

    def count(self, way):
        key = self.kind, way
        self.counts[key] = self.counts.get(key, 0) + 1


@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("primaries", [1, 2])
@pytest.mark.parametrize("measure", MEASURES, ids=str)
@pytest.mark.parametrize("build", [ial, encoder_alone])
def test_one_plain_backward_pass_whatever_is_measured(build, measure, primaries, count):
    names = [f"t{i}" for i in range(count)]
    tasks = [Task(name, squared, primary=i < primaries) for i, name in enumerate(names)]
    plain, counts = problem(names=names), {}
    model = SplitModel(
        Counted(plain.shared, counts, "encoder"), {n: Counted(h, counts, "head") for n, h in plain.heads.items()}
    )
    step = Step(model, tasks, build(tasks, measure=measure))
    for batch in batches(2, names=names):
        counts.clear()
        step.backward(batch)
        assert counts == {
            ("encoder", "forward"): 1,
            ("encoder", "backward"): 1,
            ("head", "forward"): count,
            ("head", "backward"): count,
        }


@pytest.mark.parametrize("primaries", [1, 2])
@pytest.mark.parametrize("measure", ["uncertainty", "speed", "norm", 1.0], ids=str)
def test_inner_products_are_not_asked_for(measure, primaries):
    """T² of them would cost more than all the rest of the rule."""

    class Signals:
        tasks = tuple("abc")
        losses, labelled = torch.ones(3), torch.ones(3, dtype=torch.bool)

        def norms(self, at):
            assert at == "features"
            return torch.ones(3)

        def norm_of_sum(self, weights, at):
            assert primaries > 1, "one primary's norm is among the norms"
            assert at == "features"
            return torch.tensor(1.5)

    rule = ImpartialEncoder(tasks_with("abc"[:primaries]), measure=measure)
    found = rule(Signals())
    assert found[0] == 1
    assert (found[primaries:] > 0).all()


def measured(rule, signals):
    """The weights of b and c: what the measure says, where all gradients are of one length."""
    return rule(signals)[1:].tolist()


class Given:
    """Signals with given losses and gradients of unit features."""

    def __init__(self, losses=(1.0, 1.0, 1.0), rows=((1.0, 0.0), (1.0, 0.0), (1.0, 0.0)), labels=(True,) * 3):
        self.tasks = tuple("abc")
        self.losses = torch.tensor(losses, dtype=torch.float64)
        self.rows = torch.tensor(rows, dtype=torch.float64)
        self.labelled = torch.tensor(labels)

    def norms(self, at):
        return self.rows.norm(dim=1)

    def norm_of_sum(self, weights, at):
        return (weights.to(self.rows) @ self.rows).norm()

    def gramian(self, at):
        return self.rows @ self.rows.T


def test_speed_is_how_far_the_primary_has_fallen_beside_a_task():
    rule = ImpartialEncoder(tiny_tasks(), measure="speed")
    assert measured(rule, Given((4.0, 10.0, 3.0))) == [1, 1]
    # The primary is at a half, b at a tenth, c still at the start.
    assert measured(rule, Given((2.0, 1.0, 3.0))) == [1, 0.5]
    # Worse than at the start, and without labels: it keeps where it began.
    assert measured(rule, Given((2.0, 20.0, 0.0), labels=(True, True, False)))[0] == 0.25
    assert measured(rule, Given((1.0, 10.0, 6.0))) == [0.25, 0.125]
    both = ImpartialEncoder(tasks_with("ab"), measure="speed")
    both(Given((4.0, 6.0, 8.0)))
    assert both(Given((1.0, 4.0, 8.0)))[2].item() == pytest.approx((1 + 4) / (4 + 6) * math.hypot(2, 0))


def test_a_task_without_labels_at_first_starts_when_they_come():
    rule = ImpartialEncoder(tiny_tasks(), measure="speed")
    assert measured(rule, Given((4.0, 0.0, 3.0), labels=(True, False, True))) == [0, 1]
    assert measured(rule, Given((2.0, 8.0, 3.0))) == [0.5, 0.5]
    assert measured(rule, Given((1.0, 4.0, 3.0))) == [0.5, 0.25]
    without = Given((0.0, 4.0, 3.0), labels=(False, True, True), rows=((0.0, 0.0), (1.0, 0.0), (1.0, 0.0)))
    assert measured(rule, without) == [0, 0]


def test_expected_norms_are_means_over_the_steps_that_had_gradients():
    rule = ImpartialEncoder(tiny_tasks(), measure="norm", align=False)
    lengths = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    lengths[2, 2] = 0
    for i in range(5):
        found = rule(Given(rows=[[x, 0.0] for x in lengths[i].tolist()]))
        decay = 0.99 ** torch.arange(i, -1, -1, dtype=torch.float64)[:, None] * (lengths[: i + 1] > 0)
        mean = (decay * lengths[: i + 1]).sum(0) / decay.sum(0)
        assert found.tolist() == pytest.approx((mean[0] / mean).clamp(max=1).tolist())


def test_a_cosine_is_to_the_sum_of_the_primaries():
    rows = ((1.0, 0.0), (0.0, 1.0), (3.0, 4.0))
    rule = ImpartialEncoder(tasks_with("ab"), measure="cosine", align=False)
    assert rule(Given(rows=rows))[2].item() == pytest.approx(7 / (5 * math.sqrt(2)))
    rule = ImpartialEncoder(tiny_tasks(), measure="cosine", align=False)
    assert rule(Given(rows=((1.0, 0.0), (-1.0, 0.5), (3.0, 4.0)))).tolist() == pytest.approx([1, 0, 0.6])


def test_fixed_measures_and_functions():
    rows = ((2.0, 0.0), (1.0, 0.0), (0.0, 8.0))
    for measure, align, expected in (
        (0.5, False, [1, 0.5, 0.5]),
        ({"b": 0.1, "c": 3}, False, [1, 0.1, 3]),
        ({"b": 0.1, "c": 3}, True, [1, 0.2, 0.75]),
        (1, True, [1, 2, 0.25]),
        (lambda signals: signals.losses / 4, True, [1, 1.0, 0.0625]),
    ):
        rule = ImpartialEncoder(tiny_tasks(), measure=measure, align=align)
        assert rule(Given((1.0, 2.0, 1.0), rows=rows)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (0.5, TypeError, r"measure gives a floating tensor \[3\], found float"),
        (torch.ones(3, dtype=torch.long), TypeError, r"measure gives a floating tensor \[3\], found torch.int64"),
        (torch.ones(2), ValueError, r"measure gives a tensor \[3\], found \[2\]"),
        (torch.tensor(0.5), ValueError, r"measure gives a tensor \[3\], found \[\]"),
    ],
    ids=str,
)
def test_a_function_that_gives_something_else(found, error, message):
    rule = ImpartialEncoder(tiny_tasks(), measure=lambda signals: found)
    with pytest.raises(error, match=message):
        rule(Given())


def test_what_a_function_gives_is_cut():
    rows = ((2.0, 0.0), (1.0, 0.0), (0.0, 8.0))
    for found, expected in (((9.0, 3.0, -1.0), [1, 2, 0]), ((math.nan, math.nan, math.inf), [1, 0, 0.25])):
        rule = ImpartialEncoder(tiny_tasks(), measure=lambda signals, found=found: torch.tensor(found))
        assert rule(Given(rows=rows)).tolist() == expected
    rule = with_sigma(tiny_tasks(), (1.0, 0.5, 3.0), activation=lambda x: 4 * x, align=False).encoder
    assert rule(Given(rows=rows)).tolist() == pytest.approx([1, 1, 0])


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_without_labels_there_is_nothing_to_weigh(measure, align):
    """Whatever features of a batch would give; no gradient has to be looked at for it."""
    ordinary = (1.0, 1.0)
    for labels, expected in (((True, True, False), [1, 0]), ((False, True, True), [0, 0])):
        rule = ImpartialEncoder(tiny_tasks(), measure=measure, align=align)
        found = rule(Given(rows=(ordinary,) * 3, labels=labels))
        assert found[0] == 1
        assert [int(w > 0) for w in found[1:]] == expected
    both = ImpartialEncoder(tasks_with("ab"), measure=measure, align=align)
    assert (both(Given(rows=(ordinary,) * 3, labels=(False, True, True))) > 0).all()
    assert both(Given(rows=(ordinary,) * 3, labels=(False, False, True)))[2] == 0


def test_uncertainty_without_alignment_is_f():
    tasks = tiny_tasks()
    encoder = with_sigma(tasks, (3.0, 0.25, 1.5), align=False).encoder
    assert encoder(Given(rows=((2.0, 0.0), (1.0, 0.0), (0.0, 8.0)))).tolist() == pytest.approx([1, 0.75, 0])


@pytest.mark.parametrize("measure", MEASURES, ids=str)
@pytest.mark.parametrize("primaries", ["a", "ab"])
def test_gradients_of_no_length(measure, primaries):
    rule = ImpartialEncoder(tasks_with(primaries), measure=measure)
    ordinary, zero = (1.0, 1.0), (0.0, 0.0)
    assert rule(Given(rows=(ordinary, ordinary, zero)))[2] == 0
    assert rule(Given(rows=(zero, zero, ordinary)))[2] == 0
    found = rule(Given(rows=((1e-300, 0.0), ordinary, (1e-300, 0.0))))
    assert found.isfinite().all()
    # Primaries that cancel each other have no gradient either.
    if primaries == "ab":
        assert rule(Given(rows=(ordinary, (-1.0, -1.0), ordinary)))[2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("measure", MEASURES, ids=str)
@pytest.mark.parametrize(
    "scales",
    [(1e-6, 1e6, 1.0), (1e6, 1e-6, 1.0), (1e6, 0.0, 1e-30), (0.0, 1.0, 1e6), (1e25, 1e25, 1.0), (1.0, 1e25, 1e25)],
)
def test_extreme_units_of_losses_and_of_sigma_stay_finite(scales, measure, dtype):
    for sigma in (0.5, 1e-30, 1e30):
        tasks = tasks_with("a", scales)
        step = Step(problem(dtype=dtype), tasks, with_sigma(tasks, (sigma,) * 3, measure=measure)).to(dtype)
        for batch in batches(2, dtype=dtype):
            step.zero_grad()
            report = step.backward(batch)
            assert all(g.isfinite().all() for g in gradients(step).values())
            assert all(w.isfinite() for w in report.encoder_weights.values())
            assert report.encoder_weights["a"] == 1
            if measure == "uncertainty":
                seen = 1e-20 < scales[2] < 1e20 or dtype == torch.float64
                assert (report.encoder_weights["c"] > 0) == (sigma < 1 and 0 not in (scales[0], scales[2]) and seen)


def test_a_batch_without_labels_of_the_primary_leaves_the_encoder_alone():
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    step = Step(problem(), tasks, ial(tasks))
    step.backward(Batch(batch.inputs, {**batch.targets, "a": None}))
    found = gradients(step.model)
    assert all((g == 0).all() for n, g in found.items() if n.startswith(("shared", "heads.a")))
    assert all(g.any() for n, g in found.items() if n.startswith(("heads.b", "heads.c")))


def test_of_several_primaries_one_without_labels_is_left_out():
    tasks, (batch, *_) = tasks_with("ab"), batches(1)
    absent = Batch(batch.inputs, {**batch.targets, "a": None})
    sigma = (0.5, 0.4, 0.3)
    step = Step(problem(), tasks, with_sigma(tasks, sigma))
    step.backward(absent)
    rest = tasks[1:]
    alone = Step(problem().restricted_to("bc"), rest, with_sigma(rest, sigma[1:]))
    alone.backward(batch)
    for name, gradient in gradients(alone.model).items():
        close(step.model.get_parameter(name).grad, gradient, name)


@pytest.mark.parametrize("primaries", ["a", "ab"])
def test_tasks_with_inputs_of_their_own(primaries):
    """Features of other inputs are other features, and lengths are over all of them."""
    (batch, *_) = batches(1)
    tasks = [Task(n, squared, input=n, primary=n in primaries) for n in "abc"]
    batch = Batch({n: batch.inputs * (i + 1) for i, n in enumerate("abc")}, batch.targets)
    sigma = (0.5, 0.4, 0.3)
    step = Step(problem(), tasks, with_sigma(tasks, sigma))
    report = step.backward(batch)
    norms = {}
    for task in tasks:
        one = Batch(batch.inputs[task.name], batch.targets)
        norms[task.name] = task_gradients(problem(), [task], one)[2].norm().item()
    primary = math.hypot(*(norms[n] for n in primaries))
    for name, s in zip("abc", sigma, strict=True):
        expected = 1 if name in primaries else (1 - s) * primary / norms[name]
        assert report.encoder_weights[name].item() == pytest.approx(expected)


def two_primaries(rank, world):
    """A run on one process's share of every batch."""
    tasks = tasks_with("ac")
    step = Step(problem(), tasks, with_sigma(tasks, (0.5, 0.4, 0.3)))
    share = [Batch(b.inputs[rank::world], {n: y[rank::world] for n, y in b.targets.items()}) for b in batches(4)]
    reports = train(step, share)
    return torch.stack([w for report in reports for w in report.encoder_weights.values()])


def test_two_primaries_in_two_processes():
    whole = two_primaries(0, 1)
    for half in in_two_processes(two_primaries):
        close(half, whole, "weights")


def test_both_halves_share_one_uncertainty():
    tasks = tiny_tasks()
    softly = {
        "encoder": {"name": "ial", "activation": "softplus", "init": 2.0},
        "decoder": {"name": "ial", "init": -3.0},
    }
    for spec in ("ial", {"encoder": "ial", "decoder": {"name": "ial"}}, softly):
        method = make_method(spec, tasks)
        assert method.encoder.uncertainty is method.decoder
        step = Step(problem(), tasks, method)
        assert list(step.rule_parameters()) == [method.decoder.log_variance]
    assert (method.decoder.log_variance == -3).all()
    cosine = make_method({"encoder": {"name": "ial", "measure": "cosine"}, "decoder": "ial"}, tasks)
    assert cosine.encoder.uncertainty is None
    assert {name: home for name, home in installed("methods").items() if name == "ial"} == {"ial": "sidetask-ial"}


SLOTS = {"encoder": {"name": "ial", "activation": "softplus"}, "decoder": "ial"}


@pytest.mark.parametrize("spec", ["ial", SLOTS], ids=["whole", "slots"])
def test_a_shared_uncertainty_resumes_as_one_bit_for_bit(tmp_path, spec):
    tasks, data = tiny_tasks(), batches(6)

    def start():
        step = Step(problem(), tasks, make_method(spec, tasks))
        return step, torch.optim.Adam(step.parameters(), lr=0.01)

    (whole, its_optimizer), (half, half_optimizer), (resumed, optimizer) = start(), start(), start()
    train(whole, data, its_optimizer)
    train(half, data[:3], half_optimizer)
    torch.save([half.state_dict(), half_optimizer.state_dict()], tmp_path / "state.pt")
    state, of_optimizer = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state)
    optimizer.load_state_dict(of_optimizer)
    train(resumed, data[3:], optimizer)
    assert resumed.encoder.uncertainty is resumed.decoder
    for (name, found), expected in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert not torch.equal(resumed.decoder.log_variance, half.decoder.log_variance)


def test_beside_a_decoder_without_uncertainty_the_encoder_learns_the_same_sigma():
    tasks, data = tiny_tasks(), batches(6)
    steps = [Step(problem(), tasks, build(tasks)) for build in (ial, encoder_alone)]
    for step in steps:
        # Only σ learns, so that both see the same losses.
        train(step, data, torch.optim.SGD(step.rule_parameters(), lr=0.1))
    found = [step.encoder.uncertainty.log_variance for step in steps]
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.full_like(found[0], -0.7))


class Guess(Weighting):
    """A rule of another hand that says how uncertain it is."""

    def forward(self, signals):
        return torch.full_like(signals.losses, 2.0)

    def sigma(self):
        return torch.tensor([0.9, 0.25, 0.5], dtype=torch.float64)


def test_any_rule_with_an_uncertainty_serves():
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    guess = Guess(tasks)
    method = Method(encoder=ImpartialEncoder(tasks, uncertainty=guess), decoder=guess)
    step = Step(problem(), tasks, method)
    report = step.backward(batch)
    assert list(step.rule_parameters()) == []
    _, _, rows = task_gradients(problem(), tasks, batch)
    lengths = rows.norm(dim=1)
    for t, f in ((1, 0.75), (2, 0.5)):
        assert report.encoder_weights["abc"[t]].item() == pytest.approx((f * lengths[0] / lengths[t]).item())
    assert report.decoder_weights["b"] == 2


def test_a_broken_head_under_this_method_and_under_any_other():
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    for spec in (
        {"name": "ial", "frozen": ["c"]},
        {"augment": {"name": "ial", "frozen": ["c"]}, "encoder": "ial", "decoder": "ial"},
    ):
        step = Step(problem(), tasks, make_method(spec, tasks))
        step.backward(batch)
        assert step.model.heads["c"].weight.grad is None
        assert step.model.heads["b"].weight.grad.any()
        assert step.encoder.uncertainty is step.decoder
    assert ial(tasks).augment is None


def test_a_primary_alone_is_trained_as_ever():
    tasks, (batch, *_) = tasks_with("abc"), batches(1)
    step = Step(problem(), tasks, ial(tasks))
    report = step.backward(batch)
    ones, decoder = torch.ones(3), [*report.decoder_weights.values()]
    for name, expected in brute_force(problem(), tasks, batch, ones, decoder).items():
        close(step.model.get_parameter(name).grad, expected, name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measure": "sigma"}, ValueError, "measure must be one of uncertainty, speed, norm, cosine, a number"),
        ({"measure": True}, ValueError, "not True"),
        ({"measure": -0.5}, ValueError, "fixed weight of 'b' must be finite and at least 0, not -0.5"),
        ({"measure": {"b": 1.0}}, MissingKey, "'c' has no fixed weight; the auxiliary tasks are: b, c"),
        ({"measure": {"a": 1, "b": 1, "c": 1}}, MissingKey, "'a' is no auxiliary task; the auxiliary tasks are: b, c"),
        ({"activation": "relu6"}, ValueError, "activation must be one of relu, softplus, sigmoid or a function"),
        ({"align": "off"}, ValueError, "align is true or false, not 'off'"),
        ({"measure": math.nan}, ValueError, "fixed weight of 'b' must be finite, not nan"),
        ({"measure": {"b": "x", "c": 1}}, TypeError, "fixed weight of 'b' is a number, not 'x'"),
        ({"init": math.nan}, ValueError, "init must be finite, not nan"),
        ({"init": "low"}, TypeError, "init is a number, not 'low'"),
        ({"activation": lambda x: x * math.nan}, ValueError, r"activation gives \[nan, nan, nan, nan\] for 1 − σ = "),
        ({"activation": lambda x: x[:2]}, ValueError, r"activation gives a tensor \[4\], found \[2\]"),
        ({"activation": lambda x: 0.5}, TypeError, r"activation gives a floating tensor \[4\], found float"),
        ({"frozen": "c"}, TypeError, "heads to freeze are a list of tasks' names, found 'c'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ial(tiny_tasks(), **options)


def test_bad_rules_are_named():
    tasks = tiny_tasks()
    with pytest.raises(TypeError, match=r"Fixed does not say how uncertain it is: it has no sigma\(\)"):
        ImpartialEncoder(tasks, uncertainty=Fixed(tasks, dict.fromkeys("abc", 1.0)))
    with pytest.raises(ValueError, match="the uncertainty is of tasks c, b, a, not of a, b, c"):
        ImpartialEncoder(tasks, uncertainty=Uncertainty(tasks[::-1]))
    with pytest.raises(ValueError, match="at least one task with primary=True; auxiliary are all of: a, b"):
        ial([Task(name, squared, primary=False) for name in "ab"])
