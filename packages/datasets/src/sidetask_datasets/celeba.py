"""CelebA: photographs of faces, each attribute of which is a task of its own.

The tree, as its authors publish it or as torchvision keeps it (in a folder "celeba", without the folders between)::

    root/Anno/list_attr_celeba.txt        a count, the 40 names, then "NAME.jpg" and 40 times 1 or -1 a line
    root/Eval/list_eval_partition.txt     "NAME.jpg" and 0 (train), 1 (validation) or 2 (test) a line
    root/Img/img_align_celeba/NAME.jpg    aligned and cropped, 218×178
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from sidetask_datasets import tasks as task_kinds
from sidetask_datasets.adapter import MEAN, STD, Folder, Target, read_dataset
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import SPLITS, Dataset, check_seed, check_size, check_switches, choose, choose_primary
from sidetask_datasets.files import DataError, each_line, is_file, is_folder, listed, missing, read_picture, together
from sidetask_datasets.noise import with_noise
from sidetask_datasets.source import Field, Source
from sidetask_datasets.view import View

ATTRIBUTES = (
    "5_o_Clock_Shadow",
    "Arched_Eyebrows",
    "Attractive",
    "Bags_Under_Eyes",
    "Bald",
    "Bangs",
    "Big_Lips",
    "Big_Nose",
    "Black_Hair",
    "Blond_Hair",
    "Blurry",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Chubby",
    "Double_Chin",
    "Eyeglasses",
    "Goatee",
    "Gray_Hair",
    "Heavy_Makeup",
    "High_Cheekbones",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Narrow_Eyes",
    "No_Beard",
    "Oval_Face",
    "Pale_Skin",
    "Pointy_Nose",
    "Receding_Hairline",
    "Rosy_Cheeks",
    "Sideburns",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Earrings",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Necklace",
    "Wearing_Necktie",
    "Young",
)
TASKS = ATTRIBUTES[:9]
ORIGINAL = (218, 178)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}\.jpg")


def celeba(
    root: Folder,
    tasks: Sequence[str] = TASKS,
    *,
    size: Sequence[int] | None = (64, 64),
    share: float = 0.1,
    primary: Iterable[str] | None = None,
    seed: int = 0,
    noise: bool = False,
    download: bool = False,
    cache: Folder | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """A binary classification for each attribute: does this face have it?

    Args:
        root: the folder.
        tasks: among the 40 attributes; the first nine by default, as in SAAL.
        size: height and width to bring images to, by averaging; None: 218×178, as they are. 64×64 in Sener and Koltun,
            "Multi-task learning as multi-objective optimization" (NeurIPS 2018).
        share: of the training and of the validation images, evenly over their list; 0.1 in SAAL. The test split is
            whole.
        primary: the tasks that count; None for all.
        seed: of `noise`; the files say what is in which split.
        noise: add an auxiliary task "noise", see `with_noise`.
        download: let torchvision fetch what is missing into `root`.
        cache: where decoded images are kept, see `cache.cache_folder`.
        device: where the images live.

    Raises:
        DataError: beginning with the path of the file at fault: a list or image that is missing or damaged, an image of
            another size, a line that is not as above, a name that could leave the folder. All problems of the lists
            come together, and all of the images.
        ValueError: for an unknown task, a share outside 0 to 1, or a switch that is neither true nor false.
    """
    names = choose("task", tasks, ATTRIBUTES)
    wanted = choose_primary(primary, names)
    check_seed(seed)
    check_switches(noise=noise, download=download)
    if download:
        _fetch(Path(root))
    source, labels = _find(root, size, share)
    view = View("label", classes=("no", "yes"))
    targets = [Target(task_kinds.classification(name, 2, name in wanted), 2, view) for name in names]
    data = read_dataset(source, targets, dense=False, cache=cache)
    places = {name: ATTRIBUTES.index(name) for name in names}
    splits = {}
    for split in SPLITS:
        rows = torch.from_numpy(numpy.stack([labels[sample["image"][0].name] for sample in source.splits[split]]))
        columns = {name: Column(rows[:, place].contiguous(), "label") for name, place in places.items()}
        splits[split] = getattr(data, split).with_targets(columns)
    data = replace(data, **splits)
    return (with_noise(data, seed) if noise else data).to(device)


def celeba_source(root: Folder, *, size: Sequence[int] | None = (64, 64), share: float = 0.1) -> Source:
    """The images of `celeba`, which says what the arguments are and what is raised."""
    return _find(root, size, share)[0]


def read_face(path: Path, *, shape: tuple[int, int]) -> NDArray[Any]:
    """A photograph, ``[3, H, W]`` uint8."""
    return read_picture(path, "colour", shape, ORIGINAL).transpose(2, 0, 1)


def _find(root: Folder, size: Sequence[int] | None, share: float) -> tuple[Source, dict[str, NDArray[numpy.int16]]]:
    """The images, and the labels of all of them by name."""
    shape = check_size(size) or ORIGINAL
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is above 0 and at most 1, found {share!r}")
    root = Path(root)
    attributes, partition, folder = _layout(root)
    labels, lists = together(partial(_labels, attributes), partial(_partition, partition))
    named = {name for names in lists.values() for name in names}
    problems = [f"{attributes}: has no line for {name}" for name in sorted(named - labels.keys())]
    problems += [f"{partition}: has no line for {name}" for name in sorted(labels.keys() - named)]
    for split in ("train", "validation"):
        lists[split] = _evenly(lists[split], share)
    there = set(listed(folder))
    problems += [f"{folder / name}: no such file" for name in sorted(named - there)]
    problems += [f"{folder / name}: does not belong here; no list names it" for name in sorted(there - named)]
    problems += missing(folder / name for split in lists.values() for name in split if name in there)
    source = Source(
        name="celeba",
        root=root,
        fields={"image": Field("image", (3, *shape), "uint8", partial(read_face, shape=shape), MEAN, STD)},
        splits={split: [{"image": (folder / name,)} for name in names] for split, names in lists.items()},
        settings={"size": shape},
        problems=problems,
    )
    return source, labels


def _evenly(names: Sequence[str], share: float) -> list[str]:
    """That share of them: each at which its count, rounded down, grows."""
    # The small number is for products such as 2.9999999999999996.
    counts = [int(index * share + 1e-9) for index in range(len(names) + 1)]
    return [name for index, name in enumerate(names) if counts[index] < counts[index + 1]]


def _layout(root: Path) -> tuple[Path, Path, Path]:
    """The list of attributes, the list of splits, the folder of images."""
    for base in (root, root / "celeba"):
        for anno, evaluation, img in (("Anno", "Eval", "Img"), ("", "", "")):
            attributes, partition = base / anno / "list_attr_celeba.txt", base / evaluation / "list_eval_partition.txt"
            folder = base / img / "img_align_celeba"
            if is_file(attributes):
                if not is_file(partition):
                    raise DataError(f"{partition}: no such file")
                if not is_folder(folder):
                    raise DataError(f"{folder}: no such folder")
                return attributes, partition, folder
    raise DataError(f"{root}: holds neither Anno/list_attr_celeba.txt nor celeba/list_attr_celeba.txt")


def _labels(path: Path) -> dict[str, NDArray[numpy.int16]]:
    """Image name to its 40 labels, 1 or 0."""
    head: dict[int, str] = {}
    found: dict[str, NDArray[numpy.int16]] = {}
    values = {"1": 1, "-1": 0}
    names = f"expected the names of CelebA's {len(ATTRIBUTES)} attributes"

    def take(number: int, line: str) -> None:
        name, *words = line.split()
        if number <= 2:
            head[number] = line
            if number == 2 and (name, *words) != ATTRIBUTES:
                raise ValueError(names)
            return
        _check_name(name, found)
        if len(words) != len(ATTRIBUTES) or not all(word in values for word in words):
            raise ValueError(f"expected {len(ATTRIBUTES)} times 1 or -1 after the name")
        found[name] = numpy.array([values[word] for word in words], numpy.int16)

    each_line(path, take)
    if 2 not in head:
        raise DataError(f"{path}, line 2: {names}")
    if head.get(1) != str(len(found)):
        raise DataError(f"{path}: says that it has {head.get(1, '')[:20]!r} images, and has {len(found)}")
    return found


def _partition(path: Path) -> dict[str, list[str]]:
    """For each split the names of its images."""
    found: dict[str, str] = {}

    def take(_: int, line: str) -> None:
        name, *words = line.split()
        _check_name(name, found)
        if words not in (["0"], ["1"], ["2"]):
            raise ValueError("expected 0, 1 or 2 after the name")
        found[name] = SPLITS[int(words[0])]

    each_line(path, take)
    return {split: [name for name, own in found.items() if own == split] for split in SPLITS}


def _check_name(name: str, seen: Container[str]) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of an image")
    if name in seen:
        raise ValueError(f"{name!r} is there already")


def _fetch(root: Path) -> None:
    from torchvision.datasets import CelebA

    CelebA(str(root), split="all", download=True)
