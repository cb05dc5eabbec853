"""Channels of gated and odd layers and of language models: right number removed, skipped layers named."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from oracles import zeroed
from torch import nn

from lightning_koopman import MaskSet, export_network, prunable_parameters, remove_channels, resize_like

pytest.importorskip("torch_pruning")
from lightning_koopman.pruning import channel_tracing
from lightning_koopman.pruning.channel_graph import Coupled, Structure


class Gated(nn.Module):
    """One matrix, split into parts that are multiplied."""

    def __init__(self, parts: int, layer=nn.Linear, dim: int = 1) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.parts, self.dim = parts, dim
        extra = () if layer is nn.Linear else (1,)
        self.wide, self.narrow = layer(8, 8 * parts, *extra), layer(8, 8, *extra)
        self.out = layer(8, 2, *extra)

    def forward(self, x):
        first, second, *rest = self.wide(x).chunk(self.parts, self.dim)
        return self.out(self.narrow(first * second.sigmoid() + sum(rest)).relu())


class Max(nn.Module):
    """Passes on only the largest channel."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(1, 12), nn.Linear(12, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x).amax(1, keepdim=True)).relu())


class HomeMade(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return x @ self.matrix.T


row, image, sequence = torch.randn(3, 8), torch.randn(3, 8, 5), torch.randn(3, 5, 8)
GATED = {
    "chunk(2)": (lambda: Gated(2), row, "wide"),
    "chunk(3)": (lambda: Gated(3), row, "wide"),
    "convolution, chunk(2)": (lambda: Gated(2, nn.Conv1d), image, "wide"),
    "convolution, chunk(3)": (lambda: Gated(3, nn.Conv1d), image, "wide"),
    "sequence, chunk(2, -1)": (lambda: Gated(2, dim=-1), sequence, "wide"),
    "sequence, chunk(2, 2)": (lambda: Gated(2, dim=2), sequence, "wide"),
    "GLU": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GLU(), nn.Linear(8, 2)), row, "0"),
}


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("name", GATED)
def test_what_goes_together_is_counted_together(name, sparsity):
    build, example, layer = GATED[name]
    network = build()
    before = copy.deepcopy(network)
    removal = remove_channels(network, lambda net: net(example), sparsity=sparsity)
    parts = 3 if "chunk(3)" in name else 2
    channels = removal.channels[layer]
    left = network.get_submodule(layer).weight.shape[0]
    assert left == channels - len(removal.removed[layer])
    asked = channels - round(sparsity * channels)
    assert left % parts == 0
    assert abs(left - asked) <= parts / 2 or left == parts  # at least one channel of each part stays
    assert removal.share == sum(map(len, removal.removed.values())) / sum(removal.channels.values())
    assert all(tensor.numel() for tensor in network.parameters())
    torch.testing.assert_close(network(example), zeroed(before, removal)(example))


@pytest.mark.parametrize("name", GATED)
def test_closures_are_what_one_channel_takes_along(name):
    build, example, layer = GATED[name]
    network = build()

    def structure():
        return Structure(network, lambda net: net(example))

    closures = structure().groups[layer].closures
    assert sorted(channel for closure in closures for channel in closure) == list(range(structure().channels[layer]))
    for closure in closures:
        for channel in closure:
            assert structure().remove({layer: [channel]}).removed[layer] == closure


def test_partly_coupled_layers_keep_a_channel_each():
    network = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    structure = Structure(network, lambda net: net(row))
    group = structure.groups["0"].group
    uses = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])  # another layer shares the first two channels
    structure.groups["0"] = Coupled(group, [[0], [1], [2], [3]], uses)
    assert structure._pick({"0": np.arange(4.0)}, 3) == {"0": [0, 2, 3]}
    assert structure._pick({"0": np.arange(4.0)}, 4) == {"0": [0, 2, 3]}
    assert structure._pick({"0": np.arange(4.0)}, 1) == {"0": [0]}


ODD = {
    "a maximum over channels": (Max, row, "a", "coupled by an operation over channels that is not understood", {"b"}),
    "no input": (
        lambda: nn.ModuleDict(
            {"net": nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), "extra": nn.Linear(0, 2)}
        ),
        lambda net: net["net"](row) + net["extra"](row[:, :0]), "extra", "its outputs leave the network", {"net.0"},
    ),
    "a scripted part": (
        lambda: nn.Sequential(
            torch.jit.trace(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), row),
            nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2),
        ),
        row, "0", "scripted", {"1"},
    ),
    "a home-made layer": (
        lambda: nn.Sequential(HomeMade(8, 6), nn.ReLU(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2)),
        row, "0", "unsupported layer type (HomeMade)", {"2"},
    ),
    "a shuffle": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)
        ),
        torch.randn(2, 3, 4, 4), "0", "coupled by an operation over channels that is not understood", {"2"},
    ),
    "a reshaped maximum": (
        lambda: nn.Sequential(
            nn.Linear(8, 16), nn.Unflatten(1, (8, 2)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8, 12), nn.Linear(12, 2)
        ),
        row, "0", None, {"4"},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", ODD)
def test_an_odd_layer_is_left_alone_by_name_and_the_rest_pruned(name):
    torch.manual_seed(0)
    build, example, layer, reason, pruned = ODD[name]
    network, run = build(), example if callable(example) else lambda net: net(example)
    removal = remove_channels(network, run, sparsity=0.5)
    assert set(removal.removed) == pruned
    assert removal.left_alone[layer] == reason or (reason is None and layer in removal.left_alone)
    assert f"{removal.left_alone[layer]}: " in removal.table()
    run(network).sum().backward()


def test_compiled_parts_have_the_names_of_what_was_compiled(tmp_path):
    def plain():
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    for compiled in (
        torch.compile(plain(), backend="eager"),
        nn.ModuleDict({"net": torch.compile(plain(), backend="eager")}),
    ):
        run = (lambda net: net["net"](row)) if isinstance(compiled, nn.ModuleDict) else lambda net: net(row)
        run(compiled)
        prefix = "net." if isinstance(compiled, nn.ModuleDict) else ""
        removal = remove_channels(compiled, run, sparsity=0.5)
        assert removal.changes[f"{prefix}0"] == {"out_features": (16, 8)}
        run(compiled).sum().backward()
        state = torch.load(export_network(compiled, tmp_path / "small.pt"))["state_dict"]
        other = nn.ModuleDict({"net": plain()}) if prefix else plain()
        resize_like(other, state)
        other.load_state_dict(state)
        torch.testing.assert_close(run(other), run(compiled))
        masks = MaskSet.from_scores(prunable_parameters(compiled), sparsity=0.5)
        masks.apply(other)
        assert sum(int((value == 0).sum()) for value in other.parameters()) == masks.pruned


@pytest.mark.parametrize("draw", [lambda: float(np.random.randn()), random.random, lambda: float(torch.randn(()))])  # noqa: NPY002
def test_both_copies_see_the_same_randomness(draw):
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    random.seed(3)
    expected = random.random()
    random.seed(3)
    removal = remove_channels(network, lambda net: net(row + draw()), sparsity=0.5)
    assert removal.share == 0.5
    assert random.random() == expected  # the global random state is unchanged


def test_a_step_that_disagrees_with_itself_is_named_as_such():
    network, calls = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), iter(range(99))
    with pytest.raises(ValueError, match="the step is not reproducible"):
        remove_channels(network, lambda net: net(row + next(calls)), sparsity=0.5)


def test_tracing_has_a_time_limit(monkeypatch):
    monkeypatch.setattr(channel_tracing, "SECONDS", 0.0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    with pytest.raises(ValueError, match=r"cannot be traced.* it took more than 0 s"):
        remove_channels(network, lambda net: net(row), sparsity=0.5)


def language_model(kind: str):
    """Build a small `transformers` model and its loss."""
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(64, (4, 16))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "GPT-2":
        options = tf.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
                                eos_token_id=0)  # fmt: skip
        network = tf.GPT2LMHeadModel(options)
    elif kind == "BERT":
        network = tf.BertForMaskedLM(tf.BertConfig(**sizes, vocab_size=64, max_position_embeddings=32))
    elif kind.startswith("T5"):
        options = tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                              decoder_start_token_id=0, feed_forward_proj=kind[3:] or "relu")  # fmt: skip
        network = tf.T5ForConditionalGeneration(options)
    elif kind.startswith("Llama"):
        network = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=int(kind[6:])))
    else:
        network = tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5))
        images, labels = torch.randn(4, 3, 16, 16), torch.randint(5, (4,))
        return network, lambda net: net(pixel_values=images, labels=labels).loss
    return network, lambda net: net(input_ids=ids, labels=ids).loss


@pytest.mark.filterwarnings("ignore")  # warnings of transformers
@pytest.mark.parametrize("kind", ["GPT-2", "BERT", "T5", "T5 gated-gelu", "Llama 4", "Llama 2", "Llama 1", "ViT"])
def test_half_of_the_feed_forward_neurons_of_a_language_model_go(kind, tmp_path):
    network, run = language_model(kind)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    run(network).backward()
    optimizer.step()
    before = copy.deepcopy(network)
    removal = remove_channels(network, run, sparsity=0.5, optimizers=optimizer)
    assert len(removal.removed) == (4 if kind.startswith("T5") else 2)
    assert all(len(gone) == removal.channels[name] // 2 >= 32 for name, gone in removal.removed.items())
    assert "left alone, coupled by attention" in removal.table()
    assert "(Embedding)" in removal.table() or kind == "ViT"
    network.eval()
    loss = run(network)
    torch.testing.assert_close(loss, run(zeroed(before, removal).eval()))
    state = torch.load(export_network(network, tmp_path / "small.pt", changes=removal.changes))["state_dict"]
    other, _ = language_model(kind)
    assert resize_like(other, state) == removal.changes
    other.load_state_dict(state)
    torch.testing.assert_close(run(other.eval()), loss)
    optimizer.zero_grad()
    run(network.train()).backward()
    optimizer.step()
    assert torch.isfinite(run(network))


def funnel(width: int = 16, inputs: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 3))


def test_a_removal_applies_only_to_a_network_of_the_same_structure():
    x, network = torch.ones(2, 8), funnel()
    removal = remove_channels(network, lambda network: network(x), sparsity=0.5)
    for other in (funnel(20), funnel(16, 9), network, nn.ReLU()):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=r"at '0.weight', where the channels were removed from shape \(16, 8\)"):
            removal.apply(other)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match=r"values has 256 elements, but '0.weight' had 128"):
        removal.left_of("0.weight", torch.ones(32, 8))
    assert copy.deepcopy(removal) == removal


@pytest.mark.parametrize("apply", [lambda y: y.masked_fill(y < 0, -torch.inf), torch.log, torch.sqrt])
def test_outputs_may_be_infinite(apply):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    removal = remove_channels(funnel(), lambda network: apply(network(x)), sparsity=0.5)
    assert removal.changes["0"] == {"out_features": (16, 8)}


@pytest.mark.parametrize(
    "wrap", [nn.utils.weight_norm, lambda part: nn.utils.prune.l1_unstructured(part, "weight", 0.5)]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_layer_with_a_computed_weight_does_not_stop_the_others(wrap):
    network = nn.Sequential(wrap(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    removal = remove_channels(network, lambda network: network(torch.ones(3, 8)), sparsity=0.5)
    assert list(removal.changes) == ["2", "4"]


def test_channels_are_removed_in_inference_mode_too():
    with torch.inference_mode():
        removal = remove_channels(network := funnel(), lambda network: network(torch.ones(2, 8)), sparsity=0.5)
    assert removal.changes["0"] == {"out_features": (16, 8)}
    network(torch.ones(2, 8)).sum().backward()


def test_tied_and_grouped_layers_are_resized_as_they_are():
    def tied(width: int) -> nn.Sequential:
        network = nn.Sequential(nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, width))
        network[2].weight = network[1].weight
        return network

    network, small = tied(16), tied(6)
    resize_like(network, small.state_dict())
    assert network[2].weight is network[1].weight
    network.load_state_dict(small.state_dict())
    twice = nn.Conv2d(8, 16, 3, groups=8)
    resize_like(twice, nn.Conv2d(4, 8, 3, groups=4).state_dict())
    assert (twice.groups, twice.in_channels, twice.out_channels) == (4, 4, 8)
    with pytest.raises(ValueError, match=r"a bias of '' of shape \(5,\), but its weight has 3 channels"):
        resize_like(nn.Linear(8, 4), {"weight": torch.zeros(3, 8), "bias": torch.zeros(5)})


def test_states_may_hold_more_than_tensors(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            pass

    saved = torch.load(export_network(Extra(4, 2), tmp_path / "small.pt"), weights_only=True)
    assert saved["state_dict"]["_extra_state"] == {"version": 1}
    assert resize_like(Extra(4, 2), Extra(4, 1).state_dict()) == {"": {"out_features": (2, 1)}}


def test_original_numbers_of_channels_are_checked():
    for originals, message in (({"typo": 32}, "names no layer"), ({"0": 4}, "is 4, but the layer has 16 channels now")):
        with pytest.raises(ValueError, match=message):
            remove_channels(funnel(), lambda network: network(torch.ones(2, 8)), sparsity=0.5, originals=originals)
