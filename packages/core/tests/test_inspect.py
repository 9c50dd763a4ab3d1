"""Signals can be looked at aside from the step, which does not notice."""

import pytest
import torch
from sidetask_core import Augment, Equal, Method, MissingKey, Step, Weighting
from sidetask_core.testing import SPLITS, backward, batches, gradients, problem, tiny_tasks
from torch import nn


class Recalling(Weighting):
    """Goes by what the previous step left, which is handed out once."""

    def forward(self, signals):
        seen = signals.progress()
        slopes = signals.hindsight()
        weights = torch.ones_like(signals.losses) + torch.rand(3, generator=self.generator)
        return weights if seen is None or slopes is None else weights + seen.before - seen.after + slopes


def gramian(at):
    return lambda signals: signals.gramian(at)


def build():
    model, tasks = problem(norm=True), tiny_tasks()
    model.shared.add_module("dropout", nn.Dropout(0.5))
    return Step(model, tasks, Method(encoder=Recalling(tasks)))


@pytest.mark.parametrize("at", ["features", "parameters"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_gramian_is_that_of_gradients_by_hand(split, at):
    model, tasks = problem(split), tiny_tasks()
    (batch,) = batches(1)
    batch.targets["b"][2] = torch.nan
    features = model.encode(batch.inputs)
    flat = []
    for task in tasks:
        prediction, target = model.decode(features, [task.name])[task.name], batch.targets[task.name]
        there = task.valid(target)
        loss = task.loss(prediction[there], target[there]).mean()
        wanted = [features] if at == "features" else model.shared_parameters()
        flat.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted, retain_graph=True)]))
    found = Step(model, tasks).inspect(batch, gramian(at))
    torch.testing.assert_close(found, torch.stack(flat) @ torch.stack(flat).T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("at", ["features", "parameters"])
def test_steps_are_what_they_would_have_been(at):
    """With BatchNorm, dropout, a rule that draws, and one that looks back at its last step."""
    plain, watched, random = build(), build(), torch.get_rng_state()
    data = batches(4)

    def run(step, look):
        torch.set_rng_state(random)
        found, optimizer = [], torch.optim.SGD(step.parameters(), lr=0.05)
        for batch in data:
            optimizer.zero_grad()
            if look:
                step.inspect(batch, gramian(at))
            found.append((backward(step, batch, optimizer), gradients(step)))
            optimizer.step()
        return found, step.state_dict(), torch.get_rng_state()

    (expected, state, after), (found, watched_state, watched_after) = run(plain, look=False), run(watched, look=True)
    for (one, grads), (other, watched_grads) in zip(expected, found, strict=True):
        assert one.losses == other.losses
        assert one.encoder_weights == other.encoder_weights
        assert all(torch.equal(grads[name], watched_grads[name]) for name in grads)
    assert all(torch.equal(x, watched_state[k]) for k, x in state.items() if isinstance(x, torch.Tensor))
    assert torch.equal(after, watched_after)


def test_it_draws_what_the_step_draws():
    step, (batch,) = build(), batches(1)
    seen = step.inspect(batch, lambda signals: signals.losses)
    assert {k: v.item() for k, v in backward(step, batch).losses.items()} == dict(
        zip("abc", seen.tolist(), strict=True)
    )


def test_nothing_is_filled_and_what_fails_leaves_nothing():
    step, (batch,) = Step(problem(norm=True), tiny_tasks()), batches(1)
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}

    def fail(signals):
        raise MissingKey("nothing")

    with pytest.raises(MissingKey):
        step.inspect(batch, fail)
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.model.state_dict().items())
    assert all(p.grad is None for p in step.parameters())
    assert step.iteration == 0


def test_a_look_ahead_is_not_to_be_had():
    step, (batch,) = Step(problem(), tiny_tasks()), batches(1)
    with pytest.raises(ValueError, match="looks ahead"):
        step.inspect(batch, lambda signals: signals.lookahead(torch.ones(3)))


def test_a_resting_task_is_absent():
    class Resting(Augment):
        def forward(self, model, tasks):
            return model

        def resting(self, iteration, epoch):
            return {"b"}

    tasks = tiny_tasks()
    step, (batch,) = Step(problem(), tasks, Method(augment=Resting(), encoder=Equal(tasks))), batches(1)
    labelled, resting = step.inspect(batch, lambda signals: (signals.labelled, signals.resting))
    assert labelled.tolist() == [True, False, True]
    assert resting.tolist() == [False, True, False]
