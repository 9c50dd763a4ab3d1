"""Relations are those of the trainings, on any executor, after any kill; a training that fails is named."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from sidetask_core import Task
from sidetask_saal import Relations, enumerate_transfers, feature_relations
from sidetask_saal.saal import saal_e, saal_ew

# What training beside another does to each task's first metric; its second, an error, moves the other way by half.
EFFECT = {("a", "b"): 0.1, ("b", "a"): -0.2, ("a", "c"): 0.3, ("c", "a"): 0.0, ("b", "c"): -0.05, ("c", "b"): 0.25}


class Metric:
    def __init__(self, higher_is_better):
        self.higher_is_better = higher_is_better


def tasks(names="abc"):
    return [Task(name, abs, metrics={"score": Metric(True), "error": Metric(False)}) for name in names]


def train(names):
    """A made-up training: the first is the slowest, so that they end in another order than they began."""
    time.sleep(0.02 * ("a" in names))
    found = {}
    for name in names:
        gain = sum(EFFECT[other, name] for other in names if other != name)
        found[name] = {"score": 0.5 * (1 + gain), "error": 2.0 * (1 - gain / 2), "unused": 7.0}
    return found


def fails(names):
    if "b" in names and len(names) == 2:
        raise RuntimeError(f"no {'+'.join(names)}")
    return train(names)


def silent(done, total, names):
    pass


def expected():
    matrix = np.full((3, 3), math.nan)
    for (source, target), gain in EFFECT.items():
        matrix["abc".index(source), "abc".index(target)] = 100 * gain * 0.75
    return matrix


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        yield pool


@pytest.mark.thorough
def test_every_kind_of_executor_gives_the_same_relations(pool, tmp_path):
    alone = enumerate_transfers(train, tasks(), progress=silent)
    with ThreadPoolExecutor(3) as threads:
        side_by_side = enumerate_transfers(train, tasks(), executor=threads, progress=silent)
    in_processes = enumerate_transfers(train, tasks(), executor=pool, cache=tmp_path, progress=silent)
    np.testing.assert_allclose(alone.improvement, expected(), rtol=1e-12)
    for other in (side_by_side, in_processes, enumerate_transfers(fails, tasks(), cache=tmp_path, progress=silent)):
        np.testing.assert_array_equal(other.improvement, alone.improvement)
        assert other.rows == alone.rows
        assert other.chosen() == alone.chosen()
    assert alone.chosen() == ["a→b", "c→b", "a→c"]
    assert alone.transfers.tolist() == [[False, True, True], [False, False, False], [False, True, False]]


def test_the_report_is_rectangular():
    rows = enumerate_transfers(train, tasks(), progress=silent).rows
    assert len(rows) == 3 * 2 * 2
    assert len({tuple(row) for row in rows}) == 1
    (row,) = [r for r in rows if (r["source"], r["target"], r["metric"]) == ("a", "c", "error")]
    assert row == {
        "source": "a",
        "target": "c",
        "metric": "error",
        "higher_is_better": False,
        "single": 2.0,
        "paired": pytest.approx(1.7),
        "improvement": pytest.approx(22.5),
        "transfer": True,
        "failed": None,
    }


def test_the_definition_of_improvement_is_core_s():
    found = enumerate_transfers(train, tasks(), definition="one-metric", progress=silent)
    assert found.improvement[0, 1] == pytest.approx(10)


def test_a_call_goes_on_where_it_was_killed(tmp_path):
    done = []

    def killed(names):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(names)
        return train(names)

    with pytest.raises(KeyboardInterrupt):
        enumerate_transfers(killed, tasks(), cache=tmp_path, progress=silent)
    more, shown = [], []

    def rest(names):
        more.append(names)
        return train(names)

    found = enumerate_transfers(rest, tasks(), cache=tmp_path, progress=lambda *now: shown.append(now))
    assert len(done) == 4
    assert len(more) == 2
    assert not {*done} & {*more}
    assert shown == [(5, 6, more[0]), (6, 6, more[1])]
    np.testing.assert_allclose(found.improvement, expected())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    enumerate_transfers(fails, tasks(), cache=tmp_path, progress=silent)


def test_a_training_that_fails_is_named_and_tried_again(tmp_path):
    for executor in (None, ThreadPoolExecutor(2)):
        found = enumerate_transfers(fails, tasks(), cache=tmp_path, executor=executor, progress=silent)
        assert found.failed == {"a+b": "RuntimeError: no a+b", "b+c": "RuntimeError: no b+c"}
        assert np.isnan(found.improvement).sum() == 3 + 4
        assert found.improvement[0, 2] == pytest.approx(22.5)
        assert {row["failed"] for row in found.rows if {row["source"], row["target"]} == {"a", "b"}} == {
            "RuntimeError: no a+b"
        }
        with pytest.raises(ValueError, match=r"trainings failed \(a\+b: RuntimeError: no a\+b; b\+c"):
            found.chosen()
    assert enumerate_transfers(train, tasks(), cache=tmp_path, progress=silent).failed == {}


def test_numbers_of_which_no_improvement_follows_are_failures_and_tried_again(tmp_path):
    calls = []

    def diverges(names):
        calls.append(names)
        bad = {("a",): 0.0, ("a", "b"): math.nan, ("b", "c"): math.inf}
        return {name: {"score": bad.get(names, 1.0), "error": 2.0} for name in names}

    found = enumerate_transfers(diverges, tasks(), cache=tmp_path, progress=silent)
    assert found.failed == {
        "a": "metric 'score' of task 'a' is 0, and no improvement is relative to that",
        "a+b": "metric 'score' of task 'a' is not a number",
        "b+c": "metric 'score' of task 'b' is not a number",
    }
    assert len(calls) == 6
    again = []

    def recovered(names):
        again.append(names)
        return diverges(names) | train(names)

    found = enumerate_transfers(recovered, tasks(), cache=tmp_path, progress=silent)
    assert again == [("a",), ("a", "b"), ("b", "c")]
    assert found.failed == {}


def test_a_metric_that_does_not_count_may_be_anything(tmp_path):
    def some(names):
        return {name: found | {"error": math.nan} for name, found in train(names).items()}

    found = enumerate_transfers(some, tasks(), definition="one-metric", cache=tmp_path, progress=silent)
    assert found.improvement[0, 1] == pytest.approx(10)
    # By another definition these are no results.
    assert len(enumerate_transfers(some, tasks(), cache=tmp_path, progress=silent).failed) == 6


@pytest.mark.parametrize(
    "result", [None, {"a": {"score": 1.0}}, {"a": [1]}, {"a": {"score": "x", "error": None}}], ids=str
)
def test_a_training_that_gives_nonsense_fails_alone(result, tmp_path):
    def nonsense(names):
        return result if names == ("a", "c") else train(names)

    found = enumerate_transfers(nonsense, tasks(), cache=tmp_path, progress=silent)
    assert list(found.failed) == ["a+c"]
    assert found.failed["a+c"].startswith("ValueError: train(('a', 'c')) gave ")
    assert found.improvement[0, 1] == pytest.approx(7.5)
    assert enumerate_transfers(train, tasks(), cache=tmp_path, progress=silent).failed == {}


def dies(names):
    """The first pair takes its process with it, in the midst of others, as the kernel does when memory runs out."""
    if names == ("a", "b"):
        os.kill(os.getpid(), signal.SIGKILL)
    return train(names)


def leaves(names):
    if names == ("a", "b"):
        sys.exit(3)
    return train(names)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_worker_that_is_killed_is_named_and_takes_no_other_training_with_it(tmp_path):
    made = []

    def pool():
        made.append(ProcessPoolExecutor(2, get_context("fork")))
        return made[-1]

    shown = []
    found = enumerate_transfers(
        dies, tasks(), executor=pool, cache=tmp_path, progress=lambda *now: shown.append(now[0])
    )
    assert list(found.failed) == ["a+b"]
    assert found.failed["a+b"].startswith("BrokenProcessPool: ")
    assert np.isnan(found.improvement).sum() == 3 + 2
    assert found.improvement[0, 2] == pytest.approx(22.5)
    assert shown == [1, 2, 3, 4, 5, 6]
    assert len(made) > 1
    # An executor that is given cannot be made anew; what it finished is kept.
    with pool() as given:
        found = enumerate_transfers(dies, tasks(), executor=given, cache=tmp_path, progress=silent)
    assert list(found.failed) == ["a+b"]
    with pool() as given:
        found = enumerate_transfers(dies, tasks(), executor=given, progress=silent)
    assert "a+b" in found.failed
    assert {error.partition(":")[0] for error in found.failed.values()} == {"BrokenProcessPool"}
    with pool() as given:
        found = enumerate_transfers(leaves, tasks(), executor=given, progress=silent)
    assert found.failed == {"a+b": "SystemExit: 3"}


def test_executors_that_all_break_end(tmp_path):
    class Broken(ThreadPoolExecutor):
        def submit(self, *arguments):
            raise BrokenExecutor("gone")

    found = enumerate_transfers(train, tasks(), executor=lambda: Broken(1), progress=silent)
    assert found.failed == dict.fromkeys(["a", "b", "c", "a+b", "a+c", "b+c"], "BrokenExecutor: gone")


@pytest.mark.thorough
def test_a_whole_enumeration_that_is_killed_goes_on(tmp_path):
    """By a signal that nothing can catch, from outside, in the midst of a training."""
    script = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_relations import enumerate_transfers, silent, tasks, train

def slow(names):
    if names == ("a", "c"):
        print("here", flush=True)
        time.sleep(600)
    return train(names)

enumerate_transfers(slow, tasks(), cache=sys.argv[2], progress=silent)
"""
    here = str(Path(__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", script, here, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"here\n"
    finally:
        process.kill()
        process.communicate()
    more = []

    def rest(names):
        more.append(names)
        return train(names)

    found = enumerate_transfers(rest, tasks(), cache=tmp_path, progress=silent)
    assert more == [("a", "c"), ("b", "c")]
    np.testing.assert_allclose(found.improvement, expected())


def test_a_cache_keeps_to_its_tasks_and_settings(tmp_path):
    enumerate_transfers(train, tasks(), cache=tmp_path, settings={"seed": 1, "widths": (1, 2)}, progress=silent)
    again = {"widths": [1, 2], "seed": 1}
    enumerate_transfers(fails, tasks(), cache=tmp_path, settings=again, progress=silent)
    with pytest.raises(ValueError, match=r'holds trainings of other settings: \{"seed": 1.* not \{"seed": 2'):
        enumerate_transfers(train, tasks(), cache=tmp_path, settings={"seed": 2}, progress=silent)
    with pytest.raises(ValueError, match="holds trainings of other tasks"):
        enumerate_transfers(train, tasks("ab"), cache=tmp_path, settings=again, progress=silent)
    (tmp_path / "0-1.json").write_text("{")
    with pytest.raises(ValueError, match=r"0-1.json is not JSON"):
        enumerate_transfers(train, tasks(), cache=tmp_path, settings=again, progress=silent)
    for results in ({"a": {}}, {"a": [1]}, {"a": {"score": "x"}}, {"b": {"score": 1}}):
        (tmp_path / "0-1.json").write_text(json.dumps({"names": ["a", "b"], "results": results}))
        with pytest.raises(ValueError, match=r"0-1.json: expected a number or null for metric 'score' of task 'a'"):
            enumerate_transfers(train, tasks(), cache=tmp_path, settings=again, progress=silent)
    (tmp_path / "0-1.json").write_text(json.dumps({"names": ["a", "c"], "results": {}}))
    with pytest.raises(ValueError, match=r"0-1.json is not the training of a, b; delete it"):
        enumerate_transfers(train, tasks(), cache=tmp_path, settings=again, progress=silent)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="holds trainings, but no settings"):
        enumerate_transfers(train, tasks(), cache=tmp_path, settings=again, progress=silent)


def test_relations_choose_the_transfers_of_a_method(tmp_path):
    path = tmp_path / "relations.json"
    found = enumerate_transfers(train, tasks(), progress=silent)
    found.save(path)
    again = Relations.load(path)
    np.testing.assert_array_equal(again.improvement, found.improvement)
    assert (again.tasks, again.rows, again.failed) == (found.tasks, found.rows, found.failed)
    for factory in (saal_e, saal_ew):
        assert factory(tasks(), relations=path).augment.transfers == ("a→b", "c→b", "a→c")
    # What tasks of one branch give each other, they give without a transfer.
    both = saal_e(tasks(), relations=path, route={"a": "x", "b": "x"})
    assert both.augment.transfers == ("c→b", "a→c")
    assert saal_e(tasks("cab"), relations=path).augment.transfers == ("a→c", "c→b", "a→b")
    with pytest.raises(ValueError, match="the relations are those of tasks a, b, c, not of a, b"):
        saal_e(tasks("ab"), relations=path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="is not a JSON object"):
        Relations.load(path)
    for change, message in (
        ({"improvement": [[None]]}, r"a row of improvement must be 2 numbers or null, found \[null\]"),
        ({"improvement": [[None, 1]]}, "improvement has 1 rows for 2 tasks"),
        ({"improvement": [1, 2]}, "a row of improvement must be 2 numbers or null, found 1"),
        ({"improvement": [[None, "x"], [2, None]]}, "a row of improvement must be 2 numbers or null"),
        ({"tasks": [1, 2]}, r"tasks must be two or more different names, found \[1, 2\]"),
        ({"tasks": ["a", "a"]}, "tasks must be two or more different names"),
        ({"failed": ["x"]}, "failed must map trainings to errors"),
        ({"rows": [1]}, "rows must be a list of objects"),
    ):
        good = {"format": 1, "tasks": ["a", "b"], "improvement": [[None, 1], [2, None]]}
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=f"relations.json: {message}"):
            Relations.load(path)
    path.write_text(json.dumps({"format": 1, "tasks": ["a", "b"], "improvement": [[None, None], [2, None]]}))
    with pytest.raises(ValueError, match="it is not known whether 'a' helps 'b'"):
        saal_e(tasks("ab"), relations=path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="does not hold enumerated relations"):
        Relations.load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file of relations .*; `sidetask relations` writes one"):
        saal_e(tasks(), relations=path)


def test_bad_input_is_refused_before_anything_is_trained():
    def never(names):
        raise AssertionError

    for some, message in (
        (tasks("a"), "two or more different tasks, not a"),
        ([*tasks("a"), Task("b", abs)], "task 'b' has no metrics"),
        ([*tasks("a"), *[Task("a->b", abs, metrics={"m": Metric(True)})]], "the name of a transfer"),
    ):
        with pytest.raises(ValueError, match=message):
            enumerate_transfers(never, some, progress=silent)
    with pytest.raises(ValueError, match="definition must be one of mean-of-tasks, one-metric, flat, not 'one_metric'"):
        enumerate_transfers(never, tasks(), definition="one_metric", progress=silent)
    unsaid = [Task(name, abs, metrics={"m": Metric(None)}) for name in "ab"]
    with pytest.raises(ValueError, match="metric 'm' of task 'a' does not say whether higher is better"):
        enumerate_transfers(never, unsaid, progress=silent)


def head_on(names):
    """A made-up transfer: the target's value on the source's encoder."""
    source, target = names
    gain = 0.0 if source == target else EFFECT[source, target]
    return {target: {"score": 0.4 * (1 + gain), "error": 1.0 * (1 - gain / 2)}}


@pytest.mark.thorough
def test_features_are_compared_with_the_target_s_own(tmp_path, pool):
    found = feature_relations(head_on, tasks(), executor=pool, cache=tmp_path, progress=silent)
    np.testing.assert_allclose(found.improvement, expected(), rtol=1e-12)
    assert len([*tmp_path.iterdir()]) == 9 + 1
    with pytest.raises(ValueError, match='holds trainings of other trainings: "features", not "pairs"'):
        enumerate_transfers(train, tasks(), cache=tmp_path, progress=silent)
