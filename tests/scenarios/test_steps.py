"""Snapshots every n steps, for training with few, long epochs: the same guarantees as by epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import assert_recorded, distance, held
from torch import nn

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    RestartOnBadInitialization,
    dmd_rrr,
)


@pytest.fixture
def watcher(root):
    """A callback that records the weights and the logged metrics after every step."""

    class Watcher(root.Callback):
        def __init__(self):
            self.weights, self.seen, self.losses = {}, {}, {}

        def note(self, trainer, pl_module):
            self.weights[trainer.global_step] = (
                nn.utils.parameters_to_vector(pl_module.parameters()).detach().cpu().clone()
            )

        def on_train_start(self, trainer, pl_module):
            self.note(trainer, pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.note(trainer, pl_module)
            self.losses[trainer.global_step] = float(outputs["loss"])
            self.seen[trainer.global_step] = dict(trainer.callback_metrics)

    return Watcher()


def by_steps(watcher, every, upto):
    return np.stack([watcher.weights[step].numpy() for step in range(0, upto + 1, every)])


def test_one_long_epoch_has_the_spectrum_of_its_snapshots(trainer, regression, watcher):
    class Long(regression):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(self.x.repeat(4, 1), self.y.repeat(4, 1)), batch_size=4
            )

    monitor = KoopmanSpectrumMonitor(every_n_steps=4, window=10)
    fit = trainer(callbacks=[monitor, watcher], max_epochs=1)
    fit.fit(Long())
    assert [row["epoch"] for row in monitor.history] == list(range(1, 17))
    assert [row["step"] for row in monitor.history] == list(range(4, 65, 4))
    kept = by_steps(watcher, 4, 64)[-10:]
    assert_recorded(monitor.trajectory.snapshots(), kept)
    assert distance(monitor.spectrum.eigenvalues, dmd_rrr(held(monitor.trajectory)).eigenvalues) < 1e-9
    losses = [np.mean([watcher.losses[step - back] for back in range(4)]) for step in range(4, 65, 4)]
    assert [row["train_loss"] for row in monitor.history] == pytest.approx(losses, rel=1e-5)
    # other callbacks see it in the same step
    row = monitor.history[9]
    assert float(watcher.seen[40]["koopman/slowing"]) == pytest.approx(row["slowing"], rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_the_optimizers(trainer, regression, watcher, accumulate):
    monitor = KoopmanSpectrumMonitor(every_n_steps=3, window=None)
    trainer(callbacks=[monitor, watcher], max_epochs=6, accumulate_grad_batches=accumulate).fit(regression())
    steps = 24 // accumulate
    assert [row["step"] for row in monitor.history] == list(range(3, steps + 1, 3))
    assert_recorded(monitor.trajectory.snapshots(), by_steps(watcher, 3, steps))


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
@pytest.mark.parametrize("cut", [12, 14, 16])  # at a snapshot, within an interval, at the end of an epoch
def test_a_run_resumed_within_an_epoch_misses_no_snapshot(root, trainer, regression, tmp_path, cut):
    def start(name, ckpt_path=None):
        monitor = KoopmanSpectrumMonitor(every_n_steps=3, window=None, dirpath=tmp_path / name)
        loss = KoopmanSpectrumMonitor("train_loss", every_n_steps=3, prefix="loss", dirpath=tmp_path / name)
        save = root.callbacks.ModelCheckpoint(tmp_path / "c", "{step}", save_top_k=-1, every_n_train_steps=2)
        fit = trainer(callbacks=[monitor, loss, save], max_epochs=6, enable_checkpointing=True)
        fit.fit(regression(), ckpt_path=ckpt_path)
        return monitor, loss

    (whole, _), (resumed, loss) = start("whole"), start("resumed", tmp_path / "c" / f"step={cut}.ckpt")
    assert resumed.recorder.epochs == whole.recorder.epochs == list(range(9))
    assert [row["step"] for row in resumed.history] == list(range(3, 25, 3))
    before = cut // 3 + 1
    assert torch.equal(resumed.trajectory.snapshots()[:before], whole.trajectory.snapshots()[:before])
    assert len(loss.trajectory) == 8


def test_loggers_get_every_analysis(root, trainer, regression, tmp_path):
    logger = root.loggers.CSVLogger(tmp_path)
    fit = trainer(callbacks=KoopmanSpectrumMonitor(every_n_steps=4), max_epochs=3, logger=logger, log_every_n_steps=50)
    fit.fit(regression())
    logger.save()
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    column, step = header.index("koopman/phase"), header.index("step")
    assert [int(line.split(",")[step]) for line in lines[1:] if line.split(",")[column]] == [4, 8, 12]


def test_a_training_stops_within_its_epoch(trainer, regression):
    class Endless(regression):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(self.x, self.y), batch_size=64)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.5 * (self.head.weight - 2).square().sum()

    class Repeated(Endless):
        def train_dataloader(self):
            data = torch.utils.data.TensorDataset(self.x.repeat(400, 1), self.y.repeat(400, 1))
            return torch.utils.data.DataLoader(data, batch_size=64)

    stop = EarlyStopOnUnitEigenvalues(every_n_steps=10, chance_loss=3.0)
    fit = trainer(callbacks=stop, max_epochs=1)
    fit.fit(Repeated(lr=0.02, optimizer=torch.optim.Adam))
    assert stop.stopped_epoch is not None
    assert fit.global_step == 10 * stop.stopped_epoch < 400
    assert f"after step {fit.global_step}" in stop.message


def test_a_bad_start_is_drawn_anew_within_an_epoch(trainer, classifier):
    class Bad(classifier):
        def __init__(self):
            super().__init__(n=600)
            with torch.no_grad():
                for parameter in self.network.parameters():
                    parameter.mul_(40)

    restart = RestartOnBadInitialization(check_epoch=3, every_n_steps=3, max_restarts=1, chance_loss=2.3)
    trainer(callbacks=restart, max_epochs=2).fit(Bad())
    assert [(row["epoch"], row["step"]) for row in restart.restarts] == [(3, 9)]


def test_weights_are_pruned_within_an_epoch(trainer, regression, watcher):
    pruner = KoopmanPruner(0.5, epoch=4, every_n_steps=3, rounds=2, round_epochs=3, survivors="reconstruction")
    fit = trainer(callbacks=[pruner, watcher], max_epochs=8)
    model = regression()
    fit.fit(model)
    assert [(row["epoch"], row["step"], row["snapshots"]) for row in pruner.history] == [(4, 12, 5), (7, 21, 4)]
    assert pruner.achieved == pytest.approx(0.5, abs=0.02)
    for name, mask in pruner.masks.items():
        assert torch.equal(dict(model.named_parameters())[name] != 0, mask)


def test_bad_input_is_named(trainer, regression):
    with pytest.raises(ValueError, match="every_n_steps must be at least 1"):
        KoopmanSpectrumMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match="exclude each other"):
        KoopmanSpectrumMonitor(every_n_steps=5, every_n_epochs=2)
    with pytest.raises(ValueError, match="must be below max_steps/5=4"):
        trainer(callbacks=KoopmanPruner(0.5, epoch=4, every_n_steps=5), max_steps=20).fit(regression())
