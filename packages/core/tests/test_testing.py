"""The conformance suite fails what it should fail."""

import time

import pytest
import torch
from sidetask_core import Combiner, Method, Weighting
from sidetask_core.testing import conformance, in_two_processes, processes


class Nothing(Combiner):
    def forward(self, signals):
        return torch.zeros_like(signals.gradients(self.at)[0])


class Forgets(Weighting):
    """Keeps state that it does not save."""

    count = 0

    def forward(self, signals):
        self.count += 1
        return torch.full_like(signals.losses, 1 / self.count)


class Local(Weighting):
    """Looks at what only this process has."""

    def forward(self, signals):
        return signals.gradients("features").norm(dim=1)


class Follows(Weighting):
    """Gives everything to the smallest loss, even that of a task without labels."""

    def forward(self, signals):
        return (signals.losses == signals.losses.min()).to(signals.losses)


class First(Weighting):
    """Favours a place, not a task."""

    def forward(self, signals):
        return torch.arange(1, 4).to(signals.losses)


def nothing(tasks):
    return Method(encoder=Nothing(tasks, at="features"))


def forgets(tasks):
    return Method(encoder=Forgets(tasks))


def local(tasks):
    return Method(encoder=Local(tasks))


def follows(tasks):
    return Method(encoder=Follows(tasks))


def first(tasks):
    return Method(encoder=First(tasks))


@pytest.mark.parametrize(
    ("factory", "check"),
    [
        (nothing, "test_gradients_are_the_reported_weights_times_the_task_gradients"),
        (forgets, "test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit"),
        (local, "test_two_processes_equal_one"),
        (follows, "test_a_task_without_labels_contributes_nothing"),
        (first, "test_permuting_the_tasks_permutes_the_weights"),
    ],
)
def test_a_faulty_method_fails(factory, check):
    with pytest.raises(AssertionError):
        getattr(conformance(factory)(), check)()


def test_without_equivariance_that_test_is_not_collected():
    suite = conformance(first, equivariant=False)
    assert suite.test_permuting_the_tasks_permutes_the_weights is None


def fails_on_one(rank, world):
    if rank == 1:
        raise RuntimeError("rank 1 failed")
    torch.distributed.barrier()


def rank_of(rank, world):
    return rank, world


@pytest.mark.thorough
def test_a_process_that_fails_is_reported_and_does_not_spoil_the_next_call():
    with pytest.raises(RuntimeError, match="rank 1 failed"):
        in_two_processes(fails_on_one)
    assert sorted(in_two_processes(rank_of)) == [(0, 2), (1, 2)]


@pytest.mark.thorough
def test_two_processes_that_someone_has_killed_are_replaced():
    in_two_processes(rank_of)
    pool = processes._pair()
    for process in pool._processes.values():
        process.kill()
    while not pool._broken:
        time.sleep(0.01)
    assert sorted(in_two_processes(rank_of)) == [(0, 2), (1, 2)]
