from __future__ import annotations

import copy
import gc
import math
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_koopman import SobolevLoss, export_network, shrink_noise, sobolev_loss, sobolev_scales, suggest_scales


def mlp(n_inputs: int = 1, n_outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = (nn.Linear(n_inputs, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(7, n_outputs))


def samples(n: int = 40, n_inputs: int = 1, n_outputs: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(n, n_inputs, generator=draw)
    return x, torch.sin(7 * x.sum(1, keepdim=True)) + 0.1 * torch.randn(n, n_outputs, generator=draw)


x, y = samples()
rule = {"domain": (0, 1)}


def by_hooks(network: nn.Module, **options: Any) -> SobolevLoss:
    return SobolevLoss(5, network=network, layers=["1", "3"], **{"example": x, **rule, **options})


# -- both losses -----------------------------------------------------------------------------------------------------


def test_loss_2_is_the_function():
    network = mlp()
    for training in (True, False):
        loss = SobolevLoss((2, 5), exponent=-0.5, literal=True, norm=2, **rule).train(training)
        expected = sobolev_loss(network(x), y, x, scales=(2, 5), exponent=-0.5, literal=True, norm=2, **rule)
        assert torch.equal(loss(network(x), y, x), expected)
    assert not list(loss.parameters())
    assert not loss.state_dict()


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_loss_1_hears_the_layers(n_outputs):
    network, (inputs, targets) = mlp(2, n_outputs), samples(70, 2, n_outputs)
    loss = SobolevLoss(5, network=network, layers=["1", "3"], example=inputs, **rule)
    value = loss(network(inputs), targets, inputs)
    first = network[1](network[0](inputs))
    second = network[3](network[2](first))
    stack = [loss.heads[0](first), loss.heads[1](second), network[4](second)]
    expected = sobolev_loss(stack, targets, inputs, scales=sobolev_scales(3, highest=5), **rule)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in loss.parameters())
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_activations_and_outputs_can_be_handed_over():
    network = mlp()
    heard = by_hooks(network)
    expected = heard(network(x), y, x)
    handed = SobolevLoss(5, widths=[6, 7], **rule)
    handed.heads.load_state_dict(heard.heads.state_dict())
    first = network[:2](x)
    hidden = [first, network[2:4](first)]
    torch.testing.assert_close(handed(network(x), y, x, hidden=hidden), expected)
    stack = [head(each) for head, each in zip(handed.heads, hidden, strict=True)] + [network(x)]
    torch.testing.assert_close(SobolevLoss(5, **rule)(stack, y, x), expected)


def test_channels_of_convolutions_on_a_grid():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1))
    images, targets = torch.randn(3, 1, 8, 8), torch.randn(3, 2, 8, 8)
    loss = SobolevLoss(3, network=network, layers="1", example=images)
    value = loss(network(images), targets)
    hidden = torch.einsum("oc,bcij->boij", loss.heads[0].weight, network[:2](images))
    stack = [hidden + loss.heads[0].bias[:, None, None], network(images)]
    torch.testing.assert_close(value, sobolev_loss(stack, targets, scales=(3, 3)))


def test_a_stacked_tensor_can_be_handed_over_and_widths_serve_grids():
    handed = SobolevLoss(3, widths=[4, 4], n_outputs=2)
    hidden, outputs, targets = torch.randn(2, 3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    value = handed(outputs, targets, hidden=hidden)
    stack = [torch.einsum("oc,bci->boi", head.weight, each) for head, each in zip(handed.heads, hidden, strict=True)]
    stack = [each + head.bias[:, None] for head, each in zip(handed.heads, stack, strict=True)]
    torch.testing.assert_close(value, sobolev_loss([*stack, outputs], targets, scales=(3, 3, 3)))


def test_quadrature_weights():
    weights = torch.rand(40, generator=torch.Generator().manual_seed(2))
    weights /= weights.sum()
    value = SobolevLoss(4, **rule)(0 * y, y, x, weights=weights)
    assert torch.equal(value, sobolev_loss(0 * y, y, x, scales=4, weights=weights, **rule))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, inputs):
        return self.inner(inputs)[:, 0]


def test_vectors_of_one_output():
    network = Flat()
    loss = SobolevLoss(5, network=network, layers=["inner.1", "inner.3"], example=x, **rule)
    value = loss(network(x), y[:, 0], x[:, 0])
    assert value.requires_grad
    torch.testing.assert_close(loss(network(x)[:, None], y, x), value)


def test_mini_batches_are_without_bias_in_training_and_in_evaluation():
    loss = SobolevLoss(3, n_samples=40, **rule)
    zero = torch.zeros_like(y)
    whole = sobolev_loss(zero, y, x, scales=3, **rule)
    draw = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(4000):
        some = torch.randperm(40, generator=draw)[:8]
        parts.append(loss(zero[some], y[some], x[some]))
    values = torch.stack(parts)
    assert abs(values.mean() - whole) < 4 * values.std() / math.sqrt(len(parts))
    half = slice(0, 20)
    expected = sobolev_loss(zero[half], y[half], x[half], scales=3, n_samples=math.inf, **rule)
    assert torch.equal(loss.eval()(zero[half], y[half], x[half]), expected)
    weights = torch.full((20,), 0.05)  # weights for the whole validation set
    expected = sobolev_loss(zero[half], y[half], x[half], scales=3, **rule)
    torch.testing.assert_close(loss(zero[half], y[half], x[half], weights=weights), expected)


def test_batches_of_validation_data_rank_networks_whatever_their_size():
    # the plain loss of a batch includes the noise of its samples: the smaller the batch, the more of it
    draw = torch.Generator().manual_seed(0)
    points = torch.rand(1600, 1, generator=draw)
    clean = torch.sin(2 * math.pi * points)
    noisy = clean + torch.randn(1600, 1, generator=draw)
    loss = SobolevLoss(64, n_samples=1600, **rule).eval()
    for size in (16, 64, 1600):
        perfect, nothing = (
            torch.stack([loss(*some) for some in zip(*(each.split(size) for each in data), strict=True)]).mean()
            for data in ((clean, noisy, points), (0 * clean, noisy, points))
        )
        assert abs(perfect) < 0.1
        assert nothing - perfect == pytest.approx(0.5 * (1 + (2 * math.pi) ** 2) ** -0.25, abs=0.1)


# -- the period ------------------------------------------------------------------------------------------------------


def test_the_period_is_observed_once_in_training():
    loss = SobolevLoss(3)
    loss.eval()(y, y, x)  # a validation check before training
    assert loss.domain is None
    loss.train()(y, y, x)
    low, high = float(x.min()), float(x.max())
    assert loss.domain[0] == pytest.approx((low, high + (high - low) / 39))
    loss.eval()(y, y, x - 0.1)  # held-out points may reach further
    with pytest.raises(ValueError, match="outside of the period"):
        loss.train()(y, y, x - 0.1)


def test_a_given_period_holds_for_held_out_points():
    loss = SobolevLoss(3, **rule).eval()
    with pytest.raises(ValueError, match=r"points reach from .* to 1\..* in input 0, outside of the period \(0, 1\)"):
        loss(y, y, x + 0.5)


def test_an_observed_period_goes_with_the_state():
    loss = SobolevLoss(3)
    assert not loss.state_dict()
    loss(y, y, x)
    restored = SobolevLoss(3)
    restored.load_state_dict(loss.state_dict())
    assert restored.domain == loss.domain
    fixed = SobolevLoss(3, **rule)  # a given domain is kept
    fixed.load_state_dict(loss.state_dict())
    assert fixed.domain == ((0, 1),)
    restored.load_state_dict(SobolevLoss(3).state_dict())
    assert restored.domain == loss.domain


def test_a_single_sample_shows_no_period():
    with pytest.raises(ValueError, match="cannot infer `domain` from one sample: pass domain"):
        SobolevLoss(3).eval()(y[:1], y[:1], x[:1])


def test_held_out_points_must_be_finite():
    loss = SobolevLoss(3)
    loss(y, y, x)
    with pytest.raises(ValueError, match="NaN or infinite"):
        loss.eval()(y, y, x * math.nan)


def test_several_processes_need_a_given_period(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    SobolevLoss(3, **rule)(y, y, x)
    with pytest.raises(ValueError, match="each process would see the range of its own samples"):
        SobolevLoss(3)(y, y, x)


# -- the basis is cached ---------------------------------------------------------------------------------------------


def test_the_basis_is_made_once_for_the_same_points(monkeypatch):
    made = []
    from lightning_koopman.fourier import basis

    original = basis.fourier_basis
    monkeypatch.setattr(basis, "fourier_basis", lambda *given: made.append(1) or original(*given))
    loss = SobolevLoss(5, **rule)
    for _ in range(3):
        loss(0 * y, y, x.clone())  # another tensor with the same points
    assert len(made) == 1
    moved = x.clone()
    loss(0 * y, y, moved)
    moved[0] = 0.5  # changed in place
    value = loss(0 * y, y, moved)
    assert len(made) == 2
    assert torch.equal(value, sobolev_loss(0 * y, y, moved, scales=5, **rule))
    loss(0 * y, y, x)
    assert len(made) == 2
    for step in range(10):
        loss(0 * y, y, x * (0.9 - step / 100))
    assert len(loss._cache._kept) == 4
    monkeypatch.setattr(basis, "WHOLE", 2 * loss._cache.n_bytes // 4)
    loss(0 * y, y, x * 0.5)
    assert len(loss._cache._kept) <= 2


def test_a_basis_made_in_inference_mode_serves_training():
    network, loss = mlp(), SobolevLoss(5, **rule)
    with torch.inference_mode():
        loss(network(x), y, x)
    loss(network(x), y, x).backward()
    by_hooks(network)(network(x), y, x).backward()


def test_double_precision_and_moves_between_dtypes():
    network = mlp().double()
    loss = by_hooks(network, example=x.double())
    assert loss.heads[0].weight.dtype == torch.float64
    assert loss(network(x.double()), y.double(), x.double()).dtype == torch.float64
    network.float(), loss.float()
    assert loss(network(x), y, x).dtype == torch.float32


# -- copies, files and exports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_of_network_and_loss_belong_together(twin):
    network = mlp()
    both = nn.ModuleList([network, by_hooks(network)])
    expected = both[1](network(x), y, x)
    network(x)  # activations that no loss uses
    other = twin(both)
    assert all(tap.value is None for tap in other[1]._taps)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(other[1](other[0](x), y, x), expected)


def test_the_network_stays_free_of_the_loss(tmp_path):
    network = mlp()
    names = list(network.state_dict())
    loss = by_hooks(network)
    assert list(network.state_dict()) == names
    together = nn.ModuleDict({"network": network, "loss": loss})
    state = torch.load(export_network(together, tmp_path / "network.pt"))["state_dict"]
    assert list(state) == [f"network.{name}" for name in names]
    pytest.importorskip("onnxscript")
    network(x)
    path = export_network(network, tmp_path / "network.onnx", example=x)
    import onnx

    weights = {each.name: tuple(each.dims) for each in onnx.load(path).graph.initializer}
    assert sorted(weights) == sorted(names)


def test_hooks_can_be_removed():
    network = mlp()
    loss = by_hooks(network)
    assert len(network[1]._forward_hooks) == 1
    loss.remove_hooks()
    assert not network[1]._forward_hooks
    network(x)
    with pytest.raises(RuntimeError, match="has not run"):
        loss(network(x), y, x)


def test_hooks_go_with_the_loss():
    network = mlp()
    by_hooks(network)
    gc.collect()
    assert not network[1]._forward_hooks


def test_a_loss_under_two_names_is_left_out_under_both(tmp_path):
    network = mlp()
    together = nn.ModuleDict({"network": network, "loss": by_hooks(network)})
    together["again"] = together["loss"]
    state = torch.load(export_network(together, tmp_path / "network.pt"))["state_dict"]
    assert all(name.startswith("network.") for name in state)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.reentrant = mlp()[:4], nn.Linear(7, 1), reentrant

    def forward(self, inputs):
        return self.head(checkpoint(self.body, inputs, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_layers_that_run_again_in_the_backward_pass_are_not_heard_again():
    network, inputs = Checkpointed(False), x.clone().requires_grad_()
    loss = SobolevLoss(5, network=network, layers=["body.1", "body.3"], example=x, **rule)
    loss(network(inputs), y, x).backward()
    assert all(tap.value is None for tap in loss._taps)
    reentrant = Checkpointed(True)
    loss = SobolevLoss(5, network=reentrant, layers="body.1", example=x, **rule)
    with pytest.warns(UserWarning, match=r"body\.1 ran under no_grad"):
        loss(reentrant(inputs), y, x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.unused = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, inputs):
        return self.block(self.block(inputs))


class Backwards(nn.Module):
    """Layers defined in the reverse of their execution order."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.second, self.first = nn.Linear(5, 1), nn.Linear(4, 5), nn.Linear(1, 4)

    def forward(self, inputs):
        return self.last(self.second(self.first(inputs)))


def test_scales_go_to_layers_in_the_order_in_which_they_run():
    network = Backwards()
    loss = SobolevLoss((1, 2, 4), network=network, layers=["second", "first"], example=x, **rule)
    assert [tap.name for tap in loss._taps] == ["first", "second"]
    assert [head.in_features for head in loss.heads] == [4, 5]
    value = loss(network(x), y, x)
    first = network.first(x)
    stack = [loss.heads[0](first), loss.heads[1](network.second(first)), network(x)]
    torch.testing.assert_close(value, sobolev_loss(stack, y, x, scales=(1, 2, 4), **rule))


def test_two_forwards_before_the_loss_are_said():
    network = mlp()
    loss = by_hooks(network)
    with torch.no_grad():
        network(x)  # for a metric, or a teacher
    loss(network(x), y, x)
    outputs = network(x)
    network(0.9 * x)
    with pytest.warns(UserWarning, match="the network ran 2 times since the loss was last called"):
        loss(outputs, y, x)


def test_copies_of_the_network_alone_keep_nothing():
    network = mlp()
    loss = by_hooks(network)
    network(x)
    teacher = copy.deepcopy(network)
    teacher(x)
    (tap,) = teacher[1]._forward_hooks.values()
    assert tap.value is None
    both = copy.deepcopy(nn.ModuleList([network, loss]))
    copied = both[0]
    assert copied[1]._forward_hooks
    del both
    gc.collect()
    assert not copied[1]._forward_hooks
    assert network[1]._forward_hooks


def test_paper_heads_have_no_offset():
    assert by_hooks(mlp(), literal=True).heads[0].bias is None
    assert SobolevLoss(5, widths=[6], literal=True).heads[0].bias is None


@pytest.mark.parametrize(("layer", "message"), [("block", "runs 2 times"), ("unused", "runs 0 times")])
def test_layers_must_run_once(layer, message):
    with pytest.raises(ValueError, match=message):
        SobolevLoss(5, network=Twice(), layers=layer, example=x)


def test_nothing_of_the_network_changes_while_the_widths_are_learned():
    network = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    before = copy.deepcopy(network.state_dict())
    generator = torch.get_rng_state()
    loss = SobolevLoss(3, network=network, layers="1", example=x, **rule)
    assert network.training
    assert network[2].training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert loss.heads[0].in_features == 4
    assert not torch.equal(generator, torch.get_rng_state())  # only the heads draw random numbers


# -- the compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["loss 1", "loss 2", "mini-batch", "pieces", "grid"])
def test_a_training_step_is_compiled_as_one_graph(way, monkeypatch):
    torch.compiler.reset()
    network = mlp()
    loss = by_hooks(network) if way == "loss 1" else SobolevLoss(5, **rule)
    arguments = (y, x)
    if way == "mini-batch":
        loss = SobolevLoss(5, n_samples=100, **rule)
    if way == "pieces":
        monkeypatch.setattr("lightning_koopman.fourier.basis.WHOLE", 500)
        monkeypatch.setattr("lightning_koopman.fourier.basis.PIECE", 500)
    inputs = x
    if way == "grid":
        network, loss, inputs, arguments = (
            nn.Conv1d(1, 2, 3, padding=1),
            SobolevLoss(4),
            x.mT[None],
            (y.mT[None] * torch.ones(1, 2, 1),),
        )

    def step(inputs, *arguments):
        return loss(network(inputs), *arguments)

    value = step(inputs, *arguments)
    value.backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        network.zero_grad()
        found = compiled(inputs, *arguments)
        found.backward()
    torch.testing.assert_close(found, value)
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grid", [False, True])
def test_the_function_is_compiled_as_one_graph(grid):
    torch.compiler.reset()
    arguments = (torch.randn(1, 1, 16), torch.randn(1, 1, 16)) if grid else (torch.randn(40, 1), y, x)
    for scales, exponent in [(5, None), (5, -0.3), (7, -0.7), (2.5, -0.7), ((1, 3), -0.2)]:
        options = {"scales": scales, "exponent": exponent} | ({} if grid else rule)

        def step(*given, options=options):
            return sobolev_loss(*given, **options)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), step(*arguments))


def test_a_compiled_network_is_heard_by_a_loss_that_is_not():
    torch.compiler.reset()
    network = mlp()
    loss = by_hooks(torch.compile(network, backend="aot_eager"))
    value = loss(network(x), y, x)
    value.backward()
    expected = network[0].weight.grad.clone()
    network.zero_grad()
    compiled = torch.compile(network, backend="aot_eager")
    again = loss(compiled(x), y, x)
    again.backward()
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(network[0].weight.grad, expected)


def test_losses_with_different_exponents_can_be_compiled_in_one_process():
    torch.compiler.reset()
    for exponent in (-0.2, -0.4, -0.6):
        loss = SobolevLoss(5, exponent=exponent, **rule)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(torch.zeros_like(y), y, x), loss(torch.zeros_like(y), y, x))


# -- Lightning -------------------------------------------------------------------------------------------------------


def module(root: ModuleType, **options: Any) -> Any:
    class Fit(root.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = x[:2]
            self.network = mlp()
            self.loss = SobolevLoss(5, network=self.network, layers=["1", "3"], example=x[:2], **{**rule, **options})
            self.values: list[float] = []

        def forward(self, inputs):
            return self.network(inputs)

        def training_step(self, batch, batch_idx):
            value = self.loss(self(batch[0]), batch[1], batch[0])
            self.values.append(float(value.detach()))
            return value

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(self(batch[0]), batch[1], batch[0]))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.02)

        def data(self, batch_size: int = 40):
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch_size)

    return Fit()


@pytest.mark.parametrize("options", [{}, {"domain": None}, {"n_samples": 40}])
def test_it_trains_in_a_lightning_module(root, trainer, options):
    fit = module(root, **options)
    heads = copy.deepcopy(fit.loss.heads.state_dict())
    run = trainer(max_epochs=60)
    run.fit(fit, fit.data(16 if "n_samples" in options else 40), fit.data())
    assert fit.values[-1] < 0.3 * fit.values[0]
    assert float(run.callback_metrics["val_loss"]) < 0.3 * fit.values[0]
    assert not any(torch.equal(value, heads[name]) for name, value in fit.loss.heads.state_dict().items())


def test_a_resumed_training_is_the_uninterrupted_one(root, trainer, tmp_path):
    whole = module(root)
    trainer(max_epochs=6).fit(whole, whole.data(), whole.data())
    half = module(root)
    run = trainer(max_epochs=3)
    run.fit(half, half.data(), half.data())
    run.save_checkpoint(tmp_path / "half.ckpt")
    rest = module(root)
    trainer(max_epochs=6).fit(rest, rest.data(), rest.data(), ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(rest.state_dict()[name], value)


def test_mixed_precision(root, trainer):
    fit = module(root)
    trainer(max_epochs=20, precision="bf16-mixed").fit(fit, fit.data(), fit.data())
    assert fit.values[-1] < fit.values[0]


def test_the_whole_way_from_noisy_samples():
    scales = suggest_scales(x, y, n_layers=3, domain=(0, 1))
    loss = SobolevLoss(scales, domain=(0, 1))
    targets = shrink_noise(x, y, domain=(0, 1))
    assert targets.dtype == y.dtype
    assert loss([targets] * 3, targets, x) == 0


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "9"}, "layers='9' matches no layer; the module has 0, 1, 2, 3, 4"),
        ({"layers": None}, "belong together"),
        ({"network": None}, "belong together"),
        ({"example": None}, "example=None"),
        ({"example": torch.rand(3, 2)}, "the network fails on the example"),
        ({"widths": [6]}, "leave them out with layers"),
        ({"n_samples": 40, "domain": None}, "domain=None takes the period from the whole data set"),
        ({"n_samples": 0}, "n_samples must be"),
        ({"scales": (1, 2)}, "has length 2, but 3 outputs"),
        ({"scales": (0.5, 1, 2), "literal": True}, "its shell is empty"),
        ({"scales": ()}, "scales must be"),
        ({"layers": [1]}, "layers must be names of layers"),
        ({"n_outputs": 2}, "belongs to widths"),
        ({"exponent": "low"}, "exponent must be"),
    ],
)
def test_bad_arguments_are_errors_before_training(options, message):
    network = mlp()
    arguments = {"scales": 5, "network": network, "layers": ["1", "3"], "example": x, "domain": (0, 1), **options}
    with pytest.raises(ValueError, match=message):
        SobolevLoss(**arguments)
    assert not any(part._forward_hooks for part in network)  # no hook remains


@pytest.mark.parametrize("widths", [[], [0], [6, 2.5], 6, [True - 1]])
def test_bad_widths(widths):
    with pytest.raises(ValueError, match="widths and n_outputs must be whole numbers"):
        SobolevLoss(5, widths=widths)


def test_bad_calls_are_named():
    network = mlp()
    loss = by_hooks(network)
    with pytest.raises(RuntimeError, match="layer '1' has not run since"):
        loss(torch.zeros_like(y), y, x)
    outputs = network(x)
    with pytest.raises(ValueError, match="leave it out"):
        loss(outputs, y, x, hidden=[outputs])
    network(x[:5])
    shape = r"layer '1' has the shape \(5, 6\), expected \(40, 6\)"
    with pytest.warns(UserWarning, match="ran 2 times"), pytest.raises(ValueError, match=shape):
        loss(outputs, y, x)
    with pytest.raises(TypeError, match="outputs must be the network's output, one tensor"):
        loss([outputs], y, x)
    network(x)
    with pytest.raises(ValueError, match=r"outputs has the shape \(40, 1\), targets \(40, 2\)"):
        loss(outputs, y.expand(40, 2), x)
    handed = SobolevLoss(5, widths=[6, 7], **rule)
    with pytest.raises(ValueError, match="pass 2 activations"):
        handed(outputs, y, x)
    with pytest.raises(ValueError, match="hidden must be 2 tensors, one for each of widths, got 1: Tensor"):
        handed(outputs, y, x, hidden=[outputs])
    with pytest.raises(ValueError, match="got 2: Tensor, NoneType"):
        handed(outputs, y, x, hidden=[outputs, None])
    with pytest.raises(TypeError, match="targets must be a tensor"):
        loss(outputs, y.numpy(), x)
    with pytest.raises(ValueError, match="there are no heads"):
        SobolevLoss(5, **rule)(outputs, y, x, hidden=[outputs])


class Recurrent(nn.Module):
    def __init__(self, all_of_it: bool) -> None:
        super().__init__()
        self.cells, self.all_of_it = nn.LSTM(1, 3), all_of_it

    def forward(self, inputs):
        found = self.cells(inputs)
        return found if self.all_of_it else found[0]


def test_layers_and_networks_that_return_no_tensor():
    with pytest.raises(ValueError, match="layer 'cells' returns a tuple"):
        SobolevLoss(5, network=Recurrent(False), layers="cells", example=x)
    with pytest.raises(ValueError, match="the network returns a tuple"):
        SobolevLoss(5, network=Recurrent(True), layers="cells", example=x)


def test_too_many_modes_are_one_warning():
    loss = SobolevLoss(30, **rule)
    with pytest.warns(UserWarning, match="the 61 cosines and sines .* 40 samples"):
        loss(0 * y, y, x)
    loss(0 * y, y, x)  # warned once: a second warning would be an error here
