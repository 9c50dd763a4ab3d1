import pytest
import torch
from sidetask_core.adam import Adam


def gradients(steps, size=3):
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_every_entry_present_it_is_torchs(decay):
    reference = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([reference], lr=0.05, betas=(0.8, 0.99), eps=1e-6, weight_decay=decay)
    ours, adam = torch.ones(3, dtype=torch.float64), Adam(3, lr=0.05, betas=(0.8, 0.99), eps=1e-6, weight_decay=decay)
    for gradient in gradients(20):
        reference.grad = gradient.clone()
        optimizer.step()
        ours = adam(ours, gradient)
        torch.testing.assert_close(ours, reference.detach(), rtol=1e-12, atol=1e-15)


def test_an_entry_that_is_sometimes_absent_is_as_if_those_updates_had_not_been():
    there = torch.tensor([[i % 3 != 0, True, i > 10] for i in range(20)])
    whole, adam = torch.ones(3, dtype=torch.float64), Adam(3, lr=0.05, weight_decay=0.01)
    for gradient, present in zip(gradients(20), there, strict=True):
        # What an absent entry is told must not matter.
        told = torch.where(present, gradient, torch.nan)
        whole = adam(whole, told, present)
    for entry in range(3):
        alone, own = torch.ones(1, dtype=torch.float64), Adam(1, lr=0.05, weight_decay=0.01)
        for gradient in gradients(20)[there[:, entry], entry]:
            alone = own(alone, gradient[None])
        torch.testing.assert_close(whole[entry], alone[0], rtol=1e-14, atol=0)


def test_a_resumed_run_is_bit_for_bit_the_same():
    adam, value = Adam(3, lr=0.05), torch.ones(3)
    for gradient in gradients(5):
        value = adam(value, gradient)
    other = Adam(3, lr=0.05)
    other.load_state_dict(adam.state_dict())
    assert value.dtype == torch.float32
    for gradient in gradients(5):
        assert torch.equal(adam(value, gradient), other(value, gradient))


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="lr must be positive, not 0"):
        Adam(2, lr=0)
    with pytest.raises(ValueError, match="weight_decay must be at least 0, not -1"):
        Adam(2, lr=0.1, weight_decay=-1)
