"""Splits side by side: every domain complete, in an order of its own."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from sidetask_core import Batch
from sidetask_datasets import Augmentation, Column, Dataset, JoinedSplit, ResidentSplit, View, tasks
from sidetask_datasets.joined import alone, beside, domains_of

SIZES = {"a": 11, "b": 4, "c": 7}


def domain(name, count, augmentation=None):
    generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
    image = torch.randint(0, 256, (count, 3, 6, 8), dtype=torch.uint8, generator=generator)
    return ResidentSplit(
        Column(image, "image"), {name: Column(torch.arange(count, dtype=torch.int16), "label")}, augmentation
    )


def joined(augmentation=None):
    return JoinedSplit({name: domain(name, count, augmentation) for name, count in SIZES.items()})


def ids(batches, name):
    return [[] if batch.targets[name] is None else batch.targets[name].tolist() for batch in batches]


def same(a, b):
    return (
        a.inputs.keys() == b.inputs.keys()
        and all(torch.equal(a.inputs[k], b.inputs[k]) for k in a.inputs)
        and all(a.targets[k] is b.targets[k] is None or torch.equal(a.targets[k], b.targets[k]) for k in a.targets)
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11])
def test_in_order_every_sample_of_every_domain_comes_once(size):
    split = joined()
    batches = list(split.batches(size, shuffle=False, augment=False, drop_last=False))
    assert len(batches) == split.count(size, drop_last=False) == -(-11 // size)
    for name, count in SIZES.items():
        assert list(chain(*ids(batches, name))) == list(range(count))
    for batch in batches:
        assert list(batch.targets) == list(SIZES)
        assert set(batch.inputs) == {name for name, target in batch.targets.items() if target is not None}
        for name, image in batch.inputs.items():
            whole = split.parts[name][batch.targets[name]]
            assert torch.equal(image, whole.inputs)


@pytest.mark.parametrize("size", [2, 4, 5])
def test_shuffled_batches_are_full_and_short_domains_begin_again(size):
    split = joined()
    for epoch in range(3):
        batches = list(split.batches(size, epoch=epoch))
        assert len(batches) == 11 // size
        for name, count in SIZES.items():
            assert [len(found) for found in ids(batches, name)] == [size] * (11 // size)
            dealt = list(chain(*ids(split.batches(size, epoch=epoch, drop_last=False), name)))
            assert len(dealt) == 11
            for start in range(0, 11, count):
                once = dealt[start : start + count]
                assert len(set(once)) == len(once)
            if count == 4:
                assert dealt[:4] != dealt[4:8]


def test_domains_have_orders_of_their_own_that_depend_on_seed_and_epoch():
    same_size = JoinedSplit({name: domain(name, 11) for name in "ab"})
    found = {
        (seed, epoch): tuple(tuple(chain(*ids(same_size.batches(1, seed=seed, epoch=epoch), name))) for name in "ab")
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(chain(*found.values()))) == 8
    again = JoinedSplit({name: domain(name, 11) for name in "ba"})
    assert tuple(chain(*ids(again.batches(1), "a"))) == found[0, 0][0]


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_resumed_epoch_goes_on_as_if_never_stopped(start):
    split = joined(Augmentation())
    whole = list(split.batches(3, seed=3, epoch=2))
    resumed = list(split.batches(3, seed=3, epoch=2, start=start))
    assert len(resumed) == 3 - start
    assert all(same(a, b) for a, b in zip(whole[start:], resumed, strict=True))


@pytest.mark.parametrize("options", [{}, {"shuffle": False, "augment": False, "drop_last": False}])
def test_ranks_share_each_batch_of_each_domain(options):
    split = joined(Augmentation())
    whole = list(split.batches(4, **options))
    parts = [list(split.batches(4, rank=rank, world=2, **options)) for rank in range(2)]
    for index, batch in enumerate(whole):
        shares = [part[index] for part in parts]
        for name, target in batch.targets.items():
            there = [share for share in shares if share.targets[name] is not None]
            if target is None:
                assert not there
            else:
                assert torch.equal(torch.cat([share.targets[name] for share in there]), target)
                assert torch.equal(torch.cat([share.inputs[name] for share in there]), batch.inputs[name])


def test_one_sample_of_one_number_in_two_domains_is_augmented_differently():
    one = domain("a", 11, Augmentation())
    twice = JoinedSplit({"a": one, "b": ResidentSplit(one.inputs, {"b": one.targets["a"]}, Augmentation())})
    batch = next(twice.batches(11, shuffle=False))
    assert torch.equal(batch.targets["a"], batch.targets["b"])
    assert not torch.equal(batch.inputs["a"], batch.inputs["b"])


def test_indexing_gives_the_sample_of_that_number_of_each_domain():
    split = joined()
    assert ids([split[3]], "b") == [[3]]
    assert ids([split[-1]], "a") == [[10]]
    assert split[5].targets["b"] is None
    assert list(split[5].inputs) == ["a", "c"]
    assert ids([split[[6, 2]]], "b") == [[2]]
    assert same(split.to("cpu")[4], split[4])
    assert split.nbytes == sum(part.nbytes for part in split.parts.values())


def test_parts_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="needs at least one part"):
        JoinedSplit({})
    with pytest.raises(ValueError, match="target 'a' is in parts 'x' and 'y'"):
        JoinedSplit({"x": domain("a", 2), "y": domain("a", 3)})
    small = ResidentSplit(Column(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "image"), {})
    with pytest.raises(ValueError, match=r"inputs must be of one shape, found \{'x': \(3, 6, 8\), 'y': \(1, 4, 4\)\}"):
        JoinedSplit({"x": domain("a", 2), "y": small})
    with pytest.raises(ValueError, match="part 'x' has several inputs itself"):
        JoinedSplit({"x": joined()})
    for refused in (joined().checksum, lambda: joined().with_targets({})):
        with pytest.raises(ValueError, match="several domains have no labels in common"):
            refused()


def test_a_dataset_of_domains_knows_the_shape_of_its_inputs_and_gives_one_alone():
    view = View("label", classes=tuple(map(str, range(11))))
    data = Dataset(
        name="toy",
        tasks=tuple(replace(tasks.classification(name, 11), input=name) for name in SIZES),
        **dict.fromkeys(("train", "validation", "test"), joined()),
        outputs=dict.fromkeys(SIZES, 11),
        views=dict.fromkeys(SIZES, view),
        input_view=View("image"),
        dense=False,
    )
    assert data.input_shape == (3, 6, 8)
    assert data.to("cpu").input_shape == (3, 6, 8)
    assert domains_of(data) == tuple(SIZES)
    one = alone(data, "b")
    assert domains_of(one) == ()
    assert [(task.name, task.input) for task in one.tasks] == [("b", None)]
    assert one.test[:].targets.keys() == {"b"}
    assert len(one.train) == SIZES["b"]
    with pytest.raises(ValueError, match="unknown domain 'd'; there are: a, b, c"):
        alone(data, "d")
    more = replace(
        one,
        tasks=(*one.tasks, tasks.noise("n")),
        train=one.train.with_targets({"n": Column(torch.rand(4, 1), "vector")}),
        outputs={**one.outputs, "n": 1},
        views={**one.views, "n": View("vector")},
    )
    both = beside(data, "b", more)
    assert [(task.name, task.input) for task in both.tasks] == [("a", "a"), ("b", "b"), ("c", "c"), ("n", "b")]
    assert list(both.train.parts) == list(SIZES)
    for plain, batch in zip(data.train.batches(3, seed=4), both.train.batches(3, seed=4), strict=True):
        assert torch.equal(batch.targets["n"], more.train[batch.targets["b"]].targets["n"])
        assert same(plain, Batch(batch.inputs, {name: batch.targets[name] for name in SIZES}))


def test_domains_that_take_too_much_memory_are_streamed():
    split = joined(Augmentation())
    room = split.parts["a"].nbytes
    streamed = split.to("cpu", memory=room)
    assert [part.nbytes for part in streamed.parts.values()] == [room, 0, 0]
    for options in ({"seed": 2}, {"shuffle": False, "drop_last": False}):
        pairs = zip(split.batches(4, **options), streamed.batches(4, **options), strict=True)
        assert all(same(a, b) for a, b in pairs)
