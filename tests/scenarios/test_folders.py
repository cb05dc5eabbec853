"""Output folders of runs that start at the same time."""

from __future__ import annotations

import csv
import multiprocessing
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
from problems import ACCELERATOR
from pytorch_lightning.demos.boring_classes import BoringModel

from lightning_koopman import EarlyStopOnUnitEigenvalues, KoopmanPruner, KoopmanSpectrumMonitor
from lightning_koopman.callbacks.run_folder import RunFolder


def train(root: Path, callbacks: list[Any], **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=4,
        callbacks=callbacks,
        accelerator=ACCELERATOR,
        default_root_dir=root,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=3,
        limit_val_batches=0,
        **{"logger": False, **options},
    )
    trainer.fit(BoringModel())
    return trainer


def test_runs_begun_at_once_in_threads_do_not_share_a_folder(tmp_path):
    barrier, monitors = threading.Barrier(4), [KoopmanSpectrumMonitor(storage="disk") for _ in range(4)]

    class Begin(pl.Callback):
        def on_fit_start(self, *_: Any) -> None:  # all have started, none has written
            barrier.wait()

    threads = [threading.Thread(target=train, args=(tmp_path, [each, Begin()])) for each in monitors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paths = {monitor.history_path for monitor in monitors}
    assert len(paths) == 4
    for path in paths:
        assert [row["epoch"] for row in csv.DictReader(path.read_text().splitlines())] == ["1", "2", "3", "4"]


def claim(root: str, at: float, answers: Any) -> None:
    while time.time() < at:
        pass
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer: Any = SimpleNamespace(current_epoch=0, is_global_zero=True, strategy=strategy)
    folder = RunFolder(root)
    folder.claim(trainer, "koopman")
    answers.put(str(folder.path))


def test_runs_begun_at_once_in_processes_do_not_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    answers, at = context.Queue(), time.time() + 0.3
    started = [context.Process(target=claim, args=(str(tmp_path), at, answers)) for _ in range(8)]
    for process in started:
        process.start()
    found = {answers.get(timeout=20) for _ in started}
    for process in started:
        process.join()
    assert len(found) == 8


class Wandb(pl.loggers.logger.Logger):
    """Like W&B's logger: all runs share a folder and differ by name and version."""

    def __init__(self, folder: Path, version: Any) -> None:
        super().__init__()
        self.folder, self._version = folder, version

    name = "project"
    save_dir = property(lambda self: str(self.folder))
    version = property(lambda self: self._version)

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        pass

    def log_hyperparams(self, params: Any) -> None:
        pass


@pytest.mark.parametrize(("version", "own"), [("3f2a", "3f2a"), (7, "version_7")])
def test_a_logger_that_keeps_all_runs_in_one_folder_gives_each_its_own(tmp_path, version, own):
    callbacks = [KoopmanSpectrumMonitor(), EarlyStopOnUnitEigenvalues(), KoopmanPruner(0.5, epoch=2)]
    train(tmp_path, callbacks, logger=Wandb(tmp_path / "logs", version))
    names = ["koopman", "koopman_stop", "koopman_prune"]
    assert [each.run_folder.path for each in callbacks] == [
        tmp_path / "logs" / "project" / own / name for name in names
    ]


def test_mlflow_runs_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the database store needs more packages
    paths = []
    for _ in range(2):
        logger = pl.loggers.MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns", save_dir=str(tmp_path))
        monitor = KoopmanSpectrumMonitor()
        train(tmp_path, [monitor], logger=logger)
        paths.append(monitor.run_folder.path)
        assert logger.run_id in paths[-1].parts
    assert paths[0] != paths[1]


def test_a_folder_with_files_of_somebody_else_is_left_as_it_is(tmp_path):
    (tmp_path / "koopman").mkdir()
    (tmp_path / "koopman" / "README").write_text("mine")
    monitor = KoopmanSpectrumMonitor()
    train(tmp_path, [monitor])
    assert monitor.run_folder.path == tmp_path / "koopman-v1"
    assert np.array_equal(sorted(each.name for each in (tmp_path / "koopman").iterdir()), ["README"])
