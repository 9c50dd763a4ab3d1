"""The work of a step, counted: convolution passes of encoder, branches and heads."""

import pytest
import torch
from sidetask_core import Batch, Combiner, Method, SplitModel, Step, Task, Weighting
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Passes(TorchDispatchMode):
    """Counts convolutions and their backward calls by the number of output channels, which names the layer."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            layer = args[1].shape[0]
            self.forward[layer] = self.forward.get(layer, 0) + 1
        elif func is torch.ops.aten.convolution_backward.default:
            layer = args[2].shape[0]
            self.backward[layer] = self.backward.get(layer, 0) + 1
        return func(*args, **(kwargs or {}))


class Reads(Weighting):
    def __init__(self, tasks, read):
        super().__init__(tasks)
        self.read = read

    def forward(self, signals):
        self.read(signals)
        return torch.rand(len(self.tasks)) + 0.5


class Combines(Combiner):
    def forward(self, signals):
        return signals.gradients(self.at).sum(0)


ENCODER, BRANCH, HEAD = 7, 5, 3


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def setting(count, branches=0):
    """A model of `count` tasks; with branches, the tasks ride them in turn."""
    names = [f"t{i}" for i in range(count)]
    shared = nn.Sequential(conv(2, ENCODER), nn.BatchNorm2d(ENCODER), nn.ReLU())
    width = BRANCH if branches else ENCODER
    heads = {name: nn.Sequential(conv(width, HEAD), nn.ReLU()) for name in names}
    middle = {f"b{i}": nn.Sequential(conv(ENCODER, BRANCH), nn.ReLU()) for i in range(branches)}
    route = {name: f"b{i % branches}" for i, name in enumerate(names)} if branches else None
    tasks = [Task(name, lambda p, y: (p - y).abs()) for name in names]
    batch = Batch(torch.randn(2, 2, 8, 8), {name: torch.randn(2, HEAD, 8, 8) for name in names})
    return SplitModel(shared, heads, middle, route), tasks, batch


def count(model, tasks, batch, method):
    step = Step(model, tasks, method)
    with Passes() as passes:
        step.backward(batch)
    return passes


CHEAP = {
    "nothing": lambda s: None,
    "losses": lambda s: s.losses,
    "norms": lambda s: s.norms("features"),
    "norm of sum": lambda s: (s.norm_of_sum(s.losses, "features"), s.norms("features")),
    "gramian": lambda s: (s.gramian("features"), s.norms("features"), s.gramian("features")),
    "gradients": lambda s: (s.gradients("features"), s.gramian("features")),
}


@pytest.mark.parametrize("tasks", [3, 20])
@pytest.mark.parametrize("read", CHEAP)
@pytest.mark.parametrize("where", ["encoder", "decoder", "both"])
def test_one_plain_backward_unless_parameter_gradients_are_read(tasks, read, where):
    model, all_tasks, batch = setting(tasks)
    rule, other = Reads(all_tasks, CHEAP[read]), Reads(all_tasks, CHEAP["losses"])
    method = {
        "encoder": Method(encoder=rule),
        "decoder": Method(decoder=rule),
        "both": Method(encoder=rule, decoder=other),
    }[where]
    passes = count(model, all_tasks, batch, method)
    assert passes.forward == {ENCODER: 1, HEAD: tasks}
    assert passes.backward == {ENCODER: 1, HEAD: tasks}


@pytest.mark.parametrize("tasks", [3, 20])
def test_the_plain_sum_of_losses_makes_the_same_passes(tasks):
    model, all_tasks, batch = setting(tasks)
    with Passes() as plain:
        predictions = model(batch.inputs)
        sum(task.mean(predictions[task.name], batch.target_of(task))[0] for task in all_tasks).backward()
    ours = count(model, all_tasks, batch, Method(encoder=Reads(all_tasks, CHEAP["gramian"])))
    assert ours.backward == plain.backward == {ENCODER: 1, HEAD: tasks}


@pytest.mark.parametrize("tasks", [3, 20])
def test_parameter_gradients_cost_one_encoder_pass_per_task_and_serve_the_step(tasks):
    model, all_tasks, batch = setting(tasks)
    rule = Reads(all_tasks, lambda s: (s.gramian("parameters"), s.norms("parameters"), s.gramian("features")))
    passes = count(model, all_tasks, batch, Method(encoder=rule))
    assert passes.forward == {ENCODER: 1, HEAD: tasks}
    assert passes.backward == {ENCODER: tasks, HEAD: tasks}


@pytest.mark.parametrize("at", ["features", "parameters"])
def test_combiners_traverse_every_head_once(at):
    model, tasks, batch = setting(3)
    passes = count(model, tasks, batch, Method(encoder=Combines(tasks, at=at)))
    assert passes.backward == {ENCODER: 1 if at == "features" else 3, HEAD: 3}


def test_a_branch_is_traversed_once_with_equal_weights_above_and_below():
    model, tasks, batch = setting(6, branches=2)
    passes = count(model, tasks, batch, Method(encoder=Reads(tasks, CHEAP["losses"])))
    assert passes.forward == {ENCODER: 1, BRANCH: 2, HEAD: 6}
    assert passes.backward == {ENCODER: 1, BRANCH: 2, HEAD: 6}


def test_a_branch_of_one_head_is_traversed_once_with_any_weights():
    model, tasks, batch = setting(3, branches=3)
    method = Method(encoder=Reads(tasks, CHEAP["gramian"]), decoder=Reads(tasks, CHEAP["losses"]))
    passes = count(model, tasks, batch, method)
    assert passes.backward == {ENCODER: 1, BRANCH: 3, HEAD: 3}


def test_task_gradients_behind_a_shared_branch_cost_one_branch_pass_per_task():
    model, tasks, batch = setting(6, branches=2)
    passes = count(model, tasks, batch, Method(encoder=Reads(tasks, CHEAP["gramian"])))
    assert passes.backward == {ENCODER: 1, BRANCH: 6, HEAD: 6}


def test_batch_statistics_move_once():
    for read in [*CHEAP.values(), lambda s: s.gramian("parameters")]:
        model, tasks, batch = setting(3)
        reference = nn.Sequential(*list(setting(3)[0].shared))
        reference.load_state_dict(model.shared.state_dict())
        reference(batch.inputs)
        Step(model, tasks, Method(encoder=Reads(tasks, read))).backward(batch)
        torch.testing.assert_close(model.shared[1].state_dict(), reference[1].state_dict(), rtol=0, atol=0)


def test_nothing_is_computed_twice():
    model, tasks, batch = setting(3)
    seen = []

    def read(signals):
        seen.append((signals.gradients("parameters"), signals.gramian("features")))

    first, second = Reads(tasks, read), Reads(tasks, read)
    passes = count(model, tasks, batch, Method(encoder=first, decoder=second))
    assert passes.backward == {ENCODER: 3, HEAD: 3}
    assert seen[0][0] is seen[1][0]
    assert seen[0][1] is seen[1][1]
