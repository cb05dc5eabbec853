"""The recorded trajectory of one training, shared by the callbacks that use the same snapshots."""

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
from lightning_koopman.parameters.select import as_patterns
from lightning_koopman.parameters.shards import Shards
from lightning_koopman.trajectory.increments import shortened
from lightning_koopman.trajectory.rows import BITS, sum_of_bits
from lightning_koopman.trajectory.sidecar import Retention, SegmentWriter, ShardReader, process_path, segment_file
from lightning_koopman.trajectory.sketch import SKETCH, check_sketch
from lightning_koopman.trajectory.trajectory import STORAGES, Trajectory

SIDECAR = "snapshots"
WEIGHTS = "weights"


@dataclass(frozen=True, kw_only=True)
class SnapshotSettings:
    """What is recorded, and how much of it is kept.  Callbacks with equal settings share one recorder.

    Attributes:
        observable: ``"weights"``, or the name of a loss or metric.
        parameters: Name patterns of the weights, a tuple, or None.
        every_n_epochs: Epochs between two snapshots, ≥ 1.
        every_n_steps: Optimizer steps between two snapshots, ≥ 1, or None to count epochs.
        window: Snapshots kept, ≥ 3, or None for all.
        storage: ``"ram"``, ``"disk"`` or ``"sketch"``.
        dtype: ``"float32"`` or ``"bfloat16"``.
        sketch: Elements of a sketch, ≥ 2.

    Raises:
        ValueError: If a value is out of range, or two exclude each other.
    """

    window: int | None
    observable: str = WEIGHTS
    parameters: str | Sequence[str] | None = None
    every_n_epochs: int = 1
    every_n_steps: int | None = None
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
            raise ValueError(f"parameters={self.parameters!r} only applies to observable='weights', got "
                             f"{observable!r}: omit it.")  # fmt: skip
        checked = {
            "parameters": as_patterns(self.parameters),
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
            raise ValueError(f"{given} exclude each other: pass only one.")
        check_choice("storage", self.storage, STORAGES)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.dtype != "float32" and (self.storage == "sketch" or observable != WEIGHTS):
            raise ValueError(f"dtype={self.dtype!r} only applies to stored weights, got storage={self.storage!r}, "
                             f"{observable=}: omit it.")  # fmt: skip
        if self.storage == "sketch" and observable != WEIGHTS:
            raise ValueError(f"storage='sketch' only applies to observable='weights', got {observable!r}: omit it.")

    @property
    def interval(self) -> dict[str, int | None]:
        """Epochs, or optimizer steps, between two snapshots."""
        return {"every_n_epochs": self.every_n_epochs, "every_n_steps": self.every_n_steps}

    @property
    def length(self) -> float:
        """Number of snapshots kept."""
        return math.inf if self.window is None else self.window

    def covers(self, other: SnapshotSettings) -> bool:
        """Return whether this records the same as ``other``, as exactly and as often, and keeps at least as much."""
        alike = replace(self, window=other.window, storage=other.storage) == other
        return alike and self.storage != "sketch" and self.length >= other.length


@dataclass(frozen=True)
class Snapshot:
    """One process's part of a snapshot.

    Attributes:
        parts: The elements, as flat tensors.
        offsets: Index in the whole snapshot at which each tensor begins.
        processes: All processes that record a part.
        shards: Shards that the elements belong to, if any.
    """

    parts: Sequence[Tensor]
    offsets: Sequence[int] = (0,)
    processes: Processes = field(default_factory=Processes)
    shards: Shards | None = None

    @classmethod
    def of(cls, shards: Shards) -> Snapshot:
        """Return this process's parts of some parameters."""
        runs = list(shards.runs())
        return cls([values for _, values in runs], [offset for offset, _ in runs], shards.processes, shards)

    @classmethod
    def of_number(cls, value: float) -> Snapshot:
        """Return a single number in full precision."""
        return cls([torch.tensor([value], dtype=torch.float64)])

    @property
    def numel(self) -> int:
        """Number of elements in this process's part."""
        return sum(part.numel() for part in self.parts)

    def fingerprint(self) -> int:
        """Return the sum of the bits, which shows whether the same snapshot is recorded again."""
        single = (part.float() if part.dtype not in BITS else part for part in self.parts)
        return sum(sum_of_bits(part.contiguous()) for part in single) % 2**64


class Recorder:
    """Appends each snapshot to a trajectory once, and starts a new trajectory if the old one cannot continue.

    All processes must call each method at the same times.
    """

    def __init__(self, settings: SnapshotSettings) -> None:
        self.settings = settings
        self.trajectory: Trajectory | None = None
        self.folder: Path | None = None  # for snapshots on disk and beside checkpoints
        self.restored = False  # whether snapshots were restored from the checkpoint of this fit
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
        """Prepare for a fit that writes into the folder."""
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
        """Completed epochs at the newest snapshot, or None if the trajectory does not continue from it."""
        return self.epochs[-1] if self.epochs and not self.interrupted else None

    def holds(self, epoch: int) -> bool:
        """Return whether the newest snapshot is that after ``epoch`` epochs."""
        return epoch == self.newest

    def repeats(self, snapshot: Snapshot) -> bool:
        """Return whether a snapshot equals the newest one in all processes; True if that came from a checkpoint."""
        return not snapshot.processes.any(self._fingerprint not in (None, snapshot.fingerprint()))

    def record(self, epoch: int, snapshot: Snapshot) -> bool:
        """Record the snapshot after ``epoch`` completed epochs, unless it is already held.

        Args:
            epoch: Completed epochs.
            snapshot: This process's part of it.

        Returns:
            Whether its elements are finite in all processes.

        Raises:
            Exception: What failed here; OtherProcessError if it failed elsewhere.  A new trajectory follows.
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
        """Make the next snapshot start a new trajectory, because it does not continue the recorded one."""
        self.interrupted = True

    def _append(self, snapshot: Snapshot) -> bool:
        self.processes, self._shards = snapshot.processes, snapshot.shards
        trajectory = self.trajectory
        restart = trajectory is None or self.interrupted or snapshot.numel != trajectory.n
        if self.processes.any(restart) or trajectory is None:
            self.clear()  # free memory before the new one is allocated
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
        trajectory.all_sum = self._all_sum
        return trajectory.record(snapshot.parts, offsets=snapshot.offsets)

    def _draw_word(self) -> None:
        """Draw a word that identifies this recorder's references: the first process's number, in all processes."""
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
        """Rank and number of processes, among those that write files."""
        return (0, 1) if self._alike else (self.processes.rank, self.processes.size)

    def save(self) -> dict[str, Any]:
        """Write this process's snapshots to the folder; return the state for a checkpoint, alike in all that write."""
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
            "interval": self.settings.interval,
            "path": os.fspath(path),
            "processes": self._place[1],
            "reference": self._retention.note((self._word << 32) + self._saves, self._writer.files(state)),
        }

    @property
    def has_saved(self) -> bool:
        """Whether a checkpoint was written since files were last released."""
        return self._retention.changed

    def release(self, checkpoints: Iterable[Path]) -> None:
        """Delete the files that neither the next checkpoint needs nor any that is, or may be, on disk."""
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
        """Restore what :meth:`save` wrote, in any number of processes.

        Args:
            state: What :meth:`save` returned in the first process.
            folders: Where the files may be now, the likeliest first.
            shards: This process's own elements now; None unless weights are recorded.

        Returns:
            Number of snapshots that could not be restored: all or none.

        Raises:
            ValueError: If the state does not fit these settings.
        """
        settings, epochs = self.settings, torch.as_tensor(state["epochs"], dtype=torch.int64).tolist()
        kept = settings.sketch if settings.storage == "sketch" else 0
        dtype = settings.dtype if shards is not None and not kept else "float32" if kept else "float64"
        for name, expected in {"sketch": kept, "dtype": dtype, "interval": settings.interval}.items():
            if state[name] != expected:
                raise ValueError(f"the snapshots were recorded with {name}={state[name]!r}, not {expected!r}")
        whole = 1 if shards is None else sum(chunk.numel for chunk in shards.chunks.values())
        if int(state["total"]) != whole or len(state["marks"]) != len(epochs):
            raise ValueError(
                f"the checkpoint has {len(epochs)} snapshots of {state['total']} elements, this run has {whole}"
            )
        self.processes = Processes() if shards is None else shards.processes
        self._shards = shards
        self._draw_word()
        state = shortened(state, settings.window)
        path = Path(str(state["path"]))
        at = next((folder / path.name for folder in folders if _has_files(folder / path.name, state)), path)
        own = 1 if shards is None else shards.numel
        read = None if kept or shards is None else ShardReader(at, state, int(state["processes"]), shards)
        self.trajectory = Trajectory.load(
            state, at, storage=settings.storage, folder=self._mapped_folder, all_sum=self._all_sum, n=own, read=read
        )
        self._end_segment()
        self.epochs = epochs[len(epochs) - len(self.trajectory) :]
        self.interrupted, self._fingerprint = bool(state["interrupted"]), None
        if not self.epochs:
            self.clear()
        return len(state["marks"]) - len(self.epochs)


def _has_files(path: Path, state: dict[str, Any]) -> bool:
    """Return whether the first process's first file of a state exists at a path."""
    first = process_path(path, 0, int(state["processes"]))
    return any(segment_file(first, str(state["segment"]), int(start)).is_file() for start in state["starts"][:1])
