"""Images per second of our batches, beside torch's DataLoader with torchvision's v2 transforms, from the same files.

    python benchmarks/data.py
    python benchmarks/data.py --device cuda --write

Two settings, each with its usual augmentation: frames like NYUv2's (288×384, MTAN's arrays in single precision, scale,
crop and flip of image, classes, depth and normals) and images like CIFAR's (32×32, pad, crop and flip). All are
measured in turn in every round, after one round that is not counted, so that files are in the page cache and ours are
decoded: what decoding takes, once, is reported beside. Beside the clock's time, which other programs on the machine
lengthen, is the processor's, for those that work in this process alone. On a CUDA device the loader's batches are
copied there, and the time of a batch is set against a step of a ResNet-50.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import sidetask_datasets
import torch
from sidetask_core import Task
from sidetask_datasets import Augmentation, Column, ResidentSplit, Split, nyuv2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

SIZE = (288, 384)
SCALES = (1.0, 1.2, 1.5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
FRAMES, IMAGES = 32, 7680
BATCH = {"frames": 8, "images": 128}
RESULTS = Path(__file__).parent / "results"


def write_frames(root: Path) -> None:
    """A tree in MTAN's layout; what the pictures show does not matter."""
    generator = numpy.random.default_rng(0)
    for split, count in (("train", FRAMES + 1), ("val", 1)):
        for name in ("image", "label", "depth", "normal"):
            (root / split / name).mkdir(parents=True)
        for i in range(count):
            vectors = generator.normal(size=(*SIZE, 3)).astype(numpy.float32)
            arrays = {
                "image": generator.random((*SIZE, 3), dtype=numpy.float32),
                "label": generator.integers(-1, 13, SIZE),
                "depth": generator.random((*SIZE, 1), dtype=numpy.float32) * 9,
                "normal": vectors / numpy.linalg.norm(vectors, axis=-1, keepdims=True),
            }
            for name, array in arrays.items():
                numpy.save(root / split / name / f"{i}.npy", array)


class Frames(Dataset[dict[str, Tensor]]):
    """The same tree as one would read it without us, one frame at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root / "train"

    def __len__(self) -> int:
        return FRAMES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Image, classes, depth and normals, scaled, cropped and flipped."""
        found = {name: numpy.load(self.root / name / f"{index}.npy") for name in ("image", "label", "depth", "normal")}
        image = tv_tensors.Image(torch.from_numpy(found["image"]).permute(2, 0, 1))
        labels = [
            tv_tensors.Mask(torch.from_numpy(found["label"])[None]),
            tv_tensors.Mask(torch.from_numpy(found["depth"]).permute(2, 0, 1)),
            tv_tensors.Mask(torch.from_numpy(found["normal"]).permute(2, 0, 1)),
        ]
        scale = SCALES[int(torch.randint(3, ()))]
        height, width = int(SIZE[0] / scale), int(SIZE[1] / scale)
        if scale > 1.0:
            top = int(torch.randint(SIZE[0] - height + 1, ()))
            left = int(torch.randint(SIZE[1] - width + 1, ()))
            image, *labels = (v2.functional.resized_crop(x, top, left, height, width, SIZE) for x in (image, *labels))
        classes, depth, normals = labels
        depth = depth / scale
        if torch.rand(()) < 0.5:
            image, classes, depth, normals = map(v2.functional.horizontal_flip, (image, classes, depth, normals))
            normals = normals * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
        image = v2.functional.normalize(image, MEAN, STD)
        plain = {"image": image, "segmentation": classes[0], "depth": depth, "normals": normals}
        return {name: value.as_subclass(Tensor) for name, value in plain.items()}


class Images(Dataset[tuple[Tensor, int]]):
    """Small images from one array in memory, with the usual transforms."""

    def __init__(self, pixels: Path, labels: Path) -> None:
        self.pixels = torch.from_numpy(numpy.load(pixels))
        self.labels = numpy.load(labels).tolist()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(CIFAR_MEAN, CIFAR_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image and its class."""
        return self.transform(self.pixels[index]), self.labels[index]


def write_images(root: Path) -> None:
    """Two arrays: pixels and classes."""
    generator = numpy.random.default_rng(0)
    root.mkdir()
    numpy.save(root / "pixels.npy", generator.integers(0, 256, (IMAGES, 3, 32, 32), dtype=numpy.uint8))
    numpy.save(root / "labels.npy", generator.integers(0, 100, IMAGES))


def our_images(root: Path) -> Split:
    """The arrays as a split."""
    column = Column(torch.from_numpy(numpy.load(root / "pixels.npy")), "image", CIFAR_MEAN, CIFAR_STD)
    labels = Column(torch.from_numpy(numpy.load(root / "labels.npy").astype(numpy.int16)), "label")
    return ResidentSplit(column, {"class": labels}, Augmentation((1.0,), pad=4))


def ours(split: Split, batch: int) -> Callable[[int], Iterator[Any]]:
    """Epoch to its batches."""
    return lambda epoch: split.batches(batch, epoch=epoch)


def loaded(dataset: Dataset[Any], batch: int, workers: int, device: torch.device) -> Callable[[int], Iterator[Any]]:
    """The same of a loader, whose workers live on from epoch to epoch."""
    loader = DataLoader(
        dataset,
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )

    def epoch(_: int) -> Iterator[Any]:
        for found in loader:
            if device.type == "cuda":
                values = found.values() if isinstance(found, dict) else found
                yield [value.to(device, non_blocking=True) for value in values]
            else:
                yield found

    return epoch


def speed(batches: Iterator[Any], batch: int, device: torch.device) -> tuple[float, float]:
    """Images per second of the clock, and of this process's time on processors, over an epoch."""
    start, used, count = time.perf_counter(), time.process_time(), 0
    for _ in batches:
        count += batch
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start), count / (time.process_time() - used)


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower quartile": low, "upper quartile": high}


def step_seconds(data: Any, device: torch.device) -> float:
    """A training step of a ResNet-50 with three 1×1 heads on a batch of frames."""
    from torchvision.models import resnet50

    body = nn.Sequential(*list(resnet50().children())[:-2]).to(device)
    heads = nn.ModuleDict({task.name: nn.Conv2d(2048, data.outputs[task.name], 1) for task in data.tasks}).to(device)
    optimizer = torch.optim.SGD([*body.parameters(), *heads.parameters()], lr=0.01)
    batch = next(data.train.batches(BATCH["frames"]))

    def loss_of(task: Task, features: Tensor) -> Tensor:
        large = nn.functional.interpolate(heads[task.name](features), SIZE, mode="bilinear")
        return task.mean(large, batch.target_of(task))[0]

    times = []
    for _ in range(13):
        torch.cuda.synchronize()
        start = time.perf_counter()
        features = body(batch.inputs)
        loss = torch.stack([loss_of(task, features) for task in data.tasks]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def measure(device: torch.device, rounds: int, root: Path) -> dict[str, Any]:
    """Everything, in one run."""
    write_frames(root / "frames")
    write_images(root / "images")
    start = time.perf_counter()
    data = nyuv2(root / "frames", validation=1, cache=root / "cache")
    decoding = time.perf_counter() - start
    data = data.to(device)
    images = our_images(root / "images").to(device)
    theirs = {
        "frames": Frames(root / "frames"),
        "images": Images(root / "images/pixels.npy", root / "images/labels.npy"),
    }
    splits = {"frames": data.train, "images": images}
    found: dict[str, Any] = {}
    for setting, batch in BATCH.items():
        split = splits[setting]
        runs = {"ours": ours(split, batch)}
        if setting == "frames":
            runs["ours, streamed"] = ours(data.train.to("cpu").to(device, memory=0), batch)
        for workers in (0, 2):
            runs[f"DataLoader, {workers} workers"] = loaded(theirs[setting], batch, workers, device)
        speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for epoch in range(rounds + 1):
            for name, epochs in runs.items():
                speeds[name].append(speed(epochs(epoch), batch, device))
        clock = {name: [wall for wall, _ in values[1:]] for name, values in speeds.items()}
        # What workers use is not in this process's time.
        processor = {name: [used for _, used in values[1:]] for name, values in speeds.items() if "2 w" not in name}
        found[setting] = {"batch": batch, "bytes per image": split.nbytes // len(split)}
        for unit, values in (("second", clock), ("processor second", processor)):
            found[setting][f"images per {unit}"] = {name: summary(one) for name, one in values.items()}
            # Round by round, since what else runs on the machine changes from one to the next.
            ratios = {name: [a / b for a, b in zip(values["ours"], one, strict=True)] for name, one in values.items()}
            found[setting][f"ratio per {unit}"] = {name: summary(one) for name, one in ratios.items()}
        if device.type == "cuda":
            found[setting]["seconds per batch"] = batch / found[setting]["images per second"]["ours"]["median"]
    found["frames"]["seconds to decode once, per image"] = decoding / (FRAMES + 2)
    if device.type == "cuda":
        step = step_seconds(data, device)
        found["frames"]["seconds per step of a ResNet-50"] = step
        found["frames"]["batch over step"] = found["frames"]["seconds per batch"] / step
    return found


def table(found: dict[str, Any], about: str) -> str:
    """The results in Markdown."""
    lines = [f"# Images per second\n\n{about}\n"]
    for setting, title in (("frames", "288×384, three labels"), ("images", "32×32, one label")):
        one = found[setting]
        lines += [
            f"\n## {title}, batch {one['batch']}, {one['bytes per image']} bytes per image at rest\n",
            "| | images per second | ours is faster by | images per processor second | ours is faster by |",
            "|---|---:|---:|---:|---:|",
        ]
        for name in one["images per second"]:
            cells = [name]
            for unit in ("second", "processor second"):
                for what, form in ((f"images per {unit}", ".0f"), (f"ratio per {unit}", ".1f")):
                    value = one[what].get(name)
                    shown = value and [f"{value[key]:{form}}" for key in ("median", "lower quartile", "upper quartile")]
                    cells.append(f"{shown[0]} ({shown[1]}–{shown[2]})" if shown else "")
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("\nMedians and quartiles over rounds.")
    lines.append(f"Decoding, once: {1e3 * found['frames']['seconds to decode once, per image']:.1f} ms per frame.")
    if "batch over step" in found["frames"]:
        one = found["frames"]
        lines.append(
            f"A batch takes {1e3 * one['seconds per batch']:.2f} ms, {100 * one['batch over step']:.1f} % of a step of "
            f"a ResNet-50 ({1e3 * one['seconds per step of a ResNet-50']:.1f} ms)."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and, if asked, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(device, options.rounds, Path(folder))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    about = (
        f"{options.rounds} rounds on {name}, {options.threads} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}; `python benchmarks/data.py --device {options.device}`."
    )
    text = table(found, about)
    print(text)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        stem = RESULTS / f"data-{device.type}"
        stem.with_suffix(".md").write_text(text, encoding="utf-8")
        record = {"about": about, "threads": options.threads, "results": found}
        stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    assert sidetask_datasets  # imported before torchvision, whose wheel may need it
    main()
