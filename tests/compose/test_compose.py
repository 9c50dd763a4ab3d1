"""What one installed method does above the cut works with what any other does below it."""

import itertools
import os

import pytest
import torch
from sidetask_core import Batch, Method, SplitModel, Step, Task
from sidetask_core.plugins import installed, make_method
from torch import nn

# What a method cannot be built without.
OPTIONS = {
    "fixed": {"weights": {"near": 1.0, "far": 0.5, "kind": 2.0}},
    "torchjd": {"aggregator": "UPGrad"},
    # Not of "kind", which has a shaper beside classwise: its copies would need one, too.
    "saal-e": {"transfers": ["far->near", "near->far"]},
    "saal-w": {"transfers": ["near->far"]},
    "saal-ew": {"transfers": ["far->near"]},
    "classwise": {"main": "near", "auxiliary": "kind", "classes": 3, "warmup": 1},
}


def pairs():
    """Every method above the cut with one below it, and the other way round; of two distributions if there are two."""
    homes = installed("methods")
    names = {home: [name for name in homes if homes[name] == home] for home in sorted(set(homes.values()))}
    if len(names) == 1:
        (own,) = names.values()
        yield from zip(own, own[1:] + own[:1], strict=True)
    for encoders, decoders in itertools.permutations(names.values(), 2):
        for turn in range(max(len(encoders), len(decoders))):
            yield encoders[turn % len(encoders)], decoders[turn % len(decoders)]


PAIRS = sorted(pairs())


def tasks():
    squares = nn.MSELoss(reduction="none")
    return [
        Task("near", squares),
        Task("far", squares, valid=lambda target: ~target.isnan()),
        Task("kind", nn.CrossEntropyLoss(reduction="none"), primary=False),
    ]


def method_of(name, tasks):
    options = dict(OPTIONS.get(name, {}))
    if "weights" in options:
        options["weights"] = dict.fromkeys([task.name for task in tasks], 0.5) | options["weights"]
    return make_method({"name": name, **options}, tasks)


def step_of(encoder, decoder):
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU())
    heads = {"near": nn.Linear(6, 1), "far": nn.Linear(6, 1), "kind": nn.Linear(6, 3)}
    # Beside a method that adds tasks, the other weighs these too.
    adds = next((m.augment for name in (encoder, decoder) if (m := method_of(name, tasks())).augment), None)
    all_tasks = tasks() if adds is None else adds.extended(tasks())
    branches = {} if adds is None else {name: nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for name in heads}
    model = SplitModel(shared, heads, branches)
    above, below = (method_of(name, all_tasks) for name in (encoder, decoder))
    assert below.decoder is not None or below.shapers, f"{decoder} does nothing below the cut"
    shapers = {**above.shapers, **below.shapers}
    step = Step(model, tasks(), Method(adds, shapers, below.decoder, above.encoder))
    return step, torch.optim.SGD(step.parameters(), lr=0.05, momentum=0.9)


def batch():
    inputs = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    near = inputs[:, :1] - inputs[:, 1:2]
    far = inputs[:, 1:2].square().where(inputs[:, 2:3] > -0.5, torch.nan)
    return Batch(inputs, {"near": near, "far": far, "kind": inputs[:, :3].argmax(dim=1)})


def train(step, optimizer, iterations):
    totals = []
    for iteration in iterations:
        step.epoch = iteration // 2
        optimizer.zero_grad()
        report = step.backward(batch(), validation=batch, optimizer=optimizer)
        totals.append(sum(report.losses.values()))
        missing = [name for name, parameter in step.named_parameters() if parameter.grad is None]
        assert not missing
        assert all(parameter.grad.isfinite().all() for parameter in step.parameters())
        optimizer.step()
    return totals


def copied(state):
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, state)


def test_the_methods_are_those_of_the_packages_that_were_installed():
    """The session says which: nothing else may lend a hand."""
    found = {name.removeprefix("sidetask-") for name in installed("methods").values()}
    assert found == set(os.environ.get("SIDETASK_PACKAGES", " ".join(found)).split())
    assert PAIRS


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_pair_trains_and_resumes_bit_for_bit(encoder, decoder):
    step, optimizer = step_of(encoder, decoder)
    losses = train(step, optimizer, range(12))
    assert losses[-1] < losses[0]
    saved = copied(step.state_dict()), copied(optimizer.state_dict())
    train(step, optimizer, range(12, 15))

    resumed, its_optimizer = step_of(encoder, decoder)
    resumed.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    train(resumed, its_optimizer, range(12, 15))
    found, expected = resumed.state_dict(), step.state_dict()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
