"""Streams: the batches of the resident split, bit for bit, whatever lives where."""

import threading

import pytest
import torch
from sidetask_datasets import (
    Augmentation,
    Column,
    ResidentSplit,
    Samples,
    StreamedSplit,
    digits,
    scenes,
    with_noise,
)
from sidetask_datasets.joined import JoinedSplit
from torch.utils.data import DataLoader

COUNT = 23


def make_split(augmentation=None):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (COUNT, 3, 6, 8), dtype=torch.uint8, generator=generator)
    targets = {
        "id": Column(torch.arange(COUNT, dtype=torch.int16), "label"),
        "depth": Column(torch.rand(COUNT, 6, 8, generator=generator), "depth"),
        "normals": Column(torch.randint(-99, 99, (COUNT, 3, 6, 8), dtype=torch.int16, generator=generator), "normals"),
        "state": Column(torch.rand(COUNT, 4, generator=generator), "vector"),
    }
    return ResidentSplit(Column(image, "image", (0.5,) * 3, (0.2,) * 3), targets, augmentation)


def same(a, b):
    return torch.equal(a.inputs, b.inputs) and all(torch.equal(a.targets[k], b.targets[k]) for k in a.targets)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start": 2},
        {"shuffle": False, "drop_last": False},
        {"rank": 1, "world": 2},
        {"augment": False},
        {"seed": 4},
    ],
    ids=str,
)
def test_batches_are_those_of_the_resident_split(options):
    resident = make_split(Augmentation())
    streamed = StreamedSplit(resident, "cpu")
    for epoch in (0, 3):
        # All of them at once: a buffer used twice would show in an early batch.
        ours = list(streamed.batches(4, epoch=epoch, **options))
        theirs = list(resident.batches(4, epoch=epoch, **options))
        assert len(ours) == len(theirs) > 0
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert same(streamed[[3, -1]], resident[[3, -1]])
    assert streamed.checksum() == resident.checksum()


def test_an_epoch_left_early_leaves_no_thread_behind():
    before = threading.active_count()
    batches = StreamedSplit(make_split(), "cpu").batches(4)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_an_error_of_the_thread_is_raised_where_the_batch_is_asked_for(monkeypatch):
    streamed = StreamedSplit(make_split(), "cpu")
    monkeypatch.setattr(streamed.source, "gather", lambda ids: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(streamed.batches(4))


def test_further_targets_are_streamed_too():
    more = {"flag": Column(torch.arange(COUNT, dtype=torch.int16) % 2, "label")}
    ours = next(StreamedSplit(make_split(), "cpu").with_targets(more).batches(4))
    assert same(ours, next(make_split().with_targets(more).batches(4)))
    assert ours.targets["flag"].tolist() == [i % 2 for i in ours.targets["id"].tolist()]


def test_what_fits_into_memory_is_resident_and_the_rest_is_streamed():
    data = scenes(size=(6, 8), train=20, validation=10, test=5, tasks=["depth", "normals"])
    train, validation, test = data.train.nbytes, data.validation.nbytes, data.test.nbytes

    def kinds(memory):
        moved = data.to("cpu", memory=memory)
        return [type(split).__name__ for split in (moved.train, moved.validation, moved.test)]

    resident, streamed = "ResidentSplit", "StreamedSplit"
    assert kinds(None) == kinds(train + validation + test) == [resident] * 3
    assert kinds(train + test) == [resident, streamed, resident]
    assert kinds(validation + test) == [streamed, resident, resident]
    assert kinds(0) == [streamed] * 3
    moved = data.to("cpu", memory=0)
    assert moved.train.nbytes == 0
    assert moved.to("cpu").train.nbytes == train
    assert all(same(a, b) for a, b in zip(moved.train.batches(4), data.train.batches(4), strict=True))


def test_noise_and_joined_domains_are_streamed():
    data = with_noise(scenes(size=(6, 8), train=20, validation=10, test=5, tasks=["depth"]))
    ours = data.to("cpu", memory=0)
    assert isinstance(ours.train.split, StreamedSplit)
    assert all(same(a, b) for a, b in zip(ours.train.batches(4, seed=2), data.train.batches(4, seed=2), strict=True))
    parts = {
        name: ResidentSplit(Column(torch.zeros(n, 1, 2, 2, dtype=torch.uint8), "image"), {name: labels})
        for name, n in (("a", 6), ("b", 4))
        if (labels := Column(torch.arange(n, dtype=torch.int16), "label"))
    }
    joined = JoinedSplit(parts)
    streamed = joined.to("cpu", memory=parts["a"].nbytes)
    assert [type(part).__name__ for part in streamed.parts.values()] == ["ResidentSplit", "StreamedSplit"]
    for a, b in zip(joined.batches(2), streamed.batches(2), strict=True):
        assert all(torch.equal(a.targets[k], b.targets[k]) for k in "ab")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streaming_to_a_cuda_device_is_bit_for_bit_the_same():
    resident = make_split(Augmentation()).to("cuda")
    streamed = make_split(Augmentation()).to("cuda", memory=0)
    for epoch in range(20):
        ours, theirs = list(streamed.batches(4, epoch=epoch)), list(resident.batches(4, epoch=epoch))
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_the_samples_of_the_split(workers):
    split = make_split(Augmentation())
    samples = Samples(split, augment=True, seed=3, epoch=2)
    whole = next(split.batches(COUNT, shuffle=False, seed=3, epoch=2))
    loaded = list(DataLoader(samples, batch_size=5, num_workers=workers))
    inputs = torch.cat([inputs for inputs, _ in loaded])
    torch.testing.assert_close(inputs, whole.inputs, rtol=0, atol=1e-6)
    for name, target in whole.targets.items():
        assert torch.equal(torch.cat([targets[name] for _, targets in loaded]), target)
    with pytest.raises(IndexError, match="sample 23 is out of range"):
        samples[23]


def test_inputs_of_their_own_are_no_samples():
    split = JoinedSplit({"a": digits(train=4, validation=2, test=2).train})
    with pytest.raises(ValueError, match="inputs of their own"):
        Samples(split)
