"""Errors at the door name what is wrong, what was expected and what there was."""

import collections

import pytest
import torch
from sidetask_core import (
    Batch,
    Combiner,
    Equal,
    Fixed,
    Method,
    MissingKey,
    Product,
    Shaper,
    SplitModel,
    Step,
    Task,
    Weighting,
)
from sidetask_core.testing import batches, gradients, problem, squared, tiny_tasks
from torch import nn


def linear():
    return nn.Linear(2, 2)


def test_a_task_needs_a_usable_name_and_callables():
    with pytest.raises(ValueError, match="''"):
        Task("", squared)
    with pytest.raises(ValueError, match=r"'a\.b'"):
        Task("a.b", squared)
    with pytest.raises(TypeError, match=r"task 'a': loss must be callable"):
        Task("a", loss=None)
    with pytest.raises(TypeError, match=r"task 'a': valid must be callable"):
        Task("a", squared, valid=True)


def test_duplicate_and_foreign_tasks():
    with pytest.raises(ValueError, match="duplicate task: a"):
        Step(problem(), [Task("a", squared), Task("a", squared)])
    with pytest.raises(TypeError, match="expected a Task, found str"):
        Step(problem(), ["a"])
    with pytest.raises(ValueError, match="at least one task"):
        Step(problem(), [])


def test_a_task_without_a_head_and_a_head_without_a_task():
    with pytest.raises(MissingKey, match="task 'depth' has no head; the model has: a, b, c"):
        Step(problem(), [*tiny_tasks(), Task("depth", squared)])
    with pytest.raises(ValueError, match="head without a task: c; the tasks are: a, b"):
        Step(problem(), tiny_tasks()[:2])


def test_a_missing_target_or_input():
    step, (batch, *_) = Step(problem(), tiny_tasks()), batches(1)
    with pytest.raises(MissingKey, match="task 'b' has no target 'b'; the batch has: a, c"):
        step.backward(Batch(batch.inputs, {k: batch.targets[k] for k in "ac"}))
    assert all((g == 0).all() for g in gradients(step).values())
    own = [Task(name, squared, input=name) for name in "abc"]
    with pytest.raises(MissingKey, match="task 'b' has no input 'b'; the batch has: a, c"):
        Step(problem(), own).backward(Batch({"a": batch.inputs, "c": batch.inputs}, batch.targets))
    with pytest.raises(MissingKey, match="task 'a' has no input 'a'; the batch has: one unnamed input"):
        Step(problem(), own).backward(batch)
    with pytest.raises(MissingKey, match="task 'a' names no input, but the batch has several: x, y"):
        step.backward(Batch({"x": batch.inputs, "y": batch.inputs}, batch.targets))


def test_a_missing_target_leaves_batch_statistics_alone():
    model, (batch, *_) = problem(norm=True), batches(1)
    with pytest.raises(MissingKey):
        Step(model, tiny_tasks()).backward(Batch(batch.inputs, {"a": batch.targets["a"]}))
    assert model.shared[0][1].num_batches_tracked == 0


def test_missing_keys_read_as_sentences_and_are_key_errors():
    error = MissingKey("task 'b' has no target")
    assert str(error) == "task 'b' has no target"
    assert isinstance(error, KeyError)


class Wrong(Weighting):
    def __init__(self, tasks, weights):
        super().__init__(tasks)
        self.weights = weights

    def forward(self, signals):
        return self.weights


@pytest.mark.parametrize("weights", [torch.ones(2), torch.ones(3, 1), torch.tensor(1.0)])
def test_weights_of_the_wrong_length(weights):
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    step = Step(problem(), tasks, Method(encoder=Wrong(tasks, weights)))
    with pytest.raises(ValueError, match=r"Wrong returned weights of shape \[.*\], expected \[3\].*a, b, c"):
        step.backward(batch)
    assert all((g == 0).all() for g in gradients(step).values())


class WrongSum(Combiner):
    def forward(self, signals):
        return signals.gradients(self.at)


@pytest.mark.parametrize("at", ["features", "parameters"])
def test_a_combined_gradient_of_the_wrong_shape(at):
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    with pytest.raises(ValueError, match=rf"WrongSum returned a gradient of shape \[3, .*the shared {at}"):
        Step(problem(), tasks, Method(encoder=WrongSum(tasks, at=at))).backward(batch)


def test_rules_made_for_other_tasks():
    tasks = tiny_tasks()
    with pytest.raises(
        ValueError, match="encoder rule Equal was made for tasks c, b, a, but the step's tasks are a, b, c"
    ):
        Step(problem(), tasks, Method(encoder=Equal(tasks[::-1])))


def test_weights_for_missing_and_unknown_tasks():
    with pytest.raises(MissingKey, match="task 'c' has no weight; there are weights for: a, b"):
        Fixed(tiny_tasks(), {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="weight for 'd', but the tasks are: a, b, c"):
        Fixed(tiny_tasks(), dict.fromkeys("abcd", 1.0))


class Plain(Shaper):
    def forward(self, losses, target):
        return torch.ones(losses.shape[0], 7)


def test_shapers_need_elements_and_fitting_weights():
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    scalar = [Task("a", lambda p, y: squared(p, y).mean()), *tasks[1:]]
    with pytest.raises(ValueError, match="task 'a' has a shaper, which needs one loss per element"):
        Step(problem(), scalar, Method(shapers={"a": Plain()})).backward(batch)
    with pytest.raises(ValueError, match=r"shaper of task 'a' returned weights \[6, 7\] for losses \[6, 2\]"):
        Step(problem(), tasks, Method(shapers={"a": Plain()})).backward(batch)
    with pytest.raises(ValueError, match="shaper for 'd', but the tasks are: a, b, c"):
        Step(problem(), tasks, Method(shapers={"d": Plain()}))
    with pytest.raises(TypeError, match="shaper of task 'a' must be a Shaper, found Linear"):
        Method(shapers={"a": linear()})


class Looks(Weighting):
    def __init__(self, tasks, read):
        super().__init__(tasks)
        self.read = read

    def forward(self, signals):
        self.read(signals)
        return torch.ones(3)


def looking(model, tasks, batch, read):
    Step(model, tasks, Method(encoder=Looks(tasks, read))).backward(batch)


def test_signals_refuse_what_does_not_exist():
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    scalar = [Task("a", lambda p, y: squared(p, y).mean()), *tasks[1:]]
    with pytest.raises(ValueError, match=r"element losses of task 'a'.*scalar"):
        looking(problem(), scalar, batch, lambda s: s.elements("a"))
    with pytest.raises(MissingKey, match="no task 'd'; the tasks are: a, b, c"):
        looking(problem(), tasks, batch, lambda s: s.elements("d"))
    with pytest.raises(ValueError, match="'features' or 'parameters', not 'weights'"):
        looking(problem(), tasks, batch, lambda s: s.gramian("weights"))


@pytest.mark.parametrize("read", [lambda s: s.gramian("features"), lambda s: s.gradients("features")])
def test_features_of_different_inputs_are_not_compared(read):
    tasks = [Task(name, squared, input=name) for name in "abc"]
    inputs = {name: batch.inputs for name, batch in zip("abc", batches(3), strict=True)}
    with pytest.raises(ValueError, match=r"tasks with different inputs.*'a': 'a'"):
        looking(problem(), tasks, Batch(inputs, batches(1)[0].targets), read)


@pytest.mark.parametrize("at", ["features", "parameters"])
def test_nothing_shared_nothing_to_compare(at):
    model = SplitModel.from_stages([nn.Linear(4, 5)], 0, {n: nn.Linear(5, 2) for n in "abc"}).double()
    with pytest.raises(ValueError, match="the encoder has nothing to train"):
        looking(model, tiny_tasks(), batches(1)[0], lambda s: s.gramian(at))


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5).double()

    def forward(self, x):
        return collections.UserDict(out=self.layer(x))


def test_features_in_a_container_that_hides_its_tensors():
    """They would get no gradient, in silence."""
    model = SplitModel(Opaque(), {"a": nn.Linear(5, 2).double()})
    (batch,) = batches(1)
    with pytest.raises(TypeError, match="nested tuples, lists and dicts of tensors, found a UserDict"):
        Step(model, [Task("a", squared)]).backward(batch)


def test_targets_and_weights_of_the_wrong_type():
    tasks, (batch, *_) = tiny_tasks(), batches(1)
    with pytest.raises(TypeError, match="targets must map names to labels, found Tensor"):
        Step(problem(), tasks).backward(Batch(batch.inputs, batch.inputs))
    with pytest.raises(TypeError, match="Wrong returned a list, expected a tensor of weights"):
        Step(problem(), tasks, Method(encoder=Wrong(tasks, [1.0, 1.0, 1.0]))).backward(batch)


def test_models_name_their_faults():
    with pytest.raises(ValueError, match="head 'b' has no branch 'b'; the branches are: a"):
        SplitModel(linear(), {"a": linear(), "b": linear()}, {"a": linear()})
    with pytest.raises(ValueError, match="head 'b' has no branch 'x'; the branches are: a"):
        SplitModel(linear(), {"a": linear(), "b": linear()}, {"a": linear()}, {"b": "x"})
    with pytest.raises(ValueError, match="no head rides branch b"):
        SplitModel(linear(), {"a": linear()}, {"a": linear(), "b": linear()})
    with pytest.raises(ValueError, match="route names task 'b', which has no head; the heads are: a"):
        SplitModel(linear(), {"a": linear()}, {"a": linear()}, {"b": "a"})
    with pytest.raises(ValueError, match="at least one head"):
        SplitModel(linear(), {})
    with pytest.raises(ValueError, match="head 'keys' cannot be registered"):
        SplitModel(linear(), {"keys": linear()})
    with pytest.raises(ValueError, match=r"cut must be in 0\.\.1 for 1 stages, found 2"):
        SplitModel.from_stages([linear()], 2, {"a": linear()})
    with pytest.raises(MissingKey, match="task 'z' has no head; the model has: a, b, c"):
        problem().restricted_to(["z"])
    with pytest.raises(ValueError, match="has a head 'a' already"):
        problem().with_heads({"a": linear()})


def test_losses_and_masks_of_the_wrong_kind():
    x, y = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(TypeError, match="task 'a': loss must return a tensor, found float"):
        Task("a", lambda p, y: 0.5).mean(x, y)
    with pytest.raises(TypeError, match=r"task 'a': valid\(target\) must return a boolean tensor, found torch.float32"):
        Task("a", squared, valid=lambda y: y).mean(x, y)
    with pytest.raises(ValueError, match=r"task 'a'.*scalar; use reduction='none'"):
        Task("a", lambda p, y: squared(p, y).mean(), valid=lambda y: y > 0).mean(x, y)
    with pytest.raises(ValueError, match=r"task 'a'.*labelled elements \[2, 2\] does not fit the losses \[2, 3\]"):
        Task("a", squared, valid=lambda y: y[:, :2] > 0).mean(x, y)


def test_methods_check_their_slots():
    tasks = tiny_tasks()
    with pytest.raises(TypeError, match="decoder must be a Weighting, found Combining"):
        Method(decoder=type("Combining", (Combiner,), {})(tasks, at="features"))
    with pytest.raises(TypeError, match="encoder must be a Weighting or a Combiner, found str"):
        Method(encoder="pcgrad")
    with pytest.raises(TypeError, match="augment must be an Augment, found str"):
        Method(augment="saal")
    with pytest.raises(ValueError, match="'features' or 'parameters', not 'heads'"):
        WrongSum(tasks, at="heads")
    with pytest.raises(ValueError, match="check must be 'immediate' or 'deferred', not 'never'"):
        Step(problem(), tasks, check="never")
    with pytest.raises(ValueError, match="at least one factor"):
        Product()
    with pytest.raises(ValueError, match="weigh different tasks: a, b, c and c, b, a"):
        Product(Equal(tasks), Equal(tasks[::-1]))


@pytest.mark.parametrize("rule", [Weighting(tiny_tasks()), Combiner(tiny_tasks(), at="features"), Shaper()])
def test_abstract_rules_say_so(rule):
    with pytest.raises(NotImplementedError, match=type(rule).__name__):
        rule(None, None) if isinstance(rule, Shaper) else rule(None)
