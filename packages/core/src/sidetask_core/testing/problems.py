"""Tiny problems, gradients by brute force, and a plain training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sidetask_core.split import SplitModel
from sidetask_core.step import Report, Step
from sidetask_core.task import Batch, Task

NAMES = ("a", "b", "c")
"""The tasks of the tiny problems."""
SPLITS = ("shared bottom", "half-shared", "two heads on one branch")
"""The kinds of `SplitModel` that the tiny problems have."""


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Element losses of the tiny problems."""
    return (prediction - target).square()


def labelled(target: Tensor) -> Tensor:
    """Labels of the tiny problems are missing where they are NaN."""
    return ~target.isnan()


def tiny_tasks(names: Sequence[str] = NAMES) -> list[Task]:
    """One regression task for each name, the first of them primary."""
    return [Task(name, squared, valid=labelled, primary=i == 0) for i, name in enumerate(names)]


def problem(
    split: str = "shared bottom",
    *,
    names: Sequence[str] = NAMES,
    norm: bool = False,
    dtype: torch.dtype = torch.float64,
) -> SplitModel:
    """A tiny network, always the same.

    Args:
        split: one of `SPLITS`.
        names: the tasks.
        norm: put a BatchNorm into the shared layers.
        dtype: of the parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first: list[nn.Module] = [nn.Linear(4, 6), nn.Tanh()]
        if norm:
            first.insert(1, nn.BatchNorm1d(6))
        stages = [nn.Sequential(*first), nn.Sequential(nn.Linear(6, 5), nn.Tanh())]
        heads = {name: nn.Linear(5, 2) for name in names}
        if split == "two heads on one branch":
            other = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
            route = {name: "both" if i < 2 else "other" for i, name in enumerate(names)}
            branches = {"both": stages[1]} | ({"other": other} if len(names) > 2 else {})
            model = SplitModel(stages[0], heads, branches, route)
        else:
            model = SplitModel.from_stages(stages, 2 if split == "shared bottom" else 1, heads)
    return model.to(dtype)


def batches(
    count: int, size: int = 6, *, names: Sequence[str] = NAMES, dtype: torch.dtype = torch.float64
) -> list[Batch]:
    """Random batches, always the same."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [Batch(draw(size, 4), {name: draw(size, 2) for name in names}) for _ in range(count)]


def brute_force(
    model: SplitModel,
    tasks: Sequence[Task],
    batch: Batch,
    encoder: Sequence[Tensor],
    decoder: Sequence[Tensor],
    shapers: Mapping[str, nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Gradients by one `torch.autograd.grad` per task over an uncut graph, weighted by hand.

    Args:
        model: the network.
        tasks: the tasks, in the order of the weights.
        batch: what to run it on.
        encoder: weights of the tasks for shared parameters.
        decoder: weights of the tasks for their own parameters.
        shapers: task name to what weighs its elements.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    shared = {id(p) for p in model.shared_parameters()}
    total = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
    for task, above, below in zip(tasks, encoder, decoder, strict=True):
        prediction = model(batch.input_of(task))[task.name]
        target = batch.target_of(task)
        elements = task.elements(prediction, target)
        each = dict(zip(task.objectives or [""], (losses.detach() for losses, _ in elements), strict=True))
        weights = dict.fromkeys(each, 1.0)
        if shapers and task.name in shapers:
            found = shapers[task.name](each if task.objectives else each[""], target)
            weights = found if task.objectives else {"": found}
        loss = torch.zeros((), dtype=elements[0][0].dtype)
        for name, (losses, mask) in zip(each, elements, strict=True):
            shaped = losses * weights[name]
            mask = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
            loss = loss + shaped[mask].sum() / mask.sum().clamp(min=1)
        for key, p, g in zip(names, parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if g is not None:
                total[key] += g * (above if id(p) in shared else below).to(g)
    return total


def close(found: Tensor, expected: Tensor, what: str, rtol: float = 1e-9) -> None:
    """Assert that two tensors agree to `rtol`, and say which they are if they do not."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12, msg=lambda text: f"{what}: {text}")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's `.grad`, zeros where it is None."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def train(step: Step, data: Sequence[Batch], optimizer: torch.optim.Optimizer | None = None) -> list[Report]:
    """A plain training loop over `data`, two batches to the epoch."""
    optimizer = optimizer or torch.optim.SGD(step.parameters(), lr=0.05, momentum=0.9)
    reports = []
    for batch in data:
        optimizer.zero_grad()
        reports.append(backward(step, batch, optimizer))
        optimizer.step()
    return reports


def backward(step: Step, batch: Batch, optimizer: torch.optim.Optimizer | None = None) -> Report:
    """A step with all that a method may ask for, two batches to the epoch; gradients are zero before."""
    step.epoch = step.iteration // 2
    half = Batch(batch.inputs.flip(1), {name: None if y is None else -y for name, y in batch.targets.items()})
    optimizer = optimizer or torch.optim.SGD(step.parameters(), lr=0.05)
    return step.backward(batch, validation=half, optimizer=optimizer)
