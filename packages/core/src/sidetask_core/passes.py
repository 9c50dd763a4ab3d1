"""One step's network passes: forward with cuts, then every backward pass, each made at most once.

The graph is cut where tasks meet: at the shared features, and at the output of a branch that several heads ride.
Below a cut every head is traversed once, and its gradient at the cut can be weighted, compared or combined before
anything above the cut is traversed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sidetask_core import parallel
from sidetask_core.aside import RandomState, device_of, unnoticed
from sidetask_core.products import Noted, Product, can_be_noted, named
from sidetask_core.split import SplitModel
from sidetask_core.task import Batch, Task, _listed, masked_sum

Gradients = list[Tensor | None]
Elements = list[tuple[Tensor, Tensor | None]]
Sums = list[tuple[Tensor, Tensor]]


class Cut:
    """A place where the graph is cut: tensors as they were computed, and detached leaves that go on from there."""

    def __init__(self, structure: Any) -> None:
        tensors, spec = tree_flatten(structure)
        self.above: list[Tensor] = []
        self.below: list[Tensor] = []
        # One leaf for each tensor, whatever number of names it has: its gradient is one.
        leaves: dict[int, Tensor] = {}
        # Where they are in the flattened structure.
        self.places: list[int] = []
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                if id(tensor) not in leaves:
                    leaves[id(tensor)] = tensor.detach().requires_grad_()
                    self.above.append(tensor)
                    self.below.append(leaves[id(tensor)])
                    self.places.append(i)
                tensors[i] = leaves[id(tensor)]
            elif not isinstance(tensor, (Tensor, bool, int, float, complex, str, NoneType)):
                raise TypeError(
                    f"features may be nested tuples, lists and dicts of tensors, found a {type(tensor).__name__}, "
                    "whose tensors would get no gradient; return its content, or register it with torch's pytree"
                )
        self.structure = tree_unflatten(tensors, spec)
        self.sizes = [tensor.numel() for tensor in self.below]

    def split(self, flat: Tensor) -> Gradients:
        """A vector over all of the cut's tensors as one gradient for each, in its data type."""
        parts = flat.split(self.sizes)
        return [part.view_as(leaf).to(leaf.dtype) for part, leaf in zip(parts, self.below, strict=True)]


@dataclass(eq=False)
class Branch:
    """A branch that several heads of one domain ride, cut at its output.

    `riders` are the tasks that have labels in the batch, `random` is the random state before the branch was computed,
    and `products` are those of the branch, if they were noted. `gradients` holds each rider's gradients of the branch's
    parameters, once its feature gradient was asked for.
    """

    name: str
    cut: Cut
    parameters: list[nn.Parameter]
    riders: list[int]
    random: RandomState
    products: list[Product]
    gradients: dict[int, Gradients] = field(default_factory=dict)


@dataclass(eq=False)
class Domain:
    """One input, its shared features, and the tasks that read them.

    `readers` are the names of these tasks. `gradients` holds their unscaled gradients at the features ``[tasks of the
    domain, D]``, once asked for, `random` the random state before the input was encoded, `versions` those of its
    tensors then, and `products` those of the encoder, if they were noted.
    """

    cut: Cut
    input: Any
    readers: tuple[str, ...]
    random: RandomState
    versions: list[int | None]
    products: list[Product]
    tasks: list[int] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    gradients: Tensor | None = None

    def for_another_run(self) -> Any:
        """The input.

        Raises:
            ValueError: if the network has written over it, for it would be another one.
        """
        if _versions(self.input) != self.versions:
            raise ValueError(
                "a rule runs the network on its input once more, but the network writes over its input in place; "
                "let it work on a copy"
            )
        return self.input


@dataclass(frozen=True)
class Ahead:
    """Gradients of the shared parameters under some encoder weights, found ahead of the step.

    `branches` has, of those whose riders' gradients were added up before they went through it, the gradients of its
    parameters and at the features, both under these weights.
    """

    weights: Tensor
    version: int
    gradients: Gradients
    branches: dict[Branch, tuple[Gradients, Gradients]]

    def under(self, weights: Tensor) -> bool:
        """Whether `weights` are the very same memory, unchanged since."""
        return weights.data_ptr() == self.weights.data_ptr() and weights._version == self.version


class Passes:
    """The forward pass of a step and the backward passes over it.

    Losses are this process's shares of the means over all processes, multiplied by `scale` in every backward pass.
    Products of the tasks `noted`, by name, are kept for who runs them again; None stands for those above the cuts.
    """

    def __init__(
        self,
        model: SplitModel,
        tasks: Sequence[Task],
        batch: Batch,
        shapers: Mapping[str, nn.Module],
        scaler: torch.amp.GradScaler | None = None,
        noted: Collection[str | None] = (),
    ) -> None:
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.shared = [p for p in model.shared_parameters() if p.requires_grad]
        self.domains: list[Domain] = []
        # None for a task whose input is not in the batch; such a task has no pass and no gradient.
        self.domain_of: list[Domain | None] = [None] * len(tasks)
        self.branch_of: list[Branch | None] = [None] * len(tasks)
        self.own: list[list[nn.Parameter]] = [[] for _ in tasks]
        self.elements: list[Elements | None] = [None] * len(tasks)
        self.targets: list[Any] = []
        # The random state before the branch and before the head of each task, which only shapers ask for.
        self.random: dict[int, tuple[RandomState, RandomState]] = {}
        # The products of branch and head of each task, empty unless they were noted.
        self.products: dict[int, tuple[list[Product], list[Product]]] = {}
        self._noted = {*noted} if noted and can_be_noted(model) else set()
        self._names = named(model) if self._noted else {}
        self._forward(model, tasks, batch, shapers)
        one = torch.ones((), dtype=self.losses[0].dtype, device=self.losses[0].device)
        self.scaled = scaler is not None and scaler.is_enabled()
        self.scale = one if scaler is None else scaler.scale(one)
        self._heads: dict[int, tuple[Gradients, Gradients]] = {}
        self._parameters: tuple[Tensor, list[bool]] | None = None
        # Gradients of the shared parameters under some encoder weights, if they were asked for ahead of the step.
        self.ahead: Ahead | None = None

    def _forward(
        self, model: SplitModel, tasks: Sequence[Task], batch: Batch, shapers: Mapping[str, nn.Module]
    ) -> None:
        # Targets are looked up before anything is computed, so that a missing one leaves no trace in BatchNorm.
        inputs = [batch.input_of(task) for task in tasks]
        self.targets = [batch.target_of(task) for task in tasks]
        device = device_of(model)
        by_input: dict[int, Domain] = {}
        if all(one is None for one in inputs):
            raise ValueError(f"the batch has no input of any task; the tasks are: {_listed(t.name for t in tasks)}")
        for t, one in enumerate(inputs):
            if one is None:
                continue
            if id(one) not in by_input:
                before, versions = RandomState.of(device), _versions(one)
                readers = _readers(tasks, inputs, one)
                encode = functools.partial(model.encode, tasks=readers)
                features, products = _with_products(encode, one, self._names)
                by_input[id(one)] = Domain(Cut(features), one, readers, before, versions, products)
            self.domain_of[t] = domain = by_input[id(one)]
            domain.tasks.append(t)
        self.domains = list(by_input.values())
        nothing = self.domains[0].cut.structure
        sums = {t: _sums(tasks[t], None, nothing, None, shapers) for t, one in enumerate(inputs) if one is None}
        for domain in self.domains:
            read = self._branches(model, tasks, domain, noted=bool(shapers))
            for t, (features, before, products) in zip(domain.tasks, read, strict=True):
                task, target, elements = tasks[t], self.targets[t], None
                above: list[Product] = []
                self.random[t] = before, RandomState.of(device) if shapers else before
                if target is not None:
                    names = self._names if task.name in self._noted else {}
                    prediction, above = _with_products(model.heads[task.name], features, names)
                    elements = task.elements(prediction, target)
                    self.elements[t] = [(losses.detach(), mask) for losses, mask in elements]
                self.products[t] = products, above
                sums[t] = _sums(task, elements, features, target, shapers)
        self.losses, self.labelled = _means([sums[t] for t in range(len(tasks))])

    def _branches(
        self, model: SplitModel, tasks: Sequence[Task], domain: Domain, noted: bool
    ) -> list[tuple[Any, RandomState, list[Product]]]:
        """What each task's head reads, and random state before and products of its branch, in the order of the tasks.

        Every branch is computed once. The random state is `noted`, or that of the domain stands for it. Statistics of a
        branch that primary tasks ride come from their inputs alone: it is with these that it is used after training.
        """
        kept = {model.route[task.name] for task in tasks if task.primary}
        read: dict[int, tuple[Any, RandomState, list[Product]]] = {}
        routes = [model.route[tasks[t].name] for t in domain.tasks]
        for name in dict.fromkeys(routes):
            riders = [t for t, route in zip(domain.tasks, routes, strict=True) if route == name]
            several = name is not None and sum(self.targets[t] is not None for t in riders) > 1
            before = RandomState.of(device_of(model)) if noted or several else domain.random
            output = domain.cut.structure
            products: list[Product] = []
            if name is not None:
                wanted = (several and None in self._noted) or any(tasks[t].name in self._noted for t in riders)
                guests = name in kept and not any(tasks[t].primary for t in riders)
                # With all of them absent, nothing of it is wanted, nor any number that its dropout would draw.
                if not guests or any(self.targets[t] is not None for t in riders):
                    with unnoticed(model.branches[name]) if guests else contextlib.nullcontext():
                        names = self._names if wanted else {}
                        output, products = _with_products(model.branches[name], output, names)
            branch = None
            # A head that is not run needs no cut, so that a task which sits out changes no bit of what others do.
            if name is not None and several:
                parameters = [p for p in model.branches[name].parameters() if p.requires_grad]
                there = [t for t in riders if self.targets[t] is not None]
                branch = Branch(name, Cut(output), parameters, there, before, products)
                domain.branches.append(branch)
                output = branch.cut.structure
            for t in riders:
                task = tasks[t].name
                own = model.specific_parameters(task) if branch is None else model.heads[task].parameters()
                self.own[t] = [p for p in own if p.requires_grad]
                self.branch_of[t] = branch
                read[t] = output, before, products
        return [read[t] for t in domain.tasks]

    def head(self, t: int, keep: bool = False) -> tuple[Gradients, Gradients]:
        """Task t's gradients of its own parameters and at its cut, traversing its head once.

        They are handed out once, unless whoever asks leaves them here for the next.
        """
        if t in self._heads:
            return self._heads[t] if keep else self._heads.pop(t)
        place = self.branch_of[t] or self.domain_of[t]
        assert place is not None
        cut = place.cut.below
        wanted = [*self.own[t], *cut]
        loss = self.losses[t]
        grads: Gradients = [None] * len(wanted)
        if loss.requires_grad and wanted:
            grads = list(torch.autograd.grad(loss, wanted, self.scale.to(loss), allow_unused=True))
        found = grads[: len(self.own[t])], grads[len(self.own[t]) :]
        if keep:
            self._heads[t] = found
        return found

    def feature_gradients(self, domain: Domain) -> Tensor:
        """Every task's gradient at the features of `domain`, unscaled ``[tasks of the domain, D]``."""
        if domain.gradients is None:
            cut = domain.cut
            matrix = _matrix(len(domain.tasks), cut.below)
            for row, t in zip(matrix, domain.tasks, strict=True):
                own, at_cut = self.head(t)
                branch = self.branch_of[t]
                if branch is not None:
                    wanted = [*branch.parameters, *cut.below]
                    grads = vector_jacobian(branch.cut.above, at_cut, wanted)
                    branch.gradients[t] = grads[: len(branch.parameters)]
                    at_cut = grads[len(branch.parameters) :]
                self._heads[t] = own, [None] * len(at_cut)
                _fill(row, at_cut, cut.sizes)
            domain.gradients = matrix.div_(self.scale) if self.scaled else matrix
        return domain.gradients

    def prepare(self, work: int) -> None:
        """Find every task's gradient at the features where slopes along a direction are had that way with least work.

        With it they are products of gradients, and each rider has gone backward through its branch: the work of two
        forward passes each, after which any weighted sum is free. The other way takes so much `work`, in forward
        passes over the branch, however many ride it: backward for the sums that are wanted, and forward once with a
        derivative. Of equal work it is preferred, for it keeps no gradient of the branch for each rider.
        """
        shared = {id(p) for p in self.shared}
        for domain in self.domains:
            tied = any(id(p) in shared for branch in domain.branches for p in branch.parameters)
            if tied or 2 * sum(len(branch.riders) for branch in domain.branches) < work * len(domain.branches):
                self.feature_gradients(domain)

    def head_gradients(self, cut: Cut, tasks: Sequence[int]) -> Tensor:
        """The gradients of some tasks at the cut that their heads read, unscaled ``[tasks, D]``."""
        matrix = _matrix(len(tasks), cut.below)
        for row, t in zip(matrix, tasks, strict=True):
            _fill(row, self.head(t, keep=True)[1], cut.sizes)
        return matrix.div_(self.scale) if self.scaled else matrix

    def parameter_gradients(self) -> tuple[Tensor, list[bool]]:
        """Every task's gradient of the shared parameters ``[T, D]``, and which of them any task reaches.

        Unscaled and summed over processes.
        """
        if self._parameters is None:
            sizes = [p.numel() for p in self.shared]
            matrix = _matrix(len(self.losses), self.shared)
            matrix[[t for t, domain in enumerate(self.domain_of) if domain is None]] = 0
            used = torch.zeros(len(self.shared), dtype=torch.int32)
            for domain in self.domains:
                if not domain.cut.above:
                    matrix[domain.tasks] = 0
                    continue
                for row, t in zip(self.feature_gradients(domain), domain.tasks, strict=True):
                    # Scaled before it is cast to the features' type, which might be float16.
                    gradients = domain.cut.split(row * self.scale if self.scaled else row)
                    grads = vector_jacobian(domain.cut.above, gradients, self.shared)
                    _fill(matrix[t], grads, sizes)
                    used += torch.tensor([grad is not None for grad in grads])
            parallel.add(matrix)
            if parallel.world() > 1:
                used = parallel.add(used.to(matrix.device))
            self._parameters = matrix.div_(self.scale) if self.scaled else matrix, [n > 0 for n in used.tolist()]
        return self._parameters

    def unscaled(self, gradient: Tensor) -> Tensor:
        """A gradient of the losses themselves."""
        return gradient / self.scale.to(gradient) if self.scaled else gradient

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
    reached, at_them = zip(*pairs, strict=True)
    return list(torch.autograd.grad(reached, wanted, at_them, retain_graph=retain, allow_unused=True))


def _versions(structure: Any) -> list[int | None]:
    """How often each tensor was written to, None where torch does not count."""
    tensors = [x for x in tree_flatten(structure)[0] if isinstance(x, Tensor)]
    return [None if x.is_inference() else x._version for x in tensors]


def _matrix(rows: int, columns: Sequence[Tensor]) -> Tensor:
    """An unfilled matrix with a column for every element of `columns`, in at least single precision."""
    if not columns:
        return torch.empty(rows, 0)
    widest = max((tensor.dtype for tensor in columns), key=lambda dtype: dtype.itemsize)
    dtype = widest if widest.itemsize >= 4 else torch.float32
    return torch.empty(rows, sum(tensor.numel() for tensor in columns), dtype=dtype, device=columns[0].device)


def _fill(row: Tensor, gradients: Gradients, sizes: Sequence[int]) -> None:
    for place, gradient in zip(row.split(sizes), gradients, strict=True):
        if gradient is None:
            place.zero_()
        else:
            place.copy_(gradient.flatten())


def _with_products(part: Callable[[Any], Any], given: Any, names: Mapping[int, str]) -> tuple[Any, list[Product]]:
    """What a part of the network gives, and its products if the `names` of the network are given for it."""
    if not names:
        return part(given), []
    with Noted(names) as noted:
        return part(given), noted.found


def losses_of(
    model: SplitModel, tasks: Sequence[Task], batch: Batch, shapers: Mapping[str, nn.Module]
) -> tuple[list[Tensor], Tensor]:
    """The tasks' losses, this process's shares as in `Passes`, and which are labelled; over a graph without cuts."""
    inputs = [batch.input_of(task) for task in tasks]
    targets = [batch.target_of(task) for task in tasks]
    # In the order of a step, so that layers which draw at random draw the same.
    different = {id(one): one for one in inputs if one is not None}
    features = {key: model.encode(one, _readers(tasks, inputs, one)) for key, one in different.items()}
    nothing = next(iter(features.values()), list(model.parameters()))
    predictions: dict[str, Any] = {}
    for key, shared in features.items():
        riders = [
            task.name for task, x, y in zip(tasks, inputs, targets, strict=True) if id(x) == key and y is not None
        ]
        predictions |= model.decode(shared, riders)
    sums = []
    for task, one, target in zip(tasks, inputs, targets, strict=True):
        elements = None if target is None else task.elements(predictions[task.name], target)
        sums.append(_sums(task, elements, features.get(id(one), nothing), target, shapers))
    return _means(sums)


def _readers(tasks: Sequence[Task], inputs: Sequence[Any], one: Any) -> tuple[str, ...]:
    """The tasks that read one input, by name."""
    return tuple(task.name for task, own in zip(tasks, inputs, strict=True) if own is one)


def _sums(task: Task, elements: Elements | None, features: Any, target: Any, shapers: Mapping[str, nn.Module]) -> Sums:
    """Sum and number of the labelled elements of each objective, zeros if the batch has no label for the task."""
    if elements is None:
        return [(zero := _zero_like(features), zero)] * max(1, len(task.objectives))
    if task.name in shapers:
        elements = _shaped(task, shapers[task.name], elements, target)
    return [masked_sum(losses, mask) for losses, mask in elements]


def _means(sums: Sequence[Sums]) -> tuple[list[Tensor], Tensor]:
    """This process's shares of the tasks' losses, and which tasks have a label on any process ``[T]``."""
    counts = torch.stack([count.to(sums[0][0][0]) for some in sums for _, count in some])
    of_tasks = parallel.add(counts).split([len(some) for some in sums])
    losses = []
    for some, everywhere in zip(sums, of_tasks, strict=True):
        means = [total / n for (total, _), n in zip(some, everywhere.clamp(min=1).unbind(), strict=True)]
        losses.append(means[0] if len(means) == 1 else torch.stack(means).sum())
    return losses, torch.stack([(everywhere > 0).any() for everywhere in of_tasks])


def _zero_like(features: Any) -> Tensor:
    """A loss of zero beside `features`, for a task that the batch has no label for."""
    zero = next(x for x in tree_flatten(features)[0] if isinstance(x, Tensor)).new_zeros(())
    return zero if zero.dtype == torch.float64 else zero.float()


def _shaped(task: Task, shaper: nn.Module, elements: Elements, target: Any) -> Elements:
    names = task.objectives
    if shaper.elementwise and any(x.ndim == 0 for x, _ in elements):
        raise ValueError(
            f"task {task.name!r} has a shaper, which needs one loss per element, but its loss returned a "
            "scalar; use reduction='none'"
        )
    losses: Any = dict(zip(names, (x.detach() for x, _ in elements), strict=True)) if names else elements[0][0].detach()
    with torch.no_grad():
        weights = shaper(losses, target)
    if names and (not isinstance(weights, Mapping) or set(weights) != set(names)):
        have = ", ".join(weights) if isinstance(weights, Mapping) else type(weights).__name__
        raise TypeError(f"the shaper of task {task.name!r} must return weights for {', '.join(names)}; found {have}")
    each = [weights[name] for name in names] if names else [weights]
    return [(_weighed(task, x, w), mask) for (x, mask), w in zip(elements, each, strict=True)]


def _weighed(task: Task, losses: Tensor, weights: Tensor) -> Tensor:
    try:
        shaped = losses * weights.to(losses)
        if shaped.shape != losses.shape:
            raise RuntimeError("the weights are larger than the losses")
    except RuntimeError as error:
        raise ValueError(
            f"the shaper of task {task.name!r} returned weights {list(weights.shape)} for losses {list(losses.shape)}"
        ) from error
    return shaped
