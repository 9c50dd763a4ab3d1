from functools import partial

import pytest
import torch
from sidetask_datasets import reaching
from sidetask_datasets.reaching import COLOURS, NEAR, SPEED, STEPS, TASKS, act, demonstrate, move, picture

FEW = {"train": 2, "validation": 1, "test": 1}
NAMES = list(COLOURS)


def end(task, count=40, noise=0.0):
    """The script carried out, from places drawn here."""
    generator = torch.Generator().manual_seed(0)
    ring = 0.1 + 0.8 * torch.rand(count, 2, generator=generator)
    discs = 0.1 + 0.8 * torch.rand(count, 3, 2, generator=generator)
    start, held = discs.clone(), torch.full((count,), -1)
    for _ in range(2 * STEPS):
        action = act(task, ring, discs, held)
        assert action[:, :2].norm(dim=1).max() <= 1 + 1e-6
        action[:, :2] += noise * torch.randn(count, 2, generator=generator)
        ring, discs, held = move(ring, discs, held, action)
    return ring, start, discs, held


@pytest.mark.parametrize("task", TASKS)
def test_the_script_does_what_the_task_says(task):
    ring, start, discs, held = end(task)
    if task.startswith("reach"):
        target = start[:, NAMES.index(task.removeprefix("reach_"))]
        assert (ring - target).norm(dim=1).max() < NEAR
    elif task == "retreat":
        assert torch.allclose((ring - 0.5).abs(), torch.tensor(0.4), atol=NEAR)
    else:
        one, other = (NAMES.index(name) for name in task.removeprefix("carry_").split("_to_"))
        # A disc that lies on the wanted one is taken in its place, as a hand would.
        alone = (start - start[:, [one]]).norm(dim=-1).topk(2, largest=False).values[:, 1] > 3 * NEAR
        alone &= (start - start[:, [other]]).norm(dim=-1).topk(2, largest=False).values[:, 1] > 3 * NEAR
        assert alone.sum() > 20
        assert (discs[alone, one] - discs[alone, other]).norm(dim=1).max() < NEAR
        third = 3 - one - other
        assert torch.equal(discs[alone, third], start[alone, third])
        assert (held[alone] == -1).all()
    if not task.startswith("carry"):
        assert torch.equal(discs, start)


def test_a_held_disc_goes_along_and_stays_where_it_is_left():
    ring, discs, held = (
        torch.tensor([[0.5, 0.5]]),
        torch.tensor([[[0.5, 0.51], [0.1, 0.1], [0.9, 0.9]]]),
        torch.tensor([-1]),
    )
    ring, discs, held = move(ring, discs, held, torch.tensor([[0.0, 1.0, 1.0]]))
    assert held.tolist() == [0]
    assert torch.allclose(ring, torch.tensor([[0.5, 0.5 + SPEED]]))
    assert torch.equal(discs[:, 0], ring)
    left = discs[:, 0].clone()
    ring, discs, held = move(ring, discs, held, torch.tensor([[1.0, 0.0, 0.0]]))
    assert held.tolist() == [-1]
    assert torch.equal(discs[:, 0], left)
    assert not torch.equal(ring, left)


def test_the_picture_shows_where_everything_is():
    discs = torch.tensor([[[0.2, 0.2], [0.8, 0.2], [0.5, 0.8]]])
    image = picture(torch.tensor([[0.2, 0.8]]), discs, torch.tensor([-1]))[0]
    for place, colour in zip(discs[0], COLOURS.values(), strict=True):
        x, y = (place * 32).long().tolist()
        assert image[:, y, x].tolist() == list(colour)
    filled = picture(torch.tensor([[0.2, 0.8]]), discs, torch.tensor([1]))[0]
    assert filled[:, 25, 6].tolist() == [255] * 3
    assert image[:, 25, 6].max() < 255


def test_noise_moves_the_ring_and_not_what_the_script_says():
    pictures, states, actions = demonstrate("carry_red_to_blue", 3, key=1)
    assert (len(pictures), states.shape, actions.shape) == (3 * STEPS, (3 * STEPS, 3), (3 * STEPS, 3))
    states = states.view(3, STEPS, 3)
    steps = (states[:, 1:, :2] - states[:, :-1, :2]) / SPEED
    moved = actions.view(3, STEPS, 3)[:, :-1, :2]
    assert 0.05 < (steps - moved).std() < 0.5
    assert states[:, :, 2].unique().tolist() == [0.0, 1.0]


def test_it_is_a_dataset_of_ten_tasks_with_inputs_of_their_own():
    data = reaching(**FEW)
    assert [task.name for task in data.tasks] == [task.input for task in data.tasks] == list(TASKS)
    assert len(TASKS) == 10
    assert (len(data.train), len(data.test)) == (2 * STEPS, STEPS)
    assert data.input_shape == (6, 32, 32)
    batch = data.train[:4]
    for task in data.tasks:
        target = batch.target_of(task)
        assert target.shape == (4, 3)
        assert data.views[task.name].image(target[0]).ndim == 3
        loss, _ = task.mean(torch.zeros(4, 3), target)
        assert loss > 0
    assert data.show_input(batch.inputs["retreat"][0]).shape == (32, 32, 3)
    assert reaching(**FEW, state=False).input_shape == (3, 32, 32)


def test_demonstrations_repeat_by_seed_and_differ_between_splits():
    one, same, other = reaching(**FEW), reaching(**FEW), reaching(**FEW, seed=1)

    def first(data, split="train"):
        return getattr(data, split)[:5].inputs["reach_red"]

    assert torch.equal(first(one), first(same))
    assert not torch.equal(first(one), first(other))
    assert not torch.equal(first(one), first(one, "test"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["fly"]}, "unknown task 'fly'; there are: reach_red"),
        ({"loss": "l3"}, "unknown loss of numbers 'l3'"),
        ({"train": 0}, "train is a number of samples"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        reaching(**options)


@pytest.mark.parametrize("state", [False, True])
def test_further_tasks_join_them(state, check_further_tasks):
    check_further_tasks(partial(reaching, **FEW, tasks=["retreat", "reach_red"], state=state))
