"""What is kept of a pass, so that its values can be followed along a direction without the heads running again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from sidetask_core import parallel
from sidetask_core.aside import RandomState, aside, device_of
from sidetask_core.derivative import derivative_along, flat
from sidetask_core.passes import Cut, Passes
from sidetask_core.products import Product, Reused, named
from sidetask_core.signals import ElementSlopes, Mode, Part
from sidetask_core.split import SplitModel
from sidetask_core.task import Task


@dataclass(frozen=True)
class Place:
    """Where the gradients of some tasks are known: at the shared features, or at the output of a branch they ride.

    Attributes:
        branch: the branch's name; None for the shared features.
        random: the random state before the branch was computed.
        tasks: which tasks these are.
        cut: where the tensors that were cut are in the flattened output.
        tensors: these tensors.
        gradients: the tasks' gradients there, of this process ``[tasks, D]``.
        products: those of the branch that were noted; without them all are computed once more.
    """

    branch: str | None
    random: RandomState
    tasks: list[int]
    cut: list[int]
    tensors: list[Tensor]
    gradients: Tensor
    products: list[Product] = field(default_factory=list)


@dataclass(frozen=True)
class Encoded:
    """One input of a step, and what is known of the tasks that read it.

    Attributes:
        input: what was encoded.
        readers: the tasks that read it, by name.
        random: the random state before.
        places: where their gradients are known, each task's at one of them.
        products: those of the encoder that were noted; without them all are computed once more.
    """

    input: Any
    readers: tuple[str, ...]
    random: RandomState
    places: list[Place]
    products: list[Product] = field(default_factory=list)


@dataclass(frozen=True)
class Trail:
    """What a step leaves behind, from which the slope of its losses along any direction follows without its graph.

    Attributes:
        above: the parameters above the places, the encoder's and those of some branches, by their names in
            ``model.named_parameters()``.
        own: for each task its gradients of what is below its place, of this process, by name.
        encoded: one for every input.
        ambient: the precision of the forward pass.
    """

    above: dict[str, Tensor]
    own: list[dict[str, Tensor]]
    encoded: list[Encoded]
    ambient: torch.autocast

    @classmethod
    def of(cls, model: SplitModel, passes: Passes, ambient: torch.autocast) -> Trail:
        """The trail of a step that was prepared for it. It holds on to what the step holds."""
        names = {id(p): name for name, p in model.named_parameters()}
        own: list[dict[str, Tensor]] = [{} for _ in passes.losses]
        above = {names[id(p)]: p.detach() for p in passes.shared}
        encoded = []
        for domain in passes.domains:
            if domain.gradients is not None:
                places = [_place(None, domain.random, domain.tasks, domain.cut, domain.gradients)]
            else:
                alone = [t for t in domain.tasks if passes.branch_of[t] is None]
                found = passes.head_gradients(domain.cut, alone)
                places = [_place(None, domain.random, alone, domain.cut, found)] if alone else []
                for branch in domain.branches:
                    found = passes.head_gradients(branch.cut, branch.riders)
                    place = _place(branch.name, branch.random, branch.riders, branch.cut, found)
                    places.append(replace(place, products=branch.products))
                    above |= {names[id(p)]: p.detach() for p in branch.parameters}
            encoded.append(Encoded(domain.for_another_run(), domain.readers, domain.random, places, domain.products))
            for t in domain.tasks:
                pairs = list(zip(passes.own[t], passes.head(t, keep=True)[0], strict=True))
                branch_of = passes.branch_of[t]
                if branch_of is not None and domain.gradients is not None:
                    pairs += zip(branch_of.parameters, branch_of.gradients[t], strict=True)
                for parameter, gradient in pairs:
                    if gradient is not None:
                        name = names[id(parameter)]
                        more = passes.unscaled(gradient)
                        own[t][name] = own[t][name] + more if name in own[t] else more
        return cls(above, own, encoded, ambient)

    def of_tasks(self, names: Sequence[str], wanted: Sequence[str]) -> Trail:
        """The same for the tasks `wanted` of a step of tasks `names`, by name; new tasks have no gradients."""
        if list(names) == list(wanted):
            return self
        own = [self.own[names.index(name)] if name in names else {} for name in wanted]

        def kept(place: Place) -> Place:
            rows = [i for i, t in enumerate(place.tasks) if names[t] in wanted]
            tasks = [wanted.index(names[place.tasks[i]]) for i in rows]
            return replace(place, tasks=tasks, gradients=place.gradients[rows])

        encoded = [replace(one, places=[kept(place) for place in one.places]) for one in self.encoded]
        return replace(self, own=own, encoded=encoded)

    def slopes(
        self,
        model: SplitModel,
        along: Mapping[str, Tensor],
        part: Part,
        mode: Mode,
        among: Collection[int],
    ) -> Tensor:
        """⟨direction, ∇L_t⟩ of the tasks `among`, zero for others ``[T]``, over all processes; no head is run again.

        Below a task's place they are dot products with its gradients. Above it, what is moved along the direction moves
        the features there, and that meets the task's gradient.
        """
        like = next(iter(self.above.values()), next(model.parameters()))
        slopes = [torch.zeros((), dtype=torch.float64, device=like.device) for _ in self.own]
        above = {name: along[name] for name in self.above if name in along}
        for one in self.encoded:
            # What a head adds to the gradient of a parameter that is shared, too, is weighed by the decoders' rule.
            for t in [t for place in one.places for t in place.tasks if t in among and part != "shared"]:
                for name, gradient in self.own[t].items():
                    if name in along:
                        slopes[t] = slopes[t] + _dot(along[name], gradient)
            places = [place for place in one.places if place.tensors and any(t in among for t in place.tasks)]
            if not places or not above:
                continue
            moved = self._moved(model, one, places, above, mode)
            for place, at_place in zip(
                places, moved.split([place.gradients.shape[1] for place in places]), strict=True
            ):
                for t, gradient in zip(place.tasks, place.gradients, strict=True):
                    if t in among:
                        slopes[t] = slopes[t] + _dot(at_place, gradient)
        return parallel.add(torch.stack(slopes))

    def _moved(
        self,
        model: SplitModel,
        one: Encoded,
        places: Sequence[Place],
        along: Mapping[str, Tensor],
        mode: Mode,
    ) -> Tensor:
        """The derivative along the direction of what there is at some places, flattened."""
        exact = mode == "exact"  # a difference wants the values elsewhere

        def at_places(moved: Mapping[str, Tensor]) -> list[Tensor]:
            def compute(model: SplitModel) -> list[Tensor]:
                found, names = [], named(model)
                with Reused(one.products if exact else [], names) as above:
                    features = model.encode(one.input, one.readers)
                same = above.same
                for place in places:
                    output = features
                    if place.branch is not None:
                        place.random.restore(device_of(model))
                        with Reused(place.products if exact and same else [], names):
                            output = model.branches[place.branch](features)
                    tensors, _ = tree_flatten(output)
                    found += [tensors[i] for i in place.cut]
                return found

            with self.ambient:
                return aside(model, compute, {**self.above, **moved}, one.random)

        return derivative_along(at_places, self.above, [x for place in places for x in place.tensors], along, mode)


def _place(branch: str | None, random: RandomState, tasks: list[int], cut: Cut, gradients: Tensor) -> Place:
    return Place(branch, random, tasks, cut.places, [x.detach() for x in cut.below], gradients)


@dataclass(frozen=True)
class Rerun:
    """What it takes to run one task of a step again with other parameters: from its input to its element losses.

    Attributes:
        input: what was encoded.
        target: the labels.
        random: the random state before the encoder, before the branch and before the head.
        losses: the element losses of each objective, before shaping.
        masks: which of them are labelled.
        parameters: those of encoder, branch and head that are trained, by name.
        ambient: the precision of the forward pass.
        products: those of encoder, branch and head that were noted; without them all are computed once more.
    """

    input: Any
    target: Any
    random: tuple[RandomState, RandomState, RandomState]
    losses: list[Tensor]
    masks: list[Tensor | None]
    parameters: dict[str, Tensor]
    ambient: torch.autocast
    products: tuple[list[Product], list[Product], list[Product]] = ([], [], [])

    @classmethod
    def of(cls, model: SplitModel, task: Task, t: int, passes: Passes, ambient: torch.autocast) -> Rerun | None:
        """The rerun of task `t` of a step; None if its batch has no labels here. It copies nothing."""
        elements, domain = passes.elements[t], passes.domain_of[t]
        if elements is None or domain is None:
            return None
        above = {id(p) for p in [*model.shared_parameters(), *model.specific_parameters(task.name)]}
        parameters = {n: p.detach() for n, p in model.named_parameters() if id(p) in above and p.requires_grad}
        losses, masks = zip(*elements, strict=True)
        random = (domain.random, *passes.random[t])
        products = (domain.products, *passes.products[t])
        again = domain.for_another_run()
        return cls(again, passes.targets[t], random, [*losses], [*masks], parameters, ambient, products)

    def slopes(self, model: SplitModel, task: Task, along: Mapping[str, Tensor], mode: Mode) -> list[ElementSlopes]:
        """−⟨direction, ∇d_i⟩ of every element loss d_i of each objective, from one pass of encoder, branch and head."""
        above = {name: along[name] for name in self.parameters if name in along}
        # A difference wants the values elsewhere.
        of_encoder, of_branch, of_head = self.products if mode == "exact" else ([], [], [])

        def elements(moved: Mapping[str, Tensor]) -> list[Tensor]:
            def compute(model: SplitModel) -> list[Tensor]:
                device, branch, names = device_of(model), model.route[task.name], named(model)
                with Reused(of_encoder, names) as part:
                    read = model.encode(self.input, [task.name])
                same = part.same
                self.random[1].restore(device)
                if branch is not None:
                    with Reused(of_branch if same else [], names) as part:
                        read = model.branches[branch](read)
                    same &= part.same
                self.random[2].restore(device)
                with Reused(of_head if same else [], names):
                    prediction = model.heads[task.name](read)
                return [losses for losses, _ in task.elements(prediction, self.target)]

            with self.ambient:
                return aside(model, compute, {**self.parameters, **moved}, self.random[0])

        if above:
            moved = derivative_along(elements, self.parameters, self.losses, above, mode)
        else:
            moved = torch.zeros_like(flat(self.losses))
        slopes = moved.neg().split([x.numel() for x in self.losses])
        found = []
        for slope, losses, mask in zip(slopes, self.losses, self.masks, strict=True):
            there = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
            of_elements = torch.where(there, slope.view_as(losses), 0.0)
            found.append(ElementSlopes(of_elements, there, self.target))
        return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten().to(a))
