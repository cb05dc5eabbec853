"""The recorded trajectory of one training, shared by the callbacks that ask for the same snapshots."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_koopman._checks import check_choice, check_count
from lightning_koopman.parameters.process_group import Processes
from lightning_koopman.parameters.shards import Shards
from lightning_koopman.trajectory.increments import shortened
from lightning_koopman.trajectory.rows import BITS, sum_of_bits
from lightning_koopman.trajectory.sidecar import (
    Retention,
    SegmentReader,
    SegmentWriter,
    ShardReader,
    process_path,
)
from lightning_koopman.trajectory.sketch import SKETCH, check_sketch
from lightning_koopman.trajectory.trajectory import STORAGES, Trajectory

SIDECAR = "snapshots"
WEIGHTS = "weights"


@dataclass(frozen=True)
class SnapshotSettings:
    """What is recorded and how much of it is kept; callbacks with equal settings share one recorder.

    Attributes:
        observable: ``"weights"``, or the name of a loss or metric.
        parameters: Name patterns of the weights, or None.
        every_n_epochs: Epochs between two snapshots, ≥ 1; or
        every_n_steps: optimizer steps, ≥ 1.
        window: Snapshots kept, ≥ 3, or None for all.
        storage: ``"ram"``, ``"disk"`` or ``"sketch"``.
        dtype: ``"float32"`` or ``"bfloat16"``.
        sketch: Elements of a sketch, ≥ 2.

    Raises:
        ValueError: If one is out of its range, or two do not go together.
    """

    observable: str
    parameters: tuple[str, ...] | None
    every_n_epochs: int
    every_n_steps: int | None
    window: int | None
    storage: str = "ram"
    dtype: str = "float32"
    sketch: int = SKETCH

    def __post_init__(self) -> None:
        observable = self.observable
        if not isinstance(observable, str) or not observable:
            raise ValueError(
                f"observable must be 'weights', 'train_loss' or the name of a logged metric, got {observable!r}."
            )
        if self.parameters is not None and observable != WEIGHTS:
            raise ValueError(f"parameters={self.parameters!r} is for observable='weights', got {observable!r}: leave "
                             "it out.")  # fmt: skip
        checked = {
            "every_n_epochs": check_count("every_n_epochs", self.every_n_epochs, 1),
            "every_n_steps": None
            if self.every_n_steps is None
            else check_count("every_n_steps", self.every_n_steps, 1),
            "window": None
            if self.window is None
            else check_count("window", self.window, 3, "pass None to keep all snapshots"),
            "sketch": check_sketch(self.sketch),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.every_n_steps is not None and self.every_n_epochs != 1:
            given = f"every_n_epochs={self.every_n_epochs} and every_n_steps={self.every_n_steps}"
            raise ValueError(f"{given} exclude each other: give one.")
        check_choice("storage", self.storage, STORAGES)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.dtype != "float32" and (self.storage == "sketch" or observable != WEIGHTS):
            raise ValueError(f"dtype={self.dtype!r} is for stored weights, got storage={self.storage!r}, "
                             f"{observable=}: leave it out.")  # fmt: skip
        if self.storage == "sketch" and observable != WEIGHTS:
            raise ValueError(f"storage='sketch' is for observable='weights', got {observable!r}: leave it out.")

    @property
    def length(self) -> float:
        """Number of snapshots kept."""
        return math.inf if self.window is None else self.window

    def covers(self, other: SnapshotSettings) -> bool:
        """Whether the same is recorded at the same times as exactly, and at least as much of it is kept."""
        alike = replace(self, window=other.window, storage=other.storage) == other
        return alike and self.storage != "sketch" and self.length >= other.length


@dataclass(frozen=True)
class Snapshot:
    """What a process records of one snapshot.

    Attributes:
        parts: The elements, flat tensors.
        offsets: Where in the whole snapshot each of them begins.
        processes: All processes that record parts of it.
        shards: The parameters that they belong to, if any.
    """

    parts: Sequence[Tensor]
    offsets: Sequence[int] = (0,)
    processes: Processes = field(default_factory=Processes)
    shards: Shards | None = None

    @classmethod
    def of(cls, shards: Shards) -> Snapshot:
        """The own parts of some parameters."""
        runs = list(shards.runs())
        return cls([values for _, values in runs], [offset for offset, _ in runs], shards.processes, shards)

    @classmethod
    def of_number(cls, value: float) -> Snapshot:
        """A single number, in full precision."""
        return cls([torch.tensor([value], dtype=torch.float64)])

    @property
    def numel(self) -> int:
        """Elements of this process's parts."""
        return sum(part.numel() for part in self.parts)

    def fingerprint(self) -> int:
        """Sum of the bits: tells whether the same is recorded again."""
        single = (part.float() if part.dtype not in BITS else part for part in self.parts)
        return sum(sum_of_bits(part.contiguous()) for part in single) % 2**64


class Recorder:
    """Appends snapshots to a trajectory once, and starts a new trajectory where the old one cannot go on.

    All processes call each method at the same times.
    """

    def __init__(self, settings: SnapshotSettings) -> None:
        self.settings = settings
        self.trajectory: Trajectory | None = None
        self.folder: Path | None = None  # for snapshots on disk and beside checkpoints
        self.restored = False  # from the checkpoint of this fit
        self.epochs: list[int] = []
        self.interrupted = False
        self.processes = Processes()
        self._shards: Shards | None = None
        self._fingerprint: int | None = None  # of the newest snapshot
        self._writer: SegmentWriter | None = None
        self._written: list[Path] = []  # files of earlier segments in the folder
        self._segments = self._saves = self._word = 0
        self._retention = Retention()

    def __len__(self) -> int:
        return len(self.epochs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": None}

    def prepare(self, folder: Path | None) -> None:
        """Get ready for a fit that writes into the folder."""
        self.restored = False
        if folder != self.folder:
            self._writer, self._written, self._segments, self._retention = None, [], 0, Retention()
        self.folder = folder

    def clear(self) -> None:
        """Forget everything recorded."""
        self.trajectory, self.epochs, self.interrupted = None, [], False
        self._end_segment()

    @property
    def newest(self) -> int | None:
        """Completed epochs at the newest snapshot, if the trajectory goes on from it."""
        return self.epochs[-1] if self.epochs and not self.interrupted else None

    def holds(self, epoch: int) -> bool:
        """Whether the snapshot after so many epochs is the newest one recorded."""
        return epoch == self.newest

    def repeats(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot equals the newest one, or that came from a checkpoint, in all processes."""
        return not snapshot.processes.any(self._fingerprint not in (None, snapshot.fingerprint()))

    def record(self, epoch: int, snapshot: Snapshot) -> bool:
        """Take in the snapshot after ``epoch`` completed epochs, unless it is held already.

        Args:
            epoch: Completed epochs.
            snapshot: What this process records of it.

        Returns:
            Whether its numbers are finite, in all processes.

        Raises:
            Exception: What went wrong here or, as :class:`OtherProcessError`, elsewhere; a new trajectory follows.
        """
        if self.holds(epoch):
            return True
        try:
            with snapshot.processes.together():
                finite = self._append(snapshot)
        except Exception:
            self.interrupt()
            raise
        if finite and self.trajectory is not None:
            self.epochs = [*self.epochs, epoch][-len(self.trajectory) :]
        else:
            self.interrupt()
        return finite

    def interrupt(self) -> None:
        """Let the next snapshot start a new trajectory: what follows does not continue what was recorded."""
        self.interrupted = True

    def _append(self, snapshot: Snapshot) -> bool:
        self.processes, self._shards = snapshot.processes, snapshot.shards
        trajectory = self.trajectory
        anew = trajectory is None or self.interrupted or snapshot.numel != trajectory.n
        if self.processes.any(anew) or trajectory is None:
            self.clear()  # before the new one asks for memory
            self._draw_word()
            dtype = snapshot.parts[0].dtype if snapshot.shards is None else getattr(torch, self.settings.dtype)
            self.trajectory = trajectory = Trajectory(
                snapshot.numel,
                capacity=self.settings.window,
                dtype=dtype,
                sketch=self.settings.sketch,
                storage=self.settings.storage,
                path=self._mapped_folder,
                all_sum=self._all_sum,
            )
        self._fingerprint = snapshot.fingerprint()
        trajectory.stage(snapshot.parts, offsets=snapshot.offsets)
        return trajectory.commit(self.processes.all_sum(trajectory.message()))

    def _draw_word(self) -> None:
        """Draw what tells this recorder's references from others; the first process's number in all of them."""
        own = secrets.randbits(32) if self.processes.rank == 0 else 0
        self._word = int(self.processes.all_sum(np.array([float(own)]))[0])

    @property
    def _all_sum(self) -> Callable[..., Any] | None:
        return self.processes.all_sum if self.processes.size > 1 else None

    @property
    def _mapped_folder(self) -> Path | None:
        return self.folder if self.settings.storage == "disk" else None

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def _alike(self) -> bool:
        """Whether all processes hold the same rows."""
        return self._shards is None or self.settings.storage == "sketch"

    @property
    def _place(self) -> tuple[int, int]:
        """Rank and number of the processes that write files."""
        return (0, 1) if self._alike else (self.processes.rank, self.processes.size)

    def save(self) -> dict[str, Any]:
        """State for a checkpoint, the same in all processes; their snapshots go to files in the folder."""
        self._saves += 1  # before anything can differ between processes
        if self.trajectory is None or self.folder is None or (self._alike and self.processes.rank > 0):
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / SIDECAR
        if self._writer is None:
            self._segments += 1
            own, shards = process_path(path, *self._place), None if self._alike else self._shards
            keep, segment = self.settings.window, str(self._segments)
            self._writer = SegmentWriter(own, keep=keep, segment=segment, shards=shards)
        state = self.trajectory.save(self._writer)
        return {
            **state,
            "epochs": torch.tensor(self.epochs, dtype=torch.int64),
            "interrupted": self.interrupted,
            "path": os.fspath(path),
            "processes": self._place[1],
            "reference": self._retention.note((self._word << 32) + self._saves, self._writer.files(state)),
        }

    @property
    def has_saved(self) -> bool:
        """Whether a checkpoint was written since files were last released."""
        return self._retention.changed

    def release(self, checkpoints: Iterable[Path]) -> None:
        """Delete the files that neither the next checkpoint needs nor one of those that are, or may be, on disk."""
        written = [*self._written, *(self._writer.written if self._writer is not None else [])]
        current = self._writer.current if self._writer is not None else []
        gone = set(self._retention.release(checkpoints, written, current))
        self._written = [file for file in self._written if file not in gone]
        if self._writer is not None:
            self._writer.written = [file for file in self._writer.written if file not in gone]

    def _end_segment(self) -> None:
        if self._writer is not None:
            self._written += self._writer.written
            self._writer = None

    def load(self, state: dict[str, Any], folders: Sequence[Path], shards: Shards | None) -> int:
        """Restore what :meth:`save` wrote, by any number of processes.

        Args:
            state: What it returned in the first process.
            folders: Where the files may lie now, the likeliest first.
            shards: What counts as this process's own now, for weights.

        Returns:
            How many snapshots could not be restored: all or none.

        Raises:
            ValueError: If the state does not fit these settings.
        """
        settings, epochs = self.settings, torch.as_tensor(state["epochs"], dtype=torch.int64).tolist()
        kept = settings.sketch if settings.storage == "sketch" else 0
        dtype = settings.dtype if shards is not None and not kept else "float32" if kept else "float64"
        for name, expected in {"sketch": kept, "dtype": dtype}.items():
            if state[name] != expected:
                raise ValueError(f"its snapshots were recorded with {name}={state[name]!r}, not {expected!r}")
        whole = 1 if shards is None else sum(chunk.numel for chunk in shards.chunks.values())
        if int(state["total"]) != whole or len(state["marks"]) != len(epochs):
            raise ValueError(f"it holds {len(epochs)} snapshots of {state['total']} elements, this run {whole}")
        self.processes = Processes() if shards is None else shards.processes
        self._shards = shards
        self._draw_word()
        state = shortened(state, settings.window)
        path = Path(str(state["path"]))
        at = next((folder / path.name for folder in folders if _has_files(folder / path.name, state)), path)
        own = 1 if shards is None else shards.numel
        reader: SegmentReader | ShardReader
        if kept or shards is None:
            reader = SegmentReader.of(at, state, kept or 1)
        else:
            reader = ShardReader(at, state, int(state["processes"]), shards)
        self.trajectory = Trajectory.load(
            state, at, storage=settings.storage, folder=self._mapped_folder, all_sum=self._all_sum, n=own, read=reader
        )
        self._end_segment()
        self.epochs = epochs[len(epochs) - len(self.trajectory) :]
        self.interrupted, self._fingerprint = bool(state["interrupted"]), None
        if not self.epochs:
            self.clear()
        return len(state["marks"]) - len(self.epochs)


def _has_files(path: Path, state: dict[str, Any]) -> bool:
    """Whether a folder holds the files of a state, by the first process's."""
    first = process_path(path, 0, int(state["processes"]))
    return SegmentReader.of(first, state, 1).exists()
