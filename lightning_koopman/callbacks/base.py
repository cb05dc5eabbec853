"""Base class of the Koopman callbacks, which maps Lightning's hooks to intervals and snapshots."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl

from lightning_koopman.callbacks.clock import Clock, Rows
from lightning_koopman.callbacks.events import Events
from lightning_koopman.callbacks.guard import Guard
from lightning_koopman.callbacks.lr_schedule import current_rates
from lightning_koopman.callbacks.observables import TRAIN_LOSS
from lightning_koopman.callbacks.recording import Recording
from lightning_koopman.callbacks.run_folder import HISTORY, RunFolder, checked_prefix
from lightning_koopman.callbacks.scalars import log_scalars
from lightning_koopman.callbacks.state import resume, saved_state
from lightning_koopman.trajectory.recorder import Recorder, SnapshotSettings

T = TypeVar("T")


class TrajectoryCallback(Events):
    """Base of the Koopman callbacks: records the trajectory of an observable. Its failures never stop training.

    An interval is an epoch, or ``every_n_steps`` optimizer steps; in names it is called a round. Subclasses override
    the :class:`Events`.
    """

    def __init__(
        self, settings: SnapshotSettings, *, dirpath: str | os.PathLike[str] | None, prefix: str = "koopman"
    ) -> None:
        super().__init__()
        self.settings = settings
        self.clock = Clock(settings.every_n_steps)
        self.guard = Guard(type(self).__name__)
        self.recording = Recording(settings, self.clock, self.guard, any_window=not self.chosen)
        self.run_folder = RunFolder(dirpath)
        self.prefix = checked_prefix(prefix)
        self.history = Rows(every_n_steps=self.clock.every_n_steps)
        self.rates: list[float] = []  # learning rates at the start of the interval
        self.active = True  # False in a `fast_dev_run`
        self.resumed = False  # whether a checkpoint restored this callback's state
        self.fresh = True  # whether this fit continues neither a checkpoint nor an earlier fit
        self.pending = None

    @property
    def recorder(self) -> Recorder:
        """Recorder of the snapshots, which compatible callbacks share."""
        return self.recording.recorder

    @property
    def history_path(self) -> Path | None:
        """Path of the table that holds :attr:`history`, or None before training starts."""
        return None if self.run_folder.path is None else self.run_folder.path / HISTORY

    # -- Lightning's hooks: they raise errors only before training starts ---------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.pending, self.fresh, self.rates = None, True, []
        if stage != "fit":
            return
        check_prefix_is_free(self, trainer)
        self.active = not trainer.fast_dev_run  # type: ignore[attr-defined]
        self.guard.reset(zero=trainer.is_global_zero)
        recording = self.recording
        recording.metric.start_fit()
        recording.share(other.recording for other in koopman_callbacks(trainer))
        if self.active:
            if recording.of_weights:
                recording.weights.connect(trainer, f", or observable={TRAIN_LOSS!r}" if self.chosen else "")
            self.run_folder.claim(trainer, self.folder)
            recording.own.recorder.prepare(self.run_folder.path)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not earlier: layers may be built in the module's `setup` or `configure_model`, which run after ours
        if self.active and self.recording.of_weights:
            self.recording.check_weights(trainer, pl_module, self.run_folder, self.advice)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.active:
            return
        sharing = [each for each in koopman_callbacks(trainer) if each.recorder is self.recorder]
        self.recording.alone = len(sharing) == 1
        self.recording.loss.start()
        self.resumed = resume(self, trainer, pl_module, sharing)
        saved = self.clock.rounds
        self.clock.start(trainer)
        self.fresh = not self.resumed and (trainer.current_epoch == 0 or trainer.ckpt_path is not None)
        if self.fresh:
            with self.guard("discarding an earlier fit"):
                self.forget()
            if not self.recorder.restored:
                self.recorder.interrupt()  # the recorder may hold the end of an earlier fit
        if self.guard.zero:
            self.write_history(rewrite=True)
        # Lightning skips the end of an epoch if the checkpoint was written after its last batch
        lacks_end = self.resumed and not self.clock.by_steps and saved < self.clock.rounds
        if self.is_due(self.clock.rounds) and not lacks_end:
            self.recording.start(trainer, pl_module, resumed=self.resumed)
        with self.guard("preparing for training"):
            self.fit_begins(trainer, pl_module)
        if lacks_end:
            self._end_round(trainer, pl_module, self.clock.rounds)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.active and not self.clock.by_steps:
            self._begin_round(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.active:
            return
        if self.clock.begins():
            self._begin_round(trainer, pl_module)
        with self.guard("processing a batch before its step"):
            self.batch_begins(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.active:
            return
        with self.guard("averaging the training loss"):
            self.recording.loss.add(outputs)
        with self.guard("processing a batch after its step"):
            self.batch_ends(trainer, pl_module, batch, batch_idx)
        if self.clock.ends(trainer):
            self._end_round(trainer, pl_module, self.clock.completed(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.active and not trainer.sanity_checking:
            with self.guard("reading the observed metric"):
                self.recording.metric.validated(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.active and not self.clock.by_steps:
            self._end_round(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.active:
            with self.guard("finishing the analysis"):
                self.fit_ends(trainer, pl_module)
            self.recording.release(trainer)

    def state_dict(self) -> dict[str, Any]:
        return saved_state(self) if self.pending is None else self.pending

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pending = state_dict

    def _begin_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with self.guard("starting an interval"):
            self.rates = current_rates(trainer)
            self.recording.begin_round(trainer)
        with self.guard("working at the start of an interval"):
            self.round_begins(trainer, pl_module)

    def _end_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        self.clock.rounds = epoch
        self.recording.end_round(trainer)
        with self.guard("reading the learning rates"):
            self.rates = self.rates or current_rates(trainer)  # unset in a resumed epoch, which has no start
        if self.is_due(epoch):
            recorded = self.recording.take(trainer, pl_module, epoch)
            with self.guard("processing a snapshot"):
                self.snapshot_taken(trainer, pl_module, epoch, recorded)
        with self.guard("working at the end of an interval"):
            self.round_ends(trainer, pl_module, epoch)

    # -- what subclasses use ------------------------------------------------------------------------------------------

    def on_zero(self, trainer: pl.Trainer, doing: str, work: Callable[[], T]) -> T | None:
        """Return the result of ``work`` on the first process to all processes, or None if it failed."""
        found: T | None = None
        if self.guard.zero:
            with self.guard(doing):
                found = work()
        return trainer.strategy.broadcast(found)

    def log_values(self, trainer: pl.Trainer, pl_module: pl.LightningModule, scalars: Mapping[str, float]) -> None:
        """Log scalars that are equal on all ranks, for loggers and other callbacks."""
        with self.guard("logging"):
            log_scalars(trainer, pl_module, self.prefix, scalars, by_steps=self.clock.by_steps)

    def write_history(self, *, rewrite: bool = False) -> None:
        """Append the last row to the table, or rewrite the whole table."""
        with self.guard("writing the history"):
            self.run_folder.write_table(self.columns, self.history if rewrite else self.history[-1:], rewrite=rewrite)

    def forget(self) -> None:
        self.history = Rows(every_n_steps=self.clock.every_n_steps)

    def is_due(self, epoch: int) -> bool:
        """Return whether to take a snapshot after ``epoch`` completed intervals."""
        return epoch % self.settings.every_n_epochs == 0 and not (self.finished and self.recording.alone)


def koopman_callbacks(trainer: pl.Trainer) -> list[TrajectoryCallback]:
    """Return all Koopman callbacks of a run."""
    return [each for each in trainer.callbacks if isinstance(each, TrajectoryCallback)]  # type: ignore[attr-defined]


def start_segments(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Start a new trajectory from the current weights in every Koopman callback."""
    active = [each for each in koopman_callbacks(trainer) if each.active]
    for callback in active:
        with callback.guard("adapting to replaced weights"):
            callback.weights_replaced(trainer, pl_module)
    for callback in active:
        with callback.guard("starting a new trajectory"):
            callback.rates = current_rates(trainer)
            callback.segment_begins()
        due = callback.is_due(callback.clock.rounds)
        callback.recording.start_segment(trainer, pl_module, due=due)


def check_prefix_is_free(callback: TrajectoryCallback, trainer: pl.Trainer) -> None:
    """Raise ValueError if another callback of the same type uses the same prefix."""
    for other in koopman_callbacks(trainer):
        if other is not callback and isinstance(other, type(callback)) and other.prefix == callback.prefix:
            raise ValueError(
                f"prefix={callback.prefix!r} is used by two callbacks of type {type(callback).__name__}, whose scalars "
                "would overwrite each other: give one of them another `prefix`."
            )
