"""The usual tasks, with the losses, masks and metrics of the dense multi-task benchmarks."""

from __future__ import annotations

from sidetask_core import Task

from sidetask_datasets import losses, metrics


def segmentation(name: str, classes: int, primary: bool = True) -> Task:
    """A class per pixel: cross-entropy; mean IoU and pixel accuracy in [0, 1]."""
    return Task(
        name,
        loss=losses.cross_entropy,
        valid=losses.labelled,
        metrics={"mIoU": metrics.MeanIoU(classes), "accuracy": metrics.accuracy(classes)},
        primary=primary,
    )


def classification(name: str, classes: int, primary: bool = True) -> Task:
    """A class per image: cross-entropy; accuracy and F1 in [0, 1]."""
    return Task(
        name,
        loss=losses.cross_entropy,
        valid=losses.labelled,
        metrics={"accuracy": metrics.accuracy(classes), "F1": metrics.f1(classes)},
        primary=primary,
    )


def depth(name: str = "depth", primary: bool = True) -> Task:
    """Depth in metres: L1; mean absolute error, relative error and root mean square error."""
    return _distance(name, primary)


def disparity(name: str = "disparity", primary: bool = True) -> Task:
    """Disparity in pixels, or inverse depth: loss and metrics as for depth."""
    return _distance(name, primary)


def _distance(name: str, primary: bool) -> Task:
    return Task(
        name,
        loss=losses.absolute,
        valid=losses.positive,
        metrics={
            "absolute": metrics.DepthError("absolute"),
            "relative": metrics.DepthError("relative"),
            "rmse": metrics.DepthError("rmse"),
        },
        primary=primary,
    )


def normals(name: str = "normals", primary: bool = True, loss: str = "cosine") -> Task:
    """Surface normals: mean and median angle in degrees, share within 11.25°, 22.5° and 30°.

    Args:
        name: of the task.
        primary: whether it is wanted for itself.
        loss: "cosine" (MTAN), "l1" (Auto-λ) or "elements", see `losses`.

    Raises:
        ValueError: for another loss.
    """
    if loss not in losses.NORMALS:
        raise ValueError(f"unknown loss of normals {loss!r}; there are: {', '.join(losses.NORMALS)}")
    return Task(
        name,
        loss=losses.NORMALS[loss],
        valid=losses.nonzero,
        metrics={
            "mean": metrics.MeanAngle(),
            "median": metrics.MedianAngle(),
            "within 11.25": metrics.WithinAngle(11.25),
            "within 22.5": metrics.WithinAngle(22.5),
            "within 30": metrics.WithinAngle(30.0),
        },
        primary=primary,
    )


def edges(name: str = "edges", primary: bool = True) -> Task:
    """Boundary or not, per pixel: balanced binary cross-entropy; best F-measure in [0, 1]."""
    return Task(
        name,
        loss=losses.balanced_edges,
        valid=losses.labelled,
        metrics={"odsF": metrics.EdgeF()},
        primary=primary,
    )


def saliency(name: str = "saliency", primary: bool = True) -> Task:
    """Salient or not, per pixel: balanced binary cross-entropy; intersection over union at the best threshold."""
    return Task(
        name,
        loss=losses.balanced_saliency,
        valid=losses.labelled,
        metrics={"IoU": metrics.BestIoU()},
        primary=primary,
    )


def regression(name: str, primary: bool = True, loss: str = "l1") -> Task:
    """Numbers of an image, such as an action: mean absolute and mean squared error.

    Args:
        name: of the task.
        primary: whether it is wanted for itself.
        loss: "l1" or "mse".

    Raises:
        ValueError: for another loss.
    """
    if loss not in losses.REGRESSION:
        raise ValueError(f"unknown loss of numbers {loss!r}; there are: {', '.join(losses.REGRESSION)}")
    return Task(
        name,
        loss=losses.REGRESSION[loss],
        metrics={"absolute": metrics.AbsoluteError(), "squared": metrics.SquaredError()},
        primary=primary,
    )


def distribution(name: str, primary: bool = False) -> Task:
    """A distribution over classes for every image or patch: cross-entropy with it; agreement of the likeliest class."""
    return Task(
        name,
        loss=losses.soft_cross_entropy,
        valid=losses.distributed,
        metrics={"agreement": metrics.Agreement()},
        primary=primary,
    )


def noise(name: str = "noise") -> Task:
    """Noise to predict, never primary: L1; mean absolute error. See `noise.with_noise`."""
    return Task(name, loss=losses.absolute, metrics={"absolute": metrics.AbsoluteError()}, primary=False)


def dense(name: str, classes: int, primary: bool = True, normals_loss: str = "cosine") -> Task:
    """The task that a dense dataset has under this name.

    "depth", "disparity", "normals", "edges" and "saliency" are what they say; any other is a segmentation.

    Args:
        name: of the task.
        classes: of a segmentation.
        primary: whether it is wanted for itself.
        normals_loss: see `normals`.
    """
    match name:
        case "depth":
            return depth(name, primary)
        case "disparity":
            return disparity(name, primary)
        case "normals":
            return normals(name, primary, normals_loss)
        case "edges":
            return edges(name, primary)
        case "saliency":
            return saliency(name, primary)
        case _:
            return segmentation(name, classes, primary)
