"""A method is four slots; this is what may fill them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sidetask_core.signals import Place, Signals
from sidetask_core.split import SplitModel
from sidetask_core.task import MissingKey, Task, _listed, check_tasks


class Rule(nn.Module):
    """What every rule of a method has in common: it knows its tasks, and its state says which they are.

    Args:
        tasks: the tasks, in the order of every vector.
        seed: seeds `generator`, from which a rule draws all its random numbers. The generator's state is part
            of `state_dict`, so that a resumed run draws what an uninterrupted one would have drawn.

    A `state_dict` of other tasks, or of the same tasks in another order, is refused by `load_state_dict`.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int = 0) -> None:
        super().__init__()
        self.tasks = tuple(task.name for task in check_tasks(tasks))
        self.primary = tuple(task.primary for task in tasks)
        self.generator = torch.Generator().manual_seed(seed)

    def objective(self, signals: Signals) -> Tensor | None:
        """The scalar that trains this rule's own parameters with the user's optimizer; None without any."""
        return None

    def named_weights(self) -> Mapping[str, Tensor]:
        """What is worth a log besides the weights it gives, each a 0-dim tensor, by task; may be empty."""
        return {}

    def get_extra_state(self) -> dict[str, Any]:
        """What is not a parameter or buffer: task names and the random generator."""
        return {"tasks": list(self.tasks), "generator": self.generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a saved state, if it is one of the same tasks in the same order."""
        if tuple(state["tasks"]) != self.tasks:
            raise ValueError(
                f"the state of this {type(self).__name__} is for tasks {_listed(state['tasks'])}, "
                f"not for {_listed(self.tasks)}"
            )
        self.generator.set_state(state["generator"].cpu())


class Weighting(Rule):
    """A rule that gives every task a weight. Ones for every task reproduce the gradient of the sum of losses."""

    def forward(self, signals: Signals) -> Tensor:
        """Weights ``[T]``, in the order of `signals.tasks`; called once per step, without gradient."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it weighs the tasks")


class Combiner(Rule):
    """A rule for shared parameters that is not a weighted sum of the tasks' gradients.

    Args:
        tasks: the tasks, in the order of every vector.
        at: where the combined gradient lies, at the shared ``"features"`` or over the shared ``"parameters"``.
        seed: seeds the rule's generator.
    """

    def __init__(self, tasks: Sequence[Task], *, at: Place, seed: int = 0) -> None:
        super().__init__(tasks, seed=seed)
        if at not in ("features", "parameters"):
            raise ValueError(f"a Combiner works at 'features' or 'parameters', not {at!r}")
        self.at: Place = at

    def forward(self, signals: Signals) -> Tensor:
        """The combined gradient ``[D]``, of the shape of one row of ``signals.gradients(self.at)``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it combines the gradients")


class Shaper(nn.Module):
    """A rule that weighs the elements of one task's loss before their masked mean.

    Its parameters, if it has any, are trained by the user's optimizer on its `objective`; what it learns by a rule of
    its own, it learns in `update`.

    Attributes:
        elementwise: whether it needs one loss per element. Without, it weighs whole objectives, and a loss that is a
            scalar will do.
        task: the name of the one task it was made for; None if any will do.
    """

    elementwise = True
    task: str | None = None

    def forward(self, losses: Any, target: Any) -> Any:
        """Weights that broadcast to the element losses ``[N, *]``; called without gradient.

        Of a task with several objectives, `losses` maps each to its element losses, and so must the weights. The
        mean's denominator stays the number of labelled elements, so that ones reproduce the plain mean.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it weighs the elements")

    def objective(self, signals: Signals) -> Tensor | None:
        """The scalar that trains this shaper's own parameters with the user's optimizer; None without any."""
        return None

    def update(self, signals: Signals) -> None:
        """Learn from a step whose losses and weights are known; what is learned holds from the next step on.

        Called once per step, without gradient, after the rules; not for a step that fails.
        """

    def named_weights(self) -> Mapping[str, Tensor]:
        """The weights that are worth a log, each a 0-dim tensor, such as those of classes by name; may be empty."""
        return {}


class Augment(nn.Module):
    """A change of the model and its tasks made once, before training: self-auxiliaries, noise, pseudo tasks.

    What it keeps from step to step is in its `state_dict`, and so in the step's.
    """

    def extended(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """The given tasks and those that are added. It takes no model, so that rules can be made for them before."""
        return tasks

    def forward(self, model: SplitModel, tasks: Sequence[Task]) -> SplitModel:
        """The model of the extended tasks; the given `tasks` keep their heads."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it makes of the model")

    def check(self, method: Method) -> None:
        """Raise ValueError for what the method has in other slots and does not go with this."""

    def known_as(self, name: str) -> str:
        """The name of an added task from another way of writing it; any other name as it is."""
        return name

    def resting(self, iteration: int, epoch: int) -> Collection[str]:
        """The names of tasks that sit out this step, the same on all processes: they are not run, and are absent."""
        return ()


@dataclass(frozen=True)
class Method:
    """How every task's signal is weighted. An empty method is the plain sum of losses.

    Args:
        augment: changes model and tasks before training.
        shapers: task name to per-element weights, applied before the masked mean.
        decoder: weights for task-specific parameters; None takes the encoder's weights (ones beside a Combiner).
        encoder: weights, or a combined gradient, for shared parameters; None is ones.

    Composing methods is picking slots:

    >>> from sidetask_core import Equal, Fixed, Task
    >>> tasks = [Task("a", loss=abs), Task("b", loss=abs)]
    >>> a, b = Method(encoder=Equal(tasks)), Method(encoder=Fixed(tasks, {"a": 1.0, "b": 0.5}))
    >>> Method(encoder=a.encoder, decoder=b.encoder).decoder.weights.tolist()
    [1.0, 0.5]
    """

    augment: Augment | None = None
    shapers: Mapping[str, Shaper] = field(default_factory=dict)
    decoder: Weighting | None = None
    encoder: Weighting | Combiner | None = None

    def __post_init__(self) -> None:
        if self.augment is not None and not isinstance(self.augment, Augment):
            raise TypeError(f"augment must be an Augment, found {type(self.augment).__name__}")
        if self.decoder is not None and not isinstance(self.decoder, Weighting):
            raise TypeError(f"decoder must be a Weighting, found {type(self.decoder).__name__}")
        if self.encoder is not None and not isinstance(self.encoder, (Weighting, Combiner)):
            raise TypeError(f"encoder must be a Weighting or a Combiner, found {type(self.encoder).__name__}")
        for name, shaper in self.shapers.items():
            if not isinstance(shaper, Shaper):
                raise TypeError(f"the shaper of task {name!r} must be a Shaper, found {type(shaper).__name__}")


class Fixed(Weighting):
    """Constant weights.

    Args:
        tasks: the tasks.
        weights: task name to weight, one for every task.

    Raises:
        MissingKey: for a task without a weight.
        ValueError: for a weight of a task that does not exist.
    """

    weights: Tensor

    def __init__(self, tasks: Sequence[Task], weights: Mapping[str, float]) -> None:
        super().__init__(tasks)
        for name in self.tasks:
            if name not in weights:
                raise MissingKey(f"task {name!r} has no weight; there are weights for: {_listed(weights)}")
        for name in weights:
            if name not in self.tasks:
                raise ValueError(f"there is a weight for {name!r}, but the tasks are: {_listed(self.tasks)}")
        self.register_buffer("weights", torch.tensor([float(weights[name]) for name in self.tasks]))

    def forward(self, signals: Signals) -> Tensor:
        """The given weights ``[T]``."""
        return self.weights.to(signals.losses)


class Equal(Fixed):
    """Weight one for every task: the gradient of the plain sum of losses."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__(tasks, dict.fromkeys((task.name for task in check_tasks(tasks)), 1.0))


class Product(Weighting):
    """The product of several weightings of the same tasks, each reading the same signals."""

    def __init__(self, *factors: Weighting) -> None:
        if not factors:
            raise ValueError("a Product needs at least one factor")
        nn.Module.__init__(self)
        self.tasks, self.primary = factors[0].tasks, factors[0].primary
        for factor in factors:
            if factor.tasks != self.tasks:
                raise ValueError(
                    f"the factors of a Product weigh different tasks: {_listed(self.tasks)} and {_listed(factor.tasks)}"
                )
        self.generator = torch.Generator()
        self.factors = factors
        for i, factor in enumerate(factors):
            self.add_module(f"factor{i}", factor)

    def forward(self, signals: Signals) -> Tensor:
        """The product of the factors' weights ``[T]``."""
        return torch.stack([factor(signals) for factor in self.factors]).prod(dim=0)

    def objective(self, signals: Signals) -> Tensor | None:
        """The sum of the factors' objectives."""
        objectives = [o for factor in self.factors if (o := factor.objective(signals)) is not None]
        return torch.stack(objectives).sum() if objectives else None
