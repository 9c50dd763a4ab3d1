from functools import partial

import pytest
import torch
from sidetask_datasets import scenes
from sidetask_datasets.scenes import CLASSES, PARTS, Recipe, SceneStream, furnish, render
from sidetask_datasets.scenes.furniture import Dice
from sidetask_datasets.scenes.stream import FIRST, spoil

SIZE = (24, 32)
IDS = torch.arange(16)
SCENE, CAMERA = furnish(0, IDS, size=SIZE)
IMAGE, LABELS = render(SCENE, CAMERA)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_scene_looks_alike_in_every_batch(batch):
    for ids in IDS.split(batch):
        image, labels = render(*furnish(0, ids, size=SIZE))
        torch.testing.assert_close(image, IMAGE[ids], rtol=0, atol=1e-4)
        torch.testing.assert_close(labels.depth, LABELS.depth[ids], rtol=1e-5, atol=1e-5)
        # Rounding may decide otherwise for a ray that grazes a boundary.
        assert (labels.segmentation != LABELS.segmentation[ids]).float().mean() < 1e-3


def test_slices_of_scenes_are_scenes():
    image, _ = render(SCENE[2:5], CAMERA[2:5])
    torch.testing.assert_close(image, IMAGE[2:5], rtol=0, atol=1e-4)


def test_normals_are_unit_and_face_the_camera():
    torch.testing.assert_close(LABELS.normals.norm(dim=1), torch.ones(16, *SIZE))
    rays = CAMERA.rays().view(16, *SIZE, 3).permute(0, 3, 1, 2)
    assert ((LABELS.normals * rays).sum(1) < 1e-4).all()


def test_normals_are_orthogonal_to_the_surface_that_depth_describes():
    scene, camera = furnish(1, torch.arange(6), size=(48, 64))
    _, labels = render(scene, camera)
    points = labels.depth[:, None] * camera.rays().view(6, 48, 64, 3).permute(0, 3, 1, 2)
    smooth = ~labels.edges
    for axis in (2, 3):
        length = points.shape[axis] - 1
        tangent = points.narrow(axis, 1, length) - points.narrow(axis, 0, length)
        tangent = tangent / tangent.norm(dim=1, keepdim=True)
        # A chord of a curved surface is orthogonal to the mean of the normals at its ends.
        mean = labels.normals.narrow(axis, 0, length) + labels.normals.narrow(axis, 1, length)
        sine = (tangent * mean).sum(1).abs() / 2
        inner = smooth.narrow(axis - 1, 0, length)
        assert inner.float().mean() > 0.7
        # Cylinders, round tables and spheres stand before others of their own class and shape nowhere.
        assert (sine[inner] < 0.02).float().mean() > 0.995
        assert sine[inner].median() < 1e-3


def test_depth_is_within_the_room_and_every_label_has_a_name():
    reach = (SCENE.room[:, 1] - SCENE.room[:, 0]).norm(dim=-1)
    assert (LABELS.depth > 0.1).all()
    assert (LABELS.depth.amax((1, 2)) < reach).all()
    assert LABELS.segmentation.min() >= 0
    assert LABELS.segmentation.max() < len(CLASSES) == 13
    assert LABELS.parts.max() < len(PARTS)


def test_edges_are_where_classes_change():
    changed = LABELS.segmentation[:, :, 1:] != LABELS.segmentation[:, :, :-1]
    assert LABELS.edges[:, :, :-1][changed].all()
    assert 0.02 < LABELS.edges.float().mean() < 0.4


def test_every_class_and_part_occurs_and_none_takes_all():
    _, labels = render(*furnish(0, torch.arange(150), size=(18, 24)))
    classes = torch.bincount(labels.segmentation.flatten(), minlength=13) / labels.segmentation.numel()
    parts = torch.bincount(labels.parts.flatten(), minlength=11) / labels.parts.numel()
    assert classes.min() > 0.005
    assert classes.max() < 0.5
    assert parts.min() > 0.002


def test_difficulty_furnishes_and_disturbs():
    def objects(difficulty):
        _, labels = render(*furnish(0, torch.arange(40), size=SIZE, difficulty=difficulty))
        return (labels.segmentation >= CLASSES.index("table")).float().mean()

    assert objects(1.0) > 1.3 * objects(0.0)
    quiet, loud = (Recipe(("depth",), SIZE, difficulty=d).cook(IDS).inputs.data.float() for d in (0.0, 1.0))
    rough = [(image[..., 1:] - image[..., :-1]).abs().median() for image in (quiet, loud)]
    assert rough[1] > 2 * rough[0]


def test_more_samples_smooth_the_image_and_leave_labels_alone():
    image, labels = render(SCENE, CAMERA, samples=3)
    assert torch.equal(labels.depth, LABELS.depth)
    assert 0 < (image - IMAGE).abs().mean() < 0.05
    assert image.min() >= 0
    assert image.max() <= 1


def test_label_noise_has_the_size_asked_for_and_spares_the_rest():
    noisy = spoil(LABELS, 0, IDS, 0.2)
    for name in ("segmentation", "parts", "edges"):
        wrong = getattr(noisy, name) != getattr(LABELS, name)
        assert wrong.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert noisy.segmentation.max() < 13
    assert noisy.segmentation.min() >= 0
    relative = noisy.depth / LABELS.depth - 1
    assert relative.std().item() == pytest.approx(0.2, abs=0.01)
    assert relative.mean().abs() < 0.01
    torch.testing.assert_close(noisy.normals.norm(dim=1), torch.ones(16, *SIZE))
    assert (noisy.normals - LABELS.normals).abs().mean() > 0.05
    again = spoil(LABELS, 0, IDS, 0.2)
    assert torch.equal(noisy.segmentation, again.segmentation)
    assert spoil(LABELS, 0, IDS, 0.0) is LABELS


def test_only_training_labels_are_noisy_and_splits_share_no_room():
    options = {"size": SIZE, "train": 6, "validation": 4, "test": 4, "tasks": ("segmentation", "depth")}
    plain, noisy = scenes(**options), scenes(**options, label_noise=0.3)
    for split in ("validation", "test"):
        one, other = getattr(plain, split), getattr(noisy, split)
        assert torch.equal(one.targets["segmentation"].data, other.targets["segmentation"].data)
    a, b = plain.train.targets["segmentation"].data, noisy.train.targets["segmentation"].data
    assert (a != b).float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(plain.train.inputs.data, noisy.train.inputs.data)
    assert len(set(FIRST.values())) == 3
    images = [getattr(plain, split).inputs.data[:4] for split in FIRST]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


def test_random_classes_take_half_of_the_training_pixels_and_say_nothing():
    options = {"size": SIZE, "train": 40, "validation": 4, "test": 4, "tasks": ("segmentation", "depth")}
    plain, random = scenes(**options), scenes(**options, random_classes=4)
    for split in ("validation", "test"):
        one, other = getattr(plain, split), getattr(random, split)
        assert torch.equal(one.targets["segmentation"].data, other.targets["segmentation"].data)
    assert torch.equal(plain.train.inputs.data, random.train.inputs.data)
    assert torch.equal(plain.train.targets["depth"].data, random.train.targets["depth"].data)
    a, b = plain.train.targets["segmentation"].data, random.train.targets["segmentation"].data
    known = b < len(CLASSES)
    assert torch.equal(a[known], b[known])
    assert known.float().mean().item() == pytest.approx(0.5, abs=0.02)
    for c in range(4):
        there = b == len(CLASSES) + c
        assert there.float().mean().item() == pytest.approx(1 / 8, abs=0.02)
        for true in a.unique()[:3]:
            assert there[a == true].float().mean().item() == pytest.approx(1 / 8, abs=0.04)
    assert random.outputs["segmentation"] == len(random.views["segmentation"].classes) == len(CLASSES) + 4
    assert random.views["segmentation"].classes[-1] == "random 4"


def test_it_is_a_dataset_of_dense_tasks():
    names = ("segmentation", "parts", "depth", "normals", "edges")
    data = scenes(size=SIZE, train=4, validation=3, test=2, tasks=names, primary=["depth"])
    assert [(task.name, task.primary) for task in data.tasks] == [(name, name == "depth") for name in names]
    assert data.input_shape == (3, *SIZE)
    assert data.dense
    batch = next(data.train.batches(4))
    assert batch.inputs.shape == (4, 3, *SIZE)
    assert data.show_input(batch.inputs[0]).shape == (*SIZE, 3)
    for task in data.tasks:
        target = batch.target_of(task)
        prediction = torch.randn(4, data.outputs[task.name], *SIZE)
        assert task.mean(prediction, target)[0].isfinite()
        for metric in task.metrics.values():
            metric.update(prediction, target)
            assert metric.compute().isfinite()
            metric.reset()
        assert data.views[task.name].image(target[0]).shape == (*SIZE, 3)
        assert data.views[task.name].image(prediction[0]).shape == (*SIZE, 3)


def test_compact_labels_are_those_rendered():
    data = scenes(size=SIZE, train=16, validation=1, test=1, tasks=("segmentation", "depth", "normals", "edges"))
    batch = data.train[IDS]
    assert (batch.targets["segmentation"] == LABELS.segmentation).all()
    assert (batch.targets["edges"][:, 0] == LABELS.edges.long()).all()
    torch.testing.assert_close(batch.targets["depth"][:, 0], LABELS.depth, rtol=0, atol=6e-4)
    torch.testing.assert_close(batch.targets["normals"], LABELS.normals, rtol=0, atol=1e-4)


def test_a_stream_is_new_in_every_epoch_and_starts_as_the_kept_split_does():
    recipe = Recipe(("segmentation",), SIZE)
    stream, kept = SceneStream(recipe, 4), recipe.cook(torch.arange(8))
    assert len(stream) == 4
    for epoch in (0, 1):
        (batch,) = stream.batches(4, epoch=epoch, shuffle=False)
        expected = kept[torch.arange(4) + 4 * epoch]
        # A ray on a boundary may be rounded to its other side.
        assert (batch.targets["segmentation"] != expected.targets["segmentation"]).float().mean() < 1e-3
        assert (batch.inputs - expected.inputs).abs().median() < 1e-6
    data = scenes(size=SIZE, train=4, validation=1, test=1, stream=True)
    assert isinstance(data.train, SceneStream)
    assert isinstance(data.to("cpu").train, SceneStream)


def test_dice_do_not_run_out_in_silence():
    dice = Dice(torch.rand(2, 3), 0.5)
    assert dice.many(1, 2, 3).shape == (2, 3)
    with pytest.raises(IndexError, match="more than 3 numbers"):
        dice(0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["flow"]}, "unknown task 'flow'; there are: segmentation, parts, depth, normals, edges"),
        ({"size": (48,)}, "size is a height and a width"),
        ({"size": (0, 4)}, "size is a height and a width"),
        ({"difficulty": 1.5}, "difficulty is between 0 and 1, found 1.5"),
        ({"label_noise": -0.1}, "label_noise is between 0 and 1, found -0.1"),
        ({"random_classes": -1}, "random_classes is a number of classes"),
        ({"samples": 0}, "samples is a number of samples"),
        ({"normals_loss": "l2", "tasks": ["normals"]}, "unknown loss of normals 'l2'"),
        ({"validation": 0}, "validation is a number of samples"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        scenes(**options)


def test_further_tasks_join_them(check_further_tasks):
    check_further_tasks(partial(scenes, SIZE, 7, 3, 4))
