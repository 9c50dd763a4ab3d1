"""CelebA's tree as its authors and as torchvision keep it, tiny, sound and hostile."""

from functools import partial
from itertools import pairwise

import numpy
import pytest
import torch
from PIL import Image
from sidetask_datasets import DataError, cache
from sidetask_datasets.adapter import find_source
from sidetask_datasets.cache import prepare
from sidetask_datasets.celeba import ATTRIBUTES, TASKS, _evenly, celeba, celeba_source

SPLITS = [0] * 20 + [1] * 10 + [2] * 5


def write_tree(root, layout):
    base, anno, evaluation, img = {
        "authors": (root, "Anno", "Eval", "Img"),
        "torchvision": (root / "celeba", "", "", ""),
    }[layout]
    folder = base / img / "img_align_celeba"
    for path in (folder, base / anno, base / evaluation):
        path.mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(0)
    labels = generator.integers(0, 2, (len(SPLITS), 40))
    names = [f"{i + 1:06}.jpg" for i in range(len(SPLITS))]
    for i, name in enumerate(names):
        Image.fromarray(numpy.full((218, 178, 3), 7 * i, numpy.uint8)).save(folder / name, quality=95)
    rows = [f"{name}  " + " ".join(f"{2 * v - 1:2}" for v in row) for name, row in zip(names, labels, strict=True)]
    (base / anno / "list_attr_celeba.txt").write_text(
        "\n".join([str(len(names)), " ".join(ATTRIBUTES) + " ", *rows]) + "\n"
    )
    (base / evaluation / "list_eval_partition.txt").write_text(
        "".join(f"{name} {split}\n" for name, split in zip(names, SPLITS, strict=True))
    )
    return labels


@pytest.fixture
def tree(tmp_path):
    return tmp_path, write_tree(tmp_path, "authors")


def brightness(split):
    return [round(value / 7) for value in split.inputs.data.float().mean(dim=(1, 2, 3)).tolist()]


@pytest.mark.parametrize("layout", ["authors", "torchvision"])
def test_what_was_written_is_read(tmp_path, layout):
    labels = write_tree(tmp_path, layout)
    data = celeba(tmp_path, size=None, share=1.0)
    assert [task.name for task in data.tasks] == list(ATTRIBUTES[:9]) == list(TASKS)
    assert data.input_shape == (3, 218, 178)
    for split, ids in ((data.train, range(20)), (data.validation, range(20, 30)), (data.test, range(30, 35))):
        assert brightness(split) == list(ids)
        batch = split[range(len(ids))]
        for place, name in enumerate(TASKS):
            assert batch.targets[name].tolist() == labels[list(ids), place].tolist()


def test_a_tenth_of_train_and_validation_lies_evenly_and_the_test_split_is_whole(tree):
    data = celeba(tree[0])
    assert (len(data.train), len(data.validation), len(data.test)) == (2, 1, 5)
    assert brightness(data.train) == [9, 19]
    assert data.input_shape == (3, 64, 64)
    half = celeba_source(tree[0], share=0.5)
    assert [len(half.splits[split]) for split in ("train", "validation", "test")] == [10, 5, 5]
    with pytest.raises(ValueError, match="share is above 0 and at most 1, found 0"):
        celeba(tree[0], share=0)


@pytest.mark.parametrize("share", [0.1, 0.29, 0.3, 0.7, 1 / 3, 1.0])
def test_a_share_is_neither_more_nor_less(share):
    names = [str(index) for index in range(16277)]
    chosen = [int(name) for name in _evenly(names, share)]
    assert len(chosen) == int(16277 * share + 1e-9)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert gaps <= {int(1 / share), int(1 / share) + 1}


def test_every_attribute_is_a_task_of_two_classes(tree):
    root, labels = tree
    data = celeba(root, ["Young", "Bald"], primary=["Young"], size=(8, 8), share=1.0)
    assert [(task.name, task.primary) for task in data.tasks] == [("Young", True), ("Bald", False)]
    batch = next(data.train.batches(10, shuffle=False))
    assert batch.targets["Young"].tolist() == labels[:10, 39].tolist()
    for task in data.tasks:
        loss, count = task.mean(torch.zeros(10, 2), batch.target_of(task))
        assert (round(loss.item(), 4), count) == (0.6931, 10)
        assert list(task.metrics) == ["accuracy", "F1"]


def fails(root, message, **options):
    with pytest.raises(DataError, match=message):
        celeba(root, **{"size": (4, 4), "share": 1.0, **options})


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (
            "Eval/list_eval_partition.txt",
            "../../secret.jpg 0",
            "line 3: '../../secret.jpg' is not the name of an image",
        ),
        ("Eval/list_eval_partition.txt", "000001.jpg 0", "line 3: '000001.jpg' is there already"),
        ("Eval/list_eval_partition.txt", "000003.jpg 3", "line 3: expected 0, 1 or 2 after the name"),
        ("Eval/list_eval_partition.txt", "000099.jpg 0", "has no line for 000099.jpg"),
        ("Anno/list_attr_celeba.txt", "000001.jpg 1 -1", "line 3: expected 40 times 1 or -1 after the name"),
        ("Anno/list_attr_celeba.txt", "/etc/passwd" + 40 * " 1", "line 3: '/etc/passwd' is not the name of an image"),
        ("Anno/list_attr_celeba.txt", "000001.jpg" + 40 * " 2", "line 3: expected 40 times 1 or -1 after the name"),
        ("Anno/list_attr_celeba.txt", "", "says that it has '35' images, and has 34"),
    ],
)
def test_lines_are_checked(tree, file, line, message):
    path = tree[0] / file
    lines = path.read_text().splitlines()
    lines[2] = line
    path.write_text("\n".join(lines))
    fails(tree[0], message)


def test_all_bad_lines_of_both_lists_are_named_together(tree):
    attributes, partition = tree[0] / "Anno/list_attr_celeba.txt", tree[0] / "Eval/list_eval_partition.txt"
    for path, changes in (
        (attributes, {2: "One Two", 3: "000001.jpg 1", 5: "a/b.jpg" + 40 * " 1"}),
        (partition, {1: "000001.jpg", 4: "000002.jpg 0"}),
    ):
        lines = path.read_text().splitlines()
        for number, line in changes.items():
            lines[number - 1] = line
        path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        celeba_source(tree[0])
    assert caught.value.problems == (
        f"{attributes}, line 2: expected the names of CelebA's 40 attributes",
        f"{attributes}, line 3: expected 40 times 1 or -1 after the name",
        f"{attributes}, line 5: 'a/b.jpg' is not the name of an image",
        f"{partition}, line 1: expected 0, 1 or 2 after the name",
        f"{partition}, line 4: '000002.jpg' is there already",
    )
    for nothing in ("", "0\n", "0\n\n"):
        attributes.write_text(nothing)
        fails(tree[0], "line 2: expected the names of CelebA's 40 attributes")


def test_files_are_checked(tree):
    root, _ = tree
    folder = root / "Img" / "img_align_celeba"
    Image.fromarray(numpy.zeros((10, 12, 3), numpy.uint8)).save(folder / "000007.jpg")
    whole = (folder / "000008.jpg").read_bytes()
    (folder / "000008.jpg").write_bytes(whole[: len(whole) // 2])
    fails(
        root,
        r"000007\.jpg: expected 218×178 pixels, found 10×12 \(and 1 more problems\)\n.*000008\.jpg: cannot be decoded",
    )
    (folder / "000007.jpg").unlink()
    (folder / "000008.jpg").unlink()
    (folder / "000008.jpg").symlink_to(folder / "000008.jpg")
    fails(root, r"000007\.jpg: no such file \(and 1 more problems\)\n.*000008\.jpg: no such file")
    (root / "Anno" / "list_attr_celeba.txt").write_bytes(b"\xff\xfe\x00\n")
    fails(root, r"list_attr_celeba\.txt: cannot be read as text")
    (root / "Anno" / "list_attr_celeba.txt").write_text("3\nOne Two\n")
    fails(root, r"list_attr_celeba\.txt, line 2: expected the names of CelebA's 40 attributes")
    (root / "Eval" / "list_eval_partition.txt").unlink()
    fails(root, r"list_eval_partition\.txt: no such file")
    fails(root / "nowhere", r"nowhere: holds neither Anno/list_attr_celeba\.txt")


def test_all_names_are_looked_for_whatever_the_share_and_surplus_files_are_named(tree):
    root, _ = tree
    folder = root / "Img" / "img_align_celeba"
    source = celeba_source(root, share=0.1)
    taken = {sample["image"][0].name for samples in source.splits.values() for sample in samples}
    lost = next(path for path in sorted(folder.iterdir()) if path.name not in taken)
    lost.unlink()
    (folder / "999999.jpg").write_bytes(b"")
    assert celeba_source(root, share=0.1).problems == [
        f"{lost}: no such file",
        f"{folder / '999999.jpg'}: does not belong here; no list names it",
    ]


def test_a_list_without_a_test_split_is_refused_when_it_is_prepared(tree):
    path = tree[0] / "Eval" / "list_eval_partition.txt"
    path.write_text(path.read_text().replace(" 2\n", " 1\n"))
    with pytest.raises(DataError, match="the split 'test' is empty"):
        prepare(celeba_source(tree[0], size=(4, 4), share=1.0))


def test_damaged_lists_are_data_errors_whatever_the_damage(tree):
    root, _ = tree
    generator = numpy.random.default_rng(0)
    for path in (root / "Anno" / "list_attr_celeba.txt", root / "Eval" / "list_eval_partition.txt"):
        whole, errors = path.read_bytes(), 0
        for _ in range(40):
            broken = bytearray(whole)
            for place in generator.integers(0, len(broken), 3):
                broken[place] = generator.integers(0, 256)
            path.write_bytes(broken)
            try:
                errors += bool(celeba_source(root).problems)
            except DataError:
                errors += 1
        assert errors > 25
        path.write_bytes(whole)


def test_nothing_is_fetched_unless_asked(tmp_path, monkeypatch):
    import torchvision.datasets

    calls = []

    def fetch(root, split, download):
        calls.append((root, split, download))
        write_tree(tmp_path, "torchvision")

    monkeypatch.setattr(torchvision.datasets, "CelebA", fetch)
    fails(tmp_path, "holds neither")
    assert not calls
    assert len(celeba(tmp_path, size=(4, 4), download=True).test) == 5
    assert calls == [(str(tmp_path), "all", True)]


def test_what_was_prepared_is_not_decoded_again(tree, monkeypatch):
    options = {"size": (4, 4), "share": 1.0, "primary": ["Bald"]}
    prepare(find_source(celeba, tree[0], options))
    monkeypatch.setattr(cache, "_decode", None)
    assert len(celeba(tree[0], **options).train)


def test_further_tasks_join_them(tree, check_further_tasks):
    check_further_tasks(partial(celeba, tree[0], size=(4, 4), share=0.3))
