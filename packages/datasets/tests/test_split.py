from itertools import chain

import pytest
import torch
from sidetask_datasets import Augmentation, Column, ResidentSplit
from sidetask_datasets.scenes.stream import Recipe, SceneStream


def make_split(count=23, augmentation=None):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, 3, 6, 8), dtype=torch.uint8, generator=generator)
    ids = torch.arange(count, dtype=torch.int16)
    depth = torch.randint(500, 9000, (count, 6, 8), dtype=torch.int16, generator=generator)
    columns = {"id": Column(ids, "label"), "depth": Column(depth, "depth")}
    return ResidentSplit(Column(image, "image"), columns, augmentation)


def ids(batches):
    return [batch.targets["id"].tolist() for batch in batches]


def same(a, b):
    return torch.equal(a.inputs, b.inputs) and all(torch.equal(a.targets[k], b.targets[k]) for k in a.targets)


AUGMENTED = make_split(augmentation=Augmentation())
STREAM = SceneStream(Recipe(("depth",), size=(6, 8)), 23, Augmentation())


def test_an_epoch_deals_every_sample_once_and_epochs_differ():
    split = make_split()
    first = ids(split.batches(4, epoch=0, drop_last=False))
    second = ids(split.batches(4, epoch=1, drop_last=False))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(23))
    assert first != second
    assert first == ids(split.batches(4, epoch=0, drop_last=False))
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 4, 3]
    assert split.count(4, drop_last=False) == 6
    assert ids(split.batches(4)) == first[:5]
    assert split.count(4) == 5
    assert first != ids(split.batches(4, seed=1, drop_last=False))


@pytest.mark.parametrize("split", [AUGMENTED, STREAM], ids=["resident", "stream"])
@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_a_resumed_epoch_goes_on_as_if_never_stopped(split, start):
    whole = list(split.batches(4, seed=3, epoch=2))
    resumed = list(split.batches(4, seed=3, epoch=2, start=start))
    assert len(resumed) == 5 - start
    assert all(same(a, b) for a, b in zip(whole[start:], resumed, strict=True))


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_each_batch(drop_last):
    whole = list(AUGMENTED.batches(6, epoch=1, drop_last=drop_last))
    parts = [list(AUGMENTED.batches(6, epoch=1, drop_last=drop_last, rank=r, world=3)) for r in range(3)]
    for index, batch in enumerate(whole):
        shares = [part[index] for part in parts]
        for name in batch.targets:
            assert torch.equal(torch.cat([share.targets[name] for share in shares]), batch.targets[name])
        assert torch.equal(torch.cat([share.inputs for share in shares]), batch.inputs)
        if len(batch.inputs) == 6:
            assert [len(share.inputs) for share in shares] == [2, 2, 2]


def test_a_last_batch_too_small_for_all_ranks_loses_no_sample():
    split = make_split(count=7)
    shares = [ids(split.batches(6, rank=r, world=3, drop_last=False)) for r in range(3)]
    assert sorted(chain(*chain(*shares))) == list(range(7))


def test_augmentation_of_a_sample_does_not_depend_on_batch_or_order():
    def by_id(**options):
        found = {}
        for batch in AUGMENTED.batches(epoch=4, drop_last=False, **options):
            for row, sample in enumerate(batch.targets["id"].tolist()):
                found[sample] = (batch.inputs[row], batch.targets["depth"][row])
        return found

    ordered, shuffled = by_id(batch_size=23, shuffle=False), by_id(batch_size=5)
    for sample, (image, depth) in ordered.items():
        torch.testing.assert_close(image, shuffled[sample][0], rtol=0, atol=1e-6)
        assert torch.equal(depth, shuffled[sample][1])
    plain = {i: AUGMENTED[i].inputs[0] for i in range(23)}
    assert sum(not torch.allclose(plain[i], ordered[i][0], atol=1e-4) for i in plain) > 12
    untouched = next(AUGMENTED.batches(23, shuffle=False, augment=False))
    assert torch.equal(untouched.inputs, torch.stack([plain[i] for i in range(23)]))


def test_indexing_gives_unaugmented_samples():
    split = make_split()
    assert split[4].targets["id"].tolist() == [4]
    assert split[-1].targets["id"].tolist() == [22]
    assert split[2:5].targets["id"].tolist() == [2, 3, 4]
    assert split[[7, 0]].targets["id"].tolist() == [7, 0]
    assert split[torch.tensor([1])].targets["id"].tolist() == [1]
    with pytest.raises(IndexError, match="sample 23 is out of range for a split of 23 samples"):
        split[[0, 23]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "world": 4}, "6 samples cannot be shared equally by 4 processes"),
        ({"batch_size": 4, "world": 2, "rank": 2}, "rank 2 of world 2"),
        ({"batch_size": 4, "start": 6}, "start is between 0 and the epoch's 5 batches, found 6"),
        ({"batch_size": 24}, "a split of 23 samples has no batch of 24"),
        ({"batch_size": 0}, "batch_size is at least 1, found 0"),
    ],
)
def test_impossible_batches_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        make_split().batches(**options)


def test_columns_must_be_of_one_length():
    image = Column(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), "image")
    with pytest.raises(ValueError, match="target 'a' has 3 samples, the inputs have 2"):
        ResidentSplit(image, {"a": Column(torch.zeros(3, dtype=torch.int16), "label")})
    with pytest.raises(ValueError, match="at least one sample"):
        ResidentSplit(Column(image.data[:0], "image"), {})


def test_a_split_says_how_much_memory_it_takes():
    assert make_split().nbytes == 23 * (3 * 48 + 2 + 2 * 48)
