from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    Phase,
    RestartOnBadInitialization,
)
from lightning_koopman.callbacks.pruning_schedule import PruningSchedule
from lightning_koopman.callbacks.reader import Reader
from lightning_koopman.trajectory.recorder import Recorder, Snapshot, SnapshotSettings


@pytest.mark.parametrize("order", [1, -1])
def test_all_callbacks_say_the_same(trainer, regression, order):
    monitor, stop = KoopmanSpectrumMonitor(), EarlyStopOnUnitEigenvalues(mode="report")
    pruner = KoopmanPruner(sparsity=0.5, parameters="net*weight")
    trainer(callbacks=[monitor, stop, pruner, RestartOnBadInitialization()][::order], max_epochs=14).fit(regression())
    assert monitor.recording.reader is stop.recording.reader is pruner.recording.reader
    assert [row["phase"] for row in monitor.history] == [row["phase"] for row in stop.history]
    assert [row["unit_fraction"] for row in monitor.history[11:]] == [row["unit_fraction"] for row in stop.history[11:]]
    assert pruner.schedule.phase is monitor.reading.phase
    assert stop.chance is not None


def test_the_monitor_hears_of_the_baseline_loss(trainer, regression):
    alone, beside = KoopmanSpectrumMonitor(), KoopmanSpectrumMonitor()
    trainer(callbacks=alone, max_epochs=9).fit(regression(lr=1e-9))
    stop = EarlyStopOnUnitEigenvalues(mode="report", baseline_loss=1e-3)
    trainer(callbacks=[beside, stop], max_epochs=9).fit(regression(lr=1e-9))
    assert beside.reading.phase is Phase.STUCK
    assert alone.reading.phase is not Phase.STUCK


def test_a_pruning_starts_a_new_reading(trainer, regression):
    monitor, pruner = KoopmanSpectrumMonitor(), KoopmanPruner(sparsity=0.5, epoch=10)
    trainer(callbacks=[monitor, pruner], max_epochs=20).fit(regression())
    assert [row["phase"] for row in monitor.history[10:14]] == ["warming up"] * 4
    assert "warming up" not in {row["phase"] for row in monitor.history[15:]} or monitor.reading.n_steps == 10


def test_a_reading_is_taken_once_a_round():
    recorder = Recorder(SnapshotSettings(window=None))
    reader, random = Reader(recorder), np.random.default_rng(0)
    for epoch in range(9):
        recorder.record(epoch, Snapshot([torch.from_numpy(random.standard_normal(50)).float()]))
        assert reader.read(epoch, 0.5) is reader.read(epoch, 99.0)
    resumed = Reader(recorder)
    resumed.load_state_dict(reader.state_dict())
    recorder.record(9, Snapshot([torch.from_numpy(random.standard_normal(50)).float()]))
    ours, theirs = resumed.read(9, 0.5), reader.read(9, 0.5)
    assert (ours.phase, ours.evidence, ours.loss_noise) == (theirs.phase, theirs.evidence, theirs.loss_noise)
    assert reader.read(10, 0.5).phase is Phase.UNKNOWN  # no snapshot
    assert reader.read(10, float("nan")).phase is Phase.DIVERGING


@pytest.mark.parametrize("phase", Phase)
def test_nothing_is_pruned_in_phases_that_lead_nowhere(phase):
    recorder = Recorder(SnapshotSettings(window=20))
    for epoch in range(12):
        recorder.record(epoch, Snapshot([torch.tensor([1.0, 1e-6 * 0.5**epoch])]))
    recording = SimpleNamespace(
        read=lambda *_: SimpleNamespace(phase=phase), recorder=recorder, settings=SimpleNamespace(every_n_steps=None)
    )
    trainer = SimpleNamespace(callbacks=[], lr_scheduler_configs=[], optimizers=[], max_epochs=20, max_steps=-1)
    schedule = PruningSchedule(0.5, None, "settled", 1, 10, 0.03)
    lost = phase in (Phase.DIVERGING, Phase.STUCK, Phase.OSCILLATING)
    assert schedule.has_settled(trainer, recording, 11, True, [0.1]) is not lost
