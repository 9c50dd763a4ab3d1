"""CIFAR-100 as twenty domains: each coarse class is a task of its own, which tells its five fine classes apart.

The tree, of either version that its authors publish::

    root/cifar-100-binary/{train,test}.bin              per image a coarse id, a fine id, 3 × 32 × 32 bytes
    root/cifar-100-binary/{coarse,fine}_label_names.txt one name a line

    root/cifar-100-python/{train,test,meta}             pickles, read without running anything that they ask for
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy
import torch
from numpy.typing import NDArray

from sidetask_datasets import draws
from sidetask_datasets import tasks as task_kinds
from sidetask_datasets.augment import Augmentation
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import Dataset, check_counts, check_seed, check_switches, choose, choose_primary
from sidetask_datasets.files import DataError, each_line, is_file, is_folder, together
from sidetask_datasets.joined import JoinedSplit
from sidetask_datasets.noise import with_noise
from sidetask_datasets.stored import ResidentSplit
from sidetask_datasets.view import View

TASKS = (
    "aquatic_mammals",
    "fish",
    "flowers",
    "food_containers",
    "fruit_and_vegetables",
    "household_electrical_devices",
    "household_furniture",
    "insects",
    "large_carnivores",
    "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores",
    "medium_mammals",
    "non-insect_invertebrates",
    "people",
    "reptiles",
    "small_mammals",
    "trees",
    "vehicles_1",
    "vehicles_2",
)
CLASSES = 5  # of each task
SIZE = 32
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
COUNTS = {"train": 50_000, "test": 10_000}
_PIXELS = 3 * SIZE * SIZE
_FINE = len(TASKS) * CLASSES
_BINARY, _PYTHON = "cifar-100-binary", "cifar-100-python"


def cifar100_domains(
    root: str | Path,
    tasks: Sequence[str] = TASKS,
    *,
    validation: int = 250,
    primary: Iterable[str] | None = None,
    seed: int = 0,
    noise: bool = False,
    download: bool = False,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Twenty classifications of five classes, each with images of its own ``[N, 3, 32, 32]``.

    A task has 2500 images to train on, less `validation`, and 500 to test on. Its classes are its fine classes in
    ascending order of their ids, numbered from 0. Training images are padded by 4 pixels, cropped and flipped. The
    files are compact as they are, so that nothing is cached.

    Args:
        root: the folder that holds "cifar-100-binary" or "cifar-100-python", or one of these itself.
        tasks: names of coarse classes.
        validation: so many training images of each task are held out for model selection.
        primary: the tasks that count; None for all.
        seed: of the images held out, and of `noise`.
        noise: add an auxiliary task "noise", see `with_noise`.
        download: let torchvision fetch the python version into `root` if neither is there.
        device: where the images live.

    Raises:
        DataError: beginning with the path of the file at fault: one that is missing, cut short, or holds ids or names
            that are not CIFAR-100's.
        ValueError: for an unknown task, a switch that is neither true nor false, or if nothing is left to train on.
    """
    names = choose("task", tasks, TASKS)
    wanted = choose_primary(primary, names)
    check_counts(validation=validation)
    check_seed(seed)
    check_switches(noise=noise, download=download)
    read = _read(Path(root), download)
    domains = {name: TASKS.index(name) for name in names}
    order = {name: torch.from_numpy(numpy.flatnonzero(read.train.coarse == domain)) for name, domain in domains.items()}
    for name, ids in order.items():
        if len(ids) <= validation:
            raise ValueError(f"{name}: with {len(ids)} images, {validation} for validation leave none to train on")
        order[name] = ids[draws.permutation(draws.key(seed, "cifar100", name), len(ids))]

    def joined(images: _Images, ids: Mapping[str, torch.Tensor], augmentation: Augmentation | None) -> JoinedSplit:
        return JoinedSplit(
            {name: _domain(images, name, read.fine[domains[name]], rows, augmentation) for name, rows in ids.items()}
        )

    test = {name: torch.from_numpy(numpy.flatnonzero(read.test.coarse == domain)) for name, domain in domains.items()}
    data = Dataset(
        name="cifar100_domains",
        tasks=tuple(
            replace(task_kinds.classification(name, CLASSES, primary=name in wanted), input=name) for name in names
        ),
        train=joined(read.train, {name: ids[:-validation] for name, ids in order.items()}, Augmentation((1.0,), pad=4)),
        validation=joined(read.train, {name: ids[-validation:] for name, ids in order.items()}, None),
        test=joined(read.test, test, None),
        outputs=dict.fromkeys(names, CLASSES),
        views={
            name: View("label", classes=tuple(read.names[fine] for fine in read.fine[domain]))
            for name, domain in domains.items()
        },
        input_view=View("image", mean=MEAN, std=STD),
        dense=False,
    )
    return (with_noise(data, seed) if noise else data).to(device)


@dataclass(frozen=True)
class _Images:
    """One file: pixels ``[N, 3, 32, 32]``, coarse and fine ids ``[N]``, all uint8."""

    pixels: NDArray[numpy.uint8]
    coarse: NDArray[numpy.uint8]
    fine: NDArray[numpy.uint8]


@dataclass(frozen=True)
class _Files:
    """Both files; the fine ids of every coarse class, ascending; the names of fine classes."""

    train: _Images
    test: _Images
    fine: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]


def _domain(
    images: _Images, name: str, fine: Sequence[int], ids: torch.Tensor, augmentation: Augmentation | None
) -> ResidentSplit:
    rows = ids.numpy()
    labels = numpy.searchsorted(fine, images.fine[rows]).astype(numpy.int16)
    image = Column(torch.from_numpy(images.pixels[rows]), "image", MEAN, STD)
    return ResidentSplit(image, {name: Column(torch.from_numpy(labels), "label")}, augmentation)


def _read(root: Path, download: bool) -> _Files:
    folder = _find(root)
    if folder is None and download:
        from torchvision.datasets import CIFAR100

        CIFAR100(str(root), download=True)
        folder = _find(root)
    if folder is None:
        raise DataError(f"{root}: holds neither {_BINARY} nor {_PYTHON}; download=True fetches the latter")
    kinds = ("coarse", "fine")
    if is_file(folder / "train.bin"):
        named = [partial(_names, kind, folder / f"{kind}_label_names.txt", _lines) for kind in kinds]
        files = {split: folder / f"{split}.bin" for split in COUNTS}
        pixels = [partial(_read_binary, path, COUNTS[split]) for split, path in files.items()]
    else:
        named = [partial(_names, kind, folder / "meta", partial(_texts, key=f"{kind}_label_names")) for kind in kinds]
        files = {split: folder / split for split in COUNTS}
        pixels = [partial(_read_python, path, COUNTS[split]) for split, path in files.items()]
    _, names, *read = together(*named, *pixels)
    found: dict[str, _Images] = dict(zip(files, read, strict=True))
    for split, images in found.items():
        for kind, ids, count in (("coarse", images.coarse, len(TASKS)), ("fine", images.fine, _FINE)):
            if ids.max() >= count:
                raise DataError(f"{files[split]}: {kind} id {ids.max()}; there are {count} {kind} classes")
    fine = [tuple(sorted(set(found["train"].fine[found["train"].coarse == c].tolist()))) for c in range(len(TASKS))]
    for split, images in found.items():
        belongs: NDArray[Any] = numpy.full(_FINE, len(TASKS))
        for c, own in enumerate(fine):
            belongs[list(own)] = c
        wrong = numpy.flatnonzero(belongs[images.fine] != images.coarse)
        if wrong.size or any(len(own) != CLASSES for own in fine):
            raise DataError(f"{files[split]}: a coarse class does not have {CLASSES} fine classes of its own")
        missing = set(range(len(TASKS))) - set(images.coarse.tolist())
        if missing:
            raise DataError(f"{files[split]}: holds no image of {TASKS[min(missing)]}")
    return _Files(found["train"], found["test"], tuple(fine), names)


def _find(root: Path) -> Path | None:
    if not is_folder(root):
        return None
    for folder in (root / _BINARY, root / _PYTHON, root):
        if is_file(folder / "train.bin") or is_file(folder / "meta"):
            return folder
    return None


def _names(kind: str, path: Path, read: Callable[[Path], tuple[str, ...]]) -> tuple[str, ...]:
    """The names of coarse or fine classes."""
    names = read(path)
    if kind == "coarse" and names != TASKS:
        raise DataError(f"{path}: the coarse classes are not CIFAR-100's: {', '.join(names[:3])}, …")
    if kind == "fine" and not len(names) == len(set(names)) == _FINE:
        raise DataError(f"{path}: expected {_FINE} different names, found {len(set(names))}")
    return names


def _lines(path: Path) -> tuple[str, ...]:
    names: list[str] = []
    each_line(path, lambda _, name: names.append(name))
    return tuple(names)


def _read_binary(path: Path, count: int) -> _Images:
    size = (_PIXELS + 2) * count
    try:
        found = path.stat().st_size
        if found != size:
            raise DataError(f"{path}: expected {size} bytes, {count} images of {_PIXELS + 2}; found {found}")
        records = numpy.fromfile(path, numpy.uint8).reshape(count, _PIXELS + 2)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read: {error}") from error
    pixels = records[:, 2:].reshape(count, 3, SIZE, SIZE)
    return _Images(pixels, records[:, 0], records[:, 1])


def _read_python(path: Path, count: int) -> _Images:
    found = read_pickle(path)
    pixels = found.get("data")
    if not isinstance(pixels, numpy.ndarray) or pixels.shape != (count, _PIXELS):
        what = list(pixels.shape) if isinstance(pixels, numpy.ndarray) else type(pixels).__name__
        raise DataError(f"{path}: expected 'data' of shape {[count, _PIXELS]}, found {what}")
    ids = {}
    for kind in ("coarse", "fine"):
        values = found.get(f"{kind}_labels")
        if not isinstance(values, list) or len(values) != count or not all(type(i) is int for i in values):
            raise DataError(f"{path}: expected '{kind}_labels', a list of {count} ids")
        if min(values) < 0 or max(values) > 255:
            raise DataError(f"{path}: {kind} ids from {min(values)} to {max(values)}")
        ids[kind] = numpy.array(values, numpy.uint8)
    return _Images(pixels.reshape(count, 3, SIZE, SIZE), ids["coarse"], ids["fine"])


def _texts(path: Path, key: str) -> tuple[str, ...]:
    values = read_pickle(path).get(key)
    if not isinstance(values, list) or not all(isinstance(value, str | bytes) for value in values):
        raise DataError(f"{path}: expected {key!r}, a list of names")
    return tuple(value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values)


def read_pickle(path: Path) -> dict[str, Any]:
    """The mapping that a pickle holds, of texts, whole numbers, lists, and arrays of bytes, and nothing else.

    Nothing that the file names is imported or called: where it asks for an array, which takes three of numpy's names,
    stand-ins take down what it says, and the array is made from that. Any other name is an error.

    Raises:
        DataError: for a file that cannot be read or holds, or asks for, anything else.
    """
    known = _stand_ins()

    # Python's own implementation: the other one reserves memory for whatever number a file makes up.
    class Reader(pickle._Unpickler):
        # Arrays of bytes that may be written to, which take up what they say they are before it is there.
        dispatch: ClassVar[dict[int, Any]] = {
            key: load for key, load in pickle._Unpickler.dispatch.items() if key != pickle.BYTEARRAY8[0]
        }

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in known:
                raise pickle.UnpicklingError(f"it asks for {module}.{name}")
            return known[module, name]

    try:
        with path.open("rb") as file:
            found = Reader(_Bounded(file, path.stat().st_size), encoding="bytes").load()
    except Exception as error:
        # A damaged pickle can end in any exception whatever.
        raise DataError(f"{path}: cannot be read as a pickle of plain data: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a mapping, found {type(found).__name__}")
    made = {}
    for key, value in found.items():
        name = key.decode("utf-8", "replace") if isinstance(key, bytes) else key
        made[str(name)] = value.array(path, str(name)) if isinstance(value, known["numpy", "ndarray"]) else value
    return made


class _Bounded:
    """A file of which no more is read at a time than it has: memory is reserved before that shows."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.readline = file.readline
        self._read, self._size = file.read, size

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise pickle.UnpicklingError(f"it claims {count} bytes, and has {self._size}")
        return self._read(count)


def _stand_ins() -> dict[tuple[str, str], Any]:
    """What stands for the names by which numpy pickles an array; made anew for each file, which might change them."""

    class Dtype:
        def __init__(self, code: Any, *_: Any) -> None:
            self.code = code

        def __setstate__(self, state: Any) -> None:
            pass

    class Array:
        def __init__(self, *_: Any) -> None:
            self.state: Any = None

        def __setstate__(self, state: Any) -> None:
            self.state = state

        def array(self, path: Path, name: str) -> NDArray[numpy.uint8]:
            state = self.state
            if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], Dtype):
                raise DataError(f"{path}: {name!r} is no array")
            _, shape, dtype, fortran, content = state
            plain = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**32 for n in shape)
            if dtype.code not in (b"u1", "u1") or not plain or type(content) is not bytes or fortran:
                raise DataError(f"{path}: {name!r} is no array of bytes")
            total = 1
            for n in shape:
                total *= n
            if total != len(content):
                raise DataError(f"{path}: {name!r} has {len(content)} bytes, and claims shape {list(shape)}")
            return numpy.frombuffer(content, numpy.uint8).reshape(shape)

    def encode(text: Any, encoding: Any = "latin1") -> bytes:
        # How protocol 2 writes bytes.
        if type(text) is not str or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("it encodes what is no text")
        return text.encode("latin1")

    return {
        ("numpy.core.multiarray", "_reconstruct"): Array,
        ("numpy._core.multiarray", "_reconstruct"): Array,
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): Dtype,
        ("_codecs", "encode"): encode,
    }
