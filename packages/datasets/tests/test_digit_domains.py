from functools import partial

import pytest
import torch
from sidetask_datasets import digit_domains
from sidetask_datasets.digit_domains import TASKS, _rendered
from sidetask_datasets.digits import scan_pools

FEW = {"train": 40, "validation": 10, "test": 10}


def test_twenty_domains_of_five_digits_have_images_of_their_own():
    data = digit_domains(**FEW)
    assert [task.name for task in data.tasks] == [task.input for task in data.tasks] == list(TASKS)
    assert len(TASKS) == 20
    assert data.input_shape == (3, 32, 32)
    batch = data.train[:]
    for task in data.tasks:
        labels = batch.target_of(task)
        assert set(labels.tolist()) == set(range(5))
        classes = data.views[task.name].classes
        assert classes == tuple("01234" if task.name.startswith("low") else "56789")
    images = {image.numpy().tobytes() for image in batch.inputs.values()}
    assert len(images) == 20


def test_turned_by_nothing_a_scan_stands_as_it_was_and_by_half_a_circle_on_its_head():
    tiles = scan_pools(0)["train"][0][:6]
    upright, turned = (_rendered(tiles, name, 0).float() for name in ("low_0", "low_180"))
    ink = torch.nn.functional.interpolate(tiles[:, None].float(), size=(32, 32), mode="bilinear", align_corners=False)
    for images, expected in ((upright, ink), (turned, ink.flip(2, 3))):
        for image, truth in zip(images, expected, strict=True):
            # Each channel lies between two colours, by the ink.
            for channel in image:
                both = torch.stack([channel.flatten(), truth.flatten()])
                assert abs(torch.corrcoef(both)[0, 1]) > 0.999


def test_no_scan_is_in_two_splits_or_twice_in_a_domain():
    data = digit_domains(train=300, validation=100, test=100, tasks=["low_0"])
    seen = [
        [image.numpy().tobytes() for image in getattr(data, split).parts["low_0"].inputs.data]
        for split in ("train", "validation", "test")
    ]
    flat = [image for images in seen for image in images]
    # A few of the scans are alike.
    assert len(set(flat)) > 0.99 * len(flat)


def test_domains_repeat_by_seed():
    one, same, other = (digit_domains(**FEW, tasks=["high_72"], seed=seed) for seed in (0, 0, 1))
    batches = [data.train[:5].inputs["high_72"] for data in (one, same, other)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["low_1"]}, "unknown task 'low_1'; there are: low_0"),
        ({"train": 5000}, "low_0: train is at most 5.. images, found 5000"),
        ({"test": 0}, "test is a number of samples"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        digit_domains(**options)


def test_further_tasks_join_them(check_further_tasks):
    check_further_tasks(partial(digit_domains, train=7, validation=3, test=4, tasks=["high_72", "low_0"]))
