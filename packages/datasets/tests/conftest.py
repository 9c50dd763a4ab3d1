from itertools import chain, zip_longest

import pytest
import sidetask_datasets
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are small: a second thread costs more than it does where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Whatever a test decodes is its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SIDETASK_CACHE", str(folder))
    return folder


DEALT = (
    {"batch_size": 1, "shuffle": False},
    {"batch_size": 2, "shuffle": False, "world": 2},
    {"batch_size": 3, "seed": 1},
    {"batch_size": 1, "seed": 1, "epoch": 2, "start": 1},
    {"batch_size": 2, "seed": 5, "epoch": 1, "world": 2},
)


@pytest.fixture
def check_further_tasks(tmp_path_factory):
    """Checks of a dataset, made by a function of its switch `noise`, that noise and soft labels join its tasks."""

    def check(make):
        plain, noisy = make(), make(noise=True)
        before, task = noisy.tasks[:-1], noisy.tasks[-1]
        assert [(one.name, one.primary) for one in before] == [(one.name, one.primary) for one in plain.tasks]
        assert (task.name, task.primary, task.input) == ("noise", False, plain.tasks[0].input)
        folder = tmp_path_factory.mktemp("labels")
        sidetask_datasets.pseudo_label(plain, folder, soft, kind="soft", domain=task.input, batch_size=3)
        both = sidetask_datasets.with_pseudo(noisy, {"guess": folder})
        assert both.tasks[-1].input == task.input
        for name in ("train", "validation", "test"):
            split, further = getattr(plain, name), getattr(both, name)
            own = further.parts[task.input] if task.input else further
            noise, guess = (own[:].targets[target] for target in ("noise", "guess"))
            shape = (1, *noisy.input_shape[-2:]) if noisy.dense else (1,)
            assert noise.shape == (len(own), *shape)
            assert 0 <= noise.min() <= noise.max() < 1
            assert len(noise.flatten(1).unique(dim=0)) == len(own)
            torch.testing.assert_close(guess, soft(own[:].inputs), rtol=0, atol=2e-3)
            for options in DEALT:
                ids = places(further, task.input, **options)
                for split_of in (further, further.to("cpu", memory=0)):
                    batches = dealt(split_of, **options, augment=False)
                    assert same_rows(batches, "noise", noise[ids])
                    assert same_rows(batches, "guess", guess[ids])
                    assert all((b.target_of(task) is None) == (b.input_of(task) is None) for b in batches)
                moved = dealt(further, **options)
                assert same_rows(moved, "noise", noise[ids])
                for one, other in zip(dealt(split, **options), moved, strict=True):
                    assert one.targets.keys() | {"noise", "guess"} == other.targets.keys()
                    assert all(same(one.targets[key], other.targets[key]) for key in one.targets)
                    assert all(same(one.input_of(t), other.input_of(t)) for t in plain.tasks)
        prediction = torch.full_like(noise, 0.5).repeat(1, noisy.outputs["noise"], *[1] * (noise.ndim - 2))
        loss, count = task.mean(prediction, noise)
        assert (loss, count) == ((prediction - noise).abs().mean(), noise.numel())
        (metric,) = task.metrics.values()
        metric.update(prediction, noise)
        torch.testing.assert_close(metric.compute().float(), loss)
        assert noisy.views["noise"].image(noise[0]).ndim == 3
        with pytest.raises(ValueError, match="noise is true or false, found 'off'"):
            make(noise="off")

    return check


def soft(images):
    """A distribution over two classes that follows from the image."""
    return torch.stack([images.mean(dim=(1, 2, 3)), torch.zeros(len(images))], dim=1).softmax(dim=1)


def same(one, other):
    return one is other is None or torch.equal(one, other)


def dealt(split, world=1, **options):
    """The batches of an epoch, of all processes."""
    shares = [split.batches(rank=rank, world=world, drop_last=False, **options) for rank in range(world)]
    # A last batch may leave the first process without a share.
    return [batch for batch in chain(*zip_longest(*shares)) if batch is not None]


def places(split, domain, batch_size, seed=0, epoch=0, shuffle=True, start=0, **_):
    """The ids of a domain's samples in the order in which they are dealt."""
    order = split.order(seed=seed, epoch=epoch, shuffle=shuffle)[start * batch_size :]
    ids = order[:, list(split.parts).index(domain)] if domain else order
    return ids[ids >= 0]


def same_rows(batches, target, expected):
    found = [row for batch in batches if batch.targets[target] is not None for row in batch.targets[target]]
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
