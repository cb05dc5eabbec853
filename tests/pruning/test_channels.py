from __future__ import annotations

import copy
import io

import pytest
import torch
from oracles import zeroed
from torch import nn

from lightning_koopman import export_network, remove_channels, resize_like

pytest.importorskip("torch_pruning")


class Block(nn.Module):
    """A residual block with batch norms, as in a ResNet."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, z):
        return torch.relu(z + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(z))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.down = nn.Conv2d(16, 16, 3, groups=16)  # depthwise
        self.point, self.head = nn.Conv2d(16, 24, 1), nn.Linear(24, 5)

    def forward(self, z):
        z = self.point(self.down(self.blocks(torch.relu(self.norm(self.stem(z))))))
        return self.head(torch.relu(z).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.embedding = nn.Linear(8, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, z):
        return self.head(self.encoder(self.embedding(z)).mean(1))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 10, 3), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8 * 10 * 10, 4)

    def forward(self, z):
        z = self.c(torch.sigmoid(torch.cat([self.a(z), self.b(z)], 1)))
        return self.head(torch.tanh(z).flatten(1))


class Heads(nn.Module):
    """Hand-written attention that forms its heads by reshaping."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.f1, self.f2, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 3)

    def forward(self, z):
        q, k, v = (part(z).view(*z.shape[:2], 2, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        z = z + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((z + self.f2(torch.sigmoid(self.f1(z)))).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.inner, self.gru = nn.Linear(8, 16), nn.GRU(16, 16, batch_first=True)
        self.outer, self.head = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, z):
        return self.head(torch.relu(self.outer(self.gru(self.inner(z))[0])))


images, sequence = torch.randn(4, 3, 12, 12), torch.randn(4, 7, 8)
NETWORKS = {
    "residual": (Residual, images, {"stem", "blocks.0.conv1", "blocks.1.conv1", "point"}),
    "encoder": (Encoder, sequence, {"encoder.layers.0.linear1", "encoder.layers.1.linear1"}),
    "concatenated": (Concatenated, images, {"a", "b", "c"}),
    "heads": (Heads, sequence, {"f1"}),
    "recurrent": (Recurrent, sequence, {"outer"}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_removing_channels_is_setting_them_to_zero(name):
    build, example, groups = NETWORKS[name]
    network = build()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    before = copy.deepcopy(network)
    removal = remove_channels(network, lambda net: net(example), sparsity=0.6)
    assert set(removal.removed) == groups
    assert all(
        len(gone) == round(0.6 * count)
        for gone, count in zip(removal.removed.values(), removal.channels.values(), strict=True)
    )
    expected = zeroed(before, removal).eval()(example)
    torch.testing.assert_close(network.eval()(example), expected, rtol=1e-4, atol=1e-5)
    size = [sum(parameter.numel() for parameter in each.parameters()) for each in (network, before)]
    assert size[0] < size[1]
    network.train()(example).sum().backward()  # still trainable
    assert all(parameter.grad.shape == parameter.shape for parameter in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_dict_resizes_a_new_network(name):
    build, example, _ = NETWORKS[name]
    network, fresh = build(), build()
    removal = remove_channels(network, lambda net: net(example), sparsity=0.5)
    assert resize_like(fresh, network.state_dict()) == removal.changes
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(example), network.eval()(example))
    assert str(fresh) == str(network)  # the sizes that the layers print


def test_what_is_left_alone_is_named_with_the_reason():
    def reasons(name):
        build, example, _ = NETWORKS[name]
        return remove_channels(build(), lambda net: net(example), sparsity=0.5).left_alone

    assert reasons("residual") == {"head": "its outputs leave the network"}
    encoder = reasons("encoder")
    assert encoder["embedding"] == "coupled with LayerNorm"
    assert encoder["encoder.layers.0.self_attn"] == "unsupported layer type (MultiheadAttention)"
    heads = reasons("heads")
    assert {heads[name] for name in "qkv"} == {"coupled by attention"}
    recurrent = reasons("recurrent")
    assert recurrent["inner"] == "coupled by a module that is traced as a whole"
    assert recurrent["gru"] == "unsupported layer type (GRU)"


def test_scores_decide_what_goes():
    network = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    scores = {"0.weight": torch.ones(10, 4), "2.weight": torch.ones(2, 10)}
    for neuron in (2, 3, 7):
        scores["0.weight"][neuron], scores["2.weight"][:, neuron] = 0.1, 0.1
    before = network[0].weight.detach().clone()
    removal = remove_channels(network, lambda net: net(torch.ones(1, 4)), sparsity=0.3, scores=scores)
    assert removal.removed == {"0": [2, 3, 7]}
    assert torch.equal(network[0].weight, before[[0, 1, 4, 5, 6, 8, 9]])
    assert removal.share == 0.3


def test_global_scope_ranks_all_layers_together():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))
    with torch.no_grad():
        network[2].weight[:8] *= 1e-3
        network[4].weight[:, :8] *= 1e-3
    removal = remove_channels(network, lambda net: net(torch.ones(1, 4)), sparsity=0.25, scope="global")
    assert sum(map(len, removal.removed.values())) == 10
    assert set(removal.removed["2"]) >= set(range(8))


def test_a_layer_keeps_a_channel():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    removal = remove_channels(network, lambda net: net(torch.ones(1, 4)), sparsity=0.99)
    assert network[0].out_features == 1
    assert removal.share == pytest.approx(2 / 3)


def test_later_rounds_refer_to_the_original_channels():
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    for sparsity, left in ((0.25, 12), (0.5, 8), (0.75, 4), (0.75, 4)):
        remove_channels(network, lambda net: net(torch.ones(1, 4)), sparsity=sparsity, originals={"0": 16})
        assert network[0].out_features == left


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "Adagrad", "RMSprop"])
def test_optimizers_carry_on_with_what_is_left(optimizer):
    """Oracle: the removed neuron does nothing, so no later step may change."""
    options = {"momentum": 0.9} if optimizer in ("SGD", "RMSprop") else {}
    twins = []
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    start[0].weight.data[2], start[0].bias.data[2], start[2].weight.data[:, 2] = 0.0, 0.0, 0.0  # and stays zero
    inputs, targets = torch.randn(8, 4), torch.randn(8, 2)
    for removes in (True, False):
        network = copy.deepcopy(start)
        stepper = getattr(torch.optim, optimizer)(network.parameters(), lr=0.05, **options)
        for epoch in range(6):
            if epoch == 3 and removes:
                remove_channels(network, lambda net: net(inputs), sparsity=1 / 6, optimizers=[stepper])
            stepper.zero_grad()
            nn.functional.mse_loss(network(inputs), targets).backward()
            stepper.step()
        assert all(any(each is own for own in network.parameters()) for each in stepper.param_groups[0]["params"])
        twins.append(network)
    kept = [0, 1, 3, 4, 5]
    assert twins[0][0].out_features == 5
    torch.testing.assert_close(twins[0][0].weight, twins[1][0].weight[kept], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(twins[0][2].weight, twins[1][2].weight[:, kept], rtol=1e-4, atol=1e-6)


def test_an_optimizer_with_one_memory_for_all_starts_anew():
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    stepper = torch.optim.LBFGS(network.parameters(), max_iter=5)
    inputs, targets = torch.randn(8, 4), torch.randn(8, 2)

    def closure():
        stepper.zero_grad()
        loss = nn.functional.mse_loss(network(inputs), targets)
        loss.backward()
        return loss

    stepper.step(closure)
    remove_channels(network, lambda net: net(inputs), sparsity=0.5, optimizers=[stepper])
    before = stepper.step(closure).item()
    assert closure().item() < before


def test_layers_can_be_selected():
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    removal = remove_channels(network, lambda net: net(torch.ones(1, 4)), sparsity=0.5, layers=["*", "!2.*"])
    assert removal.removed.keys() == {"0"}
    assert removal.left_alone["2"] == "not selected"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, r"sparsity must lie in \(0, 1\), got 1.5"),
        ({"sparsity": 0.5, "scope": "layer"}, "scope must be one of"),
        ({"sparsity": 0.5, "layers": "conv*"}, "layers='conv.' matches no weight of a layer"),
        ({"sparsity": 0.5, "scores": {"3.weight": torch.ones(2, 2)}}, r"scores\['3.weight'\] .* does not exist"),
        ({"sparsity": 0.5, "scores": {"0.weight": torch.ones(8)}}, r"that parameter has shape \(8, 4\)"),
        ({"sparsity": 0.5, "layers": "2.*"}, "no channel of the network can be removed"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=message):
        remove_channels(network, lambda net: net(torch.ones(1, 4)), **options)
    assert network[0].out_features == 8


class Shuffled(nn.Module):
    """Channels whose order matters after a reshape that tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shuffle, self.b = nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.Conv2d(4, 2, 3)
        self.c, self.d = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 1, 1)

    def forward(self, z):
        return self.d(torch.relu(self.c(self.b(self.shuffle(self.a(z))))))


class Averaged(nn.Module):
    """A mean over the channels: each channel affects all others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, z):
        z = self.a(z)
        return self.d(torch.relu(self.c(torch.relu(self.b(z - z.mean(-1, keepdim=True))))))


@pytest.mark.parametrize(("build", "example", "sound"), [(Shuffled, images, {"c"}), (Averaged, sequence, {"b", "c"})])
def test_hidden_couplings_are_found_by_trying(build, example, sound):
    torch.manual_seed(0)
    network = build()
    removal = remove_channels(network, lambda net: net(example), sparsity=0.5)
    assert sound <= removal.removed.keys() <= sound | {"b"}
    assert "a" in removal.left_alone
    network(example)


def test_shared_and_derived_weights_are_left_alone():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
            self.e = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.head = nn.Linear(8, 2)
            self.b.weight = self.a.weight

        def forward(self, z):
            for part in (self.a, self.b, self.c, self.d, self.e):
                z = torch.relu(part(z))
            return self.head(z)

    removal = remove_channels(Shared(), lambda net: net(sequence), sparsity=0.5)
    assert set(removal.removed) == {"c"}
    assert "shared between modules" in removal.left_alone["a"]
    assert "computed from other parameters" in removal.left_alone["e"]


def test_a_run_must_use_the_copy_it_is_given():
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for run in (lambda _: None, lambda net: net(torch.ones(1, 4)).detach(), lambda _: "loss"):
        with pytest.raises(ValueError, match="returned nothing that depends on the network"):
            remove_channels(network, run, sparsity=0.5)


def test_weights_that_are_zero_hide_nothing():
    """A head that starts at zero makes any two networks agree, so the check must not use the current weights."""
    torch.manual_seed(0)
    network = Averaged()
    nn.init.zeros_(network.d.weight)
    removal = remove_channels(network, lambda net: net(sequence), sparsity=0.5)
    assert "a" in removal.left_alone
    assert set(removal.removed) == {"b", "c"}


def test_modules_under_two_names_are_not_shared():
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
            self.features, self.head = self.net[:2], self.net[2]

        def forward(self, z):
            return self.head(self.features(z))

    network = Alias()
    assert remove_channels(network, lambda net: net(sequence), sparsity=0.5).share == 0.5
    network(sequence)


def test_layers_that_are_used_in_training_only_are_seen():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.aux = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, z):
            z = torch.relu(self.a(z))
            extra = self.aux(z) if self.training else 0
            return self.c(torch.relu(self.b(z))) + extra

    network = Auxiliary()
    removal = remove_channels(network, lambda net: net(sequence), sparsity=0.5)
    assert set(removal.removed) == {"b"}
    assert "fails without its channels" in removal.left_alone["a"]
    network.train()(sequence)


@pytest.mark.parametrize("optimizer", ["Adafactor", "Adam"])
def test_one_optimizer_needs_no_list(optimizer):
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    stepper = getattr(torch.optim, optimizer)(network.parameters(), lr=0.01)
    for _ in range(2):
        network(torch.ones(2, 4)).sum().backward()
        stepper.step()
        remove_channels(network, lambda net: net(torch.ones(1, 4)), sparsity=0.5, optimizers=stepper)
    assert network[0].out_features == 2
    stepper.zero_grad()
    network(torch.ones(2, 4)).sum().backward()
    stepper.step()


def test_a_removal_that_fails_leaves_network_and_optimizer_whole():
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    stepper = torch.optim.Adam(network.parameters())
    network(torch.ones(2, 4)).sum().backward()
    stepper.step()
    removal = remove_channels(copy.deepcopy(network), lambda net: net(torch.ones(1, 4)), sparsity=0.5)
    stepper.state[network[2].weight]["exp_avg"] = None
    stepper.state[network[0].weight] = 7  # not an optimizer state
    with pytest.raises(AttributeError):
        removal.apply(network, stepper)
    assert network[0].out_features == 8
    assert all(any(each is own for own in network.parameters()) for each in stepper.param_groups[0]["params"])


def test_channels_last_stays():
    network = Residual().to(memory_format=torch.channels_last)
    remove_channels(network, lambda net: net(images), sparsity=0.5)
    assert network.blocks[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_resizing_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"'1' \(LayerNorm\) has another size"):
        resize_like(
            nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4)),
            nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)).state_dict(),
        )


# -- export -----------------------------------------------------------------------------------------------------------


def test_an_exported_network_needs_no_library(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(800, 3))
    removal = remove_channels(network, lambda net: net(images), sparsity=0.5)
    saved = torch.load(export_network(network, tmp_path / "small.pt", changes=removal.changes), weights_only=True)
    width = saved["arguments"]["0"]["out_channels"]
    by_hand = nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(saved["arguments"]["1"]["num_features"]),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(saved["arguments"]["4"]["in_features"], 3),
    )
    by_hand.load_state_dict(saved["state_dict"])
    assert torch.equal(by_hand.eval()(images), network.eval()(images))


@pytest.mark.parametrize("name", ["residual", "encoder"])
def test_an_exported_onnx_computes_the_same_for_any_batch(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    build, example, _ = NETWORKS[name]
    network = build()
    remove_channels(network, lambda net: net(example), sparsity=0.5)
    network.head.eval()  # export restores the mode of each module
    path = export_network(network, tmp_path / "small.onnx", example=example[:1])
    assert network.training
    assert not next(network.modules()).head.training
    session = onnxruntime.InferenceSession(str(path))
    found = session.run(None, {session.get_inputs()[0].name: example.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), network.eval()(example).detach(), rtol=1e-4, atol=1e-5)


def test_onnx_needs_an_example(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="example=None"):
        export_network(nn.Linear(2, 2), tmp_path / "small.onnx")
    with pytest.raises(ValueError, match="got a dict"):
        export_network(nn.Linear(2, 2), tmp_path / "small.onnx", example={"input": torch.ones(1, 2)})


def test_removals_can_be_stored_and_applied_to_a_twin():
    network = Residual()
    twin = copy.deepcopy(network)
    removal = remove_channels(network, lambda net: net(images), sparsity=0.5)
    file = io.BytesIO()
    torch.save({"kept": removal.kept, "changes": removal.changes}, file)
    removal.apply(twin)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), twin.parameters(), strict=True))
