"""A training step: forward, weights, gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from sidetask_core.aside import aside, unnoticed
from sidetask_core.combine import Combined, Weights, accumulate, combine
from sidetask_core.lookahead import Lookahead
from sidetask_core.memory import Memory
from sidetask_core.method import Combiner, Method, Rule, Shaper, Weighting
from sidetask_core.passes import Passes
from sidetask_core.signals import Overflow, Signals, StepFailure
from sidetask_core.split import SplitModel
from sidetask_core.task import Batch, Task, _listed, check_tasks

Result = TypeVar("Result")


class NonFiniteLoss(StepFailure):
    """A task's loss is NaN or infinite. `tasks` and `iteration` say which and when.

    No `.grad` has changed. BatchNorm statistics have seen the batch, as they do in any forward pass: skip such a batch
    only with a copy of them at hand.
    """

    def __init__(self, tasks: Sequence[str], iteration: int) -> None:
        self.tasks, self.iteration = tuple(tasks), iteration
        plural = "losses of tasks" if len(self.tasks) > 1 else "loss of task"
        super().__init__(f"non-finite {plural} {', '.join(map(repr, self.tasks))} at iteration {iteration}")


@dataclass(frozen=True)
class Report:
    """What a step did, as detached 0-dim tensors by task name.

    Attributes:
        losses: masked means over all processes.
        decoder_weights: weights of the task-specific gradients.
        encoder_weights: weights of the shared gradients; empty under a Combiner, which has none. NaN in a step
            that a GradScaler is going to skip.
        gradient_norms: norms of the unweighted gradients at the shared features, if a rule read them; empty otherwise.
    """

    losses: dict[str, Tensor]
    decoder_weights: dict[str, Tensor]
    encoder_weights: dict[str, Tensor]
    gradient_norms: dict[str, Tensor]


def _ambient(passes: Passes) -> torch.autocast:
    """The autocast that is in force, to be entered again."""
    kind = passes.losses[0].device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


class _Finite:
    """Which losses of one step are finite, on their way to the host: the device goes on meanwhile."""

    def __init__(self, flags: Tensor, iteration: int) -> None:
        self.iteration = iteration
        self.event = None
        self.flags = flags
        if flags.is_cuda:
            self.flags = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> list[bool]:
        """Wait for the flags, and no longer."""
        if self.event is not None:
            self.event.synchronize()
        return self.flags.tolist()


class Step(nn.Module):
    """Fills `.grad` of a multi-task model as a method says, at the cost of one plain backward pass where it can.

    The caller owns `zero_grad`, clipping, `optimizer.step` and schedules, as with ``loss.backward()``; gradients
    accumulate. `step.model` and `step.tasks` are what the method's augment made of the given ones;
    `step.parameters()` are the model's and those of rules that the caller's optimizer trains. `step.state_dict()`
    holds model, rules, their optimizers and random generators, and restores a run that continues bit for bit.

    Under `torch.distributed` every process gives its part of the batch and gets the gradient of the whole: wrap
    nothing in DistributedDataParallel. Start from `sidetask_core.parallel.broadcast(step)`.

    Args:
        model: the network.
        tasks: what it learns; each has a head of its name.
        method: how the tasks are weighted; default is the plain sum of losses.
        check: ``"immediate"`` looks at every loss before any `.grad` changes, at the price of waiting once for
            the device. ``"deferred"`` looks at the previous step's losses, which costs no waiting and raises one
            step late.

    Raises:
        MissingKey: for a task without a head.
        ValueError: for duplicate tasks, a head without a task, a shaper of an unknown task, or rules made
            for other tasks.

    >>> model = SplitModel(nn.Linear(2, 3), {"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    >>> tasks = [Task(name, loss=lambda p, y: (p - y) ** 2) for name in ("a", "b")]
    >>> step = Step(model, tasks)
    >>> x, y = torch.randn(4, 2), torch.randn(4, 1)
    >>> report = step.backward(Batch(x, {"a": y, "b": y}))
    >>> sorted(report.losses), report.encoder_weights["a"].item()
    (['a', 'b'], 1.0)
    """

    def __init__(
        self,
        model: SplitModel,
        tasks: Sequence[Task],
        method: Method | None = None,
        *,
        check: Literal["immediate", "deferred"] = "immediate",
    ) -> None:
        super().__init__()
        if check not in ("immediate", "deferred"):
            raise ValueError(f"check must be 'immediate' or 'deferred', not {check!r}")
        method = Method() if method is None else method
        tasks = check_tasks(tasks)
        for task in tasks:
            model.check_head(task.name)
        if method.augment is not None:
            method.augment.check(method)
            model, tasks = method.augment(model, tasks), check_tasks(method.augment.extended(tasks))
            for task in tasks:
                model.check_head(task.name)
        names = tuple(task.name for task in tasks)
        idle = [name for name in model.heads if name not in names]
        if idle:
            raise ValueError(
                f"the model has a head without a task: {_listed(idle)}; the tasks are: {_listed(names)} "
                "(model.restricted_to(tasks) drops such heads)"
            )
        for name, shaper in method.shapers.items():
            if name not in names:
                raise ValueError(f"there is a shaper for {name!r}, but the tasks are: {_listed(names)}")
            if shaper.task not in (None, name):
                raise ValueError(f"the shaper for {name!r} was made for task {shaper.task!r}")
        for slot, rule in (("encoder", method.encoder), ("decoder", method.decoder)):
            if rule is not None and rule.tasks != names:
                raise ValueError(
                    f"the {slot} rule {type(rule).__name__} was made for tasks {_listed(rule.tasks)}, "
                    f"but the step's tasks are {_listed(names)}, in this order"
                )
        # Gradients per task need several backward passes over one graph. Code compiled with donated buffers may write
        # over them in the first; what is compiled within a step has none, what was compiled before goes.
        if any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules()):
            torch.compiler.reset()
        self.model = model
        self.tasks = tasks
        self.augment = method.augment
        self.shapers = nn.ModuleDict(method.shapers)
        self.encoder = method.encoder
        self.decoder = method.decoder
        self.check = check
        self.iteration = 0
        self.epoch = 0
        self._unchecked: _Finite | None = None
        self._memory = Memory(model, tasks, dict(self.shapers.items()))

    def rules(self) -> Iterator[Rule]:
        """The encoder's and the decoder's rule, once if they are the same, none for an empty slot."""
        yield from dict.fromkeys(rule for rule in (self.encoder, self.decoder) if rule is not None)

    def rule_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of rules that the caller's optimizer trains; usually without weight decay."""
        # Once each: two rules may share one.
        yield from dict.fromkeys(p for rule in self._trained() for p in rule.parameters())

    def _trained(self) -> Iterator[Rule | Shaper]:
        """Whatever may have an objective of its own."""
        yield from self.rules()
        for shaper in self.shapers.values():
            assert isinstance(shaper, Shaper)
            yield shaper

    def export(self) -> SplitModel:
        """The network of the primary tasks, nothing else; modules are shared with this step's model."""
        return self.model.restricted_to([task.name for task in self.tasks if task.primary])

    def backward(
        self,
        batch: Batch,
        *,
        validation: Batch | Callable[[], Batch] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Report:
        """Run the model on a batch and add every parameter's gradient to its `.grad`.

        Args:
            batch: inputs and labels of this process.
            validation: inputs and labels of the batch that methods which look ahead want to do well on, or a function
                that gives it, called only if a rule does look ahead.
            optimizer: what will take the step, read by such methods.
            scaler: as in ``scaler.scale(loss).backward()``: gradients come out scaled, for
                ``scaler.step(optimizer)``; rules see unscaled signals.

        Call it under `torch.autocast` for mixed precision; the backward passes and rules leave it themselves.

        Raises:
            NonFiniteLoss: before any `.grad` changes (one step late with ``check="deferred"``).
            MissingKey: for a task whose input or target the batch lacks.
        """
        with functorch_config.patch(donated_buffer=False):
            return self._backward(batch, validation, optimizer, scaler)

    def _backward(
        self,
        batch: Batch,
        validation: Batch | Callable[[], Batch] | None,
        optimizer: torch.optim.Optimizer | None,
        scaler: torch.amp.GradScaler | None,
    ) -> Report:
        batch, resting = self._without_resting(batch)
        with torch.enable_grad():
            passes = Passes(self.model, self.tasks, batch, dict(self.shapers.items()), scaler, self._memory.noted)
        ambient = _ambient(passes)
        with torch.autocast(ambient.device, enabled=False), torch.no_grad():
            recall = self._memory.recall(passes, ambient)
            lookahead = None
            if validation is not None and optimizer is not None:
                lookahead = Lookahead(
                    self.model, self.tasks, passes, ambient, validation, optimizer, self._memory.noted
                )
            followed = optimizer is not None
            signals = Signals(self.tasks, passes, self.iteration, self.epoch, recall, lookahead, followed, resting)
            self._check_finite(signals.losses)
            try:
                weights = self._weigh(signals)
                if lookahead is not None:
                    lookahead.decided = weights
                rule_gradients = self._rule_gradients(signals)
                self._update_shapers(signals)
            except StepFailure:
                # With a deferred check, what made the rule fail may be a loss of this very step.
                self._raise_unless(_Finite(signals.losses.isfinite(), self.iteration))
                raise
            except Overflow:
                # NaN reaches every gradient, so that the scaler skips the step and lowers its scale.
                nan = torch.full_like(signals.losses, torch.nan)
                weights, rule_gradients = Weights(nan, nan, None), {}
            else:
                self._keep_trail(passes, ambient, optimizer)
            for parameter, gradient in rule_gradients.items():
                rule_gradients[parameter] = gradient * passes.scale.to(gradient)
            accumulate(rule_gradients | combine(passes, weights))
        if self._memory.wants_progress:
            self._memory.keep_batch(batch, passes, signals.losses)
        self.iteration += 1
        return Report(
            losses=self._by_name(signals.losses),
            decoder_weights=self._by_name(weights.decoder),
            encoder_weights=self._by_name(weights.encoder) if weights.combined is None else {},
            gradient_norms=self._by_name(norms) if (norms := signals.read_norms.get("features")) is not None else {},
        )

    def inspect(self, batch: Batch, read: Callable[[Signals], Result]) -> Result:
        """What `read` makes of the signals that a step on a batch would have now, without a trace.

        Nothing is weighed, filled or counted: a step on this batch that follows is, bit for bit, what it would have
        been. A look ahead or back is not to be had. Costs a forward pass and, of the backward passes, those that what
        is read needs (`Signals`); compiled modules run as they were written. Call it under `torch.autocast` if the step
        is. Under several processes, every one must call it with its part of the batch.

        >>> model = SplitModel(nn.Linear(2, 3), {"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
        >>> step = Step(model, [Task(name, loss=lambda p, y: (p - y) ** 2) for name in ("a", "b")])
        >>> batch = Batch(torch.randn(4, 2), {"a": torch.randn(4, 1), "b": torch.randn(4, 1)})
        >>> step.inspect(batch, lambda signals: signals.gramian("parameters")).shape
        torch.Size([2, 2])

        Raises:
            MissingKey: for a task whose input or target the batch lacks.
        """
        batch, resting = self._without_resting(batch)

        def look(model: SplitModel) -> Result:
            with torch.enable_grad():
                passes = Passes(model, self.tasks, batch, dict(self.shapers.items()))
            ambient = _ambient(passes)
            with torch.autocast(ambient.device, enabled=False), torch.no_grad():
                # Of a memory of its own, since what is in the step's is handed out once.
                recall = Memory(model, self.tasks, {}).recall(passes, ambient)
                return read(Signals(self.tasks, passes, self.iteration, self.epoch, recall, resting=resting))

        with functorch_config.patch(donated_buffer=False), unnoticed(self.shapers):
            return aside(self.model, look)

    def _without_resting(self, batch: Batch) -> tuple[Batch, Collection[str]]:
        """The batch without labels of the tasks that the augment has switched off, and these tasks."""
        resting = () if self.augment is None else self.augment.resting(self.iteration, self.epoch)
        return (replace(batch, without={*batch.without, *resting}) if resting else batch), resting

    def _keep_trail(self, passes: Passes, ambient: torch.autocast, optimizer: torch.optim.Optimizer | None) -> None:
        if self._memory.wants_hindsight or self._memory.wants_elements:
            if optimizer is None:
                raise ValueError("a rule looks back at each step and needs step.backward(batch, optimizer=...)")
            self._memory.keep_trail(passes, ambient, optimizer)

    def get_extra_state(self) -> dict[str, Any]:
        """Iteration, epoch, what is still to be checked, and what is kept for rules that ask about the last step.

        The rest of the state is in the submodules.
        """
        pending = None if self._unchecked is None else (self._unchecked.read(), self._unchecked.iteration)
        memory = self._memory.state()
        return {"iteration": self.iteration, "epoch": self.epoch, "unchecked": pending, "memory": memory}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on counting where a saved step stopped."""
        self.iteration, self.epoch = int(state["iteration"]), int(state["epoch"])
        self._unchecked = None
        if state["unchecked"] is not None:
            flags, iteration = state["unchecked"]
            self._unchecked = _Finite(torch.tensor(flags), iteration)
        self._memory.load_state(state["memory"])

    def _by_name(self, values: Tensor) -> dict[str, Tensor]:
        return {task.name: value for task, value in zip(self.tasks, values.detach().clone().unbind(), strict=True)}

    def _check_finite(self, losses: Tensor) -> None:
        pending: _Finite | None = _Finite(losses.isfinite(), self.iteration)
        if self.check == "deferred":
            pending, self._unchecked = self._unchecked, pending
        if pending is not None:
            self._raise_unless(pending)

    def _raise_unless(self, finite: _Finite) -> None:
        names = [task.name for task, fine in zip(self.tasks, finite.read(), strict=True) if not fine]
        if names:
            raise NonFiniteLoss(names, finite.iteration)

    def _weigh(self, signals: Signals) -> Weights:
        encoder = torch.ones_like(signals.losses)
        combined: Combined | None = None
        both = self.decoder is None or self.decoder is self.encoder
        signals.part = "all" if both else "shared"
        if isinstance(self.encoder, Combiner):
            combined = self._combined(self.encoder, signals)
        elif self.encoder is not None:
            encoder = self._weights_of(self.encoder, signals)
        if self.decoder is None or self.decoder is self.encoder:
            decoder = encoder
        else:
            signals.part = "specific"
            decoder = self._weights_of(self.decoder, signals)
        return Weights(encoder, decoder, combined)

    def _update_shapers(self, signals: Signals) -> None:
        signals.part = "all"
        for shaper in self.shapers.values():
            assert isinstance(shaper, Shaper)
            shaper.update(signals)

    def _weights_of(self, rule: Weighting, signals: Signals) -> Tensor:
        weights = rule(signals)
        if not isinstance(weights, Tensor):
            raise TypeError(f"{type(rule).__name__} returned a {type(weights).__name__}, expected a tensor of weights")
        weights = weights.detach()
        if weights.shape != signals.losses.shape:
            raise ValueError(
                f"{type(rule).__name__} returned weights of shape {list(weights.shape)}, expected "
                f"[{len(self.tasks)}], one for each of the tasks: {_listed(signals.tasks)}"
            )
        return weights.to(signals.losses)

    def _combined(self, rule: Combiner, signals: Signals) -> Combined:
        gradient = rule(signals).detach()
        expected = signals.gradients(rule.at).shape[1]
        if gradient.shape != (expected,):
            raise ValueError(
                f"{type(rule).__name__} returned a gradient of shape {list(gradient.shape)}, expected "
                f"[{expected}], the size of the shared {rule.at}"
            )
        return Combined(gradient, rule.at)

    def _rule_gradients(self, signals: Signals) -> dict[nn.Parameter, Tensor]:
        gradients: dict[nn.Parameter, Tensor] = {}
        for rule in self._trained():
            parameters = [p for p in rule.parameters() if p.requires_grad]
            with torch.enable_grad():
                objective = rule.objective(signals)
            if objective is not None and parameters:
                found = torch.autograd.grad(objective, parameters, allow_unused=True)
                gradients |= {p: g for p, g in zip(parameters, found, strict=True) if g is not None}
        return gradients
