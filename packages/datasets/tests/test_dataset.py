import pytest
import sidetask_datasets
import torch
from sidetask_core.plugins import find
from sidetask_datasets import Column, Dataset, ResidentSplit, View, tasks


def test_a_task_without_an_output_or_a_view_is_named():
    split = ResidentSplit(
        Column(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "image"),
        {"a": Column(torch.zeros(1, dtype=torch.int16), "label")},
    )
    options = {"name": "toy", "tasks": (tasks.classification("a", 2),), "input_view": View("image"), "dense": False}
    splits = dict.fromkeys(("train", "validation", "test"), split)
    view = View("label", classes=("x", "y"))
    whole = Dataset(**options, **splits, outputs={"a": 2}, views={"a": view})
    assert whole.input_shape == (1, 2, 2)
    with pytest.raises(ValueError, match="dataset 'toy': task 'a' has no entry in outputs"):
        Dataset(**options, **splits, outputs={}, views={"a": view})
    with pytest.raises(ValueError, match="dataset 'toy': task 'a' has no entry in views"):
        Dataset(**options, **splits, outputs={"a": 2}, views={})


@pytest.mark.parametrize("name", ["cityscapes", "digits", "frames", "nyuv2", "scenes"])
def test_factories_are_found_by_name(name):
    assert find("datasets", name) is getattr(sidetask_datasets, name)


@pytest.mark.parametrize(("name", "options"), [("scenes", {}), ("digits", {}), ("frames", {"root": "."})])
@pytest.mark.parametrize("seed", ["a", 1.5, True])
def test_a_seed_is_a_whole_number(name, options, seed):
    with pytest.raises(ValueError, match="seed is a whole number, found"):
        find("datasets", name)(**options, seed=seed)
