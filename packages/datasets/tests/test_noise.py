from dataclasses import replace

import pytest
import torch
from sidetask_core import Method, SplitModel, Step
from sidetask_datasets import (
    Augmentation,
    Column,
    Dataset,
    JoinedSplit,
    ResidentSplit,
    View,
    digit_domains,
    digits,
    scenes,
    tasks,
    with_noise,
)
from sidetask_datasets.noise import NoisySplit
from sidetask_datasets.scenes.stream import Recipe, SceneStream

SIZE = (24, 32)
NAMES = ("segmentation", "depth")
OPTIONS = {"size": SIZE, "train": 12, "validation": 5, "test": 5, "tasks": NAMES}
PLAIN, NOISY = scenes(**OPTIONS), scenes(**OPTIONS, noise=True)
STREAM = scenes(**OPTIONS, noise=True, stream=True)
SPLITS = ("train", "validation", "test")


def noise(split, ids=slice(None)):
    return split[ids].targets["noise"]


def by_picture(batches):
    """Noise by what identifies a sample in a batch that is not augmented: its picture."""
    found = {}
    for batch in batches:
        for picture, target in zip(batch.inputs, batch.targets["noise"], strict=True):
            found[picture.numpy().tobytes()] = target.numpy().tobytes()
    return found


def test_it_is_uniform_and_independent_of_place_and_of_the_pixel_beside():
    values = torch.cat([noise(getattr(NOISY, split)) for split in SPLITS]).double()
    assert values.dtype == torch.float64
    assert values.min() >= 0
    assert values.max() < 1
    count = values.numel()
    # Deviations of the mean, the variance and ten shares, in units of their standard errors.
    assert abs(values.mean() - 1 / 2) * (12 * count) ** 0.5 < 4
    assert abs(values.square().mean() - 1 / 3) * (45 / 4 * count) ** 0.5 < 4
    shares = torch.histc(values, 10, 0, 1) / count
    assert ((shares - 0.1).abs() * (count / 0.09) ** 0.5 < 4).all()
    centred = values - 0.5
    for shift in (centred[..., 1:] * centred[..., :-1], centred[..., 1:, :] * centred[..., :-1, :]):
        assert abs(shift.mean()) * 12 * shift.numel() ** 0.5 < 4
    # A place that knew its value would give it away in the mean over samples.
    assert centred.mean(0).std().item() == pytest.approx((12 * len(values)) ** -0.5, rel=0.1)


def test_samples_have_noise_of_their_own_in_every_split():
    maps = torch.cat([noise(getattr(NOISY, split)) for split in SPLITS]).flatten(1).double() - 0.5
    correlation = 12 * (maps @ maps.T) / maps.shape[1]
    others = correlation[~torch.eye(len(maps), dtype=torch.bool)]
    assert others.abs().max() * maps.shape[1] ** 0.5 < 5


def test_it_belongs_to_the_sample_whatever_the_order_batch_epoch_and_process():
    whole = noise(NOISY.train)
    assert torch.equal(noise(NOISY.train, [7, 2]), whole[[7, 2]])
    assert torch.equal(noise(scenes(**OPTIONS, noise=True).train), whole)
    expected = by_picture(NOISY.train.batches(12, shuffle=False, augment=False))
    assert len(expected) == 12
    for options in ({"epoch": 3}, {"seed": 5}, {"batch_size": 5, "drop_last": False}, {"start": 2, "batch_size": 3}):
        options = {"batch_size": 4, "augment": False} | options
        found = by_picture(NOISY.train.batches(**options))
        assert found.items() <= expected.items()
        assert len(found) == (6 if "start" in options else 12)


@pytest.mark.parametrize("data", [NOISY, STREAM], ids=["kept", "stream"])
def test_ranks_share_it_and_a_resumed_epoch_goes_on_with_it(data):
    def targets(**options):
        return [batch.targets["noise"] for batch in data.train.batches(4, seed=1, epoch=2, **options)]

    whole = targets()
    shares = zip(*(targets(rank=rank, world=2) for rank in range(2)), strict=True)
    assert all(torch.equal(torch.cat(share), batch) for share, batch in zip(shares, whole, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], targets(start=1), strict=True))


def test_augmentation_leaves_it_where_it_is():
    plain, moved = (next(NOISY.train.batches(12, shuffle=False, augment=augment)) for augment in (False, True))
    assert not torch.equal(plain.inputs, moved.inputs)
    assert torch.equal(plain.targets["noise"], moved.targets["noise"])


def test_new_scenes_of_a_stream_have_new_noise():
    first, second = (next(STREAM.train.batches(12, epoch=e, shuffle=False)).targets["noise"] for e in (0, 1))
    assert not (first == second).all(dim=(1, 2, 3)).any()
    assert torch.equal(first, noise(NOISY.train))
    twice = SceneStream(Recipe(("depth",), SIZE), 24)
    later = next(NoisySplit(twice, STREAM.train.key, STREAM.train.shape).batches(24, shuffle=False)).targets["noise"]
    assert torch.equal(later, torch.cat([first, second]))


@pytest.mark.parametrize("split", SPLITS)
def test_the_other_tasks_and_their_targets_stay_as_they_were(split):
    for augment in (False, True):
        options = {"batch_size": 5, "seed": 2, "augment": augment}
        for plain, noisy in zip(
            getattr(PLAIN, split).batches(**options), getattr(NOISY, split).batches(**options), strict=True
        ):
            assert torch.equal(plain.inputs, noisy.inputs)
            assert list(noisy.targets) == [*plain.targets, "noise"]
            assert all(torch.equal(target, noisy.targets[name]) for name, target in plain.targets.items())
    for before, after in zip(PLAIN.tasks, NOISY.tasks, strict=False):
        assert (before.name, before.primary, list(before.metrics)) == (after.name, after.primary, list(after.metrics))


def test_seeds_differ_and_it_may_have_one_of_its_own():
    assert not torch.equal(noise(with_noise(PLAIN, 1).train), noise(NOISY.train))
    assert torch.equal(noise(with_noise(PLAIN, 0).train), noise(NOISY.train))


def test_it_is_an_auxiliary_task_that_is_not_deployed():
    for data in (NOISY, scenes(**OPTIONS, noise=True, primary=["depth"])):
        assert [task.primary for task in data.tasks if task.name == "noise"] == [False]
    with pytest.raises(ValueError, match="unknown primary task 'noise'; there are: segmentation, depth"):
        scenes(**OPTIONS, noise=True, primary=["noise"])
    heads = {name: torch.nn.Conv2d(4, count, 1) for name, count in NOISY.outputs.items()}
    step = Step(SplitModel(torch.nn.Conv2d(3, 4, 1), heads), NOISY.tasks, Method())
    assert set(step.export().heads) == set(NAMES)


def test_half_is_the_best_guess():
    (task,) = (task for task in NOISY.tasks if task.name == "noise")
    target = NOISY.train[:].target_of(task)
    errors = {guess: task.mean(torch.full_like(target, guess), target)[0].item() for guess in (0.4, 0.5, 0.6)}
    assert errors[0.5] == pytest.approx(0.25, abs=0.01)
    assert min(errors, key=errors.get) == 0.5
    (metric,) = task.metrics.values()
    metric.reset()
    metric.update(torch.full_like(target, 0.4), target)
    assert metric.compute().item() == pytest.approx(errors[0.4])
    assert NOISY.views["noise"].image(target[0]).shape == (*SIZE, 3)


def test_any_dense_dataset_takes_it():
    split = ResidentSplit(
        Column(torch.zeros(3, 1, 4, 6, dtype=torch.uint8), "image"),
        {"edges": Column(torch.zeros(3, 4, 6, dtype=torch.uint8), "binary")},
        Augmentation(),
    )
    toy = Dataset(
        name="toy",
        tasks=(tasks.edges(),),
        **dict.fromkeys(SPLITS, split),
        outputs={"edges": 1},
        views={"edges": View("binary")},
        input_view=View("image"),
        dense=True,
    )
    data = with_noise(toy)
    assert data.to("cpu").train[0].targets["noise"].shape == (1, 1, 4, 6)
    # One split in three places: as the validation split it has other noise than as the training split.
    assert not torch.equal(noise(data.train), noise(data.validation))
    with pytest.raises(ValueError, match="dataset 'toy' has a task 'noise' already"):
        with_noise(data)


def test_a_whole_image_has_one_number():
    data = with_noise(digits(train=1500, validation=2, test=2), seed=3)
    values = noise(data.train).double()
    assert values.shape == (1500, 1)
    assert abs(values.mean() - 1 / 2) * (12 * 1500) ** 0.5 < 4
    assert abs(values.square().mean() - 1 / 3) * (45 / 4 * 1500) ** 0.5 < 4
    centred = values.flatten() - 0.5
    assert abs((centred[1:] * centred[:-1]).mean()) * 12 * 1499**0.5 < 4
    assert data.outputs["noise"] == 1
    # A bar from the lower edge, as high as the number.
    picture = data.views["noise"].image(torch.tensor([0.25]))
    assert (picture != 255).any(axis=(1, 2)).tolist() == [False] * 27 + [True] * 9


DOMAINS = {"train": 9, "validation": 4, "test": 4, "tasks": ["low_0", "high_36", "low_72"]}


def test_of_several_inputs_one_has_it():
    plain = digit_domains(**DOMAINS)
    for domain in (None, *DOMAINS["tasks"]):
        data = with_noise(plain, domain=domain)
        (task,) = (task for task in data.tasks if task.name == "noise")
        chosen = domain or "low_0"
        assert task.input == chosen
        batch = next(data.train.batches(3))
        assert torch.equal(batch.input_of(task), batch.inputs[chosen])
        assert batch.target_of(task).shape == (3, 1)
        for name, part in data.train.parts.items():
            assert isinstance(part, NoisySplit) == (name == chosen)
    with pytest.raises(ValueError, match="unknown domain 'low_3'; there are: low_0, high_36, low_72"):
        with_noise(plain, domain="low_3")
    with pytest.raises(ValueError, match="dataset 'digit_domains' has a task 'noise' already"):
        with_noise(data, domain="low_72")
    with pytest.raises(ValueError, match="dataset 'scenes' has no domain 'low_0': all tasks share one input"):
        with_noise(PLAIN, domain="low_0")


def test_where_its_domain_has_run_out_it_is_absent():
    wide, short = digit_domains(**DOMAINS), digit_domains(**DOMAINS | {"train": 4})
    parts = {name: (short if name == "low_72" else wide).train.parts[name] for name in DOMAINS["tasks"]}
    uneven = replace(wide, train=JoinedSplit(parts))
    for domain, expected in (("low_72", [3, 1, 0]), ("high_36", [3, 3, 3])):
        data = with_noise(uneven, domain=domain)
        found = [batch.targets["noise"] for batch in data.train.batches(3, shuffle=False, augment=False)]
        assert [0 if target is None else len(target) for target in found] == expected
        shuffled = [batch.targets["noise"] for batch in data.train.batches(3)]
        assert [len(target) for target in shuffled] == [3, 3, 3]
    # A step goes on without it.
    data = with_noise(uneven, domain="low_72")
    heads = {
        name: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, count))
        for name, count in data.outputs.items()
    }
    step = Step(SplitModel(torch.nn.Identity(), heads), data.tasks, Method())
    absent = list(data.train.batches(3, shuffle=False))[-1]
    assert step.backward(absent).losses["noise"] == 0
    assert not any(p.grad is not None and p.grad.any() for p in heads["noise"].parameters())


def test_inputs_of_another_kind_of_split_are_refused():
    data = digit_domains(**DOMAINS)
    with pytest.raises(ValueError, match="has domains, so its splits are JoinedSplits; validation is a NoisySplit"):
        with_noise(replace(data, validation=NoisySplit(data.validation, 0, (1,))))


@pytest.mark.parametrize("option", ["noise", "stream"])
def test_a_switch_is_true_or_false(option):
    with pytest.raises(ValueError, match=f"{option} is true or false, found 'off'"):
        scenes(**OPTIONS, **{option: "off"})
