from __future__ import annotations

import csv
import math
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hovering import step_by_hand
from problems import assert_recorded, distance, koopman_warnings
from torch import nn

from lightning_koopman import KoopmanSpectrumMonitor, KoopmanWarning, Phase, Trajectory, dmd_rrr, read_training
from lightning_koopman.callbacks.monitor import COLUMNS, UNKNOWN


def weights(module) -> np.ndarray:
    return nn.utils.parameters_to_vector(module.parameters()).detach().cpu().numpy().copy()


@pytest.fixture
def spy(root):
    """A callback that records the weights after each epoch and the metrics that other callbacks see."""

    class Spy(root.Callback):
        def __init__(self):
            self.snapshots, self.metrics = [], []

        def on_train_start(self, trainer, pl_module):
            self.snapshots.append(weights(pl_module))

        def on_train_epoch_end(self, trainer, pl_module):
            self.snapshots.append(weights(pl_module))
            self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    return Spy()


# -- what it logs -----------------------------------------------------------------------------------------------------


def test_a_bare_callback_records_the_weights_and_logs_what_they_do(trainer, regression):
    monitor, model = KoopmanSpectrumMonitor(), regression()
    fit = trainer(callbacks=monitor, max_epochs=8)
    fit.fit(model)
    assert_recorded(monitor.trajectory.last(), weights(model))
    assert len(monitor.trajectory) == 9
    row = {**monitor.history[-1], "phase": Phase(monitor.history[-1]["phase"]).code}
    for name in UNKNOWN:
        expected = row[name] if math.isfinite(row[name]) else UNKNOWN[name]
        assert float(fit.callback_metrics[f"koopman/{name}"]) == pytest.approx(expected, rel=1e-6)


def test_every_epoch_equals_the_reading_of_the_snapshots_so_far(trainer, regression, spy):
    monitor = KoopmanSpectrumMonitor(window=30)
    trainer(callbacks=[spy, monitor], max_epochs=20).fit(regression())
    losses = [row["train_loss"] for row in monitor.history]
    trajectory = Trajectory(len(spy.snapshots[0]))
    trajectory.append(spy.snapshots[0])
    expected = None
    for row in monitor.history:
        trajectory.append(spy.snapshots[row["epoch"]])
        expected = read_training(trajectory, losses[: row["epoch"]], before=expected)
        assert row["phase"] == expected.phase.value
        for name in ("step_correlation", "spectral_weight", "slowing", "remaining", "half_life", "loss_change"):
            assert row[name] == pytest.approx(getattr(expected, name), rel=1e-6, nan_ok=True)
        newest = np.stack(spy.snapshots[: row["epoch"] + 1])[-11:]
        share = dmd_rrr(newest, refine=False).unit_fraction()
        assert row["unit_fraction"] == pytest.approx(share, abs=1e-6) or row["epoch"] == 1
    assert monitor.history[0]["phase"] == "warming up"
    assert distance(monitor.spectrum.eigenvalues, dmd_rrr(monitor.trajectory.snapshots()).eigenvalues) < 1e-6


def test_the_last_reading_is_the_verdict_of_the_summary(trainer, regression):
    monitor = KoopmanSpectrumMonitor()
    assert monitor.summary().startswith("Nothing is known yet")
    trainer(callbacks=monitor, max_epochs=12).fit(regression())
    assert monitor.summary().startswith(monitor.reading.phase.value.capitalize())
    assert monitor.reading.phase.advice in monitor.summary()


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_the_phase_stands_in_the_progress_bar(root, trainer, regression, bar):
    if bar == "RichProgressBar":
        pytest.importorskip("rich")
    shown = []

    class Look(root.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            shown.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module).get("koopman/phase"))

    progress = getattr(root.callbacks, bar)()
    monitors = [KoopmanSpectrumMonitor(), KoopmanSpectrumMonitor("train_loss", prefix="loss")]
    run = trainer(callbacks=[*monitors, progress, Look()], enable_progress_bar=True)
    run.fit(regression())
    assert shown == [row["phase"] for row in monitors[0].history]
    assert "koopman/phase" not in progress.get_metrics(run, run.lightning_module)


def test_scalars_are_there_for_stock_callbacks_in_the_same_epoch(root, trainer, regression, tmp_path):
    monitor = KoopmanSpectrumMonitor(dirpath=tmp_path / "out")
    seen = []

    class Stop(root.callbacks.EarlyStopping):
        def on_train_epoch_end(self, trainer, pl_module):
            metrics = trainer.callback_metrics
            names = "step_correlation", "phase"
            seen.append((trainer.current_epoch + 1, *(float(metrics[f"koopman/{key}"]) for key in names)))
            super().on_train_epoch_end(trainer, pl_module)

    stop = Stop("koopman/step_correlation", patience=100, check_finite=True)
    best = root.callbacks.ModelCheckpoint(tmp_path / "ckpt", monitor="koopman/slowing", mode="max")
    trainer(callbacks=[stop, best, monitor], enable_checkpointing=True, max_epochs=15).fit(regression())
    assert [epoch for epoch, *_ in seen] == list(range(1, 16))
    assert seen[0] == (1, 0.0, Phase.WARMING_UP.code)  # unknown so far, but finite
    for (_, correlation, phase), row in zip(seen, monitor.history, strict=True):
        assert Phase.of(phase).value == row["phase"]
        assert correlation == pytest.approx(np.nan_to_num(row["step_correlation"]), rel=1e-5)
    assert best.best_model_score is not None


def test_early_stopping_on_the_reading_stops(root, trainer, regression):
    stop = root.callbacks.EarlyStopping("koopman/spectral_weight", mode="max", stopping_threshold=1.5, patience=99)
    fit = trainer(callbacks=[KoopmanSpectrumMonitor(), stop], max_epochs=30)
    fit.fit(regression())
    assert fit.current_epoch < 12


def test_train_loss_is_the_mean_of_what_training_step_returned(trainer, regression, spy):
    monitor = KoopmanSpectrumMonitor("train_loss")
    trainer(callbacks=[monitor, spy], max_epochs=9).fit(regression())
    expected = [metrics["fit_error"] for metrics in spy.metrics]
    assert [row["train_loss"] for row in monitor.history] == pytest.approx(expected, rel=1e-5)
    assert monitor.trajectory.snapshots().ravel().tolist() == pytest.approx(expected, rel=1e-5)
    assert monitor.spectrum.delays == 9 // 2 + 1
    assert {row["phase"] for row in monitor.history} == {"unknown"}  # only weights have a phase
    assert math.isfinite(monitor.history[-1]["loss_change"])


def test_gradient_accumulation_does_not_change_the_loss_scale(trainer, regression):
    monitor = KoopmanSpectrumMonitor("train_loss")
    trainer(callbacks=monitor, max_epochs=1, accumulate_grad_batches=2).fit(regression(lr=0.0))
    model = regression(lr=0.0)
    with torch.no_grad():
        expected = float(nn.functional.mse_loss(model(model.x), model.y))
    assert monitor.history[0]["train_loss"] == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["fit_error", "val_error"])
def test_any_logged_metric_can_be_observed(trainer, regression, spy, metric):
    monitor = KoopmanSpectrumMonitor(metric)
    trainer(callbacks=[monitor, spy], max_epochs=8).fit(regression())
    expected = [metrics[metric] for metrics in spy.metrics]
    assert monitor.trajectory.snapshots().ravel().tolist() == pytest.approx(expected)


def test_a_metric_of_sparse_validation_is_taken_once_each(trainer, regression):
    monitor = KoopmanSpectrumMonitor("val_error")
    trainer(callbacks=monitor, max_epochs=12, check_val_every_n_epoch=3).fit(regression())
    assert monitor.recorder.epochs == [3, 6, 9, 12]
    values = monitor.trajectory.snapshots().ravel()
    assert len(set(values.tolist())) == 4


def test_parameters_are_selected_by_name(trainer, regression):
    monitor = KoopmanSpectrumMonitor(parameters=["net.*", "!*.bias"])
    model = regression()
    trainer(callbacks=monitor).fit(model)
    expected = torch.cat([model.net[0].weight.reshape(-1), model.net[2].weight.reshape(-1)])
    torch.testing.assert_close(monitor.trajectory.last(), expected.detach(), rtol=1e-6, atol=1e-7)


def test_every_n_epochs_takes_every_nth_snapshot(trainer, regression, spy):
    monitor = KoopmanSpectrumMonitor(every_n_epochs=3)
    trainer(callbacks=[monitor, spy], max_epochs=11).fit(regression())
    assert monitor.recorder.epochs == [0, 3, 6, 9]
    assert [row["epoch"] for row in monitor.history] == [3, 6, 9]
    assert_recorded(monitor.trajectory.snapshots(), np.stack(spy.snapshots)[[0, 3, 6, 9]])


@pytest.mark.parametrize("storage", ["ram", "disk"])
def test_window_bounds_the_snapshots(trainer, regression, spy, storage):
    monitor = KoopmanSpectrumMonitor(window=4, storage=storage)
    trainer(callbacks=[monitor, spy], max_epochs=10).fit(regression())
    assert_recorded(monitor.trajectory.snapshots(), np.stack(spy.snapshots)[-4:])


def test_two_monitors_of_the_same_weights_share_one_trajectory(trainer, regression):
    first = KoopmanSpectrumMonitor()
    second = KoopmanSpectrumMonitor(prefix="wide", radius=0.2)
    other = KoopmanSpectrumMonitor(prefix="bias", parameters="*.bias")
    trainer(callbacks=[first, second, other]).fit(regression())
    assert first.trajectory is second.trajectory
    assert other.trajectory is not first.trajectory
    assert len(first.trajectory) == 7
    assert first.history[-1]["unit_fraction"] <= second.history[-1]["unit_fraction"] + 1e-12


def test_the_training_is_the_same_with_and_without(trainer, regression):
    plain, watched = regression(), regression()
    trainer().fit(plain)
    trainer(callbacks=KoopmanSpectrumMonitor()).fit(watched)
    np.testing.assert_array_equal(weights(plain), weights(watched))


def test_fast_dev_run_records_and_writes_nothing(trainer, regression, tmp_path):
    monitor = KoopmanSpectrumMonitor()
    fit = trainer(callbacks=monitor, fast_dev_run=True)
    fit.fit(regression())
    assert monitor.trajectory is None
    assert not list(tmp_path.rglob("*.csv"))
    shown = {key: float(value) for key, value in fit.callback_metrics.items() if key.startswith("koopman/")}
    assert shown == {f"koopman/{name}": value for name, value in UNKNOWN.items()}  # so that schedulers can monitor them


def test_manual_optimization_with_two_optimizers(trainer, regression):
    class Manual(regression):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net.parameters(), 0.1), torch.optim.Adam(self.head.parameters(), 0.01)]

        def training_step(self, batch, batch_idx):
            loss = nn.functional.mse_loss(self(batch[0]), batch[1])
            step_by_hand(self, loss)

    monitor = KoopmanSpectrumMonitor()
    trainer(callbacks=monitor).fit(Manual())
    assert len(monitor.history) == 6
    assert math.isnan(monitor.history[-1]["train_loss"])  # the step returned no loss
    assert monitor.spectrum is not None


# -- what it writes ---------------------------------------------------------------------------------------------------


def test_the_history_is_one_tidy_table(trainer, regression, tmp_path):
    monitor = KoopmanSpectrumMonitor(dirpath=tmp_path / "out")
    trainer(callbacks=monitor).fit(regression())
    assert monitor.history_path == tmp_path / "out" / "koopman" / "history.csv"
    with open(monitor.history_path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    for row, kept in zip(rows, monitor.history, strict=True):
        for key in COLUMNS:
            assert row[key] == kept[key] or (row[key] == "") == math.isnan(kept[key])
            assert row[key] in ("", kept[key]) or float(row[key]) == kept[key]


def test_an_earlier_run_is_not_overwritten(trainer, regression):
    monitors = [KoopmanSpectrumMonitor() for _ in range(3)]
    for monitor in monitors:
        trainer(callbacks=monitor, max_epochs=3).fit(regression())
    paths = [monitor.history_path for monitor in monitors]
    assert [path.parent.name for path in paths] == ["koopman", "koopman-v1", "koopman-v2"]
    assert all(path.is_file() for path in paths)


def test_the_summary_speaks_of_the_walk_beside(trainer, regression):
    monitor = KoopmanSpectrumMonitor()
    assert "No Koopman spectrum yet: too few snapshots of the weights." in monitor.summary()
    trainer(callbacks=monitor).fit(regression())
    text = monitor.summary()
    assert "random walk with the same step lengths" in text
    assert "rank" in text


def test_two_monitors_with_one_dirpath_keep_apart(trainer, regression, tmp_path):
    pair = [KoopmanSpectrumMonitor(dirpath=tmp_path), KoopmanSpectrumMonitor("fit_error", prefix="l", dirpath=tmp_path)]
    trainer(callbacks=pair).fit(regression())
    for monitor, folder in zip(pair, ("koopman", "l"), strict=True):
        assert monitor.history_path == tmp_path / folder / "history.csv"
        assert len(monitor.history_path.read_text().splitlines()) == 7


# -- with stock callbacks and schedulers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("monitor_options", "trainer_options"),
    [({"every_n_epochs": 2}, {}), ({}, {"val_check_interval": 0.5}), ({}, {"check_val_every_n_epoch": 2})],
)
def test_the_scalars_are_never_missing(root, trainer, regression, tmp_path, monitor_options, trainer_options):
    class Plateau(regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "koopman/loss_noise"},
            }

    callbacks = [
        root.callbacks.EarlyStopping("koopman/step_correlation", patience=99),
        root.callbacks.ModelCheckpoint(tmp_path / "c", monitor="koopman/slowing"),
        KoopmanSpectrumMonitor(**monitor_options),
    ]
    fit = trainer(callbacks=callbacks, enable_checkpointing=True, **trainer_options)
    fit.fit(Plateau())
    assert fit.current_epoch == 6
    trainer(callbacks=KoopmanSpectrumMonitor(), fast_dev_run=True).fit(Plateau())


def test_a_metric_is_taken_only_when_it_was_logged(trainer, regression):
    class Rare(regression):
        def training_step(self, batch, batch_idx):
            if self.current_epoch % 3 == 0:
                self.log("rare", float(self.current_epoch), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    monitor = KoopmanSpectrumMonitor("rare")
    trainer(callbacks=monitor, max_epochs=8).fit(Rare())
    assert monitor.trajectory.snapshots().ravel().tolist() == [0.0, 3.0, 6.0]


@pytest.mark.parametrize(
    "loss",
    [lambda x: {"loss": x.to_sparse()}, lambda x: {"loss": x * 1j}, lambda _: None, lambda x: {"loss": x.half()}],
    ids=["sparse", "complex", "none", "half"],
)
def test_odd_losses_of_manual_optimization_do_no_harm(trainer, regression, loss):
    class Odd(regression):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            found = nn.functional.mse_loss(self(batch[0]), batch[1])
            self.optimizers().zero_grad()
            self.manual_backward(found)
            self.optimizers().step()
            return loss(found.detach())

    monitor = KoopmanSpectrumMonitor()
    trainer(callbacks=monitor).fit(Odd())
    assert len(monitor.history) == 6


def test_layers_built_in_setup_can_be_named(trainer, regression):
    class Late(regression):
        def setup(self, stage):
            self.late = nn.Linear(1, 1)

        def forward(self, x):
            return self.late(super().forward(x))

    monitor = KoopmanSpectrumMonitor(parameters="late.*")
    trainer(callbacks=monitor).fit(Late())
    assert monitor.trajectory.n == 2


# -- bad input: detected before training ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observable": ""}, "observable must be"),
        ({"observable": None}, "observable must be"),
        ({"window": 2}, "window must be at least 3"),
        ({"window": 3.7}, "window must be at least 3 and whole"),
        ({"every_n_epochs": 1.5}, "every_n_epochs must be at least 1 and whole"),
        ({"radius": math.inf}, "radius must be positive and finite"),
        ({"prefix": "k/dataloader_idx_0"}, "Lightning reserves it"),
        ({"dirpath": "s3://bucket/run"}, "dirpath must be a local folder"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1"),
        ({"tol": 2.0}, "tol must lie in"),
        ({"radius": 0.0}, "radius must be positive"),
        ({"max_residual": -1.0}, "max_residual must be positive"),
        ({"storage": "tape"}, "storage must be one of"),
        ({"log_figure": -1}, "log_figure must be"),
        ({"prefix": ""}, "prefix must not be empty"),
        ({"observable": "train_loss", "parameters": "net.*"}, "only applies to observable='weights'"),
    ],
)
def test_bad_arguments_are_named_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        KoopmanSpectrumMonitor(**options)


def test_an_empty_selection_is_an_error_before_training(trainer, regression):
    with pytest.raises(ValueError, match=r"parameters='conv\.\*' matches no parameter; the module has net"):
        trainer(callbacks=KoopmanSpectrumMonitor(parameters="conv.*")).fit(regression())


def test_two_monitors_with_one_prefix_are_an_error_before_training(trainer, regression):
    pair = [KoopmanSpectrumMonitor(), KoopmanSpectrumMonitor("train_loss")]
    with pytest.raises(ValueError, match="prefix='koopman' is used by two callbacks of type KoopmanSpectrumMonitor"):
        trainer(callbacks=pair).fit(regression())


def test_an_output_folder_that_cannot_be_written_is_an_error_before_training(trainer, regression, tmp_path):
    (tmp_path / "file").touch()  # root ignores permissions, but cannot make a folder below a file either
    with pytest.raises(ValueError, match=r"dirpath=.*cannot be written.*pass another `dirpath`"):
        trainer(callbacks=KoopmanSpectrumMonitor(dirpath=tmp_path / "file" / "out")).fit(regression())


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_read_only_folder_is_an_error_before_training(trainer, regression, tmp_path):
    folder = tmp_path / "sealed"
    folder.mkdir(mode=0o500)
    with pytest.raises(ValueError, match="cannot be written"):
        trainer(callbacks=KoopmanSpectrumMonitor(dirpath=folder)).fit(regression())


def test_a_disk_that_is_too_small_is_an_error_before_training(trainer, regression, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"of disk are free.*pass another `dirpath`"):
        trainer(callbacks=KoopmanSpectrumMonitor(storage="disk")).fit(regression())


def test_snapshots_that_cannot_fit_are_an_error_before_training(trainer, regression, monkeypatch):
    monkeypatch.setattr("lightning_koopman.callbacks.run_folder.available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"window=100 keeps 100 snapshots.*storage='disk'"):
        trainer(callbacks=KoopmanSpectrumMonitor()).fit(regression())
    trainer(callbacks=KoopmanSpectrumMonitor(storage="disk")).fit(regression())


def test_modules_built_in_configure_model_are_checked_too(trainer, regression):
    class Late(regression):
        def __init__(self):
            super().__init__()
            del self.net, self.head

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net, self.head = nn.Linear(4, 1), nn.Identity()

    monitor = KoopmanSpectrumMonitor()
    trainer(callbacks=monitor).fit(Late())
    assert monitor.trajectory.n == 5
    with pytest.raises(ValueError, match="matches no parameter"):
        trainer(callbacks=KoopmanSpectrumMonitor(parameters="conv*")).fit(Late())


def test_deepspeed_is_refused_before_training(root, trainer, regression):
    class DeepSpeedStrategy(root.strategies.SingleDeviceStrategy):  # the package is not installed
        pass

    monitor = KoopmanSpectrumMonitor()
    with pytest.raises(ValueError, match=r"DeepSpeedStrategy keeps the weights in partitions of its own.*FSDP2"):
        trainer(callbacks=monitor, strategy=DeepSpeedStrategy("cpu"), accelerator="cpu").fit(regression())
    observed = KoopmanSpectrumMonitor("train_loss")  # works, since it reads no weights
    trainer(callbacks=observed, strategy=DeepSpeedStrategy("cpu"), accelerator="cpu").fit(regression())
    assert len(observed.recorder) == 6


# -- bad input: detected during training ------------------------------------------------------------------------------


def test_constant_weights_warn_once_and_training_goes_on(trainer, regression):
    monitor = KoopmanSpectrumMonitor()
    with pytest.warns(KoopmanWarning, match="has not changed over the last 3 snapshots") as caught:
        trainer(callbacks=monitor).fit(regression(lr=0.0))
    assert len(koopman_warnings(caught)) == 1
    assert monitor.history[-1]["unit_fraction"] == monitor.surrogate.unit_fraction() == 1.0
    assert monitor.history[-1]["phase"] == "settled"


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_weights_that_are_not_finite_warn_once_and_checkpoints_are_kept(root, trainer, regression, tmp_path, poison):
    model = regression()

    def spoil(module):
        with torch.no_grad():
            if module.trainer.current_epoch == 4:
                module.kept = module.head.weight.clone()
                module.head.weight.fill_(poison)
            if module.trainer.current_epoch == 7:  # the user repairs the weights
                for parameter in module.parameters():
                    parameter.copy_(torch.full_like(parameter, 0.1))
                module.trainer.optimizers[0].state.clear()

    model.spoil = spoil
    monitor = KoopmanSpectrumMonitor()
    checkpoint = root.callbacks.ModelCheckpoint(tmp_path / "ckpt", every_n_epochs=1, save_top_k=-1)
    fit = trainer(callbacks=[monitor, checkpoint], max_epochs=12, enable_checkpointing=True)
    with pytest.warns(KoopmanWarning, match="NaN or infinite values after epoch 5") as caught:
        fit.fit(model)
    assert len(koopman_warnings(caught)) == 1
    assert fit.current_epoch == 12
    assert len(list((tmp_path / "ckpt").glob("*.ckpt"))) == 12
    assert [row["phase"] for row in monitor.history[4:8]] == ["diverging"] * 3 + ["warming up"]
    assert monitor.recorder.epochs == [8, 9, 10, 11, 12]  # a new trajectory after the repair
    assert monitor.history[-1]["n_snapshots"] == 5


def test_a_loss_that_is_not_finite_warns_once(trainer, regression):
    class Bad(regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.current_epoch == 3 else loss

    monitor = KoopmanSpectrumMonitor("train_loss")
    with pytest.warns(KoopmanWarning, match="'train_loss' holds NaN") as caught:
        trainer(callbacks=monitor).fit(Bad())
    assert len(koopman_warnings(caught)) == 1


def test_a_changed_parameter_count_warns_once_and_starts_anew(trainer, regression):
    model = regression()

    def spoil(module):
        if module.trainer.current_epoch == 3:
            module.head = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)).to(module.device)

    model.spoil = spoil
    monitor = KoopmanSpectrumMonitor()
    with pytest.warns(KoopmanWarning, match="trained parameters changed after epoch 4") as caught:
        trainer(callbacks=monitor, max_epochs=8).fit(model)
    assert len(koopman_warnings(caught)) == 1
    assert monitor.trajectory.n == 56
    assert monitor.recorder.epochs == [4, 5, 6, 7, 8]


def test_an_unknown_metric_warns_once_and_names_the_known(trainer, regression):
    monitor = KoopmanSpectrumMonitor("val_acuracy")
    with pytest.warns(KoopmanWarning, match="'val_acuracy' was not logged.*fit_error, val_error") as caught:
        trainer(callbacks=monitor).fit(regression())
    assert len(koopman_warnings(caught)) == 1
    assert monitor.spectrum is None
    assert len(monitor.history) == 6


def test_a_failing_analysis_warns_once_and_training_goes_on(trainer, regression, monkeypatch):
    def fail(*_, **__):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr("lightning_koopman.callbacks.reader.read_gram", fail)
    fit = trainer(callbacks=KoopmanSpectrumMonitor())
    with pytest.warns(KoopmanWarning, match="reading the training failed.*SVD did not converge") as caught:
        fit.fit(regression())
    assert len(koopman_warnings(caught)) == 1
    assert fit.current_epoch == 6


def test_a_folder_lost_in_the_middle_of_a_run_warns_and_training_goes_on(root, trainer, regression, tmp_path):
    import shutil

    model, monitor = regression(), KoopmanSpectrumMonitor(dirpath=tmp_path / "out")

    def spoil(module):
        if module.trainer.current_epoch == 3:
            shutil.rmtree(tmp_path / "out")
            (tmp_path / "out").touch()

    model.spoil = spoil
    checkpoint = root.callbacks.ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1)
    fit = trainer(callbacks=[monitor, checkpoint], enable_checkpointing=True)
    with pytest.warns(KoopmanWarning) as caught:
        fit.fit(model)
    assert len(koopman_warnings(caught)) == 2  # one for the history, one for the sidecar
    assert len(list((tmp_path / "ckpt").glob("*.ckpt"))) == 6
    assert len(monitor.history) == 6


def test_half_precision_weights_warn(trainer, regression):
    with pytest.warns(KoopmanWarning, match="bfloat16.*spurious eigenvalues at 1"):
        trainer(callbacks=KoopmanSpectrumMonitor(), precision="bf16-true", max_epochs=2).fit(regression())


def test_a_clean_run_warns_of_nothing(trainer, regression):
    with warnings.catch_warnings():
        warnings.simplefilter("error", KoopmanWarning)
        trainer(callbacks=KoopmanSpectrumMonitor()).fit(regression())


# -- a reused callback ------------------------------------------------------------------------------------------------


def test_fitting_on_goes_on_with_the_trajectory(trainer, regression):
    monitor, model = KoopmanSpectrumMonitor(), regression()
    fit = trainer(callbacks=monitor, max_epochs=4)
    fit.fit(model)
    fit.fit_loop.max_epochs = 8
    fit.fit(model)
    assert monitor.recorder.epochs == list(range(9))
    assert [row["epoch"] for row in monitor.history] == list(range(1, 9))


def test_fitting_on_from_other_weights_starts_anew(trainer, regression):
    monitor, model = KoopmanSpectrumMonitor(), regression()
    fit = trainer(callbacks=monitor, max_epochs=4)
    fit.fit(model)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    fit.fit_loop.max_epochs = 8
    fit.fit(model)
    assert monitor.recorder.epochs == [4, 5, 6, 7, 8]


def test_fitting_on_stays_in_its_own_folder(trainer, regression, tmp_path):
    first, second = KoopmanSpectrumMonitor(dirpath=tmp_path), KoopmanSpectrumMonitor(dirpath=tmp_path)
    trainer(callbacks=first, max_epochs=5).fit(regression())
    before = first.history_path.read_text()
    fit, model = trainer(callbacks=second, max_epochs=3), regression()
    fit.fit(model)
    fit.fit_loop.max_epochs = 6
    fit.fit(model)
    assert second.history_path.parent.name == "koopman-v1"
    assert len(second.history_path.read_text().splitlines()) == 7
    assert first.history_path.read_text() == before


def test_constant_zero_weights_warn_of_just_that(trainer, regression):
    model = regression(lr=0.0)
    nn.init.zeros_(model.head.bias)
    with pytest.warns(KoopmanWarning, match="has not changed") as caught:
        trainer(callbacks=KoopmanSpectrumMonitor(parameters="head.bias")).fit(model)
    assert len(koopman_warnings(caught)) == 1


def test_a_new_trainer_starts_anew(trainer, regression):
    monitor = KoopmanSpectrumMonitor()
    for _ in range(2):
        trainer(callbacks=monitor, max_epochs=4).fit(regression())
        assert monitor.recorder.epochs == [0, 1, 2, 3, 4]
        assert len(monitor.history) == 4


def test_a_new_trainer_starts_anew_for_metrics_too(trainer, regression):
    monitor = KoopmanSpectrumMonitor("fit_error")
    losses = []
    for lr in (0.0, 0.1):
        trainer(callbacks=monitor, max_epochs=1).fit(regression(lr=lr))
        losses.append(float(monitor.trajectory.last()))
    assert losses[0] != losses[1]
    assert monitor.recorder.epochs == [1]
