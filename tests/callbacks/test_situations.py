"""Situations reported by users of similar tools: unusual steps, weights, losses and runs."""

from __future__ import annotations

import copy
import csv
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from lightning_utilities.core import rank_zero
from torch import nn

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    KoopmanWarning,
    RestartOnBadInitialization,
    plot_history,
)
from lightning_koopman.parameters.reinitialize import reinitialize, select_modules


def step(parameter: torch.Tensor) -> None:
    """Update a parameter as an optimizer fused into the backward pass does."""
    parameter.data.sub_(1e-2)


class SAM(torch.optim.Optimizer):
    """Like common SAM optimizers: the inner optimizer steps, and the outer `step` is never called."""

    def __init__(self, params) -> None:
        super().__init__(params, {})
        self.base = torch.optim.Adam(self.param_groups, 1e-2)

    def second_step(self) -> None:
        self.base.step()

    def step(self, closure=None) -> None:
        raise NotImplementedError


@pytest.fixture
def manual(root):
    """Return a function that builds modules with manual optimization."""

    class Manual(root.LightningModule):
        def __init__(self, kind: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization, self.kind, self.zeros = False, kind, []
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

        def configure_optimizers(self):
            if self.kind == "two":
                return [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.net[0], self.net[2])]
            return SAM(self.parameters()) if self.kind == "SAM" else None

        def on_fit_start(self) -> None:
            self.own = torch.optim.Adam(self.parameters(), 1e-2)
            if self.kind == "fused":  # steps within the backward pass
                for parameter in self.parameters():
                    parameter.register_post_accumulate_grad_hook(step)

        def training_step(self, batch, batch_idx):
            self.zeros.append(int((self.net[0].weight == 0).sum()))
            self.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            if self.kind == "SAM":
                self.optimizers().second_step()
            elif self.kind == "two":
                for optimizer in self.optimizers():
                    optimizer.step()
            elif self.kind == "own":
                self.own.step()

        def train_dataloader(self):
            x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
            data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
            return torch.utils.data.DataLoader(data, 16)

    return Manual


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` returned `None`")
@pytest.mark.parametrize("kind", ["own", "SAM", "fused", "two"])
def test_masks_hold_and_batches_count_however_the_module_steps(trainer, manual, kind):
    module, pruner = manual(kind), KoopmanPruner(sparsity=0.5, epoch=3)
    monitor = KoopmanSpectrumMonitor(every_n_steps=2, prefix="steps")
    run = trainer(max_epochs=6, callbacks=[pruner, monitor])
    if kind != "two":
        with pytest.warns(KoopmanWarning, match="pruned weights were moved"):
            run.fit(module)
    else:
        run.fit(module)
    zeros = int((~pruner.masks["net.0.weight"]).sum())
    assert module.zeros[:12] == [0] * 12
    assert module.zeros[12:] == [zeros] * 12
    assert [row["step"] for row in monitor.history] == list(range(2, 25, 2))  # 4 batches per epoch


@pytest.mark.parametrize("structured", [False, True])
def test_a_preview_says_what_would_go_and_changes_nothing(trainer, regression, structured):
    module, other = regression(), regression()
    batch = module.x[:16], module.y[:16]
    pruner = KoopmanPruner(sparsity=0.5, epoch=3, structured=structured, parameters=["net*weight"])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    drawn = torch.random.get_rng_state()
    preview = pruner.preview(module, batch)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert pruner.history == []
    trainer(callbacks=pruner).fit(module)  # the run gives the same counts
    if structured:
        assert (
            preview.changes == pruner.changes == {"net.0": {"out_features": (8, 4)}, "net.2": {"in_features": (8, 4)}}
        )
        assert "left alone, its outputs leave the network: head" in preview.table()
    else:
        assert preview.pruned == pruner.masks.pruned == 20
        assert set(preview) == set(pruner.masks)
    assert len(other.state_dict()) == len(before)


@pytest.mark.filterwarnings("ignore:.*no `validation_step`")
def test_a_module_without_validation_loses_channels(trainer, regression):
    module = regression()
    type(module).validation_step = None
    pruner = KoopmanPruner(sparsity=0.5, epoch=3, structured=True)
    trainer(callbacks=pruner, limit_val_batches=0).fit(module, train_dataloaders=module.train_dataloader())
    assert pruner.achieved == 0.5


# -- which weights ----------------------------------------------------------------------------------------------------


@pytest.fixture
def finetuned(root):
    """Modules with an initially frozen backbone; the optimizer starts with the head alone."""

    class Finetuned(root.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.head.parameters(), 1e-2)

        def train_dataloader(self):
            x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
            data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
            return torch.utils.data.DataLoader(data, 16)

    return Finetuned


def test_weights_unfrozen_later_are_watched_pruned_and_stepped_after_a_restart(root, trainer, finetuned):
    backbone = root.callbacks.BackboneFinetuning
    monitor = KoopmanSpectrumMonitor()
    with pytest.warns(KoopmanWarning, match=r"trained parameters changed after epoch 5.*'backbone.0.weight' is new"):
        trainer(max_epochs=8, callbacks=[backbone(4), monitor]).fit(finetuned())
    assert monitor.trajectory.n == 67
    assert len(monitor.trajectory) == 4
    for structured in (False, True):
        pruner = KoopmanPruner(sparsity=0.5, epoch=7, structured=structured)
        with pytest.warns(KoopmanWarning, match="trained parameters changed"):
            trainer(max_epochs=8, callbacks=[backbone(4), pruner]).fit(finetuned())
        assert pruner.achieved == 0.5
        if not structured:
            assert set(pruner.masks) == {"backbone.0.weight", "head.weight"}
    restart = RestartOnBadInitialization(6, baseline_loss=1e-3, max_restarts=1)
    run = trainer(max_epochs=8, callbacks=[backbone(4), restart])
    with pytest.warns(KoopmanWarning, match="trained parameters changed"):
        run.fit(finetuned())
    assert len(restart.restarts) == 1
    assert sum(len(group["params"]) for group in run.optimizers[0].param_groups) == 4


def test_weights_added_late_start_a_new_trajectory(trainer, finetuned):
    module = finetuned()

    def add() -> None:
        if module.current_epoch == 3:
            module.extra = nn.Linear(2, 2)
            module.trainer.optimizers[0].add_param_group({"params": module.extra.parameters()})

    module.on_train_epoch_start = add
    monitor = KoopmanSpectrumMonitor()
    with pytest.warns(KoopmanWarning, match=r"trained parameters changed after .* \(2 more, 0 fewer"):
        trainer(callbacks=monitor).fit(module)
    assert monitor.trajectory.n == 67 + 6
    assert len(monitor.trajectory) == 3


def test_a_complex_parameter_is_a_pair_of_real_ones(trainer, regression):
    module = regression()
    module.modes = nn.Parameter(torch.randn(3, dtype=torch.cfloat))
    inner = module.training_step
    module.training_step = lambda batch, batch_idx: inner(batch, batch_idx) + 1e-2 * module.modes.abs().square().sum()
    callbacks = [
        KoopmanSpectrumMonitor(),
        EarlyStopOnUnitEigenvalues(parameters="!modes"),
        RestartOnBadInitialization(2, modules=["net*", "head"]),
        KoopmanPruner(sparsity=0.5, epoch=4, parameters=["*weight", "!head*", "!modes"]),
    ]
    trainer(callbacks=callbacks).fit(module)
    monitor, stop, _, pruner = callbacks
    real = sum(parameter.numel() for parameter in module.parameters() if not parameter.is_complex())
    assert monitor.trajectory.n == real + 6
    expected = torch.view_as_real(module.modes.detach()).reshape(-1)
    torch.testing.assert_close(monitor.trajectory.last()[:6], expected)
    assert stop.recorder.trajectory.n == real
    assert "modes" not in pruner.masks
    with pytest.raises(ValueError, match="'modes', which is complex and cannot be masked"):
        trainer(callbacks=KoopmanPruner(sparsity=0.5, epoch=4, parameters="modes")).fit(module)


@pytest.mark.filterwarnings("ignore:.*weight_norm` is deprecated")
@pytest.mark.parametrize("scheme", [None, "he"])
@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm, lambda layer: nn.utils.prune.identity(layer, "weight"),
    ],
    ids=["old weight norm", "old spectral norm", "weight norm", "spectral norm", "prune"],
)  # fmt: skip
def test_weights_behind_others_are_drawn_through_them(wrap, scheme):
    torch.manual_seed(0)
    plain, wrapped = nn.Linear(4, 8), wrap(nn.Linear(4, 8))
    held = dict(wrapped.named_parameters())
    before = {name: value.detach().clone() for name, value in held.items()}
    for layer in (plain, wrapped):
        reinitialize([layer], scheme, seed=3)
    assert dict(wrapped.named_parameters()).keys() == held.keys()
    for name, value in wrapped.named_parameters():
        assert value is held[name]  # optimizers keep a reference to it
        assert not torch.equal(value, before[name])
    inputs = torch.randn(5, 4)
    if "spectral" in str(list(wrapped._forward_pre_hooks.values())) or "Spectral" in str(wrapped):
        wrapped(inputs)
        ratio = wrapped.weight / plain.weight  # spectral norm divides by an estimate
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    else:
        torch.testing.assert_close(wrapped(inputs), plain(inputs))


def test_a_weight_that_cannot_be_set_is_refused_by_name():
    class Squared(nn.Module):
        def forward(self, value):
            return value.square()

    network = nn.Sequential(nn.Linear(4, 8))
    nn.utils.parametrize.register_parametrization(network[0], "weight", Squared())
    with pytest.raises(ValueError, match="the weight of module '0' is computed by Squared"):
        select_modules(network, None, None)


def test_a_teacher_that_became_nan_is_set_back_by_the_restart(root, trainer):
    class Student(root.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.built = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), 0
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)
            self.register_buffer("mean", torch.zeros(3))

        def training_step(self, batch, batch_idx):
            outputs = self.net(batch[0] + 0.1)
            self.mean.copy_(outputs.detach().mean(0))
            return nn.functional.mse_loss(outputs, self.teacher(batch[0])) * 1e3

        def on_train_batch_end(self, *_) -> None:
            for kept, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                kept.data.mul_(0.9).add_(new.data, alpha=0.1)

        def configure_optimizers(self):
            self.built += 1
            return torch.optim.SGD(self.net.parameters(), 1e12 if self.built == 1 else 1e-4)  # diverges at first

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 4)), 16)

    model, restart = Student(), RestartOnBadInitialization(5, baseline_loss=1e9)
    with pytest.warns(KoopmanWarning, match="holds NaN or infinite values"):
        trainer(max_epochs=8, callbacks=restart).fit(model)
    assert [row["reason"] for row in restart.restarts] == ["the loss is nan"]
    assert all(value.isfinite().all() for value in model.state_dict().values())


# -- the baseline loss ------------------------------------------------------------------------------------------------


def measured(root, trainer, loss, targets, outputs: int = 1):
    """Return the measured baseline loss on targets that are independent of the inputs."""

    class Net(root.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, outputs))

        def training_step(self, batch, batch_idx):
            return loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

        def train_dataloader(self):
            x = torch.randn(len(targets), 4, generator=torch.Generator().manual_seed(0))
            return torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(x, targets), 64, shuffle=True,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip

    stop = EarlyStopOnUnitEigenvalues(mode="report")
    trainer(max_epochs=4, callbacks=stop).fit(Net())
    return stop.chance


@pytest.mark.parametrize("offset", [0.0, 40.0, -1e3])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss()], ids=str)
def test_the_baseline_loss_is_that_of_the_best_constant(root, trainer, loss, offset):
    drawn = torch.Generator().manual_seed(1)
    targets = offset + torch.randn(2048, 1, generator=drawn).exp()  # skewed: mean and median differ
    best = min(float(loss(torch.full_like(targets, float(c)), targets)) for c in offset + torch.linspace(0, 3, 301))
    found = measured(root, trainer, loss, targets)
    assert found.loss == pytest.approx(best, rel=0.12, abs=3 * found.error)


@pytest.mark.parametrize(
    "shares",
    [[0.5, 0.5], [0.9, 0.1], [0.95, 0.05], [0.96, 0.02, 0.02], [0.9, 0.07, 0.03], [1 / k for k in range(1, 31)]],
    ids=len,
)
def test_the_baseline_loss_of_classes_is_their_entropy(root, trainer, shares):
    drawn = torch.Generator().manual_seed(1)
    targets = torch.multinomial(torch.tensor(shares), 4096, replacement=True, generator=drawn)
    frequencies = torch.bincount(targets) / len(targets)
    entropy = -float((frequencies * frequencies.log()).sum())
    found = measured(root, trainer, nn.CrossEntropyLoss(), targets, len(shares))
    assert found.loss == pytest.approx(entropy, rel=0.12, abs=2 * found.error)


def test_a_baseline_that_falls_for_ever_is_unknown(root, trainer):
    targets = torch.randn(2048, 1, generator=torch.Generator().manual_seed(1))
    assert measured(root, trainer, lambda outputs, _: 1 / (1 + nn.functional.softplus(outputs)).mean(), targets) is None


# -- number of messages -----------------------------------------------------------------------------------------------


@pytest.fixture
def told():
    """Messages to Lightning's own logger, whether or not it propagates them."""
    heard: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record) -> None:
            heard.append(record.getMessage())

    handler, logger = Listen(), rank_zero.log
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: "\n".join(heard)
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_stop_that_did_not_come_says_what_held_it_back(trainer, regression, told):
    stop = EarlyStopOnUnitEigenvalues(baseline_loss=1.0)
    trainer(max_epochs=3, callbacks=stop).fit(regression())
    assert stop.message.endswith("not stopped in 3 epochs, blocked by: too few epochs to tell (3 times).")
    assert stop.message in told()
    assert "the first decision takes 13 epochs, but this run has 3 epochs" in told()
    stop = EarlyStopOnUnitEigenvalues(baseline_loss=1e-9, horizon=6)
    trainer(max_epochs=20, callbacks=stop).fit(regression())
    assert "the loss is no better than that of a network which ignores its input" in stop.message


def test_what_cannot_act_is_said_before_training(trainer, regression, told):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(4), torch.randn(1)) for _ in range(32)])

    trainer(max_epochs=2, limit_val_batches=0, callbacks=KoopmanSpectrumMonitor()).fit(
        regression(), torch.utils.data.DataLoader(Stream(), 16)
    )
    assert "the training data have no length" in told()
    trainer(max_epochs=1, callbacks=KoopmanSpectrumMonitor(prefix="short")).fit(regression())
    assert "the first reading takes 5 epochs, but this run has 1 epochs" in told()
    trainer(max_epochs=4, callbacks=RestartOnBadInitialization(6, modules="net*")).fit(regression())
    assert "judging the start takes 6 epochs, but this run has 4 epochs" in told()
    trainer(max_epochs=9, max_steps=9, callbacks=KoopmanSpectrumMonitor(every_n_steps=5)).fit(regression())
    assert "the first reading takes 25 steps, but this run has 5 steps" in told()
    with pytest.warns(KoopmanWarning, match="too few"):
        trainer(callbacks=KoopmanPruner(sparsity=0.5, epoch=1, parameters="net*weight")).fit(regression())
    assert "epoch=1 is before the first spectrum" in told()


def test_a_rate_that_has_collapsed_is_said_in_the_message(trainer, classifier):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 10 else 1e-9)

    stop = EarlyStopOnUnitEigenvalues(mode="report")
    trainer(max_epochs=40, limit_val_batches=0, callbacks=stop).fit(classifier(scheduler=schedule))
    assert stop.would_stop_epoch is not None
    assert "the learning rate has fallen from 0.01 to 1e-11" in stop.message


def test_loggers_get_what_is_known_and_stock_callbacks_survive(root, trainer, regression, tmp_path):
    for ours, key in (
        (KoopmanSpectrumMonitor, "koopman/spectral_weight"),
        (EarlyStopOnUnitEigenvalues, "koopman/predicted_change"),
    ):
        stock = root.callbacks.EarlyStopping(key, patience=99)
        best = root.callbacks.ModelCheckpoint(tmp_path / key, monitor=key)
        logger = root.loggers.CSVLogger(tmp_path / f"logs {ours.__name__}")
        run = trainer(max_epochs=4, callbacks=[ours(), stock, best], logger=logger, enable_checkpointing=True)
        run.fit(regression())
        assert run.current_epoch == 4
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert not any(row.get(key) for row in rows)  # full rank or too early: unknown


def test_missing_metrics_are_answered_with_those_of_the_module(trainer, regression):
    monitor = KoopmanSpectrumMonitor(observable="nothing")
    other = KoopmanSpectrumMonitor(prefix="mine")
    with pytest.warns(KoopmanWarning, match=r"logged so far: fit_error, val_error\. Log it"):
        trainer(callbacks=[other, monitor]).fit(regression())


def test_the_history_is_drawn_over_steps_with_marks_where_it_begins_anew(trainer, regression):
    monitor, pruner = KoopmanSpectrumMonitor(every_n_steps=2), KoopmanPruner(sparsity=0.5, epoch=3)
    trainer(callbacks=[monitor, pruner]).fit(regression())
    top, bottom = plot_history(monitor.history).axes
    assert bottom.get_xlabel() == "optimizer steps"
    assert list(top.lines[0].get_xdata()) == [row["step"] for row in monitor.history]
    marked = [line.get_xdata()[0] for line in top.lines if line.get_linestyle() == ":"]
    assert marked == [12]  # the pruning step
    assert any("pruned" in text.get_text() for text in bottom.get_legend().get_texts())
    lowered = [{**row, "learning_rate": 0.1 if row["step"] <= 12 else 0.03} for row in monitor.history]
    assert {"rate 0.03"} == {text.get_text() for text in plot_history(lowered).axes[0].texts}
    assert {""} == {text.get_text() for text in top.texts}
    plain = KoopmanSpectrumMonitor()
    trainer(callbacks=plain).fit(regression())
    assert plot_history(plain.history).axes[1].get_xlabel() == "epochs completed"
