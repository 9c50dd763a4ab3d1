import math

import pytest
import torch
from sidetask_datasets import Column, ResidentSplit, draws
from sidetask_datasets.augment import Augmentation
from sidetask_datasets.scenes.layout import furnish
from sidetask_datasets.scenes.render import render
from sidetask_datasets.scenes.world import Camera

KINDS = {"depth": "depth", "normals": "normals", "segmentation": "classes", "edges": "binary", "label": "label"}


def numbers(count, scale=0.0, top=0.0, left=0.0, flip=0.99, angle=0.5):
    return torch.tensor([[scale, top, left, flip, angle]]).expand(count, -1)


def targets(labels):
    return {"depth": labels.depth[:, None], "normals": labels.normals, "segmentation": labels.segmentation}


SCENE, CAMERA = furnish(5, torch.arange(3), size=(48, 64))
IMAGE, LABELS = render(SCENE, CAMERA)


def test_scale_one_without_a_flip_changes_nothing():
    image, moved = Augmentation()(IMAGE, targets(LABELS), KINDS, numbers(3))
    torch.testing.assert_close(image, IMAGE, rtol=0, atol=1e-5)
    for name, target in targets(LABELS).items():
        assert torch.equal(moved[name], target)


def test_a_flip_mirrors_everything_and_negates_only_x_of_normals():
    image, moved = Augmentation(scales=(1.0,), flip=1.0)(IMAGE, targets(LABELS), KINDS, numbers(3))
    torch.testing.assert_close(image, IMAGE.flip(-1), rtol=0, atol=1e-5)
    assert torch.equal(moved["segmentation"], LABELS.segmentation.flip(-1))
    assert torch.equal(moved["depth"], LABELS.depth[:, None].flip(-1))
    assert torch.equal(moved["normals"], LABELS.normals.flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).view(1, 3, 1, 1))


@pytest.mark.parametrize(("scale", "top", "left"), [(2.0, 0.0, 0.5), (1.5, 1.0, 1.0), (1.2, 0.3, 0.8)])
def test_a_crop_is_what_a_longer_lens_sees(scale, top, left):
    """A window enlarged by s is the view of a camera of s times the focal length, with depth divided by s."""
    image, moved = Augmentation(scales=(scale,))(IMAGE, targets(LABELS), KINDS, numbers(3, top=top, left=left))
    height, width = CAMERA.size
    corner = torch.tensor([width * (1 - 1 / scale) * left, height * (1 - 1 / scale) * top])
    lens = Camera(
        CAMERA.position,
        CAMERA.yaw,
        CAMERA.pitch,
        CAMERA.focal * scale,
        (CAMERA.principal - corner) * scale,
        CAMERA.size,
    )
    seen, truth = render(SCENE, lens)
    # Nearest and linear sampling are off by up to a pixel, which matters at boundaries only.
    assert (moved["segmentation"] == truth.segmentation).float().mean() > 0.9
    error = (moved["depth"][:, 0] * scale - truth.depth).abs() / truth.depth
    assert error.median() < 0.01
    cosine = (moved["normals"] * truth.normals).sum(1)
    assert (cosine > 0.99).float().mean() > 0.9
    assert (image - seen).abs().median() < 0.03


def test_a_plane_keeps_its_equation_under_a_crop():
    """Inverse depth of a plane is linear in the image: at the pixels sampled, depth · scale lies on it exactly."""
    rows, columns = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    inverse = 0.2 + 0.01 * rows + 0.02 * columns
    depth = (1 / inverse)[None, None]
    _, moved = Augmentation(scales=(2.0,))(depth, {"depth": depth}, KINDS, numbers(1, top=0.5, left=0.5))
    sampled = 0.2 + 0.01 * (3 + rows / 2).floor().add(0.5) + 0.02 * (4 + columns / 2).floor().add(0.5)
    torch.testing.assert_close(moved["depth"][0, 0] * 2.0, 1 / sampled)


def test_labels_of_whole_images_stay():
    _, moved = Augmentation()(IMAGE, {"label": torch.arange(3)}, KINDS, numbers(3, scale=0.99, flip=0.0))
    assert moved["label"].tolist() == [0, 1, 2]


def test_unlabelled_pixels_stay_unlabelled():
    depth = torch.zeros(1, 1, 4, 4)
    edges = torch.full((1, 1, 4, 4), -1)
    _, moved = Augmentation(scales=(1.5,))(depth, {"depth": depth, "edges": edges}, KINDS, numbers(1))
    assert not moved["depth"].any()
    assert (moved["edges"] == -1).all()


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Augmentation(scales=(0.5, 1.0))
    with pytest.raises(ValueError, match="probability, found 2"):
        Augmentation(flip=2.0)


class Rolled(Camera):
    """A camera turned about its axis."""

    roll = 0.0

    def rotation(self):
        turn = torch.tensor(-self.roll)
        cos, sin = turn.cos(), turn.sin()
        about = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        return super().rotation() @ about


@pytest.mark.parametrize("degrees", [25.0, -40.0])
def test_a_rotation_is_what_a_rolled_camera_sees(degrees):
    """Everything turned about the middle of the image, normals with it; what was not seen before is unlabelled."""
    centre = torch.tensor([CAMERA.size[1] / 2, CAMERA.size[0] / 2]).expand(3, 2)
    straight = Camera(CAMERA.position, CAMERA.yaw, CAMERA.pitch, CAMERA.focal, centre, CAMERA.size)
    image, labels = render(SCENE, straight)
    augmentation = Augmentation(scales=(1.0,), flip=0.0, rotation=40.0)
    turned, moved = augmentation(image, targets(labels), KINDS, numbers(3, angle=0.5 + degrees / 80))
    rolled = Rolled(CAMERA.position, CAMERA.yaw, CAMERA.pitch, CAMERA.focal, centre, CAMERA.size)
    object.__setattr__(rolled, "roll", math.radians(degrees))
    seen, truth = render(SCENE, rolled)
    known = moved["segmentation"] >= 0
    assert 0.5 < known.float().mean() < 0.98
    assert (moved["segmentation"] == truth.segmentation)[known].float().mean() > 0.9
    assert torch.equal(moved["depth"][:, 0] > 0, known)
    error = (moved["depth"][:, 0] - truth.depth).abs() / truth.depth
    assert error[known].median() < 0.01
    assert ((moved["normals"] * truth.normals).sum(1)[known] > 0.99).float().mean() > 0.9
    assert (turned - seen).abs().mean(1)[known].median() < 0.03
    assert not turned[:, :, 0, 0].any()


def test_a_crop_and_a_flip_follow_a_rotation():
    """All at once is one after the other, but for what is sampled twice."""
    draw = numbers(3, scale=0.0, top=0.3, left=0.6, flip=0.0, angle=0.9)
    together = Augmentation(scales=(1.2,), flip=1.0, rotation=20.0)
    image, moved = together(IMAGE, targets(LABELS), KINDS, draw)
    first = Augmentation(scales=(1.0,), flip=0.0, rotation=20.0)(IMAGE, targets(LABELS), KINDS, draw)
    second, again = Augmentation(scales=(1.2,), flip=1.0)(*first, KINDS, draw)
    same = moved["segmentation"] == again["segmentation"]
    assert same.float().mean() > 0.9
    both = same & (moved["depth"][:, 0] > 0) & (again["depth"][:, 0] > 0)
    assert ((moved["depth"] - again["depth"])[:, 0].abs() / again["depth"][:, 0])[both].median() < 0.01
    assert ((moved["normals"] * again["normals"]).sum(1) > 0.99)[both].float().mean() > 0.9
    assert (image - second).abs().median() < 0.03


def test_a_quarter_turn_is_exact():
    pixels = torch.arange(16.0).view(1, 1, 4, 4)
    classes = torch.arange(16).view(1, 4, 4)
    normals = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    kinds = {"classes": "classes", "normals": "normals"}
    draw = numbers(1, angle=1.0)
    turn = Augmentation(scales=(1.0,), flip=0.0, rotation=90.0)
    image, moved = turn(pixels, {"classes": classes, "normals": normals}, kinds, draw)
    torch.testing.assert_close(image, pixels.rot90(-1, (2, 3)), rtol=0, atol=1e-4)
    assert torch.equal(moved["classes"], classes.rot90(-1, (1, 2)))
    # What pointed right points down.
    expected = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(moved["normals"], expected)


@pytest.mark.parametrize(("top", "left"), [(0.0, 0.0), (0.99, 0.5), (0.3, 0.99)])
def test_pad_and_crop_move_by_whole_pixels_over_black(top, left):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(1, 256, (2, 3, 6, 8), dtype=torch.uint8, generator=generator)
    classes = torch.randint(0, 9, (2, 6, 8), generator=generator)
    augmentation = Augmentation(scales=(1.0,), flip=0.0, pad=2)
    moved, labels = augmentation(image, {"c": classes}, {"c": "classes"}, numbers(2, top=top, left=left))
    assert moved.dtype == torch.uint8
    row, column = int(top * 5), int(left * 5)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))[:, :, row : row + 6, column : column + 8]
    assert torch.equal(moved, padded)
    expected = torch.nn.functional.pad(classes, (2, 2, 2, 2), value=-1)[:, row : row + 6, column : column + 8]
    assert torch.equal(labels["c"], expected)


def test_every_place_of_a_padded_window_is_as_likely():
    uniform = draws.uniform(draws.key(0), torch.arange(2000), 5)
    corners = Augmentation(scales=(1.0,), pad=1).motion(uniform, (1, 1)).corner
    counts = torch.stack([(corners == place).sum(0) for place in (-1, 0, 1)])
    assert counts.sum() == 4000
    assert ((counts / 2000 - 1 / 3).abs() < 0.04).all()


def test_black_is_black_before_standardising():
    """A padded pixel is what a black one is, not the mean."""
    column = Column(torch.full((1, 1, 16, 16), 255, dtype=torch.uint8), "image", (0.5,), (0.25,))
    for augmentation in (Augmentation((1.0,), 0.0, pad=3), Augmentation((1.0,), 0.0, rotation=45.0)):
        split = ResidentSplit(column, {}, augmentation)
        values = torch.cat([next(split.batches(1, epoch=epoch)).inputs.flatten() for epoch in range(20)])
        assert values.min().item() == pytest.approx(-2.0)
        assert values.max().item() == pytest.approx(2.0)


def test_stored_labels_move_as_expanded_ones_do():
    generator = torch.Generator().manual_seed(1)

    def integers(low, high, *shape, dtype):
        return torch.randint(low, high, shape, dtype=dtype, generator=generator)

    columns = {
        "classes": Column(integers(0, 256, 4, 6, 8, dtype=torch.uint8), "classes"),
        "binary": Column(integers(0, 2, 4, 6, 8, dtype=torch.uint8), "binary"),
        "depth": Column(integers(-9999, 9999, 4, 6, 8, dtype=torch.int16), "depth"),
        "disparity": Column(integers(0, 9999, 4, 6, 8, dtype=torch.int16), "disparity", scale=1 / 1024),
        "normals": Column(integers(-99, 99, 4, 3, 6, 8, dtype=torch.int16), "normals"),
        "label": Column(integers(0, 9, 4, dtype=torch.int16), "label"),
    }
    everything = torch.arange(4)
    for options in ({}, {"rotation": 30.0}, {"scales": (1.0,), "pad": 2}):
        augmentation = Augmentation(**options)
        numbers = draws.uniform(draws.key(3), everything, augmentation.draws)
        motion = augmentation.motion(numbers, (6, 8))
        read = {name: column.read(everything) for name, column in columns.items()}
        kinds = {name: column.kind for name, column in columns.items()}
        _, moved = augmentation(torch.zeros(4, 1, 6, 8), read, kinds, numbers)
        for name, column in columns.items():
            torch.testing.assert_close(motion.read(column, column.data), moved[name])
        # A wall twice as near has twice the disparity.
        torch.testing.assert_close(
            motion.turn_("disparity", torch.ones(4, 1, 6, 8)) * motion.turn_("depth", torch.ones(4, 1, 6, 8)),
            torch.ones(4, 1, 6, 8),
        )


def large_columns(count=9):
    generator = torch.Generator().manual_seed(2)

    def integers(low, high, *shape, dtype):
        return torch.randint(low, high, (count, *shape), dtype=dtype, generator=generator)

    return {
        "image": Column(integers(0, 256, 3, 47, 61, dtype=torch.uint8), "image", (0.4, 0.5, 0.6), (0.2, 0.3, 0.2)),
        "classes": Column(integers(0, 256, 47, 61, dtype=torch.uint8), "classes"),
        "binary": Column(integers(0, 2, 47, 61, dtype=torch.uint8), "binary"),
        "depth": Column(torch.rand(count, 47, 61, generator=generator), "depth"),
        "disparity": Column(integers(-9999, 9999, 47, 61, dtype=torch.int16), "disparity", scale=1 / 1024),
        "normals": Column(integers(-99, 99, 3, 47, 61, dtype=torch.int8), "normals"),
        "tokens": Column(torch.rand(count, 5, 46, 60, generator=generator).half(), "tokens"),
        "label": Column(integers(0, 9, dtype=torch.int16), "label"),
    }


@pytest.mark.parametrize(
    "options", [{}, {"scales": (1.0,)}, {"scales": (1.7,)}, {"rotation": 30.0}, {"pad": 3}], ids=str
)
def test_images_one_by_one_are_those_of_a_batch(options):
    columns = large_columns()
    stored = {name: column.data.clone() for name, column in columns.items()}
    augmentation = Augmentation(**({"scales": (1.0,)} | options if "pad" in options else options))
    motion = augmentation.motion(draws.uniform(draws.key(5), torch.arange(9), augmentation.draws), (47, 61))
    for name, column in columns.items():
        together = motion.read(column, column.data)
        alone = column.room(9, column.data)
        for index in range(9):
            motion.read_one(index, column, column.data[index : index + 1], alone[index : index + 1])
        if name == "image":
            torch.testing.assert_close(alone, together, rtol=0, atol=2e-4)
        else:
            assert torch.equal(alone, together), name
        assert torch.equal(column.data, stored[name])


def test_a_batch_that_is_kept_stays_as_it_is():
    columns = large_columns()
    split = ResidentSplit(columns.pop("image"), columns, Augmentation())
    kept = list(split.batches(3, epoch=1))
    copies = [{"": batch.inputs.clone(), **{k: v.clone() for k, v in batch.targets.items()}} for batch in kept]
    for epoch in range(3):
        for batch in split.batches(3, epoch=epoch):
            batch.inputs.zero_()
            for target in batch.targets.values():
                target.zero_()
    for batch, copy in zip(kept, copies, strict=True):
        assert torch.equal(batch.inputs, copy.pop(""))
        assert all(torch.equal(batch.targets[name], target) for name, target in copy.items())
    again = next(split.batches(3, epoch=1))
    assert torch.equal(again.inputs, kept[0].inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation": 181.0}, "0 to 180 degrees, found 181"),
        ({"pad": -1}, "pad is a number of pixels, found -1"),
        ({"pad": 4}, "padded or scaled, not both"),
    ],
)
def test_impossible_motions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
