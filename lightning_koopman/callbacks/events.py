"""What happens in a run, from the view of a Koopman callback."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from lightning_koopman.callbacks.clock import Clock, Rows
from lightning_koopman.callbacks.guard import Guard
from lightning_koopman.callbacks.recording import Recording
from lightning_koopman.callbacks.roots import LightningCallback
from lightning_koopman.callbacks.run_folder import RunFolder


class Events(LightningCallback):
    """What a Koopman callback holds, what it says about itself, and the events it can act on.

    Each event runs under the guard, which turns a failure into one warning. An interval is an epoch or a number of
    steps.
    """

    clock: Clock
    guard: Guard
    recording: Recording  # its observable, and the recorder of the snapshots
    run_folder: RunFolder
    history: Rows  # its table
    pending: dict[str, Any] | None  # state of a checkpoint, until training starts

    folder = "koopman"  # name of the folder it writes to
    columns: tuple[str, ...] = ()  # of the history; if empty, no history is kept
    chosen = False  # whether the user chooses observable, window and storage: then only an equal trajectory is shared
    advice = "free some memory", "free some disk space"  # what to do if memory, or the disk, is too small

    @property
    def finished(self) -> bool:
        """Whether no more snapshots are needed."""
        return False

    def forget(self) -> None:
        """Reset to the state before a first fit."""

    def own_state(self) -> dict[str, Any]:
        """Return the subclass's state for checkpoints: tensors and primitives only."""
        return {}

    def restore_own(self, state: dict[str, Any]) -> None:
        """Restore the state returned by :meth:`own_state`."""

    def fit_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training starts, after the first snapshot."""

    def round_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the first batch of an interval."""

    def batch_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each batch."""

    def batch_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Called after each batch, before the interval ends."""

    def snapshot_taken(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        """Called after each interval with a snapshot due. Each rank holds its part of the trajectory."""

    def round_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        """Called after each interval; ``epoch`` is the number of completed intervals."""

    def weights_replaced(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when weights were set rather than trained, before they are recorded."""

    def segment_begins(self) -> None:
        """Called when a new trajectory starts, from weights that were set."""

    def fit_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends."""
