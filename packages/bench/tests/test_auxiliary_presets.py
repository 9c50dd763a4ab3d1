"""The experiments of auxiliary learning: every ablation of the paper runs by configuration."""

from typing import Any

import pytest
import torch
from sidetask_bench import Experiment, load_experiment
from sidetask_bench.assemble import make_dataset, make_step
from sidetask_bench.document import dump

pytestmark = pytest.mark.thorough

TINY = [
    "dataset.size=[16, 24]",
    "dataset.train=8",
    "dataset.validation=4",
    "dataset.test=4",
    "network={name: small, widths: [4, 8], head_width: 4}",
    "training.batch_size=4",
]
FIXED = {"name": "fixed", "weights": {"segmentation": 1.0, "depth": 0.3, "normals": 0.1}}
BROKEN = {"name": "ial", "frozen": ["depth"]}
ABLATIONS = {
    "encoder: fixed": {"name": "ial", "measure": 0.5},
    "encoder: fixed by name": {"name": "ial", "measure": {"depth": 0.3, "normals": 0.1}},
    "encoder: speed": {"name": "ial", "measure": "speed"},
    "encoder: norm": {"name": "ial", "measure": "norm"},
    "encoder: cosine": {"name": "ial", "measure": "cosine"},
    "gradient norm only": {"name": "ial", "measure": 1.0},
    "uncertainty only": {"name": "ial", "align": False},
    **{f"decoders: {name}": {"encoder": "ial", "decoder": name} for name in ("equal", "gradnorm", "dwa", "rlw")},
    "decoders: fixed": {"encoder": "ial", "decoder": FIXED},
    "Auto-λ impartial": {"encoder": "autolambda", "decoder": "ial"},
    "broken head, ial": BROKEN,
    "broken head, gcs": {"augment": BROKEN, "encoder": "gcs", "decoder": "ial"},
    "broken head, equal": {"augment": BROKEN, "encoder": "equal", "decoder": "equal"},
}


def tiny(preset: str, *changes: str) -> Experiment:
    return load_experiment(preset, [*TINY, *changes])


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains(name: str) -> None:
    method: Any = ABLATIONS[name]
    config = tiny("scenes-auxiliary", f"method={dump(method)}").run("equal", 0)
    dataset = make_dataset(config.dataset)
    step = make_step(config, dataset)
    optimizer = torch.optim.Adam(step.parameters(), lr=1e-3)
    frozen = {n: p.clone() for n, p in step.model.named_parameters() if n.startswith("heads.depth")}
    for batch in dataset.train.batches(4):
        optimizer.zero_grad()
        report = step.backward(batch, validation=batch, optimizer=optimizer)
        optimizer.step()
        assert all(weight.isfinite() for weight in report.encoder_weights.values())
    moved = any(not torch.equal(step.model.get_parameter(n), p) for n, p in frozen.items())
    assert moved == ("broken" not in name)


def test_the_grid_has_every_pair_of_weights() -> None:
    experiment = tiny("scenes-grid")
    weights = [
        row.method["weights"] for name in experiment.rows if (row := experiment.run(name, 0)).row.startswith("d")
    ]
    levels = (0.1, 0.3, 1.0)
    expected = [{"segmentation": 1.0, "depth": d, "normals": n} for d in levels for n in levels]
    assert weights == expected


@pytest.mark.parametrize("preset", ["scenes-auxiliary", "frames-auxiliary"])
def test_any_task_may_be_the_primary_one(preset: str) -> None:
    for task in ("segmentation", "depth", "normals"):
        experiment = load_experiment(preset, [f"dataset.primary=[{task}]", f"name={preset}-{task}"])
        assert experiment.dataset.options["primary"] == [task]
        assert list(experiment.rows) == ["single", "equal", "uncertainty", "gcs", "ol-aux", "ial"]
        assert list(experiment.seeds) == [0, 1]
