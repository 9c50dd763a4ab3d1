"""A trained run as a teacher: its predictions become the labels of pseudo tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sidetask_bench.assemble import blaming, make_dataset
from sidetask_bench.config import Plugin
from sidetask_bench.run import load_run
from sidetask_bench.runtime import find_device
from sidetask_bench.schema import ExperimentError, build, unknown

# How a view draws what has classes, and so probabilities.
_CLASSES = ("classes", "label", "distribution")


def label(
    run: str | Path,
    folder: str | Path,
    *,
    task: str,
    of: Plugin | None = None,
    domain: str | None = None,
    kind: Any = "segmentation",
    threshold: float = 0.5,
    patch: int = 8,
    batch_size: int = 32,
) -> Path:
    """Let the chosen network of a run label images, for `sidetask_datasets.with_pseudo` and the dataset ``pseudo``.

    Splits whose file is there are not labelled again, if the same network labelled them in the same way.

    Args:
        run: the folder of a run.
        folder: gets ``train.npz``, ``validation.npz`` and ``test.npz``.
        task: whose class probabilities are the labels.
        of: the dataset whose images are labelled, the run's own if None. Of a dataset ``pseudo``, the one that it adds
            to, so that an experiment can name folders that are yet to be filled.
        domain: whose images are labelled, where tasks have inputs of their own; None where they share one.
        kind: "segmentation", "soft" or "tokens", see `sidetask_datasets.pseudo_label`.
        threshold: of a segmentation.
        patch: side of a token's patch, in pixels.
        batch_size: images at a time.

    Returns:
        The folder.

    Raises:
        ExperimentError: for a run or task that is not there, a task without classes, images of another size than the
            network's, a domain that is not there, patches that do not divide images, or files that do not fit or were
            made otherwise.
    """
    from sidetask_datasets import fingerprint, pseudo_label

    config, dataset, model = load_run(run)
    if task not in model.heads:
        raise unknown(task, model.heads.keys(), str(run), "task")
    if dataset.views[task].kind not in _CLASSES:
        raise ExperimentError(f"{run}: task {task!r} has no classes, and so no probabilities to label with")
    images = dataset
    if of is not None:
        images = make_dataset(build(Plugin, of.options.get("of"), "dataset.of") if of.name == "pseudo" else of)
    if images.input_shape != dataset.input_shape:
        raise ExperimentError(
            f"{run}: its network sees images {list(dataset.input_shape)}, those to label are {list(images.input_shape)}"
        )
    height, width = images.input_shape[-2:]
    if kind == "tokens" and (patch < 1 or height % patch or width % patch):
        raise ExperimentError(f"--patch: patches of {patch}×{patch} do not divide images of {height}×{width} pixels")
    source = f"task {task!r} of {fingerprint(model)}" + (f" in patches of {patch}" if kind == "tokens" else "")
    device = find_device(config.training.device)
    model = model.to(device)

    def teach(inputs: Tensor) -> Tensor:
        scores = model(inputs, tasks=[task])[task].float().softmax(dim=1)
        if kind == "soft":
            return scores.flatten(2).mean(dim=2) if scores.ndim > 2 else scores
        return F.avg_pool2d(scores, patch) if kind == "tokens" else scores

    options: dict[str, Any] = {"kind": kind, "threshold": threshold, "source": source, "batch_size": batch_size}
    with blaming("labels", str(folder)):
        return pseudo_label(images.to(device), folder, teach, domain=domain, **options)
