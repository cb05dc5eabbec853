"""Reinitialization of weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_koopman.parameters.reinitialize import SCHEMES, reinitialize, select_modules


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(123)
    return nn.Sequential(
        nn.Conv2d(1, 64, 5), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(256, 512), nn.MultiheadAttention(8, 2)
    )


def drawn(network: nn.Module, scheme=None, seed: int = 0) -> nn.Module:
    fresh = copy.deepcopy(network)
    reinitialize(list(select_modules(fresh, None, scheme).values()), scheme, seed=seed)
    return fresh


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_it_is_reproducible_and_leaves_the_random_state_alone(network, scheme):
    before = torch.get_rng_state()
    first, again, other = drawn(network, scheme), drawn(network, scheme), drawn(network, scheme, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first[3].weight, other[3].weight)
    assert not torch.equal(first[3].weight, network[3].weight)
    assert not torch.equal(first[4].in_proj_weight, network[4].in_proj_weight)


@pytest.mark.parametrize(
    ("scheme", "std"), [("he", math.sqrt(2 / 256)), ("xavier", math.sqrt(2 / 768)), (None, 1 / math.sqrt(3 * 256))]
)
def test_named_schemes_have_their_scale(network, scheme, std):
    layer = drawn(network, scheme)[3]
    assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.02)
    assert bool(layer.bias.detach().any()) is (scheme is None)


def test_norms_keep_their_own_way_and_forget_their_statistics(network):
    network[1].running_mean.fill_(7.0)
    norm = drawn(network, "he")[1]
    assert torch.equal(norm.weight, torch.ones(64))
    assert not norm.running_mean.any()


def test_a_callable_is_given_each_module(network):
    seen = []
    reinitialize(list(select_modules(network, ["*", "!4*"], seen.append).values()), seen.append, seed=0)
    assert seen == [network[0], network[1], network[3]]


def test_only_what_is_trainable_is_drawn_by_default(network):
    network[0].requires_grad_(False)
    assert "0" not in select_modules(network, None, None)
    assert list(select_modules(network, "0", None)) == ["0"]


def test_what_cannot_be_drawn_is_named():
    class Token(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(shape))

    network = nn.ModuleDict({"layer": nn.Linear(2, 2), "token": Token(3)})
    with pytest.raises(ValueError, match=r"module 'token' \(Token\) owns parameters but has no `reset_parameters`"):
        select_modules(network, None, None)
    assert list(select_modules(network, ["!token"], None)) == ["layer"]
    assert list(select_modules(network, None, lambda _: None)) == ["layer", "token"]
    assert list(select_modules(nn.ModuleDict({"token": Token(3, 4)}), None, "he")) == ["token"]
    with pytest.raises(
        ValueError, match=r"modules='head\*' matches no module that owns parameters; the module has lay"
    ):
        select_modules(network, "head*", None)
    with pytest.raises(ValueError, match="modules=None selects no module with trainable parameters"):
        select_modules(nn.ReLU(), None, None)
