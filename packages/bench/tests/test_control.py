"""Weights that learn on a network which stands still."""

import json

import pytest
import torch
from sidetask_bench import ExperimentError, load_experiment, train
from sidetask_bench.assemble import make_dataset
from sidetask_bench.cli import app
from sidetask_bench.control import Still, control
from sidetask_bench.run import load_run
from typer.testing import CliRunner

ROWS = (
    "rows={equal: {}, narrow: {network: {widths: [4, 8]}}, weighed: {method: {name: classwise, main: depth, "
    "auxiliary: segmentation, classes: 17, lr: 0.1, warmup: 1}}}"
)


@pytest.fixture
def experiment():
    options = {"train": 16, "validation": 4, "test": 4, "size": [16, 16]}
    assignments = [f"dataset.{key}={value}" for key, value in options.items()]
    assignments += ["training.epochs=3", "training.batch_size=4", "network.widths=[4, 4]", "seeds=[0, 1]", ROWS]
    return load_experiment("scenes-classwise", [*assignments, "baseline=equal"])


def test_the_network_stands_still_and_the_weights_do_not(experiment, tmp_path):
    for seed in (0, 1):
        train(experiment.run("equal", seed), tmp_path / "equal" / f"seed{seed}")
    result = control(experiment, tmp_path, row="weighed", of="equal")
    assert json.loads((tmp_path / "control-weighed.json").read_text()) == result
    # By hand: the trained network, its losses in the order of training, and no step of the optimizer.
    _, dataset, network = load_run(tmp_path / "equal" / "seed1")
    trainer = Still(experiment.run("weighed", 1), dataset, torch.device("cpu"))
    trainer.step.model.load_state_dict(network.state_dict())
    before = [p.clone() for p in trainer.step.model.parameters()]
    for _ in range(3):
        assert len(list(trainer.steps())) == 4
        trainer.end_epoch()
    for was, parameter in zip(before, trainer.step.model.parameters(), strict=True):
        assert torch.equal(was, parameter)
    found = {name: values[1] for name, values in result["weights"]["segmentation"].items()}
    assert found == trainer.named_weights()["segmentation"]
    assert any(abs(weight - 1) > 0.1 for weight in found.values())
    shown = CliRunner().invoke(app, ["control", "--help"])
    assert shown.exit_code == 0


def test_what_cannot_be_controlled_is_said(experiment, tmp_path):
    with pytest.raises(ExperimentError, match="has no trained network"):
        control(experiment, tmp_path, row="weighed", of="equal", seeds=[0])
    with pytest.raises(ExperimentError, match=r"rows\.equal\.method: 'equal' has no shapers that name their weights"):
        control(experiment, tmp_path, row="equal", of="equal", seeds=[0])
    train(experiment.run("narrow", 0), tmp_path / "narrow" / "seed0")
    with pytest.raises(ExperimentError, match="its network is not that of the row 'weighed'"):
        control(experiment, tmp_path, row="weighed", of="narrow", seeds=[0])


def test_quantiles_are_fitted_on_the_training_labels(experiment):
    """From YAML, and the other way round: bins that hold equally many pixels of the training split's depth."""
    from sidetask_bench.assemble import make_step

    method = "{name: classwise, main: segmentation, auxiliary: depth, classes: {by: quantile, bins: 4}}"
    loaded = load_experiment("scenes", ["dataset.train=16", "dataset.size=[16, 16]", f"method={method}"])
    dataset = make_dataset(loaded.dataset)
    shaper = make_step(loaded.run(None, 0), dataset).shapers["depth"]
    task = next(task for task in dataset.tasks if task.name == "depth")
    depth = torch.cat([b.target_of(task) for b in dataset.train.batches(4, shuffle=False, augment=False)])
    counts = torch.bucketize(depth[task.valid(depth)].double(), shaper.edges, right=True).bincount()
    assert len(counts) == len(shaper.weights) == 4
    assert (counts / counts.sum() - 0.25).abs().max() < 0.01
