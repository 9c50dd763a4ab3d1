"""Two overlapping handwritten digits, or pieces of clothing, per image, two tasks: the multi-digits benchmark.

Without a download, the scans are the 1797 that scikit-learn brings (8×8 pixels, UCI optical recognition of handwritten
digits), enlarged to 20×20 on a 28×28 tile, as MNIST has them. MNIST and Fashion-MNIST are read from their own files,
as they are or compressed, in a folder or where torchvision keeps them in it::

    root/[MNIST/raw/ or FashionMNIST/raw/]{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]

One tile stands in the top left corner of a 36×36 image, another in the bottom right one, each moved towards the middle
by 0 to 4 pixels along both axes; where they overlap, the brighter pixel shows.

Of digits there are also nine yes-or-no tasks, as many as are usual of faces: whether a digit is even, large (5 or more)
or round (0, 6, 8 and 9 close a loop), and what the two have to do with each other.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from sidetask_datasets import draws, tasks
from sidetask_datasets.columns import Column
from sidetask_datasets.dataset import Dataset, check_counts, check_seed, check_switches, choose, choose_primary
from sidetask_datasets.files import DataError, is_file, together
from sidetask_datasets.noise import with_noise
from sidetask_datasets.split import Split
from sidetask_datasets.stored import ResidentSplit
from sidetask_datasets.view import View

TASKS = ("top_left", "bottom_right")
_ROUND = torch.tensor([0, 6, 8, 9], dtype=torch.int16)
ATTRIBUTES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "top_left_even": lambda first, second: first % 2 == 0,
    "top_left_large": lambda first, second: first >= 5,
    "top_left_round": lambda first, second: torch.isin(first, _ROUND),
    "bottom_right_even": lambda first, second: second % 2 == 0,
    "bottom_right_large": lambda first, second: second >= 5,
    "bottom_right_round": lambda first, second: torch.isin(second, _ROUND),
    "same_parity": lambda first, second: first % 2 == second % 2,
    "top_left_larger": lambda first, second: first > second,
    "large_sum": lambda first, second: first + second >= 10,
}
SOURCES = ("scans", "mnist", "fashion")
CLOTHES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SIZE, TILE, SCAN, SHIFT = 36, 28, 20, 4
# Mean and standard deviation of the pixels: of the default training split of the scans; of single images of the others.
STATISTICS = {"scans": (0.16, 0.31), "mnist": (0.1307, 0.3081), "fashion": (0.2860, 0.3530)}
_FOLDERS = {"mnist": "MNIST", "fashion": "FashionMNIST"}
_MOST = 100_000  # images in a file; a header can claim any number


def digits(
    train: int = 4000,
    validation: int = 1000,
    test: int = 1000,
    *,
    seed: int = 0,
    tasks: Sequence[str] = TASKS,
    primary: Iterable[str] | None = None,
    noise: bool = False,
    source: str = "scans",
    root: str | Path | None = None,
    download: bool = False,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Two-digit images, ``[N, 1, 36, 36]``, with a 10-class task for each corner.

    Scans are divided first and paired within a split only, so that no scan is in two splits: 60 %, 20 % and 20 % of
    scikit-learn's, seeded; of MNIST and Fashion-MNIST the test files are the test split, and a sixth of the others,
    seeded, is for validation.

    Args:
        train: images to train on.
        validation: images to select models on.
        test: images for the final numbers.
        seed: of the division, the pairs, the shifts and `noise`.
        tasks: among "top_left", "bottom_right", and, of digits, the names in `ATTRIBUTES`.
        primary: the tasks that count; None for all.
        noise: add an auxiliary task "noise", see `with_noise`.
        source: "scans", "mnist" or "fashion".
        root: the folder of the files of MNIST or Fashion-MNIST.
        download: let torchvision fetch these into `root`, if they are not there.
        device: where the images live.

    Raises:
        DataError: beginning with the path of a file that is missing, damaged, or not what its name says.
        ValueError: for an unknown task or source, fewer than 1 image, a root that is missing or not needed, or a switch
            that is neither true nor false.

    >>> data = digits(train=8, validation=2, test=2)
    >>> batch = next(data.train.batches(4))
    >>> batch.inputs.shape, sorted(batch.targets)
    (torch.Size([4, 1, 36, 36]), ['bottom_right', 'top_left'])
    """
    (source,) = choose("source", source, SOURCES)
    names = choose("task", tasks, TASKS if source == "fashion" else (*TASKS, *ATTRIBUTES))
    wanted = choose_primary(primary, names)
    check_counts(train=train, validation=validation, test=test)
    check_seed(seed)
    check_switches(noise=noise, download=download)
    if (root is None) != (source == "scans"):
        raise ValueError(f"source {source!r} " + ("needs a root" if root is None else "is of no root"))
    pools = scan_pools(seed) if root is None else _file_pools(source, Path(root), download, seed)
    mean, std = STATISTICS[source]
    splits = {}
    for split, count in {"train": train, "validation": validation, "test": test}.items():
        images, targets = _pairs(*pools[split], count, draws.key(seed, "digits", split))
        columns = {name: Column(targets[name], "label") for name in names}
        splits[split] = ResidentSplit(Column(images, "image", (mean,), (std,)), columns)
    classes = CLOTHES if source == "fashion" else tuple(str(digit) for digit in range(10))
    data = _assemble(names, wanted, splits, classes, View("image", mean=(mean,), std=(std,)))
    return (with_noise(data, seed) if noise else data).to(device)


def _assemble(
    names: Sequence[str], wanted: frozenset[str], splits: Mapping[str, Split], classes: tuple[str, ...], view: View
) -> Dataset:
    of = {name: classes if name in TASKS else ("no", "yes") for name in names}
    return Dataset(
        name="digits",
        tasks=tuple(tasks.classification(name, len(of[name]), primary=name in wanted) for name in names),
        **splits,
        outputs={name: len(of[name]) for name in names},
        views={name: View("label", classes=of[name], size=(SIZE, SIZE)) for name in names},
        input_view=view,
        dense=False,
    )


# For each split its tiles [N, 28, 28] uint8 and their labels [N] int16.
_Pools = dict[str, tuple[Tensor, Tensor]]


def scan_pools(seed: int) -> _Pools:
    """scikit-learn's scans, divided: for each split tiles ``[N, 28, 28]`` uint8 and their digits ``[N]`` int16."""
    scans, labels = _scans()
    order = draws.permutation(draws.key(seed, "digits"), len(scans))
    first, second = len(scans) * 6 // 10, len(scans) * 8 // 10
    ids = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    return {split: (scans[rows], labels[rows]) for split, rows in ids.items()}


def _file_pools(source: str, root: Path, download: bool, seed: int) -> _Pools:
    folder = _folder(source, root)
    if folder is None and download:
        from torchvision import datasets

        fetch = datasets.MNIST if source == "mnist" else datasets.FashionMNIST
        fetch(str(root), download=True)
        folder = _folder(source, root)
    if folder is None:
        raise DataError(f"{root}: holds no train-images-idx3-ubyte, with or without .gz; download=True fetches it")
    (tiles, ids), test = together(partial(_read_pair, folder, "train"), partial(_read_pair, folder, "t10k"))
    order = draws.permutation(draws.key(seed, "digits"), len(tiles))
    held = order[: max(len(tiles) // 6, 1)]
    rest = order[len(held) :]
    if not len(rest):
        raise DataError(f"{folder}: one image to train on is too few")
    return {"train": (tiles[rest], ids[rest]), "validation": (tiles[held], ids[held]), "test": test}


def _read_pair(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Tiles and labels of one pair of files."""
    images, labels = _idx_path(folder, f"{name}-images-idx3"), _idx_path(folder, f"{name}-labels-idx1")
    tiles, ids = together(partial(read_idx, images, (TILE, TILE)), partial(read_idx, labels))
    if len(ids) != len(tiles):
        raise DataError(f"{labels}: has {len(ids)} labels, {images.name} has {len(tiles)} images")
    if ids.max() > 9:
        raise DataError(f"{labels}: label {int(ids.max())}; there are 10 classes")
    return tiles, ids.to(torch.int16)


def _folder(source: str, root: Path) -> Path | None:
    for folder in (root, root / _FOLDERS[source] / "raw"):
        if is_file(_idx_path(folder, "train-images-idx3")):
            return folder
    return None


def _idx_path(folder: Path, stem: str) -> Path:
    plain = folder / f"{stem}-ubyte"
    return plain if is_file(plain) else folder / f"{stem}-ubyte.gz"


def read_idx(path: Path, shape: tuple[int, ...] = ()) -> Tensor:
    """The bytes of an idx file ``[N, *shape]``; one whose name ends in .gz is decompressed.

    Raises:
        DataError: if it cannot be read, holds another type or shape, nothing at all, or not as many bytes as it says.
    """
    ndim = 1 + len(shape)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * ndim)
            if len(head) < 4 + 4 * ndim or head[:4] != bytes([0, 0, 8, ndim]):
                raise DataError(f"{path}: does not begin as an idx file of bytes in {ndim} dimensions")
            # Before any of it is decompressed: few bytes can stand for many.
            found = struct.unpack(f">{ndim}I", head[4:])
            if not 0 < found[0] <= _MOST or found[1:] != shape:
                raise DataError(f"{path}: expected shape {['N', *shape]}, N up to {_MOST}, found {list(found)}")
            size = int(numpy.prod(found))
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(content) != size:
        raise DataError(
            f"{path}: has {'more than ' if len(content) > size else ''}{min(len(content), size)} bytes of {size}"
        )
    return torch.from_numpy(numpy.frombuffer(bytearray(content), numpy.uint8)).view(found)


def _scans() -> tuple[Tensor, Tensor]:
    """Tiles ``[1797, 28, 28]`` uint8 and their digits ``[1797]`` int16."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) * (255.0 / 16.0)
    large = functional.interpolate(images, size=(SCAN, SCAN), mode="bicubic", align_corners=False)
    margin = (TILE - SCAN) // 2
    tiles = functional.pad(large.round().clamp(0, 255), (margin,) * 4).squeeze(1)
    return tiles.to(torch.uint8), torch.as_tensor(digits, dtype=torch.int16)


def _pairs(scans: Tensor, labels: Tensor, count: int, key: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images ``[count, 1, 36, 36]`` and the labels of every task."""
    numbers = draws.uniform(key, torch.arange(count), 6)
    chosen = (numbers[:, :2] * len(scans)).long()
    shifts = (numbers[:, 2:] * (SHIFT + 1)).long()
    first = _place(scans[chosen[:, 0]], shifts[:, 0], shifts[:, 1])
    second = _place(scans[chosen[:, 1]], SIZE - TILE - shifts[:, 2], SIZE - TILE - shifts[:, 3])
    left, right = labels[chosen[:, 0]], labels[chosen[:, 1]]
    attributes = {name: holds(left, right).to(torch.int16) for name, holds in ATTRIBUTES.items()}
    return torch.maximum(first, second).unsqueeze(1), {**dict(zip(TASKS, (left, right), strict=True)), **attributes}


def _place(tiles: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Each tile on its own empty image, its corner at (top, left)."""
    images = tiles.new_zeros(len(tiles), SIZE, SIZE)
    inside = torch.arange(TILE)
    rows = (top[:, None] + inside)[:, :, None]
    columns = (left[:, None] + inside)[:, None, :]
    images[torch.arange(len(tiles))[:, None, None], rows, columns] = tiles
    return images
