"""A run and its folder: train with checkpoints, go on after a kill, test the chosen epoch, load the result again.

A run's folder holds

- ``config.yaml``: what is run;
- ``metrics.jsonl``: per epoch the mean training losses, validation metrics and score, learning rate, seconds, and
  the weights that shapers name, such as those of classes;
- ``weights.jsonl``: per step the losses, the weights above (encoder) and below (decoder) the cut, and the norms of the
  gradients at it, if the method reads them; the coefficients that rules name, such as those of which weights are
  shares; at some steps, how far the tasks' gradients disagree, if that is asked for;
- ``checkpoint.pt``: everything the next step depends on; ``best.pt``: the network of the chosen epoch, without the
  heads that a method added for training;
- ``status.json``: where it is, at most half a second ago, for who watches;
- ``result.json``: the test metrics, written last: a run that has it is finished.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sidetask_core import SplitModel, parallel

from sidetask_bench import breakdown, runtime, storage
from sidetask_bench.assemble import make_dataset, make_model
from sidetask_bench.config import RunConfig, changed_keys, load_run_config
from sidetask_bench.document import dump
from sidetask_bench.evaluate import evaluate, mean_results, score
from sidetask_bench.progress import Display
from sidetask_bench.schema import ExperimentError, plain
from sidetask_bench.selection import Selection, judges
from sidetask_bench.trainer import Trainer

if TYPE_CHECKING:
    from sidetask_datasets import Dataset

_FILES = ("config.yaml", "metrics.jsonl", "weights.jsonl", "checkpoint.pt", "best.pt", "status.json", "result.json")
_FORMAT = 2
_FLUSH_SECONDS = 0.5


def train(
    config: RunConfig,
    folder: str | Path,
    *,
    dataset: Dataset | None = None,
    overwrite: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Train one run in a folder, or go on with it, and give its result.

    A finished run is not run again. An interrupted one goes on from its checkpoint, and ends in the same parameters,
    ``metrics.jsonl`` (but for seconds) and ``weights.jsonl`` as if it had never stopped: bit for bit on the CPU, and
    on CUDA with ``training.deterministic``. Under ``torchrun`` every process calls this; process 0 writes.

    Args:
        config: what to run.
        folder: where; created if needed.
        dataset: the data of ``config.dataset``, if the caller has them already.
        overwrite: start again, even if there is a finished run or one of another configuration.
        display: shows progress; nothing by default.

    Returns:
        What ``result.json`` says. On other processes than 0 of ``torchrun``, an empty mapping until the run is there.

    Raises:
        ExperimentError: if the folder holds a run of another configuration (the message names what changed; another
            content of a file that the method reads is another configuration), or the configuration asks for what does
            not exist.
        NonFiniteLoss: if training diverged, naming task and iteration.
    """
    folder, display, config = Path(folder), display or Display(), config.with_files()
    main = parallel.rank() == 0
    with storage.locked(folder), runtime.settings(config.training) as device:
        if main:
            _prepare(folder, config, overwrite)
        runtime.barrier()
        if (folder / "result.json").exists():
            return read_result(folder)
        data = (dataset if dataset is not None else make_dataset(config.dataset)).to(device)
        breakdown.check(config.breakdown, data)
        with display:
            run = _Run(config, folder, data, device, display)
            if main:
                # Only what can be made is begun: a mistake must not keep the folder from what was meant.
                _claim(folder, config)
            result = run.complete()
        runtime.barrier()
        return result


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a finished run, as ``result.json`` has it: None for a metric that is undefined."""
    return json.loads((folder / "result.json").read_text("utf-8"))


def load_run(folder: str | Path, dataset: Dataset | None = None) -> tuple[RunConfig, Dataset, SplitModel]:
    """A run's configuration, data and chosen network, in evaluation mode on the CPU.

    Args:
        folder: of a run that has completed an epoch.
        dataset: its data, if the caller has them already.

    Raises:
        ExperimentError: if there is no such run.
    """
    folder = Path(folder)
    if not (folder / "best.pt").exists():
        raise ExperimentError(f"{folder} has no trained network (best.pt)")
    config = load_run_config(folder / "config.yaml")
    if dataset is None:
        dataset = make_dataset(config.dataset)
    model = make_model(config, dataset)
    model.load_state_dict(storage.read_tensors(folder / "best.pt")["model"])
    return config, dataset, model.eval()


def discard(folder: Path) -> None:
    """Remove what a run has written."""
    # The checkpoint goes before the journals it refers to: a kill in between leaves a run that starts afresh.
    for name in reversed(_FILES):
        (folder / name).unlink(missing_ok=True)


def _prepare(folder: Path, config: RunConfig, overwrite: bool) -> None:
    """Refuse to mix two runs in a folder."""
    path = folder / "config.yaml"
    if overwrite:
        discard(folder)
    elif path.exists():
        changes = changed_keys(load_run_config(path), config)
        if changes:
            raise ExperimentError(
                f"{folder} holds a run of another configuration ({'; '.join(changes)}); "
                "choose another --folder, or --overwrite it"
            )


def _claim(folder: Path, config: RunConfig) -> None:
    """Make the folder this run's."""
    path = folder / "config.yaml"
    if not path.exists():
        storage.write_text(path, dump(plain(config)))


class _Run:
    """One run on its way: the trainer, its journals, and what has been chosen so far."""

    def __init__(self, config: RunConfig, folder: Path, data: Dataset, device: torch.device, display: Display) -> None:
        self.config, self.folder, self.data, self.device, self.display = config, folder, data, device, display
        self.main = parallel.rank() == 0
        self.metrics = storage.Journal(folder / "metrics.jsonl")
        self.weights = storage.Journal(folder / "weights.jsonl")
        self.log = storage.StepLog(self.weights)
        self.trainer = Trainer(config, data, device)
        # Of what is trained, that of which there are labels to judge by.
        self.judged = self.trainer.step.model.restricted_to([task.name for task in data.tasks])
        self.judges = judges(data.tasks, config.training.select_by)
        self.selection = Selection(folder / "best.pt", self.judged, self.judges, config.training.select == "best")
        self.seconds = self.epoch_seconds = 0.0
        self.tests: list[dict[str, Any]] = []  # of the epochs before the last that are averaged
        self.name = config.label
        self._restore()

    def complete(self) -> dict[str, Any]:
        """Train to the end, test, and write the result."""
        training, trainer = self.config.training, self.trainer
        self.display.begin(self.name, trainer.total, training.epochs * trainer.steps_per_epoch)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        while trainer.epoch < training.epochs:
            self._train_epoch()
            self._close_epoch()
        result: dict[str, Any] = {}
        if self.main:
            result = self._test()
            storage.write_json(self.folder / "result.json", result)
            result = read_result(self.folder)  # what a later reader gets: null for NaN
            self.display.finished(self.name, result)
        return result

    def _train_epoch(self) -> None:
        trainer, training = self.trainer, self.config.training
        started = flushed = time.perf_counter()
        seen = trainer.total
        for values in trainer.steps():
            if not self.main:
                if training.checkpoint_every and trainer.total % training.checkpoint_every == 0:
                    trainer.state()
                continue
            self.log.add({"step": trainer.total - 1, "epoch": trainer.epoch}, values)
            now = time.perf_counter()
            if now - flushed > _FLUSH_SECONDS:
                self._show((trainer.total - seen) / (now - flushed))
                flushed, seen = now, trainer.total
            if training.checkpoint_every and trainer.total % training.checkpoint_every == 0:
                started = self._count_seconds(started)
                self._save()
        if self.main:
            now = self._count_seconds(started)
            self._show((trainer.total - seen) / max(now - flushed, 1e-9))

    def _show(self, steps_per_second: float) -> None:
        """Write the journal, and tell the display and those who watch where the run is."""
        trainer, training = self.trainer, self.config.training
        self.log.flush()
        latest = {
            **self.log.latest,
            "samples_per_second": steps_per_second * training.batch_size * training.accumulate,
            "memory_bytes": runtime.memory_bytes(self.device),
        }
        steps = training.epochs * trainer.steps_per_epoch
        status = {"step": trainer.total, "steps": steps, "epoch": trainer.epoch, "epochs": training.epochs}
        storage.write_json(self.folder / "status.json", {**status, "latest": latest}, durable=False)
        self.display.show(self.name, trainer.total, trainer.epoch, training.epochs, latest)

    def _close_epoch(self) -> None:
        trainer, training = self.trainer, self.config.training
        epoch, rate = trainer.epoch, trainer.optimizer.param_groups[0]["lr"]
        losses = trainer.end_epoch()
        if self.main:
            tasks = self.data.tasks
            validation = evaluate(self.judged, tasks, self.data.validation, self._batch_size())
            value = score(validation, self.judges)
            self.selection.offer(epoch, validation, last=epoch + 1 == training.epochs)
            record = {"epoch": epoch, "losses": losses, "validation": validation, "score": value, "lr": rate}
            if shapers := trainer.named_weights():
                record["shapers"] = shapers
            self.metrics.append({**record, "seconds": round(self.epoch_seconds, 3)})
            if training.epochs - training.average <= epoch < training.epochs - 1:
                self.tests.append(evaluate(self.judged, tasks, self.data.test, self._batch_size()))
        self.epoch_seconds = 0.0
        self._save()
        runtime.barrier()

    def _test(self) -> dict[str, Any]:
        model = self.judged
        best = storage.read_tensors(self.folder / "best.pt")
        model.load_state_dict(best["model"])
        cuda = self.device.type == "cuda"
        return {
            "test": mean_results([*self.tests, evaluate(model, self.data.tasks, self.data.test, self._batch_size())]),
            "by_class": breakdown.by_class(model, self.data, self.config.breakdown, self.data.test, self._batch_size()),
            "epoch": best["epoch"],
            "score": best["score"],
            "steps": self.trainer.total,
            "seconds": round(self.seconds, 3),
            "seconds_per_step": self.seconds / max(self.trainer.total, 1),
            "parameters": sum(parameter.numel() for parameter in self.trainer.step.export().parameters()),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else None,
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "processes": parallel.world(),
            "versions": runtime.versions(),
        }

    def _batch_size(self) -> int:
        return self.config.training.evaluation_batch_size or self.config.training.batch_size

    def _count_seconds(self, started: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds += now - started
        self.epoch_seconds += now - started
        return now

    def _save(self) -> None:
        """Write the checkpoint; it names the journals' sizes, so that lines after it are forgotten on resume."""
        state = self.trainer.state()
        if not self.main:
            return
        self.log.flush()
        record = {
            "format": _FORMAT,
            "trainer": state,
            "metrics": self.metrics.size(),
            "weights": self.weights.size(),
            "selection": self.selection.state(),
            "tests": self.tests,
            "seconds": self.seconds,
            "epoch_seconds": self.epoch_seconds,
        }
        storage.write_tensors(self.folder / "checkpoint.pt", record)

    def _restore(self) -> None:
        path = self.folder / "checkpoint.pt"
        record: dict[str, Any] = storage.read_tensors(path) if path.exists() else {"metrics": 0, "weights": 0}
        if record.get("format", _FORMAT) != _FORMAT:
            raise ExperimentError(f"{path} was written by another version of sidetask-bench; --overwrite the run")
        if "trainer" in record:
            try:
                self.trainer.load_state(record["trainer"])
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ExperimentError(
                    f"{path} does not fit the installed packages, which may be of other versions than those that wrote "
                    f"it; --overwrite the run to train it anew: {error}"
                ) from error
            self.selection.load_state(record["selection"])
            self.tests = record.get("tests", [])
            self.seconds, self.epoch_seconds = record["seconds"], record["epoch_seconds"]
        # Nothing is cut from a run that cannot go on.
        if self.main:
            self.metrics.cut(record["metrics"])
            self.weights.cut(record["weights"])
        runtime.barrier()
