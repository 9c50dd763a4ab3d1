"""Batch normalisation for each domain by itself, in an encoder that domains share."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from sidetask_core import SplitModel
from sidetask_datasets import Dataset
from torch import Tensor, nn


def normalised_by_domain(model: SplitModel, dataset: Dataset) -> SplitModel:
    """The same network, whose shared batch normalisations have scale, shift and statistics for each domain.

    A domain is an input that tasks read. Convolutions stay shared, and what comes after the cut is a task's own anyway.

    Raises:
        ValueError: if tasks have their input in common.
    """
    domains = {task.name: task.input for task in dataset.tasks}
    named = {task: domain for task, domain in domains.items() if domain is not None}
    if len(named) < len(domains):
        raise ValueError(
            f"dataset {dataset.name!r}: its tasks have their input in common, so that there are no domains to "
            "normalise apart"
        )
    if any(isinstance(module, nn.BatchNorm2d) for module in model.shared.modules()):
        model.shared = ByDomain(model.shared, named)
    return model


class ByDomain(nn.Module):
    """An encoder that is told which tasks read its input, and normalises as their domain does.

    Args:
        encoder: whose batch normalisations are copied for each domain.
        domains: task name to domain.
    """

    reads_tasks = True  # see `sidetask_core.SplitModel`

    def __init__(self, encoder: nn.Module, domains: Mapping[str, str]) -> None:
        super().__init__()
        self.domains = dict(domains)
        for parent in list(encoder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, DomainNorm(child, list(dict.fromkeys(domains.values()))))
        self.encoder = encoder

    def forward(self, x: Tensor, tasks: Sequence[str]) -> Tensor:
        """What the encoder gives for an input of the domain of these tasks.

        Raises:
            ValueError: if they are of several domains, or of none that is known.
        """
        # A method's own tasks, which ride along, are of the domain of those whose input they read.
        found = {self.domains[task] for task in tasks if task in self.domains}
        if len(found) != 1:
            names = ", ".join(sorted(found)) or "none"
            raise ValueError(f"an input is of one domain; tasks {', '.join(tasks)} are of {names}")
        (domain,) = found
        for module in self.encoder.modules():
            if isinstance(module, DomainNorm):
                module.domain = domain
        features: Tensor = self.encoder(x)
        return features


class DomainNorm(nn.Module):
    """One batch normalisation for each domain; `domain` says which is meant, and is set before every pass."""

    def __init__(self, norm: nn.BatchNorm2d, domains: Sequence[str]) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({domain: copy.deepcopy(norm) for domain in domains})
        self.domain = domains[0]

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same."""
        normalised: Tensor = self.norms[self.domain](x)
        return normalised
