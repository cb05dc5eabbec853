from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_koopman import select_parameters


@pytest.fixture
def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_default_is_all_trainable_parameters(network):
    network[0].weight.requires_grad_(False)
    assert list(select_parameters(network)) == ["0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("3.*", ["3.weight", "3.bias"]),
        (["*.bias"], ["0.bias", "1.bias", "3.bias"]),
        (["!1.*", "!*.bias"], ["0.weight", "3.weight"]),
        (["*.weight", "!3.*"], ["0.weight", "1.weight"]),
        (["0.weight", "3.?ias"], ["0.weight", "3.bias"]),
    ],
)
def test_patterns_include_and_exclude(network, patterns, expected):
    assert list(select_parameters(network, patterns)) == expected


def test_shared_parameters_appear_once():
    layer = nn.Linear(3, 3)
    assert len(select_parameters(nn.Sequential(layer, nn.ReLU(), layer))) == 2


def test_bad_selections_are_named(network):
    with pytest.raises(ValueError, match=r"parameters='head\.\*' matches no parameter; the module has 0\.weight"):
        select_parameters(network, "head.*")
    with pytest.raises(ValueError, match="the exclusions remove every match"):
        select_parameters(network, ["3.*", "!*"])
    with pytest.raises(ValueError, match="no parameters at all"):
        select_parameters(nn.ReLU())
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze"):
        select_parameters(network)
    with pytest.raises(ValueError, match="lazy"):
        select_parameters(nn.LazyLinear(3))
    assert list(select_parameters(nn.Linear(3, 3, dtype=torch.complex64))) == ["weight", "bias"]  # as pairs of reals
