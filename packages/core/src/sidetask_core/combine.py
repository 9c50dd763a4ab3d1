"""The last part of a step: weighted gradients of every parameter, with one pass over each branch and the encoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidetask_core import parallel
from sidetask_core.passes import Ahead, Branch, Domain, Gradients, Passes, vector_jacobian
from sidetask_core.signals import Place


@dataclass(frozen=True)
class Combined:
    """A shared gradient that is not a weighted sum: at the features of this process, or over all parameters."""

    gradient: Tensor
    at: Place


@dataclass(frozen=True)
class Weights:
    """What the rules decided: weights of the shared and of the task-specific gradients.

    The same tensor twice says that they are equal. Beside a combined gradient, `encoder` has nothing to weigh.
    """

    encoder: Tensor
    decoder: Tensor
    combined: Combined | None = None


class _Sum:
    """A weighted sum of gradients at several tensors, some of which a term may not reach."""

    def __init__(self, size: int) -> None:
        self.gradients: Gradients = [None] * size

    def add(self, gradients: Gradients, weight: Tensor) -> None:
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                so_far, factor = self.gradients[i], weight.to(gradient)
                # In one pass over the memory: these may be as large as the network, and many.
                self.gradients[i] = gradient * factor if so_far is None else so_far.addcmul_(gradient, factor)


def combine(
    passes: Passes, weights: Weights, ahead: bool = False, among: Collection[int] | None = None
) -> dict[nn.Parameter, Tensor]:
    """The gradient of every parameter that the losses reach, summed over processes.

    Whoever asks `ahead` of the step leaves everything in place for the step, which pays nothing twice: gradients of
    heads are kept for each task, and those above are the step's own if it has the same encoder weights. If `among` says
    which tasks have weights, the others, whose weights are zero, are passed over.
    """
    local: dict[nn.Parameter, Tensor] = {}
    at_features: Gradients = []
    through: dict[Branch, tuple[Gradients, Gradients]] = {}
    for domain in passes.domains:
        at_features += _below(passes, domain, weights, local, through, ahead, among)
    whole: dict[nn.Parameter, Tensor] = {}
    over_parameters = weights.combined is not None and weights.combined.at == "parameters"
    if over_parameters or (weights.combined is None and passes.has_parameter_gradients()):
        matrix, used = passes.parameter_gradients()
        flat = weights.encoder.to(matrix) @ matrix if weights.combined is None else weights.combined.gradient
        parts = (flat * passes.scale.to(flat)).split([p.numel() for p in passes.shared])
        for parameter, part, reached in zip(passes.shared, parts, used, strict=True):
            if reached:
                whole[parameter] = part.view_as(parameter).to(parameter.dtype)
    elif passes.ahead is not None and passes.ahead.under(weights.encoder):
        _add(local, passes.shared, passes.ahead.gradients)
    else:
        above = [tensor for domain in passes.domains for tensor in domain.cut.above]
        # An earlier read of parameter gradients keeps the graph; nothing comes after the step's own pass.
        shared = vector_jacobian(above, at_features, passes.shared, retain=ahead)
        if ahead:
            passes.ahead = Ahead(weights.encoder, weights.encoder._version, shared, through)
        _add(local, passes.shared, shared)
    parameters = passes.trainable
    summed = parallel.add_gradients(parameters, [local.get(p) for p in parameters])
    for parameter, gradient in zip(parameters, summed, strict=True):
        if gradient is not None:
            whole[parameter] = whole[parameter] + gradient if parameter in whole else gradient
    return whole


def _below(
    passes: Passes,
    domain: Domain,
    weights: Weights,
    local: dict[nn.Parameter, Tensor],
    through: dict[Branch, tuple[Gradients, Gradients]],
    keep: bool,
    among: Collection[int] | None,
) -> Gradients:
    """Collect the gradients of heads and branches in `local`; return the weighted gradient at the features.

    What sums were made of on their way `through` a branch is kept, if the step may have the same weights.
    """
    cut = domain.cut
    matrix = domain.gradients
    known = passes.ahead.branches if passes.ahead is not None and passes.ahead.under(weights.encoder) else {}
    at_features = _Sum(len(cut.below))
    # Branch by branch in the order of the first riders, so that further riders of weight zero change no bit.
    riders: dict[int, list[int]] = {}
    for t in domain.tasks:
        branch = passes.branch_of[t]
        riders.setdefault(-1 - t if branch is None else id(branch), []).append(t)
    for together in riders.values():
        branch = passes.branch_of[together[0]]
        for_encoder, for_decoder = (_Sum(0 if branch is None else len(branch.cut.below)) for _ in range(2))
        of_riders = _Sum(0 if branch is None else len(branch.parameters))
        for t in together:
            if among is not None and t not in among:
                continue
            own, at_cut = passes.head(t, keep)
            weighted = _Sum(len(own))
            weighted.add(own, weights.decoder[t])
            _add(local, passes.own[t], weighted.gradients)
            if matrix is not None:
                if branch is not None:
                    of_riders.add(branch.gradients[t], weights.decoder[t])
            elif branch is None:
                at_features.add(at_cut, weights.encoder[t])
            else:
                for_encoder.add(at_cut, weights.encoder[t])
                if weights.encoder is not weights.decoder:
                    for_decoder.add(at_cut, weights.decoder[t])
        if branch is None:
            continue
        if matrix is not None:
            _add(local, branch.parameters, of_riders.gradients)
            continue
        if weights.encoder is weights.decoder:
            if branch in known:
                own, at_cut = known[branch]
            else:
                wanted = [*branch.parameters, *cut.below]
                found = vector_jacobian(branch.cut.above, for_encoder.gradients, wanted)
                own, at_cut = found[: len(branch.parameters)], found[len(branch.parameters) :]
            if keep:
                through[branch] = own, at_cut
        else:
            own = vector_jacobian(branch.cut.above, for_decoder.gradients, branch.parameters)
            if branch in known:
                at_cut = known[branch][1]
            else:
                at_cut = vector_jacobian(branch.cut.above, for_encoder.gradients, cut.below)
        _add(local, branch.parameters, own)
        at_features.add(at_cut, torch.ones_like(weights.encoder[0]))
    if matrix is not None:
        if weights.combined is not None and weights.combined.at == "features":
            flat = weights.combined.gradient
        else:
            flat = torch.stack([weights.encoder[t] for t in domain.tasks]).to(matrix) @ matrix
        return cut.split(flat * passes.scale.to(matrix))
    return at_features.gradients


def _add(total: dict[nn.Parameter, Tensor], parameters: Sequence[nn.Parameter], gradients: Gradients) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            total[parameter] = total[parameter] + gradient if parameter in total else gradient


def accumulate(gradients: Mapping[nn.Parameter, Tensor]) -> None:
    """Add gradients to `.grad`, each in memory of its own."""
    taken: set[int] = set()
    for parameter, gradient in gradients.items():
        if parameter.grad is not None:
            parameter.grad += gradient
            continue
        # Autograd may hand one tensor to two parameters, or an expanded one; in-place clipping needs neither.
        if gradient.data_ptr() in taken or gradient.stride() != parameter.stride():
            gradient = torch.empty_like(parameter).copy_(gradient)
        taken.add(gradient.data_ptr())
        parameter.grad = gradient
