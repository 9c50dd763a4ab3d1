from functools import partial

import pytest
import torch
from sidetask_datasets import digits, draws
from sidetask_datasets.digits import ATTRIBUTES, SHIFT, SIZE, TASKS, TILE, _pairs, _place, _scans


def test_two_digits_overlap_by_the_brighter_pixel():
    scans, _ = _scans()
    assert scans.shape == (1797, TILE, TILE)
    first = _place(scans[:2], torch.tensor([0, SHIFT]), torch.tensor([3, 1]))
    assert first.shape == (2, SIZE, SIZE)
    assert torch.equal(first[1, SHIFT : SHIFT + TILE, 1 : 1 + TILE], scans[1])
    assert first.long().sum((1, 2)).tolist() == scans[:2].long().sum((1, 2)).tolist()
    ink = torch.full((1, TILE, TILE), 200, dtype=torch.uint8)
    corners = _pairs(ink, torch.tensor([7], dtype=torch.int16), 64, key=3)[0][:, 0]
    assert corners.max() == 200
    rows = (corners > 0).any(2)
    top = rows.long().argmax(1)
    bottom = SIZE - 1 - rows.flip(1).long().argmax(1)
    assert set(top.tolist()) == set(range(SHIFT + 1))
    assert set(bottom.tolist()) == set(range(SIZE - 1 - SHIFT, SIZE))


def test_no_scan_is_in_two_splits():
    """Every image of a split is made of its own scans: each is found again by its digit's pixels alone in one split."""
    scans, _ = _scans()
    order = draws.permutation(draws.key(0, "digits"), len(scans))
    pools = order[:1078], order[1078:1437], order[1437:]
    assert sum(len(pool) for pool in pools) == len(set(order.tolist())) == 1797
    data = digits(train=200, validation=50, test=50)
    for split, pool in zip((data.train, data.validation, data.test), pools, strict=True):
        tiles = scans[pool]
        for image in split.inputs.data[:10, 0]:
            # The top left tile, at one of 25 places, is nowhere brighter than the image.
            windows = [image[i : i + TILE, j : j + TILE] for i in range(SHIFT + 1) for j in range(SHIFT + 1)]
            assert any(bool((tiles <= window).flatten(1).all(1).any()) for window in windows)


def test_splits_repeat_by_seed_and_differ_from_each_other():
    one, same, other = digits(30, 30, 30), digits(30, 30, 30), digits(30, 30, 30, seed=1)
    assert torch.equal(one.train.inputs.data, same.train.inputs.data)
    assert not torch.equal(one.train.inputs.data, other.train.inputs.data)
    assert not torch.equal(one.train.inputs.data, one.test.inputs.data)
    more = digits(40, 30, 30)
    assert torch.equal(more.train.inputs.data[:30], one.train.inputs.data)


def test_it_is_a_dataset_of_two_classifications():
    data = digits(50, 20, 20, primary=["bottom_right"])
    assert data.input_shape == (1, 36, 36)
    assert [(task.name, task.primary) for task in data.tasks] == [("top_left", False), ("bottom_right", True)]
    assert dict(data.outputs) == {"top_left": 10, "bottom_right": 10}
    assert not data.dense
    batch = data.test[:20]
    assert abs(batch.inputs.mean()) < 0.3
    assert 0.7 < batch.inputs.std() < 1.3
    assert data.show_input(batch.inputs[0]).shape == (36, 36, 3)
    for task in data.tasks:
        loss, count = task.mean(torch.zeros(20, 10), batch.target_of(task))
        assert loss.item() == pytest.approx(2.302585, abs=1e-5)
        assert count == 20
        assert data.views[task.name].image(batch.target_of(task)[0]).shape == (36, 36, 3)
    assert data.to("cpu").train.nbytes == data.train.nbytes


def test_all_digits_occur_at_both_places():
    data = digits(2000, 10, 10)
    for name in ("top_left", "bottom_right"):
        counts = torch.bincount(data.train.targets[name].data.long(), minlength=10)
        assert counts.min() > 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["left"]}, "unknown task 'left'; there are: top_left, bottom_right"),
        ({"tasks": []}, "at least one task is needed"),
        ({"tasks": ["top_left", "top_left"]}, "task 'top_left' is named twice"),
        (
            {"tasks": ["top_left"], "primary": ["bottom_right"]},
            "unknown primary task 'bottom_right'; there are: top_left",
        ),
        ({"source": "letters"}, "unknown source 'letters'; there are: scans, mnist, fashion"),
        ({"source": "mnist"}, "source 'mnist' needs a root"),
        ({"root": "."}, "source 'scans' is of no root"),
        ({"train": 0}, "train is a number of samples, at least 1, found 0"),
        ({"test": 2.5}, "test is a number of samples, at least 1, found 2.5"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        digits(**options)


def test_attributes_follow_from_both_digits():
    names = [*TASKS, *ATTRIBUTES]
    data = digits(400, 20, 20, tasks=names)
    batch = data.train[:]
    left, right = batch.targets["top_left"].tolist(), batch.targets["bottom_right"].tolist()
    expected = {
        "top_left_even": [a % 2 == 0 for a in left],
        "top_left_large": [a > 4 for a in left],
        "top_left_round": [a in (0, 6, 8, 9) for a in left],
        "bottom_right_even": [b % 2 == 0 for b in right],
        "bottom_right_large": [b > 4 for b in right],
        "bottom_right_round": [b in (0, 6, 8, 9) for b in right],
        "same_parity": [(a + b) % 2 == 0 for a, b in zip(left, right, strict=True)],
        "top_left_larger": [a > b for a, b in zip(left, right, strict=True)],
        "large_sum": [a + b > 9 for a, b in zip(left, right, strict=True)],
    }
    assert expected.keys() == ATTRIBUTES.keys()
    for name, holds in expected.items():
        assert batch.targets[name].tolist() == [int(one) for one in holds]
        assert 0.3 < sum(holds) / len(holds) < 0.7
        assert (data.outputs[name], data.views[name].classes) == (2, ("no", "yes"))


def test_clothes_have_no_attributes(tmp_path):
    with pytest.raises(ValueError, match=r"unknown task 'large_sum'; there are: top_left, bottom_right$"):
        digits(source="fashion", root=tmp_path, tasks=["large_sum"])


def test_further_tasks_join_them(check_further_tasks):
    check_further_tasks(partial(digits, train=7, validation=3, test=4))
