"""Labels of another model: written once, checked as they are read, moved with the images."""

from dataclasses import replace

import numpy
import pytest
import torch
from sidetask_core import ExtraTasks, Method, MissingKey, SplitModel, Step, Uncertainty, plugins
from sidetask_datasets import (
    DataError,
    JoinedSplit,
    digit_domains,
    digits,
    pseudo_label,
    scenes,
    thresholded,
    with_noise,
    with_pseudo,
)
from sidetask_datasets.dataset import SPLITS
from sidetask_datasets.losses import distributed, soft_cross_entropy
from sidetask_datasets.metrics import Agreement
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


CACHED = {"kind": "segmentation", "threshold": 0.3, "source": "one network"}


@pytest.mark.parametrize(
    ("changes", "found", "expected"),
    [
        ({"threshold": 0.4}, "segmentation above 0.3 of one network", "segmentation above 0.4 of one network"),
        ({"source": "another"}, "segmentation above 0.3 of one network", "segmentation above 0.3 of another"),
        ({"source": None}, "segmentation above 0.3 of one network", "segmentation above 0.3"),
        ({"kind": "tokens"}, "segmentation above 0.3 of one network", "tokens of one network"),
    ],
)
def test_labels_that_were_made_otherwise_are_refused(rooms, tmp_path, changes, found, expected):
    pseudo_label(rooms, tmp_path, Teacher("segmentation"), **CACHED)
    pseudo_label(rooms, tmp_path, Teacher("segmentation"), **CACHED)
    asked = {**CACHED, **changes}
    with pytest.raises(DataError, match=f"train.npz: holds {found}, not {expected}; label into another folder"):
        pseudo_label(rooms, tmp_path, Teacher(asked["kind"]), **asked)
    with_pseudo(rooms, {"guess": tmp_path})


def test_labels_of_another_hand_are_not_added_to(rooms, write):
    folder = write()
    (folder / "test.npz").unlink()
    with pytest.raises(DataError, match=r"train.npz: holds labels made elsewhere, not segmentation above 0.5"):
        pseudo_label(rooms, folder, Teacher("segmentation"))


class Module(nn.Module):
    """A network with parts of either mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Dropout(0.5), nn.Softmax(dim=1))
        self.layers[2].eval()
        self.fails = False

    def forward(self, images):
        assert not any(module.training for module in self.modules())
        if self.fails:
            raise RuntimeError("no labels today")
        return self.layers(images)


def test_a_module_labels_in_evaluation_mode_and_is_known_by_what_it_learned(rooms, tmp_path):
    torch.manual_seed(0)
    module = Module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    pseudo_label(rooms, tmp_path, module, threshold=0.2)
    assert [part.training for part in module.modules()] == modes
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    pseudo_label(rooms, tmp_path, module, threshold=0.2)
    other = Module()
    other.load_state_dict(before)
    pseudo_label(rooms, tmp_path, other, threshold=0.2)
    with torch.no_grad():
        module.layers[0].bias[0] += 1e-6
    with pytest.raises(DataError, match=r"train.npz: holds .* of Module [0-9a-f]{8}, not .* of Module [0-9a-f]{8};"):
        pseudo_label(rooms, tmp_path, module, threshold=0.2)
    module.fails = True
    with pytest.raises(RuntimeError, match="no labels today"):
        pseudo_label(rooms, tmp_path / "other", module)
    assert [part.training for part in module.modules()] == modes


def constant(*values):
    """A teacher that says the same of every pixel."""
    return lambda x: torch.tensor(values)[None, :, None, None].expand(len(x), -1, *x.shape[-2:])


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (constant(1.0, 2.0), {}, "probabilities, at least 0, with sum 1 over the classes; found a sum of 3"),
        (constant(-0.5, 1.5), {}, "at least 0, with sum 1 over the classes; found -0.5"),
        (constant(numpy.nan, 1.0), {}, "found a sum of nan"),
        (constant(numpy.inf, 1.0), {}, "found a sum of inf"),
        (constant(-1.0, 1.0), {}, "found -1"),
        (lambda x: [0.5, 0.5], {}, "gives a floating tensor of probabilities, found list"),
        (lambda x: torch.ones(len(x), 1, 12, 16, dtype=torch.long), {}, "floating tensor .* found torch.int64"),
        (lambda x: torch.ones(len(x), 0), {"kind": "soft"}, "of kind 'soft' has classes, at most 255, found 0"),
        (lambda x: torch.full((len(x), 256, 12, 16), 1 / 256), {}, "has classes, at most 255, found 256"),
        (
            lambda x: torch.full((len(x), 2, 5, 4), 0.5),
            {"kind": "tokens"},
            "patches that divide images of 12×16 pixels, found 5×4 patches",
        ),
        (
            lambda x: torch.full((len(x), len(x), 12, 16), 1 / len(x)),
            {"batch_size": 4},
            "a teacher has one number of classes, found 4 and then 2",
        ),
        (
            lambda x: torch.full((len(x), len(x)), 1 / len(x)),
            {"kind": "soft"},
            "a teacher has one number of classes, found 6 and then 3",
        ),
        *(
            (constant(0.5, 0.5), {"threshold": threshold}, "threshold is a probability, at least 0 and below 1, not")
            for threshold in (1.0, -0.1, numpy.nan, "0.5", True)
        ),
    ],
)
def test_what_is_no_probability_is_not_written(rooms, tmp_path, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        pseudo_label(rooms, tmp_path, teacher, **options)
    assert not (tmp_path / "validation.npz").exists()


def test_a_teacher_may_abstain(rooms, tmp_path):
    folder = pseudo_label(rooms, tmp_path / "soft", lambda x: torch.zeros(len(x), 3), kind="soft")
    assert not with_pseudo(rooms, {"guess": folder}).train[0].targets["guess"].any()
    folder = pseudo_label(rooms, tmp_path / "pixels", constant(0.0, 0.0), threshold=0)
    assert (with_pseudo(rooms, {"guess": folder}).train[0].targets["guess"] == -1).all()


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
    tokens = torch.rand(2, 5, 3, 4, generator=generator).softmax(dim=1)
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


def test_tokens_beside_unlabelled_ones_stay_distributions():
    """Cropped, a patch mixes with its neighbours: of the labelled ones alone, if they are half of it."""
    from sidetask_datasets import Augmentation

    tokens = torch.randn(4, 5, 4, 4, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    tokens[..., 2:] = 0
    places = torch.tensor([0.0, 0.3, 0.5, 0.9])
    numbers = torch.stack([torch.zeros(4), torch.zeros(4), places, torch.ones(4)], dim=1)
    crop = Augmentation(scales=(1.5,), flip=0.0)
    found = crop(torch.zeros(4, 3, 16, 16), {"t": tokens}, {"t": "tokens"}, numbers)[1]["t"]
    # Between which columns the centres of the new ones lie; the last labelled column is 1.
    at = (4 - 4 / 1.5) * places[:, None] + 4 / 1.5 * (torch.arange(4) + 0.5) / 4 - 0.5
    labelled = (2 - at).clamp(0, 1)
    assert ((labelled > 0.5) & (labelled < 1)).any()
    assert ((labelled > 0) & (labelled < 0.5)).any()
    kept = (labelled >= 0.5).float()[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(found.sum(dim=1), kept)
    edge = crop(torch.zeros(4, 3, 16, 16), {"t": tokens[..., [0, 1, 1, 1]]}, {"t": "tokens"}, numbers)[1]["t"]
    torch.testing.assert_close(found, edge * kept[:, None])


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
        ({"classes": 4.5}, r"'classes' is a whole number, found float64 \[\]"),
        ({"classes": numpy.arange(3)}, r"'classes' is a whole number, found int64 \[3\]"),
        ({"classes": 0}, "'classes' is at least 1 and at most 255, found 0"),
        ({"classes": -3}, "'classes' is at least 1 and at most 255, found -3"),
        ({"classes": 256}, "'classes' is at least 1 and at most 255, found 256"),
        ({"images": numpy.arange(3)}, r"'images' is a whole number, found int64 \[3\]"),
        ({"images": "abc"}, r"'images' is a whole number, found <U3 \[\]"),
        ({"images": 0.5}, r"'images' is a whole number, found float64 \[\]"),
        ({"labels": numpy.zeros((6, 0), numpy.float32)}, r"labels \[6, 0\] are empty"),
        ({"labels": numpy.zeros((6, 3, 0, 0), numpy.float32)}, r"labels \[6, 3, 0, 0\] are empty"),
        ({"labels": numpy.uint8(3)}, r"labels \[\] of a split of 6 samples"),
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
    with path.open("wb") as file:
        numpy.save(file, numpy.zeros((3, 12, 16), numpy.uint8))
    with pytest.raises(DataError, match=r"validation.npz: cannot be read as an archive of arrays: it holds a single"):
        with_pseudo(rooms, {"guess": folder})


def test_whatever_byte_is_damaged_the_file_is_named(rooms, write):
    """Above all those of the directory: flags, versions and kinds of compression that zip files may have."""
    folder = write()
    path = folder / "train.npz"
    whole = path.read_bytes()
    directory = whole.rindex(b"PK\1\2")
    said = []
    for place in (*range(40), *range(directory, len(whole))):
        for value in (1, 99, 255):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                with_pseudo(rooms, {"guess": folder})
            except DataError as error:
                said.append(str(error))
    assert len(said) > 50
    assert all(message.startswith(str(path)) for message in said)


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
    for kind in ("tokens", "segmentation"):
        with pytest.raises(ValueError, match="'digits' labels whole images, and so may its pseudo tasks: kind 'soft'"):
            pseudo_label(data, tmp_path / kind, lambda x: torch.full((len(x), 4, 6, 6), 0.25), kind=kind)
        assert not (tmp_path / kind).exists()
    for name in SPLITS:
        numpy.savez(tmp_path / f"{name}.npz", labels=spread(len(getattr(data, name)), 4, 6, 6))
    with pytest.raises(ValueError, match="labels whole images, and so may its pseudo tasks"):
        with_pseudo(data, {"guess": tmp_path})


def of_domain(domains, folder, domain="high_36", **options):
    return pseudo_label(domains, folder, Teacher("soft"), domain=domain, kind="soft", **options)


@pytest.fixture
def domains():
    return digit_domains(train=6, validation=3, test=4, tasks=["low_0", "high_36"])


def test_labels_of_one_domain_are_of_its_images(domains, tmp_path):
    folders = {name: of_domain(domains, tmp_path / name, name) for name in ("high_36", "low_0")}
    data = with_pseudo(domains, {f"guess {name}": folder for name, folder in folders.items()})
    assert [(task.name, task.input) for task in data.tasks[2:]] == [
        ("guess high_36", "high_36"),
        ("guess low_0", "low_0"),
    ]
    assert stored(folders["low_0"], "test")["domain"] == "low_0"
    for name in SPLITS:
        for batch in getattr(data, name).batches(2, seed=3, augment=False):
            for domain, images in batch.inputs.items():
                with torch.no_grad():
                    expected = Teacher("soft")(images)
                torch.testing.assert_close(batch.targets[f"guess {domain}"], expected, rtol=0, atol=2e-3)


def test_pixels_of_one_domain_are_labelled_where_tasks_label_pixels(tmp_path):
    parts = {name: scenes(size=(12, 16), train=4, validation=2, test=2, tasks=[name]) for name in ("depth", "edges")}
    data = replace(
        parts["depth"],
        tasks=tuple(replace(part.tasks[0], input=name) for name, part in parts.items()),
        **{split: JoinedSplit({name: getattr(part, split) for name, part in parts.items()}) for split in SPLITS},
        outputs={"depth": 1, "edges": 1},
        views={name: part.views[name] for name, part in parts.items()},
    )
    folder = pseudo_label(data, tmp_path, Teacher("segmentation"), domain="edges", threshold=0.2)
    both = with_pseudo(with_noise(data), {"guess": folder})
    assert [task.input for task in both.tasks] == ["depth", "edges", "depth", "edges"]
    batch = next(both.train.batches(4))
    assert batch.targets["guess"].shape == (4, 12, 16)
    assert batch.targets["noise"].shape == (4, 1, 12, 16)


def test_labels_of_no_domain_or_another_are_named(domains, rooms, tmp_path):
    folder = of_domain(domains, tmp_path / "guess")
    with pytest.raises(ValueError, match="at least one domain is needed; there are: low_0, high_36"):
        pseudo_label(domains, tmp_path, Teacher("soft"), kind="soft")
    with pytest.raises(ValueError, match="unknown domain 'low_36'; there are: low_0, high_36"):
        of_domain(domains, tmp_path, "low_36")
    with pytest.raises(ValueError, match="dataset 'scenes' has no domain 'high_36': all tasks share one input"):
        of_domain(rooms, tmp_path)
    with pytest.raises(DataError, match=r"train.npz: holds labels of 'high_36', not of 'low_0'; label into another"):
        of_domain(domains, folder, "low_0")
    with pytest.raises(DataError, match=r"train.npz: holds labels of 'high_36'; 'scenes' has no domains: all tasks"):
        with_pseudo(rooms, {"guess": folder})
    fewer = digit_domains(train=6, validation=3, test=4, tasks=["low_0"])
    with pytest.raises(DataError, match=r"train.npz: holds labels of 'high_36'; 'digit_domains' has the domains low_0"):
        with_pseudo(fewer, {"guess": folder})
    others = digit_domains(train=6, validation=3, test=4, tasks=["low_0", "high_36"], seed=1)
    with pytest.raises(DataError, match=r"train.npz: its labels are of other images than those of 'digit_domains'"):
        with_pseudo(others, {"guess": folder})
    with pytest.raises(ValueError, match="dataset 'digit_domains' has a task 'low_0' already"):
        with_pseudo(domains, {"low_0": folder})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domain": "low_0", "images": None}, "holds labels of 'low_0', train.npz holds labels of 'high_36'"),
        ({"domain": None}, "does not say in 'domain' whose images its labels are of: low_0, high_36"),
        ({"domain": 3}, "holds labels of ''; 'digit_domains' has the domains low_0, high_36"),
        ({"labels": spread(2, 5)}, r"labels \[2, 5\] of a split of 3 samples"),
    ],
    ids=str,
)
def test_files_of_a_domain_that_do_not_fit_are_named(domains, tmp_path, changes, message):
    path = of_domain(domains, tmp_path) / "validation.npz"
    arrays = stored(tmp_path, "validation") | changes
    numpy.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(DataError, match=message) as caught:
        with_pseudo(domains, {"guess": tmp_path})
    assert str(caught.value).startswith(str(path))


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
    for of in (None, 3, ["scenes"]):
        with pytest.raises(TypeError, match="of: a dataset's name, or a mapping with its name and options, found"):
            build(of, {})
    for labels in (["guess"], "guess", {"guess": 3}, {3: "guess"}, None):
        with pytest.raises(TypeError, match="labels: a mapping of pseudo tasks' names to the folders of their labels"):
            build({"name": "scenes", **options}, labels)


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
