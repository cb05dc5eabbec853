from __future__ import annotations

import copy
import pickle
import shutil

import numpy as np
import pytest
import torch

from lightning_koopman import EarlyStopOnUnitEigenvalues, KoopmanSpectrumMonitor, KoopmanWarning, Trajectory


@pytest.fixture
def run(root, trainer, regression, tmp_path):
    """Return a function that trains, also from a checkpoint, and returns the monitor and the checkpoint folder."""

    def start(name: str, epochs: int, ckpt_path=None, save_top_k=-1, **options):
        monitor = KoopmanSpectrumMonitor(**{"window": 8, "dirpath": tmp_path / name, **options})
        checkpoint = root.callbacks.ModelCheckpoint(
            tmp_path / name / "checkpoints", filename="{epoch}", save_top_k=save_top_k, every_n_epochs=1
        )
        fit = trainer(callbacks=[monitor, checkpoint], max_epochs=epochs, enable_checkpointing=True)
        fit.fit(regression(), ckpt_path=ckpt_path)
        return monitor, tmp_path / name / "checkpoints"

    return start


def same(resumed, whole) -> None:
    ours, theirs = resumed.spectrum, whole.spectrum
    np.testing.assert_allclose(ours.eigenvalues, theirs.eigenvalues, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.residuals, theirs.residuals, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.coefficients, theirs.coefficients, rtol=1e-12)
    for a, b in zip(resumed.history, whole.history, strict=True):
        a, b = ({key: value for key, value in row.items() if key != "seconds"} for row in (a, b))
        assert a.pop("phase") == b.pop("phase")
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-12)
    assert torch.equal(resumed.trajectory.snapshots(), whole.trajectory.snapshots())


@pytest.mark.parametrize("observable", ["weights", "train_loss", "val_error"])
@pytest.mark.parametrize("options", [{}, {"window": None}, {"storage": "disk"}, {"every_n_epochs": 2}])
def test_a_resumed_run_gives_the_spectrum_of_an_uninterrupted_one(run, observable, options):
    whole, _ = run("whole", 24, observable=observable, **options)
    _, checkpoints = run("part", 11, observable=observable, **options)
    resumed, _ = run("resumed", 24, checkpoints / "epoch=10.ckpt", observable=observable, **options)
    same(resumed, whole)


def test_resuming_into_the_same_folder_leaves_the_first_run_as_it_was(run, tmp_path):
    whole, _ = run("whole", 20)
    part, checkpoints = run("part", 12)
    before = part.history_path.read_text()
    resumed, _ = run("part", 20, checkpoints / "epoch=11.ckpt")
    same(resumed, whole)
    assert resumed.history_path == tmp_path / "part" / "koopman-v1" / "history.csv"
    assert len(resumed.history_path.read_text().splitlines()) == 21
    assert part.history_path.read_text() == before


def test_a_moved_run_is_found_beside_its_checkpoint(run, tmp_path):
    whole, _ = run("whole", 20)
    run("part", 12)
    shutil.move(tmp_path / "part", tmp_path / "elsewhere")
    resumed, _ = run("resumed", 20, tmp_path / "elsewhere" / "checkpoints" / "epoch=11.ckpt")
    same(resumed, whole)


@pytest.mark.parametrize("kept", [{}, {"dtype": "bfloat16"}, {"storage": "sketch", "sketch": 31}, {"window": None}])
@pytest.mark.parametrize("epoch", [0, 8, 17])
def test_any_older_checkpoint_goes_on_as_if_nothing_had_followed(run, kept, epoch):
    whole, checkpoints = run("whole", 20, **kept)
    resumed, _ = run("resumed", epoch + 3, checkpoints / f"epoch={epoch}.ckpt", **kept)
    assert resumed.recorder.epochs == list(range(0 if kept == {"window": None} else max(0, epoch - 4), epoch + 4))
    for row, same in zip(resumed.history, whole.history, strict=False):
        assert row["phase"] == same["phase"]
        rest = {"seconds": 0, "phase": 0}
        assert {**row, **rest} == pytest.approx({**same, **rest}, rel=1e-12, nan_ok=True)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*")
def test_files_go_with_the_last_checkpoint_that_needs_them(root, trainer, regression, tmp_path):
    """Of 60 snapshots, those of three checkpoints remain, one written by hand; each can be resumed from."""

    class Hand(root.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 20:
                trainer.save_checkpoint(tmp_path / "hand" / "own.ckpt")

    def start(epochs, callbacks, ckpt_path=None):
        monitor = KoopmanSpectrumMonitor(window=5, dirpath=tmp_path)
        fit = trainer(callbacks=[monitor, *callbacks], enable_checkpointing=bool(callbacks), max_epochs=epochs)
        fit.fit(regression(), ckpt_path=ckpt_path)
        return monitor

    save = root.callbacks.ModelCheckpoint(tmp_path / "c", monitor="fit_error", filename="{epoch}", save_last=True)
    whole = start(60, [save, Hand()])
    paths = [*(tmp_path / "c").glob("*.ckpt"), tmp_path / "hand" / "own.ckpt"]
    files = list(whole.run_folder.path.glob("snapshots-*.bin"))
    rows = sum(file.stat().st_size for file in files) / (whole.trajectory.n * 4)
    assert rows <= 3 * 5 * (len(paths) + 1)
    for path in paths:
        epoch = torch.load(path, weights_only=True)["epoch"]
        resumed = start(epoch + 2, [], path)
        assert resumed.recorder.epochs == list(range(epoch - 2, epoch + 3))


def test_a_lost_sidecar_restarts_the_window_with_a_warning(run, tmp_path):
    _, checkpoints = run("part", 12)
    for file in (tmp_path / "part" / "koopman").glob("snapshots-*.bin"):
        file.unlink()
    with pytest.warns(KoopmanWarning, match="no longer hold the checkpoint's 8 snapshots"):
        resumed, _ = run("resumed", 14, checkpoints / "epoch=11.ckpt")
    assert resumed.recorder.epochs == [12, 13, 14]
    assert len(resumed.history) == 14


def test_a_checkpoint_without_the_monitor_starts_the_window_anew(root, run, trainer, regression, tmp_path):
    checkpoint = root.callbacks.ModelCheckpoint(tmp_path, filename="plain")
    trainer(callbacks=checkpoint, enable_checkpointing=True, max_epochs=5).fit(regression())
    with pytest.warns(KoopmanWarning, match="holds no snapshots for this callback"):
        resumed, _ = run("resumed", 8, tmp_path / "plain.ckpt")
    assert resumed.recorder.epochs == [5, 6, 7, 8]


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")  # so the weights may differ
@pytest.mark.parametrize(
    ("when", "checkpoint"),
    [
        ({"every_n_train_steps": 6}, "step=30"),  # four batches per epoch: two batches into an epoch
        ({"every_n_train_steps": 4}, "step=28"),  # after the last batch of an epoch, before its end
        ({"save_on_train_epoch_end": False}, "step=28"),  # after the validation, before the epoch's end
    ],
)
def test_no_epoch_is_missing_after_resuming_within_one(root, trainer, regression, tmp_path, when, checkpoint):
    def start(name, ckpt_path=None):
        monitor = KoopmanSpectrumMonitor(dirpath=tmp_path / name)
        save = root.callbacks.ModelCheckpoint(tmp_path / "c", filename="{step}", save_top_k=-1, **when)
        fit = trainer(callbacks=[monitor, save], max_epochs=12, enable_checkpointing=True)
        fit.fit(regression(), ckpt_path=ckpt_path)
        return monitor

    whole, resumed = start("whole"), start("resumed", tmp_path / "c" / f"{checkpoint}.ckpt")
    assert resumed.recorder.epochs == whole.recorder.epochs == list(range(13))
    # also where Lightning runs no epoch-end hook because all batches were done
    assert [row["epoch"] for row in resumed.history] == list(range(1, 13))


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
def test_a_metric_validated_before_the_checkpoint_is_not_lost(root, trainer, regression, tmp_path):
    def start(name, ckpt_path=None, **options):
        monitor = KoopmanSpectrumMonitor("val_error", dirpath=tmp_path / name, **options)
        save = root.callbacks.ModelCheckpoint(
            tmp_path / "c", filename="{step}", save_top_k=-1, save_on_train_epoch_end=False
        )
        fit = trainer(callbacks=[monitor, save], enable_checkpointing=True)
        fit.fit(regression(), ckpt_path=ckpt_path)
        return monitor

    whole, resumed = start("whole"), start("resumed", tmp_path / "c" / "step=12.ckpt")
    assert resumed.recorder.epochs == whole.recorder.epochs == [1, 2, 3, 4, 5, 6]
    assert torch.equal(resumed.trajectory.snapshots()[:3], whole.trajectory.snapshots()[:3])


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
def test_the_first_epochs_loss_survives_a_checkpoint_within_it(root, trainer, regression, tmp_path):
    class Listed(regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses = [*getattr(self, "losses", []), float(loss.detach())]
            return loss

    def start(name, ckpt_path=None):
        monitor, model = KoopmanSpectrumMonitor("train_loss", dirpath=tmp_path / name), Listed()
        save = root.callbacks.ModelCheckpoint(tmp_path / "c", filename="{step}", save_top_k=-1, every_n_train_steps=2)
        fit = trainer(callbacks=[monitor, save], enable_checkpointing=True, max_epochs=3)
        fit.fit(model, ckpt_path=ckpt_path)
        return monitor, model.losses

    _, before = start("whole")
    resumed, after = start("resumed", tmp_path / "c" / "step=2.ckpt")  # two of four batches into the first epoch
    assert resumed.history[0]["train_loss"] == pytest.approx(np.mean(before[:2] + after[:2]))


def test_a_reused_callback_takes_up_the_checkpoint_not_its_own_past(root, trainer, regression, tmp_path):
    monitor = KoopmanSpectrumMonitor(dirpath=tmp_path / "k")

    def start(name, lr, epochs, ckpt_path=None):
        save = root.callbacks.ModelCheckpoint(tmp_path / name, filename="last")
        fit = trainer(callbacks=[monitor, save], enable_checkpointing=True, max_epochs=epochs)
        fit.fit(regression(lr=lr), ckpt_path=ckpt_path)

    start("a", 0.05, 4)
    first = monitor.trajectory.snapshots()
    start("b", 0.01, 4)
    start("c", 0.05, 6, tmp_path / "a" / "last.ckpt")
    assert monitor.recorder.epochs == list(range(7))
    assert torch.equal(monitor.trajectory.snapshots()[:5], first)
    assert [row["epoch"] for row in monitor.history] == list(range(1, 7))


def test_monitors_that_share_write_each_snapshot_once(root, trainer, regression, tmp_path):
    pair = [KoopmanSpectrumMonitor(), KoopmanSpectrumMonitor(prefix="other")]
    save = root.callbacks.ModelCheckpoint(tmp_path / "c", save_top_k=-1)
    trainer(callbacks=[*pair, save], enable_checkpointing=True).fit(regression())
    assert len(list(tmp_path.rglob("snapshots-1-0.bin"))) == 1


def test_checkpoints_hold_tensors_and_primitives_only_and_stay_small(run):
    _, checkpoints = run("part", 12)
    checkpoint = torch.load(checkpoints / "epoch=11.ckpt", weights_only=True)
    (state,) = [value for key, value in checkpoint["callbacks"].items() if key.startswith("KoopmanSpectrumMonitor")]
    assert sum(value.numel() for value in state["recorder"].values() if isinstance(value, torch.Tensor)) == 8 * 8 + 16


def test_shared_trajectories_resume_too(root, trainer, regression, tmp_path):
    def start(name, epochs, ckpt_path=None):
        pair = [
            KoopmanSpectrumMonitor(dirpath=tmp_path / name / "a"),
            KoopmanSpectrumMonitor(dirpath=tmp_path / name / "b", prefix="other", radius=0.3),
        ]
        save = root.callbacks.ModelCheckpoint(tmp_path / name, filename="{epoch}")
        trainer(callbacks=[*pair, save], max_epochs=epochs, enable_checkpointing=True).fit(
            regression(), ckpt_path=ckpt_path
        )
        return pair

    whole = start("whole", 12)
    start("part", 6)
    resumed = start("resumed", 12, tmp_path / "part" / "epoch=5.ckpt")
    assert resumed[0].trajectory is resumed[1].trajectory
    for ours, theirs in zip(resumed, whole, strict=True):
        same(ours, theirs)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*")
def test_a_run_that_is_resumed_with_other_callbacks_keeps_what_they_can_use(root, trainer, regression, tmp_path):
    def start(epochs, callbacks, ckpt_path=None):
        save = root.callbacks.ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_top_k=-1)
        fit = trainer(callbacks=[*callbacks, save], enable_checkpointing=True, max_epochs=epochs)
        fit.fit(regression(), ckpt_path=ckpt_path)

    def stop():
        return EarlyStopOnUnitEigenvalues(horizon=6, mode="report", dirpath=tmp_path)

    start(12, [KoopmanSpectrumMonitor(dirpath=tmp_path), stop()])
    alone = stop()
    start(14, [alone], tmp_path / "c" / "epoch=11.ckpt")  # a warning fails the test
    assert alone.recorder.epochs == list(range(8, 15))


def test_snapshots_on_disk_can_be_copied(tmp_path):
    trajectory = Trajectory(3, storage="disk", path=tmp_path)
    for _ in range(4):
        trajectory.append(torch.randn(3))
    for twin in (copy.deepcopy(trajectory), pickle.loads(pickle.dumps(trajectory))):
        twin.append(torch.zeros(3))
        assert torch.equal(twin.snapshots()[:4], trajectory.snapshots())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*")
def test_validating_with_a_checkpoint_leaves_a_later_fit_alone(trainer, regression, tmp_path, run):
    _, checkpoints = run("part", 6)
    monitor = KoopmanSpectrumMonitor(window=8, dirpath=tmp_path / "later")
    fit = trainer(callbacks=monitor, max_epochs=4)
    model = regression()
    fit.validate(model, ckpt_path=str(checkpoints / "epoch=5.ckpt"), verbose=False)
    fit.fit(model)
    assert monitor.recorder.epochs == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("first", ["old", "new"])
def test_a_callback_added_on_resume_leaves_the_shared_trajectory(root, trainer, regression, tmp_path, first):
    def start(epochs, callbacks, ckpt_path=None):
        save = root.callbacks.ModelCheckpoint(tmp_path / "c", filename="last")
        fit = trainer(callbacks=[*callbacks, save], enable_checkpointing=True, max_epochs=epochs)
        fit.fit(regression(), ckpt_path=ckpt_path)

    start(5, [KoopmanSpectrumMonitor(dirpath=tmp_path / "a")])
    old, new = (
        KoopmanSpectrumMonitor(dirpath=tmp_path / "b"),
        KoopmanSpectrumMonitor(dirpath=tmp_path / "b", prefix="new"),
    )
    start(8, [old, new] if first == "old" else [new, old], tmp_path / "c" / "last.ckpt")  # a warning fails the test
    assert old.recorder is new.recorder
    assert old.recorder.epochs == list(range(9))
