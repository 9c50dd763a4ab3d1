import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from sidetask_bench import Experiment, ExperimentError, evaluate, load_run, runtime, train
from sidetask_bench.assemble import make_dataset, make_step
from sidetask_bench.progress import ConsoleDisplay, describe
from sidetask_bench.storage import StepLog
from sidetask_bench.trainer import Trainer
from sidetask_core import Batch, NonFiniteLoss, Report, Step

pytestmark = pytest.mark.thorough

CPU = torch.device("cpu")
Loader = Callable[..., Experiment]

# Runs the command line of its arguments in one child after the other, each killed at its point of the run. Children
# are forked after the imports, which take longer than the runs.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch, sidetask_datasets
from sidetask_bench import storage
from sidetask_bench.cli import app
from sidetask_core import Step

points, folder, *arguments = sys.argv[1:]

def kill_in(owner, name, count, before_dying=lambda *args: None):
    original = getattr(owner, name)
    def patched(*args, **kwargs):
        nonlocal count
        count -= 1
        if count == 0:
            before_dying(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, patched)

def write_half(data, file):
    file.write(b"PK half a checkpoint")
    file.flush()

for point in points.split():
    place, count = point.split(":")
    child = os.fork()
    if child == 0:
        if place == "backward":
            kill_in(Step, "backward", int(count))
        elif place == "checkpoint":
            kill_in(torch, "save", int(count), write_half)
        elif place == "metrics":
            kill_in(storage, "write_tensors", int(count))
        app(["train", *arguments, "--folder", folder], prog_name="sidetask")
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
    assert not (Path(folder) / "result.json").exists()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_again_and_again_ends_as_if_it_had_not(
    load: Loader, tiny: Callable[..., Path], tmp_path: Path, python: Any, outcome: Any
) -> None:
    changes = ["method=rlw", "training.checkpoint_every=4"]
    train(load(*changes).run(None, 3), tmp_path / "whole")
    # Before any checkpoint; two steps after one; while one is half written; after metrics.jsonl, before a checkpoint.
    points = "backward:3 backward:7 checkpoint:2 metrics:3"
    sets = [word for change in changes for word in ("--set", change)]
    done = python("-c", KILLED, points, str(tmp_path / "killed"), str(tiny()), "--seed", "3", *sets)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "killed" / "weights.jsonl").read_text().splitlines()
    assert 0 < len(lines) < 18
    train(load(*changes).run(None, 3), tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes",
    [
        ["method=uncertainty", "training.optimizer={name: adam, lr: 0.01}"],
        ["method=dwa", "training.schedule={name: poly, per: step, warmup: 0.5}"],
        ["method=graddrop", "training.clip=0.5", "training.accumulate=2"],
        ["method={encoder: pcgrad}", "training.precision=bfloat16"],
        ["network.cut=0", "training.optimizer=adamw", "training.select=last"],
        ["network.cut=0"],
    ],
    ids=lambda changes: changes[0],
)
def test_an_interrupted_run_ends_as_if_it_had_not(
    load: Loader, tmp_path: Path, outcome: Any, monkeypatch: pytest.MonkeyPatch, changes: list[str]
) -> None:
    config = load("training.checkpoint_every=2", *changes).run(None, 1)
    train(config, tmp_path / "whole")
    backward, left = Step.backward, 9

    def interrupted(step: Step, batch: Batch, **kwargs: Any) -> Report:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return backward(step, batch, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "resumed")
    torch.manual_seed(99)
    train(config, tmp_path / "resumed")
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "whole")


def test_a_checkpoint_of_other_packages_is_refused_and_loses_nothing(load: Loader, tmp_path: Path) -> None:
    config = load("training.epochs=2").run(None, 0)
    train(config, tmp_path / "run")
    path = tmp_path / "run/checkpoint.pt"
    (tmp_path / "run/result.json").unlink()
    record = torch.load(path, weights_only=True)
    record["trainer"]["step"].popitem()
    torch.save(record, path)
    with (tmp_path / "run/weights.jsonl").open("ab") as file:
        file.write(b'{"step": 99}\n')  # of steps after the checkpoint
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("metrics.jsonl", "weights.jsonl")}
    with pytest.raises(ExperimentError, match=r"checkpoint\.pt does not fit the installed packages.*--overwrite"):
        train(config, tmp_path / "run")
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


def test_rows_of_one_seed_start_alike_and_see_the_same_data(load: Loader) -> None:
    def first_losses(seed: int, *changes: str) -> list[dict[str, float]]:
        experiment = load(*changes)
        trainer = Trainer(experiment.run(None, seed), make_dataset(experiment.dataset), CPU)
        inputs: list[torch.Tensor] = []
        trainer.step.model.shared.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        values = next(trainer.steps())
        return [{name: loss.item() for name, loss in values["losses"].items()}, {"seen": inputs[0].sum().item()}]

    base = first_losses(0)
    for changes in (["network.cut=0"], ["network.cut=1"], ["method=pcgrad"], ["method=uncertainty"]):
        for expected, found in zip(base, first_losses(0, *changes), strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
    assert first_losses(1) != base


def test_random_rules_differ_between_seeds(load: Loader) -> None:
    experiment = load("method=rlw")
    data = make_dataset(experiment.dataset)
    drawn = [
        [{k: v.item() for k, v in values["encoder"].items()} for values in Trainer(config, data, CPU).steps()]
        for config in (experiment.run(None, seed) for seed in (0, 0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_accumulation_averages_gradients(load: Loader) -> None:
    experiment = load("training.accumulate=2")
    trainer = Trainer(experiment.run(None, 0), make_dataset(experiment.dataset), CPU)
    assert trainer.steps_per_epoch == 3
    reference = make_step(experiment.run(None, 0), make_dataset(experiment.dataset))
    reference.train()
    batches = trainer.data.batches(8, seed=0, epoch=0)
    reports = [reference.backward(next(batches)) for _ in range(2)]
    values = next(trainer.steps())
    for name, loss in values["losses"].items():
        assert loss.item() == pytest.approx(sum(report.losses[name].item() for report in reports) / 2)
    expected = [parameter.grad / 2 for parameter in reference.parameters() if parameter.grad is not None]
    found = [parameter.grad for parameter in trainer.step.parameters() if parameter.grad is not None]
    torch.testing.assert_close(found, expected)


def test_clipping_bounds_the_gradient(load: Loader) -> None:
    experiment = load("training.clip=0.001")
    trainer = Trainer(experiment.run(None, 0), make_dataset(experiment.dataset), CPU)
    next(trainer.steps())
    gradients = [parameter.grad for parameter in trainer.step.model.parameters() if parameter.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_close_to_float32(load: Loader, precision: str) -> None:
    losses = {}
    for name in ("float32", precision):
        experiment = load(f"training.precision={name}", "method=pcgrad")
        trainer = Trainer(experiment.run(None, 0), make_dataset(experiment.dataset), CPU)
        losses[name] = [value.item() for values in trainer.steps() for value in values["losses"].values()]
    assert losses[precision] == pytest.approx(losses["float32"], rel=0.05)
    assert losses[precision] != losses["float32"]


def test_the_log_does_not_wait_for_the_device(tmp_path: Path) -> None:
    """A meta tensor has no value: whatever would read one raises."""
    log = StepLog(None)  # type: ignore[arg-type]
    for step in range(3):
        log.add({"step": step}, {"losses": {"a": torch.zeros((), device="meta")}, "encoder": {}})
    with pytest.raises((NotImplementedError, RuntimeError)):
        log.flush()


def test_a_terminal_shows_losses_and_weights_while_training(load: Loader, tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system=None)
    train(load("method=rlw").run(None, 0), tmp_path / "run", display=ConsoleDisplay(console))
    last = json.loads((tmp_path / "run" / "weights.jsonl").read_text().splitlines()[-1])
    for words in ("base/seed0", "epoch 3/3", "18/18", describe(last)):
        assert words in out.getvalue()
    quiet = io.StringIO()
    train(load().run(None, 1), tmp_path / "quiet", display=ConsoleDisplay(Console(file=quiet)))
    assert quiet.getvalue().count("\n") == 1


def test_a_finished_run_is_not_run_again(load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("training.epochs=1").run("equal", 0)
    result = train(config, tmp_path / "run")
    monkeypatch.setattr(Trainer, "__init__", None)
    assert train(config, tmp_path / "run") == result


def test_the_folder_of_another_configuration_is_refused_until_overwritten(load: Loader, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(load("training.epochs=1").run(None, 0), folder)
    other = load("training.epochs=2", "method=pcgrad").run(None, 0)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ExperimentError) as caught:
        train(other, folder)
    for word in ("method: equal -> pcgrad", "training.epochs: 1 -> 2", "--overwrite"):
        assert word in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    train(other, folder, overwrite=True)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((folder / "weights.jsonl").read_text().splitlines()) == 12


def test_the_best_epoch_by_validation_is_tested(load: Loader, tmp_path: Path) -> None:
    for select in ("best", "last"):
        folder = tmp_path / select
        result = train(load(f"training.select={select}", "training.epochs=4").run(None, 0), folder)
        scores = [json.loads(line)["score"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert result["epoch"] == (scores.index(max(scores)) if select == "best" else 3)
        config, data, model = load_run(folder)
        assert not model.training
        batch = data.test[range(len(data.test))]
        with torch.no_grad():
            predictions = model(batch.inputs)
        for task in data.tasks:
            right = (predictions[task.name].argmax(1) == batch.targets[task.name]).double().mean().item()
            assert result["test"][task.name]["accuracy"] == pytest.approx(right, abs=1e-6)
        assert config.training.select == select


@pytest.mark.parametrize("task", ["top_left", "bottom_right"])
def test_one_task_can_choose_the_epoch(load: Loader, tmp_path: Path, task: str) -> None:
    result = train(load(f"training.select_by=[{task}]", "training.epochs=4").run(None, 0), tmp_path / "run")
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [record["validation"][task]["accuracy"] for record in epochs]
    assert result["epoch"] == found.index(max(found))
    assert [record["score"] for record in epochs] == pytest.approx([math.log(max(value, 1e-6)) for value in found])


def test_tasks_that_share_nothing_are_tested_at_their_own_best_epochs(load: Loader, tmp_path: Path) -> None:
    result = train(load("network.cut=0", "training.epochs=4").run(None, 0), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for task, epoch in result["epoch"].items():
        values = [line["validation"][task]["accuracy"] for line in lines]
        assert epoch == values.index(max(values))
    config, dataset, model = load_run(tmp_path / "run")
    assert set(result["epoch"]) == set(result["score"]) == {task.name for task in dataset.tasks}
    validation = evaluate(model, dataset.tasks, dataset.validation, config.training.batch_size)
    for task, epoch in result["epoch"].items():
        assert validation[task] == lines[epoch]["validation"][task]


def test_a_diverging_run_names_task_and_iteration(load: Loader, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"top_left.*at iteration 1"):
        train(load("training.optimizer.lr=1e30").run(None, 0), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("dataset.trian=3", ["dataset.trian", "did you mean 'train'"]),
        ("dataset.name=digit", ["dataset 'digit'", "digits"]),
        ("dataset.train=0", ["dataset 'digits'", "train"]),
        ("network.width=3", ["network.width", "did you mean 'widths'"]),
        ("network.cut=9", ["network 'small'", "cut"]),
        ("method=pcgrade", ["method 'pcgrade'", "pcgrad"]),
        ("method={name: pcgrad, no_such: 1}", ["method", "no_such"]),
        ("training.batch_size=49", ["training.batch_size", "48"]),
        ("training.accumulate=7", ["training.batch_size", "7 x 8", "48"]),
        ("training.device=abacus", ["training.device", "abacus"]),
    ],
)
def test_what_does_not_exist_is_one_clear_error(load: Loader, tmp_path: Path, change: str, words: list[str]) -> None:
    with pytest.raises(ExperimentError) as caught:
        train(load(change).run(None, 0), tmp_path / "run")
    for word in words:
        assert word in str(caught.value)


def test_a_run_that_could_not_begin_does_not_keep_its_folder(load: Loader, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="cut"):
        train(load("network.cut=9").run(None, 0), tmp_path / "run")
    assert train(load("training.epochs=1").run(None, 0), tmp_path / "run")["steps"] == 6


def test_load_run_needs_a_trained_network(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="no trained network"):
        load_run(tmp_path)


def test_random_state_is_that_of_every_global_generator() -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [torch.rand(1).item(), random.random(), float(np.random.rand())]  # noqa: NPY002

    state = runtime.random_state(CPU)
    first = draw()
    assert draw() != first
    runtime.set_random_state(state, CPU)
    assert draw() == first


def test_settings_are_undone() -> None:
    from sidetask_bench import Training

    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with runtime.settings(Training(threads=2, deterministic=True, device="cpu")) as device:
        assert device == CPU
        assert torch.get_num_threads() == 2
        assert torch.are_deterministic_algorithms_enabled()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_what_a_method_adds_for_training_is_not_kept(load, tmp_path):
    """The chosen network, its test and its number of parameters are those of the network alone."""
    names = ("top_left", "bottom_right")
    run = replace(load("network.cut=1").run(None, 0), method={"name": "saal-e", "transfers": "all"})
    with_copies = train(run, tmp_path / "with")
    without = train(replace(run, method="equal"), tmp_path / "without")
    assert with_copies["parameters"] == without["parameters"]
    config, _, model = load_run(tmp_path / "with")
    assert config.method["name"] == "saal-e"
    assert tuple(model.heads) == names
    best = torch.load(tmp_path / "with/best.pt", weights_only=True)["model"]
    assert list(best) == list(torch.load(tmp_path / "without/best.pt", weights_only=True)["model"])
    trained = torch.load(tmp_path / "with/checkpoint.pt", weights_only=True)["trainer"]["step"]
    assert any("bottom_right→top_left" in key for key in trained)


def test_an_auxiliary_task_of_the_data_is_judged_but_not_counted(load, tmp_path):
    result = train(load("dataset.primary=[top_left]").run(None, 0), tmp_path / "one")
    both = train(load().run(None, 0), tmp_path / "both")
    assert set(result["test"]) == {"top_left", "bottom_right"}
    _, _, model = load_run(tmp_path / "one")
    head = sum(p.numel() for p in model.heads["bottom_right"].parameters())
    assert result["parameters"] == both["parameters"] - head


def test_the_last_epochs_are_averaged_also_over_a_kill(
    load: Loader, tiny: Callable[..., Path], tmp_path: Path, python: Any, outcome: Any
) -> None:
    changes = ["training.select=last", "training.average=2"]
    config = load(*changes).run(None, 0)
    result = train(config, tmp_path / "whole")
    data = make_dataset(config.dataset)
    alone = []
    for epochs in (2, 3):
        trainer = Trainer(config, data, CPU)
        for _ in range(epochs):
            list(trainer.steps())
            trainer.end_epoch()
        alone.append(evaluate(trainer.step.model, data.tasks, data.test, 8))
    for task, metrics in result["test"].items():
        for name, value in metrics.items():
            assert value == pytest.approx((alone[0][task][name] + alone[1][task][name]) / 2, abs=1e-12)
    # The second epoch is evaluated, and then the run dies in its third.
    sets = [word for change in changes for word in ("--set", change)]
    done = python("-c", KILLED, "backward:14", str(tmp_path / "killed"), str(tiny()), *sets)
    assert done.returncode == 0, done.stderr
    train(config, tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
