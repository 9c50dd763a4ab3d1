"""Tasks that are added, and heads that do not learn, under any method."""

import pytest
import torch
from sidetask_core import Equal, ExtraTasks, FrozenHeads, Method, MissingKey, Step, Task
from sidetask_core.testing import SPLITS, batches, brute_force, close, gradients, problem, squared, tiny_tasks, train
from torch import nn


def extra(name="d", width=5, primary=False):
    torch.manual_seed(0)
    return Task(name, squared, primary=primary), nn.Linear(width, 2).double()


@pytest.mark.parametrize("split", SPLITS)
def test_an_added_task_trains_its_head_and_the_encoder_and_is_not_deployed(split):
    width = 5 if split == "shared bottom" else 6
    tasks, (task, head) = tiny_tasks(), extra(width=width)
    everything = [*tasks, task]
    (batch, *_) = batches(1, names="abcd")
    step = Step(problem(split), tasks, Method(augment=ExtraTasks((task, head)), encoder=Equal(everything)))
    step.backward(batch)
    by_hand = problem(split).with_heads({"d": extra(width=width)[1]}, {"d": None})
    expected = brute_force(by_hand, everything, batch, torch.ones(4), torch.ones(4))
    for name, found in gradients(step.model).items():
        close(found, expected[name], f"{split}: {name}")
    assert head.weight.grad.any()
    assert list(step.export().heads) == ["a"]


def test_rules_have_to_be_made_for_all_tasks():
    tasks = tiny_tasks()
    with pytest.raises(ValueError, match="made for tasks a, b, c, but the step's tasks are a, b, c, d"):
        Step(problem(), tasks, Method(augment=ExtraTasks(extra()), encoder=Equal(tasks)))


def test_what_cannot_be_added():
    with pytest.raises(ValueError, match="task 'd' is primary; what an augment adds is there to help"):
        ExtraTasks(extra(primary=True))
    with pytest.raises(ValueError, match="the model has a head 'b' already"):
        Step(problem(), tiny_tasks(), Method(augment=ExtraTasks(extra("b"))))


def test_a_frozen_head_stays_as_it_is_and_still_reaches_the_encoder():
    tasks, data = tiny_tasks(), batches(4)
    frozen, free = (Step(problem(), tasks, Method(augment=FrozenHeads(names))) for names in (["b"], []))
    before = {n: p.clone() for n, p in frozen.model.named_parameters()}
    first = [gradients(step.model) for step in (frozen, free) if step.backward(data[0])]
    for name, gradient in first[0].items():
        if name.startswith("heads.b"):
            assert (gradient == 0).all()
        else:
            close(gradient, first[1][name], name)
    train(frozen, data)
    for name, p in frozen.model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("heads.b"), name


@pytest.mark.parametrize("split", SPLITS)
def test_the_model_that_was_given_can_still_learn_all_its_heads(split):
    tasks, (batch, *_), model = tiny_tasks(), batches(1), problem(split)
    frozen = Step(model, tasks, Method(augment=FrozenHeads(["b"])))
    assert not any(p.requires_grad for p in frozen.model.heads["b"].parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert frozen.model.heads["a"] is model.heads["a"]
    assert frozen.model.shared is model.shared
    Step(model, tasks).backward(batch)
    expected = brute_force(problem(split), tasks, batch, torch.ones(3), torch.ones(3))
    for name, found in gradients(model).items():
        close(found, expected[name], f"{split}: {name}")


def test_what_cannot_be_frozen():
    tasks = tiny_tasks()
    for names in ("b", [1], [["b"]]):
        with pytest.raises(TypeError, match="heads to freeze are a list of tasks' names, found"):
            FrozenHeads(names)
    with pytest.raises(MissingKey, match=r"'d' has no head; the model has: a, b, c"):
        Step(problem(), tasks, Method(augment=FrozenHeads(["d"])))
    with pytest.raises(ValueError, match="task 'a' is primary; only heads of auxiliary tasks"):
        Step(problem(), tasks, Method(augment=FrozenHeads(["b", "a"])))
