from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sidetask_bench import Experiment, ExperimentError, load_experiment
from sidetask_bench.config import Adam, changed_keys, load_run_config
from sidetask_bench.document import dump, parse, presets
from sidetask_bench.schema import build, plain


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_valid_and_survives_being_written(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert build(Experiment, plain(experiment)) == experiment
    if experiment.rows:
        assert set(experiment.runs()) == set(experiment.rows)


def test_the_experiment_of_the_readme_is_valid() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    experiment = build(Experiment, parse(text.split("```yaml")[1].split("```")[0]))
    assert list(experiment.runs()) == ["single", "equal", "cagrad"]


def test_a_row_changes_the_base_and_nothing_else(load: Callable[..., Experiment]) -> None:
    experiment = load()
    base, single = experiment.run(None, 0), experiment.run("single", 0)
    assert changed_keys(base, single) == ["row: base -> single", "network.cut: (absent) -> 0"]


def test_a_row_with_another_optimizer_starts_from_its_defaults(load: Callable[..., Experiment]) -> None:
    experiment = load("rows.adam={training: {epochs: 5, optimizer: {name: adam, lr: 0.001}}}")
    training = experiment.run("adam", 0).training
    assert training.optimizer == Adam(lr=0.001)
    assert training.epochs == 5
    assert training.batch_size == experiment.training.batch_size


def test_a_row_replaces_the_whole_method(load: Callable[..., Experiment]) -> None:
    experiment = load("method={name: cagrad, c: 0.4}", "rows.mixed={method: {decoder: equal}}")
    assert experiment.run("mixed", 0).method == {"decoder": "equal"}


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("training.optimiser=sgd", ["training.optimiser", "did you mean 'optimizer'"]),
        ("training.optimizer.betas=[0, 1]", ["training.optimizer.betas", "unknown key"]),
        ("training.epochs=many", ["training.epochs", "a whole number", "'many'"]),
        ("training.schedule=cosin", ["training.schedule", "did you mean 'cosine'"]),
        ("training.schedule={name: step}", ["training.schedule", "at: [epochs]"]),
        ("training.precision=half", ["training.precision", "float32, bfloat16, float16"]),
        ("dataset={size: 3}", ["dataset.name"]),
        ("method=3", ["method", "a method's name"]),
        ("seeds=[]", ["seeds"]),
        ("seeds=[0, 0]", ["all different"]),
        ("seeds=[-1]", ["seeds", "at least 0"]),
        ("name=a/b", ["names a folder"]),
        ("name=..", ["names a folder"]),
        ("baseline=singel", ["baseline", "did you mean 'single'"]),
        ("improvement=best", ["improvement", "mean-of-tasks"]),
        ("fronts={pareto: [singel]}", ["fronts.pareto", "did you mean 'single'"]),
        ("rows.single={dataset: digits}", ["rows.single.dataset", "network, method, training"]),
        ("rows.single={training: {epoch: 1}}", ["rows.single.training.epoch", "did you mean 'epochs'"]),
        ("rows.single=3", ["rows.single", "a mapping"]),
        ("rows={../up: null}", ["names a folder"]),
    ],
)
def test_a_mistake_is_named_with_its_path(load: Callable[..., Experiment], assignment: str, words: list[str]) -> None:
    with pytest.raises(ExperimentError) as caught:
        load(assignment)
    for word in words:
        assert word in str(caught.value)


def test_run_names_the_rows_there_are(load: Callable[..., Experiment]) -> None:
    with pytest.raises(ExperimentError, match="did you mean 'equal'"):
        load().run("equals", 0)
    with pytest.raises(ExperimentError, match="no rows to compare"):
        load("rows={}").runs()


def test_a_run_is_stored_and_read_back(load: Callable[..., Experiment], tmp_path: Path) -> None:
    config: Any = load("method={encoder: pcgrad, decoder: {name: fixed, weights: {top_left: 1e-4}}}").run("single", 7)
    (tmp_path / "config.yaml").write_text(dump(plain(config)))
    assert load_run_config(tmp_path / "config.yaml") == config


def test_base_is_no_name_for_a_row() -> None:
    with pytest.raises(ExperimentError, match=r"^rows\.base: "):
        load_experiment("digits", ["rows.base={method: pcgrad}"])


def test_seeds_may_come_from_a_generator() -> None:
    runs = load_experiment("digits").runs(seed for seed in (3, 4))
    assert {tuple(config.seed for config in configs) for configs in runs.values()} == {(3, 4)}
    for seeds in ([], [1, 1]):
        with pytest.raises(ExperimentError, match=r"^seeds: "):
            load_experiment("digits").runs(seeds)


def written(folder: Path, **documents: str) -> Path:
    for name, text in documents.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(documents))}.yaml"


BELOW = """
name: below
dataset: {name: digits, train: 64}
network: small
training: {epochs: 3, optimizer: {name: sgd, momentum: 0.5}}
rows: {equal: {}, autolambda: {method: {name: autolambda, lr: 1e-4}}}
paper: {source: a paper, size: large, improvement: {equal: 1.0}, time: {equal: [1.0, 1.2]}}
"""


def test_an_experiment_is_laid_over_those_that_it_extends(tmp_path: Path) -> None:
    above = """
    extends: below.yaml
    name: above
    training: {optimizer: {name: adam}, batch_size: 4}
    rows: {autolambda: {method: {lr: 1e-2}}, dwa: {method: dwa}}
    paper: {source: another, size: small}
    """
    experiment = load_experiment(written(tmp_path, above=above, below=BELOW), ["training.epochs=1"])
    assert (experiment.name, experiment.dataset.options) == ("above", {"train": 64})
    assert experiment.training.optimizer == Adam()
    assert (experiment.training.epochs, experiment.training.batch_size) == (1, 4)
    assert list(experiment.rows) == ["equal", "autolambda", "dwa"]
    assert experiment.run("autolambda", 0).method == {"name": "autolambda", "lr": 1e-2}
    assert experiment.paper is not None
    assert (experiment.paper.source, dict(experiment.paper.improvement)) == ("another", {})


def test_of_several_the_later_is_laid_over_the_earlier(tmp_path: Path) -> None:
    other = (
        "{name: other, dataset: {name: digits, train: 32}, network: {name: small, cut: 1}, training: {batch_size: 2}}"
    )
    above = "{extends: [below.yaml, other.yaml], name: above}"
    experiment = load_experiment(written(tmp_path, above=above, below=BELOW, other=other))
    assert (experiment.dataset.options["train"], experiment.network.options) == (32, {"cut": 1})
    assert (experiment.training.epochs, experiment.training.batch_size) == (3, 2)
    assert load_experiment(written(tmp_path, preset="{extends: digits, name: mine}")).rows.keys() == (
        load_experiment("digits").rows.keys()
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{extends: above.yaml, name: above}", "extends: leads from .*above.yaml back to"),
        ("{extends: [3], name: above}", "extends: expected the name of a preset or file, or a list of them"),
        ("{extends: {a: b}, name: above}", "extends: expected the name of a preset or file"),
        ("{extends: digit, name: above}", "digit: unknown preset; did you mean 'digits'"),
        ("{extends: nothing.yaml, name: above}", "there is no file nothing.yaml"),
    ],
)
def test_what_cannot_be_extended_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=message):
        load_experiment(written(tmp_path, above=text))


def test_figures_of_a_paper_are_numbers_or_spans(tmp_path: Path) -> None:
    experiment = load_experiment(written(tmp_path, below=BELOW))
    assert experiment.paper is not None
    assert (experiment.paper.time["equal"].low, experiment.paper.time["equal"].high) == (1.0, 1.2)
    assert build(Experiment, plain(experiment)) == experiment
    for wrong, message in (("[2, 1]", "the lowest figure first"), ("[1]", "a list of 2"), ("x", "a number")):
        with pytest.raises(ExperimentError, match=rf"paper\.time\.equal.*: expected {message}"):
            load_experiment(written(tmp_path, below=BELOW), [f"paper.time.equal={wrong}"])


@pytest.mark.parametrize(
    "changes",
    [
        ["training.average=2"],
        ["training.average=9", "training.select=last"],
        ["training.select_by=[a]", "training.select=last"],
    ],
)
def test_only_last_epochs_that_there_are_can_be_averaged_and_none_chooses_them(
    load: Callable[..., Experiment], changes: list[str]
) -> None:
    with pytest.raises(ExperimentError, match=r"training: (average is of|select_by names)"):
        load(*changes)
