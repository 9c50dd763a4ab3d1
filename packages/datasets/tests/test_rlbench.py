"""Demonstrations in RLBench's folders, tiny, sound and hostile."""

import pickle
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from sidetask_datasets import DataError, View, cache
from sidetask_datasets.adapter import find_source
from sidetask_datasets.cache import prepare
from sidetask_datasets.files import DataErrors
from sidetask_datasets.rlbench import TASKS, StateSplit, rlbench, rlbench_source

SIZE = (6, 8)
LENGTHS = {"reach_target": [4, 5, 3, 4], "push_button": [3, 2, 6]}
OPTIONS = {"tasks": list(LENGTHS), "size": None}


def write_episode(folder, number, length, cameras=("front", "wrist")):
    """Frames whose brightness tells episode and step; so do the first numbers of state and action."""
    generator = numpy.random.default_rng(number)
    for place, camera in enumerate(cameras):
        (folder / f"{camera}_rgb").mkdir(parents=True)
        for step in range(length):
            colour = numpy.full((*SIZE, 3), 20 * number + 2 * step + place, numpy.uint8)
            Image.fromarray(colour).save(folder / f"{camera}_rgb" / f"{step}.png")
    state = generator.normal(size=(length, 5))
    state[:, 4] = 7.0
    action = generator.normal(size=(length, 3)).astype(numpy.float32)
    state[:, 0] = action[:, 0] = 20 * number + 2 * numpy.arange(length)
    numpy.save(folder / "state.npy", state)
    numpy.save(folder / "action.npy", action)
    return state, action


@pytest.fixture
def tree(tmp_path):
    truth, number = {}, 0
    for task, lengths in LENGTHS.items():
        for index, length in enumerate(lengths):
            # The second task lies as deep as RLBench itself writes it.
            place = tmp_path / task / ("variation0/episodes" if task == "push_button" else "")
            truth[number] = task, *write_episode(place / f"episode{index}", number, length)
            number += 1
    return tmp_path, truth


def frames(split, task):
    """Episode and step of every frame, by its brightness."""
    found = split.parts[task][:]
    values = (found.inputs[:, 0] * 0.229 + 0.485).mean(dim=(1, 2)) * 255
    return found, [divmod(round(value), 20) for value in values.tolist()]


def test_what_was_written_is_read_and_episodes_are_in_one_split(tree):
    root, truth = tree
    data = rlbench(root, **OPTIONS)
    assert [(task.name, task.input) for task in data.tasks] == [(name, name) for name in LENGTHS]
    assert data.outputs == {"reach_target": 3, "push_button": 3}
    assert data.input_shape == (3 + 5, *SIZE)
    seen = {}
    known = numpy.concatenate(
        [truth[n][1] for task in LENGTHS for n in {n for n, _ in frames(data.train, task)[1]}], dtype=numpy.float64
    )
    mean, std = known.mean(0), known.std(0)
    std[4] = 1
    for split in (data.train, data.validation, data.test):
        for task in LENGTHS:
            batch, places = frames(split, task)
            assert places == sorted(places)
            for row, (number, half) in enumerate(places):
                step = half // 2
                name, state, action = truth[number]
                assert name == task
                assert seen.setdefault(number, split) is split
                seen[number, step] = True
                assert batch.targets[task][row].tolist() == action[step].tolist()
                maps = batch.inputs[row, 3:]
                assert (maps == maps[:, :1, :1]).all()
                expected = torch.from_numpy((state[step] - mean) / std).float()
                torch.testing.assert_close(maps[:, 0, 0], expected, rtol=1e-4, atol=1e-5)
                assert data.show_input(batch.inputs[row])[0, 0].tolist() == [20 * number + half] * 3
    assert sum(isinstance(key, tuple) for key in seen) == sum(map(sum, LENGTHS.values()))
    counts = [sum(seen[n] is split for n in range(7)) for split in (data.train, data.validation, data.test)]
    assert counts == [3, 2, 2]


def test_the_division_depends_on_the_seed_alone(tree):
    def held(**options):
        source = rlbench_source(tree[0], **{**OPTIONS, **options})
        return {s["image"][0].parent for name, samples in source.splits.items() if "test" in name for s in samples}

    assert held() == held(seed=0, every=2, size=(3, 4))
    assert len({frozenset(held(seed=seed)) for seed in range(5)}) > 1


def test_cameras_state_steps_and_sizes_are_chosen(tree):
    root, _ = tree
    both = rlbench(root, cameras=["wrist", "front"], **OPTIONS)
    assert both.input_shape == (3 + 3 + 5, *SIZE)
    difference = (both.test[:].inputs["push_button"] * 0.229 * 255)[:, 0] - (
        both.test[:].inputs["push_button"] * 0.229 * 255
    )[:, 3]
    torch.testing.assert_close(difference, torch.ones_like(difference), rtol=0, atol=1e-3)
    plain = rlbench(root, state=False, every=2, **{**OPTIONS, "size": (3, 4)})
    assert plain.input_shape == (3, 3, 4)
    total = sum(len(part) for split in (plain.train, plain.validation, plain.test) for part in split.parts.values())
    assert total == sum(-(-length // 2) for lengths in LENGTHS.values() for length in lengths)
    with pytest.raises(ValueError, match="unknown camera 'top'"):
        rlbench(root, cameras=["top"], **OPTIONS)
    with pytest.raises(ValueError, match="every is a number of steps, at least 1, found 0"):
        rlbench(root, every=0, **OPTIONS)
    with pytest.raises(ValueError, match=r"a task is the name of a folder: .* found '\.\./reach_target'"):
        rlbench(root, ["../reach_target"])
    with pytest.raises(ValueError, match="unknown loss of numbers 'huber'; there are: l1, mse"):
        rlbench(root, loss="huber", **OPTIONS)
    assert len(TASKS) == 10


@pytest.mark.parametrize(("loss", "value"), [("l1", 2.0), ("mse", 4.0)])
def test_losses_metrics_and_pictures_of_actions(tree, loss, value):
    data = rlbench(tree[0], loss=loss, primary=["push_button"], **OPTIONS)
    assert [task.primary for task in data.tasks] == [False, True]
    batch = next(data.train.batches(3))
    for task in data.tasks:
        target = batch.target_of(task)
        found, count = task.mean(target + 2, target)
        assert (found.item(), count.item()) == (pytest.approx(value, rel=1e-4), 9)
        for metric, expected in zip(task.metrics.values(), (2.0, 4.0), strict=True):
            metric.update(target + 2, target)
            assert metric.compute().item() == pytest.approx(expected, rel=1e-4)
        assert data.views[task.name].image(target[0]).shape == (36, 36, 3)


def test_bars_stand_above_and_hang_below_zero():
    view = View("vector", limits=(-1.0, 1.0), size=(8, 4))
    picture = view.image(torch.tensor([1.0, -0.5]))
    coloured = (picture != 255).any(axis=-1)
    assert coloured[:, 0].tolist() == [True] * 4 + [False] * 4
    assert coloured[:, 3].tolist() == [False] * 4 + [True] * 2 + [False] * 2


def test_a_state_goes_where_its_split_goes(tree):
    data = rlbench(tree[0], **OPTIONS)
    part = data.train.parts["reach_target"]
    streamed = part.to("cpu", memory=0)
    assert isinstance(streamed, StateSplit)
    assert streamed.nbytes == 0 < part.nbytes
    for one, other in zip(part.batches(2, seed=3), streamed.batches(2, seed=3), strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets["reach_target"], other.targets["reach_target"])
    assert part.checksum() == streamed.checksum()


def fails(root, message, **options):
    with pytest.raises(DataError, match=message):
        rlbench(root, **{**OPTIONS, **options})


def test_a_pickle_is_refused_with_what_to_do(tree):
    root, _ = tree
    sprung = root / "sprung"

    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(sprung)!r}, 'w').close()",))

    folder = root / "reach_target" / "episode1"
    (folder / "low_dim_obs.pkl").write_bytes(pickle.dumps(Trap()))
    rlbench(root, **OPTIONS)
    (folder / "state.npy").unlink()
    fails(
        root, r"episode1/low_dim_obs\.pkl: a pickle runs whatever is in it, and is not opened; write .* to state\.npy"
    )
    (folder / "low_dim_obs.pkl").unlink()
    (folder / "state.npy").write_bytes(pickle.dumps(Trap()))
    fails(root, r"episode1/state\.npy: cannot be read as an array")
    numpy.save(folder / "state.npy", numpy.array([Trap()], object), allow_pickle=True)
    fails(root, r"episode1/state\.npy: cannot be read as an array")
    assert not sprung.exists()


def test_damaged_pictures_are_listed_beside_missing_and_surplus_files(tree):
    root, _ = tree
    (root / "reach_target" / "episode0" / "front_rgb" / "2.png").unlink()
    (root / "reach_target" / "episode0" / "front_rgb" / "0.png").write_bytes(b"damaged")
    (root / "reach_target" / "episode1" / "state.npy").write_bytes(b"damaged")
    shutil.rmtree(root / "push_button")
    with pytest.raises(DataErrors) as caught:
        prepare(rlbench_source(root, **OPTIONS))
    found = [problem.removeprefix(f"{root}/").split(": ")[0] for problem in caught.value.problems]
    assert found == [
        "push_button",
        "reach_target/episode0/front_rgb/2.png",
        "reach_target/episode1/state.npy",
        "reach_target/episode0/front_rgb/0.png",
    ]


def test_what_is_wrong_with_an_episode_is_named(tree):
    root, truth = tree
    folder = root / "reach_target" / "episode0"
    state = truth[0][1]
    (folder / "front_rgb" / "2.png").unlink()
    Image.fromarray(numpy.zeros((*SIZE, 3), numpy.uint8)).save(folder / "front_rgb" / "9.png")
    fails(
        root, r"front_rgb/2\.png: no such file \(and 1 more problems\)\n.*front_rgb/9\.png: state\.npy has no such step"
    )
    (folder / "front_rgb" / "9.png").rename(folder / "front_rgb" / "2.png")
    for array, message in (
        (state[:3], r"action\.npy: has 4 steps, state\.npy has 3"),
        (state.astype(int), r"state\.npy: expected floats \[steps, numbers\], found int64 \[4, 5\]"),
        (state[:, 0], r"state\.npy: expected floats \[steps, numbers\], found float64 \[4\]"),
        (numpy.full_like(state, numpy.nan), r"state\.npy: holds values that are not finite"),
        (numpy.full_like(state, 1e300), r"state\.npy: holds values that are not finite in single precision"),
        (state[:, :4], r"episode1/state\.npy: has 5 numbers a step, .*episode0/state\.npy has 4"),
    ):
        numpy.save(folder / "state.npy", array)
        fails(root, message)
    numpy.save(folder / "state.npy", state)
    Image.fromarray(numpy.zeros((5, 5, 3), numpy.uint8)).save(folder / "front_rgb" / "2.png")
    fails(root, r"front_rgb/2\.png: expected 6×8 pixels, found 5×5")
    whole = (folder / "front_rgb" / "1.png").read_bytes()
    (folder / "front_rgb" / "2.png").write_bytes(whole[: len(whole) // 2])
    fails(root, r"front_rgb/2\.png: cannot be decoded as PNG")
    fails(root, "slide: holds 0 folders episode0, episode1, …; three splits need three at least", tasks=["slide"])


def test_damaged_arrays_are_data_errors_whatever_the_damage(tree):
    root, _ = tree
    path = root / "push_button/variation0/episodes/episode1/action.npy"
    whole, errors = path.read_bytes(), 0
    generator = numpy.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(whole)
        for place in generator.integers(0, 100, 2):
            broken[place] = generator.integers(0, 256)
        path.write_bytes(broken)
        try:
            errors += bool(rlbench_source(root, ["push_button"], size=None).problems)
        except DataError:
            errors += 1
    assert errors > 30


def test_the_script_of_the_page_writes_what_is_read(tmp_path, monkeypatch):
    page = Path(__file__).parents[3] / "docs" / "datasets" / "rlbench.md"
    if not page.exists():
        pytest.skip("the documents are not here")
    (script,) = re.findall(r"^```py\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for number in range(3):
        folder = tmp_path / "reach_target" / "variation0" / "episodes" / f"episode{number}"
        write_episode(folder, number, 3)
        (folder / "state.npy").unlink()
        (folder / "action.npy").unlink()
        steps = [
            SimpleNamespace(joint_positions=numpy.full(7, float(i)), joint_velocities=numpy.ones(7), gripper_open=1.0)
            for i in range(3)
        ]
        (folder / "low_dim_obs.pkl").write_bytes(pickle.dumps(steps))
    fails(tmp_path, "is not opened", tasks=["reach_target"])
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path)])
    exec(compile(script, "export.py", "exec"), {})
    data = rlbench(tmp_path, ["reach_target"], size=None)
    assert data.outputs == {"reach_target": 8}
    assert data.input_shape == (3 + 8, *SIZE)
    assert data.test.parts["reach_target"][:].targets["reach_target"].tolist() == [[1.0] * 8] * 3


def test_what_was_prepared_is_not_decoded_again(tree, monkeypatch):
    options = {**OPTIONS, "seed": 2, "loss": "mse", "cameras": ["wrist", "front"]}
    prepare(find_source(rlbench, tree[0], options))
    monkeypatch.setattr(cache, "_decode", None)
    assert len(rlbench(tree[0], **options).train)


def test_a_changed_picture_of_any_camera_is_decoded_again(tree):
    root, _ = tree
    options = {**OPTIONS, "cameras": ["front", "wrist"], "state": False}
    before = rlbench(root, **options).test.parts["push_button"][:].inputs
    for path in root.rglob("wrist_rgb/0.png"):
        Image.fromarray(numpy.full((*SIZE, 3), 250, numpy.uint8)).save(path)
    after = rlbench(root, **options).test.parts["push_button"][:].inputs
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any()


@pytest.mark.parametrize("state", [False, True])
def test_further_tasks_join_them(tree, state, check_further_tasks):
    check_further_tasks(partial(rlbench, tree[0], **OPTIONS, state=state))
