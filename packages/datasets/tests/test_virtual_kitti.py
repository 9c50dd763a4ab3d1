"""Both versions of Virtual KITTI, tiny, sound and hostile."""

import shutil
from functools import partial

import numpy
import pytest
import torch
from PIL import Image
from sidetask_datasets import DataError, cache
from sidetask_datasets.adapter import find_source
from sidetask_datasets.cache import prepare
from sidetask_datasets.virtual_kitti import CLASSES, COLOURS, FAR, read_encoding, virtual_kitti, virtual_kitti_source

SIZE = (6, 10)
COUNT = 5
FIRST = [("0001", "clone"), ("0001", "fog"), ("0002", "clone"), ("0020", "15-deg-left")]


def write(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array) if mode is None else Image.frombytes(mode, array.shape[::-1], array.tobytes())
    picture.save(path, quality=95)


def frame(number, instances):
    """A brightness that tells the frame, class ids, their colours and centimetres."""
    generator = numpy.random.default_rng(number)
    ids = generator.integers(0, 14, SIZE)
    colours = numpy.array(COLOURS, numpy.uint8)[ids]
    if instances:
        # The car of the lower half is another instance than that of the upper half.
        colours[3:][ids[3:] == 1] = (1, 2, 3)
    depth = generator.integers(150, 60000, SIZE).astype(numpy.uint16)
    depth[ids == CLASSES.index("Sky")] = FAR
    return numpy.full((*SIZE, 3), 3 * number, numpy.uint8), ids, colours, depth


def encoding(instances):
    lines = [f"{name} {' '.join(map(str, c))}" for name, c in zip(CLASSES, COLOURS, strict=True)]
    if instances:
        lines[1] = f"Car:0 {' '.join(map(str, COLOURS[1]))}\nCar:17 1 2 3"
    return "\n".join(["Category(:id) r g b", *lines]) + "\n"


def write_first(root):
    truth = {}
    for world, variation in FIRST:
        base = root / "vkitti_1.3.1_scenegt"
        for index in range(COUNT):
            number = len(truth)
            image, _, colours, depth = truth[number] = frame(number, True)
            name = f"{world}/{variation}/{index:05}.png"
            write(root / "vkitti_1.3.1_rgb" / name, image)
            write(base / name, colours)
            write(root / "vkitti_1.3.1_depthgt" / name, depth, "I;16")
        (base / f"{world}_{variation}_scenegt_rgb_encoding.txt").write_text(encoding(True))
    return truth


def write_second(root, apart=False):
    truth = {}
    for world, variation in FIRST:
        scene = f"Scene{world[2:]}/{variation}"
        bases = {
            part: root / f"vkitti_2.0.3_{part}" / scene if apart else root / scene
            for part in ("rgb", "depth", "classSegmentation", "textgt")
        }
        for index in range(COUNT):
            number = len(truth)
            image, _, colours, depth = truth[number] = frame(number, False)
            write(bases["rgb"] / f"frames/rgb/Camera_0/rgb_{index:05}.jpg", image)
            write(bases["classSegmentation"] / f"frames/classSegmentation/Camera_0/classgt_{index:05}.png", colours)
            write(bases["depth"] / f"frames/depth/Camera_0/depth_{index:05}.png", depth, "I;16")
        bases["textgt"].mkdir(parents=True, exist_ok=True)
        (bases["textgt"] / "colors.txt").write_text(encoding(False))
    return truth


WRITERS = {
    "1.3.1": write_first,
    "2": write_second,
    "2 by archive": lambda root: write_second(root, apart=True),
}


@pytest.fixture
def first(tmp_path):
    write_first(tmp_path)
    return tmp_path


@pytest.mark.parametrize("version", WRITERS)
def test_what_was_written_is_read_and_every_frame_is_in_one_split(tmp_path, version):
    truth = WRITERS[version](tmp_path)
    data = virtual_kitti(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (17, 1, 2)
    assert data.input_shape == (3, *SIZE)
    seen = []
    for split in (data.train, data.validation, data.test):
        for row in range(len(split)):
            batch = split[row]
            number = round(float(split.inputs.data[row].float().mean()) / 3)
            seen.append(number)
            _, ids, _, depth = truth[number]
            assert batch.targets["segmentation"][0].tolist() == ids.tolist()
            expected = numpy.where(depth == FAR, 0, 100 / depth.astype(float))
            found = batch.targets["inverse_depth"][0, 0].double()
            torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-6, atol=0)
    assert sorted(seen) == list(range(20))


def test_the_split_depends_on_the_seed_alone(first):
    def test_files(**options):
        return {sample["image"][0].as_posix() for sample in virtual_kitti_source(first, **options).splits["test"]}

    assert test_files() == test_files(seed=0, size=(3, 4), tasks=["segmentation"])
    assert len({frozenset(test_files(seed=seed)) for seed in range(4)}) > 1


def test_worlds_variations_and_tasks_are_chosen(first):
    shutil.rmtree(first / "vkitti_1.3.1_depthgt")
    data = virtual_kitti(first, ["segmentation"], variations=["clone"], size=(3, 5), noise=True)
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 1, 1)
    assert [task.name for task in data.tasks] == ["segmentation", "noise"]
    assert data.train[0].targets["segmentation"].shape == (1, 3, 5)
    with pytest.raises(ValueError, match="unknown world '0003'"):
        virtual_kitti(first, worlds=["0003"])
    with pytest.raises(DataError, match=r"holds neither .* of any world \(0001\) and variation \(rain\)"):
        virtual_kitti(first, worlds=["0001"], variations=["rain"])
    with pytest.raises(ValueError, match="camera is 0 or 1, found 2"):
        virtual_kitti(first, camera=2)


def test_losses_and_metrics_take_what_was_read(first):
    data = virtual_kitti(first, primary=["segmentation"])
    batch = next(data.train.batches(4))
    for task in data.tasks:
        prediction = torch.randn(4, data.outputs[task.name], *SIZE)
        loss, count = task.mean(prediction, batch.target_of(task))
        assert loss.isfinite()
        assert count > 0
        assert data.views[task.name].image(batch.target_of(task)[0]).shape == (*SIZE, 3)
    near, far = (data.views["inverse_depth"].image(torch.full((1, 1, 1), value)).sum() for value in (0.2, 0.02))
    assert near > far


def fails(root, message, **options):
    with pytest.raises(DataError, match=message):
        virtual_kitti(root, **options)


def test_missing_and_surplus_files_are_named(first):
    (first / "vkitti_1.3.1_depthgt/0001/fog/00003.png").unlink()
    write(first / "vkitti_1.3.1_scenegt/0002/clone/00077.png", numpy.zeros((*SIZE, 3), numpy.uint8))
    write(first / "vkitti_1.3.1_rgb/0002/clone/00000.jpg", numpy.zeros((*SIZE, 3), numpy.uint8))
    problems = virtual_kitti_source(first).problems
    assert [problem.removeprefix(str(first)) for problem in problems] == [
        "/vkitti_1.3.1_depthgt/0001/fog/00003.png: no such file",
        "/vkitti_1.3.1_rgb/0002/clone/00000.jpg: does not belong here; files are ID.png",
        "/vkitti_1.3.1_rgb/0002/clone/00077.png: no such file",
        "/vkitti_1.3.1_depthgt/0002/clone/00077.png: no such file",
    ]
    (first / "vkitti_1.3.1_scenegt/0001_fog_scenegt_rgb_encoding.txt").unlink()
    fails(first, r"0001_fog_scenegt_rgb_encoding\.txt: cannot be read as text: .*No such file")
    shutil.rmtree(first / "vkitti_1.3.1_depthgt/0001/fog")
    fails(first, r"depthgt/0001/fog: cannot be read as a folder: No such file", tasks=["inverse_depth"])
    write_second(first)
    fails(first, "holds version 1.3.1 and version 2")
    fails(first / "nowhere", "nowhere: holds neither")


def test_pictures_are_checked(first):
    base = first / "vkitti_1.3.1_scenegt/0001/clone"
    whole = (base / "00000.png").read_bytes()
    write(base / "00000.png", numpy.full((*SIZE, 3), 9, numpy.uint8))
    fails(first, r"clone/00000\.png: 60 pixels of a colour that is no class's, such as \(9, 9, 9\)")
    write(base / "00000.png", numpy.zeros((6, 9, 3), numpy.uint8))
    fails(first, r"clone/00000\.png: expected 6×10 pixels, found 6×9")
    (base / "00000.png").write_bytes(whole[:60])
    fails(first, r"clone/00000\.png: cannot be decoded as PNG")
    (base / "00000.png").write_bytes(whole)
    write(first / "vkitti_1.3.1_depthgt/0001/clone/00001.png", numpy.zeros(SIZE, numpy.uint8))
    fails(first, r"clone/00001\.png: expected 16-bit grey pixels, found mode 'L'")
    link = first / "vkitti_1.3.1_depthgt/0001/clone/00001.png"
    link.unlink()
    link.symlink_to(link)
    fails(first, r"clone/00001\.png: no such file")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Car 1 2", "line 3: expected a class and three numbers from 0 to 255, found 'Car 1 2'"),
        ("Car 1 2 256", "line 3: expected a class and three numbers"),
        ("Car 1 2 ²", "line 3: expected a class and three numbers"),
        ("Plane 1 2 3", "line 3: unknown class 'Plane'; there are: Building, Car"),
        ("Car:3 140 140 140", "line 3: Car:3 has the colour of another class"),
    ],
)
def test_an_encoding_is_checked(tmp_path, line, message):
    path = tmp_path / "colors.txt"
    path.write_text(f"Category r g b\nBuilding 140 140 140\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_encoding(path)
    path.write_text("Category r g b\n")
    with pytest.raises(DataError, match="names no class"):
        read_encoding(path)


def test_all_bad_lines_of_all_encodings_are_listed_beside_missing_files(first):
    folder = first / "vkitti_1.3.1_scenegt"
    names = [folder / f"{world}_{variation}_scenegt_rgb_encoding.txt" for world, variation in FIRST[:2]]
    for path in names:
        path.write_text("Category r g b\nCar 1 2\nBuilding 140 140 140\nShip 1 2 3\n")
    lost = first / "vkitti_1.3.1_depthgt/0001/clone/00002.png"
    lost.unlink()
    found = virtual_kitti_source(first).problems
    assert [problem.split(": ")[0] for problem in found] == [
        str(lost),
        *(f"{path}, line {number}" for path in names for number in (2, 4)),
    ]
    with pytest.raises(DataError, match="unknown class 'Ship'"):
        prepare(virtual_kitti_source(first))


def test_an_undefined_class_is_unlabelled(tmp_path):
    path = tmp_path / "colors.txt"
    path.write_text("Category r g b\nUndefined 0 0 0\nCar 0 0 1\n")
    assert read_encoding(path) == ((0, 255), (1, 1))


def test_a_damaged_encoding_is_a_data_error_whatever_the_damage(tmp_path):
    path, generator = tmp_path / "colors.txt", numpy.random.default_rng(0)
    whole, errors = encoding(True).encode(), 0
    for _ in range(100):
        broken = bytearray(whole)
        for place in generator.integers(0, len(broken), 3):
            broken[place] = generator.integers(0, 256)
        path.write_bytes(broken)
        try:
            assert len(read_encoding(path)) > 1
        except DataError:
            errors += 1
    assert errors > 50


def test_what_was_prepared_is_not_decoded_again(first, monkeypatch):
    options = {"size": (3, 5), "seed": 3, "noise": True, "variations": ["clone"]}
    prepare(find_source(virtual_kitti, first, options))
    monkeypatch.setattr(cache, "_decode", None)
    assert len(virtual_kitti(first, **options).train)


def test_further_tasks_join_them(first, check_further_tasks):
    check_further_tasks(partial(virtual_kitti, first, variations=["clone"]))
