"""Working on a snapshot while training goes on, and keeping less of each."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from lightning_koopman import EarlyStopOnUnitEigenvalues, KoopmanPruner, KoopmanSpectrumMonitor, KoopmanWarning
from lightning_koopman.trajectory.trajectory import Trajectory


def without_time(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


@pytest.mark.parametrize(
    "options", [{}, {"every_n_steps": 3}, {"dtype": "bfloat16"}, {"storage": "sketch", "sketch": 41}]
)
def test_the_history_is_that_of_waiting(trainer, regression, options):
    waits, goes_on = KoopmanSpectrumMonitor(**options), KoopmanSpectrumMonitor(background=True, **options)
    fits = [trainer(callbacks=each, max_epochs=9) for each in (waits, goes_on)]
    for fit in fits:
        fit.fit(regression())
    for ours, theirs in zip(without_time(goes_on.history), without_time(waits.history), strict=True):
        np.testing.assert_equal(ours, theirs)
    np.testing.assert_array_equal(goes_on.spectrum.eigenvalues, waits.spectrum.eigenvalues)
    # what is shown at the end is the last snapshot's
    shown = [float(fit.callback_metrics["koopman/residual_at_one"]) for fit in fits]
    assert shown[0] == shown[1]


def test_it_can_be_copied_and_used_again(trainer, regression):
    monitor = KoopmanSpectrumMonitor(background=True)
    trainer(callbacks=monitor, max_epochs=4).fit(regression())
    twin = copy.deepcopy(monitor)  # as for processes that are spawned
    for each in (monitor, twin):
        trainer(callbacks=each, max_epochs=5).fit(regression())
        assert len(each.history) == 5


def test_what_is_logged_is_one_snapshot_old(root, trainer, regression):
    seen = []

    class Look(root.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics["koopman/rank"]))

    monitor = KoopmanSpectrumMonitor(background=True)
    trainer(callbacks=[monitor, Look()], max_epochs=8).fit(regression())
    ranks = [0.0 if np.isnan(row["rank"]) else row["rank"] for row in monitor.history]
    assert seen == [0.0, *ranks[:-1]]


@pytest.mark.parametrize("kept", [{}, {"dtype": "bfloat16"}, {"storage": "sketch", "sketch": 41}, {"storage": "disk"}])
@pytest.mark.parametrize("background", [False, True])
def test_a_resumed_run_goes_on_where_it_was(root, trainer, regression, tmp_path, kept, background):
    def start(name, epochs, ckpt_path=None):
        monitor = KoopmanSpectrumMonitor(background=background, window=6, dirpath=tmp_path / name, **kept)
        save = root.callbacks.ModelCheckpoint(tmp_path / name / "c", "{epoch}", save_top_k=-1)
        fit = trainer(callbacks=[monitor, save], max_epochs=epochs, enable_checkpointing=True)
        fit.fit(regression(), ckpt_path=ckpt_path)
        return monitor

    whole = start("whole", 12)
    start("part", 8)
    resumed = start("resumed", 12, tmp_path / "part" / "c" / "epoch=7.ckpt")
    for ours, theirs in zip(without_time(resumed.history), without_time(whole.history), strict=True):
        np.testing.assert_equal(ours, theirs)
    assert resumed.recorder.epochs == [7, 8, 9, 10, 11, 12]


def test_a_callback_that_needs_the_snapshot_at_once_waits_for_it(trainer, regression):
    def run(background):
        monitor = KoopmanSpectrumMonitor(background=background)
        stop = EarlyStopOnUnitEigenvalues(mode="report", chance_loss=1.0)
        trainer(callbacks=[monitor, stop], max_epochs=16).fit(regression())
        assert stop.recorder is monitor.recorder
        return stop

    for ours, theirs in zip(run(True).history, run(False).history, strict=True):
        np.testing.assert_equal(ours, theirs)


@pytest.mark.parametrize("first", ["monitor", "pruner"])
def test_it_may_share_with_callbacks_that_wait_and_come_first(trainer, regression, first):
    waits = KoopmanSpectrumMonitor(prefix="waits") if first == "monitor" else KoopmanPruner(0.5, epoch=4, window=100)
    monitor = KoopmanSpectrumMonitor(background=True, log_figure=3)
    trainer(callbacks=[waits, monitor], max_epochs=8).fit(regression())
    assert waits.recorder is monitor.recorder
    assert [row["epoch"] for row in monitor.history] == list(range(1, 9))
    assert not np.isnan(monitor.history[-1]["residual_at_one"])


def test_a_snapshot_that_cannot_even_be_read_costs_its_row_only(trainer, regression, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("nothing to read")

    monkeypatch.setattr(KoopmanSpectrumMonitor, "_read_weights", broken)
    monitor = KoopmanSpectrumMonitor(background=True)
    with pytest.warns(KoopmanWarning, match="nothing to read"):
        trainer(callbacks=monitor, max_epochs=3).fit(regression())
    assert len(monitor.history) == 3


def test_a_failure_in_the_background_warns_and_training_goes_on(trainer, regression, monkeypatch):
    def broken(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Trajectory, "border", broken)
    monitor = KoopmanSpectrumMonitor(background=True)
    with pytest.warns(KoopmanWarning, match="Input/output error"):
        trainer(callbacks=monitor, max_epochs=5).fit(regression())
    assert len(monitor.history) == 5


def test_weights_that_are_not_finite_are_found_in_the_background(trainer, regression):
    model = regression()

    def spoil(module):
        with torch.no_grad():
            module.head.bias.fill_(np.nan if module.current_epoch == 4 else 0.1)

    model.spoil = spoil
    monitor = KoopmanSpectrumMonitor(background=True)
    with pytest.warns(KoopmanWarning, match="NaN or infinite"):
        trainer(callbacks=monitor, max_epochs=9).fit(model)
    assert monitor.recorder.epochs[-1:] != [5]


def test_sketches_say_how_far_off_they_are(trainer, regression):
    monitor = KoopmanSpectrumMonitor(storage="sketch", sketch=23)
    trainer(callbacks=monitor, max_epochs=10).fit(regression())
    errors = [row["sketch_error"] for row in monitor.history]
    assert np.isnan(errors[0])
    assert all(error >= 0 for error in errors[2:])
    assert "- Sketch: " in monitor.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"dtype": "bfloat16", "storage": "sketch"}, "is for stored weights"),
        ({"dtype": "bfloat16", "observable": "train_loss"}, "is for stored weights"),
        ({"storage": "sketch", "observable": "train_loss"}, "goes with observable='weights'"),
        ({"storage": "sketch", "sketch": 1}, "sketch must be at least 2"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        KoopmanSpectrumMonitor(**options)
