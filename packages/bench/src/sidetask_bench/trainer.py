"""The training loop: one run in memory, which can say its whole state and take it back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from sidetask_core import Batch, Report, Shaper, parallel
from torch import Tensor

from sidetask_bench import runtime
from sidetask_bench.assemble import make_step
from sidetask_bench.config import Gradients, RunConfig
from sidetask_bench.conflict import Values, conflict
from sidetask_bench.optimization import learning_rate_factor, make_optimizer
from sidetask_bench.schema import ExperimentError

if TYPE_CHECKING:
    from sidetask_datasets import Dataset

_PROBE_SEED = 1_000_003


class Trainer:
    """Trains the model of one run, a step at a time.

    The order of the data depends on the seed and the epoch alone, and the learning rate on the position, so that
    runs which differ in their method see the same batches at the same rates.

    Args:
        config: the run.
        dataset: its data, on `device`.
        device: where to compute.

    Attributes:
        step: the `sidetask_core.Step`; `step.model` is the network.
        epoch: the epoch the next step belongs to; `position` optimizer steps of it are done, `total` in all.

    Raises:
        ExperimentError: if the data do not fill one (accumulated) step, or the processes cannot share a batch.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, device: torch.device) -> None:
        self.config, self.training, self.data, self.device = config, config.training, dataset.train, device
        self.probes = dataset.train if config.training.lookahead == "train" else dataset.validation
        self.next_probe: tuple[int, Iterator[Batch]] | None = None
        self.step = make_step(config, dataset).to(device)
        parallel.broadcast(self.step)
        self.optimizer = make_optimizer(
            self.training.optimizer, self.step.model.parameters(), self.step.rule_parameters()
        )
        half = self.training.precision == "float16"
        self.scaler = torch.amp.GradScaler(device.type) if half else None
        self.sampling = self._sampling()
        self.epoch = self.position = self.total = 0
        self.loss_sums: dict[str, Tensor] = {}
        size, accumulate, samples = self.training.batch_size, self.training.accumulate, len(self.data)
        if size % parallel.world():
            raise ExperimentError(f"training.batch_size: {parallel.world()} processes cannot share {size} equally")
        if samples < size * accumulate:
            raise ExperimentError(
                f"training.batch_size: a step takes {accumulate} x {size} samples, but there are {samples} to train on"
            )
        self.steps_per_epoch = self.data.count(size) // accumulate
        # What the network draws while it trains (dropout) differs between processes, unlike its initial weights.
        torch.manual_seed(config.seed + parallel.rank())

    def steps(self) -> Iterator[Values]:
        """Take the rest of the epoch's optimizer steps; gives losses and weights after each, on the device.

        When it ends, `epoch` is still this one; `end_epoch` goes on to the next.
        """
        training = self.training
        batches = self.data.batches(
            training.batch_size,
            seed=self.config.seed,
            epoch=self.epoch,
            rank=parallel.rank(),
            world=parallel.world(),
            start=self.position * training.accumulate,
        )
        self.step.epoch = self.epoch
        self.step.train()
        for _ in range(self.position, self.steps_per_epoch):
            self._set_learning_rate()
            self.optimizer.zero_grad(set_to_none=True)
            first = self.total * training.accumulate
            batch = next(batches)
            compared = self._compare_gradients(batch)
            reports = [self._backward(next(batches) if i else batch, first + i) for i in range(training.accumulate)]
            self._update()
            self.position += 1
            self.total += 1
            values = _mean_values(reports)
            for name, loss in values["losses"].items():
                self.loss_sums[name] = self.loss_sums.get(name, 0) + loss
            yield values | compared | self._coefficients()

    def end_epoch(self) -> dict[str, float]:
        """Close the epoch: its mean loss over the steps, by task."""
        means = {name: float(total) / self.position for name, total in self.loss_sums.items()}
        self.epoch, self.position, self.loss_sums = self.epoch + 1, 0, {}
        return means

    def named_weights(self) -> dict[str, dict[str, float]]:
        """What the shapers of tasks name of their weights now, by task; tasks without any are left out."""
        found = {n: shaper.named_weights() for n, shaper in self.step.shapers.items() if isinstance(shaper, Shaper)}
        return {name: {key: float(w) for key, w in weights.items()} for name, weights in found.items() if weights}

    def _coefficients(self) -> Values:
        """What the rules name besides the weights they give, by slot; one that fills both is the encoder's."""
        slots = {"encoder": self.step.encoder, "decoder": self.step.decoder}
        if self.step.decoder is self.step.encoder:
            del slots["decoder"]
        found = {slot: rule.named_weights() for slot, rule in slots.items() if rule is not None}
        # Copies, for a rule goes on with its own before they are written.
        return {
            f"{slot}_coefficients": {k: w.detach().clone() for k, w in of.items()} for slot, of in found.items() if of
        }

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        factor = learning_rate_factor(
            self.training.schedule, self.epoch, self.position, self.steps_per_epoch, self.training.epochs
        )
        return self.training.optimizer.lr * factor

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on. Every process must call it."""
        return {
            "step": self.step.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "epoch": self.epoch,
            "position": self.position,
            "total": self.total,
            "loss_sums": self.loss_sums,
            "random": runtime.random_state(self.device),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a state; the steps that follow are the ones that would have followed then, bit for bit.

        But for methods that look back at their last step (`Signals.hindsight`, `Signals.progress`) under several
        processes: of those, what was kept is one process's alone, so that the first step after a resume has nothing.
        """
        self.step.load_state_dict(state["step"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.position, self.total = state["epoch"], state["position"], state["total"]
        self.loss_sums = {name: total.to(self.device) for name, total in state["loss_sums"].items()}
        runtime.set_random_state(state["random"], self.device)

    def _set_learning_rate(self) -> None:
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _sampling(self) -> Gradients | None:
        """How to compare gradients; None also where tasks share nothing that is trained."""
        sampling, model = self.training.gradients, self.step.model
        inputs = {task.name: task.input for task in self.step.tasks}
        if sampling is not None and sampling.at == "features" and len({*inputs.values()}) > 1:
            raise ExperimentError(
                f"training.gradients.at: tasks with different inputs share no features ({inputs}); take parameters"
            )
        return sampling if any(p.requires_grad for p in model.shared_parameters()) else None

    def _compare_gradients(self, batch: Batch) -> Values:
        """The conflict of the tasks' gradients on the step's first batch, at the steps that are sampled."""
        sampling = self.sampling
        if sampling is None or self.total % sampling.every:
            return {}
        # Gradients in float16 would need the scaler's care; at a few steps, float32 is cheaper.
        with self._autocast() if self.scaler is None else contextlib.nullcontext():
            return self.step.inspect(
                batch, lambda signals: conflict(signals.tasks, signals.gramian(sampling.at), signals.labelled)
            )

    def _autocast(self) -> torch.autocast:
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.training.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _backward(self, batch: Any, index: int) -> Report:
        validation = functools.partial(self._probe, index)
        with self._autocast():
            return self.step.backward(batch, validation=validation, optimizer=self.optimizer, scaler=self.scaler)

    def _probe(self, index: int) -> Batch:
        """The batch that the step of this number looks ahead at."""
        world = parallel.world()
        # A split that is smaller than a batch gives what the processes can share.
        size = min(self.training.batch_size, len(self.probes) // world * world)
        epoch, start = divmod(index, self.probes.count(size))
        if self.next_probe is None or self.next_probe[0] != index or start == 0:
            # An order of its own, or training batches would meet themselves.
            seed = self.config.seed + _PROBE_SEED
            batches = self.probes.batches(size, seed=seed, epoch=epoch, rank=parallel.rank(), world=world, start=start)
        else:
            batches = self.next_probe[1]
        self.next_probe = (index + 1, batches)
        return next(batches)

    def _update(self) -> None:
        if self.training.accumulate > 1:
            for parameter in self.step.parameters():
                if parameter.grad is not None:
                    parameter.grad /= self.training.accumulate
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if self.training.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.step.model.parameters(), self.training.clip)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()


def _mean_values(reports: list[Report]) -> Values:
    groups = [
        {"losses": r.losses, "encoder": r.encoder_weights, "decoder": r.decoder_weights, "norms": r.gradient_norms}
        for r in reports
    ]
    if len(groups) == 1:
        return groups[0]
    return {
        group: {name: torch.stack([g[group][name] for g in groups]).mean() for name in items}
        for group, items in groups[0].items()
    }
