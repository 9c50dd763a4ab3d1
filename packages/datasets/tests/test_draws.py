import pytest
import torch
from sidetask_datasets import draws


def test_a_sample_meets_its_numbers_in_any_batch():
    ids = torch.tensor([3, 0, 2**32 - 1, 17])
    together = draws.uniform(draws.key(1, "x"), ids, 9)
    for row, sample in enumerate(ids):
        assert torch.equal(together[row : row + 1], draws.uniform(draws.key(1, "x"), sample[None], 9))
    assert torch.equal(together[:, 4:], draws.uniform(draws.key(1, "x"), ids, 5, start=4))


def test_the_mixer_is_one_to_one_and_agrees_on_tensors_and_integers():
    values = torch.arange(1 << 18) * 16381
    mixed = draws._mix(values)
    assert mixed.unique().numel() == values.numel()
    assert mixed.min() >= 0
    assert mixed.max() < 2**32
    assert [draws._mix(int(v)) for v in values[-50:]] == mixed[-50:].tolist()
    # A value by hand, in arithmetic without bounds.
    x = 123456789
    x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
    x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
    assert draws._mix(123456789) == x ^ x >> 16


def test_uniform_numbers_are_uniform_and_unrelated():
    numbers = draws.uniform(draws.key(0), torch.arange(4000), 16).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert (numbers.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / 4000) ** 0.5
    deciles = torch.histc(numbers.flatten(), 10, 0, 1) / numbers.numel()
    assert (deciles - 0.1).abs().max() < 0.005
    correlation = torch.corrcoef(numbers.T) - torch.eye(16)
    assert correlation.abs().max() < 5 / 4000**0.5
    next_to = torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]
    assert next_to.abs() < 5 / numbers.numel() ** 0.5


def test_normal_numbers_have_the_moments_of_a_normal_distribution():
    numbers = draws.normal(draws.key(4), torch.arange(500), 201).double()
    assert numbers.shape == (500, 201)
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert numbers.pow(power).mean().item() == pytest.approx(moment, abs=0.06)


def test_permutations_hold_every_index_and_differ_by_key():
    first, second = draws.permutation(draws.key(0), 1000), draws.permutation(draws.key(1), 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert not torch.equal(first, second)


def test_keys_tell_their_parts_apart():
    keys = {draws.key(*parts) for parts in [(0, 1), (1, 0), (0, "1"), ("0", 1), (0,), (0, 0), (2**32, 1), (-1,)]}
    assert len(keys) == 8
