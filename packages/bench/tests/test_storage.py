import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sidetask_bench.schema import ExperimentError
from sidetask_bench.storage import (
    Journal,
    StepLog,
    is_locked,
    locked,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from sidetask_bench.storage import write_atomically

def write(file):
    file.write(b"half of the new")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

write_atomically(Path("state"), write)
"""


def test_a_file_killed_while_written_keeps_its_content(tmp_path: Path, python: Callable[..., object]) -> None:
    write_text(tmp_path / "state", "old")
    python("-c", KILLED_WHILE_WRITING, killed=True)
    assert (tmp_path / "state").read_text() == "old"
    write_text(tmp_path / "state", "new")
    assert (tmp_path / "state").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_failing_writer_keeps_the_content(tmp_path: Path) -> None:
    write_text(tmp_path / "state", "old")
    with pytest.raises(AttributeError):
        write_tensors(tmp_path / "state", {"not plain": lambda: None})
    assert (tmp_path / "state").read_text() == "old"


def test_tensors_are_read_back_without_running_code(tmp_path: Path) -> None:
    data = {"a": torch.arange(3), "b": {"c": [1, "x", None, 2.5]}}
    write_tensors(tmp_path / "state.pt", data)
    found = read_tensors(tmp_path / "state.pt")
    assert found["a"].tolist() == [0, 1, 2]
    assert found["b"] == data["b"]
    torch.save({"a": Path("x")}, tmp_path / "object.pt")
    with pytest.raises(ExperimentError, match=r"object\.pt is not a checkpoint"):
        read_tensors(tmp_path / "object.pt")
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(ExperimentError, match=r"text\.pt is not a checkpoint"):
        read_tensors(tmp_path / "text.pt")


def test_json_has_null_for_what_it_cannot_say(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [float("nan"), 1.0, {"b": float("-inf")}]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.0, {"b": None}]}


def test_a_journal_is_cut_to_a_former_size(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "lines.jsonl")
    assert journal.size() == 0
    journal.append({"a": 1}, {"a": 2})
    size = journal.size()
    journal.append({"a": float("nan")})
    assert journal.read() == [{"a": 1}, {"a": 2}, {"a": None}]
    journal.cut(size)
    assert journal.read() == [{"a": 1}, {"a": 2}]
    with pytest.raises(ExperimentError, match="shorter than its checkpoint"):
        journal.cut(size + 1)


def test_a_step_log_writes_in_chunks_what_it_was_given(tmp_path: Path) -> None:
    log = StepLog(Journal(tmp_path / "weights.jsonl"))
    third = torch.tensor(1 / 3)
    log.add({"step": 0}, {"losses": {"a": third, "b": torch.tensor(2.0)}, "encoder": {}})
    log.add({"step": 1}, {"losses": {"a": torch.tensor(float("nan"))}, "encoder": {"a": torch.tensor(1.0)}})
    assert log.journal.read() == []
    log.flush()
    first, second = log.journal.read()
    assert first["step"] == 0
    assert first["encoder"] == {}
    assert first["losses"]["b"] == 2.0
    assert torch.tensor(first["losses"]["a"]) == third
    assert second == {"step": 1, "losses": {"a": None}, "encoder": {"a": 1.0}}
    log.flush()
    assert len(log.journal.read()) == 2


def test_a_folder_has_one_trainer(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(ExperimentError, match="another process"), locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass


def test_who_looks_at_a_lock_does_not_keep_it(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="there are no such locks here")
    with locked(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # in the middle of a look
        look = threading.Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN))
        look.start()
        with locked(tmp_path):
            pass
        look.join()
