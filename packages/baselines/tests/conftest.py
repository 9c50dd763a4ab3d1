"""What the tests of several rules share: signals with given values, and gradient matrices of chosen kinds."""

import numpy as np
import pytest
import torch

COUNTS = (2, 3, 9, 20)
KINDS = (
    "random",
    "aligned",
    "rank deficient",
    "duplicate",
    "opposing",
    "one zero",
    "norm ratios of 1e4",
    "tiny",
    "huge",
    "nearly opposing",
    "nearly opposing with norm ratios of 1e4",
)


class Given:
    """Signals with given values."""

    def __init__(
        self,
        losses=(1.0, 1.0, 1.0),
        gradients=None,
        features=None,
        iteration=0,
        epoch=0,
        labelled=None,
        primary=None,
        progress=None,
    ):
        count = len(losses)
        self.tasks = tuple("abcdefghijklmnopqrstuvwxyz"[:count])
        self.primary = torch.tensor([i == 0 for i in range(count)] if primary is None else primary)
        self.labelled = torch.tensor([True] * count if labelled is None else labelled)
        self.losses = torch.tensor(losses, dtype=torch.float64)
        self._gradients, self._features, self._progress = gradients, features, progress
        self.iteration, self.epoch = iteration, epoch

    def gradients(self, at):
        return self._gradients

    def gramian(self, at):
        return self._gradients @ self._gradients.T

    def norms(self, at):
        return self._gradients.norm(dim=1)

    def features(self):
        return self._features

    def progress(self):
        return self._progress


def _sample(kind, count, seed, size=50):
    rng = np.random.default_rng([seed, count, KINDS.index(kind)])
    matrix = rng.normal(size=(count, size))
    if kind == "aligned":
        matrix += 1.0
    elif kind == "rank deficient":
        rank = max(1, count // 2)
        matrix = rng.normal(size=(count, rank)) @ rng.normal(size=(rank, size))
    elif kind == "duplicate":
        matrix[1] = matrix[0]
    elif kind == "opposing":
        matrix[1] = -matrix[0]
    elif kind == "one zero":
        matrix[1] = 0
    elif "nearly opposing" in kind:
        matrix[1] = 1e-3 * matrix[1] - matrix[0]
    if "norm ratios of 1e4" in kind:
        matrix *= np.geomspace(1e-4, 1, count)[:, None]
    if kind == "tiny":
        matrix *= 1e-12
    elif kind == "huge":
        matrix *= 1e12
    return matrix


@pytest.fixture
def given():
    """`Given`, the class."""
    return Given


@pytest.fixture
def sample():
    """``sample(kind, count, seed, size=50)``: a matrix of task gradients ``[T, D]`` of one of `KINDS`."""
    return _sample


@pytest.fixture(params=[(kind, count) for kind in KINDS for count in COUNTS], ids=lambda p: f"{p[0]}-{p[1]}")
def kind(request):
    """A kind of gradients and a number of tasks."""
    return request.param


@pytest.fixture
def matrices(kind):
    """Eight matrices of one kind ``[T, 50]``."""
    return [_sample(*kind, seed) for seed in range(8)]
