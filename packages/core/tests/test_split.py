"""Where the split is decides what is shared; everything else about the network stays."""

import pytest
import torch
from sidetask_core import SplitModel
from torch import nn


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


def heads():
    return {name: nn.Linear(3, 1) for name in "ab"}


@pytest.mark.parametrize("cut", range(4))
def test_stages_before_the_cut_are_shared_and_the_rest_are_copies_of_one_start(cut):
    stages = [nn.Linear(3, 3) for _ in range(3)]
    model = SplitModel.from_stages(stages, cut, heads())
    assert [*model.shared] == stages[:cut]
    assert len(model.shared_parameters()) == 2 * cut
    x = torch.randn(2, 3)
    expected = x
    for stage in stages:
        expected = stage(expected)
    if cut == 3:
        assert not model.branches
    else:
        a, b = model.branches["a"], model.branches["b"]
        assert all(torch.equal(p, q) and p is not q for p, q in zip(a.parameters(), b.parameters(), strict=True))
    for name, prediction in model(x).items():
        torch.testing.assert_close(prediction, model.heads[name](expected))
    assert len(model.specific_parameters("a")) == 2 * (3 - cut) + 2


def test_a_branch_is_computed_once_for_all_its_riders():
    branch = Counted()
    model = SplitModel(nn.Identity(), heads(), {"both": branch}, {"a": "both", "b": "both"})
    assert list(model(torch.zeros(1, 3))) == ["a", "b"]
    assert branch.calls == 1


def test_only_what_is_asked_for_is_computed():
    branches = {"a": Counted(), "b": Counted()}
    model = SplitModel(nn.Identity(), heads(), branches)
    assert list(model(torch.zeros(1, 3), tasks=["b"])) == ["b"]
    assert (branches["a"].calls, branches["b"].calls) == (0, 1)


def test_a_head_may_read_the_shared_features_beside_branches():
    model = SplitModel(nn.Identity(), heads(), {"a": nn.Linear(3, 3)}, {"b": None})
    x = torch.randn(2, 3)
    assert torch.equal(model(x)["b"], model.heads["b"](x))
    assert len(model.specific_parameters("b")) == 2


def test_models_made_from_models_share_modules_and_leave_the_first_alone():
    model = SplitModel(nn.Linear(3, 3), heads(), {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    more = model.with_heads({"b→a": nn.Linear(3, 1)}, {"b→a": "a"})
    assert list(model.heads) == ["a", "b"]
    assert list(more.heads) == ["a", "b", "b→a"]
    assert more.branches["a"] is model.branches["a"]
    back = more.restricted_to(["a", "b"])
    assert back.state_dict().keys() == model.state_dict().keys()
    assert list(more.restricted_to(["b→a"]).branches) == ["a"]
    x = torch.randn(2, 3)
    assert all(torch.equal(y, model(x)[name]) for name, y in back(x).items())
