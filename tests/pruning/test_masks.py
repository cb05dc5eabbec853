from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_koopman import MaskSet, prunable_parameters

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "lbfgs search": lambda p: torch.optim.LBFGS(p, lr=1.0, max_iter=3, line_search_fn="strong_wolfe"),
}


class Network(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3))


x, y = torch.randn(20, 6), torch.randn(20, 3)


def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(network(x), y)
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def random_masks(network: nn.Module, sparsity: float = 0.6, seed: int = 1) -> MaskSet:
    drawn = torch.Generator().manual_seed(seed)
    weights = prunable_parameters(network)
    return MaskSet.from_scores(
        {name: torch.rand(weight.shape, generator=drawn) for name, weight in weights.items()}, sparsity=sparsity
    )


def assert_pruned(network: nn.Module, masks: MaskSet) -> None:
    named = dict(network.named_parameters())
    for name, mask in masks.items():
        assert torch.equal(named[name].detach()[~mask], torch.zeros(int((~mask).sum())))


# -- masks from scores ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4),
    sparsity=st.floats(0.01, 0.99),
    levels=st.integers(1, 50),
    seed=st.integers(0, 999),
    scope=st.sampled_from(["global", "tensor"]),
)
def test_the_share_is_exact_and_the_smallest_go(shapes, sparsity, levels, seed, scope):
    drawn = np.random.default_rng(seed)
    scores = {
        str(i): torch.tensor(drawn.integers(-levels, levels + 1, shape) / levels) for i, shape in enumerate(shapes)
    }  # with many ties
    masks = MaskSet.from_scores(scores, sparsity=sparsity, scope=scope, allow_empty=True)
    together = [list(scores)] if scope == "global" else [[name] for name in scores]
    for names in together:
        sizes = np.concatenate([scores[name].abs().numpy().ravel() for name in names])
        kept = np.concatenate([masks[name].numpy().ravel() for name in names])
        assert (~kept).sum() == round(sparsity * sizes.size)
        assert max(sizes[~kept], default=0) <= min(sizes[kept], default=np.inf)


def test_a_threshold_prunes_what_is_smaller():
    masks = MaskSet.from_scores({"w": torch.tensor([[-0.5, 0.1], [0.3, -0.2]])}, threshold=0.2)
    assert masks["w"].tolist() == [[True, False], [True, True]]


def test_what_was_pruned_stays_pruned():
    first = MaskSet.from_scores({"w": torch.arange(1.0, 11.0)}, sparsity=0.3)
    second = MaskSet.from_scores({"w": torch.arange(11.0, 1.0, -1)}, sparsity=0.5, within=first)
    assert second["w"].tolist() == [False] * 3 + [True] * 5 + [False] * 2
    assert MaskSet.from_scores({"w": torch.ones(10)}, threshold=0.5, within=first)["w"].tolist() == first["w"].tolist()
    assert MaskSet.from_scores({"w": torch.ones(10)}, sparsity=0.1, within=first)["w"].tolist() == first["w"].tolist()
    other = MaskSet.from_scores({"v": torch.arange(4.0)}, sparsity=0.5, within=first)
    assert other["w"].tolist() == first["w"].tolist()


def test_agreement_counts_equal_entries():
    a, b = (MaskSet({"w": torch.tensor(bits)}) for bits in ([True, True, False, False], [True, False, False, True]))
    assert a.agreement(b) == 0.5
    assert a.agreement(a) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "are both None"),
        ({"sparsity": 0.5, "threshold": 0.1}, "exclude each other"),
        ({"sparsity": 0.0}, r"sparsity must lie in \(0, 1\), got 0.0"),
        ({"sparsity": 1}, r"sparsity must lie in \(0, 1\), got 1"),
        ({"sparsity": 75}, "got 75"),
        ({"sparsity": float("nan")}, "got nan"),
        ({"sparsity": "half"}, "got 'half'"),
        ({"threshold": -1.0}, "threshold must be positive"),
        ({"sparsity": 0.5, "scope": "layer"}, "scope must be one of"),
        ({"threshold": 9.0}, "prunes all weights of 'w'"),
        ({"sparsity": 0.9}, "prunes all weights of 'w'"),
    ],
)
def test_bad_amounts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskSet.from_scores({"w": torch.ones(4), "big": 9 * torch.ones(4)}, **options)


def test_scores_that_give_no_order_are_refused():
    with pytest.raises(ValueError, match=r"scores\['w'\] holds NaN"):
        MaskSet.from_scores({"w": torch.tensor([1.0, float("nan")])}, sparsity=0.5)


def test_masks_must_be_boolean_and_there():
    with pytest.raises(ValueError, match="boolean"):
        MaskSet({"w": torch.ones(3)})
    with pytest.raises(ValueError, match="empty"):
        MaskSet({})


def test_masks_must_fit_the_module_and_then_nothing_is_changed():
    network = Network()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="no parameter 'missing'"):
        MaskSet({"0.weight": torch.zeros(12, 6, dtype=torch.bool), "missing": torch.ones(2) > 0}).apply(network)
    with pytest.raises(ValueError, match=r"shape \(2,\), but the parameter \(12, 6\)"):
        MaskSet({"0.weight": torch.ones(2) > 0}).pin(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# -- selection --------------------------------------------------------------------------------------------------------


def test_matrices_are_selected_and_norms_are_not():
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LayerNorm((2, 4, 4)), nn.Embedding(3, 2), nn.Linear(2, 2)
    )
    assert list(prunable_parameters(network)) == ["0.weight", "3.weight", "4.weight"]
    assert list(prunable_parameters(network, ["*.bias", "!2.*"])) == ["0.bias", "1.bias", "4.bias"]


@pytest.mark.parametrize(
    ("build", "patterns", "message"),
    [
        (Network, "head.*", "parameters='head.*' matches no parameter"),
        (lambda: nn.BatchNorm1d(3), None, "the module has none"),
        (lambda: Network().requires_grad_(False), "0.*", "'0.weight', which is frozen"),
        (lambda: nn.LazyLinear(3), "weight", "lazy"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            "*original1",
            "from which a weight is computed",
        ),
        (Network, [], "is empty: pass one or more patterns"),
    ],
)
def test_selections_that_cannot_be_pruned_are_refused(build, patterns, message):
    with pytest.raises(ValueError, match=message):
        prunable_parameters(build(), patterns)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_computed_from_others_are_left_alone():
    network = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        nn.utils.weight_norm(nn.Linear(4, 4)),
        nn.utils.prune.identity(nn.Linear(4, 4), "weight"),
        nn.Linear(4, 4),
    )
    assert list(prunable_parameters(network)) == ["4.weight"]


# -- keeping zeros ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_under_every_optimizer(name):
    network = Network()
    optimizer = OPTIMIZERS[name](network.parameters())
    for _ in range(3):
        step(network, optimizer)  # builds up momentum
    masks = random_masks(network)
    survivors = {key: value.clone() for key, value in network.state_dict().items()}
    masks.pin(network, optimizer)
    for key, mask in masks.items():
        assert torch.equal(network.state_dict()[key][mask], survivors[key][mask])
    for _ in range(4):
        step(network, optimizer)
        assert_pruned(network, masks)
        named = dict(network.named_parameters())
        for key, mask in masks.items():
            state = optimizer.state[named[key]]
            for memory in {"exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum"} & set(state):
                if state[memory] is not None:
                    assert not state[memory][~mask].any(), f"{name} remembers pruned weights"
    moved = {key: not torch.equal(network.state_dict()[key][masks[key]], survivors[key][masks[key]]) for key in masks}
    assert all(moved.values())


@pytest.mark.parametrize("name", ["momentum", "amsgrad", "rmsprop"])
def test_survivors_move_as_in_a_network_without_the_pruned_weights(name):
    """Oracle: a loop that multiplies weights and gradients by the mask itself."""
    ours, theirs = Network(), Network()
    masks = random_masks(ours)
    first, second = OPTIMIZERS[name](ours.parameters()), OPTIMIZERS[name](theirs.parameters())
    masks.pin(ours, first)
    named = dict(theirs.named_parameters())
    for key, mask in masks.items():
        named[key].data *= mask
    for _ in range(5):
        step(ours, first)
        second.zero_grad()
        nn.functional.mse_loss(theirs(x), y).backward()
        for key, mask in masks.items():
            named[key].grad *= mask
        second.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_zero_before_anything_reads_them():
    network = Network()
    masks = random_masks(network)
    masks.pin(network, torch.optim.SGD(network.parameters(), lr=0.1))
    for _ in range(3):  # accumulates gradients
        nn.functional.mse_loss(network(x), y).backward()
    named = dict(network.named_parameters())
    for name, mask in masks.items():
        assert not named[name].grad[~mask].any()
        assert named[name].grad[mask].all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_do_not_reach_pruned_weights(broken):
    layer = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.Adam(layer.parameters())
    MaskSet({"weight": torch.tensor([[True, False], [True, False]])}).pin(layer, optimizer)
    layer(torch.tensor([[1.0, broken]]).expand(3, 2)[:, :]).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight[:, 1], torch.zeros(2))
    assert torch.isfinite(layer.weight[:, 0]).all()


def test_pruned_zeros_are_positive():
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, -1.0)
    MaskSet({"weight": torch.zeros(2, 3, dtype=torch.bool)}).apply(layer)
    assert not torch.signbit(layer.weight).any()


def test_several_optimizers_share_the_masks():
    network = Network()
    both = [
        torch.optim.SGD(network[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam(network[3].parameters(), lr=0.1),
    ]
    masks = random_masks(network)
    masks.pin(network, *both)
    for _ in range(3):
        nn.functional.mse_loss(network(x), y).backward()
        for optimizer in both:
            optimizer.step()
            assert_pruned(network, masks)


def test_tied_weights_are_masked_together():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.decoder.weight = self.encoder.weight

    network = Tied()
    assert list(prunable_parameters(network)) == ["encoder.weight"]
    assert list(prunable_parameters(network, "decoder.*")) == ["encoder.weight"]
    masks = random_masks(network)
    masks.pin(network, torch.optim.SGD(network.parameters(), lr=0.1))
    state = network.state_dict()
    assert torch.equal(state["decoder.weight"] == 0, ~masks["encoder.weight"])
    assert masks.numel == 16


def test_weights_that_are_frozen_when_masked_and_thawed_later():
    network = Network()
    masks = random_masks(network)
    network.requires_grad_(False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    masks.pin(network, optimizer)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    network.requires_grad_(True)
    nn.functional.mse_loss(network(x), y).backward()
    assert not network[0].weight.grad[~masks["0.weight"]].any()


def test_sparse_gradients():
    table = nn.Embedding(8, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    masks = random_masks(table)
    masks.pin(table, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        table(torch.tensor([1, 5, 5])).sum().backward()
        optimizer.step()
        assert_pruned(table, masks)
        assert not optimizer.state[table.weight]["exp_avg"][~masks["weight"]].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    layer = nn.Linear(8, 8).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    masks = random_masks(layer)
    masks.pin(layer, optimizer)
    for _ in range(2):
        layer(torch.randn(4, 8, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
    assert not layer.weight.detach()[~masks["weight"]].any()


def test_scaled_gradients_of_mixed_precision():
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    masks = random_masks(network)
    masks.pin(network, optimizer)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(network(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_pruned(network, masks)


def test_compiled_networks():
    network = Network()
    compiled = torch.compile(network, backend="aot_eager")
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    step(compiled, optimizer)
    masks = random_masks(network)
    masks.pin(network, optimizer)
    for _ in range(3):
        step(compiled, optimizer)
        assert_pruned(network, masks)


def test_copies_and_checkpoints_are_plain_sparse_networks():
    network = Network()
    keys = list(network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    masks = random_masks(network)
    masks.pin(network, optimizer)
    step(network, optimizer)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded, twin = Network(), copy.deepcopy(network)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert list(network.state_dict()) == keys
    assert_pruned(loaded, masks)
    assert_pruned(twin, masks)
    step(network, optimizer)
    assert_pruned(network, masks)
    again = MaskSet.from_zeros(loaded)
    assert again.agreement(masks) == 1.0
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=0.1)
    masks.pin(twin, twin_optimizer)
    step(twin, twin_optimizer)
    assert_pruned(twin, masks)


def test_leaving_the_block_lets_the_weights_move_again():
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    masks = random_masks(network)
    with masks.pin(network, optimizer):
        step(network, optimizer)
        assert_pruned(network, masks)
    step(network, optimizer)
    assert all((dict(network.named_parameters())[name] != 0).all() for name in masks)


# -- storing and printing ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=5), st.integers(0, 99))
def test_the_state_is_one_bit_a_weight(shapes, seed):
    drawn = torch.Generator().manual_seed(seed)
    masks = MaskSet({f"p{i}": torch.rand(shape, generator=drawn) < 0.5 for i, shape in enumerate(shapes)})
    file = io.BytesIO()
    torch.save(masks.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = MaskSet.from_state_dict(state)
    assert list(again) == list(masks)
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())
    assert state["bits"].numel() == -(-masks.numel // 8)


def test_the_table_counts_exactly():
    network = Network()
    masks = MaskSet({"0.weight": torch.arange(72).reshape(12, 6) % 4 == 0, "3.weight": torch.ones(3, 12) > 0})
    assert masks.table(network).splitlines() == [
        "parameter       shape  pruned   of  sparsity",
        "0.weight        12×6       54   72    75.00%",
        "3.weight        3×12        0   36     0.00%",
        "masked tensors             54  108    50.00%",
        "all parameters             54  147    36.73%",
    ]
    assert repr(masks) == "MaskSet(2 tensors, 54 of 108 weights pruned, 50.00%)"
