"""Record the snapshots of a callback, in a recorder that callbacks may share."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from lightning_koopman.callbacks.clock import Clock
from lightning_koopman.callbacks.guard import Guard
from lightning_koopman.callbacks.observables import TRAIN_LOSS, LossMeter, Metric, Weights, outermost
from lightning_koopman.callbacks.reader import Reader
from lightning_koopman.callbacks.run_folder import RunFolder, checkpoints, near
from lightning_koopman.reading.reading import TrainingReading
from lightning_koopman.stopping.evidence import Baseline
from lightning_koopman.trajectory.recorder import WEIGHTS, Recorder, Snapshot, SnapshotSettings


class Recording:
    """Recording of one callback: reads its observable on request and passes it to the recorder.

    With ``any_window``, a trajectory longer than the requested window may be used.
    """

    def __init__(self, settings: SnapshotSettings, clock: Clock, guard: Guard, *, any_window: bool) -> None:
        self.settings, self.any_window = settings, any_window
        self._clock, self._guard = clock, guard
        self.weights = Weights(settings.parameters)
        self.metric = Metric("" if settings.observable == WEIGHTS else settings.observable)
        self.loss = LossMeter()
        self.own = Reader(Recorder(settings))
        self.reader = self.own  # or another callback's, if it records what this one needs
        self.train_loss: float | None = None  # mean over the interval
        self.finite = True  # whether the newest observation was finite
        self.seconds = 0.0  # spent on the last snapshot
        self.alone = True  # no other callback shares the recorder

    @property
    def recorder(self) -> Recorder:
        """The recorder in use: its own or a shared one."""
        return self.reader.recorder

    @property
    def of_weights(self) -> bool:
        """Whether the weights are observed."""
        return self.settings.observable == WEIGHTS

    # -- before training ----------------------------------------------------------------------------------------------

    def share(self, others: Iterable[Recording]) -> None:
        """Share the trajectory of the first callback that records the same, or the longest sufficient one."""
        self.own.told.clear()
        found = list(others)
        alike = [other for other in found if other.settings == self.settings]
        if self.any_window:
            alike += [other for other in found if other.settings.covers(self.settings)]
        self.reader = max(alike, key=lambda other: other.settings.length).own

    def check_weights(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: RunFolder, advice: tuple[str, str]
    ) -> None:
        """Select the weights; raise ValueError in all processes if none match, or snapshots fit in no memory or disk.

        ``advice`` is what the user can do if memory, or the disk, is too small.
        """
        root = outermost(trainer, pl_module)
        with self.weights.processes.together():
            chosen = self.weights.select(root)
            halves = [name for name, parameter in chosen.items() if parameter.dtype.itemsize < 4]
            if halves:
                self._warn(
                    "half",
                    f"{len(halves)} observed parameters such as {halves[0]!r} are stored in {chosen[halves[0]].dtype}, "
                    "which rounds small updates to zero and causes spurious eigenvalues at 1: train with "
                    "precision='bf16-mixed' or 32.",
                )
            self._check_room(trainer, self.weights.read(root).numel, folder, advice)

    def _warn(self, topic: str, message: str) -> None:
        """Warn of what concerns the trajectory, once for all callbacks that share it."""
        told = self.reader.told
        if topic not in told:
            told.add(topic)
            self._guard.warn(topic, message)

    def _check_room(self, trainer: pl.Trainer, numel: int, folder: RunFolder, advice: tuple[str, str]) -> None:
        rows, settings = self.settings.window, self.settings
        if settings.storage == "sketch":
            return
        if rows is None and not self._clock.by_steps and trainer.max_epochs is not None and trainer.max_epochs > 0:
            rows = trainer.max_epochs // settings.every_n_epochs + 1
        each = numel * (4 if settings.dtype == "float32" else 2)
        # increments plus the oldest and newest snapshot; the processes of a machine share its memory and disk
        needed = (each * rows + 8 * numel if rows else 0) * trainer.num_devices
        in_memory = settings.storage == "ram"
        free = folder.is_too_small(needed, in_memory=in_memory)
        if free is not None:
            raise ValueError(
                f"window={settings.window} keeps {rows} snapshots of {each * trainer.num_devices / 2**30:.2f} GiB on "
                f"this machine, {needed / 2**30:.1f} GiB in all, but {free / 2**30:.1f} GiB of "
                f"{'memory' if in_memory else 'disk'} are free: {advice[0 if in_memory else 1]}."
            )

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def begin_round(self, trainer: pl.Trainer) -> None:
        """Start an interval."""
        self.metric.begin(trainer)
        self.loss.start()  # discard a sum restored from a checkpoint after an epoch's last batch

    def end_round(self, trainer: pl.Trainer) -> None:
        """End an interval; call on all ranks."""
        taken = 0.0, 0
        with self._guard("averaging the training loss"):
            taken = self.loss.take()
        self.train_loss = self.loss.mean(trainer, taken)
        self.release(trainer)

    def read(self, epoch: int, baseline: Baseline | None) -> TrainingReading:
        """Return the reading after ``epoch`` intervals, the same for all callbacks that share the recorder."""
        return self.reader.read(epoch, self.train_loss, baseline, finite=self.finite)

    def release(self, trainer: pl.Trainer) -> None:
        """Delete the snapshots that no checkpoint needs."""
        if self.own.recorder.has_saved:  # searching for checkpoints after every step would cost more than the step
            with self._guard("deleting snapshots that no checkpoint needs"):
                self.own.recorder.release(checkpoints(trainer))

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, resumed: bool) -> None:
        """Record the initial weights, unless the trajectory continues from the newest snapshot."""
        if not self.of_weights or self._clock.within(trainer):
            return
        with self._guard.together("recording the initial weights", self.weights.processes):
            snapshot = self._read(trainer, pl_module, self._clock.rounds)
            recorder = self.recorder
            # different weights are a further fit's, unless a resumed epoch has already begun
            newest = -1 if recorder.newest is None else recorder.newest
            again = newest > self._clock.rounds  # an exception ended an interval whose end was already recorded
            held = newest == self._clock.rounds
            if not resumed and (again or (held and not recorder.repeats(snapshot))):
                recorder.interrupt()
            self._take(snapshot, self._clock.rounds)

    def take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> bool:
        """Record the observable after ``epoch`` intervals; return whether the recorder holds its snapshot."""
        started = time.perf_counter()
        if self.of_weights:
            with self._guard.together("recording a snapshot", self.weights.processes):
                self._take(self._read(trainer, pl_module, epoch), epoch)
        elif self._guard.zero:
            with self._guard("recording a snapshot"):
                value = self.value(trainer)
                if value is not None:
                    self._take(Snapshot.of_number(value), epoch)
        self.seconds = time.perf_counter() - started
        return self.recorder.holds(epoch)

    def start_segment(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, due: bool) -> None:
        """Start a new trajectory from the current weights, which were set instead of trained."""
        epoch = self._clock.rounds
        self.recorder.interrupt()
        if due and self.of_weights:
            with self._guard.together("recording the weights after they were set", self.weights.processes):
                self._take(self._read(trainer, pl_module, epoch), epoch)

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> Snapshot:
        before = self.weights.names
        shards = self.weights.read(outermost(trainer, pl_module))
        if before and self.weights.names != before:
            new, gone = (
                [name for name in names if name not in set(others)]
                for names, others in ((self.weights.names, before), (before, self.weights.names))
            )
            told = [f"{names[0]!r} is {what}" for names, what in ((new, "new"), (gone, "gone")) if names]
            self._warn(
                f"weights {epoch}",
                f"the trained parameters changed after {self._clock.when(epoch)} "
                f"({len(new)} more, {len(gone)} fewer: {', '.join(told)}): a new trajectory starts.",
            )
            self.recorder.interrupt()
        return Snapshot.of(shards)

    def _take(self, snapshot: Snapshot, epoch: int) -> None:
        self.finite = True
        self.finite = self.recorder.record(epoch, snapshot)
        if not self.finite:
            self._warn(
                "finite",
                f"the observable {self.settings.observable!r} holds NaN or infinite values after "
                f"{self._clock.when(epoch)}: it is not recorded, and a new trajectory starts once it is finite again.",
            )

    def value(self, trainer: pl.Trainer) -> float | None:
        """Return the interval's value of the observed loss or metric, or None."""
        name = self.metric.name
        if name == TRAIN_LOSS and self.train_loss is not None:
            return self.train_loss
        value = self.metric.take(trainer)
        if value is None and self.metric.is_missing(trainer):
            ours = {str(getattr(each, "prefix", "")) for each in trainer.callbacks}  # type: ignore[attr-defined]
            names = sorted(key for key in trainer.callback_metrics if key.partition("/")[0] not in ours)
            self._guard.warn(
                "metric",
                f"observable={name!r} was not logged by the end of epoch {trainer.current_epoch + 1}, so nothing is "
                f"recorded; logged so far: {', '.join(names) or 'none'}. "
                + (
                    f"Return the loss from `training_step`, or log it with `self.log({name!r}, ...)` there."
                    if name == TRAIN_LOSS
                    else f"Log it with `self.log({name!r}, ...)` in a training or validation step "
                    "(what `LightningModule.on_train_epoch_end` logs comes too late)."
                ),
            )
        return value

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without the snapshots."""
        self.loss.fold()
        return {
            "loss": [self.loss.total, self.loss.count],
            "reader": self.reader.state_dict(),
            **self.metric.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.metric.load_state_dict(state)
        self.reader.load_state_dict(state["reader"])
        total, count = state["loss"]
        if self._guard.zero:  # only the first process's sum was saved
            self.loss.start(float(total), int(count))

    def restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule, saved: dict[str, Any] | None) -> None:
        """Restore the snapshots that a checkpoint refers to, or start a new trajectory if they are lost.

        ``saved`` is the recorder's state: empty if it held nothing, None if it could not be saved.
        """
        if self.recorder.restored or not (self.of_weights or self._guard.zero):
            return  # done by a callback that shares the recorder, or not for this process
        self.recorder.clear()
        self.recorder.restored = True
        if saved is None:
            self._warn("unsaved", "the checkpoint's snapshots could not be saved with it: a new trajectory starts.")
        if not saved:
            return
        with self._guard.together("restoring the snapshots", self.weights.processes):
            try:
                shards = self.weights.read(outermost(trainer, pl_module)) if self.of_weights else None
                folder = Path(str(saved["path"])).parent
                lost = self.recorder.load(saved, near(folder, trainer.ckpt_path), shards)
            except Exception:
                self.recorder.clear()
                raise
            if lost:
                self._guard.warn(
                    "sidecar",
                    f"the files in {folder} no longer hold the checkpoint's {lost} snapshots: a new trajectory starts.",
                )
