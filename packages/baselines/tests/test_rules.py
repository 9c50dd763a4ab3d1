"""Each rule against its written definition."""

import math

import pytest
import torch
from sidetask_baselines import DWA, MGDA, RLW, CAGrad, GradDrop, PCGrad, SolverFailure
from sidetask_baselines.graddrop import pick_sign
from sidetask_core import Batch, Method, MissingKey, SplitModel, Step, Task, plugins
from sidetask_core.testing import batches, problem, squared, tiny_tasks, train
from torch import nn


def gradients(seed=0, count=3, size=8):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TASKS = tiny_tasks()
LOSSES = ("uncertainty", "dwa", "rlw", "imtl-l", "atw", "puw", "famo", "gradnorm")
GRADIENTS = (
    "pcgrad",
    "cagrad",
    "mgda",
    "imtl-g",
    "graddrop",
    "pareto-mtl",
    "nash-mtl",
    "aligned-mtl",
    "gcs",
    "ol-aux",
)


def test_entry_points_are_found_and_known_to_core():
    names = {name for name, home in plugins.installed("methods").items() if home == "sidetask-baselines"}
    assert names == set(plugins._HOMES["methods"]["sidetask-baselines"].split())
    assert names >= {*LOSSES, *GRADIENTS, "equal", "fixed", "per-objective-uncertainty", "imtl", "torchjd"}
    needed = {"fixed": {"weights": dict.fromkeys("abc", 1.0)}, "torchjd": {"aggregator": "UPGrad"}}
    for name in names:
        assert isinstance(plugins.make_method({"name": name, **needed.get(name, {})}, TASKS), Method)


def test_dwa_by_hand(given):
    rule = DWA(TASKS)
    epochs = [
        [(4.0, 4.0, 4.0), (2.0, 4.0, 0.0)],
        [(1.0, 4.0, 1.0), (2.0, 4.0, 3.0)],
        [(9.0, 9.0, 9.0)] * 2,
        [(1.0,) * 3],
    ]
    found = [[rule(given(losses, epoch=e)) for losses in steps] for e, steps in enumerate(epochs)]
    for step in (*found[0], *found[1]):
        assert step.tolist() == [1, 1, 1]
    for step, ratios in zip(
        (found[2][0], found[2][1], found[3][0]), [[0.5, 1, 1], [0.5, 1, 1], [6, 2.25, 4.5]], strict=True
    ):
        expected = 3 * (torch.tensor(ratios, dtype=torch.float64) / 2).softmax(0)
        torch.testing.assert_close(step, expected)
        assert step.sum() == pytest.approx(3)


def test_dwa_counts_steps_or_epochs(given):
    by_step, by_epoch = DWA(TASKS, window=2), DWA(TASKS)
    for i in range(8):
        losses = (1.0 + i, 2.0, 3.0 / (1 + i))
        a, b = by_step(given(losses, iteration=i)), by_epoch(given(losses, epoch=i // 2))
        assert torch.equal(a, b)


def test_dwa_averages_over_the_steps_with_labels(given):
    """A constant loss stands still, however many batches have labels."""
    rule = DWA(TASKS)
    for epoch, labelled in enumerate([(1, 1, 0, 0), (1, 0, 0, 0), (1,)]):
        for has in labelled:
            losses = (2.0, 3.0 if has else 0.0, 1.0)
            weights = rule(given(losses, epoch=epoch, labelled=(True, bool(has), True)))
    torch.testing.assert_close(weights, torch.ones(3, dtype=torch.float64))


ALIKE = {*LOSSES, *GRADIENTS, "imtl", "equal"} - {"rlw", "pcgrad"}


@pytest.mark.parametrize("name", sorted(ALIKE))
@pytest.mark.parametrize("how", ["nan", "none"])
def test_a_task_without_labels_is_as_if_it_were_not_there(name, how):
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    absent = None if how == "none" else torch.full_like(batch.targets["b"], math.nan)
    whole = Step(problem(), tasks, plugins.make_method(name, tasks))
    whole.backward(Batch(batch.inputs, {**batch.targets, "b": absent}))
    rest = [tasks[0], tasks[2]]
    part = Step(problem().restricted_to(["a", "c"]), rest, plugins.make_method(name, rest))
    part.backward(batch)
    for key, p in part.model.named_parameters():
        torch.testing.assert_close(whole.model.get_parameter(key).grad, p.grad, rtol=1e-9, atol=1e-12)


def test_pcgrad_refuses_what_is_not_finite_and_passes_over_what_has_no_length(given):
    bad = gradients()
    bad[0, 0] = math.nan
    with pytest.raises(SolverFailure, match="not finite"):
        PCGrad(TASKS)(given(gradients=bad))
    tiny = torch.tensor([[1e4, 0.0], [-1e-24, 0.0], [0.0, 1.0]], dtype=torch.float32)
    assert PCGrad(TASKS)(given(gradients=tiny)).isfinite().all()


def test_dwa_of_a_task_without_loss_stands_still(given):
    rule = DWA(TASKS, window=1)
    for i in range(3):
        weights = rule(given((1.0, 0.0, 1.0), iteration=i))
    torch.testing.assert_close(weights, torch.ones(3, dtype=torch.float64))


def test_rlw_weights_are_positive_sum_to_the_tasks_and_change(given):
    rule, paper = RLW(TASKS, seed=1), RLW(TASKS, seed=1, scale="paper")
    first, second = rule(given()), rule(given())
    assert (first > 0).all()
    assert first.sum() == pytest.approx(3)
    assert not torch.equal(first, second)
    torch.testing.assert_close(3 * paper(given()), first)


def test_an_absent_task_has_no_share_of_random_weights(given):
    for scale, total in (("sum", 2.0), ("paper", 1.0)):
        whole, part = (RLW(TASKS, seed=1, scale=scale)(given(labelled=seen)) for seen in (None, (True, False, True)))
        assert part[1] == 0
        assert part.sum() == pytest.approx(total)
        torch.testing.assert_close(part[0] / part[2], whole[0] / whole[2])


def test_dwa_weighs_beside_a_task_that_never_has_labels_as_without_it(given):
    whole, part = DWA(TASKS, window=2), DWA([TASKS[0], TASKS[2]], window=2)
    for i in range(8):
        losses = (1.0 + i, 3.0 / (1 + i))
        among = whole(given((losses[0], 0.0, losses[1]), iteration=i, labelled=(True, False, True)))
        assert among[1] == 0
        torch.testing.assert_close(among[[0, 2]], part(given(losses, iteration=i)))


@pytest.mark.parametrize("normalization", ["loss", "loss+"])
def test_mgda_compares_the_gradient_of_a_loss_that_is_not_positive_as_it_is(given, normalization):
    g = gradients()
    for loss in (0.0, -3.0):
        found = MGDA(TASKS, normalization=normalization)(given((2.0, loss, 4.0), g))
        torch.testing.assert_close(found, MGDA(TASKS, normalization=normalization)(given((2.0, 1.0, 4.0), g)))


def test_rlw_is_the_softmax_of_standard_normals(given):
    rule = RLW(TASKS)
    logs = torch.stack([rule(given()).log() for _ in range(4000)])
    differences = (logs[:, 0] - logs[:, 1]).double()
    assert differences.mean().abs() < 0.1
    assert differences.std() == pytest.approx(math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("normalization", ["none", "norm", "loss", "loss+"])
def test_mgda_normalizes_before_comparing_and_scales_to_the_sum(normalization, given):
    g, losses = gradients() * torch.tensor([[1.0], [10.0], [0.1]]), (0.5, 4.0, 2.0)
    divisor = torch.ones(3, dtype=torch.float64)
    if "loss" in normalization:
        divisor = torch.tensor(losses, dtype=torch.float64)
    if normalization in ("norm", "loss+"):
        divisor = divisor * g.norm(dim=1)
    w = MGDA(TASKS, normalization=normalization)(given(losses, g)) / 3
    assert w.sum() == pytest.approx(1)
    scaled = g / divisor[:, None]
    p = w @ scaled
    miss = (scaled @ p - p @ p) / (p @ p)
    assert miss.min() > -1e-6
    assert miss[w > 1e-12].abs().max() < 1e-6
    paper = MGDA(TASKS, normalization=normalization, scale="paper")(given(losses, g))
    torch.testing.assert_close(paper, w)


def test_mgda_with_normalized_gradients_ignores_the_scale_of_a_loss(given):
    g = gradients()
    stretched = g * torch.tensor([[1.0], [100.0], [1.0]])
    a, b = (MGDA(TASKS, normalization="norm")(given(gradients=x)) for x in (g, stretched))
    torch.testing.assert_close(a, b)


def test_mgda_takes_a_gradient_without_digits_for_zero(given):
    g = gradients().float()
    g[1] *= 1e-22
    for normalization in ("none", "norm"):
        assert MGDA(TASKS, at="parameters", normalization=normalization)(given(gradients=g)).tolist() == [0, 3, 0]


def test_cagrad_is_in_the_sum_convention(given):
    g = gradients()
    torch.testing.assert_close(CAGrad(TASKS, c=0.0)(given(gradients=g)), torch.ones(3, dtype=torch.float64))
    plain, rescaled = (CAGrad(TASKS, rescale=r)(given(gradients=g)) for r in (False, True))
    torch.testing.assert_close(plain, rescaled * 1.16)
    a, b = (CAGrad(TASKS)(given(gradients=x)) for x in (g, 7 * g))
    torch.testing.assert_close(a, b)


def test_pcgrad_leaves_agreeing_gradients_alone(given):
    g = gradients().abs()
    assert PCGrad(TASKS)(given(gradients=g)).tolist() == [1, 1, 1]


def test_pcgrad_draws_another_order_in_every_step(given):
    rule, g = PCGrad(TASKS), gradients(seed=3) - 0.3
    found = {tuple(rule(given(gradients=g)).tolist()) for _ in range(20)}
    assert len(found) > 1


# GradDrop compares coordinate by coordinate, and those of features and parameters are others.
OF_THE_GRAMIAN = [name for name in GRADIENTS if name != "graddrop"]


@pytest.mark.parametrize("name", [*OF_THE_GRAMIAN, "imtl", "gradnorm"])
def test_features_and_parameters_agree_behind_an_orthogonal_encoder(name):
    """With a square orthogonal encoder and one sample of length one, the two Gramians are the same."""
    tasks = tiny_tasks()
    shared = nn.Linear(4, 4, bias=False).double()
    nn.init.orthogonal_(shared.weight)
    model = SplitModel(shared, {n: nn.Linear(4, 2).double() for n in "abc"})
    data = [Batch(b.inputs / b.inputs.norm(), b.targets) for b in batches(3, size=1)]
    found = []
    for at in ("features", "parameters"):
        step = Step(model, tasks, plugins.make_method({"name": name, "at": at}, tasks))
        for batch in data:
            step.zero_grad()
            step.backward(batch)
        found.append(shared.weight.grad.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


def scaled_by(k, name, options, steps=6):
    """Weights and shared gradients of every step, with the loss of b multiplied by k; parameters stay."""
    tasks = tiny_tasks()
    tasks[1] = Task("b", lambda p, y: k * squared(p, y), primary=False)
    step = Step(problem(), tasks, plugins.make_method({"name": name, **options}, tasks))
    found = []
    for i, batch in enumerate(batches(steps)):
        step.epoch = i // 2
        step.zero_grad()
        report = step.backward(batch)
        shared = torch.cat([p.grad.flatten() for p in step.model.shared_parameters()])
        found.append((torch.stack([*report.encoder_weights.values()]), shared))
    return found


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("equal", {}, "weights"),
        ("dwa", {}, "weights"),
        ("rlw", {}, "weights"),
        ("atw", {}, "weights"),
        ("gcs", {}, "weights"),
        ("gcs", {"mode": "soft"}, "weights"),
        ("pcgrad", {}, "linear"),
        ("puw", {}, "weighted losses"),
        ("famo", {}, "weighted losses"),
        ("mgda", {"normalization": "loss"}, "weights"),
        ("mgda", {"normalization": "norm"}, "weights"),
        ("imtl-g", {}, "direction"),
        ("imtl", {}, "direction"),
        ("nash-mtl", {}, "gradient"),
    ],
)
def test_scaling_a_loss_does_what_is_documented(name, options, kept):
    k = 50.0
    scale = torch.tensor([1.0, k, 1.0], dtype=torch.float64)
    plain, twice, much = (scaled_by(factor, name, options) for factor in (1, 2, k))
    for (weights, gradient), (_, double), (scaled, other) in zip(plain, twice, much, strict=True):
        if kept == "weights":
            found, expected = scaled, weights
        elif kept == "weighted losses":
            found, expected = scaled * scale / (scaled * scale).sum(), weights / weights.sum()
        elif kept == "direction":
            found, expected = other / other.norm(), gradient / gradient.norm()
        elif kept == "gradient":
            found, expected = other, gradient
        else:
            # What is projected off b stays, and b's own projected gradient is scaled.
            found, expected = other - gradient, (k - 1) * (double - gradient)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_graddrop_keeps_one_sign_per_coordinate_and_all_of_it(given):
    g = gradients(count=3, size=1000)
    out = GradDrop(TASKS, at="parameters")(given(gradients=g))
    positive, negative = g.clamp(min=0).sum(0), g.clamp(max=0).sum(0)
    kept_positive = torch.isclose(out, positive)
    assert (kept_positive | torch.isclose(out, negative)).all()
    assert kept_positive.any()
    assert not kept_positive.all()


def test_graddrop_draws_the_positive_sign_in_proportion_to_its_purity(given):
    g = torch.tensor([[3.0], [-1.0], [0.0]], dtype=torch.float64)
    rule = GradDrop(TASKS, at="parameters")
    outs = torch.stack([rule(given(gradients=g)) for _ in range(4000)])
    assert set(outs.flatten().tolist()) == {3.0, -1.0}
    assert (outs == 3).double().mean().item() == pytest.approx(0.75, abs=0.03)


def test_graddrop_leaks(given):
    g = gradients()
    whole = GradDrop(TASKS, at="parameters", leak=dict.fromkeys("abc", 1.0))(given(gradients=g))
    torch.testing.assert_close(whole, g.sum(0))


def test_graddrop_at_features_shares_a_draw_over_the_batch(given):
    """All samples of a feature keep or drop a task together, by the sign of the batch sum of sign(z) · g."""
    z = gradients(seed=5, count=4, size=6)
    g = gradients(seed=6, count=3, size=24)
    out = GradDrop(TASKS)(given(gradients=g, features=[z])).view(4, 6)
    per_sample = g.view(3, 4, 6)
    wants = (z.sign() * per_sample).sum(1)
    up = (per_sample * (wants > 0)[:, None]).sum(0)
    down = (per_sample * (wants < 0)[:, None]).sum(0)
    for feature in range(6):
        assert torch.allclose(out[:, feature], up[:, feature]) or torch.allclose(out[:, feature], down[:, feature])


def test_a_coordinate_without_gradient_stays_without():
    zero = torch.zeros(3, 5, dtype=torch.float64)
    assert (pick_sign(zero, zero, torch.zeros(3, 1), torch.Generator()) == 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DWA(TASKS, window=0), "window must be 'epoch' or a positive number of steps, not 0"),
        (lambda: DWA(TASKS, temperature=0.0), "temperature must be positive, not 0.0"),
        (lambda: RLW(TASKS, scale="mean"), "scale must be 'sum' or 'paper', not 'mean'"),
        (lambda: MGDA(TASKS, normalization="l2"), "normalization must be .* not 'l2'"),
        (lambda: MGDA(TASKS, at="heads"), "at must be 'features' or 'parameters', not 'heads'"),
        (lambda: CAGrad(TASKS, c=1.0), "c must be at least 0 and less than 1, not 1.0"),
        (lambda: GradDrop(TASKS, leak={"a": 2.0}), "leak of task 'a' must be between 0 and 1, not 2.0"),
    ],
)
def test_bad_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_leak_of_an_unknown_task():
    with pytest.raises(MissingKey, match="leak for 'd', but the tasks are: a, b, c"):
        GradDrop(TASKS, leak={"d": 0.5})


@pytest.mark.parametrize("name", ["equal", *LOSSES])
def test_losses_only_methods_are_one_rule_that_fills_either_slot(name):
    method = plugins.make_method(name, TASKS)
    assert method.encoder is method.decoder
    mixed = plugins.make_method({"encoder": "mgda", "decoder": name}, TASKS)
    assert type(mixed.decoder) is type(method.decoder)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_methods_leave_decoders_unweighted(name):
    tasks = tiny_tasks()
    step = Step(problem(), tasks, plugins.make_method(name, tasks))
    for report in train(step, batches(2)):
        assert [w.item() for w in report.decoder_weights.values()] == [1, 1, 1]


def test_a_batch_without_any_label_moves_nothing():
    tasks = tiny_tasks()
    for name in ("equal", *LOSSES, *GRADIENTS, "imtl"):
        model, (batch, *_) = problem(), batches(1)
        absent = {n: torch.full_like(y, math.nan) for n, y in batch.targets.items()}
        Step(model, tasks, plugins.make_method(name, tasks)).backward(Batch(batch.inputs, absent))
        assert all((p.grad == 0).all() for p in model.parameters())
