import pytest
import torch
from sidetask_datasets.augment import Augmentation
from sidetask_datasets.scenes.layout import furnish
from sidetask_datasets.scenes.render import render
from sidetask_datasets.scenes.world import Camera

KINDS = {"depth": "depth", "normals": "normals", "segmentation": "classes", "edges": "binary", "label": "label"}


def numbers(count, scale=0.0, top=0.0, left=0.0, flip=0.99):
    return torch.tensor([[scale, top, left, flip]]).expand(count, -1)


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
