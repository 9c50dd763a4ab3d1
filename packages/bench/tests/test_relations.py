"""All pairs are trained like any run, and what is read of them is their chosen epoch's validation."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
from sidetask_bench.ablation import ablate_transfers
from sidetask_bench.cli import app
from sidetask_bench.config import load_run_config
from sidetask_bench.estimates import (
    ANGLES,
    COEFFICIENTS,
    FEATURES,
    LOOKAHEAD_TRAIN,
    LOOKAHEAD_VALIDATION,
    estimate_relations,
)
from sidetask_bench.progress import Display
from sidetask_bench.relations import enumerate_relations
from sidetask_bench.run import train
from sidetask_bench.schema import ExperimentError
from sidetask_core import Step
from sidetask_saal import Relations
from typer.testing import CliRunner

pytestmark = pytest.mark.thorough

SHORT = "training.epochs=2"


def test_tasks_alone_and_in_pairs_share_the_whole_encoder(load, tmp_path):
    experiment = load(SHORT, "network.cut=1", "dataset.primary=[top_left]")
    found = enumerate_relations(experiment, tmp_path)
    names = ("top_left", "bottom_right")
    assert found.tasks == names
    metrics = {}
    for group in (("top_left",), ("bottom_right",), names):
        folder = tmp_path / "+".join(group) / "seed0"
        config = load_run_config(folder / "config.yaml")
        assert config.dataset.options["tasks"] == list(group)
        assert "primary" not in config.dataset.options
        assert "cut" not in config.network.options
        result = json.loads((folder / "result.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metrics[group] = lines[result["epoch"]]["validation"]
    for t, target in enumerate(names):
        single, paired = metrics[target,][target]["accuracy"], metrics[names][target]["accuracy"]
        if single:
            assert found.improvement[1 - t, t] == pytest.approx(100 * (paired - single) / single)
    again = Relations.load(tmp_path / "relations.json")
    np.testing.assert_array_equal(again.improvement, found.improvement)
    assert (tmp_path / "relations.png").stat().st_size > 1000
    assert (tmp_path / "relations.csv").read_text().count("\n") == 1 + len(found.rows)


def test_processes_give_the_same(load, tmp_path):
    here = enumerate_relations(load(SHORT), tmp_path / "here")
    there = enumerate_relations(load(SHORT), tmp_path / "there", jobs=2)
    np.testing.assert_array_equal(here.improvement, there.improvement)
    assert here.rows == there.rows


def test_a_training_that_fails_of_anything_is_named_and_tried_again(load, tmp_path, monkeypatch):
    backward = Step.backward

    def failing(step, *args, **kwargs):
        if len(step.tasks) == 2:
            raise ZeroDivisionError("here")
        return backward(step, *args, **kwargs)

    experiment = load("training.epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(Step, "backward", failing)
        found = enumerate_relations(experiment, tmp_path)
    assert found.failed == {"top_left+bottom_right": "StepFailure: ZeroDivisionError: here"}
    assert all((tmp_path / name / "seed0/result.json").exists() for name in TASKS)

    def stopped(step, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Step, "backward", stopped)
        with pytest.raises(KeyboardInterrupt):
            enumerate_relations(experiment, tmp_path)
    assert enumerate_relations(experiment, tmp_path).failed == {}


def test_results_of_which_nothing_follows_are_made_again(load, tmp_path):
    experiment = load("training.epochs=1")
    expected = enumerate_relations(experiment, tmp_path)
    path = tmp_path / "top_left/seed0/metrics.jsonl"
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    record["validation"]["top_left"] = dict.fromkeys(record["validation"]["top_left"])
    path.write_text(json.dumps(record) + "\n")
    kept = (tmp_path / "bottom_right/seed0/result.json").stat().st_mtime_ns
    found = enumerate_relations(experiment, tmp_path)
    assert [*found.failed] == ["top_left"]
    assert "is not a number" in found.failed["top_left"]
    found = enumerate_relations(experiment, tmp_path)
    np.testing.assert_array_equal(found.improvement, expected.improvement)
    assert (tmp_path / "bottom_right/seed0/result.json").stat().st_mtime_ns == kept
    (tmp_path / "relations.json").write_text("{")
    with pytest.raises(ExperimentError, match=r"relations of before .*relations.json is not JSON"):
        enumerate_relations(experiment, tmp_path)


class Killer(Display):
    """Kills the workers whenever the pair begins."""

    def __init__(self):
        self.killed = 0
        self.others = set(multiprocessing.active_children())  # of tests before

    def begin(self, name, done, steps):
        if name.startswith("+".join(TASKS)):
            self.killed += 1
            for worker in set(multiprocessing.active_children()) - self.others:
                worker.kill()


def test_a_worker_that_is_killed_takes_no_other_run_with_it(load, tmp_path):
    killer = Killer()
    found = enumerate_relations(load("training.epochs=60"), tmp_path, jobs=2, display=killer)
    assert killer.killed == 3, "beside others, beside others again, alone"
    assert [*found.failed] == ["top_left+bottom_right"]
    assert "BrokenProcessPool" in found.failed["top_left+bottom_right"]
    assert all((tmp_path / name / "seed0/result.json").exists() for name in TASKS)


def test_a_file_of_the_method_with_other_content_is_another_configuration(load, tmp_path):
    path = tmp_path / "relations.json"
    matrix = np.array([[np.nan, 1.0], [-1.0, np.nan]])
    Relations(TASKS, matrix).save(path)
    for spec in (f"{{name: saal-e, relations: {path}}}", f"{{augment: {{name: saal-e, relations: {path}}}}}"):
        config = load("training.epochs=1", "network.cut=1", "network.widths=[4, 8]", f"method={spec}").run(None, 0)
        Relations(TASKS, matrix).save(path)
        folder = tmp_path / ("slots" if "augment" in spec else "named")
        result = train(config, folder)
        assert train(config, folder) == result
        Relations(TASKS, matrix.T).save(path)
        with pytest.raises(ExperimentError, match=r"files.method\.[a-z.]*relations: [0-9a-f]{64} -> [0-9a-f]{64}"):
            train(config, folder)


def test_the_command_names_the_file_for_the_method(tiny, tmp_path):
    done = CliRunner().invoke(app, ["relations", str(tiny()), "--set", SHORT, "--folder", str(tmp_path / "all")])
    found = Relations.load(tmp_path / "all" / "relations.json")
    assert done.exit_code == bool(found.failed), done.output
    assert f"relations: {tmp_path / 'all' / 'relations.json'}" in done.output
    one = CliRunner().invoke(app, ["relations", str(tiny()), "--set", "dataset.tasks=[top_left]"])
    assert one.exit_code == 2
    assert "relations are between two" in one.output


SPLIT = ("network.cut=1", "network.widths=[4, 8]")
TASKS = ("top_left", "bottom_right")
PAIRS = [("bottom_right", "top_left"), ("top_left", "bottom_right")]


def test_estimates_beside_the_enumerated_truth(load, tmp_path):
    rows = "rows={equal: {}, learned: {method: {name: saal-w, lr: 0.05, when: after}}}"
    found = estimate_relations(load(SHORT, *SPLIT, rows), tmp_path)
    assert not found.failed
    assert found.truth.rows == enumerate_relations(load(SHORT, *SPLIT, rows), tmp_path).rows
    assert [*found.matrices] == [LOOKAHEAD_TRAIN, LOOKAHEAD_VALIDATION, ANGLES, FEATURES, COEFFICIENTS]
    for name, matrix in found.matrices.items():
        assert np.isnan(matrix.diagonal()).all()
        assert np.isfinite(matrix[[0, 1], [1, 0]]).all(), name
    # The row with its own options, not another run.
    lines = [json.loads(line) for line in (tmp_path / "learned/seed0/weights.jsonl").read_text().splitlines()]
    last = [line["encoder"]["top_left→bottom_right"] for line in lines if line["epoch"] == 1]
    assert found.matrices[COEFFICIENTS][0, 1] == pytest.approx(np.mean(last))
    assert load_run_config(tmp_path / "learned/seed0/config.yaml").method["when"] == "after"
    # Beside the weights, which are shares, the coefficients themselves.
    assert all("decoder_coefficients" not in line for line in lines)
    coefficients = [line["encoder_coefficients"] for line in lines]
    assert [*coefficients[-1]] == [*TASKS, *(f"{s}→{t}" for s, t in PAIRS)]
    assert coefficients[0] != coefficients[-1]
    omega = torch.load(tmp_path / "learned/seed0/checkpoint.pt", weights_only=True)["trainer"]["step"][
        "encoder.weights"
    ]
    assert [*coefficients[-1].values()] == pytest.approx(omega.tolist(), rel=1e-6)
    # The source's encoder as it was, with a head of two layers for the target.
    folder = tmp_path / "bottom_right-on-top_left/seed0"
    state = torch.load(folder / "best.pt", weights_only=True)["model"]
    single = torch.load(tmp_path / "top_left/seed0/best.pt", weights_only=True)["model"]
    assert torch.equal(state["shared.encoder.0.1.down.0.weight"], single["shared.1.down.0.weight"])
    assert torch.equal(state["shared.encoder.0.1.down.1.running_var"], single["shared.1.down.1.running_var"])
    assert [k for k in state if k.endswith("weight") and k.startswith("heads")] == [
        "heads.bottom_right.layers.0.weight",
        "heads.bottom_right.layers.2.weight",
    ]
    accuracy = {}
    for source in TASKS:
        place = tmp_path / f"bottom_right-on-{source}/seed0"
        epoch = json.loads((place / "result.json").read_text())["epoch"]
        validation = json.loads((place / "metrics.jsonl").read_text().splitlines()[epoch])["validation"]
        accuracy[source] = validation["bottom_right"]["accuracy"]
    change = (accuracy["top_left"] - accuracy["bottom_right"]) / accuracy["bottom_right"]
    assert found.matrices[FEATURES][0, 1] == pytest.approx(100 * change)
    assert (tmp_path / "estimates.png").stat().st_size > 1000
    assert (tmp_path / "estimates.csv").read_text().count("\n") == 3
    # Two tasks: one source for each target, which cannot be ranked.
    assert all(np.isnan(ranks).all() for ranks in found.correlations.values())


def test_estimates_need_branches_and_say_so_before_anything_is_trained(load, tmp_path):
    with pytest.raises(ExperimentError, match="has no branch"):
        estimate_relations(load(SHORT), tmp_path)
    assert not [*tmp_path.glob("*/seed0")]


def test_connections_are_switched_off_one_at_a_time(load, tmp_path):
    experiment = load(SHORT, *SPLIT, "rows={equal: {}, all: {method: saal-w}}")
    found = ablate_transfers(experiment, tmp_path, row="all")
    assert not found.failed
    places = {name: tmp_path / name / "seed0" for name in ("all", *(f"without-{s}-to-{t}" for s, t in PAIRS))}
    validation = {}
    for name, place in places.items():
        lines = [json.loads(line)["encoder"] for line in (place / "weights.jsonl").read_text().splitlines()]
        off = {key for key in lines[0] if all(line[key] == 0 for line in lines)}
        # The network is the same; what is off has no weight in any step.
        assert set(lines[0]) == {*TASKS, *(f"{s}→{t}" for s, t in PAIRS)}
        assert off == {f"{s}→{t}" for s, t in PAIRS if name == f"without-{s}-to-{t}"}
        epoch = json.loads((place / "result.json").read_text())["epoch"]
        validation[name] = json.loads((place / "metrics.jsonl").read_text().splitlines()[epoch])["validation"]
    for s, t in PAIRS:
        with_it, without = (validation[name][t]["accuracy"] for name in ("all", f"without-{s}-to-{t}"))
        assert found.effect[TASKS.index(s), TASKS.index(t)] == pytest.approx(100 * (with_it - without) / without)
    assert (tmp_path / "ablation.png").stat().st_size > 1000
    assert (tmp_path / "ablation.csv").read_text().count("\n") == 1 + len(found.rows)
    # Each of two metrics of each task, with and without each connection.
    assert len(found.rows) == 2 * len(TASKS) * len(PAIRS)


@pytest.mark.parametrize(
    "method",
    [
        "{name: saal-w, schedule: {top_left->bottom_right: [[3, null]]}}",
        "{augment: {name: saal-e, transfers: all}, encoder: uncertainty}",
    ],
)
def test_connections_of_methods_with_options_and_in_slots(method, load, tmp_path):
    experiment = load("training.epochs=1", *SPLIT, f"method={method}")
    found = ablate_transfers(experiment, tmp_path)
    assert not found.failed
    for s, t in PAIRS:
        lines = (tmp_path / f"without-{s}-to-{t}/seed0/weights.jsonl").read_text().splitlines()
        assert {json.loads(line)["losses"][f"{s}→{t}"] for line in lines} == {0.0}


def test_a_method_without_connections_is_refused(load, tmp_path):
    with pytest.raises(ExperimentError, match="'equal' has no transfers to switch off"):
        ablate_transfers(load(SHORT), tmp_path)


def test_the_commands_for_estimates_and_ablation(tiny, tmp_path):
    def run(*words):
        sets = [word for change in (SHORT, *SPLIT) for word in ("--set", change)]
        return CliRunner().invoke(app, ["relations", str(tiny()), *sets, "--folder", str(tmp_path / "all"), *words])

    done = run("--estimates")
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in ("gradient angle", "SAAL coefficients", "mean"))
    done = run("--ablate", "--set", "method=saal-w")
    assert done.exit_code == 0, done.output
    assert "its connection gives" in done.output
    for words, message in ((("--row", "equal"), "--row goes with"), (("--ablate", "--estimates"), "two commands")):
        refused = run(*words)
        assert refused.exit_code == 2
        assert message in refused.output
