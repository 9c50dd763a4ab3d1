import pytest
import torch
from sidetask_datasets import (
    Column,
    Dataset,
    JoinedSplit,
    ResidentSplit,
    View,
    describe,
    digits,
    scenes,
    sheet,
    tasks,
    with_noise,
)


def split(**columns):
    image = torch.zeros(len(next(iter(columns.values()))), 3, 2, 2, dtype=torch.uint8)
    return ResidentSplit(Column(image, "image"), columns)


def made(kinds, views, train, other, **options):
    return Dataset(
        name="made",
        tasks=kinds,
        train=train,
        validation=other,
        test=other,
        outputs={task.name: 1 for task in kinds},
        views=views,
        input_view=View("image"),
        dense=True,
        **options,
    )


def test_labels_are_counted_by_hand():
    def columns(ids, metres, edges):
        return {
            "classes": Column(torch.tensor(ids, dtype=torch.uint8).view(-1, 2, 2), "classes"),
            "depth": Column(torch.tensor(metres).view(-1, 2, 2), "depth"),
            "normals": Column(
                torch.tensor([0, 0, -9, 0, 4, 0, 0, 0, 0, 3, 0, 4])[:, None]
                .expand(12, 4)
                .reshape(4, 3, 2, 2)[: len(ids) // 4]
                .to(torch.int16),
                "normals",
            ),
            "edges": Column(torch.tensor(edges, dtype=torch.uint8).view(-1, 2, 2), "binary"),
        }

    data = made(
        (tasks.segmentation("classes", 3), tasks.depth(), tasks.normals(), tasks.edges()),
        {
            "classes": View("classes", classes=("a", "b", "c")),
            "depth": View("scalar"),
            "normals": View("normals"),
            "edges": View("binary"),
        },
        split(**columns([0, 0, 0, 0, 1, 1, 255, 255], [0.0, 1.0, 2.0, 3.0] * 2, [0, 0, 0, 1] * 2)),
        split(**columns([2, 2, 2, 255], [0.0] * 3 + [5.0], [255] * 4)),
    )
    # One by one and all at once.
    for batch_size in (1, 64):
        found = describe(data, batch_size)
        assert found["classes"]["train"] == {"a": 0.5, "b": 0.25, "c": 0.0, "unlabelled": 0.25}
        assert found["classes"]["test"] == {"a": 0.0, "b": 0.0, "c": 0.75, "unlabelled": 0.25}
        assert found["depth"]["train"] == {"least": 1.0, "mean": 2.0, "greatest": 3.0, "unlabelled": 0.25}
        assert found["depth"]["validation"] == {"least": 5.0, "mean": 5.0, "greatest": 5.0, "unlabelled": 0.75}
        assert found["normals"]["train"] == pytest.approx({"x": 0.0, "y": 0.5, "z": -0.5, "unlabelled": 0.0})
        assert found["edges"]["train"] == {"no": 0.75, "yes": 0.25, "unlabelled": 0.0}
        assert found["edges"]["test"] == {"no": 0.0, "yes": 0.0, "unlabelled": 1.0}


def test_labels_of_images_distributions_and_numbers():
    soft = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.25, 0.5, 0.25]]).half()
    one = split(
        soft=Column(soft, "soft"),
        kind=Column(torch.tensor([0, 1, 1, -1], dtype=torch.int16), "label"),
        action=Column(torch.tensor([[-1.0, 3.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), "vector"),
    )
    kinds = (tasks.distribution("soft"), tasks.classification("kind", 2), tasks.regression("action"))
    views = {
        "soft": View("distribution", classes=("a", "b", "c")),
        "kind": View("label", classes=("no", "yes")),
        "action": View("vector"),
    }
    found = describe(made(kinds, views, one, one))
    assert found["soft"]["train"] == {"a": 0.25, "b": 0.5, "c": 0.0, "unlabelled": 0.25}
    assert found["kind"]["train"] == {"no": 0.25, "yes": 0.5, "unlabelled": 0.25}
    assert found["action"]["train"] == {"least": -1.0, "mean": 0.25, "greatest": 3.0, "unlabelled": 0.0}


def test_noise_is_what_it_is_said_to_be():
    found = describe(with_noise(scenes(size=(12, 16), train=40, validation=2, test=2, tasks=["depth"])))
    noise = found["noise"]["train"]
    assert 0 <= noise["least"] < 0.01
    assert 0.99 < noise["greatest"] < 1
    assert noise["mean"] == pytest.approx(0.5, abs=0.02)
    assert noise["unlabelled"] == 0


def test_a_sheet_has_a_row_for_each_sample_of_each_split():
    data = scenes(size=(12, 16), train=5, validation=3, test=1, tasks=["depth", "normals"])
    picture = sheet(data, samples=2, gap=1)
    assert picture.shape == ((2 + 2 + 1) * 13 - 1, 3 * 17 - 1, 3)
    # Evenly: the second and the fourth of five.
    assert (picture[:12, :16] == data.show_input(data.train[1].inputs[0])).all()
    assert (picture[13:25, 17:33] == data.views["depth"].image(data.train[3].targets["depth"][0])).all()
    assert (picture[52:, 34:] == data.views["normals"].image(data.test[0].targets["normals"][0])).all()
    with pytest.raises(ValueError, match="samples is at least 1, found 0"):
        sheet(data, samples=0)


def test_domains_are_described_each_with_its_own_input():
    def domain(name, count):
        labels = Column(torch.arange(count, dtype=torch.int16) % 2, "label")
        return ResidentSplit(Column(torch.full((count, 3, 2, 2), 7, dtype=torch.uint8), "image"), {name: labels})

    joined = JoinedSplit({"a": domain("a", 4), "b": domain("b", 2)})
    kinds = tuple(
        type(task)(**{**vars(task), "input": task.name})
        for task in (tasks.classification("a", 2), tasks.classification("b", 2))
    )
    views = {name: View("label", classes=("x", "y"), size=(2, 2)) for name in "ab"}
    data = made(kinds, views, joined, joined)
    assert describe(data, 3)["b"]["train"] == {"x": 0.5, "y": 0.5, "unlabelled": 0.0}
    # Samples 1 and 3: domain b has run out at 3.
    picture = sheet(data, samples=2, gap=0)
    assert (picture[:2, 4:6] == 7).all()
    assert (picture[2:4, 4:] == 255).all()


def test_shares_of_the_scans_are_those_of_ten_digits():
    shares = describe(digits(train=500, validation=2, test=2))["top_left"]["train"]
    assert len(shares) == 11
    assert all(0.03 < shares[str(digit)] < 0.2 for digit in range(10))
