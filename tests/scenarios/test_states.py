"""Damaged or foreign checkpoints, or those of another version: one warning and an immediate fresh start."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import ACCELERATOR, koopman_warnings
from pytorch_lightning.demos.boring_classes import BoringModel

from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    KoopmanWeightAveraging,
    ReduceLROnNoiseFloor,
    RestartOnBadInitialization,
)

CALLBACKS: dict[str, Callable[..., Any]] = {
    "monitor": lambda folder: KoopmanSpectrumMonitor(window=6, dirpath=folder),
    "disk": lambda folder: KoopmanSpectrumMonitor(storage="disk", dirpath=folder),
    "stop": lambda folder: EarlyStopOnUnitEigenvalues(horizon=6, dirpath=folder),
    "restart": lambda folder: RestartOnBadInitialization(9, dirpath=folder),
    "average": lambda folder: KoopmanWeightAveraging(window=6, dirpath=folder),
    "reduce": lambda folder: ReduceLROnNoiseFloor(dirpath=folder),
    "prune": lambda folder: KoopmanPruner(0.5, epoch=3, window=6, dirpath=folder),
}


def fit(folder: Path, epochs: int, make: Callable[..., Any], ckpt_path: Path | None = None) -> pl.Trainer:
    save = pl.callbacks.ModelCheckpoint(folder / "c", save_last=True)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[make(folder), save],
        accelerator=ACCELERATOR,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=3,
        limit_val_batches=0,
    )
    trainer.fit(BoringModel(), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module", params=CALLBACKS)
def saved(request, tmp_path_factory):
    """A checkpoint of each callback and the folder of its run."""
    folder = tmp_path_factory.mktemp("run")
    fit(folder, 5, CALLBACKS[request.param])
    return CALLBACKS[request.param], folder / "c" / "last.ckpt", folder


def resume(make: Callable[..., Any], checkpoint: Any, folder: Path) -> list[str]:
    """Resume from a checkpoint and return our warnings."""
    path = folder / "changed.ckpt"
    torch.save(checkpoint, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        started = time.perf_counter()
        trainer = fit(folder / "again", 7, make, path)
        assert time.perf_counter() - started < 5
    assert trainer.current_epoch == 7
    return koopman_warnings(caught)


def ours(checkpoint: Any) -> dict[str, Any]:
    names = "Koopman", "Early", "Reduce", "Restart"
    (state,) = (state for name, state in checkpoint["callbacks"].items() if name.startswith(names))
    return state


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "older": lambda state: state.pop("version"),
    "newer": lambda state: state.update(version=99),
    "no history": lambda state: state.pop("history"),
    "odd history": lambda state: state["history"].update(epoch=[1, 2, 3, 4, 5, 6, 7, 8]),
    "no own part": lambda state: state.pop("own"),
    "own part of another kind": lambda state: state.update(own=torch.zeros(3)),
    "loss of another kind": lambda state: state.update(loss="none"),
    "rounds of another kind": lambda state: state.update(rounds="many"),
    "snapshots of another kind": lambda state: state.update(recorder=[1, 2]),
    "no Gram matrix": lambda state: state["recorder"].pop("gram", None),
    "10**8 processes": lambda state: state["recorder"].update(processes=10**8),
    "10**6 fingerprints": lambda state: state["recorder"].update(marks=torch.zeros(10**6, dtype=torch.int64)),
    "10**6 epochs": lambda state: state["recorder"].update(
        marks=torch.zeros(10**6, dtype=torch.int64), epochs=torch.zeros(10**6, dtype=torch.int64)
    ),
    "a Gram matrix of 8 TB": lambda state: state["recorder"].update(gram=torch.zeros(1, 1).expand(10**6, 10**6)),
    "other weights": lambda state: state["recorder"].update(total=10**12, n=10**12),
    "a start far away": lambda state: state["recorder"].update(first=10**12),
    "a file far away": lambda state: state["recorder"].update(path="/dev/zero", starts=[0], start=0),
    "a start before all": lambda state: state["recorder"].update(start=-(10**9)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_state_costs_one_warning_and_no_time(saved, change, tmp_path):
    make, path, _ = saved
    checkpoint = torch.load(path, weights_only=True)
    state = ours(checkpoint)
    if not state["recorder"]:  # a pruner that has finished
        state["recorder"] = {"path": "nowhere"}
    CHANGES[change](state)
    told = resume(make, checkpoint, tmp_path)
    about = [each for each in told if "checkpoint" in each or "restoring" in each or "no longer hold" in each]
    assert len(about) == 1, told


@pytest.mark.parametrize("damage", ["gone", "empty", "short", "flipped", "pipe", "folder"])
def test_damaged_files_cost_one_warning_and_no_time(damage, tmp_path):
    make = CALLBACKS["monitor"]
    fit(tmp_path, 5, make)
    (file,) = (tmp_path / "koopman").glob("snapshots-*.bin")
    data = bytearray(file.read_bytes())
    data[-1] ^= 64  # of the exponent: a change below the weight's rounding leaves the snapshot as it was
    file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    elif damage == "folder":
        file.mkdir()
    elif damage != "gone":
        file.write_bytes({"empty": b"", "short": data[:-1], "flipped": data}[damage])
    told = resume(make, torch.load(tmp_path / "c" / "last.ckpt", weights_only=True), tmp_path)
    assert len(told) == 1
    assert "no longer hold the checkpoint's 6 snapshots" in told[0]


def test_no_other_file_is_needed(tmp_path):
    """Training continues if the files in the folder are emptied meanwhile, for example by a clean-up."""

    class Clean(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for file in (tmp_path / "koopman").iterdir() if trainer.current_epoch == 3 else ():
                os.truncate(file, 0)

    monitor = KoopmanSpectrumMonitor(storage="disk", dirpath=tmp_path)
    trainer = pl.Trainer(
        max_epochs=6, callbacks=[monitor, Clean()], accelerator=ACCELERATOR, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_train_batches=3, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert monitor.recorder.epochs == list(range(7))
