"""The presets of the papers' experiments: none is dead text, at either size, and each says what the protocols say."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from sidetask_bench import Experiment, load_experiment, papers
from sidetask_bench.assemble import make_dataset
from sidetask_bench.config import Plugin
from sidetask_bench.document import dump, presets, read
from sidetask_bench.trainer import Trainer
from sidetask_core import plugins
from sidetask_datasets.celeba import ATTRIBUTES
from sidetask_datasets.rlbench import TASKS as ROBOT

pytestmark = pytest.mark.thorough

CPU = torch.device("cpu")
SMALL = [name for name in presets() if f"{name}-small" in presets()]
ALL = ["nyuv2", "cityscapes", *SMALL]
# What a full-size experiment is brought down to: images, batches and networks, never its tasks or methods.
TINY = {
    "deeplabv3": ["network.depth=18"],
    "mtan": ["network.depth=18"],
    "resnet": ["network.hidden=8"],
    "unet": ["network.widths=[4, 6, 8]"],
    "vgg16": ["network.width=2"],
    "lenet": [],
}


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the data sets' tests, which write tiny trees in the exact format."""
    folder = Path(__file__).parents[2] / "datasets" / "tests"
    package = ModuleType("tests_of_datasets")
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, "tests_of_datasets", package)
    return lambda name: importlib.import_module(f"tests_of_datasets.test_{name}")


class Trees:
    """Writes the tree of a data set, and says with which options its experiments read it."""

    def __init__(self, writers: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writers, self.root, self.monkeypatch = writers, root, monkeypatch

    def __call__(self, experiment: Experiment) -> list[str]:
        name = experiment.dataset.name
        if name == "pseudo":
            return self.pseudo(experiment)
        options = getattr(self, name)()
        return [f"dataset.root={self.root}", *(f"dataset.{option}" for option in options)]

    def nyuv2(self) -> list[str]:
        self.monkeypatch.setattr(self.writers("nyuv2"), "SIZE", (36, 48))
        self.writers("nyuv2").write_arrays(self.root)
        return ["validation=2"]

    def cityscapes(self) -> list[str]:
        module = self.writers("cityscapes")
        module.write(self.root, module.PICTURES, (36, 48))
        return ["validation=2"]

    def celeba(self) -> list[str]:
        self.writers("celeba").write_tree(self.root, "authors")
        return ["share=1.0", "size=[32, 32]"]

    def pascal_context(self) -> list[str]:
        module = self.writers("pascal_context")
        folders = "JPEGImages semseg/VOC12 human_parts normals_distill sal_distill pascal-context/trainval"
        for folder in [*folders.split(), "ImageSets/Context"]:
            (self.root / folder).mkdir(parents=True)
        for split, ids in (("train", module.TRAIN), ("val", module.VAL)):
            (self.root / "ImageSets/Context" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        for index, id_ in enumerate(module.SIZES):
            module.write_one(self.root, id_, index)
        return ["validation=1", "size=[36, 48]"]

    def virtual_kitti(self) -> list[str]:
        self.writers("virtual_kitti").write_first(self.root)
        worlds = sorted({world for world, _ in self.writers("virtual_kitti").FIRST})
        return [f"worlds={worlds}"]

    def cifar100_domains(self) -> list[str]:
        module = self.writers("cifar100_domains")
        self.monkeypatch.setattr(sys.modules["sidetask_datasets.cifar100_domains"], "COUNTS", module.COUNTS)
        generator = numpy.random.default_rng(0)
        module.write_binary(
            self.root / "cifar-100-binary", {split: module.make(split, generator) for split in module.COUNTS}
        )
        return ["validation=4"]

    def digits(self) -> list[str]:
        self.writers("digits_files").write(self.root)
        return ["train=8", "validation=4", "test=4"]

    def rlbench(self) -> list[str]:
        for number, task in enumerate(ROBOT):
            for index in range(3):
                self.writers("rlbench").write_episode(self.root / task / f"episode{index}", number, 3)
        return ["size=[32, 32]"]

    def pseudo(self, experiment: Experiment) -> list[str]:
        """Labels of a network that knows nothing, for images that are there."""
        from sidetask_bench import label, train

        if experiment.dataset.options["of"]["name"] == "scenes":
            of = "dataset.of={name: scenes, size: [24, 32], train: 6, validation: 3, test: 3, tasks: [normals]}"
        else:
            self.nyuv2()
            of = f"dataset.of={{name: nyuv2, root: {self.root}, validation: 2, tasks: [normals]}}"
        changed = load_experiment(experiment.name, [of])
        run = self.root / "teacher"
        size = make_dataset(Plugin.from_plain(changed.dataset.options["of"], "of")).input_shape[-2:]
        teacher = load_experiment(
            "scenes-teacher",
            [
                f"dataset={{name: scenes, size: {list(size)}, train: 4, validation: 2, test: 2}}",
                "dataset.tasks=[segmentation]",
                "network={name: small, widths: [4, 8], head_width: 4}",
                "training.epochs=1",
                "training.batch_size=4",
            ],
        )
        train(teacher.run("teacher", 0), run)
        labels = {}
        for name in experiment.dataset.options["labels"]:
            labels[name] = str(self.root / "labels" / name)
            kind = "tokens" if name == "patches" else "segmentation"
            label(run, labels[name], task="segmentation", of=changed.dataset, kind=kind, patch=4)
        return [of, f"dataset.labels={dump(labels)}"]


@pytest.fixture
def trees(writers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trees:
    return Trees(writers, tmp_path, monkeypatch)


def one_step(experiment: Experiment, row: str | None, dataset: Any) -> None:
    """A row's first step on its own data: it moves its network, and every loss is a number."""
    trainer = Trainer(experiment.run(row, experiment.seeds[0]), dataset, CPU)
    before = [p.clone() for p in trainer.step.model.parameters()]
    values = next(trainer.steps())
    assert all(bool(loss.isfinite()) for loss in values["losses"].values())
    assert any(not torch.equal(p, q) for p, q in zip(before, trainer.step.model.parameters(), strict=True))


def methods(experiment: Experiment) -> list[str | None]:
    """One row of each method, but for those that read a file that another command makes."""
    rows: dict[str, str | None] = {}
    for row in experiment.rows:
        method = experiment.run(row, 0).method
        name = dump({**method, "preference": None}) if isinstance(method, dict) else method
        if "relations" not in name:
            rows.setdefault(name, row)
    return list(rows.values()) or [None]


@pytest.mark.parametrize("name", ALL)
def test_a_full_size_preset_takes_a_step_on_its_own_files(name: str, trees: Trees) -> None:
    whole = load_experiment(name)
    changes = [*trees(whole), *TINY[whole.network.name], "training.batch_size=2"]
    if name == "ial-pascal":
        changes.append("rows.single.training.batch_size=2")
    experiment = load_experiment(name, changes)
    dataset = make_dataset(experiment.dataset)
    assert list(experiment.rows) == list(whole.rows)
    one_step(experiment, None, dataset)
    for row in methods(experiment):
        plugins.make_method(experiment.run(row, 0).method, dataset.tasks)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_preset_takes_a_step_of_every_method(name: str, trees: Trees) -> None:
    small = load_experiment(f"{name}-small")
    changes = []
    if small.dataset.name == "pseudo":
        changes = trees.pseudo(small)
    elif small.dataset.name == "scenes":
        changes = ["dataset.size=[24, 32]", "dataset.train=8", "dataset.validation=4", "dataset.test=2"]
    elif small.dataset.name == "reaching":
        changes = ["dataset.train=1", "dataset.validation=1", "dataset.test=1"]
    else:
        changes = ["dataset.train=8", "dataset.validation=8", "dataset.test=8"]
    if small.network.name == "small" or small.network.name == "unet":
        changes += ["network.widths=[4, 4, 4]"]
    changes += ["training.batch_size=4"]
    experiment = load_experiment(f"{name}-small", changes)
    dataset = make_dataset(experiment.dataset)
    rows = methods(experiment)
    for row in rows if experiment.network.name != "mtan" else rows[:1]:
        one_step(experiment, row, dataset)


@pytest.mark.parametrize("name", SMALL)
def test_both_sizes_have_the_same_rows_and_the_paper(name: str) -> None:
    sizes = papers.sizes(name)
    full, small = sizes.full, sizes.small
    assert list(full.rows) == list(small.rows)
    assert full.paper == small.paper
    assert (full.baseline, full.improvement) == (small.baseline, small.improvement)
    assert full.fronts == small.fronts
    for row in full.rows:
        one, other = (experiment.run(row, 0).method for experiment in (full, small))
        assert _name(one) == _name(other), row
    # It needs no files.
    assert "root" not in dump(small.dataset.to_plain())
    assert list(small.teachers) == list(small.dataset.options.get("labels", ()))
    assert small.training.threads == 1


def _name(method: Any) -> Any:
    return method if isinstance(method, str) else method.get("name", sorted(method))


NYUV2 = {"epochs": 200, "batch_size": 4, "select": "best"}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False}
COSINE = {"name": "cosine", "per": "epoch", "final": 0.0, "warmup": 0.0}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            [name for name in SMALL if "nyuv2" in name or "cityscapes" in name],
            {**NYUV2, "optimizer": SGD, "schedule": COSINE},
        ),
        (["autolambda-cifar100"], {"epochs": 200, "batch_size": 32, "optimizer": {**SGD, "weight_decay": 5e-4}}),
        (["saal-celeba"], {"epochs": 25, "batch_size": 512, "schedule": COSINE}),
        (["ial-pascal"], {"epochs": 100, "batch_size": 6}),
        (["pareto-digits"], {"epochs": 100, "batch_size": 256, "select": "last"}),
        (["nash-nyuv2"], {"epochs": 200, "batch_size": 2, "select": "last", "average": 10}),
    ],
)
def test_training_is_that_of_the_protocols(names: list[str], expected: dict[str, Any]) -> None:
    from sidetask_bench.schema import plain

    for name in names:
        if expected.get("optimizer") == SGD and name.startswith(("classwise", "nash")):
            continue
        training = plain(load_experiment(name).training)
        assert {key: training[key] for key in expected} == expected, name


@pytest.mark.parametrize("name", [name for full in SMALL if "classwise" in full for name in (full, f"{full}-small")])
def test_epochs_of_class_wise_rows_are_chosen_by_the_task_they_are_for(name: str) -> None:
    experiment = load_experiment(name)
    chosen = {}
    for row in experiment.rows:
        config = experiment.run(row, 0)
        by, method = config.training.select_by, config.method
        if isinstance(method, dict) and method["name"] == "classwise":
            assert by == (method["main"],), row
        chosen[row] = by
    first, second = (str(task) for task in experiment.dataset.options["tasks"])
    assert (chosen["equal-for-depth"], chosen["equal-for-segmentation"]) == ((first,), (second,))
    assert chosen["single"] is chosen["pareto-0"] is None


def test_seeds_and_attributes_are_those_of_the_papers() -> None:
    seeds = {"saal": 3, "autolambda": 3, "ial": 5}
    for name in SMALL:
        if (paper := name.split("-")[0]) in seeds:
            assert len(load_experiment(name).seeds) == seeds[paper], name
    experiment = load_experiment("saal-celeba-small")
    assert len(experiment.dataset.options["tasks"]) == len(ATTRIBUTES[:9]) == 9


def test_figures_are_of_rows_and_no_table_repeats_itself() -> None:
    saal = load_experiment("saal-nyuv2").paper
    assert saal is not None
    assert {row: span.low for row, span in saal.improvement.items()} == {
        "half-shared": 6.4,
        "saal-e": 10.1,
        "saal-ew": 12.1,
    }
    assert (saal.time["saal-w"].low, saal.time["saal-w"].high) == (6.6, 8.3)
    assert all("extends" in read_text(f"{name}-small") for name in SMALL)


def read_text(name: str) -> str:
    return presets()[name]


def test_presets_are_found_by_their_names() -> None:
    for name in presets():
        assert read(name)["name"] == name
