"""One step's network passes: forward with cuts, then every backward pass, each made at most once.

The graph is cut where tasks meet: at the shared features, and at the output of a branch that several heads ride.
Below a cut every head is traversed once, and its gradient at the cut can be weighted, compared or combined before
anything above the cut is traversed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sidetask_core import parallel
from sidetask_core.split import SplitModel
from sidetask_core.task import Batch, Task, masked_sum

Gradients = list[Tensor | None]


class Cut:
    """A place where the graph is cut: tensors as they were computed, and detached leaves that go on from there."""

    def __init__(self, structure: Any) -> None:
        tensors, spec = tree_flatten(structure)
        self.above: list[Tensor] = []
        self.below: list[Tensor] = []
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                self.above.append(tensor)
                tensors[i] = tensor.detach().requires_grad_()
                self.below.append(tensors[i])
        self.structure = tree_unflatten(tensors, spec)
        self.sizes = [tensor.numel() for tensor in self.below]

    def split(self, flat: Tensor) -> list[Tensor]:
        """A vector over all of the cut's tensors as one gradient for each, in its data type."""
        parts = flat.split(self.sizes)
        return [part.view_as(leaf).to(leaf.dtype) for part, leaf in zip(parts, self.below, strict=True)]


@dataclass(eq=False)
class Branch:
    """A branch that several heads of one domain ride, cut at its output."""

    cut: Cut
    parameters: list[nn.Parameter]
    riders: list[int]


@dataclass(eq=False)
class Domain:
    """One input, its shared features, and the tasks that read them."""

    cut: Cut
    tasks: list[int] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)


class Passes:
    """The forward pass of a step and the backward passes over it.

    Losses are this process's shares of the means over all processes, multiplied by `scale` in every backward pass.
    """

    def __init__(
        self,
        model: SplitModel,
        tasks: Sequence[Task],
        batch: Batch,
        shapers: Mapping[str, nn.Module],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.shared = [p for p in model.shared_parameters() if p.requires_grad]
        self.domains: list[Domain] = []
        self.domain_of: list[Domain] = []
        self.branch_of: list[Branch | None] = [None] * len(tasks)
        self.own: list[list[nn.Parameter]] = [[] for _ in tasks]
        self.elements: list[tuple[Tensor, Tensor | None] | None] = [None] * len(tasks)
        self._forward(model, tasks, batch, shapers)
        one = torch.ones((), dtype=self.losses[0].dtype, device=self.losses[0].device)
        self.scaled = scaler is not None and scaler.is_enabled()
        self.scale = scaler.scale(one) if self.scaled else one
        self._heads: dict[int, tuple[Gradients, Gradients]] = {}
        self._features: dict[int, Tensor] = {}
        self._branch_gradients: dict[int, Gradients] = {}
        self._parameters: tuple[Tensor, list[bool]] | None = None

    def _forward(
        self, model: SplitModel, tasks: Sequence[Task], batch: Batch, shapers: Mapping[str, nn.Module]
    ) -> None:
        # Targets are looked up before anything is computed, so that a missing one leaves no trace in BatchNorm.
        inputs = [batch.input_of(task) for task in tasks]
        targets = [batch.target_of(task) for task in tasks]
        by_input: dict[int, Domain] = {}
        outputs: dict[tuple[int, str], Any] = {}
        sums: list[Tensor] = []
        counts: list[Tensor] = []
        for t, task in enumerate(tasks):
            key = id(inputs[t])
            if key not in by_input:
                by_input[key] = Domain(Cut(model.encode(inputs[t])))
            domain = by_input[key]
            domain.tasks.append(t)
            self.domain_of.append(domain)
        self.domains = list(by_input.values())
        for domain in self.domains:
            for name in dict.fromkeys(model.route[tasks[t].name] for t in domain.tasks):
                riders = [t for t in domain.tasks if model.route[tasks[t].name] == name]
                output = domain.cut.structure
                if name is not None:
                    output = model.branches[name](output)
                if name is not None and len(riders) > 1:
                    parameters = [p for p in model.branches[name].parameters() if p.requires_grad]
                    branch = Branch(Cut(output), parameters, riders)
                    domain.branches.append(branch)
                    output = branch.cut.structure
                for t in riders:
                    outputs[t] = output
                    head = model.heads[tasks[t].name]
                    own = head.parameters() if len(riders) > 1 else model.specific_parameters(tasks[t].name)
                    self.own[t] = [p for p in own if p.requires_grad]
                    if name is not None and len(riders) > 1:
                        self.branch_of[t] = branch
        for t, task in enumerate(tasks):
            total, count = self._loss(model, task, t, outputs.pop(t), targets[t], shapers)
            sums.append(total)
            counts.append(count)
        everywhere = parallel.add(torch.stack([count.to(sums[0].device) for count in counts])).clamp(min=1)
        self.losses = [total / count for total, count in zip(sums, everywhere.unbind(), strict=True)]

    def _loss(
        self, model: SplitModel, task: Task, t: int, features: Any, target: Any, shapers: Mapping[str, nn.Module]
    ) -> tuple[Tensor, Tensor]:
        if target is None:
            zero = next(x for x in tree_flatten(features)[0] if isinstance(x, Tensor)).new_zeros(())
            zero = zero if zero.dtype == torch.float64 else zero.float()
            return zero, zero
        losses, mask = task.elements(model.heads[task.name](features), target)
        self.elements[t] = (losses.detach(), mask)
        if task.name in shapers:
            if losses.ndim == 0:
                raise ValueError(
                    f"task {task.name!r} has a shaper, which needs one loss per element, but its loss returned a "
                    "scalar; use reduction='none'"
                )
            weights = shapers[task.name](losses.detach(), target)
            try:
                shaped = losses * weights
                if shaped.shape != losses.shape:
                    raise RuntimeError
            except RuntimeError as error:
                raise ValueError(
                    f"the shaper of task {task.name!r} returned weights {list(weights.shape)} for losses "
                    f"{list(losses.shape)}"
                ) from error
            losses = shaped
        return masked_sum(losses, mask)

    def head(self, t: int) -> tuple[Gradients, Gradients]:
        """Task t's gradients of its own parameters and at its cut, traversing its head once; handed out once."""
        if t in self._heads:
            return self._heads.pop(t)
        cut = (self.branch_of[t] or self.domain_of[t]).cut.below
        wanted = [*self.own[t], *cut]
        if self.losses[t].requires_grad and wanted:
            scale = self.scale.to(self.losses[t])
            grads = list(torch.autograd.grad(self.losses[t], wanted, scale, allow_unused=True))
        else:
            grads = [None] * len(wanted)
        return grads[: len(self.own[t])], grads[len(self.own[t]) :]

    def feature_gradients(self, domain: Domain) -> Tensor:
        """Every task's gradient at the features of `domain`, unscaled ``[tasks of the domain, D]``."""
        key = id(domain)
        if key not in self._features:
            cut = domain.cut
            wide = [torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype for x in cut.below]
            matrix = torch.zeros(
                len(domain.tasks), sum(cut.sizes), dtype=max(wide, key=lambda d: d.itemsize), device=cut.below[0].device
            )
            for row, t in zip(matrix, domain.tasks, strict=True):
                own, at_cut = self.head(t)
                branch = self.branch_of[t]
                if branch is not None:
                    wanted = [*branch.parameters, *cut.below]
                    grads = vector_jacobian(branch.cut.above, at_cut, wanted)
                    self._branch_gradients[t] = grads[: len(branch.parameters)]
                    at_cut = grads[len(branch.parameters) :]
                self._heads[t] = own, [None] * len(at_cut)
                for place, grad in zip(row.split(cut.sizes), at_cut, strict=True):
                    if grad is not None:
                        place.copy_(grad.flatten())
            self._features[key] = matrix.div_(self.scale) if self.scaled else matrix
        return self._features[key]

    def has_feature_gradients(self, domain: Domain) -> bool:
        """Whether every task's gradient at the features of `domain` is there already."""
        return id(domain) in self._features

    def branch_gradients(self, t: int) -> Gradients:
        """Task t's gradients of the parameters of the branch it shares, once its feature gradient was asked for."""
        return self._branch_gradients[t]

    def parameter_gradients(self) -> tuple[Tensor, list[bool]]:
        """Every task's gradient of the shared parameters, unscaled and summed over processes ``[T, D]``,
        and which of the parameters any task reaches."""
        if self._parameters is None:
            first = self.shared[0]
            matrix = torch.zeros(
                len(self.losses),
                sum(p.numel() for p in self.shared),
                dtype=torch.float32 if first.dtype in (torch.float16, torch.bfloat16) else first.dtype,
                device=first.device,
            )
            used = [False] * len(self.shared)
            for domain in self.domains:
                if not domain.cut.above:
                    continue
                for row, t in zip(self.feature_gradients(domain), domain.tasks, strict=True):
                    # Scaled before it is cast to the features' type, which might be float16.
                    gradients = domain.cut.split(row * self.scale if self.scaled else row)
                    grads = vector_jacobian(domain.cut.above, gradients, self.shared)
                    for i, (place, grad) in enumerate(
                        zip(matrix[t].split([p.numel() for p in self.shared]), grads, strict=True)
                    ):
                        if grad is not None:
                            used[i] = True
                            place.copy_(grad.flatten())
            parallel.add(matrix)
            if parallel.world() > 1:
                flags = torch.tensor(used, dtype=torch.int32, device=first.device)
                used = [bool(flag) for flag in parallel.add(flags).tolist()]
            self._parameters = matrix.div_(self.scale) if self.scaled else matrix, used
        return self._parameters

    def has_parameter_gradients(self) -> bool:
        """Whether every task's gradient of the shared parameters is there already."""
        return self._parameters is not None


def vector_jacobian(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], wanted: Sequence[Tensor], retain: bool = True
) -> Gradients:
    """`torch.autograd.grad` that passes over outputs without a gradient and inputs that are not reached."""
    pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None]
    if not pairs or not wanted:
        return [None] * len(wanted)
    outputs, gradients = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, wanted, gradients, retain_graph=retain, allow_unused=True))
