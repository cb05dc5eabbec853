"""Weight averages: applied for validation and checkpoints, removed for training."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hovering import BATCH, Net, Trained, Unvalidated, mean, weights
from problems import ACCELERATOR
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    KoopmanWarning,
    KoopmanWeightAveraging,
    StoppingReason,
)
from lightning_koopman.averaging.profiles import safe_length
from lightning_koopman.callbacks.averaged_checkpoints import TRAINED
from lightning_koopman.callbacks.exchange import Exchange
from lightning_koopman.reading.steps import step_statistics

TRAINABLE = ["net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"]


def test_the_mean_is_validated_and_stays_in_the_end(fit, caplog):
    module, trained = Net(), Trained()
    with caplog.at_level("INFO"):
        fit(module, KoopmanWeightAveraging("tail", length=4), trained)
    assert "the module holds the average of 4 snapshots" in caplog.text
    for epoch, seen in enumerate(module.seen, 1):
        newest = trained.after[: epoch + 1][-4:]
        for name in TRAINABLE:
            torch.testing.assert_close(seen[name], mean(newest, name), rtol=1e-5, atol=1e-6)
        assert torch.equal(seen["frozen"], torch.ones(3))
        assert seen["count"] == 6 * epoch
    for name in TRAINABLE:
        assert torch.equal(module.state_dict()[name], module.seen[-1][name])


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"norm": True}], ids=["plain", "dropout", "norm"])
def test_training_notices_nothing(fit, options):
    alone, watched = Trained(), Trained()
    fit(Net(**options), alone)
    fit(Net(**options), KoopmanWeightAveraging(), watched)
    for ours, theirs in zip(watched.after, alone.after, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_what_was_validated(fit, tmp_path, weights_only):
    module = Net(norm=True)
    save = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, save_weights_only=weights_only)
    trained = Trained()
    fit(module, KoopmanWeightAveraging("tail", length=3), save, trained, enable_checkpointing=True)
    assert len(save.best_k_models) == 10
    for path in save.best_k_models:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        seen = module.seen[saved["epoch"]]
        assert set(saved["state_dict"]) == set(seen)
        assert all(torch.equal(saved["state_dict"][name], seen[name]) for name in seen)
        if not weights_only:
            now = {**saved["state_dict"], **saved[TRAINED]}
            assert all(torch.equal(now[name], trained.after[saved["epoch"] + 1][name]) for name in now)
    best = Net(norm=True)
    best.load_state_dict(torch.load(save.best_model_path, weights_only=True)["state_dict"])
    again = pl.Trainer(accelerator=ACCELERATOR, logger=False, enable_progress_bar=False).validate(best, verbose=False)
    assert again[0]["val_loss"] == pytest.approx(float(save.best_model_score), rel=1e-6)


@pytest.mark.parametrize("kind", [Net, Unvalidated])
def test_a_resumed_run_is_as_the_uninterrupted_one(fit, tmp_path, kind):
    def parts() -> list[Any]:
        save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        return [KoopmanWeightAveraging(dirpath=tmp_path), Trained(), save]

    whole, resumed = kind(norm=True), kind(norm=True)
    averaging, trained, save = parts()
    fit(whole, averaging, trained, save, enable_checkpointing=True)
    again, later, save = parts()
    fit(resumed, again, later, save, enable_checkpointing=True, ckpt_path=tmp_path / "epoch=4.ckpt")
    assert len(later.after) == 6
    for ours, theirs in zip(later.after, trained.after[5:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert str(again.history) == str(averaging.history)  # NaN where no losses were compared
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable")
def test_a_checkpoint_within_an_epoch_holds_both(fit, tmp_path):
    class Steps(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 40:
                self.at = weights(pl_module)

    save, steps, trained = ModelCheckpoint(tmp_path, every_n_train_steps=40), Steps(), Trained()
    fit(Net(), KoopmanWeightAveraging("tail", length=3, dirpath=tmp_path), steps, trained, save,
        enable_checkpointing=True)  # fmt: skip
    saved = torch.load(save.best_model_path, map_location="cpu", weights_only=True)
    for name in TRAINABLE:
        assert torch.equal(saved[TRAINED][name], steps.at[name])
        torch.testing.assert_close(saved["state_dict"][name], mean([*trained.after[5:7], steps.at], name))
    later = Trained()
    again = ModelCheckpoint(tmp_path, every_n_train_steps=40)
    fit(Net(), KoopmanWeightAveraging("tail", length=3, dirpath=tmp_path), later, again, enable_checkpointing=True,
        ckpt_path=save.best_model_path)  # fmt: skip
    assert all(torch.equal(later.after[0][name], steps.at[name]) for name in TRAINABLE)


def test_an_exception_leaves_the_weights_in_training(fit):
    class Stops(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if self.trainer.current_epoch == 6:
                raise KeyError("user's own")

    module, trained = Stops(), Trained()
    with pytest.raises(KeyError, match="own"):
        fit(module, KoopmanWeightAveraging("tail", length=4), trained)
    alone = Trained()
    fit(Net(), alone, epochs=7)
    assert all(torch.equal(module.state_dict()[name], alone.after[7][name]) for name in TRAINABLE)
    assert not torch.equal(module.seen[-1]["net.0.weight"], alone.after[7]["net.0.weight"])


def test_statistics_are_those_of_the_averages_training_batches(fit):
    module = Net(norm=True)
    fit(module, KoopmanWeightAveraging("tail", length=4, n_batches=6))
    twin = copy.deepcopy(module)
    layer = twin.net[1]
    layer.reset_running_stats()
    layer.momentum = None
    twin.train()
    with torch.no_grad():
        for part in module.x.split(BATCH):
            twin.net(part)
    torch.testing.assert_close(module.net[1].running_mean, layer.running_mean)
    torch.testing.assert_close(module.net[1].running_var, layer.running_var)
    assert module.count == 60  # counts training only, not the trial


def test_the_length_follows_what_the_weights_do(fit):
    class Far(Net):
        """Weights that drift throughout training."""

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return (self.net[0].weight - 100).abs().mean()

    descending, hovering = KoopmanWeightAveraging(), KoopmanWeightAveraging()
    fit(Far(lr=0.01), descending, epochs=20)
    fit(Net(lr=0.3), hovering, epochs=40)
    assert {row["average_length"] for row in descending.history} == {1}
    assert hovering.history[-1]["average_length"] >= 5
    gains = [row["last_loss"] - row["average_loss"] for row in hovering.history[1:]]
    assert np.mean(gains) > 0
    assert min(gains) > -0.05  # the loss is about 1


def test_a_jump_of_the_rate_starts_a_new_average(fit):
    module, trained = Net(gamma=0.1), Trained()
    averaging = KoopmanWeightAveraging("tail", length=5)
    fit(module, averaging, trained)
    assert [row["average_length"] for row in averaging.history] == [2, 3, 4, 5, 5, 5, 2, 3, 4, 5]
    torch.testing.assert_close(module.seen[7]["net.0.weight"], mean(trained.after[6:9], "net.0.weight"))


def test_masks_stay_exact_zeros_and_a_pruning_starts_a_new_average(fit, tmp_path):
    module = Net()
    pruner = KoopmanPruner(0.5, epoch=5, dirpath=tmp_path)
    averaging = KoopmanWeightAveraging("tail", length=5, dirpath=tmp_path)
    fit(module, averaging, pruner)
    zero = ~pruner.masks["net.0.weight"]
    assert zero.sum() > 10
    assert all(bool((seen["net.0.weight"][zero] == 0).all()) for seen in module.seen[5:])
    assert [row["average_length"] for row in averaging.history] == [2, 3, 4, 5, 5, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("given", [{"storage": "disk"}, {"dtype": "bfloat16"}, {"every_n_steps": 4}], ids=str)
def test_other_ways_of_keeping_snapshots(fit, given, tmp_path):
    module, trained = Net(), Trained()
    fit(module, KoopmanWeightAveraging("tail", length=3, dirpath=tmp_path, **given), trained)
    if "every_n_steps" not in given:
        for name in TRAINABLE:
            torch.testing.assert_close(module.state_dict()[name], mean(trained.after[-3:], name), rtol=1e-2, atol=1e-3)
    else:
        ends = torch.stack([state["net.0.weight"] for state in trained.after[-3:]])
        assert ends.min() - 1e-2 < module.net[0].weight.min()


def test_beside_a_monitor_it_keeps_no_snapshots_of_its_own(fit, tmp_path):
    monitor, averaging = KoopmanSpectrumMonitor(dirpath=tmp_path), KoopmanWeightAveraging(dirpath=tmp_path)
    fit(Net(), monitor, averaging)
    assert averaging.recorder is monitor.recorder
    assert averaging.recording.own.recorder.trajectory is None
    assert len(monitor.history) == 10


def test_validation_within_an_epoch_averages_the_present_weights(fit):
    class Within(Callback):
        def __init__(self) -> None:
            self.now: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step % 3 == 0:
                self.now.append(pl_module.net[0].weight.detach().cpu().clone())

    module, trained, within = Net(), Trained(), Within()
    fit(module, KoopmanWeightAveraging("tail", length=3), trained, within, val_check_interval=0.5)
    assert torch.equal(module.seen[0]["net.0.weight"], within.now[0])  # no average exists yet
    after = [state["net.0.weight"] for state in trained.after]
    expected = (after[4] + after[5] + within.now[10]) / 3
    torch.testing.assert_close(module.seen[10]["net.0.weight"], expected, rtol=1e-5, atol=1e-6)


def test_manual_optimization_is_averaged_by_the_steps_and_norms_are_left_alone(fit):
    class Manual(Net):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    plain = KoopmanWeightAveraging()
    fit(Manual(lr=0.3), plain, epochs=40)
    steps = step_statistics(plain.recorder.trajectory.step_gram())
    assert plain.history[-1]["average_length"] == safe_length(steps, 41)
    module, trained = Manual(norm=True), Trained()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, KoopmanWeightAveraging(), trained)
    assert ["net.1" in str(each.message) for each in caught if each.category is KoopmanWarning] == [True]
    assert all(torch.equal(value, trained.after[-1][name]) for name, value in module.state_dict().items())


def test_it_can_be_applied_to_a_copy(fit):
    module, averaging = Net(norm=True), KoopmanWeightAveraging("ramp", length=4)
    fit(module, averaging)
    fresh = Net(norm=True)
    averaging.apply(fresh)
    for name in [*TRAINABLE[:2], "net.1.running_var"]:
        torch.testing.assert_close(fresh.state_dict()[name], module.state_dict()[name])
    with pytest.raises(ValueError, match=r"must have 'net.0.weight' of shape \(12, 6\), but has none"):
        averaging.apply(nn.Linear(3, 3))
    other = Net(norm=True)
    other.net[4] = nn.Linear(12, 1)
    other.net[0] = nn.Linear(12, 6)  # as many weights
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"of shape \(12, 6\), but has \(6, 12\)"):
        averaging.apply(other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(TypeError, match="module must be"):
        averaging.apply("fresh")
    with pytest.raises(ValueError, match="is a copy"):
        copy.deepcopy(averaging).apply(fresh)
    with pytest.raises(ValueError, match="train first"):
        KoopmanWeightAveraging().apply(fresh)


def test_what_cannot_be_is_refused_before_training(fit):
    for length in (40, [2, 31]):
        with pytest.raises(ValueError, match=r"exceeds window=30: raise `window`"):
            KoopmanWeightAveraging(length=length)
    with pytest.raises(ValueError, match="sketches"):
        KoopmanWeightAveraging(storage="sketch")
    with pytest.raises(ValueError, match="one of them"):
        fit(Net(), KoopmanWeightAveraging(), KoopmanWeightAveraging(prefix="other"))
    with pytest.raises(ValueError, match="StochasticWeightAveraging"):
        fit(Net(), KoopmanWeightAveraging(), pl.callbacks.StochasticWeightAveraging(1e-2))


def test_where_a_trial_fails_the_steps_decide_with_one_warning(fit):
    class Odd(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if not self.training:
                raise RuntimeError("not in evaluation mode")
            return super().training_step(batch, batch_idx)

    averaging = KoopmanWeightAveraging()
    with pytest.warns(KoopmanWarning, match="comparing averages failed") as told:
        fit(Odd(lr=0.3, shuffle=True), averaging, epochs=20)
    assert sum(each.category is KoopmanWarning for each in told) == 1
    steps = step_statistics(averaging.recorder.trajectory.step_gram())
    assert averaging.history[-1]["average_length"] == safe_length(steps, 21)


def test_losses_are_compared_on_equal_terms(fit):
    """The recorded last loss is computed with the last weights on the first batches, in evaluation mode."""
    module, trained, averaging = Net(dropout=0.5), Trained(), KoopmanWeightAveraging(length=(1, 3))
    fit(module, averaging, trained)
    twin = Net(dropout=0.5).eval()
    twin.load_state_dict(trained.after[-1])
    with torch.no_grad():
        losses = [
            nn.functional.mse_loss(twin.net(x), y) for x, y in zip(module.x.split(16), module.y.split(16), strict=True)
        ]
    assert averaging.history[-1]["last_loss"] == pytest.approx(float(np.mean(losses[:4])), rel=1e-5)


def test_weights_that_hover_end_a_training_with_their_average(fit, tmp_path):
    module, trained = Net(lr=0.3, shuffle=True), Trained()
    stop = EarlyStopOnUnitEigenvalues(dirpath=tmp_path)
    fit(module, stop, trained, epochs=120)
    assert stop.stopping_reason is StoppingReason.HOVERING
    assert stop.stopped_epoch < 80
    assert stop.history[-1]["phase"] == "hovering"
    length = stop.average.length
    assert f"average of {length} snapshots" in stop.message
    assert length > 1
    for name in TRAINABLE:
        expected = mean(trained.after[-length:], name)
        torch.testing.assert_close(module.state_dict()[name], expected, rtol=1e-5, atol=1e-6)
    # without an average, the last weights keep hovering
    alone = EarlyStopOnUnitEigenvalues(dirpath=tmp_path, restore="last")
    fit(Net(lr=0.3, shuffle=True), alone, epochs=stop.stopped_epoch)
    assert alone.stopping_reason is StoppingReason.NOT_STOPPED
    assert "the weights hover" in alone.history[-1]["hold"]


def test_a_schedule_that_will_lower_the_rate_keeps_weights_that_hover(fit, tmp_path):
    class Falling(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.net.parameters(), lr=self.lr)
            return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [70], 0.1)]

    stop = EarlyStopOnUnitEigenvalues(dirpath=tmp_path)
    fit(Falling(lr=0.3, shuffle=True), stop, epochs=75)
    assert stop.stopped_epoch is None or stop.stopped_epoch > 70
    assert any("the learning rate is about to change" in row["hold"] for row in stop.history)


def test_a_stop_beside_an_averaging_callback_leaves_the_average_to_it(fit, tmp_path):
    module, trained = Net(lr=0.3, shuffle=True), Trained()
    averaging = KoopmanWeightAveraging("tail", length=7, dirpath=tmp_path)
    fit(module, EarlyStopOnUnitEigenvalues(dirpath=tmp_path), averaging, trained, epochs=120)
    torch.testing.assert_close(module.net[0].weight.detach(), mean(trained.after[-7:], "net.0.weight"))


@pytest.mark.parametrize("norm", [False, True])
def test_a_search_leaves_the_best_of_the_lengths_tried(fit, norm):
    module, trained = Net(lr=0.3, shuffle=True, norm=norm), Trained()
    averaging = KoopmanWeightAveraging()
    fit(module, averaging, trained, epochs=20)
    seen: list[dict[str, torch.Tensor]] = []

    def loss(given: pl.LightningModule) -> float:
        seen.append(weights(given))
        return abs(len(seen) - 2.2)  # the second is best

    assert averaging.search(module, loss, [7, 1, 3, 3]) == pytest.approx({1: 1.2, 3: 0.2, 7: 0.8})
    name = "net.4.weight" if norm else "net.3.weight"
    for state, length in zip(seen, (1, 3, 7), strict=True):
        torch.testing.assert_close(state[name], mean(trained.after[-length:], name), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, seen[1][key]) for key, value in module.state_dict().items())
    if norm:
        assert not torch.equal(seen[0]["net.1.running_mean"], seen[1]["net.1.running_mean"])
    assert list(averaging.search(module, lambda _: torch.tensor(1.0), 3)) == [3]
    before = weights(module)
    for wrong, kind, message in (
        ([{"a": 1}], TypeError, "must return a number"),
        (math.nan, ValueError, "loss is NaN"),
    ):
        with pytest.raises(kind, match=message):
            averaging.search(module, lambda _, value=wrong: value, (1, 2))
        assert all(torch.equal(value, before[name]) for name, value in weights(module).items())


def test_statistics_within_a_round_fit_the_weights(fit):
    module = Net(norm=True)
    fit(module, KoopmanWeightAveraging("tail", length=1), val_check_interval=0.5, epochs=3)
    alone = Net(norm=True)
    fit(alone, val_check_interval=0.5, epochs=3)
    for ours, theirs in zip(module.seen[::2], alone.seen[::2], strict=True):  # within an epoch: the weights as trained
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_norms_that_no_step_uses_keep_their_statistics(fit):
    class Teacher(Net):
        def __init__(self) -> None:
            super().__init__(norm=True)
            self.teacher = nn.BatchNorm1d(3)
            self.teacher.running_mean.fill_(5.0)

    module = Teacher()
    fit(module, KoopmanWeightAveraging("tail", length=3), epochs=4)
    assert torch.equal(module.teacher.running_mean, torch.full((3,), 5.0))


def test_a_failure_while_weights_are_exchanged_leaves_all_as_they_were():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before, exchange = weights(module), Exchange()
    wrong = {"0.weight": torch.zeros(2, 2), "1.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError):
        exchange.put_in(module, module, wrong)
    assert not exchange.inside
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weights_that_are_not_finite_are_validated_as_they_are(fit):
    class Diverging(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 4:
                with torch.no_grad():
                    self.net[0].weight.fill_(float("nan"))

    module = Diverging()
    with pytest.warns(KoopmanWarning, match="NaN"):
        fit(module, KoopmanWeightAveraging(), epochs=6)
    assert [bool(seen["net.0.weight"].isnan().any()) for seen in module.seen] == [False] * 4 + [True] * 2


def test_a_finished_run_that_is_resumed_leaves_its_average(fit, tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True)
    module = Net()
    fit(module, KoopmanWeightAveraging("tail", length=3, dirpath=tmp_path), save, enable_checkpointing=True)
    again, save = Net(), ModelCheckpoint(tmp_path, save_last=True)
    fit(again, KoopmanWeightAveraging("tail", length=3, dirpath=tmp_path), save, enable_checkpointing=True,
        ckpt_path=tmp_path / "last.ckpt")  # fmt: skip
    assert torch.equal(again.net[0].weight, module.net[0].weight)


def test_a_checkpoint_written_after_training_says_that_it_holds_the_average_alone(fit, tmp_path):
    trainer = fit(Net(), KoopmanWeightAveraging("tail", length=3, dirpath=tmp_path))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    with pytest.warns(KoopmanWarning, match="written after `fit`"):
        fit(Net(), KoopmanWeightAveraging("tail", length=3, dirpath=tmp_path), epochs=12,
            ckpt_path=tmp_path / "after.ckpt")  # fmt: skip


@pytest.mark.parametrize("kind", ["tied", "complex", "renamed"])
def test_all_kinds_of_modules_resume(fit, tmp_path, kind):
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            if kind == "complex":
                self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
            if kind == "tied":
                self.other = self.net[0]

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + (self.phase.abs().square().sum() if kind == "complex" else 0.0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            found = super().state_dict(*args, **kwargs)
            return {f"own.{name}": value for name, value in found.items()} if kind == "renamed" else found

        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            named = {name.removeprefix("own."): value for name, value in state_dict.items()}
            return super().load_state_dict(named, strict=strict, assign=assign)

    def parts() -> list[Any]:
        return [KoopmanWeightAveraging(dirpath=tmp_path), Trained(), ModelCheckpoint(tmp_path, save_top_k=-1)]

    _, trained, _ = first = parts()
    fit(Odd(), *first, enable_checkpointing=True)
    _, later, _ = second = parts()
    fit(Odd(), *second, enable_checkpointing=True, ckpt_path=tmp_path / "epoch=4-step=30.ckpt")
    assert all(torch.equal(value, trained.after[5][name]) for name, value in later.after[0].items())
    assert all(torch.equal(value, trained.after[-1][name]) for name, value in later.after[-1].items())


def test_steps_that_keep_losses_return_none_or_take_gradients_are_compared(fit):
    class Keeps(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[Any] = []

        def training_step(self, *given: Any) -> Any:
            batch, batch_idx = given
            loss = super().training_step(batch, batch_idx)
            x = batch[0].clone().requires_grad_()
            loss = loss + 0.01 * torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0].square().mean()
            self.kept.append({"loss": loss})
            return None if batch_idx == 1 else loss

    averaging = KoopmanWeightAveraging()
    with warnings.catch_warnings():
        warnings.simplefilter("error", KoopmanWarning)
        warnings.filterwarnings("ignore", ".*returned `None`.*")
        fit(Keeps(), averaging, epochs=5)
    assert np.isfinite(averaging.history[-1]["last_loss"])
    assert len(averaging.average.tried) > 1
