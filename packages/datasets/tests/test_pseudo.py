"""Labels of another model: written once, checked as they are read, moved with the images."""

import numpy
import pytest
import torch
from sidetask_core import ExtraTasks, Method, MissingKey, SplitModel, Step, Uncertainty, plugins
from sidetask_datasets import DataError, digits, pseudo_label, scenes, thresholded, with_pseudo
from sidetask_datasets.losses import distributed, soft_cross_entropy
from sidetask_datasets.metrics import Agreement
from sidetask_datasets.pseudo import SPLITS
from torch import nn


@pytest.fixture(scope="module")
def rooms():
    return scenes(size=(12, 16), train=6, validation=3, test=4, tasks=["segmentation", "depth"], primary=["depth"])


class Teacher:
    """Probabilities that follow from the image, so that labels can be compared with what they are of."""

    def __init__(self, kind, classes=5):
        self.kind, self.classes, self.calls = kind, classes, 0
        self.weights = torch.randn(classes, 3, generator=torch.Generator().manual_seed(0))

    def __call__(self, images):
        assert not torch.is_grad_enabled()
        self.calls += 1
        logits = torch.einsum("kc,nchw->nkhw", self.weights, images) * 2
        if self.kind == "soft":
            return logits.mean(dim=(2, 3)).softmax(dim=1)
        return (nn.functional.avg_pool2d(logits, 4) if self.kind == "tokens" else logits).softmax(dim=1)


def stored(folder, split):
    with numpy.load(folder / f"{split}.npz", allow_pickle=False) as archive:
        return dict(archive)


@pytest.mark.parametrize("kind", ["segmentation", "soft", "tokens"])
def test_labels_are_the_teachers(rooms, tmp_path, kind):
    data = with_pseudo(rooms, {"guess": pseudo_label(rooms, tmp_path, Teacher(kind), kind=kind, batch_size=4)})
    assert [(task.name, task.primary) for task in data.tasks][-1] == ("guess", False)
    assert data.outputs["guess"] == 5
    for name in SPLITS:
        split = getattr(data, name)
        batch = split[range(len(split))]
        with torch.no_grad():
            scores = Teacher(kind)(batch.inputs)
        found = batch.targets["guess"]
        if kind == "segmentation":
            best, ids = scores.max(dim=1)
            assert torch.equal(found, torch.where(best > 0.5, ids, -1))
            assert 0 < (found == -1).float().mean() < 1
        else:
            torch.testing.assert_close(found, scores, rtol=0, atol=2e-3)
            torch.testing.assert_close(found.sum(dim=1), torch.ones_like(found[:, 0]))
        assert set(batch.targets) == {"segmentation", "depth", "guess"}


def test_a_teacher_is_asked_once(rooms, tmp_path):
    teacher = Teacher("soft")
    pseudo_label(rooms, tmp_path, teacher, kind="soft")
    assert teacher.calls == 3
    pseudo_label(rooms, tmp_path, teacher, kind="soft")
    assert teacher.calls == 3
    (tmp_path / "test.npz").unlink()
    pseudo_label(rooms, tmp_path, teacher, kind="soft")
    assert teacher.calls == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.npz", "train.npz", "validation.npz"]


def test_a_teacher_that_fails_leaves_no_file(rooms, tmp_path):
    with pytest.raises(ValueError, match=r"kind 'tokens' gives probabilities \[6, K, h, w\], found \[6, 5\]"):
        pseudo_label(rooms, tmp_path, Teacher("soft"), kind="tokens")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"'segmentation' gives probabilities \[6, K, 12, 16\], found \[6, 5, 3, 4\]"):
        pseudo_label(rooms, tmp_path, Teacher("tokens"))
    with pytest.raises(ValueError, match="kind is one of segmentation, soft, tokens, not 'boxes'"):
        pseudo_label(rooms, tmp_path, Teacher("soft"), kind="boxes")


def test_only_what_is_likely_is_labelled():
    scores = torch.tensor([0.5, 0.51, 0.2]).view(3, 1, 1, 1) * torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)
    scores[2] = 0.9
    assert thresholded(scores).flatten().tolist() == [255, 0, 0]
    assert thresholded(scores, 0.3).flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["segmentation", "tokens"])
def test_labels_follow_their_images_through_augmentation(rooms, tmp_path, kind):
    """Every pixel's label comes from where its depth comes from."""
    depth = rooms.train.targets["depth"].data
    bins = (depth.to(torch.float32) / 1500).clamp(0, 4).long()
    at_images = nn.functional.one_hot(bins, 5).movedim(-1, 1).float()
    if kind == "tokens":
        at_images = nn.functional.avg_pool2d(at_images, 2)
    labels = at_images.argmax(dim=1).to(torch.uint8) if kind == "segmentation" else at_images
    for name in SPLITS:
        count = len(getattr(rooms, name))
        numpy.savez(tmp_path / f"{name}.npz", labels=labels[:count].numpy(), classes=5)
    data = with_pseudo(rooms, {"bins": tmp_path})
    for epoch in range(4):
        for plain, batch in zip(rooms.train.batches(6, epoch=epoch), data.train.batches(6, epoch=epoch), strict=True):
            assert torch.equal(batch.inputs, plain.inputs)
            assert torch.equal(batch.targets["depth"], plain.targets["depth"])
            found = batch.targets["bins"]
            here, mirrored = (agreement(batch.targets["depth"], some, kind) for some in (found, found.flip(-1)))
            assert here.min() > (0.99 if kind == "segmentation" else 0.7)
            assert here.mean() > mirrored.mean() + 0.2


def agreement(depth, found, kind):
    """The share of labels that are those of the depths ``[N]``; cropping divided these by the scale, one has to fit."""
    fits = []
    for scale in (1.0, 1.2, 1.5):
        truth = (depth[:, 0] * scale * 1000 / 1500).clamp(0, 4).long()
        if kind == "segmentation":
            fits.append((truth == found).float().mean(dim=(1, 2)))
        else:
            shares = nn.functional.avg_pool2d(nn.functional.one_hot(truth, 5).movedim(-1, 1).float(), 2)
            fits.append(1 - (shares - found).abs().sum(dim=1).mean(dim=(1, 2)) / 2)
    return torch.stack(fits).amax(dim=0)


def test_a_flip_mirrors_tokens_and_leaves_soft_labels(rooms):
    from sidetask_datasets import Augmentation

    generator = torch.Generator().manual_seed(0)
    tokens = torch.rand(2, 5, 3, 4, generator=generator)
    numbers = torch.zeros(2, 4)
    images = torch.zeros(2, 3, 12, 16)
    targets = {"tokens": tokens, "soft": tokens[:, :, 0, 0]}
    _, moved = Augmentation(scales=(1.0,), flip=1.0)(images, targets, {n: n for n in targets}, numbers)
    torch.testing.assert_close(moved["tokens"], tokens.flip(-1))
    assert torch.equal(moved["soft"], targets["soft"])
    # Twice as large, from the upper left corner: constant tokens stay, and all remain mixtures.
    _, moved = Augmentation(scales=(2.0,), flip=0.0)(images, targets, {n: n for n in targets}, numbers)
    assert (moved["tokens"] >= tokens.amin(dim=(2, 3), keepdim=True) - 1e-6).all()
    torch.testing.assert_close(moved["tokens"][..., 0, 0], tokens[..., 0, 0])


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3, 4)])
def test_cross_entropy_with_a_distribution(shape):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 6, 8, generator=generator, dtype=torch.float64)
    target = torch.rand(shape, generator=generator).softmax(dim=1)
    target[1] = 0
    grid = shape[2:] or (1, 1)
    pooled = nn.functional.adaptive_avg_pool2d(logits.float(), grid).reshape(shape)
    expected = -(target * pooled.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(soft_cross_entropy(logits, target), expected)
    if len(shape) == 2:
        torch.testing.assert_close(soft_cross_entropy(pooled, target), expected)
    # A certain distribution is a label.
    certain = nn.functional.one_hot(target.argmax(dim=1), 5).movedim(-1, 1).float()
    torch.testing.assert_close(
        soft_cross_entropy(logits, certain),
        nn.functional.cross_entropy(pooled, target.argmax(dim=1), reduction="none"),
    )
    assert distributed(target).shape == expected.shape
    assert distributed(target)[[0, 2, 3]].all()
    assert not distributed(target)[1].any()
    metric = Agreement()
    metric.update(logits, target)
    right = (pooled.argmax(dim=1) == target.argmax(dim=1))[[0, 2, 3]]
    assert metric.compute().item() == pytest.approx(right.double().mean().item())
    with pytest.raises(ValueError, match="does not fit distributions"):
        soft_cross_entropy(logits[:, :4], target)


@pytest.fixture
def write(rooms, tmp_path):
    """Writes labels that fit, with one of the arrays of train.npz replaced."""

    def fill(**arrays):
        for name in SPLITS:
            count = len(getattr(rooms, name))
            good = {"labels": numpy.zeros((count, 12, 16), numpy.uint8), "classes": 4}
            good |= arrays if name == "train" else {}
            numpy.savez(tmp_path / f"{name}.npz", **{key: value for key, value in good.items() if value is not None})
        return tmp_path

    return fill


def spread(*shape):
    return numpy.full(shape, 1 / shape[1], numpy.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": None}, "holds no array 'labels'; there are: classes"),
        ({"labels": numpy.zeros((5, 12, 16), numpy.uint8)}, r"labels \[5, 12, 16\] of a split of 6 samples"),
        ({"labels": numpy.zeros((6, 16, 12), numpy.uint8)}, "labels of 16×12 pixels, images of 12×16"),
        ({"labels": numpy.full((6, 12, 16), 7, numpy.uint8)}, "class id 7; there are 4 classes"),
        ({"classes": None}, "beside class ids, it needs 'classes', a whole number"),
        ({"classes": 4.5}, "it needs 'classes', a whole number"),
        ({"labels": numpy.zeros((6, 12, 16), numpy.int64)}, "labels are uint8 .* found int64"),
        ({"labels": spread(6, 4, 5, 4)}, "5×4 patches do not divide images of 12×16 pixels"),
        ({"labels": spread(6, 4) * 0.5}, "a distribution sums to 0.5, neither to 1 nor, unlabelled, to 0"),
        ({"labels": spread(6, 4) * numpy.nan}, "holds what is no probability"),
        ({"labels": -spread(6, 4)}, "holds what is no probability"),
        ({"images": 12345}, "its labels are of other images than those of 'scenes'"),
        ({"classes": 3}, "validation.npz: holds classes of 4 classes, train.npz holds classes of 3"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(rooms, write, arrays, message):
    folder = write(**arrays)
    with pytest.raises(DataError, match=message) as caught:
        with_pseudo(rooms, {"guess": folder})
    assert str(caught.value).startswith(str(folder))


def test_labels_that_fit(rooms, write):
    assert with_pseudo(rooms, {"guess": write()}).outputs["guess"] == 4


def test_missing_and_damaged_files_are_named(rooms, write):
    folder = write()
    path = folder / "validation.npz"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=r"validation.npz: no such file; labels are train.npz, validation.npz and test"):
        with_pseudo(rooms, {"guess": folder})
    middle = len(whole) // 3
    for damaged in (b"", b"not an archive", whole[:-40], whole[:100], whole[:middle] + b"\xff" + whole[middle + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"validation.npz: cannot be read as an archive of arrays"):
            with_pseudo(rooms, {"guess": folder})
    numpy.savez(path, labels=numpy.array([{"an": "object"}] * 3, dtype=object))
    with pytest.raises(DataError, match=r"validation.npz: cannot be read"):
        with_pseudo(rooms, {"guess": folder})


def test_labels_of_other_images_are_refused(rooms, tmp_path):
    pseudo_label(rooms, tmp_path, Teacher("soft"), kind="soft")
    others = scenes(size=(12, 16), train=6, validation=3, test=4, tasks=["depth"], seed=1)
    with pytest.raises(DataError, match=r"train.npz: its labels are of other images than those of 'scenes'"):
        with_pseudo(others, {"guess": tmp_path})


def test_where_there_are_no_labels_to_add(rooms, tmp_path, write):
    stream = scenes(size=(12, 16), train=6, validation=3, test=4, tasks=["depth"], stream=True)
    with pytest.raises(ValueError, match="SceneStream makes new samples in every epoch"):
        pseudo_label(stream, tmp_path / "new", Teacher("soft"), kind="soft")
    with pytest.raises(ValueError, match="SceneStream makes new samples in every epoch"):
        with_pseudo(stream, {"guess": write()})
    with pytest.raises(ValueError, match="dataset 'scenes' has a task 'depth' already"):
        with_pseudo(rooms, {"depth": write()})


def test_beside_noise(rooms, tmp_path):
    noisy = scenes(size=(12, 16), train=6, validation=3, test=4, tasks=["segmentation", "depth"], noise=True)
    folder = pseudo_label(rooms, tmp_path, Teacher("tokens"), kind="tokens")
    both = with_pseudo(noisy, {"guess": folder})
    assert [task.name for task in both.tasks] == ["segmentation", "depth", "noise", "guess"]
    alone = with_pseudo(rooms, {"guess": folder})
    for batch, other in zip(both.train.batches(3), alone.train.batches(3), strict=True):
        assert torch.equal(batch.targets["guess"], other.targets["guess"])
        assert set(batch.targets) == {"segmentation", "depth", "noise", "guess"}


def test_whole_images_have_soft_labels_only(tmp_path):
    data = digits(train=6, validation=3, test=3)
    folder = pseudo_label(data, tmp_path / "soft", lambda x: torch.full((len(x), 4), 0.25), kind="soft")
    assert with_pseudo(data, {"guess": folder}).train[0].targets["guess"].shape == (1, 4)
    folder = pseudo_label(data, tmp_path / "tokens", lambda x: torch.full((len(x), 4, 6, 6), 0.25), kind="tokens")
    with pytest.raises(ValueError, match="labels whole images, and so may its pseudo tasks"):
        with_pseudo(data, {"guess": folder})


def test_from_names_alone(tmp_path):
    options = {"size": [12, 16], "train": 6, "validation": 3, "test": 4, "tasks": ["depth"]}
    pseudo_label(scenes(**options), tmp_path, Teacher("tokens"), kind="tokens")
    build = plugins.find("datasets", "pseudo")
    data = build({"name": "scenes", **options}, {"guess": str(tmp_path)})
    assert [task.name for task in data.tasks] == ["depth", "guess"]
    with pytest.raises(ValueError, match="of: the dataset to add pseudo tasks to has no name"):
        build({"size": [12, 16]}, {})
    with pytest.raises(MissingKey, match="no installed package offers a dataset 'rooms'"):
        build("rooms", {})


@pytest.mark.parametrize("kind", ["segmentation", "soft", "tokens"])
def test_a_plain_loop_trains_on_them(rooms, tmp_path, kind):
    data = with_pseudo(rooms, {"guess": pseudo_label(rooms, tmp_path, Teacher(kind), kind=kind)})
    torch.manual_seed(0)
    heads = {task.name: nn.Conv2d(8, rooms.outputs[task.name], 1) for task in rooms.tasks}
    model = SplitModel(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), heads)
    added = ExtraTasks((data.tasks[-1], nn.Conv2d(8, data.outputs["guess"], 1)))
    step = Step(model, rooms.tasks, Method(augment=added, encoder=Uncertainty(data.tasks)))
    optimizer = torch.optim.Adam(step.parameters(), lr=0.05)
    losses = []
    for epoch in range(40):
        for batch in data.train.batches(6, epoch=epoch):
            optimizer.zero_grad()
            losses.append(step.backward(batch).losses["guess"].item())
            optimizer.step()
    # The entropy of the teacher's labels is what no loss goes below.
    labels = data.train[range(6)].targets["guess"]
    least = 0 if kind == "segmentation" else torch.special.entr(labels).sum(dim=1).mean().item()
    assert sum(losses[-4:]) - 4 * least < 0.6 * (sum(losses[:4]) - 4 * least)
    assert list(step.export().heads) == ["depth"]
    picture = data.views["guess"].image(data.test[0].targets["guess"][0])
    assert picture.ndim == 3
    assert data.views["guess"].image(model.with_heads({"guess": added.heads[0][1]})(batch.inputs)["guess"][0]).any()
