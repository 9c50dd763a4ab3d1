import errno
import json
import os
import queue
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image
from sidetask_bench import Experiment, ExperimentError, tables, train, workers
from sidetask_bench.cli import app
from sidetask_bench.document import presets
from sidetask_bench.progress import Display
from sidetask_datasets import frames as factory
from typer.testing import CliRunner, Result

SHORT = ["--set", "training.epochs=1", "--set", "dataset.train=16"]


@pytest.fixture
def sidetask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_train_writes_a_run_and_says_where(sidetask: Callable[..., Result], tiny: Callable[..., Path]) -> None:
    done = sidetask("train", tiny(), "--seed", 5, "--row", "single", *SHORT)
    assert done.exit_code == 0, done.output
    folder = Path("runs/tiny/single/seed5")
    assert str(folder) in done.output
    result = json.loads((folder / "result.json").read_text())
    accuracy = result["test"]["top_left"]["accuracy"]
    assert tables.number(accuracy, tables.decimals([accuracy])) in done.output
    assert len((folder / "weights.jsonl").read_text().splitlines()) == 2
    again = sidetask("train", tiny(), "--seed", 5, "--row", "single", *SHORT)
    assert again.exit_code == 0


def test_compare_prints_the_table_and_the_report(sidetask: Callable[..., Result], tiny: Callable[..., Path]) -> None:
    done = sidetask("compare", tiny(), "--folder", "here", *SHORT)
    assert done.exit_code == 0, done.output
    comparison = json.loads(Path("here/comparison.json").read_text())
    assert [row["name"] for row in comparison["rows"]] == ["single", "equal"]
    assert comparison["command"].startswith("sidetask compare")
    assert comparison["command"].endswith("--set training.epochs=1 --set dataset.train=16")
    for words in ("improvement", "single", "equal", str(Path("here/report.html"))):
        assert words in done.output
    assert Path("here/report.html").is_file()
    Path("here/report.html").unlink()
    assert sidetask("report", "here").exit_code == 0
    assert Path("here/report.html").is_file()


def test_a_run_that_fails_has_status_1(sidetask: Callable[..., Result], tiny: Callable[..., Path]) -> None:
    done = sidetask("train", tiny(), "--set", "training.optimizer.lr=1e30")
    assert done.exit_code == 1
    assert "non-finite" in done.stderr
    done = sidetask(
        "compare", tiny(), *SHORT, "--set", "rows.wild={training: {optimizer: {lr: 1e30}}}", "--set", "dataset.train=32"
    )
    assert done.exit_code == 1
    assert "left out: wild, seed 0" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "nowhere.yaml"),
        ("train", "digit"),
        ("train", "{tiny}", "--row", "doubel"),
        ("train", "{tiny}", "--set", "training.epoch=1"),
        ("train", "{tiny}", "--set", "dataset.trian=1"),
        ("compare", "{tiny}", "--set", "rows={}"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_status_2(
    sidetask: Callable[..., Result], tiny: Callable[..., Path], arguments: tuple[str, ...]
) -> None:
    words = [str(tiny()) if word == "{tiny}" else word for word in arguments]
    done = sidetask(*words)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    debugged = sidetask(*words, "--debug")
    assert type(debugged.exception).__name__ == "ExperimentError"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("name=\0", "--set name is not valid YAML"),
        (
            f"training.epochs={'9' * 5000}",
            "--set training.epochs, line 1: expected a whole number, found something long",
        ),
        ("training.epochs=!!int abc", "--set training.epochs, line 1: expected a whole number, found 'abc'"),
        ("training.deterministic=!!bool abc", "expected true or false, found 'abc'"),
        ("rows=&a {a: *a}", "--set rows is nested too deep, or contains itself"),
        (f"seeds=[0, {2**70}]", "seeds[1]: expected at most 4294967295"),
        ("method={name: rlw, seed: a}", "method {'name': 'rlw', 'seed': 'a'}: "),
        (f"method={{name: rlw, seed: {2**64}}}", "method {'name': 'rlw', 'seed': "),
        ("dataset.device=nope", "dataset.device: 'nope' cannot be used here"),
        ("dataset.seed=a", "dataset 'digits': seed is a whole number, found 'a'"),
        ("network.cut=1.5", "network 'small': cut is a whole number of stages"),
        ("training.optimizer={name: adam, betas: [0.9, 1.0]}", "training.optimizer.betas[1]: expected less than 1"),
        (
            "training.optimizer={name: sgd, nesterov: true, momentum: 0}",
            "optimizer: nesterov needs a momentum",
        ),
    ],
    ids=lambda text: text[:30].replace("\0", "NUL"),
)
def test_a_value_that_makes_no_sense_is_one_line_with_its_key(
    sidetask: Callable[..., Result], tiny: Callable[..., Path], assignment: str, words: str
) -> None:
    done = sidetask("train", tiny(), "--set", assignment)
    assert done.exit_code == 2, done.exception
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_seed_that_no_generator_takes(sidetask: Callable[..., Result], tiny: Callable[..., Path]) -> None:
    done = sidetask("train", tiny(), "--seed", 2**70)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: seed: expected 0 to 4294967295")


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "{tiny}", "--runs", "{tiny}/x"),
        ("compare", "{tiny}", "--runs", "{tiny}/x"),
        ("relations", "{tiny}", "--runs", "{tiny}/x"),
        ("grouping", "{tiny}", "--runs", "{tiny}/x"),
        ("describe", "digits", "train=4", "validation=4", "test=4", "--gallery", "{tiny}/x.png"),
    ],
    ids=lambda words: words[0],
)
def test_a_place_that_cannot_be_is_one_line_with_its_path(
    sidetask: Callable[..., Result], tiny: Callable[..., Path], arguments: tuple[str, ...]
) -> None:
    words = [word.replace("{tiny}", str(tiny())) for word in arguments]
    done = sidetask(*words)
    assert done.exit_code == 2, done.exception
    assert done.stderr.startswith(f"error: {tiny()}")
    assert done.stderr.count("\n") == 1
    assert isinstance(sidetask(*words, "--debug").exception, OSError)


def test_a_disk_that_is_full_is_one_line_with_the_file(
    sidetask: Callable[..., Result], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = sidetask("train", tiny(), *SHORT)
    assert done.exit_code == 2
    assert "No space left on device" in done.stderr
    assert str(Path("runs", "tiny", "base", "seed0")) in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"tasks": 1}', '{"tasks": [], "rows": [{}]}', "\xff"])
def test_a_comparison_that_cannot_be_read_is_one_line(
    sidetask: Callable[..., Result], tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "comparison.json").write_text(content, encoding="latin-1")
    done = sidetask("report", tmp_path)
    assert done.exit_code == 2, done.exception
    assert done.stderr.startswith(f"error: {tmp_path / 'comparison.json'}")
    assert done.stderr.count("\n") == 1


class Desk:
    """A pool that makes every run at once, here."""

    made: ClassVar[list[tuple[int, str]]] = []

    def __init__(self, at_once: int, address: str) -> None:
        self.made.append((at_once, address))
        self.events: Any = queue.SimpleQueue()

    def submit(self, *job: Any) -> Future[dict[str, Any]]:
        done: Future[dict[str, Any]] = Future()
        done.set_result(workers.attempt(*job))
        return done

    def close(self, *, now: bool) -> None:
        assert not now


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("command", "pools"),
    [
        ("compare", 1),
        ("table", 2),
        ("relations", 1),
        ("relations --estimates", 2),
        ("relations --ablate --row saal-w", 1),
        ("grouping", 1),
    ],
)
def test_a_cluster_takes_the_runs_of_every_command_that_makes_several(
    sidetask: Callable[..., Result],
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
    pools: int,
) -> None:
    monkeypatch.setattr("sidetask_bench.cluster.Cluster", Desk)
    monkeypatch.setattr(workers, "_this", workers._Worker(Display()))
    monkeypatch.setattr(Desk, "made", [])
    relations = "runs/tiny-small/relations/relations.json"
    rows = {
        "single": {"network": {"cut": 0}},
        "saal-w": {"method": "saal-w"},
        "saal-e": {"method": {"name": "saal-e", "relations": relations}},
    }
    if command != "table":
        del rows["saal-e"]
    paper = {"source": "A. Author", "size": "big"}
    network = {"name": "small", "widths": [4, 8], "cut": 1}
    text = tiny(network=network, rows=rows, paper=paper).read_text()
    for name in ("tiny", "tiny-small"):
        (tmp_path / f"{name}.yaml").write_text(text.replace("name: tiny\n", f"name: {name}\n"))
    name, *options = command.split()
    done = sidetask(name, tmp_path / "tiny-small.yaml", *options, "--jobs", 2, "--ray", "somewhere", *SHORT)
    assert done.exit_code == 0, done.output
    assert Desk.made == [(2, "somewhere")] * pools


def test_list_names_everything_with_its_distribution(sidetask: Callable[..., Result]) -> None:
    done = sidetask("list")
    assert done.exit_code == 0
    for words in ("digits", "sidetask-datasets", "small", "sidetask-bench", *presets()):
        assert words in done.output


def test_demo_is_both_presets(sidetask: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("sidetask_bench.cli._compare", lambda *arguments: bool(seen.append(arguments[:2])))
    assert sidetask("demo").exit_code == 0
    assert [(experiment.name, folder) for experiment, folder in seen] == [
        ("digits", Path("runs/digits")),
        ("scenes", Path("runs/scenes")),
    ]
    for experiment, _ in seen:
        assert list(experiment.rows) == ["single", "equal", "uncertainty", "pcgrad", "cagrad"]
        assert len(experiment.seeds) >= 2


@pytest.mark.thorough
def test_two_processes_train_one_run(
    tiny: Callable[..., Path], load: Callable[..., Experiment], tmp_path: Path, python: Any
) -> None:
    """The command line itself, under torchrun: each process takes half of every batch, and process 0 writes."""
    changes = ["training.epochs=2", "method=pcgrad", "training.checkpoint_every=2"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sidetask_bench"]
    sets = [word for change in changes for word in ("--set", change)]
    done = python(*launch, "train", str(tiny()), "--folder", "run", *sets)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run: run") == 1
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "weights.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    assert json.loads((folder / "result.json").read_text())["processes"] == 2
    (folder / "result.json").unlink()
    with pytest.raises(ExperimentError, match=r"written by 2 process\(es\), and this is 1"):
        train(load(*changes).run(None, 0), folder)


# One of two processes dies in its eighth step, and torchrun ends the other.
DYING = """
import os, signal, sys
from pathlib import Path
from sidetask_bench.cli import app
from sidetask_core import Step

died, *arguments = sys.argv[1:]
backward, count = Step.backward, 0

def dying(*args, **kwargs):
    global count
    count += 1
    if count == 8 and os.environ["RANK"] == "1" and not Path(died).exists():
        Path(died).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(*args, **kwargs)

Step.backward = dying
app(arguments, prog_name="sidetask")
"""


@pytest.mark.thorough
@pytest.mark.parametrize("begun_again_by", ["command", "torchrun"])
def test_two_processes_of_which_one_is_killed_end_as_if_none_had_been(
    tiny: Callable[..., Path], tmp_path: Path, python: Any, outcome: Any, begun_again_by: str
) -> None:
    """Bit for bit, for gloo adds the same numbers in the same order; with what is sampled of the gradients."""
    (tmp_path / "dying.py").write_text(DYING)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = ["training.epochs=2", "method=rlw", "training.checkpoint_every=2", "training.gradients={every: 3}"]
    sets = [word for setting in settings for word in ("--set", setting)]
    whole = python(*launch, "-m", "sidetask_bench", "train", str(tiny()), "--folder", "whole", *sets)
    assert whole.returncode == 0, whole.stderr
    killed = ["died", "train", str(tiny()), "--folder", "killed", *sets]
    if begun_again_by == "command":
        assert python(*launch, "dying.py", *killed).returncode != 0
        assert (tmp_path / "died").exists()
        assert not (tmp_path / "killed" / "result.json").exists()
    else:
        launch += ["--max-restarts", "1"]
    again = python(*launch, "dying.py", *killed)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "died").exists()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_prepare_decodes_once_and_says_what_it_takes(
    sidetask: Callable[..., Result], frames: Path, tmp_path: Path
) -> None:
    arguments = ["prepare", "frames", frames, "tasks=[depth]", "validation=1", "--cache", tmp_path / "room", "-j", 1]
    done = sidetask(*arguments)
    assert done.exit_code == 0, done.output
    words = done.output.split()
    for expected in ("train", "4", "test", "2", str(3 * 48), str(2 * 48), str(5 * 48)):
        assert expected in words
    arrays = {path: path.stat().st_mtime_ns for path in (tmp_path / "room" / "frames").rglob("*.npy")}
    assert len(arrays) == 4
    # A training with other options of the same files finds them.
    factory(root=frames, tasks=["depth"], validation=2, cache=tmp_path / "room")
    assert sidetask(*arguments).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in arrays} == arrays


def test_a_cache_that_cannot_be_written_is_named(
    sidetask: Callable[..., Result], frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    done = sidetask("prepare", "frames", frames, "tasks=[depth]", "--cache", tmp_path / "file", "-j", 1)
    assert done.exit_code == 2
    assert f"error: cache {tmp_path / 'file'}: cannot be written: " in done.output

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    done = sidetask("prepare", "frames", frames, "tasks=[depth]", "--cache", tmp_path / "room", "-j", 1)
    assert done.exit_code == 2
    assert f"error: cache {tmp_path / 'room'}: cannot be written: [Errno 28] No space left on device" in done.output
    assert not list((tmp_path / "room").rglob("*.npy"))


def test_describe_counts_and_draws(
    sidetask: Callable[..., Result], frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDETASK_CACHE", str(tmp_path / "room"))
    picture = tmp_path / "new" / "sheet.png"
    options = [f"root={frames}", "tasks=[depth]", "validation=1", "--gallery", picture, "--samples", 2]
    done = sidetask("describe", "frames", *options)
    assert done.exit_code == 0, done.output
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in done.output.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["samples"]] == ["3", "1", "2"]
    assert [cell.strip() for cell in rows["depth: mean"]] == ["1", "2", "2.75"]
    assert [cell.strip() for cell in rows["depth: unlabelled"]] == ["0.00%"] * 3
    with Image.open(picture) as sheet:
        assert sheet.size == (2 * 8 + 4, 5 * 6 + 4 * 4)
    done = sidetask("describe", "frames", "root=nowhere")
    assert done.exit_code == 2
    assert "nowhere: no such folder" in done.output


def test_prepare_prints_every_problem_and_has_status_1(sidetask: Callable[..., Result], frames: Path) -> None:
    for path in (frames / "depth" / "3.png", frames / "image" / "5.jpg"):
        path.write_bytes(path.read_bytes()[:40])
    done = sidetask("prepare", "frames", frames, "tasks=[depth]", "-j", 1)
    assert done.exit_code == 1
    assert f"error: {frames / 'depth' / '3.png'}: cannot be decoded as PNG" in done.output
    assert f"error: {frames / 'image' / '5.jpg'}: cannot be decoded as JPEG" in done.output
    assert "2 problems" in done.output
    done = sidetask("prepare", "frames", frames / "nowhere")
    assert done.exit_code == 1
    assert "nowhere: no such folder" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frams"], "no installed package offers a dataset 'frams'; did you mean 'frames'?"),
        (["scenes"], "dataset 'scenes': it decodes no files"),
        (["frames", "colour=3"], "dataset 'frames': it has no option 'colour'; there are: tasks, validation"),
        (["frames", "root=x"], "the root of the files is the second argument"),
        (["frames", "tasks"], "expected key.path=value"),
    ],
)
def test_prepare_refuses_what_it_does_not_know(
    sidetask: Callable[..., Result], frames: Path, arguments: list[str], message: str
) -> None:
    name, *options = arguments
    done = sidetask("prepare", name, frames, *options)
    assert done.exit_code == 2
    assert message in done.output
