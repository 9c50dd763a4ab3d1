"""Element losses of the usual tasks, unreduced, in single precision whatever the prediction's.

Each takes a prediction ``[N, C, *]`` and the target as a batch has it, and leaves unlabelled elements to the
task's `valid`, which is the mask function beside it here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def labelled(target: Tensor) -> Tensor:
    """Which class or binary labels count: those that are not negative."""
    return target >= 0


def positive(target: Tensor) -> Tensor:
    """Which depths and disparities count: those above 0."""
    return target > 0


def nonzero(target: Tensor) -> Tensor:
    """Which normals count, ``[N, 1, H, W]``: those that are not the zero vector."""
    return (target != 0).any(dim=1, keepdim=True)


def cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of every pixel or sample.

    Args:
        prediction: logits ``[N, C, *]``.
        target: class ids ``[N, *]``; negative ones are unlabelled and give 0.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, -1]))
    tensor([1.3863, 0.0000])
    """
    target = torch.where(target < 0, -1, target)
    return functional.cross_entropy(prediction.float(), target, ignore_index=-1, reduction="none")


def distributed(target: Tensor) -> Tensor:
    """Which distributions ``[N, K, *]`` count, ``[N, *]``: those that are not zero."""
    return (target != 0).any(dim=1)


def soft_cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with a distribution of every image or patch, ``[N, *]``.

    Args:
        prediction: logits ``[N, K]``, or ``[N, K, H, W]``, of which patches or the whole image are averaged.
        target: distributions ``[N, K]``, or ``[N, K, h, w]``, where h and w divide H and W.

    >>> target = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    >>> soft_cross_entropy(torch.zeros(1, 4), target), soft_cross_entropy(torch.zeros(1, 4, 6, 8), target)
    (tensor([1.3863]), tensor([1.3863]))
    """
    return -(target * over_patches(prediction.float(), target).log_softmax(dim=1)).sum(dim=1)


def over_patches(prediction: Tensor, target: Tensor) -> Tensor:
    """Logits averaged over the patches of a target, so that both have its shape.

    Raises:
        ValueError: if they have other classes, or the patches do not divide the prediction.
    """
    grid = target.shape[2:] or (1, 1)
    fits = prediction.shape[:2] == target.shape[:2] and (prediction.ndim == target.ndim or prediction.ndim == 4)
    if not fits or any(size % count for size, count in zip(prediction.shape[2:], grid, strict=False)):
        raise ValueError(f"prediction {list(prediction.shape)} does not fit distributions {list(target.shape)}")
    if prediction.ndim == 2:
        return prediction
    n, classes, height, width = prediction.shape
    # Adaptive pooling has no repeatable gradient on CUDA.
    patches = prediction.reshape(n, classes, grid[0], height // grid[0], grid[1], width // grid[1])
    return patches.mean(dim=(3, 5)).reshape(target.shape)


def absolute(prediction: Tensor, target: Tensor) -> Tensor:
    """L1, in the target's unit: depth ``[N, 1, H, W]`` in metres, disparity in pixels."""
    _same_shape(prediction, target)
    return (prediction.float() - target).abs()


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared difference, element by element."""
    _same_shape(prediction, target)
    return (prediction.float() - target).square()


REGRESSION = {"l1": absolute, "mse": squared}


def direction(prediction: Tensor, eps: float = 1e-6) -> Tensor:
    """Vectors ``[N, 3, H, W]`` brought to length 1.

    Args:
        prediction: of any length.
        eps: added to the squared length, so that the gradient stays below 1/√eps where the prediction is zero.
    """
    vectors = prediction.float()
    return vectors * (vectors.square().sum(dim=1, keepdim=True) + eps).rsqrt()


def normals_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """1 − cosine of the angle, ``[N, 1, H, W]`` (MTAN)."""
    _same_shape(prediction, target)
    return 1.0 - (direction(prediction) * target).sum(dim=1, keepdim=True)


def normals_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """L1 distance of the unit vectors, ``[N, 1, H, W]``: summed over the three components (Auto-λ)."""
    _same_shape(prediction, target)
    return (direction(prediction) - target).abs().sum(dim=1, keepdim=True)


def normals_elements(prediction: Tensor, target: Tensor) -> Tensor:
    """L1 of every component, ``[N, 3, H, W]``: a third of `normals_l1` on average."""
    _same_shape(prediction, target)
    return (direction(prediction) - target).abs()


NORMALS = {"cosine": normals_cosine, "l1": normals_l1, "elements": normals_elements}


def balanced_edges(prediction: Tensor, target: Tensor, positive_weight: float = 0.95) -> Tensor:
    """Binary cross-entropy ``[N, 1, H, W]`` with edges, which are few, weighted up.

    Args:
        prediction: logits.
        target: 1 edge, 0 none.
        positive_weight: of an edge pixel; the others weigh 1 minus it. 0.95 in the PASCAL-Context protocol.
    """
    _same_shape(prediction, target)
    truth = (target > 0).float()
    weight = truth * (2.0 * positive_weight - 1.0) + (1.0 - positive_weight)
    return weight * functional.binary_cross_entropy_with_logits(prediction.float(), truth, reduction="none")


def balanced_saliency(prediction: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy ``[N, 1, H, W]`` in which the two sides of an image weigh alike.

    A salient pixel weighs the share of the image's labelled pixels that are not salient, another one the share of those
    that are (the PASCAL-Context protocol, there with shares over a batch; those of the image itself do not depend on
    what else is in the batch).

    Args:
        prediction: logits.
        target: 1 salient, 0 not, negative unlabelled.

    >>> loss = balanced_saliency(torch.zeros(1, 1, 1, 4), torch.tensor([[[[1, 0, 0, 0]]]]))
    >>> (loss / loss.sum()).tolist()
    [[[[0.5, 0.1666666716337204, 0.1666666716337204, 0.1666666716337204]]]]
    """
    _same_shape(prediction, target)
    truth = (target > 0).float()
    known = (target >= 0).float().sum(dim=(1, 2, 3), keepdim=True)
    share = truth.sum(dim=(1, 2, 3), keepdim=True) / known.clamp(min=1.0)
    weight = truth * (1.0 - share) + (1.0 - truth) * share
    return weight * functional.binary_cross_entropy_with_logits(prediction.float(), truth, reduction="none")


def _same_shape(prediction: Tensor, target: Tensor) -> None:
    # Broadcasting would silently compare every pixel with a row or a sample of another.
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} differ in shape")
