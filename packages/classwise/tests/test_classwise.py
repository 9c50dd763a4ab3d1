"""Class-wise weights against loops over classes, a lookahead by hand and a calculated example."""

import functools
import itertools
import math
import warnings

import pytest
import torch
from sidetask_classwise import Bins, ClassWise
from sidetask_classwise.classwise import classwise
from sidetask_core import Batch, Method, MissingKey, SplitModel, Step, Task
from sidetask_core.derivative import NoForwardDerivative
from sidetask_core.plugins import make_method
from sidetask_core.testing import close, conformance, gradients, in_two_processes
from torch import nn
from torch.nn import functional

BINS = [-0.5, 0.3]
NAMES = ("depth", "seg", "other")
LR = 0.05
RATE = 0.1

TestDifference = conformance(classwise, classes=BINS, warmup=0, lr=LR)
TestWindow = conformance(classwise, classes=BINS, warmup=1, lr=LR, window=2)
TestLookahead = conformance(classwise, classes=BINS, estimator="lookahead", warmup=0, lr=LR)
TestNext = conformance(classwise, classes=BINS, estimator="lookahead", probe="next", every=2, warmup=0, lr=LR, window=2)


def cross_entropy(prediction, target):
    return functional.cross_entropy(prediction, target.clamp(min=0), reduction="none")


def absolute(prediction, target):
    return (prediction - target).abs()


def dense_tasks():
    """Depth, and a segmentation that helps."""
    return [
        Task("depth", absolute, valid=lambda y: y > 0),
        Task("seg", cross_entropy, valid=lambda y: y >= 0, primary=False),
    ]


def dense_model(seed=0):
    torch.manual_seed(seed)
    stages = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh())
    heads = {"depth": nn.Conv2d(6, 1, 3, padding=1), "seg": nn.Sequential(nn.Dropout(0.2), nn.Conv2d(6, 4, 1))}
    return SplitModel(stages, heads).double()


def dense_batches(count, size=3, classes=4):
    """Pictures 5 x 6, a quarter of either label missing."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        depth = torch.rand(size, 1, 5, 6, generator=generator, dtype=torch.float64) + 0.1
        depth[torch.rand(depth.shape, generator=generator) < 0.25] = 0
        seg = torch.randint(0, classes, (size, 5, 6), generator=generator)
        seg[torch.rand(seg.shape, generator=generator) < 0.25] = -1
        found.append(
            Batch(torch.randn(size, 3, 5, 6, generator=generator, dtype=torch.float64), {"depth": depth, "seg": seg})
        )
    return found


def run(shaper, data, *, tasks=None, model=None, probe=None, seed=1):
    """Train on `data`; the step, and weights after every step."""
    tasks, model = tasks or dense_tasks(), model or dense_model()
    step = Step(model, tasks, Method(shapers={shaper.task: shaper}))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    torch.manual_seed(seed)
    path = []
    for batch in data:
        optimizer.zero_grad()
        step.backward(batch, validation=probe, optimizer=optimizer)
        optimizer.step()
        path.append(shaper.weights.clone())
    return step, path


def at_rest(model):
    """Without dropout, so that a loop by hand sees the same losses."""
    return model.eval()


def naive(model, batch, weights):
    """Per class, by loops over pixels: the main loss, the auxiliary's share; and the auxiliary loss."""
    predictions = model(batch.inputs)
    depth, seg = batch.targets["depth"], batch.targets["seg"]
    main = {c: [] for c in range(4)}
    auxiliary = {c: [] for c in range(4)}
    number = 0
    for n in range(len(seg)):
        for y in range(5):
            for x in range(6):
                c = int(seg[n, y, x])
                if c < 0:
                    continue
                number += 1
                logits = predictions["seg"][n, :, y, x]
                auxiliary[c].append(logits.logsumexp(0) - logits[c])
                if depth[n, 0, y, x] > 0:
                    main[c].append((predictions["depth"][n, 0, y, x] - depth[n, 0, y, x]).abs())
    mains = torch.stack([torch.stack(main[c]).mean() if main[c] else torch.tensor(math.nan) for c in range(4)])
    nothing = torch.zeros((), dtype=torch.float64)
    shares = torch.stack([sum(auxiliary[c], nothing) / number for c in range(4)])
    return mains.detach(), shares.detach(), (weights * shares).sum().detach()


def adam_by_hand(estimates, lr=LR):
    """Weights after torch's Adam has seen estimates in turn, one optimizer per class; NaN says absent."""
    weights = [torch.ones((), dtype=torch.float64) for _ in estimates[0]]
    optimizers = [torch.optim.Adam([w], lr=lr) for w in weights]
    path = []
    for estimate in estimates:
        for w, optimizer, value in zip(weights, optimizers, estimate, strict=True):
            if value.isfinite() and value != 0:
                w.grad = value.clone()
                optimizer.step()
                w.clamp_(min=0)
        path.append(torch.stack(weights).clone())
    return path


@pytest.mark.parametrize("estimator", ["difference", "lookahead"])
def test_with_all_weights_one_the_gradient_is_that_of_the_plain_sum(estimator):
    (batch,) = dense_batches(1)
    found = []
    for method in (Method(), classwise(dense_tasks(), classes=4, estimator=estimator)):
        model = dense_model()
        step = Step(model, dense_tasks(), method)
        torch.manual_seed(5)
        step.backward(batch, validation=batch, optimizer=torch.optim.SGD(model.parameters(), lr=RATE))
        found.append(gradients(model))
    for name, gradient in found[0].items():
        close(found[1][name], gradient, name, rtol=1e-12)


def test_other_weights_weigh_each_class_and_leave_other_elements_alone():
    shaper = ClassWise("depth", "seg", 3)
    shaper.weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2], [-100, -1, 255]])
    assert shaper(torch.ones(2, 3), labels).tolist() == [[0.5, 0.0, 2.0], [1.0, 1.0, 1.0]]
    # A class of a sample holds for all of its elements, that of a pixel for all of its channels.
    assert shaper(torch.ones(2, 4), torch.tensor([2, 0])).tolist() == [[2.0] * 4, [0.5] * 4]
    assert shaper(torch.ones(1, 2, 2, 3), labels[None]).flatten(2)[0].tolist() == [[0.5, 0.0, 2.0, 1.0, 1.0, 1.0]] * 2


def test_class_sums_are_those_of_a_naive_loop():
    first, second = dense_batches(2)
    shaper = ClassWise("depth", "seg", 4, warmup=0, window=3)
    shaper.weights = torch.tensor([0.3, 1.0, 0.0, 2.0], dtype=torch.float64)
    model = at_rest(dense_model())
    step = Step(model, dense_tasks(), Method(shapers={"seg": shaper}))
    report = step.backward(first)
    mains, shares, loss = naive(model, first, shaper.weights)
    main, points, auxiliary, elements = shaper.sums
    close((main / points)[1:-1], mains, "main loss by class")
    close((auxiliary / elements.sum())[1:-1], shares, "shares of the auxiliary loss")
    close(report.losses["seg"], loss, "the auxiliary loss is the weighted sum of its shares")
    assert elements[0] == elements[-1] == auxiliary[0] == points[-1] == 0
    mask = second.targets["seg"] < 0
    step.backward(second)
    assert points[0] == (first.targets["depth"][:, 0][first.targets["seg"] < 0] > 0).sum()
    assert shaper.sums[1, 0] == points[0] + (second.targets["depth"][:, 0][mask] > 0).sum()


def test_differences_of_three_batches_calculated_by_hand():
    """One parameter for each task and inputs of one, so that element losses can be written down."""

    class Constant(nn.Module):
        def forward(self, x):
            return x

    tasks = [
        Task("main", lambda p, y: y, valid=lambda y: ~y.isnan()),
        Task("aux", lambda p, y: y * 1.0 + p.sum() * 0, primary=False),
    ]
    model = SplitModel(nn.Linear(1, 1).double(), {"main": Constant(), "aux": Constant()})
    # The auxiliary's labels are its classes, and its losses too: class 0 loses 0, class 1 loses 1, class 2 loses 2.
    labels = [[0, 1, 1, 2], [1, 1, 1, 2], [1, 2, 2, 2]]
    mains = [[5.0, 1.0, 3.0, 4.0], [0.0, 2.0, 4.0, 7.0], [1.0, 6.0, 6.0, math.nan]]
    shaper = ClassWise("main", "aux", 3, warmup=0, lr=LR, eps=0.0)
    step = Step(model, tasks, Method(shapers={"aux": shaper}))
    path = []
    for aux, main in zip(labels, mains, strict=True):
        targets = {"aux": torch.tensor(aux), "main": torch.tensor(main, dtype=torch.float64)}
        step.backward(Batch(torch.ones(4, 1, dtype=torch.float64), targets))
        path.append(shaper.weights.clone())
    # L_main^1: 2, 2, 1 and L_main^2: 4, 7, 6. L_aux: 4/4, then 5/4: class 0 is gone, class 1 has changed by 0.
    assert torch.equal(path[0], torch.ones(3, dtype=torch.float64))
    estimate = [math.nan, 0.0, (7 - 4) / (5 / 4 - 1) * 2 / 4]
    assert estimate[2] == 6
    w2 = 1 - LR
    close(path[1], torch.tensor([1.0, 1.0, w2], dtype=torch.float64), "weights", rtol=1e-6)
    # Now with the weights of the second batch's end: (1·1 + w2·6)/4, against 5/4 under weights of one.
    change = (1 + 6 * float(path[1][2])) / 4 - 5 / 4
    third = [math.nan, (1 - 2) / change * 1 / 4, (6 - 7) / change * 6 / 4]
    expected = adam_by_hand([torch.tensor(e, dtype=torch.float64) for e in (estimate, third)])
    close(path[1], expected[0], "after two")
    close(path[2], expected[1], "after three")


@pytest.mark.parametrize("window", [1, 2])
def test_differences_are_those_of_a_loop_over_batches(window):
    data, model = dense_batches(6), at_rest(dense_model())
    data[3].targets["seg"][data[3].targets["seg"] == 2] = 1
    shaper = ClassWise("depth", "seg", 4, warmup=0, lr=LR, window=window)
    step = Step(model, dense_tasks(), Method(shapers={"seg": shaper}))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    estimates, last, path = [], None, []
    for k in range(0, len(data), window):
        weights = shaper.weights.clone()
        # Pictures of a window as one large batch, at the parameters of each.
        pooled = [[], []]
        for batch in data[k : k + window]:
            points = [((batch.targets["seg"] == c) & (batch.targets["depth"][:, 0] > 0)).sum() for c in range(4)]
            pooled[0].append((naive(model, batch, weights), torch.stack(points), (batch.targets["seg"] >= 0).sum()))
            optimizer.zero_grad()
            step.backward(batch)
            optimizer.step()
        path.append(shaper.weights.clone())
        number = sum(n for _, _, n in pooled[0])
        mains = sum(torch.where(p > 0, m, 0.0) * p for (m, _, _), p, _ in pooled[0]) / sum(p for _, p, _ in pooled[0])
        shares = sum(s * n for (_, s, _), _, n in pooled[0]) / number
        now = mains, (weights * shares).sum()
        if last is not None:
            estimates.append((now[0] - last[0]) / (now[1] - last[1] + 1e-8) * shares)
        last = now
    for found, expected in zip(path[1:], adam_by_hand(estimates), strict=True):
        close(found, expected, "weights", rtol=1e-8)
    assert (path[-1] != 1).any()


@pytest.mark.parametrize("probe", ["validation", "next"])
def test_a_lookahead_is_the_product_of_gradients_class_by_class(probe):
    tasks, data, model = dense_tasks(), dense_batches(3), at_rest(dense_model())
    shaper = ClassWise("depth", "seg", 4, estimator="lookahead", probe=probe, warmup=0, lr=LR)
    start = torch.tensor([0.7, 1.3, 0.2, 1.0], dtype=torch.float64)
    shaper.weights = start
    step = Step(model, tasks, Method(shapers={"seg": shaper}))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    parameters = list(model.parameters())

    def gradient(loss):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
        )

    losses = cross_entropy(model(data[0].inputs)["seg"], data[0].targets["seg"])
    number = (data[0].targets["seg"] >= 0).sum()
    rows = torch.stack([gradient(losses[data[0].targets["seg"] == c].sum() / number) for c in range(4)])
    for batch in data[: 1 if probe == "validation" else 2]:
        optimizer.zero_grad()
        step.backward(batch, validation=data[1], optimizer=optimizer)
        optimizer.step()
        if batch is data[0]:
            after = tasks[0].mean(model(data[1].inputs)["depth"], data[1].targets["depth"])[0]
            expected = -RATE * rows @ gradient(after)
    close(shaper.adam.first, 0.1 * expected, "derivatives", rtol=1e-8)
    moved = start - LR * expected / (expected.abs() + 1e-8)
    close(shaper.weights, moved, "weights", rtol=1e-6)
    assert expected.abs().min() > 1e-8


def test_a_lookahead_over_a_window_is_the_mean():
    data = dense_batches(3)
    parts = []
    for window, some in ((1, data[:1]), (2, data[:2])):
        shaper = ClassWise("depth", "seg", 4, estimator="lookahead", warmup=0, window=window)
        shaper.adam.betas = (0.0, 0.999)
        run(shaper, some, probe=data[2], model=at_rest(dense_model()))
        parts.append(shaper.adam.first)
    second = ClassWise("depth", "seg", 4, estimator="lookahead", warmup=0)
    model = at_rest(dense_model())
    step = Step(model, dense_tasks(), Method(shapers={"seg": second}))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    step.backward(data[0], validation=data[2], optimizer=optimizer)
    optimizer.step()
    optimizer.zero_grad()
    second.weights = torch.ones(4, dtype=torch.float64)
    second.adam.betas = (0.0, 0.999)
    step.backward(data[1], validation=data[2], optimizer=optimizer)
    close(parts[1], (parts[0] + second.adam.first) / 2, "mean derivative")


@pytest.mark.parametrize("estimator", ["difference", "lookahead"])
def test_permuting_the_labels_permutes_the_weights(estimator):
    order = torch.tensor([2, 0, 3, 1])
    data = dense_batches(5)
    permuted = []
    for batch in data:
        seg = batch.targets["seg"]
        renamed = torch.where(seg < 0, seg, order[seg.clamp(min=0)])
        permuted.append(Batch(batch.inputs, {**batch.targets, "seg": renamed}))
    found = []
    for some, rows in ((data, None), (permuted, order)):
        model = at_rest(dense_model())
        if rows is not None:
            # The head's outputs go with the labels.
            with torch.no_grad():
                for p in model.heads["seg"][1].parameters():
                    p[rows] = p.clone()
        shaper = ClassWise("depth", "seg", 4, estimator=estimator, warmup=0, lr=LR)
        run(shaper, some[:4], probe=some[4], model=model)
        found.append(shaper.weights)
    close(found[1][order], found[0], "weights", rtol=1e-8)
    assert found[0].unique().numel() == 4


@pytest.mark.parametrize("estimator", ["difference", "lookahead"])
def test_an_absent_class_keeps_weight_and_moments(estimator):
    data = dense_batches(6)
    data[3].targets["seg"][data[3].targets["seg"] == 2] = -1
    shaper = ClassWise("depth", "seg", 4, estimator=estimator, warmup=0, lr=LR)
    tasks, model = dense_tasks(), dense_model()
    step = Step(model, tasks, Method(shapers={"seg": shaper}))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    path = []
    for batch in data[:5]:
        optimizer.zero_grad()
        step.backward(batch, validation=data[5], optimizer=optimizer)
        optimizer.step()
        path.append(torch.stack([shaper.weights, shaper.adam.first, shaper.adam.second, shaper.adam.updates]))
    kept = [(a == b).all(dim=0).tolist() for a, b in itertools.pairwise(path)]
    absent = [False, False, True, False]
    present = [False] * 4
    # A difference needs both batches.
    assert kept == [present, present, absent, absent if estimator == "difference" else present]


@pytest.mark.parametrize("estimator", ["difference", "lookahead"])
def test_without_labels_nothing_is_learned(estimator):
    data = dense_batches(4)
    for missing in ("depth", "seg"):
        none = [Batch(b.inputs, {**b.targets, missing: None}) for b in data]
        shaper = ClassWise("depth", "seg", 4, estimator=estimator, warmup=0, lr=LR)
        run(shaper, none[:3], probe=none[3])
        assert torch.equal(shaper.weights, torch.ones(4, dtype=torch.float64))
        assert not shaper.adam.updates.any()
        run(shaper, data[:3], probe=data[3])
        assert shaper.adam.updates.all()


def test_weights_stay_at_one_until_the_warm_up_is_over():
    data = dense_batches(4)
    shaper = ClassWise("depth", "seg", 4, warmup=2, lr=LR)
    step = Step(dense_model(), dense_tasks(), Method(shapers={"seg": shaper}))
    moved = []
    for epoch in range(4):
        step.epoch = epoch
        for batch in data:
            step.backward(batch)
        moved.append(bool((shaper.weights != 1).any()))
    assert moved == [False, False, True, True]
    assert shaper.adam.updates.max() == 2 * len(data) - 1


def test_no_weight_falls_below_zero():
    shaper = ClassWise("depth", "seg", 4, estimator="lookahead", warmup=0, lr=0.7)
    _, path = run(shaper, dense_batches(12), probe=dense_batches(1)[0])
    lowest = torch.stack(path).min(dim=0).values
    assert lowest.min() == 0
    assert lowest.max() > 0


def test_every_looks_only_in_each_nth_step():
    data = dense_batches(6)
    for probe in ("validation", "next"):
        shaper = ClassWise("depth", "seg", 4, estimator="lookahead", probe=probe, every=3, warmup=0, lr=LR)
        _, path = run(shaper, data, probe=data[0])
        changed = [bool((a != b).any()) for a, b in zip([torch.ones(4), *path], path, strict=False)]
        assert changed == [probe == "validation", False, False, True, False, False]


def test_several_auxiliaries_have_weights_of_their_own():
    tasks = [*dense_tasks(), Task("parts", cross_entropy, valid=lambda y: y >= 0, primary=False)]
    model = dense_model()
    model = SplitModel(model.shared, {**model.heads, "parts": nn.Conv2d(6, 2, 1).double()})
    data = dense_batches(4)
    data = [Batch(b.inputs, {**b.targets, "parts": b.targets["seg"].clamp(max=1)}) for b in data]
    shapers = {
        "seg": ClassWise("depth", "seg", 4, estimator="lookahead", warmup=0, lr=LR),
        "parts": ClassWise("depth", "parts", ["none", "any"], warmup=0, lr=LR),
    }
    alone = ClassWise("depth", "parts", ["none", "any"], warmup=0, lr=LR)
    step = Step(model, tasks, Method(shapers=shapers))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for batch in data[:3]:
        optimizer.zero_grad()
        step.backward(batch, validation=data[3], optimizer=optimizer)
        optimizer.step()
    assert (shapers["seg"].weights != 1).all()
    assert (shapers["parts"].weights != 1).all()
    assert alone.weights.tolist() == [1, 1]
    assert set(shapers["parts"].named_weights()) == {"none", "any"}


def test_quantised_depth_weighs_segmentation_the_other_way_round():
    """Bins for the weights alone: at ones the loss is what it was, and NaN has no bin."""
    tasks = [
        Task("seg", cross_entropy, valid=lambda y: y >= 0),
        Task("depth", absolute, valid=lambda y: y > 0, primary=False),
    ]
    data = dense_batches(4)
    for estimator in ("difference", "lookahead"):
        shaper = ClassWise("seg", "depth", Bins.log(0.1, 1.1, 3), estimator=estimator, warmup=0, lr=LR)
        plain = Step(dense_model(), tasks)
        torch.manual_seed(1)
        expected = plain.backward(data[0]).losses["depth"]
        step = Step(dense_model(), tasks, Method(shapers={"depth": shaper}))
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(step.parameters(), lr=RATE)
        close(step.backward(data[0], validation=data[3], optimizer=optimizer).losses["depth"], expected, "loss")
        step.backward(data[1], validation=data[3], optimizer=optimizer)
        assert (shaper.weights != 1).all()
    shaper.weights = torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64)
    labels = torch.tensor([0.05, 0.5, 1.0, math.nan])
    assert shaper(torch.ones(4), labels).tolist() == [0.0, 3.0, 3.0, 1.0]


def test_no_class_is_what_is_not_labelled_and_a_label_beyond_the_last_is_an_error():
    """Labels that the loss itself ignores, without a mask."""
    ignoring = functools.partial(functional.cross_entropy, reduction="none", ignore_index=255)
    tasks = [dense_tasks()[0], Task("seg", ignoring, primary=False)]
    masked, (probe,) = dense_batches(2), dense_batches(1)
    data = [Batch(b.inputs, {**b.targets, "seg": b.targets["seg"].where(b.targets["seg"] >= 0, 255)}) for b in masked]
    # The share of a class in the loss is over all pixels then, but which classes learn, and in which direction, is not.
    found = {}
    for estimator in ("difference", "lookahead"):
        for name, some, of in (("masked", masked, dense_tasks()), ("ignored", data, tasks)):
            shaper = ClassWise("depth", "seg", 4, estimator=estimator, warmup=0, lr=LR)
            run(shaper, some, tasks=of, model=at_rest(dense_model()), probe=probe)
            found[name] = shaper.adam.updates
            assert shaper.weights.max() < 2
        assert torch.equal(found["masked"], found["ignored"])
        shaper = ClassWise("depth", "seg", ["wall", "floor", "bed"], estimator=estimator)
        with pytest.raises(ValueError, match="labels beyond its 3 classes, wall to bed; negative labels and 255"):
            run(shaper, data[:1], tasks=tasks, probe=probe)
    many = ClassWise("depth", "seg", 300)
    many.weights = torch.arange(300.0)
    assert many(torch.ones(3), torch.tensor([255, 299, -1])).tolist() == [255, 299, 1]


@pytest.mark.parametrize("labels", [torch.full((4,), 2.0), torch.zeros(4), torch.tensor([math.nan, math.inf, -1, 5.0])])
def test_quantised_labels_may_be_constant_zero_or_no_number(labels):
    shaper = ClassWise("seg", "depth", [1.0, 2.0])
    shaper.weights = torch.tensor([0.5, 3.0, 2.0], dtype=torch.float64)
    expected = [1.0 if y.isnan() else 0.5 if y < 1 else 3.0 if y < 2 else 2.0 for y in labels]
    assert shaper(torch.ones(4), labels).tolist() == expected
    # Labels of every second row, as of a picture that was turned.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shaper(torch.ones(4), labels.repeat_interleave(2)[::2]).tolist() == expected


def test_what_a_lookahead_needs_is_asked_for_in_the_first_step_not_after_the_warm_up():
    (batch,) = dense_batches(1)
    for probe, message in (("validation", "looks ahead and needs"), ("next", "looks back at each step and needs")):
        shaper = ClassWise("depth", "seg", 4, estimator="lookahead", probe=probe, warmup=20)
        with pytest.raises(ValueError, match=message):
            Step(dense_model(), dense_tasks(), Method(shapers={"seg": shaper})).backward(batch)


def first_errors(main, options=None, heads=None):
    """Two steps within the warm-up."""
    tasks, model, (batch,) = [main, dense_tasks()[1]], dense_model(), dense_batches(1)
    shaper = ClassWise("depth", "seg", **{"classes": 4, "warmup": 1, **(options or {})})
    step = Step(SplitModel(model.shared, {**model.heads, **(heads or {})}), tasks, Method(shapers={"seg": shaper}))
    optimizer = torch.optim.SGD(step.parameters(), lr=RATE)
    for _ in range(2):
        step.backward(batch, validation=batch, optimizer=optimizer)


LOOKAHEADS = [{"estimator": "lookahead"}, {"estimator": "lookahead", "probe": "next"}]


@pytest.mark.parametrize("options", [{}, {"window": 3}, *LOOKAHEADS, {**LOOKAHEADS[0], "every": 2}], ids=str)
def test_labels_beyond_the_classes_are_refused_during_the_warm_up(options):
    with pytest.raises(ValueError, match="task 'seg' has labels beyond its 3 classes"):
        first_errors(dense_tasks()[0], options={**options, "classes": 3})


def test_labels_beyond_the_classes_are_refused_when_they_come():
    """A class that is rare may be missing from the first batches."""
    for options in ({}, *LOOKAHEADS):
        first, second = dense_batches(2)
        first.targets["seg"].clamp_(max=2)
        shaper = ClassWise("depth", "seg", 3, warmup=9, **options)
        run(shaper, [first, first], probe=first)
        with pytest.raises(ValueError, match="beyond its 3 classes"):
            run(shaper, [first, first, second], probe=first)
        assert (shaper.weights == 1).all()


@pytest.mark.parametrize(
    ("loss", "objectives", "error", "message"),
    [
        (lambda p, y: (p - y).abs().mean(), (), ValueError, "its loss returned a scalar"),
        (lambda p, y: {"u": p - y, "v": y - p}, ("u", "v"), MissingKey, "its objectives are: u, v"),
        (lambda p, y: (p - y).abs().mean(dim=(1, 2, 3)), (), ValueError, r"element losses of task 'depth' \[3\]"),
        (lambda p, y: (p - y).abs().repeat(1, 1, 2, 2), (), ValueError, r"'depth' \[3, 1, 10, 12\]"),
    ],
    ids=["scalar", "objectives", "per picture", "another resolution"],
)
def test_a_main_loss_that_has_no_classes_is_refused_during_the_warm_up(loss, objectives, error, message):
    main = Task("depth", loss, objectives=objectives)
    with pytest.raises(error, match=f"{message}.*; a difference wants the main loss by class, which estimator"):
        first_errors(main)
    for options in LOOKAHEADS:
        first_errors(main, options=options)


@pytest.mark.parametrize("options", LOOKAHEADS, ids=str)
def test_what_a_lookahead_cannot_differentiate_is_refused_during_the_warm_up(options):
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(6, 4, 1).double()

        def forward(self, x):
            return Backward.apply(self.conv(x))

    with pytest.raises(NoForwardDerivative, match=r"without jvp .*use mode 'difference'"):
        first_errors(dense_tasks()[0], options=options, heads={"seg": Doubled()})
    first_errors(dense_tasks()[0], options={**options, "mode": "difference"}, heads={"seg": Doubled()})


@pytest.mark.parametrize("options", [{}, *LOOKAHEADS], ids=str)
def test_the_first_look_changes_nothing(options):
    """Parameters and weights, bit for bit, and a run that is resumed within the warm-up does not look again."""
    data = dense_batches(5)
    found = []
    for looks in (True, False):
        shaper = ClassWise("depth", "seg", 4, warmup=1, lr=LR, **options)
        shaper.checked = not looks
        step, path = run(shaper, data[:4], probe=data[4])
        assert (path[-1] == 1).all()
        assert shaper.checked
        assert shaper.batches == 0
        found.append([*step.model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    again = ClassWise("depth", "seg", 4, warmup=1, lr=LR, **options)
    again.load_state_dict(shaper.state_dict())
    assert again.checked
    others = ClassWise("depth", "seg", list("abcd"), warmup=1, lr=LR, **options)
    others.load_state_dict(shaper.state_dict())
    assert not others.checked


def test_a_list_of_numbers_is_no_list_of_labels():
    """Edges between bins of a continuous label, which whole numbers are taken for, are none of a segmentation."""
    (batch,) = dense_batches(1)
    for classes in ([0, 1, 2], Bins([0.5, 1.5])):
        step = Step(dense_model(), dense_tasks(), Method(shapers={"seg": ClassWise("depth", "seg", classes)}))
        with pytest.raises(
            TypeError, match=r"task 'seg': bins, .* need continuous labels, found torch\.int64; give the"
        ):
            step.backward(batch)


def test_quantiles_are_those_of_each_auxiliarys_labels():
    tasks = [*dense_tasks(), Task("other", absolute, valid=lambda y: y > 0.5, primary=False)]
    generator = torch.Generator().manual_seed(0)
    train = {name: [torch.rand(2, 9, generator=generator) * k for _ in range(50)] for k, name in enumerate(NAMES, 1)}
    method = classwise(
        tasks,
        main="seg",
        auxiliary=["depth", "other"],
        classes={"by": "quantile", "bins": 4},
        labels=lambda name: [*train[name], None],
    )
    for name, task in (("depth", tasks[0]), ("other", tasks[2])):
        assert torch.equal(
            method.shapers[name].edges, torch.tensor(Bins.quantile(train[name], 4, valid=task.valid).edges)
        )
    with pytest.raises(ValueError, match=r"quantiles are fitted on labels: give Bins\.quantile\(labels, bins\)"):
        classwise(tasks[:2], main="seg", auxiliary="depth", classes={"by": "quantile", "bins": 4})
    with pytest.raises(ValueError, match="quantiles are given as by and bins, not as"):
        classwise(tasks[:2], classes={"by": "quantile", "low": 0, "bins": 4}, main="seg", labels=train.get)


@pytest.mark.parametrize("window", [2, 3])
def test_a_first_window_is_the_mean_of_what_was_there(window):
    """With the next batch as probe, the first look finds nothing."""
    data = dense_batches(window)
    shaper = ClassWise("depth", "seg", 4, estimator="lookahead", probe="next", warmup=0, window=window)
    shaper.adam.betas = (0.0, 0.999)
    run(shaper, data, model=at_rest(dense_model()))
    every = ClassWise("depth", "seg", 4, estimator="lookahead", probe="next", warmup=0)
    every.adam.betas = (0.0, 0.999)
    every.adam.lr = 1e-300
    firsts = []
    step = Step(at_rest(dense_model()), dense_tasks(), Method(shapers={"seg": every}))
    optimizer = torch.optim.SGD(step.parameters(), lr=RATE)
    for batch in data:
        optimizer.zero_grad()
        step.backward(batch, optimizer=optimizer)
        optimizer.step()
        firsts.append(every.adam.first.clone())
    assert not firsts[0].any()
    close(shaper.adam.first, torch.stack(firsts[1:]).mean(dim=0), "mean derivative")


def share(rank, world, estimator, probe):
    """Weights after training on one process's share of every batch; the second process once has no labels at all."""
    model = at_rest(dense_model())
    data = dense_batches(6, size=4)
    shaper = ClassWise(
        "depth", "seg", 4, estimator=estimator, probe=probe, warmup=0, lr=LR, window=2 if probe == "next" else 1
    )
    step = Step(model, dense_tasks(), Method(shapers={"seg": shaper}))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    rows = slice(None) if world == 1 else slice(0, 3) if rank == 0 else slice(3, 4)
    shares = []
    for i, batch in enumerate(data):
        targets = {name: y[rows] for name, y in batch.targets.items()}
        if i == 2:
            missing = batch.targets["seg"].clone()
            missing[3:] = -1
            targets["seg"] = None if world == 2 and rank else missing[rows]
        shares.append(Batch(batch.inputs[rows], targets))
    for batch in shares[:5]:
        optimizer.zero_grad()
        step.backward(batch, validation=shares[5], optimizer=optimizer)
        optimizer.step()
    return shaper.weights


@pytest.mark.parametrize(
    ("estimator", "probe"), [("difference", "validation"), ("lookahead", "validation"), ("lookahead", "next")]
)
def test_two_processes_learn_as_one(estimator, probe):
    whole = share(0, 1, estimator, probe)
    assert (whole != 1).all()
    for half in in_two_processes(functools.partial(share, estimator=estimator, probe=probe)):
        close(half, whole, "weights", rtol=1e-8)


def refused(rank, world):
    """What a process says of labels beyond the classes that only the first one has."""
    (batch,) = dense_batches(1)
    seg = batch.targets["seg"] if rank == 0 else batch.targets["seg"].clamp(max=2)
    shaper = ClassWise("depth", "seg", 3, warmup=0)
    try:
        Step(dense_model(), dense_tasks(), Method(shapers={"seg": shaper})).backward(
            Batch(batch.inputs, {**batch.targets, "seg": seg})
        )
    except ValueError as error:
        return str(error)


def test_two_processes_refuse_together_what_one_of_them_has():
    first, second = in_two_processes(refused)
    assert "beyond its 3 classes" in first
    assert first == second


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"estimator": "lookahead"}], ids=str)
def test_a_state_follows_classes_by_name(options):
    data = dense_batches(4)
    names = ["wall", "floor", "bed", "chair"]
    first = ClassWise("depth", "seg", names, warmup=0, lr=LR, **options)
    run(first, data[:3], probe=data[3])
    second = ClassWise("depth", "seg", ["bed", "lamp", "wall"], warmup=0, lr=LR, **options)
    second.load_state_dict(first.state_dict())
    there = first.named_weights()
    for name, weight in second.named_weights().items():
        assert weight == there.get(name, 1)
    assert second.adam.updates.tolist() == [*first.adam.updates[[2]], 0, *first.adam.updates[[0]]]
    assert torch.equal(second.sums[:, [1, 3]], first.sums[:, [3, 1]])
    assert not second.sums[:, 2].any()
    assert second.batches == first.batches


def test_methods_by_name_and_slot_by_slot():
    tasks = [*dense_tasks(), Task("other", absolute, primary=False)]
    one = make_method({"name": "classwise", "main": "depth", "auxiliary": "seg", "classes": 4}, tasks)
    assert [*one.shapers] == ["seg"]
    assert (one.encoder, one.decoder) == (None, None)
    several = make_method(
        {
            "shapers": {
                "seg": {"name": "classwise", "classes": list("abcd"), "warmup": 12},
                "other": {
                    "name": "classwise",
                    "estimator": "lookahead",
                    "classes": {"by": "log", "low": 0.5, "high": 8, "bins": 4},
                },
            },
        },
        tasks,
    )
    assert several.shapers["seg"].warmup == 12
    assert several.shapers["seg"].classes == ("a", "b", "c", "d")
    assert several.shapers["other"].classes == ("< 1", "1 to 2", "2 to 4", ">= 4")
    assert several.shapers["other"].main == "depth"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "diff"}, "estimator must be one of difference, lookahead; not 'diff'"),
        ({"estimator": "lookahead", "probe": "test"}, "probe must be one of"),
        ({"estimator": "lookahead", "mode": "fast"}, "mode must be one of"),
        ({"every": 5}, "belong to estimator 'lookahead'"),
        ({"window": 0}, "window must be a whole number of at least 1, not 0"),
        ({"warmup": -1}, "warmup must be a whole number of at least 0"),
        ({"warmup": 1.5}, "warmup must be a whole number"),
        ({"lr": 0}, "lr must be positive"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"classes": 0}, "at least one class is needed, not 0"),
        ({"classes": []}, "classes are a number, names or bins"),
        ({"classes": ["a", "a"]}, "distinct"),
        ({"classes": ["a", 1.0]}, "classes are a number, names or bins"),
        ({"classes": [2.0, 1.0]}, "ascending"),
        ({"classes": {"by": "cubic", "low": 0, "high": 1, "bins": 3}}, "by \\(uniform or log\\)"),
        ({"classes": {"by": "log", "low": 0, "high": 1, "bins": 3}}, "lie above 0"),
        ({"main": "seg", "auxiliary": "seg"}, "cannot be the main task and its own auxiliary"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        classwise(dense_tasks(), **{"classes": 4, **options})


def test_bad_tasks_and_labels_are_refused():
    tasks, (batch,) = dense_tasks(), dense_batches(1)
    with pytest.raises(MissingKey, match="there is no task 'sag'; the tasks are: depth, seg"):
        classwise(tasks, classes=4, auxiliary="sag")
    with pytest.raises(ValueError, match="there is no auxiliary beside 'depth'"):
        classwise(tasks[:1], classes=4)
    with pytest.raises(ValueError, match="main must say which task is to profit; primary are: depth, seg"):
        classwise([tasks[0], Task("seg", cross_entropy)], classes=4)
    with pytest.raises(ValueError, match="was made for task 'seg'"):
        Step(dense_model(), tasks, Method(shapers={"depth": ClassWise("depth", "seg", 4)}))
    with pytest.raises(MissingKey, match="there is no task 'deep'"):
        Step(dense_model(), tasks, Method(shapers={"seg": ClassWise("deep", "seg", 4)})).backward(batch)
    with pytest.raises(TypeError, match=r"task 'depth': classes need labels of whole numbers, found torch\.float64"):
        Step(dense_model(), tasks, Method(shapers={"depth": ClassWise("seg", "depth", 4)})).backward(batch)
    with pytest.raises(TypeError, match="several objectives"):
        ClassWise("depth", "seg", 4)({"box": torch.ones(2)}, torch.zeros(2))
    with pytest.raises(ValueError, match=r"labels of task 'seg' \[2, 3\] say no class .* \[2, 5\]"):
        ClassWise("depth", "seg", 4)(torch.ones(2, 5), torch.zeros(2, 3, dtype=torch.int64))
    pooled = [Task("depth", lambda p, y: (p - y).abs().mean(dim=(1, 2, 3))), tasks[1]]
    shaper = ClassWise("depth", "seg", 4, warmup=0)
    with pytest.raises(ValueError, match=r"class for each of the element losses of task 'depth' \[3\]"):
        Step(dense_model(), pooled, Method(shapers={"seg": shaper})).backward(batch)
    # A lookahead needs no main loss by class.
    run(ClassWise("depth", "seg", 4, estimator="lookahead", warmup=0), [batch], tasks=pooled, probe=batch)


class Line(nn.Module):
    """A linear map without bias that starts at zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 1, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight


def test_a_class_that_agrees_gains_and_one_that_opposes_loses():
    tasks = [
        Task("wanted", lambda p, y: (p - y).square()),
        Task("helper", lambda p, y: (p - y[:, 1:]).square(), primary=False),
    ]

    class Labelled(ClassWise):
        def _columns(self, labels):
            return super()._columns(labels[:, :1].long())

    inputs = torch.randn(40, 64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = torch.tensor([[1.0], [-2.0], [0.5], [1.0]], dtype=torch.float64)

    def batch(x):
        y = x @ truth
        kind = torch.arange(64)[:, None] % 2
        return Batch(x, {"wanted": y, "helper": torch.cat([kind, torch.where(kind == 0, y, -y)], dim=1)})

    for probe in ("validation", "next"):
        shaper = Labelled("wanted", "helper", ["friend", "foe"], estimator="lookahead", probe=probe, warmup=0, lr=0.01)
        model = SplitModel(Line(), {"wanted": nn.Identity(), "helper": nn.Identity()})
        data = [*map(batch, inputs)]
        run(shaper, data[:20], tasks=tasks, model=model, probe=data[20])
        friend, foe = shaper.named_weights().values()
        assert foe < 0.9 < 1.1 < friend


def test_bins_hold_their_share_of_the_labels_they_are_fitted_on():
    values = torch.rand(5, 1000, generator=torch.Generator().manual_seed(0)).square()
    values[0, :500] = 0
    values[1, 0] = torch.nan
    bins = Bins.quantile(iter(values), 5, valid=lambda y: y > 0)
    counts = torch.bucketize(values[values > 0].double(), torch.tensor(bins.edges).double(), right=True).bincount()
    assert (counts - counts.float().mean()).abs().max() <= 2
    with pytest.raises(ValueError, match="do not fill 5 bins"):
        Bins.quantile(torch.ones(100), 5)
    with pytest.raises(ValueError, match="0 labels"):
        Bins.quantile([], 5)
