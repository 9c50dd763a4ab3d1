"""From names in a configuration to objects: data set, network and step, through entry points only."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from sidetask_core import Rule, SplitModel, Step, plugins

from sidetask_bench import runtime
from sidetask_bench.config import Plugin, RunConfig
from sidetask_bench.schema import ExperimentError, first_line, unknown

if TYPE_CHECKING:
    from sidetask_datasets import Dataset

# Samples whose labels are looked at together.
_AT_ONCE = 16


def make_dataset(plugin: Plugin) -> Dataset:
    """Build a data set from the group ``sidetask.datasets``.

    Raises:
        ExperimentError: for an unknown name or option, or what the factory objects to.
    """
    with blaming("dataset", plugin.name):
        factory = plugins.find("datasets", plugin.name)
        check_options(factory, plugin, "dataset", given=0)
        if "device" in plugin.options:
            runtime.find_device(str(plugin.options["device"]), "dataset.device")
        return factory(**plugin.options)


def make_model(config: RunConfig, dataset: Dataset) -> SplitModel:
    """Build the run's network, initialised from its seed, without what its method adds for training.

    Raises:
        ExperimentError: for an unknown name or option, or what the factory objects to.
    """
    torch.manual_seed(config.seed)
    with blaming("network", config.network.name):
        factory = plugins.find("networks", config.network.name)
        check_options(factory, config.network, "network", given=1)
        model: SplitModel = factory(dataset, **config.network.options)
    return model


def make_step(config: RunConfig, dataset: Dataset) -> Step:
    """Build the run's network and method, initialised from its seed.

    Runs with one seed start from the same weights whatever their method is. Rules draw from generators of their own,
    whose seeds are moved by the run's, so that a random rule differs from seed to seed too.

    Raises:
        ExperimentError: for an unknown name or option, or what a factory objects to.
    """
    model = make_model(config, dataset)
    with blaming("method", config.method):
        method = plugins.make_method(config.method, dataset.tasks, functools.partial(_labels, dataset))
        step = Step(model, dataset.tasks, method)
        for module in step.modules():
            if isinstance(module, Rule):
                module.generator.manual_seed(module.generator.initial_seed() + config.seed)
    return step


def _labels(dataset: Dataset, name: str) -> Iterator[Any]:
    """The labels of a task over the training split, as they are without augmentation."""
    (task,) = [task for task in dataset.tasks if task.name == name]
    for batch in dataset.train.batches(_AT_ONCE, shuffle=False, augment=False, drop_last=False):
        yield batch.target_of(task)


@contextlib.contextmanager
def blaming(what: str, name: Any) -> Iterator[None]:
    """Turn what a plug-in objects to into an ExperimentError that says whose it is."""
    try:
        yield
    except (ValueError, TypeError, LookupError, OSError, ImportError, OverflowError, RuntimeError) as error:
        raise ExperimentError(f"{what} {name!r}: {first_line(error)}") from error


def check_options(factory: Any, plugin: Plugin, path: str, given: int) -> None:
    """Find a misspelt option before Python does, to suggest the right one; `given` arguments are not the user's."""
    parameters = list(inspect.signature(factory).parameters.values())[given:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key in plugin.options:
        if key not in names:
            raise unknown(key, names, path)
