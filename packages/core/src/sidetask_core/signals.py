"""What one step knows, computed when it is first read."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from sidetask_core import parallel
from sidetask_core.passes import Passes
from sidetask_core.task import MissingKey, Task, _listed, masked_sum

Place = Literal["features", "parameters"]
"""Where gradients are compared: at the shared features, or over the shared parameters."""

Mode = Literal["exact", "difference", "one-sided"]
# What a rule's weights weigh, by the slots it fills: the encoder, branches and heads, or all parameters.
Part = Literal["shared", "specific", "all"]


class StepFailure(ArithmeticError):
    """A step that cannot be taken: a loss is not finite, or a solver found no weights."""


class Overflow(ArithmeticError):
    """Gradients left the range of float16 under a GradScaler; the step is filled so that the scaler skips it."""


class Recall(Protocol):
    """What is known of the previous step."""

    def progress(self) -> Progress | None:
        """See `Signals.progress`."""

    def hindsight(self, part: Part, mode: Mode, among: Collection[int]) -> Tensor | None:
        """See `Signals.hindsight`."""

    def elements(self, t: int, of: Collection[int], mode: Mode) -> list[ElementSlopes] | None:
        """See `Signals.hindsight_elements`."""


class Ahead(Protocol):
    """What can be known of the step that is being taken.

    Attributes:
        loss: the validation loss after the step that was looked at last, over all processes.
    """

    loss: Tensor | None

    def derivative(self, weights: Tensor, part: Part, mode: Mode, among: Collection[int], taken: bool) -> Tensor:
        """See `Signals.lookahead`."""

    def elements(self, t: int, of: Collection[int], mode: Mode) -> list[ElementSlopes] | None:
        """See `Signals.lookahead_elements`."""


@dataclass(frozen=True)
class ElementSlopes:
    """How a loss after a step depends on the weight of each element of a task's loss in it; of this process.

    Attributes:
        slopes: −α ⟨v, ∇d_i⟩ ``[N, *]``, 0 where there is no label; the derivative by the weight of element i is that
            divided by the number of labelled elements, for the loss is their mean.
        mask: which elements are labelled ``[N, *]``.
        target: the labels that the step had.
    """

    slopes: Tensor
    mask: Tensor
    target: Any


@dataclass(frozen=True)
class Progress:
    """What the last update did to its own batch: each ``[T]``, over all processes.

    Attributes:
        before: the losses of the previous step.
        after: the losses of the same batch under the parameters of now.
        labelled: False for tasks without any label in it, whose losses are zero.
    """

    before: Tensor
    after: Tensor
    labelled: Tensor


class Signals:
    """The losses and gradients of one step, as a rule sees them: lazy, cached, detached, global.

    Reading is asking. A rule that reads only `losses` costs one plain backward pass. One that reads `norms`, `gramian`
    or `gradients` at ``"features"`` costs one still, because every head is traversed once in any case. At
    ``"parameters"`` each task costs one pass over the encoder, and those passes serve the step's own gradient too.

    Everything is averaged over processes, so that all of them see the same values; `gradients` and `features` at
    ``"features"`` are the exception, for features belong to samples and stay where the samples are. Under several
    processes, never branch on those: every process must read the same signals in the same order.

    Attributes:
        tasks: the names of the T tasks, the order of every vector here.
        primary: ``[T]`` booleans, False for auxiliary tasks.
        losses: ``[T]`` masked means (after shapers), 0 for a task without a label.
        labelled: ``[T]`` booleans, False for a task without any label in this batch. Its loss and gradients are zero,
            which says nothing about the task: a rule should treat it as absent.
        resting: ``[T]`` booleans, True for a task that the augment has switched off (`Augment.resting`), which is
            absent, too.
        iteration: index of this step since training began.
        epoch: the epoch the training loop set on the step.
        part: the parameters whose gradients the rule weighs that is asked now: ``"shared"``, ``"specific"`` or
            ``"all"``, by the slots it fills.
        read_norms: what `norms` was asked for in this step, by place.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        passes: Passes,
        iteration: int,
        epoch: int,
        recall: Recall,
        lookahead: Ahead | None = None,
        followed: bool = False,
        resting: Collection[str] = (),
    ) -> None:
        self.tasks = tuple(task.name for task in tasks)
        self.primary = torch.tensor([task.primary for task in tasks])
        self.iteration = iteration
        self.epoch = epoch
        self._tasks = tuple(tasks)
        self._passes = passes
        self._gramians: dict[str, Tensor] = {}
        self.read_norms: dict[str, Tensor] = {}
        self._progress = functools.cache(recall.progress)
        self._recall = recall
        self._lookahead = lookahead
        self._followed = followed
        self.part: Part = "all"
        self.labelled = passes.labelled
        self.resting = torch.tensor([task.name in resting for task in tasks])
        losses = passes.losses
        self.losses = parallel.add(torch.stack([loss.detach().to(losses[0]) for loss in losses]))

    def elements(self, task: str, objective: str | None = None) -> tuple[Tensor, Tensor]:
        """Element losses of one task before shaping ``[N, *]`` and the mask of labelled ones; of this process.

        Raises:
            MissingKey: for an unknown task, or an objective it does not have; one of several must be named.
            ValueError: if the task's loss is a scalar, or the batch has no label for it.
        """
        t, k = self._index(task), self._objective(task, objective)
        found = self._passes.elements[t]
        if found is None:
            raise ValueError(f"task {task!r} has no label in this batch, so there are no element losses")
        losses, mask = found[k]
        if losses.ndim == 0:
            raise ValueError(
                f"the element losses of task {task!r} were asked for, but its loss returned a scalar; "
                "use reduction='none'"
            )
        return losses, torch.ones_like(losses, dtype=torch.bool) if mask is None else mask

    def objectives(self, task: str) -> tuple[Tensor, Tensor]:
        """The masked mean of each objective of one task before shaping ``[K]``, and which of them have labels ``[K]``.

        Over all processes, and in the order of the task's objectives; a task without any has one, its loss.
        """
        t = self._index(task)
        found = self._passes.elements[t]
        if found is None:
            summed = self.losses.new_zeros(2, max(1, len(self._tasks[t].objectives)))
        else:
            pairs = [torch.stack(masked_sum(losses, mask)).to(self.losses) for losses, mask in found]
            summed = torch.stack(pairs, dim=1)
        totals, counts = parallel.add(summed)
        return totals / counts.clamp(min=1), counts > 0

    def target(self, task: str) -> Any:
        """The labels of one task in this batch, of this process; None if it has none.

        Raises:
            MissingKey: for an unknown task.
        """
        return self._passes.targets[self._index(task)]

    def _objective(self, task: str, objective: str | None) -> int:
        names = tuple(self._tasks[self._index(task)].objectives)
        if objective not in (names or (None,)):
            raise MissingKey(f"task {task!r} has no objective {objective!r}; its objectives are: {_listed(names)}")
        return 0 if objective is None else names.index(objective)

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise MissingKey(f"there is no task {task!r}; the tasks are: {_listed(self.tasks)}")
        return self.tasks.index(task)

    def norms(self, at: Place) -> Tensor:
        """Norm of every task's gradient ``[T]``, at the shared features or over the shared parameters."""
        if _place(at) not in self.read_norms:
            self.read_norms[at] = self._norms(at)
        return self.read_norms[at]

    def _norms(self, at: Place) -> Tensor:
        if at in self._gramians:
            return self._gramians[at].diagonal().sqrt()
        if at == "parameters":
            return self._finite(torch.linalg.vector_norm(self.gradients(at), dim=1))
        norms = list(torch.zeros_like(self.losses))
        for domain in self._passes.domains:
            self._need_features(domain.cut.below)
            of_domain = torch.linalg.vector_norm(self._passes.feature_gradients(domain), dim=1)
            for t, norm in zip(domain.tasks, of_domain, strict=True):
                norms[t] = norm
        return self._finite(parallel.add(torch.stack(norms).square()).sqrt())

    def norm_of_sum(self, weights: Tensor, at: Place) -> Tensor:
        """Norm of the tasks' gradients' weighted sum (0-dim), at the shared features or over the shared parameters.

        Tasks with different inputs have different features; the sum is over all of them.

        Args:
            weights: of the tasks ``[T]``; it may be their boolean mask.
            at: as in `norms`.
        """
        if _place(at) == "parameters":
            gradients = self.gradients(at)
            return self._finite(torch.linalg.vector_norm(weights.to(gradients) @ gradients))
        total = torch.zeros_like(self.losses[0])
        for domain in self._passes.domains:
            self._need_features(domain.cut.below)
            gradients = self._passes.feature_gradients(domain)
            # Indexing by a list would wait for the device.
            of_domain = torch.stack([weights[t] for t in domain.tasks]).to(gradients) @ gradients
            total = total + torch.linalg.vector_norm(of_domain).square().to(total)
        return self._finite(parallel.add(total).sqrt())

    def gramian(self, at: Place) -> Tensor:
        """Inner products of the tasks' gradients ``[T, T]``, at the shared features or over the shared parameters.

        Raises:
            ValueError: at features, if tasks have different inputs and hence different features.
        """
        if _place(at) not in self._gramians:
            gradients = self.gradients(at)
            gramian = gradients @ gradients.T
            self._gramians[at] = self._finite(parallel.add(gramian) if at == "features" else gramian)
        return self._gramians[at]

    def gradients(self, at: Place) -> Tensor:
        """Every task's gradient ``[T, D]``, flattened over the shared parameters or the shared features.

        The features are those of this process's samples.

        Raises:
            ValueError: at features, if tasks have different inputs and hence different features.
        """
        if _place(at) == "parameters":
            if not self._passes.shared:
                raise ValueError("parameter gradients were asked for, but the encoder has nothing to train")
            return self._passes.parameter_gradients()[0]
        self._one_domain()
        return self._passes.feature_gradients(self._passes.domains[0])

    def features(self) -> list[Tensor]:
        """The shared features, detached: the tensors that `gradients("features")` flattens and joins, in order."""
        self._one_domain()
        return [tensor.detach() for tensor in self._passes.domains[0].cut.below]

    def progress(self) -> Progress | None:
        """The losses of the previous step's batch, then and now; None in a first step.

        Costs a forward pass without gradient over that batch, of which a copy is kept from step to step, and saved with
        the step, once this was asked for. Dropout draws what it drew then, so that what stands between the two losses
        is whatever the caller did to the parameters, nothing at all while gradients accumulate. A step that failed
        leaves none to the next; neither does a resume under several processes unless each loads a state of its own, or
        one of a batch that holds more than tensors, lists, tuples and dicts, which cannot be read back safely.
        """
        return self._progress()

    def lookahead(
        self, weights: Tensor, *, mode: Mode = "exact", among: Sequence[str] | None = None, taken: bool = False
    ) -> Tensor:
        """d(validation loss after the step) / d(weight of each task in the step), ``[T]``, over all processes.

        The step is the one that the optimizer would take with `weights` on the parameters that the rule weighs
        (`part`); the loss is the unweighted sum over the primary tasks, on the batch given as `validation`. With v its
        gradient there and α the learning rate, the derivative is −α ⟨v, ∇L_t⟩ (Liu et al., "Auto-λ", TMLR 2022).

        Costs one more backward pass over the encoder (none if the step itself has these weights), a forward and a
        backward pass over the validation batch for the primary tasks, and what the mode costs. A branch that several
        heads ride costs what the encoder costs, or one backward pass for each of them if that is less. BatchNorm
        statistics and random state do not notice, and dropout draws what it drew in the step.

        Args:
            weights: of the tasks in the step ``[T]``.
            mode: ``"exact"``, by a forward-mode derivative of the encoder (and branches), which does the work of two
                forward passes: values of convolutions and linear layers are those of the step, from the second one
                that asks on (three in the first, and behind compiled modules); ``"difference"``, by two forward passes
                with displaced parameters; ``"one-sided"``, by one. Heads are not run again.
            among: the tasks whose derivatives are wanted; all if None. Others get zero, and tasks with inputs of their
                own are not encoded for it.
            taken: whether the step is going to be taken with this very tensor of weights. It decides what costs least
                behind a branch that several heads ride, and not what is found.

        Where the encoder detaches a value or computes it under `torch.no_grad`, ``"exact"`` takes it for constant, as
        gradients do; differences follow it. Clipping between this and the optimizer's step is not known here. Where the
        validation loss is not finite, neither is the derivative.

        Raises:
            ValueError: if the step was given no validation batch or no optimizer, or for an unknown mode.
            MissingKey: for an unknown task.
            NoForwardDerivative: naming the operator that mode ``"exact"`` cannot differentiate.
        """
        ahead = self._ahead()
        found = ahead.derivative(weights, self.part, _mode(mode), self._indices(among), taken)
        # A validation loss that is not finite is none of the scaler's business: it would skip every step.
        if self._passes.scaled and ahead.loss is not None and not ahead.loss.isfinite():
            return found
        return self._finite(found)

    def lookahead_elements(
        self, task: str, objective: str | None = None, *, of: Sequence[str] | None = None, mode: Mode = "exact"
    ) -> ElementSlopes | None:
        """`lookahead` for every element of one task's loss, d_i before shaping; None without labels on this process.

        The step is the one that is being taken, with the weights that its rules decided on and all parameters, so that
        only a shaper's `update` can ask. The mean over the labelled elements of all processes is the derivative by the
        task's weight, so that weighted means are the derivatives of shaped losses.

        Costs what `lookahead` costs, but for what the mode costs: the branch and the head of the task are run with the
        encoder. Under several processes, every process must ask.

        Args:
            task: whose elements.
            objective: which of its objectives, if it has several.
            of: the tasks whose unweighted validation loss is to fall; the primaries if None.
            mode: as for `lookahead`, of the encoder with the task's branch, head and loss.

        Raises:
            ValueError: if the step was given no validation batch or no optimizer, for an unknown mode, or before the
                step's weights are decided.
            MissingKey: for an unknown task, or an objective it does not have.
            NoForwardDerivative: naming the operator that mode ``"exact"`` cannot differentiate.
        """
        k = self._objective(task, objective)
        found = self._ahead().elements(self._index(task), self._falling(of), _mode(mode))
        return None if found is None else found[k]

    def expect(self, *, validation: bool) -> None:
        """Raise what a look would in a later step, so that a mistake shows in the first one; costs nothing.

        Args:
            validation: whether it is going to be a lookahead, or a hindsight.

        Raises:
            ValueError: if the step was given no optimizer or, for a lookahead, no validation batch.
        """
        if validation:
            self._ahead()
        elif not self._followed:
            raise ValueError("a rule looks back at each step and needs step.backward(batch, optimizer=...)")

    def _ahead(self) -> Ahead:
        if self._lookahead is None:
            raise ValueError(
                "this method looks ahead and needs step.backward(batch, validation=a_batch, optimizer=the_optimizer)"
            )
        return self._lookahead

    def _falling(self, of: Sequence[str] | None) -> frozenset[int]:
        primaries = [name for name, primary in zip(self.tasks, self.primary.tolist(), strict=True) if primary]
        return self._indices(primaries if of is None else of)

    def hindsight(self, *, mode: Mode = "exact", among: Sequence[str] | None = None) -> Tensor | None:
        """d(loss of this step) / d(weight of each task in the previous step), ``[T]``; None in a first step.

        The loss is the unweighted sum over the primary tasks, on this step's batch and at the present parameters, so
        that training batches serve as validation batches of the steps before them. The derivative is that of
        `lookahead`, −α ⟨v, ∇L_t⟩, with v the gradient here and ∇L_t those of the previous step.

        Costs one more backward pass over the encoder and what the mode costs, as for `lookahead`; no validation batch.
        Once it was asked for, a step keeps for the next a copy of its input and of the encoder's parameters, and the
        tasks' gradients at the features and below. A step that failed leaves nothing to the next, and neither does a
        resume under several processes unless each loads a state of its own.

        Raises:
            ValueError: for an unknown mode; from the step, if it was given no optimizer.
            MissingKey: for an unknown task.
            NoForwardDerivative: naming the operator that mode ``"exact"`` cannot differentiate.
        """
        found = self._recall.hindsight(self.part, _mode(mode), self._indices(among))
        return None if found is None else self._finite(found)

    def hindsight_elements(
        self, task: str, objective: str | None = None, *, of: Sequence[str] | None = None, mode: Mode = "exact"
    ) -> ElementSlopes | None:
        """`hindsight` for every element that one task's loss had in the previous step, before shaping.

        None in a first step, and if that step had no labels of the task on this process. Costs and arguments are those
        of `lookahead_elements`, without a validation batch; `hindsight` says what is kept. Of the network only this
        task's branch and head are kept with the encoder, and no gradients, but the values of their convolutions and
        linear layers, which are as large as a part of what a forward pass leaves for the backward pass.

        Raises:
            ValueError: for an unknown mode; from the step, if it was given no optimizer.
            MissingKey: for an unknown task, or an objective it does not have.
            NoForwardDerivative: naming the operator that mode ``"exact"`` cannot differentiate.
        """
        k = self._objective(task, objective)
        found = self._recall.elements(self._index(task), self._falling(of), _mode(mode))
        return None if found is None else found[k]

    def _indices(self, among: Sequence[str] | None) -> frozenset[int]:
        return frozenset(range(len(self.tasks)) if among is None else [self._index(task) for task in among])

    def _one_domain(self) -> None:
        domains = self._passes.domains
        if len(domains) > 1 or len(domains[0].tasks) < len(self.tasks):
            inputs = {task.name: task.input for task in self._tasks}
            raise ValueError(
                "gradients at the features cannot be compared between tasks with different inputs "
                f"({inputs}); read them at 'parameters'"
            )
        self._need_features(domains[0].cut.below)

    def _need_features(self, features: Sequence[Any]) -> None:
        if not features:
            raise ValueError("gradients at the features were asked for, but the encoder has nothing to train")

    def _finite(self, value: Tensor) -> Tensor:
        if self._passes.scaled and not value.isfinite().all():
            raise Overflow
        return value


def _mode(mode: Mode) -> Mode:
    if mode not in get_args(Mode):
        raise ValueError(f"the modes of a lookahead are {_listed(get_args(Mode))}; not {mode!r}")
    return mode


def _place(at: str) -> str:
    if at not in ("features", "parameters"):
        raise ValueError(f"gradients are looked at 'features' or 'parameters', not {at!r}")
    return at
