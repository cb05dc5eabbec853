"""``KoopmanPruner(structured=True)``: channel removal during training."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from problems import DEVICE, vector
from torch import nn

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    KoopmanWarning,
    Trajectory,
    averaged_weights,
    export_network,
    remove_channels,
    resize_like,
)
from lightning_koopman.pruning.optimizer_state import check_replacement

pytest.importorskip("torch_pruning")


class Residual(nn.Module):
    """A small network with batch norm, a residual connection and dropout."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.outer, self.drop, self.head = nn.Conv2d(12, 8, 1), nn.Dropout(0.1), nn.Linear(8 * 16, 10)

    def forward(self, images):
        z = torch.relu(self.norm(self.stem(images)))
        z = z + self.outer(torch.relu(self.inner_norm(self.inner(z))))
        return self.head(self.drop(nn.functional.max_pool2d(z, 2)).flatten(1))


class Encoder(nn.Module):
    """A transformer encoder that reads the rows of an image as a sequence."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.embedding = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, 10)

    def forward(self, images):
        return self.head(self.encoder(self.embedding(images.squeeze(1))).mean(1))


@pytest.fixture
def build(classifier):
    """Return a function that builds classifiers of 8×8 digits around a given network."""

    def make(network=Residual, **options):
        module = classifier(n=300, **options)
        module.network = network()
        module.images = module.images[:, None]
        return module

    return make


@pytest.fixture
def fit(trainer, build):
    def run(pruner, *others, epochs=8, module=None, ckpt_path=None, **options):
        module = build() if module is None else module
        # rounding in convolutions on a GPU depends on the order of threads
        options = {"deterministic": DEVICE == "cuda", **options}
        lightning = trainer(callbacks=[pruner, *others], max_epochs=epochs, **options)
        lightning.fit(module, ckpt_path=ckpt_path)
        return module, lightning

    return run


def saving(root, folder):
    return root.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)


def test_the_channels_of_least_reconstructed_weight_are_removed(fit, root):
    """Oracle: the same removal by hand, from snapshots recorded by another callback."""
    snapshots, before = [], []

    class Watch(root.Callback):
        def on_train_start(self, trainer, pl_module):
            snapshots.append(vector(dict(pl_module.named_parameters())))

        def on_train_epoch_end(self, trainer, pl_module):
            snapshots.append(vector(dict(pl_module.named_parameters())))
            before.append(copy.deepcopy(pl_module.network))

    pruner = KoopmanPruner(0.5, epoch=6, structured=True, parameters=["*", "!*outer*"])
    module, _ = fit(pruner, Watch())
    trajectory = Trajectory(snapshots[0].numel())
    for snapshot in snapshots[:7]:
        trajectory.append(snapshot)
    values = averaged_weights(trajectory, "persistent").values
    named = dict(before[5].named_parameters())
    parts = torch.split(values, [parameter.numel() for parameter in named.values()])
    scores = {name: part.reshape(named[name].shape) for name, part in zip(named, parts, strict=True)}
    images = module.images[:60].to(DEVICE)
    expected = remove_channels(before[5], lambda net: net(images), sparsity=0.5, scores=scores, layers="*inner.weight")
    assert pruner.changes == {f"network.{name}": value for name, value in expected.changes.items()}
    assert module.network.inner.weight.shape == (6, 8, 3, 3)


@pytest.mark.parametrize("network", [Residual, Encoder])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_networks_get_smaller_and_go_on_learning(fit, build, network, optimizer, root):
    losses = []

    class Watch(root.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            losses.append(float(trainer.callback_metrics["val_loss"]))

    pruner = KoopmanPruner(0.5, epoch=6, structured=True)
    module, lightning = fit(pruner, Watch(), epochs=14, module=build(network, optimizer=optimizer))
    assert losses[-1] < 0.8 * losses[1]
    dense = sum(parameter.numel() for parameter in network().parameters())
    assert sum(parameter.numel() for parameter in module.parameters()) == pruner.history[0]["parameters"] < dense
    held = {id(each) for group in lightning.optimizers[0].param_groups for each in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters()}
    for parameter, state in lightning.optimizers[0].state.items():
        assert all(value.shape in ((), parameter.shape) for value in state.values() if isinstance(value, torch.Tensor))
    assert float(lightning.callback_metrics["koopman/sparsity"]) == pytest.approx(pruner.achieved)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_nothing_of_the_run_changes_by_tracing_alone(fit, build, root):
    """Until the first removal, weights, statistics, random state and modes match a run without the callback."""
    states = []

    class Watch(root.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert pl_module.training
            states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    twins = []
    for callbacks in ([KoopmanPruner(0.5, epoch=3, structured=True)], []):
        torch.manual_seed(5)
        fit_module = build()
        torch.manual_seed(7)
        fit(*callbacks, Watch(), epochs=4, module=fit_module)
        twins.append(states[:15])
        states.clear()
    for ours, theirs in zip(*twins, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_other_callbacks_begin_a_new_trajectory(fit):
    monitor = KoopmanSpectrumMonitor(window=None)
    module, _ = fit(KoopmanPruner(0.5, epoch=5, structured=True), monitor, EarlyStopOnUnitEigenvalues())
    assert monitor.recorder.epochs == [5, 6, 7, 8]
    assert monitor.trajectory.n == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("stop", [4, 5, 7])
@pytest.mark.parametrize("options", [{}, {"rounds": 2, "round_epochs": 3}])
def test_a_resumed_run_is_the_uninterrupted_one(fit, build, root, tmp_path, stop, options):
    def pruner(name):
        return KoopmanPruner(0.5, epoch=5, structured=True, dirpath=tmp_path / name, **options)

    def network():
        module = build()
        module.network.drop = nn.Identity()
        return module

    class Crash(root.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == stop:
                raise KeyError("power cut")

    whole, part, resumed = pruner("whole"), pruner("part"), pruner("resumed")
    expected, _ = fit(whole, epochs=10, module=network())
    with pytest.raises(KeyError, match="power cut"):
        fit(part, Crash(), saving(root, tmp_path / "a"), epochs=10, module=network(), enable_checkpointing=True)
    path = tmp_path / "a" / f"epoch={stop - 1}.ckpt"
    module, _ = fit(
        resumed,
        saving(root, tmp_path / "b"),
        epochs=10,
        module=network(),
        enable_checkpointing=True,
        ckpt_path=path,
    )
    assert resumed.changes == whole.changes
    assert resumed.achieved == whole.achieved
    assert [row["pruned"] for row in resumed.history] == [row["pruned"] for row in whole.history]
    for a, b in zip(expected.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoints_of_the_small_network(fit, trainer, build, root, tmp_path):
    pruner = KoopmanPruner(0.5, epoch=3, structured=True)
    module, lightning = fit(pruner, saving(root, tmp_path), epochs=5, enable_checkpointing=True)
    state = torch.load(tmp_path / "epoch=4.ckpt", weights_only=True)["state_dict"]
    loaded = build()
    assert resize_like(loaded, state) == pruner.changes
    loaded.load_state_dict(state)
    images = module.images[:20]
    assert torch.equal(loaded.eval().network(images), module.eval().network(images))

    fresh = build()
    callbacks = [KoopmanPruner(0.5, epoch=3, structured=True), saving(root, tmp_path)]
    again = trainer(callbacks=callbacks, enable_checkpointing=True)
    (metrics,) = again.validate(fresh, ckpt_path=tmp_path / "epoch=4.ckpt", verbose=False)
    assert metrics["val_loss"] == pytest.approx(float(lightning.callback_metrics["val_loss"]))


def test_a_checkpoint_of_another_network_is_not_forced_in(fit, build, root, tmp_path):
    fit(KoopmanPruner(0.5, epoch=3, structured=True), saving(root, tmp_path), epochs=4, enable_checkpointing=True)
    wider = build()
    wider.network.inner = nn.Conv2d(8, 4, 3, padding=1)
    wider.network.inner_norm, wider.network.outer = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit(
            KoopmanPruner(0.5, epoch=3, structured=True),
            saving(root, tmp_path / "b"),
            module=wider,
            enable_checkpointing=True,
            ckpt_path=tmp_path / "epoch=3.ckpt",
        )


def test_rounds_refer_to_the_original_channels(fit):
    pruner = KoopmanPruner(0.75, epoch=3, rounds=3, round_epochs=3, structured=True)
    module, _ = fit(pruner, epochs=11)
    shares = [0.75 * (1 - (1 - done) ** 3) for done in (1 / 3, 2 / 3, 1)]
    originals = {"stem": 8, "inner": 12}
    expected = [sum(round(share * count) for count in originals.values()) for share in shares]
    assert [row["pruned"] for row in pruner.history] == expected
    assert (module.network.stem.out_channels, module.network.inner.out_channels) == (2, 3)
    assert "network.inner" in pruner.table()
    assert "8 → 2" in pruner.table()


@pytest.mark.parametrize("survivors", ["reconstruction", "reinit"])
def test_what_becomes_of_the_survivors(fit, root, survivors):
    seen = []

    class Look(root.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 5 and batch_idx == 0:
                seen.append((copy.deepcopy(pl_module.network).cpu(), len(trainer.optimizers[0].state)))

    pruner = KoopmanPruner(0.5, epoch=5, structured=True, survivors=survivors)
    fit(pruner, Look(), epochs=7)
    network, remembered = seen[0]
    assert network.stem.out_channels == 4
    if survivors == "reinit":
        assert remembered == 0
        assert torch.equal(network.norm.weight, torch.ones(4))
    else:
        assert remembered > 0


def test_several_of_them_prune_at_once(fit):
    """Two layers pruned by different fractions, and masks in the remaining weights."""
    first = KoopmanPruner(0.5, epoch=5, structured=True, parameters=["*stem.weight", "*outer.weight"])
    second = KoopmanPruner(0.25, epoch=5, structured=True, parameters="*inner.weight", prefix="inner")
    masks = KoopmanPruner(0.5, epoch=5, parameters="*head.weight", prefix="masks")
    module, _ = fit(masks, first, second, epochs=8)
    assert (module.network.stem.out_channels, module.network.inner.out_channels) == (4, 9)
    assert first.history[0]["modes"] == second.history[0]["modes"] > 0
    weight = module.network.head.weight
    assert masks.masks["network.head.weight"].shape == weight.shape == (10, 64)
    assert torch.equal(weight.detach() == 0, ~masks.masks["network.head.weight"])


def test_compiled_networks(fit, build):
    module = build()
    module.network.compile(backend="aot_eager")
    fit(KoopmanPruner(0.5, epoch=3, structured=True), epochs=5, module=module)
    assert module.network.inner.out_channels == 6


def test_mixed_precision_and_accumulation(fit):
    module, _ = fit(
        KoopmanPruner(0.5, epoch=3, structured=True), epochs=5, precision="bf16-mixed", accumulate_grad_batches=2
    )
    assert module.network.inner.out_channels == 6


def test_the_small_network_is_handed_over(fit, tmp_path):
    pruner = KoopmanPruner(0.5, epoch=3, structured=True)
    module, _ = fit(pruner, epochs=4)
    saved = torch.load(export_network(module, tmp_path / "small.pt", changes=pruner.changes), weights_only=True)
    assert saved["arguments"]["network.inner"] == {"in_channels": 4, "out_channels": 6}


def test_steps_may_take_their_batch_apart(fit, build):
    module = build()
    base = type(module)

    class Apart(base):
        step, calls_seen = 0, 0

        def on_train_batch_start(self, batch, batch_idx):
            self.scale = 1.0

        def training_step(self, batch, batch_idx):
            self.step_count = getattr(self, "step_count", 0) + 1
            images, labels = batch.pop("images"), batch.pop("labels")
            images.mul_(self.scale * 1.01)
            self.lr_schedulers()
            rate = self.optimizers().param_groups[0]["lr"]
            assert rate > 0
            return nn.functional.cross_entropy(self.network(images), labels)

        def train_dataloader(self):
            data = [{"images": image, "labels": label} for image, label in zip(self.images, self.labels, strict=True)]
            return torch.utils.data.DataLoader(data[:300], batch_size=60)

    own = Apart(n=300)
    own.network, own.images = Residual(), own.images[:, None]
    fit(KoopmanPruner(0.5, epoch=3, structured=True), epochs=5, module=own)
    assert own.network.inner.out_channels == 6
    assert own.step_count == 25


def test_layers_that_only_validation_uses_keep_their_inputs(fit, build):
    module = build()

    class Probed(type(module)):
        def validation_step(self, batch, batch_idx):
            features = self.network.inner(torch.relu(self.network.norm(self.network.stem(batch[0]))))
            self.log("probe", self.probe(features.mean((2, 3))).mean())

    own = Probed(n=300)
    own.network, own.images, own.probe = Residual(), own.images[:, None], nn.Linear(12, 2)
    fit(KoopmanPruner(0.5, epoch=3, structured=True), epochs=5, module=own)
    assert own.network.stem.out_channels == 4
    assert own.network.inner.out_channels == 12


def test_checkpoints_from_before_and_after_go_into_the_trained_module(fit, root, tmp_path):
    pruner = KoopmanPruner(0.5, epoch=3, structured=True)
    module, lightning = fit(pruner, saving(root, tmp_path), epochs=5, enable_checkpointing=True)
    changes = {path: dict(arguments) for path, arguments in pruner.changes.items()}
    for epoch, width in ((4, 6), (1, 12), (4, 6)):
        path = tmp_path / f"epoch={epoch}.ckpt"
        lightning.validate(module, ckpt_path=path, verbose=False)
        assert module.network.inner.out_channels == width
    assert pruner.changes == changes


def test_small_layers_keep_a_channel(fit, build):
    class Tiny(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(128, 2), nn.Linear(2, 10))

    module, _ = fit(KoopmanPruner(0.9, epoch=3, structured=True), epochs=5, module=build(Tiny))
    assert module.network.head[0].out_features == 1


# -- what cannot be done ----------------------------------------------------------------------------------------------


def test_manual_optimization_needs_an_example(fit, build):
    def manual():
        module = build()
        module.automatic_optimization = False
        return module

    pruner = KoopmanPruner(0.5, epoch=3, structured=True)
    with pytest.raises(ValueError, match="set the module's `example_input_array`"):
        fit(pruner, module=manual())


def test_forward_is_traced_where_training_steps_cannot_be(fit, build):
    module = build()
    step = type(module).training_step

    class Manual(type(module)):
        def __init__(self) -> None:
            super().__init__(n=300)
            self.automatic_optimization = False
            self.network, self.images = Residual(), self.images[:, None]
            self.example_input_array = self.images[:3]

        def forward(self, images):
            return self.network(images)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = step(self, batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()
            return loss

    manual = Manual()
    fit(KoopmanPruner(0.5, epoch=3, structured=True), epochs=5, module=manual)
    assert manual.network.inner.out_channels == 6


def test_networks_without_channels_to_spare_are_refused_before_a_step(fit, build):
    module = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(
        ValueError, match=r"no channel of the network can be removed\. left alone, its outputs leave.*: network.1"
    ):
        fit(KoopmanPruner(0.5, epoch=3, structured=True), module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_averages_are_refused(fit, root):
    if not hasattr(root.callbacks, "WeightAveraging"):
        pytest.skip("this Lightning has no WeightAveraging")
    with pytest.raises(ValueError, match="average that WeightAveraging keeps"):
        fit(KoopmanPruner(0.5, epoch=3, structured=True), root.callbacks.WeightAveraging())


class Followed(nn.Module):
    """A network with a part that follows its weights, or that reads its channels at other times."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 10))
        self.kind = kind
        if kind == "teacher":
            self.other = copy.deepcopy(self.student).requires_grad_(False)
        else:
            self.other = nn.Linear(32, 10)

    def forward(self, images):
        hidden = self.student(images)
        return self.head(hidden + self.other(images) if self.kind == "teacher" else hidden)


@pytest.mark.parametrize(
    ("kind", "left"), [("teacher", "is a frozen copy of it"), ("head", "which does not run in a training step")]
)
def test_channels_that_another_part_may_follow_or_read_are_kept(fit, build, caplog, kind, left):
    with caplog.at_level(logging.INFO):
        module, _ = fit(KoopmanPruner(0.5, epoch=4, structured=True), module=build(lambda: Followed(kind)))
    assert module.network.student[1].out_features == 32
    assert module.network.head[1].out_features == 10
    assert left in caplog.text


def test_complex_parameters_do_not_stop_the_others(fit, build):
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(64, 32), nn.Linear(32, 8), nn.Linear(8, 10)
            self.modes = nn.Parameter(torch.ones(5, dtype=torch.cfloat))

        def forward(self, images):
            hidden = torch.fft.rfft(self.second(torch.relu(self.first(images.flatten(1)))))
            return self.head(torch.fft.irfft(hidden * self.modes, n=8))

    module, _ = fit(KoopmanPruner(0.5, epoch=4, structured=True), module=build(Spectral))
    assert module.network.first.out_features == 16


def test_copies_of_the_weights_are_refused(fit, build):
    module = build()
    module.teacher = torch.optim.swa_utils.AveragedModel(module.network)
    with pytest.raises(ValueError, match="cannot resize the AveragedModel"):
        fit(KoopmanPruner(0.5, epoch=3, structured=True), module=module)


def test_modules_that_cannot_be_copied_are_named(fit, build):
    import threading

    module = build()
    module.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"the module cannot be copied, .*lock"):
        fit(KoopmanPruner(0.5, epoch=3, structured=True), module=module)


def test_a_missing_tracer_is_named(monkeypatch, fit):
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning_koopman\[structured\]'"):
        fit(KoopmanPruner(0.5, epoch=3, structured=True))


def test_a_failing_removal_warns_and_leaves_the_network_whole(fit, monkeypatch, build):
    monkeypatch.setattr("lightning_koopman.callbacks.channel_rounds.agrees", lambda *_: False)
    module = build()
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    with pytest.warns(KoopmanWarning, match="not the same as setting them to zero"):
        _, lightning = fit(KoopmanPruner(0.5, epoch=3, structured=True), epochs=5, module=module)
    assert {name: value.shape for name, value in module.state_dict().items()} == shapes
    assert lightning.current_epoch == 5


KINDS = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and kind is not torch.optim.Optimizer]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_optimizer_of_pytorch_steps_what_got_smaller(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some optimizers are new or accept only sparse gradients
        check_replacement([kind([nn.Parameter(torch.ones(2, 2))])])


def test_an_optimizer_that_cannot_is_refused_before_the_first_step(trainer, classifier):
    class Odd(torch.optim.SGD):
        def __init__(self, params, **given):
            super().__init__(params, **given)
            self.memory = [torch.zeros_like(each) for each in self.param_groups[0]["params"]]

        def step(self, closure=None):
            loss = super().step(closure)
            for each, kept in zip(self.param_groups[0]["params"], self.memory, strict=True):
                each.data.add_(kept)
            return loss

    class Module(classifier):
        def configure_optimizers(self):
            return Odd(self.parameters(), lr=0.01)

    model = Module()
    before = [each.detach().clone() for each in model.parameters()]
    with pytest.raises(ValueError, match=r"smaller parameters, which Odd cannot step.*take another optimizer"):
        trainer(callbacks=KoopmanPruner(sparsity=0.5, epoch=3, structured=True)).fit(model)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
