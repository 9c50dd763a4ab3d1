import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sidetask_bench import Experiment, load_experiment
from sidetask_bench.document import dump

# Small enough that a run takes a fraction of a second: 6 steps an epoch, 3 epochs.
EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "dataset": {"name": "digits", "train": 48, "validation": 20, "test": 24},
    "network": {"name": "small", "widths": [4, 8]},
    "method": "equal",
    "training": {"epochs": 3, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.05}, "threads": 1},
    "rows": {"single": {"network": {"cut": 0}}, "equal": None},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny experiment, with overrides of its top-level keys, and gives the file."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(dump(EXPERIMENT | changes))
        return path

    return write


@pytest.fixture
def load(tiny: Callable[..., Path]) -> Callable[..., Experiment]:
    """The tiny experiment with ``key.path=value`` overrides."""

    def build(*assignments: str) -> Experiment:
        return load_experiment(tiny(), assignments)

    return build


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs this small only lose by sharing cores, and results are compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests decode is theirs alone."""
    monkeypatch.setenv("SIDETASK_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in another process; `killed` expects it to die of SIGKILL."""

    def run(*arguments: str, killed: bool = False) -> subprocess.CompletedProcess[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert not killed or process.returncode == -signal.SIGKILL, err
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    return run


@pytest.fixture
def outcome() -> Callable[[Path], Any]:
    """What a finished run left, but for the times it took."""

    def read(folder: Path) -> Any:
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for record in metrics:
            del record["seconds"]
        result = json.loads((folder / "result.json").read_text())
        del result["seconds"], result["seconds_per_step"]
        state = torch.load(folder / "checkpoint.pt", weights_only=True)["trainer"]
        tensors = {f"step.{k}": v for k, v in state["step"].items() if isinstance(v, torch.Tensor)}
        for index, buffers in state["optimizer"]["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in buffers.items() if isinstance(v, torch.Tensor)}
        best = torch.load(folder / "best.pt", weights_only=True)["model"]
        tensors |= {f"best.{k}": v for k, v in best.items()}
        weights = (folder / "weights.jsonl").read_text()
        return metrics, result, weights, {k: v.numpy().tobytes() for k, v in tensors.items()}

    return read


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A folder of frames, each of one grey."""
    root = tmp_path / "frames"
    for kind, (mode, ending) in {"image": ("RGB", "jpg"), "depth": ("I;16", "png")}.items():
        (root / kind).mkdir(parents=True)
        for i in range(6):
            grey = (9 * i, 9 * i, 9 * i + 1) if mode == "RGB" else 500 * i + 500
            Image.new(mode, (8, 6), grey).save(root / kind / f"{i}.{ending}")
    (root / "train.txt").write_text("0\n1\n2\n3")
    (root / "test.txt").write_text("4\n5")
    return root
