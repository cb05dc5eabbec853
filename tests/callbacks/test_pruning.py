from __future__ import annotations

import csv
import math
import warnings

import numpy as np
import pytest
import torch
from problems import DEVICE, vector
from torch import nn

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    KoopmanWarning,
    MaskSet,
    RestartOnBadInitialization,
    Trajectory,
    averaged_weights,
    select_parameters,
)

WEIGHTS = ("network.1.weight", "network.5.weight")  # in the classifier


@pytest.fixture
def watch(root):
    """Callback that records the weights and checks that pruned ones are zero after every step."""

    class Watch(root.Callback):
        def __init__(self, pruner: KoopmanPruner) -> None:
            self.pruner, self.at_start, self.snapshots, self.checked = pruner, {}, [], 0

        def note(self, module) -> dict[str, torch.Tensor]:
            return {name: value.detach().cpu().clone() for name, value in module.named_parameters()}

        def on_train_start(self, trainer, pl_module):
            self.snapshots.append(vector(select_parameters(pl_module)))

        def on_train_epoch_start(self, trainer, pl_module):
            self.at_start[trainer.current_epoch] = self.note(pl_module)

        def on_train_batch_end(self, trainer, pl_module, *_):
            named = dict(pl_module.named_parameters())
            for name, mask in (self.pruner.masks or {}).items():
                assert not named[name].detach()[~mask].any()
                self.checked += 1

        def on_train_epoch_end(self, trainer, pl_module):
            self.snapshots.append(vector(select_parameters(pl_module)))

    return Watch


@pytest.fixture
def fit(trainer, classifier, watch):
    """Return a function that trains a classifier with a pruner and returns the module and the watching callback."""

    def run(pruner, *others, epochs=10, module=None, ckpt_path=None, **options):
        module = classifier() if module is None else module
        watcher = watch(pruner)
        lightning = trainer(callbacks=[pruner, *others, watcher], max_epochs=epochs, **options)
        lightning.fit(module, ckpt_path=ckpt_path)
        watcher.trainer = lightning
        return module, watcher

    return run


# -- the paper's algorithms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("survivors", ["keep", "reconstruction", "reinit"])
@pytest.mark.parametrize("amount", [{"sparsity": 0.75}, {"threshold": 0.05}, {"sparsity": 0.5, "scope": "tensor"}])
def test_the_algorithms_of_the_paper(fit, survivors, amount):
    """Oracle: reconstruction and mask computed from snapshots recorded by another callback."""
    pruner = KoopmanPruner(**amount, epoch=7, survivors=survivors, window=5)
    module, watcher = fit(pruner)
    trajectory = Trajectory(watcher.snapshots[0].numel())
    for snapshot in watcher.snapshots[3:8]:  # after epochs 3, …, 7
        trajectory.append(snapshot)
    named = {name: value for name, value in module.named_parameters() if value.requires_grad}
    parts = torch.split(averaged_weights(trajectory, "persistent").values, [value.numel() for value in named.values()])
    reconstruction = {name: part.reshape(named[name].shape) for name, part in zip(named, parts, strict=True)}
    before_parts = torch.split(watcher.snapshots[7], [value.numel() for value in named.values()])
    before = {name: part.reshape(named[name].shape) for name, part in zip(named, before_parts, strict=True)}
    masks = MaskSet.from_scores({name: reconstruction[name] for name in WEIGHTS}, **amount)
    assert pruner.masks.agreement(masks) == 1.0
    now = watcher.at_start[7]
    for name in WEIGHTS:
        assert not now[name][~masks[name]].any()
        kept = now[name][masks[name]]
        if survivors == "keep":
            assert torch.equal(kept, before[name][masks[name]])
        elif survivors == "reconstruction":
            torch.testing.assert_close(kept, reconstruction[name][masks[name]], rtol=1e-5, atol=1e-7)
        else:
            assert not torch.isclose(kept, before[name][masks[name]]).any()
    others = set(named) - set(WEIGHTS)
    if survivors == "reinit":
        assert torch.equal(now["network.2.weight"], torch.ones(32))
    else:
        assert all(torch.equal(now[name], before[name]) for name in others)
    assert watcher.checked > 0


def test_drawing_anew_resets_the_optimizer_and_follows_the_scheme(fit, root):
    states = []

    class Look(root.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            states.append(len(trainer.optimizers[0].state))

    pruner = KoopmanPruner(0.5, epoch=4, survivors="reinit", scheme="orthogonal", seed=3)
    _, watcher = fit(pruner, Look(), epochs=6)
    assert states[3:5] == [6, 0]
    weight = watcher.at_start[4]["network.1.weight"]
    torch.manual_seed(3 + 1)  # modules are drawn in order: first nn.Linear's own draw, then the scheme's
    expected = nn.init.orthogonal_(nn.Linear(64, 32, device=DEVICE).weight.detach()).cpu()
    assert torch.equal(weight, expected * pruner.masks["network.1.weight"])
    assert torch.equal(watcher.at_start[4]["network.1.bias"], torch.zeros(32))


def test_with_patterns_only_their_modules_are_drawn_anew(fit):
    pruner = KoopmanPruner(0.5, epoch=4, survivors="reinit", parameters="network.5.*weight")
    _, watcher = fit(pruner, epochs=5)
    before, now = watcher.snapshots[4], watcher.at_start[4]
    kept = vector({name: value for name, value in now.items() if not name.startswith("network.5")})
    assert torch.equal(kept, before[: kept.numel()])
    assert list(pruner.masks) == ["network.5.weight"]


# -- persistent masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}],
    ids=["plain", "accumulated", "mixed", "clipped"],
)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_pruned_weights_stay_zero_in_training(fit, classifier, options, optimizer):
    pruner = KoopmanPruner(0.8, epoch=3)
    module, watcher = fit(pruner, epochs=6, module=classifier(optimizer=optimizer), **options)
    assert watcher.checked >= 3 * 10
    assert pruner.achieved == round(0.8 * (32 * 64 + 320)) / (32 * 64 + 320)
    total = sum(int((dict(module.named_parameters())[name] == 0).sum()) for name in WEIGHTS)
    assert total == pruner.masks.pruned


def test_manual_optimization(fit, regression):
    class Manual(regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            loss = nn.functional.mse_loss(self(batch[0]), batch[1])
            for optimizer in (first, second):
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in (first, second):
                optimizer.step()
            return loss

        def configure_optimizers(self):
            return [
                torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9),
                torch.optim.Adam(self.head.parameters(), lr=0.05),
            ]

    pruner = KoopmanPruner(0.5, epoch=3)
    _, watcher = fit(pruner, epochs=6, module=Manual())
    assert watcher.checked > 0


def test_compiled_modules(fit, classifier):
    pruner = KoopmanPruner(0.5, epoch=3)
    module = classifier()
    module.network.compile(backend="aot_eager")
    _, watcher = fit(pruner, epochs=5, module=module)
    assert watcher.checked > 0


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_of_the_weights_are_sparse(fit, root, kind):
    callbacks = root.callbacks
    if kind == "ema" and not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("this Lightning has no WeightAveraging")
    if kind == "ema":
        from torch.optim.swa_utils import get_ema_avg_fn

        average = callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    else:
        average = callbacks.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2)
    zeros = []

    class Validated(root.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            zeros.append(sum(int((dict(pl_module.named_parameters())[name] == 0).sum()) for name in WEIGHTS))

    pruner = KoopmanPruner(0.75, epoch=4)
    module, _ = fit(pruner, average, Validated(), epochs=8)
    assert zeros[-4:] == [pruner.masks.pruned] * 4
    named = dict(module.named_parameters())
    assert sum(int((named[name] == 0).sum()) for name in WEIGHTS) == pruner.masks.pruned


def test_nothing_is_left_on_the_module_after_training(fit):
    pruner = KoopmanPruner(0.75, epoch=4)
    module, watcher = fit(pruner, epochs=6)
    assert list(module.state_dict()) == list(type(module)().state_dict())
    assert all(not parameter._post_accumulate_grad_hooks for parameter in module.parameters())
    assert not watcher.trainer.optimizers[0]._optimizer_step_post_hooks


# -- checkpoints ------------------------------------------------------------------------------------------------------


def saving(root, folder, **options):
    return root.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1, **options)


@pytest.mark.parametrize("stop", [3, 4, 5, 7])
@pytest.mark.parametrize("options", [{}, {"rounds": 2, "round_epochs": 3}, {"survivors": "reinit"}])
def test_a_resumed_run_is_the_uninterrupted_one(fit, trainer, classifier, root, tmp_path, stop, options):
    def pruner(name):
        return KoopmanPruner(0.75, epoch=4, dirpath=tmp_path / name, **options)

    class Crash(root.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == stop:
                raise KeyError("power cut")

    whole, part, resumed = pruner("whole"), pruner("part"), pruner("resumed")
    expected, _ = fit(whole, epochs=9, module=classifier(dropout=0.0))
    lightning = trainer(
        callbacks=[Crash(), part, saving(root, tmp_path / "ckpt")], max_epochs=9, enable_checkpointing=True
    )
    with pytest.raises(KeyError, match="power cut"):
        lightning.fit(classifier(dropout=0.0))
    path = tmp_path / "ckpt" / f"epoch={stop - 1}.ckpt"
    module, _ = fit(
        resumed,
        saving(root, tmp_path / "ckpt2"),
        epochs=9,
        module=classifier(dropout=0.0),
        enable_checkpointing=True,
        ckpt_path=path,
    )
    assert resumed.masks.agreement(whole.masks) == 1.0
    assert [row["epoch"] for row in resumed.history] == [row["epoch"] for row in whole.history]
    for a, b in zip(expected.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoints_without_our_state_are_plain_sparse_networks(fit, root, tmp_path, classifier):
    pruner = KoopmanPruner(0.75, epoch=2)
    fit(pruner, saving(root, tmp_path, save_weights_only=True), epochs=4, enable_checkpointing=True)
    stored = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    assert "callbacks" not in stored
    loaded = classifier()
    assert loaded.state_dict().keys() == stored["state_dict"].keys()
    loaded.load_state_dict(stored["state_dict"])
    assert MaskSet.from_zeros(loaded).agreement(pruner.masks) == 1.0


def test_a_finished_run_that_is_resumed_keeps_its_masks(fit, root, trainer, classifier, tmp_path):
    pruner = KoopmanPruner(0.75, epoch=2, window=8)
    fit(pruner, saving(root, tmp_path / "a"), epochs=4, enable_checkpointing=True)
    path = tmp_path / "a" / "epoch=3.ckpt"
    for epochs in (4, 6):  # nothing to train, then two more epochs; with another window
        again = KoopmanPruner(0.75, epoch=2)
        _, watcher = fit(
            again,
            saving(root, tmp_path / f"b{epochs}"),
            epochs=epochs,
            enable_checkpointing=True,
            ckpt_path=path,
        )
        path = tmp_path / "later.ckpt"
        watcher.trainer.save_checkpoint(path)
        assert again.masks.agreement(pruner.masks) == 1.0
        assert [row["epoch"] for row in again.history] == [2]
    tested = KoopmanPruner(0.75, epoch=2)
    lightning = trainer(callbacks=[tested, saving(root, tmp_path / "c")], enable_checkpointing=True)
    lightning.validate(classifier(), ckpt_path=path, verbose=False)
    assert tested.table() == pruner.table()


def test_a_checkpoint_within_an_epoch_does_not_lose_the_pruning(fit, root, tmp_path):
    """Lightning starts no epoch when it resumes after the last batch of one."""
    steps = root.callbacks.ModelCheckpoint(tmp_path / "a", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    fit(KoopmanPruner(0.75, epoch=4), steps, epochs=6, enable_checkpointing=True)
    again = KoopmanPruner(0.75, epoch=4)
    more = root.callbacks.ModelCheckpoint(tmp_path / "b", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KoopmanWarning)  # that epoch's snapshot is missing
        fit(
            again,
            more,
            epochs=5,
            enable_checkpointing=True,
            ckpt_path=tmp_path / "a" / "step=40.ckpt",
        )
    assert [row["epoch"] for row in again.history] == [4]


def test_a_further_fit_keeps_the_masks(fit):
    pruner = KoopmanPruner(0.75, epoch=2)
    module, watcher = fit(pruner, epochs=4)
    watcher.trainer.fit_loop.max_epochs = 6
    before = watcher.checked
    watcher.trainer.fit(module)
    assert watcher.checked > before
    assert len(pruner.history) == 1


def test_a_callback_that_served_another_fit_begins_anew(fit):
    pruner = KoopmanPruner(0.75, epoch=2)
    fit(pruner, epochs=4)
    fit(pruner, epochs=4)
    assert [row["epoch"] for row in pruner.history] == [2]


# -- the schedule -----------------------------------------------------------------------------------------------------


def test_rounds_approach_the_sparsity(fit):
    pruner = KoopmanPruner(0.8, epoch=3, rounds=3, round_epochs=3)
    fit(pruner, epochs=11)
    assert [row["epoch"] for row in pruner.history] == [3, 6, 9]
    expected = [0.8 * (1 - (1 - done) ** 3) for done in (1 / 3, 2 / 3, 1)]
    np.testing.assert_allclose([row["sparsity"] for row in pruner.history], expected, atol=3e-4)
    assert [row["snapshots"] for row in pruner.history] == [4, 4, 4]


def test_rounds_raise_the_threshold(fit):
    pruner = KoopmanPruner(threshold=0.1, epoch=3, rounds=2, round_epochs=3)
    fit(pruner, epochs=8)
    assert [row["target"] for row in pruner.history] == [0.05, 0.1]


def test_it_waits_until_the_weights_have_settled(fit, classifier):
    pruner = KoopmanPruner(0.75, settled_change=0.02)
    module = classifier(optimizer="decayed")
    _, watcher = fit(pruner, epochs=40, module=module)
    at = pruner.history[0]["epoch"]
    snapshots = torch.stack(watcher.snapshots)
    moved = (snapshots[at] - snapshots[at - 10]).norm() / snapshots[at].norm()
    assert moved <= 0.02
    earlier = (snapshots[at - 2] - snapshots[at - 12]).norm() / snapshots[at - 2].norm() if at >= 12 else 1.0
    assert at > 11
    assert earlier > moved
    assert pruner.schedule.changes[0] <= 0.02


def test_it_does_not_take_a_warm_up_for_rest(fit, classifier):
    def warm_up(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1e-5 if epoch < 16 else 1.0)

    pruner = KoopmanPruner(0.75)
    with pytest.warns(KoopmanWarning, match="training ended after epoch 19 at 0%|training ended after epoch 20 at 0%"):
        fit(pruner, epochs=20, module=classifier(scheduler=warm_up))
    assert pruner.masks is None


def test_it_says_why_nothing_was_pruned(fit):
    pruner = KoopmanPruner(0.75, settled_change=1e-9)
    with pytest.warns(KoopmanWarning, match="waited for changes of at most .* the last were"):
        fit(pruner, epochs=13)
    pruner = KoopmanPruner(0.75, epoch=5)

    with pytest.warns(KoopmanWarning, match="round 1 of 1 was due after epoch 5"):
        fit(pruner, epochs=9, max_steps=20)


# -- logs and messages ------------------------------------------------------------------------------------------------


def test_it_logs_the_sparsity_and_writes_a_table(fit, root, tmp_path):
    logger = root.loggers.CSVLogger(tmp_path / "logs")
    pruner = KoopmanPruner(0.75, epoch=3)
    _, watcher = fit(pruner, epochs=5, logger=logger)
    assert float(watcher.trainer.callback_metrics["koopman/sparsity"]) == pruner.achieved
    with open(logger.log_dir + "/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    shares = {row["parameter"]: row["sparsity"] for row in pruner.masks.rows()}
    for name in WEIGHTS:
        logged = [float(row[f"koopman/sparsity/{name}"]) for row in rows if row[f"koopman/sparsity/{name}"]]
        assert logged == [pytest.approx(shares[name])]
    sparsities = [float(row["koopman/sparsity"]) for row in rows if row["koopman/sparsity"]]
    assert sparsities == [0, 0, 0, *[pytest.approx(pruner.achieved)] * 2]
    with open(pruner.history_path) as file:
        (row,) = csv.DictReader(file)
    assert int(row["pruned"]) == pruner.masks.pruned
    assert 0.5 < float(row["magnitude_agreement"]) <= 1
    assert "network.1.weight" in pruner.table()
    assert KoopmanPruner(0.5).table() == "nothing has been pruned yet"


def test_other_callbacks_begin_a_new_trajectory(fit):
    monitor, stop = KoopmanSpectrumMonitor(window=None), EarlyStopOnUnitEigenvalues()
    pruner = KoopmanPruner(0.75, epoch=4)
    _, watcher = fit(pruner, monitor, stop, epochs=7)
    assert monitor.recorder.epochs == [4, 5, 6, 7]
    first = monitor.trajectory.snapshots()[0]
    assert torch.equal(first, vector(watcher.at_start[4]))
    assert pruner.recorder is monitor.recorder


def test_it_keeps_no_snapshots_that_it_does_not_need(fit):
    pruner = KoopmanPruner(0.75, epoch=8, window=4)
    seen = []
    original = pruner.snapshot_taken
    pruner.snapshot_taken = lambda trainer, module, epoch, recorded: (
        seen.append((epoch, len(pruner.recorder))),
        original(trainer, module, epoch, recorded),
    )
    fit(pruner, epochs=10)
    assert seen == [(5, 1), (6, 2), (7, 3), (8, 4)]
    assert len(pruner.recorder) == 0


# -- errors and warnings ----------------------------------------------------------------------------------------------


def test_too_few_snapshots_leave_it_to_the_magnitudes(fit):
    pruner = KoopmanPruner(0.75, epoch=1)
    with pytest.warns(KoopmanWarning, match="2 snapshots are too few"):
        fit(pruner, epochs=3)
    assert pruner.history[0]["magnitude_agreement"] == 1.0
    assert pruner.history[0]["modes"] == 0


def test_an_empty_tensor_is_refused_and_training_goes_on(fit):
    pruner = KoopmanPruner(threshold=50.0, epoch=3)
    with pytest.warns(KoopmanWarning, match="prunes all weights of 'network.1.weight'"):
        _, watcher = fit(pruner, epochs=5)
    assert pruner.masks is None
    assert watcher.trainer.current_epoch == 5
    allowed = KoopmanPruner(threshold=50.0, epoch=3, allow_empty=True)
    fit(allowed, epochs=5)
    assert allowed.achieved == 1.0


def test_the_callbacks_live_together(fit):
    pruner = KoopmanPruner(0.75, epoch=12)
    fit(pruner, RestartOnBadInitialization(), EarlyStopOnUnitEigenvalues(mode="report"), epochs=15)
    assert len(pruner.history) == 1


def test_weights_that_nobody_trains_are_left_alone(fit, classifier):
    module = classifier()
    module.teacher = nn.Linear(8, 8)  # requires a gradient, but no optimizer updates it
    module.configure_optimizers = lambda: torch.optim.Adam(module.network.parameters(), lr=1e-2)
    before = module.teacher.weight.detach().clone()
    pruner = KoopmanPruner(0.75, epoch=3)
    fit(pruner, epochs=5, module=module)
    assert list(pruner.masks) == list(WEIGHTS)
    assert torch.equal(module.teacher.weight, before)


def test_a_restart_after_a_pruning_keeps_the_masks(trainer, classifier, watch, root):
    class Restart(root.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 4:
                restart._chosen, restart._due = ["network.1", "network.5"], "a test"

    restart, pruner = RestartOnBadInitialization(check_epoch=30), KoopmanPruner(0.75, epoch=3)
    monitor, watcher = KoopmanSpectrumMonitor(window=None), watch(pruner)
    trainer(callbacks=[monitor, restart, pruner, Restart(), watcher], max_epochs=8).fit(classifier())
    assert watcher.checked == 5 * 10 * 2
    assert monitor.recorder.epochs == [5, 6, 7, 8]
    assert int((monitor.trajectory.snapshots()[0] == 0).sum()) >= pruner.masks.pruned


def test_a_layer_that_is_replaced_is_held_too(fit, root):
    class Replace(root.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 4:
                pl_module.network[5] = nn.Linear(32, 10, device=pl_module.device)
                trainer.strategy.setup_optimizers(trainer)

    _, watcher = fit(KoopmanPruner(0.75, epoch=3), Replace(), epochs=8)
    assert watcher.checked > 0


def test_optimizers_without_step_hooks(fit, classifier):
    class Wrapped:
        """An object that Lightning accepts as an optimizer, although it is no subclass of PyTorch's."""

        def __init__(self, inner) -> None:
            self.inner, self.state, self.defaults = inner, inner.state, inner.defaults
            self.param_groups, self.zero_grad = inner.param_groups, inner.zero_grad
            self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict

        def step(self, closure=None):
            return self.inner.step(closure)

    network = nn.Linear(3, 3)
    optimizer = Wrapped(torch.optim.SGD(network.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="Wrapped takes no step hooks"):
        MaskSet({"weight": torch.zeros(3, 3) > 0}).pin(network, optimizer)
    module = classifier()
    module.configure_optimizers = lambda: Wrapped(torch.optim.Adam(module.parameters(), lr=1e-2))
    pruner = KoopmanPruner(0.75, epoch=3)
    fit(pruner, epochs=5, module=module)
    named = dict(module.named_parameters())
    assert all(not named[name].detach()[~mask].any() for name, mask in pruner.masks.items())


def test_a_failing_draw_leaves_the_survivors_as_they_were(fit):
    def scheme(module):
        for parameter in module.parameters(recurse=False):
            parameter.zero_()
        raise RuntimeError("no such scheme")

    pruner = KoopmanPruner(0.75, epoch=3, survivors="reinit", scheme=scheme)
    with pytest.warns(KoopmanWarning, match="setting the survivors failed.*no such scheme"):
        _, watcher = fit(pruner, epochs=5)
    mask = pruner.masks["network.1.weight"]
    assert watcher.at_start[3]["network.1.weight"][mask].all()


def test_an_exception_lets_go_of_the_module(fit, root, classifier):
    class Fail(root.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 4:
                raise KeyError("stop")

    module, pruner = classifier(), KoopmanPruner(0.75, epoch=3)
    with pytest.raises(KeyError):
        fit(pruner, Fail(), epochs=6, module=module)
    assert pruner.method._pin is None
    assert all(not parameter._post_accumulate_grad_hooks for parameter in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "are both None"),
        ({"sparsity": 0.5, "threshold": 0.1}, "exclude each other"),
        ({"sparsity": 1.0}, r"sparsity must lie in \(0, 1\), got 1.0"),
        ({"threshold": 0.0}, "threshold must be positive"),
        ({"sparsity": 0.5, "epoch": 0}, "epoch must be at least 1"),
        ({"sparsity": 0.5, "epoch": "late"}, "epoch must be a number of completed epochs or 'settled', got 'late'"),
        ({"sparsity": 0.5, "survivors": "drop"}, "survivors must be one of"),
        ({"sparsity": 0.5, "rule": "all"}, "rule must be one of"),
        ({"sparsity": 0.5, "scope": "layer"}, "scope must be one of"),
        ({"threshold": 0.5, "scope": "tensor"}, "scope='tensor' needs sparsity"),
        ({"sparsity": 0.5, "rounds": 0}, "rounds must be at least 1"),
        ({"sparsity": 0.5, "round_epochs": 2}, "round_epochs must be at least 3"),
        ({"sparsity": 0.5, "radius": 0.0}, "radius must be positive"),
        ({"sparsity": 0.5, "settled_change": math.inf}, "settled_change must be positive"),
        ({"sparsity": 0.5, "scheme": "he"}, "scheme='he' is for survivors='reinit'"),
        ({"sparsity": 0.5, "survivors": "reinit", "scheme": "hee"}, "scheme must be None, one of"),
        ({"sparsity": 0.5, "window": 8}, "window must be at least 11 with epoch='settled'"),
        ({"threshold": 0.5, "structured": True}, "give the share of channels as"),
        ({"sparsity": 0.5, "structured": True, "allow_empty": True}, "allow_empty=True is for masks"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        KoopmanPruner(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5, "epoch": 10}, "epoch=10 must be below max_epochs=10"),
        ({"sparsity": 0.5, "epoch": 5, "rounds": 3}, "the last after epoch 15, must be below max_epochs=10"),
        ({"sparsity": 0.5}, "epoch='settled' looks 10 epochs back, but max_epochs=10"),
        ({"sparsity": 0.5, "rounds": 2, "parameters": None}, "epoch='settled' looks"),
        ({"sparsity": 0.5, "epoch": 5, "parameters": []}, "is empty: pass one or more patterns"),
        ({"sparsity": 0.5, "epoch": 5, "parameters": "head.*"}, "parameters='head.*' matches no parameter"),
        (
            {"sparsity": 0.99, "epoch": 5, "parameters": "*.bias", "scope": "tensor"},
            "prunes all 32 weights of 'network.1.bias'",
        ),
    ],
)
def test_bad_settings_are_refused_before_training(fit, options, message):
    pruner = KoopmanPruner(**options)
    with pytest.raises(ValueError, match=message):
        fit(pruner, epochs=10)
    assert pruner.history == []


def test_deepspeed_is_refused(fit, root):
    class DeepSpeedStrategy(root.strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(ValueError, match="partitions of its own"):
        fit(KoopmanPruner(0.5, epoch=3), strategy=DeepSpeedStrategy("cpu"), accelerator="cpu")


def test_two_of_them_prune_at_once(fit):
    weights, biases = (
        KoopmanPruner(0.5, epoch=4),
        KoopmanPruner(0.5, epoch=4, parameters="*.bias", prefix="biases", allow_empty=True),
    )
    fit(weights, biases, epochs=6)
    assert weights.achieved == pytest.approx(0.5)
    assert biases.achieved == pytest.approx(0.5, abs=0.01)
    assert biases.history[0]["snapshots"] == weights.history[0]["snapshots"] == 5


def test_fast_dev_runs_are_left_alone(fit):
    pruner = KoopmanPruner(0.5, epoch=3)
    fit(pruner, fast_dev_run=True)
    assert pruner.masks is None
