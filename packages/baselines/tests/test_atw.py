import math

import numpy as np
import pytest
import torch
from sidetask_baselines.atw import ATW, atw
from sidetask_core.testing import conformance, tiny_tasks

TASKS = tiny_tasks()

TestATW = conformance(atw)
TestATWWithoutMemory = conformance(atw, decay=0.0, temperature=0.5)


def by_hand(history, decay, temperature, present):
    """Weights from the whole history, by the written definition; `history` maps tasks to their losses so far."""
    scores = {}
    for task in present:
        losses = np.array(history[task])
        fading = decay ** np.arange(len(losses))[::-1]
        spread = losses.std()
        scores[task] = (fading @ losses / fading.sum() - losses.mean()) / spread if spread > 0 else 0.0
    total = sum(math.exp(z / temperature) for z in scores.values())
    return {task: len(present) * math.exp(z / temperature) / total for task, z in scores.items()}


@pytest.mark.parametrize(("decay", "temperature"), [(0.9, 2.0), (0.0, 0.5), (0.99, 1.0)])
def test_weights_follow_the_written_definition(given, decay, temperature):
    rng = np.random.default_rng(0)
    rule, history = ATW(TASKS, decay=decay, temperature=temperature), [[], [], []]
    for step in range(200):
        losses = rng.gamma(4.0, size=3) * np.array([1.0, 1e-3, 50.0]) * np.array([0.99, 0.999, 1.0]) ** step
        labelled = rng.random(3) < 0.7
        losses[~labelled] = 0
        for task in np.flatnonzero(labelled):
            history[task].append(losses[task])
        weights = rule(given(tuple(losses), iteration=step, labelled=labelled.tolist())).numpy()
        expected = by_hand(history, decay, temperature, np.flatnonzero(labelled))
        for task in range(3):
            assert weights[task] == pytest.approx(expected.get(task, 0.0), rel=1e-9)


def test_two_steps_by_hand(given):
    """Of two losses, the mean is halfway and the deviation half their distance."""
    rule = ATW(TASKS, decay=0.5, temperature=1.0)
    assert rule(given((4.0, 1.0, 7.0))).tolist() == [1, 1, 1]
    weights = rule(given((2.0, 3.0, 7.0)))
    # Short-term means (1/2 · 4 + 2) / 1.5 and (1/2 · 1 + 3) / 1.5: a third of a deviation below and above.
    expected = torch.tensor([-1 / 3, 1 / 3, 0.0], dtype=torch.float64).exp()
    torch.testing.assert_close(weights, 3 * expected / expected.sum())


def test_neither_scale_nor_offset_of_a_loss_matters(given):
    rng = np.random.default_rng(1)
    plain, changed = ATW(TASKS), ATW(TASKS)
    for losses in rng.gamma(2.0, size=(50, 3)):
        a, b, c = losses
        torch.testing.assert_close(
            plain(given((a, b, c))), changed(given((1e6 * a, 1e-6 * b, c - 100.0))), rtol=1e-9, atol=0
        )


def test_losses_that_stand_still_have_equal_weights(given):
    """A float32 loss that flickers by one unit in the last place stands still."""
    rule, flicker = ATW(TASKS), 0.7 * (1 + 2**-23)
    for step in range(1000):
        weights = rule(given((flicker if step % 7 == 0 else 0.7, 1e6, 0.0)))
        assert weights.tolist() == [1, 1, 1]


def test_a_task_that_does_not_come_down_gains_weight(given):
    rule = ATW(TASKS)
    for step in range(100):
        weights = rule(given((math.exp(-0.03 * step), 1.0, 1.0 + 0.01 * step)))
    assert weights[0] < weights[1] < weights[2]


def test_weights_forget_a_shock_as_the_history_grows(given):
    rule, steady = ATW(TASKS), (1.0, 1.0, 1.0)
    distances = []
    for step in range(400):
        weights = rule(given((9.0, 1.0, 1.0) if step == 20 else steady))
        distances.append((weights - 1).abs().max().item())
    assert max(distances) == distances[20]
    assert distances[-1] < 0.05 < distances[20]


def test_an_absent_task_is_as_if_it_were_not_there(given):
    rng = np.random.default_rng(2)
    whole, part = ATW(TASKS), ATW(TASKS[:2])
    for losses in rng.gamma(2.0, size=(20, 2)):
        weights = whole(given((*losses, 0.0), labelled=(True, True, False)))
        torch.testing.assert_close(weights[:2], part(given(tuple(losses))), rtol=1e-12, atol=0)
        assert weights[2] == 0
    assert whole(given((0.0,) * 3, labelled=(False,) * 3)).tolist() == [0, 0, 0]
    assert whole(given((1.0, 2.0, 3.0))).isfinite().all()


def test_the_host_never_waits_for_the_device(given):
    """Tensors without data raise where their values are asked for."""
    rule, signals = ATW(TASKS), given()
    signals.losses, signals.labelled = signals.losses.to("meta"), signals.labelled.to("meta")
    for _ in range(3):
        assert rule(signals).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay must be at least 0 and less than 1, not 1.0"),
        ({"decay": -0.1}, "decay must be at least 0 and less than 1, not -0.1"),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ATW(TASKS, **options)
