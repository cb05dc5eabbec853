"""Early stopping in real training runs, under both import roots."""

from __future__ import annotations

import csv
import math
import time

import numpy as np
import pytest
import torch
from hovering import step_by_hand
from processes import FORKS, run_script
from torch import nn

from lightning_koopman import EarlyStopOnUnitEigenvalues, KoopmanSpectrumMonitor, KoopmanWarning, StoppingReason
from lightning_koopman.callbacks import early_stopping as module
from lightning_koopman.stopping.rule import Hold

LOSS_AT_CHANCE = math.log(10)


@pytest.fixture
def fit(trainer, classifier, tmp_path):
    """Return a function that trains a small network on the digits and returns the stop and the trainer."""

    def start(stop=None, epochs=100, model=None, callbacks=(), ckpt_path=None, **options):
        stop = EarlyStopOnUnitEigenvalues(dirpath=tmp_path / "stop") if stop is None else stop
        run = trainer(callbacks=[stop, *callbacks], max_epochs=epochs, **options)
        run.fit(classifier() if model is None else model, ckpt_path=ckpt_path)
        return stop, run

    return start


def held(stop) -> list[str]:
    return [row["hold"] for row in stop.history]


# -- it stops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "decayed"])
def test_it_stops_converged_trainings_and_says_why(fit, classifier, optimizer):
    stop, run = fit(model=classifier(optimizer=optimizer))
    assert stop.stopping_reason is StoppingReason.CONVERGED
    assert stop.stopped_epoch == stop.would_stop_epoch == run.current_epoch < 100
    last = stop.history[-1]
    assert last["hold"] == ""
    assert held(stop)[-2] == Hold.PATIENCE.value
    assert last["unit_fraction"] >= 0.8
    assert last["bound"] <= 2e-3 * last["scale"]
    assert f"stopped after epoch {stop.stopped_epoch}" in stop.message
    assert "predicted to change by" in stop.message


def test_what_it_predicted_stands_beside_what_happened(fit, tmp_path):
    stop, run = fit(EarlyStopOnUnitEigenvalues(mode="report", dirpath=tmp_path / "s"), epochs=60)
    rows = {row["epoch"]: row for row in stop.history}
    assert list(rows) == list(range(1, 61))
    for epoch in range(23, 61):
        then = rows[epoch - 10]
        assert rows[epoch]["actual_change"] == rows[epoch]["value"] - then["value"]
        assert rows[epoch]["predicted_then"] == then["predicted_change"]
    ours = [abs(rows[e]["predicted_then"] - rows[e]["actual_change"]) for e in range(23, 61)]
    nothing = [abs(rows[e]["actual_change"]) for e in range(23, 61)]
    assert np.median(ours) < np.median(nothing)
    for name in ("predicted_change", "actual_change", "predicted_then", "unit_fraction"):
        assert float(run.callback_metrics[f"koopman/{name}"]) == pytest.approx(rows[60][name], rel=1e-5)
    with open(stop.history_path) as file:
        written = list(csv.DictReader(file))
    assert written[0]["hold"] == Hold.TOO_EARLY.value
    assert written[0]["bound"] == ""
    assert float(written[-1]["value"]) == rows[60]["value"]


def test_report_mode_trains_on_and_says_when_it_would_have_stopped(fit, tmp_path, caplog):
    stopped, _ = fit()
    with caplog.at_level("INFO"):
        reported, run = fit(EarlyStopOnUnitEigenvalues(mode="report", dirpath=tmp_path / "r"), epochs=60)
    assert run.current_epoch == 60
    assert reported.stopping_reason is StoppingReason.NOT_STOPPED
    assert reported.stopped_epoch is None
    assert reported.would_stop_epoch == stopped.stopped_epoch
    assert f"would have stopped after epoch {stopped.stopped_epoch}" in reported.message


def test_min_epochs_of_either_are_kept(fit, classifier, tmp_path):
    plain, _ = fit(model=classifier(dropout=0.0))
    later = plain.stopped_epoch + 5
    ours, run = fit(EarlyStopOnUnitEigenvalues(min_epochs=later, dirpath=tmp_path / "a"), model=classifier(dropout=0.0))
    assert ours.stopped_epoch == run.current_epoch >= later
    theirs = EarlyStopOnUnitEigenvalues(dirpath=tmp_path / "b")
    _, run = fit(theirs, model=classifier(dropout=0.0), min_epochs=later)
    assert theirs.stopped_epoch == run.current_epoch == ours.stopped_epoch


def test_patience_and_horizon_delay_the_decision(fit, classifier, tmp_path):
    plain, _ = fit(model=classifier(dropout=0.0))
    patient, _ = fit(EarlyStopOnUnitEigenvalues(patience=6, dirpath=tmp_path / "a"), model=classifier(dropout=0.0))
    assert patient.stopped_epoch >= plain.stopped_epoch + 4
    short, _ = fit(EarlyStopOnUnitEigenvalues(horizon=6, dirpath=tmp_path / "b"))
    assert held(short).count(Hold.TOO_EARLY.value) == 7


def test_a_logged_metric_can_be_observed(fit, tmp_path):
    stop, _ = fit(EarlyStopOnUnitEigenvalues("val_loss", mode="report", dirpath=tmp_path / "a"), epochs=40)
    assert stop.chance is None
    assert len(stop.history) == 40
    assert stop.history[-1]["scale"] == pytest.approx(np.ptp([row["value"] for row in stop.history[1:]]))


def test_regression_works_untouched(trainer, regression, tmp_path):
    model = regression(lr=0.01)
    stop = EarlyStopOnUnitEigenvalues(dirpath=tmp_path / "stop")
    trainer(callbacks=stop, max_epochs=400).fit(model)
    assert stop.chance.loss == pytest.approx(float(model.y.var()), rel=0.1)
    assert stop.stopping_reason is StoppingReason.CONVERGED
    with torch.no_grad():
        assert nn.functional.mse_loss(model(model.x), model.y) < 0.2 * stop.chance.loss


def test_targets_far_from_zero_are_no_easier(trainer, regression, tmp_path):
    model = regression(lr=0.01)
    variance = float(model.y.var())
    model.y = model.y + 30.0
    stop = EarlyStopOnUnitEigenvalues(dirpath=tmp_path / "stop")
    trainer(callbacks=stop, max_epochs=150).fit(model)
    assert stop.chance.loss == pytest.approx(variance, rel=0.15)
    for row in stop.history:
        assert row["hold"] or row["value"] < 0.5 * variance


# -- the baseline loss ------------------------------------------------------------------------------------------------


def test_the_loss_at_chance_is_measured_and_leaves_no_trace(fit, tmp_path):
    measured, run = fit(epochs=3)
    given, other = fit(EarlyStopOnUnitEigenvalues(chance_loss=2.0, dirpath=tmp_path / "a"), epochs=3)
    assert measured.chance.loss == pytest.approx(LOSS_AT_CHANCE, rel=0.03)
    assert given.chance.loss == 2.0
    ours, theirs = (run.lightning_module, other.lightning_module)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)  # weights, batch-norm statistics and random state are unchanged
    assert ours.calls == theirs.calls
    logged = {key for key in run.callback_metrics if not key.startswith("koopman/")}
    assert logged == {key for key in other.callback_metrics if not key.startswith("koopman/")}


def test_gradient_accumulation_changes_neither_loss_nor_chance(fit):
    stop, _ = fit(epochs=2, accumulate_grad_batches=4)
    assert stop.chance.loss == pytest.approx(LOSS_AT_CHANCE, rel=0.03)
    assert stop.history[0]["value"] == pytest.approx(LOSS_AT_CHANCE, rel=0.3)


def test_where_chance_cannot_be_measured_it_says_so_and_goes_on(fit, classifier):
    class Stubborn(classifier):
        def __deepcopy__(self, memo):
            raise TypeError("not to be copied")

    with pytest.warns(KoopmanWarning, match="measuring the baseline loss failed"):
        stop, run = fit(model=Stubborn(), epochs=14)
    assert run.current_epoch == 14
    assert stop.chance is None
    assert stop.history[-1]["scale"] == pytest.approx(np.ptp([row["value"] for row in stop.history[1:]]))


def test_batches_of_any_structure(fit, classifier):
    class Nested(classifier):
        def training_step(self, batch):
            return super().training_step((batch["images"], batch["labels"]), 0)

        def train_dataloader(self):
            data = super().train_dataloader().dataset
            return torch.utils.data.DataLoader(
                [{"images": x, "labels": y} for x, y in zip(*data.tensors, strict=True)], batch_size=60
            )

    stop, _ = fit(model=Nested(), epochs=2)
    assert stop.chance.loss == pytest.approx(LOSS_AT_CHANCE, rel=0.03)


@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor.*:UserWarning")  # raised by the compiler
@pytest.mark.parametrize("kept", ["compiled", "closure"])
def test_functions_bound_to_the_module_do_not_make_its_loss_chance(fit, classifier, kept):
    class Closed(classifier):
        def __init__(self):
            super().__init__(dropout=0.0)
            self.apply_network = lambda images: self.network(images)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.apply_network(batch[0]), batch[1])

    if kept == "compiled":
        stop, run = fit(model=torch.compile(classifier(dropout=0.0), backend="eager"), epochs=3)
        assert stop.chance.loss == pytest.approx(LOSS_AT_CHANCE, rel=0.03)
        assert int(run.lightning_module.network[2].num_batches_tracked) == 30  # the user's own steps only
    else:
        with pytest.warns(KoopmanWarning, match="keeps a function that is bound to itself"):
            stop, _ = fit(model=Closed(), epochs=3)
        assert stop.chance is None


def test_frozen_weights_that_make_the_targets_stay(fit, classifier):
    class Distilled(classifier):
        def __init__(self):
            super().__init__(dropout=0.0)
            self.teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)
            self.teacher[1].weight.mul_(30.0)

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.network(batch[0]), self.teacher(batch[0]))

    model = Distilled()
    targets = model.teacher(model.images[: model.n])
    stop, _ = fit(model=model, epochs=3)
    assert stop.chance.loss == pytest.approx(float(targets.var(dim=0).mean()), rel=0.1)


def test_the_probe_is_silent_and_gives_up_after_one_failure(root, trainer, classifier, tmp_path):
    class Loud(classifier):
        def __init__(self, fails: bool):
            super().__init__()
            self.fails = fails

        def training_step(self, batch, batch_idx):
            self.logger.log_metrics({"direct": 1.0}, step=self.calls)
            if self.fails and not any(bool(p.any()) for p in self.parameters()):
                tries.append(batch_idx)
                raise RuntimeError("no weights")
            return super().training_step(batch, batch_idx)

    def count(fails):
        logger = root.loggers.CSVLogger(tmp_path / str(fails))
        seen = []
        logger.log_metrics = lambda metrics, **_: seen.append("direct" in metrics)
        stop = EarlyStopOnUnitEigenvalues(dirpath=tmp_path)
        trainer(callbacks=stop, logger=logger, max_epochs=2, log_every_n_steps=1).fit(Loud(fails))
        return sum(seen)

    tries: list[int] = []
    assert count(False) == 20  # ten batches per epoch, each logged once
    with pytest.warns(KoopmanWarning, match="measuring the baseline loss failed"):
        assert count(True) == 20
    assert tries == [0]


# -- it does not stop -------------------------------------------------------------------------------------------------


def test_it_does_not_stop_a_random_walk_of_the_weights(root, fit, classifier, tmp_path):
    class Walk(root.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch < 25:
                return
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.0
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.add_(1e-4 * torch.randn_like(parameter))

    options = {"mode": "report", "tolerance": 3e-2, "dirpath": tmp_path / "s"}
    stop, _ = fit(EarlyStopOnUnitEigenvalues(**options), model=classifier(dropout=0.0), callbacks=[Walk()], epochs=80)
    walked = held(stop)[36:]
    assert "" not in walked
    assert Hold.WALK.value in walked


def schedule(name: str, optimizer):
    schedulers = torch.optim.lr_scheduler
    if name == "warm-up":
        return schedulers.LambdaLR(optimizer, lambda epoch: 1e-6 if epoch < 30 else 1.0)
    if name == "cosine dip":
        return schedulers.CosineAnnealingWarmRestarts(optimizer, T_0=35, eta_min=1e-8)
    if name == "two phases":
        return schedulers.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 3 or epoch >= 40 else 0.0)
    return schedulers.MultiStepLR(optimizer, [45], gamma=0.1)


@pytest.mark.parametrize("name", ["warm-up", "cosine dip", "two phases", "step"])
def test_it_does_not_stop_where_the_schedule_goes_on(fit, classifier, tmp_path, monkeypatch, name):
    def run(folder):
        model = classifier(optimizer="sgd", scheduler=lambda optimizer: schedule(name, optimizer), n=1200, wrong=0.4)
        model.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # cannot memorize the wrong labels
        stop = EarlyStopOnUnitEigenvalues(mode="report", tolerance=1e-2, dirpath=tmp_path / folder)
        return fit(stop, model=model, epochs=60)[0]

    change = {"warm-up": 30, "cosine dip": 35, "two phases": 40, "step": 45}[name]
    stop = run("guarded")
    assert stop.would_stop_epoch is None or stop.would_stop_epoch > change
    if name != "warm-up":
        assert Hold.SCHEDULE.value in held(stop)[:change]
        monkeypatch.setattr(module, "planned_rates", lambda *_: [])
        assert run("unguarded").would_stop_epoch < change  # control: without the guard it stops too early


def test_it_does_not_stop_at_nan(fit, classifier):
    class Breaking(classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (math.nan if self.current_epoch >= 5 else 1.0)

    with pytest.warns(KoopmanWarning, match="NaN or infinite"):
        stop, run = fit(model=Breaking(), epochs=30)
    assert run.current_epoch == 30
    assert stop.stopping_reason is StoppingReason.NOT_STOPPED
    assert set(held(stop)[12:]) == {Hold.NOT_FINITE.value}


def test_it_does_not_stop_a_dead_network(fit, classifier):
    model = classifier(optimizer="sgd")
    model.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    nn.init.constant_(model.network[1].bias, -1e3)
    stop, run = fit(model=model, epochs=40)
    assert run.current_epoch == 40
    assert set(held(stop)[12:]) == {Hold.BASELINE.value}


# -- with other callbacks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["stop", "monitor"])
def test_it_shares_the_monitors_trajectory_in_any_order(fit, trainer, classifier, tmp_path, first):
    alone, _ = fit(EarlyStopOnUnitEigenvalues(dirpath=tmp_path / "alone"))
    stop, monitor = EarlyStopOnUnitEigenvalues(dirpath=tmp_path / "s"), KoopmanSpectrumMonitor(dirpath=tmp_path / "m")
    trainer(callbacks=[stop, monitor] if first == "stop" else [monitor, stop], max_epochs=100).fit(classifier())
    assert stop.recorder is monitor.recorder
    assert stop.recorder.trajectory is not None
    assert stop.recorder.trajectory.n == alone.recorder.trajectory.n
    assert stop.stopped_epoch == alone.stopped_epoch
    np.testing.assert_allclose(
        [row["unit_fraction"] for row in stop.history[12:]],
        [row["unit_fraction"] for row in alone.history[12:]],
        atol=1e-5,
    )
    assert len(monitor.trajectory) == stop.stopped_epoch + 1


def test_stock_callbacks_go_on_beside_it(root, fit, tmp_path):
    plain = root.callbacks.EarlyStopping("val_loss", patience=3)
    best = root.callbacks.ModelCheckpoint(tmp_path / "c", monitor="val_loss")
    timer = root.callbacks.Timer("00:01:00:00")
    stop, run = fit(callbacks=[plain, best, timer], enable_checkpointing=True)
    assert run.current_epoch in (stop.stopped_epoch, plain.stopped_epoch + 1)
    assert best.best_model_score is not None


def test_max_time_ends_the_run_first(fit):
    stop, run = fit(epochs=-1, max_time={"seconds": 3}, stop=EarlyStopOnUnitEigenvalues(min_epochs=10**6))
    assert stop.stopping_reason is StoppingReason.NOT_STOPPED
    assert len(stop.history) == run.current_epoch


def test_manual_optimization_with_two_optimizers(fit, classifier, tmp_path):
    class Manual(classifier):
        def __init__(self, returns: bool):
            super().__init__()
            self.automatic_optimization, self.returns = False, returns

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            step_by_hand(self, loss)
            self.log("my_loss", loss.detach(), on_step=False, on_epoch=True)
            return loss if self.returns else None

        def configure_optimizers(self):
            return [torch.optim.Adam(part.parameters(), lr=3e-3) for part in (self.network[1], self.network[-1])]

    by_loss, _ = fit(model=Manual(True))
    assert by_loss.stopping_reason is StoppingReason.CONVERGED
    by_metric, _ = fit(EarlyStopOnUnitEigenvalues("my_loss", dirpath=tmp_path / "m"), model=Manual(False))
    assert by_metric.stopped_epoch == by_loss.stopped_epoch
    with pytest.warns(KoopmanWarning, match="observable='train_loss' was not logged"):
        lost, run = fit(model=Manual(False), epochs=15)
    assert run.current_epoch == 15
    assert lost.history == []


def test_fast_dev_run_does_nothing(fit):
    stop, _ = fit(fast_dev_run=True)
    assert stop.history == []


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [8, 15])
def test_a_resumed_run_decides_as_an_uninterrupted_one(root, fit, classifier, tmp_path, cut):
    whole, _ = fit(EarlyStopOnUnitEigenvalues(dirpath=tmp_path / "whole"), model=classifier(dropout=0.0))
    save = root.callbacks.ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_top_k=-1)
    part = EarlyStopOnUnitEigenvalues(dirpath=tmp_path / "part")
    fit(part, epochs=cut, callbacks=[save], enable_checkpointing=True, model=classifier(dropout=0.0))
    resumed = EarlyStopOnUnitEigenvalues(dirpath=tmp_path / "resumed")
    again = root.callbacks.ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_top_k=-1)
    path = tmp_path / "c" / f"epoch={cut - 1}.ckpt"
    model = classifier(dropout=0.0)  # no dropout: Lightning does not restore its random state
    fit(resumed, callbacks=[again], enable_checkpointing=True, ckpt_path=path, model=model)
    assert resumed.stopped_epoch == whole.stopped_epoch
    assert held(resumed) == held(whole)
    assert resumed.chance == whole.chance
    assert resumed.message == whole.message
    np.testing.assert_allclose(
        [row["predicted_change"] for row in resumed.history],
        [row["predicted_change"] for row in whole.history],
        rtol=1e-12,
    )
    state = torch.load(tmp_path / "c" / f"epoch={cut - 1}.ckpt", weights_only=True)
    assert any(key.startswith("EarlyStopOnUnitEigenvalues") for key in state["callbacks"])


SCRIPT = """
from conftest import *
import {root} as root
classifier = make_classifier(root)
from lightning_koopman import EarlyStopOnUnitEigenvalues
stop = EarlyStopOnUnitEigenvalues(dirpath={folder!r})
save = root.callbacks.ModelCheckpoint({folder!r} + "/c", filename="{{epoch:03d}}", save_top_k=-1)
trainer = root.Trainer(max_epochs=100, accelerator="cpu", callbacks=[stop, save], logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir={folder!r})
trainer.fit(classifier(dropout=0.0))
"""


def test_a_killed_run_decides_as_an_uninterrupted_one(root, fit, classifier, tmp_path):
    whole, _ = fit(EarlyStopOnUnitEigenvalues(dirpath=tmp_path / "whole"), model=classifier(dropout=0.0))
    script = tmp_path / "killed.py"
    script.write_text(SCRIPT.format(root=root.__name__, folder=str(tmp_path / "killed")))
    process = FORKS.Process(target=run_script, args=((script, [], tmp_path),))
    process.start()
    rows, history = 0, tmp_path / "killed" / "koopman_stop" / "history.csv"
    deadline = time.monotonic() + 120
    while rows < 14 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
        rows = len(history.read_text().splitlines()) if history.exists() else 0
    assert process.is_alive(), "the run ended before it could be killed"
    process.kill()
    process.join()
    resumed = EarlyStopOnUnitEigenvalues(dirpath=tmp_path / "resumed")
    whole_files = sorted((tmp_path / "killed" / "c").glob("*.ckpt"))[:-1]  # the last one may be incomplete
    again = root.callbacks.ModelCheckpoint(tmp_path / "killed" / "c", filename="{epoch:03d}", save_top_k=-1)
    model = classifier(dropout=0.0)
    fit(resumed, callbacks=[again], enable_checkpointing=True, ckpt_path=whole_files[-1], model=model)
    assert len(resumed.history) == whole.stopped_epoch
    assert held(resumed) == held(whole)
    assert resumed.stopped_epoch == whole.stopped_epoch


def test_a_callback_used_again_starts_from_nothing(fit, tmp_path):
    stop = EarlyStopOnUnitEigenvalues(dirpath=tmp_path / "s")
    fit(stop)
    first = stop.stopped_epoch, len(stop.history)
    fit(stop)
    assert (stop.stopped_epoch, len(stop.history)) == first


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observable": "weights"}, "observable must be 'train_loss' or the name of a logged metric, got 'weights'"),
        ({"radius": 0.0}, "radius must be positive and finite, got 0.0"),
        ({"fraction": 1.2}, r"fraction must lie in \(0, 1\], got 1.2"),
        ({"horizon": 5}, "horizon must be at least 6 and whole, got 5"),
        ({"horizon": 7.5}, "horizon must be at least 6 and whole, got 7.5"),
        ({"tolerance": -1e-3}, "tolerance must be positive and finite, got -0.001"),
        ({"tolerance": math.nan}, "tolerance must be positive and finite, got nan"),
        ({"patience": 0}, "patience must be at least 1 and whole, got 0"),
        ({"patience": 1.5}, "patience must be at least 1 and whole, got 1.5"),
        ({"min_epochs": -1}, "min_epochs must be at least 0 and whole, got -1"),
        ({"mode": "observe"}, r"mode must be one of \['stop', 'report'\], got 'observe'"),
        ({"chance_loss": 0.0}, "chance_loss must be positive and finite, got 0.0"),
        ({"chance_loss": "ln C"}, "chance_loss must be positive and finite, got 'ln C'"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EarlyStopOnUnitEigenvalues(**options)


def test_patterns_that_match_nothing_are_named_before_training(fit, tmp_path):
    with pytest.raises(ValueError, match=r"parameters='encoder\.\*' matches no parameter"):
        fit(EarlyStopOnUnitEigenvalues(parameters="encoder.*", dirpath=tmp_path / "s"))


def test_two_stops_need_two_prefixes(fit, tmp_path):
    pair = [EarlyStopOnUnitEigenvalues(mode=mode, dirpath=tmp_path, prefix=mode) for mode in ("stop", "report")]
    _, run = fit(pair[0], callbacks=pair[1:], epochs=14)
    assert {"stop/predicted_change", "report/predicted_change"} <= set(run.callback_metrics)
    other = EarlyStopOnUnitEigenvalues(horizon=8, dirpath=tmp_path)
    with pytest.raises(ValueError, match="prefix='koopman' is used by two callbacks of type EarlyStopOnUnit"):
        fit(callbacks=[other])
