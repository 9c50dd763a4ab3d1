"""Metrics over a whole dataset: sums in double precision, so that nothing depends on batch size or order.

Only what torchmetrics does not have; `accuracy` and `f1` are its own. Each takes predictions as heads give them and
targets as batches have them, ignores what is unlabelled and adds up over processes. Where nothing was labelled, ours
are NaN.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from sidetask_datasets.columns import lengths
from sidetask_datasets.losses import distributed, over_patches

_NAN = float("nan")


def accuracy(classes: int) -> MulticlassAccuracy:
    """Share of labelled pixels or samples whose class has the highest logit; in [0, 1], higher is better."""
    return MulticlassAccuracy(classes, average="micro", ignore_index=-1, validate_args=False)


def f1(classes: int) -> MulticlassF1Score:
    """F-measure of each class against the rest, averaged over the classes seen; in [0, 1], higher is better."""
    return MulticlassF1Score(classes, average="macro", ignore_index=-1, validate_args=False)


class MeanIoU(Metric):
    """Mean intersection over union, from one confusion matrix over everything added.

    The mean is over classes that occur in truth or prediction; a class that occurs in neither is left out. In [0, 1].

    Args:
        classes: how many there are.

    >>> metric = MeanIoU(3)
    >>> metric.update(torch.eye(3)[[0, 0, 1]].T[None], torch.tensor([[0, 1, 1]]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    confusion: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add logits ``[N, C, *]`` and class ids ``[N, *]``, negative where unlabelled."""
        cells = torch.where(target < 0, self.classes**2, target * self.classes + prediction.argmax(dim=1))
        counts = torch.bincount(cells.flatten(), minlength=self.classes**2 + 1)[:-1]
        self.confusion += counts.view(self.classes, self.classes)

    def compute(self) -> Tensor:
        """The mean over the classes seen."""
        both = self.confusion.diag().double()
        either = (self.confusion.sum(0) + self.confusion.sum(1)).double() - both
        return (both / either)[either > 0].mean()


class _Mean(Metric):
    """A sum over what is labelled, in double precision, and its mean."""

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, sums: int | None = None) -> None:
        super().__init__()
        zeros = torch.zeros(() if sums is None else sums, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.count


class Agreement(_Mean):
    """Share of labelled images or patches whose likeliest class is that of the target; in [0, 1].

    >>> metric = Agreement()
    >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([[0.4, 0.6], [0.1, 0.9]]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add logits and distributions as `losses.soft_cross_entropy` takes them."""
        mask = distributed(target)
        same = over_patches(prediction.float(), target).argmax(dim=1) == target.argmax(dim=1)
        self.total += (same & mask).sum()
        self.count += mask.sum()


class AbsoluteError(_Mean):
    """Mean absolute error over all elements; lower is better. In double precision, unlike torchmetrics' own.

    >>> metric = AbsoluteError()
    >>> metric.update(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.75]))
    >>> metric.compute()
    tensor(0.3750, dtype=torch.float64)
    """

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add values of one shape."""
        self.total += (prediction.double() - target.double()).abs().sum()
        self.count += target.numel()


class SquaredError(_Mean):
    """Mean squared error over all elements; lower is better. In double precision.

    >>> metric = SquaredError()
    >>> metric.update(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.5]))
    >>> metric.compute()
    tensor(0.6250, dtype=torch.float64)
    """

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add values of one shape."""
        self.total += (prediction.double() - target.double()).square().sum()
        self.count += target.numel()


DepthKind = Literal["absolute", "relative", "rmse"]


class DepthError(_Mean):
    """Error of depth or disparity, pooled over all labelled pixels; lower is better.

    Args:
        kind: "absolute", mean of abs(p − t) in the unit of the labels; "relative", mean of abs(p − t) / t; "rmse",
            root of the mean square.

    Raises:
        ValueError: for another kind.

    >>> metric = DepthError("relative")
    >>> metric.update(torch.tensor([1.0, 9.0, 3.0]), torch.tensor([2.0, 0.0, 2.0]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, kind: DepthKind = "absolute") -> None:
        super().__init__()
        if kind not in get_args(DepthKind):
            raise ValueError(f"kind is one of {', '.join(get_args(DepthKind))}, not {kind!r}")
        self.kind = kind

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add depths or disparities of one shape; a target of 0 is unlabelled."""
        truth = target.double()
        error = (prediction.double() - truth).abs()
        if self.kind == "relative":
            error = error / truth
        elif self.kind == "rmse":
            error = error.square()
        mask = truth > 0
        self.total += torch.where(mask, error, 0.0).sum()
        self.count += mask.sum()

    def compute(self) -> Tensor:
        """The pooled error."""
        mean = super().compute()
        return mean.sqrt() if self.kind == "rmse" else mean


def angles(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Angle in degrees between vectors ``[N, 3, *]`` of any length, ``[N, *]`` float64, and where there is a truth.

    From the lengths of sum and difference of the unit vectors: the inverse cosine would lose half the digits near 0.
    """
    truth = target.double()
    guess = prediction.double()
    length = lengths(truth)[:, 0]
    a = truth / length.clamp(min=1e-12).unsqueeze(1)
    b = guess / lengths(guess).clamp(min=1e-12)
    return torch.rad2deg(2.0 * torch.atan2(lengths(a - b)[:, 0], lengths(a + b)[:, 0])), length > 0


class MeanAngle(_Mean):
    """Mean angle between predicted and true normals in degrees; lower is better. A zero prediction is 90° off.

    >>> metric = MeanAngle()
    >>> metric.update(torch.tensor([[[[5.0]], [[5.0]], [[0.0]]]]), torch.tensor([[[[1.0]], [[0.0]], [[0.0]]]]))
    >>> round(metric.compute().item(), 6)
    45.0
    """

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add vectors ``[N, 3, H, W]``; a target of zero length is unlabelled."""
        degrees, mask = angles(prediction, target)
        self.total += torch.where(mask, degrees, 0.0).sum()
        self.count += mask.sum()


class MedianAngle(Metric):
    """Median angle between predicted and true normals in degrees, to 0.001°; lower is better.

    A histogram of 180 000 bins stands in for the list of all angles: fixed memory, and sums over processes.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    bins_per_degree = 1000
    histogram: Tensor

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(180 * self.bins_per_degree, dtype=torch.int64)
        self.add_state("histogram", zeros, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add vectors ``[N, 3, H, W]``; a target of zero length is unlabelled."""
        degrees, mask = angles(prediction, target)
        bins = (degrees * self.bins_per_degree).long().clamp(max=len(self.histogram) - 1)
        bins = torch.where(mask, bins, len(self.histogram))
        self.histogram += torch.bincount(bins.flatten(), minlength=len(self.histogram) + 1)[:-1]

    def compute(self) -> Tensor:
        """The middle of the bin in which half of the pixels are reached."""
        reached = self.histogram.cumsum(0)
        if not reached[-1]:
            return torch.tensor(_NAN, dtype=torch.float64, device=reached.device)
        index = (2 * reached < reached[-1]).sum()
        return (index + 0.5).double() / self.bins_per_degree


class WithinAngle(_Mean):
    """Share of pixels whose predicted normal is less than so many degrees off; in [0, 1], higher is better.

    Args:
        degrees: the limit; 11.25, 22.5 and 30 by custom.
    """

    higher_is_better = True

    def __init__(self, degrees: float) -> None:
        super().__init__()
        self.degrees = degrees

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add vectors ``[N, 3, H, W]``; a target of zero length is unlabelled."""
        degrees, mask = angles(prediction, target)
        self.total += (mask & (degrees < self.degrees)).sum()
        self.count += mask.sum()


class EdgeF(Metric):
    """Best F-measure of edges over all thresholds, one for the whole dataset (odsF); in [0, 1], higher is better.

    Pixels match exactly: unlike the boundary benchmark's, this has no tolerance of distance and no thinning, so its
    numbers are lower. Thresholds are the multiples of 0.01 between 0 and 1 on the sigmoid of the logits.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    steps = 100
    positives: Tensor
    negatives: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("positives", "negatives"):
            self.add_state(name, torch.zeros(self.steps, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add logits and truth ``[N, 1, H, W]``: 1 edge, 0 none, −1 unlabelled."""
        bins = (prediction.double().sigmoid() * self.steps).long().clamp(max=self.steps - 1)
        for truth, state in ((1, self.positives), (0, self.negatives)):
            chosen = torch.where(target == truth, bins, self.steps)
            state += torch.bincount(chosen.flatten(), minlength=self.steps + 1)[:-1]

    def compute(self) -> Tensor:
        """The F-measure at the best threshold."""
        # hit[k] counts edges whose score reaches k / steps: everything in the bins from k on.
        hit = self.positives.flip(0).cumsum(0).double()
        false = self.negatives.flip(0).cumsum(0).double()
        return (2 * hit / (hit + false + self.positives.sum())).amax()


class BestIoU(_Mean):
    """Intersection over union of salient pixels, averaged over images, at the threshold that is best for all of them.

    Thresholds are the multiples of 0.01 between 0 and 1 on the sigmoid of the logits. An image without a labelled pixel
    is left out, one where nothing is salient and nothing is found counts 1. In [0, 1], higher is better.

    >>> metric = BestIoU()
    >>> metric.update(torch.tensor([[[[3.0, 1.0, -1.0, -3.0]]]]), torch.tensor([[[[1, 1, 0, 1]]]]))
    >>> metric.compute()
    tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = True
    steps = 100

    def __init__(self) -> None:
        super().__init__(self.steps)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add logits and truth ``[N, 1, H, W]``: 1 salient, 0 not, −1 unlabelled."""
        bins = (prediction.double().sigmoid() * self.steps).long().clamp(max=self.steps - 1)
        images = torch.arange(len(target), device=target.device).view(-1, 1, 1, 1) * (self.steps + 1)
        found = []
        for truth in (1, 0):
            places = images + torch.where(target == truth, bins, self.steps)
            counts = torch.bincount(places.flatten(), minlength=len(target) * (self.steps + 1))
            # reached[k] counts pixels whose score reaches k / steps: everything in the bins from k on.
            found.append(counts.view(-1, self.steps + 1)[:, :-1].flip(1).cumsum(1).flip(1).double())
        hit, false = found
        either = hit[:, :1] + false
        share = torch.where(either > 0, hit / either.clamp(min=1.0), 1.0)
        known = (target >= 0).flatten(1).any(dim=1)
        self.total += torch.where(known[:, None], share, 0.0).sum(dim=0)
        self.count += known.sum()

    def compute(self) -> Tensor:
        """The mean at the best threshold."""
        return super().compute().amax()
