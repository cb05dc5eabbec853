"""The recorded trajectory of one training, shared by the callbacks that ask for the same snapshots."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.trajectory import Trajectory

SIDECAR = "snapshots.bin"
STORE = "trajectory.bin"  # apart from the sidecar, which must not change between two checkpoints


@dataclass(frozen=True)
class SnapshotSettings:
    """What is recorded and how much of it is kept; callbacks with equal settings share one recorder."""

    observable: str
    parameters: tuple[str, ...] | None
    every_n_epochs: int
    window: int | None
    storage: str

    @property
    def length(self) -> float:
        """Number of snapshots kept."""
        return math.inf if self.window is None else self.window

    def covers(self, other: SnapshotSettings) -> bool:
        """Whether the same is recorded at the same epochs, and at least as much of it is kept."""
        return replace(self, window=other.window, storage=other.storage) == other and self.length >= other.length


class Recorder:
    """Appends each epoch's values to a trajectory once, and starts a new trajectory where the old one cannot go on."""

    def __init__(self, settings: SnapshotSettings) -> None:
        self.settings = settings
        self.trajectory: Trajectory | None = None
        self.folder: Path | None = None  # for snapshots on disk and beside checkpoints
        self.restored = False  # from the checkpoint of this fit
        self.epochs: list[int] = []
        self.interrupted = False

    def __len__(self) -> int:
        return len(self.epochs)

    def prepare(self, folder: Path | None) -> None:
        """Get ready for a fit that writes into the folder."""
        self.folder, self.restored = folder, False

    def clear(self) -> None:
        """Forget everything recorded."""
        self.trajectory, self.epochs, self.interrupted = None, [], False

    def record(self, epoch: int, values: Tensor) -> None:
        """Record the values (n,) after ``epoch`` completed epochs, unless that epoch was recorded already."""
        if self.epochs and epoch == self.epochs[-1] and not self.interrupted:
            return
        if self.trajectory is None or self.interrupted or values.numel() != self.trajectory.n:
            self.trajectory = Trajectory(
                values.numel(), capacity=self.settings.window, dtype=values.dtype, **self._storage()
            )
            self.epochs, self.interrupted = [], False
        self.trajectory.append(values)
        self.epochs = [*self.epochs, epoch][-len(self.trajectory) :]

    def last(self) -> Tensor:
        """The newest snapshot (n,)."""
        if self.trajectory is None:
            raise IndexError("nothing has been recorded.")
        return self.trajectory.last()

    def interrupt(self) -> None:
        """Let the next snapshot start a new trajectory: what follows does not continue what was recorded."""
        self.interrupted = True

    def _storage(self) -> dict[str, Any]:
        storage = self.settings.storage
        path = self.folder / STORE if storage == "disk" and self.folder is not None else None
        return {"storage": storage, "path": path}

    def save(self) -> dict[str, Any]:
        """State for a checkpoint; the snapshots go to the sidecar file in the folder."""
        if self.trajectory is None or self.folder is None:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        sidecar = self.folder / SIDECAR
        return {
            "trajectory": self.trajectory.save(sidecar),
            "epochs": torch.tensor(self.epochs, dtype=torch.int64),
            "interrupted": self.interrupted,
            "sidecar": os.fspath(sidecar),
        }

    def load(self, state: dict[str, Any], sidecar: Path) -> int:
        """Restore what :meth:`save` wrote; returns how many snapshots could not be restored."""
        self.trajectory = Trajectory.load(state["trajectory"], sidecar, **self._storage())
        epochs = state["epochs"].tolist()
        self.epochs = epochs[len(epochs) - len(self.trajectory) :]
        self.interrupted = bool(state["interrupted"])
        if not self.epochs:
            self.clear()
        return len(epochs) - len(self.epochs)
