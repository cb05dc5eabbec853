"""The recorded trajectory of one training, shared by the callbacks that ask for the same snapshots."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_koopman._types import Array
from lightning_koopman.parameters.process_group import Processes
from lightning_koopman.parameters.shards import Shards
from lightning_koopman.trajectory.sidecar import SIDECAR, SidecarReader, process_file, write_layout
from lightning_koopman.trajectory.trajectory import BITS, SKETCH, TALLY, Trajectory, sum_of_bits

T = TypeVar("T")
STORE = "trajectory"  # apart from the sidecar, which must not change between two checkpoints


@dataclass(frozen=True)
class SnapshotSettings:
    """What is recorded and how much of it is kept; callbacks with equal settings share one recorder."""

    observable: str
    parameters: tuple[str, ...] | None
    every_n_epochs: int
    every_n_steps: int | None
    window: int | None
    storage: str
    dtype: str = "float32"
    sketch: int = SKETCH

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
        parts: The numbers, flat tensors.
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

    @property
    def numel(self) -> int:
        """Numbers of this process's parts."""
        return sum(part.numel() for part in self.parts)

    def fingerprint(self) -> int:
        """Sum of the bits: tells whether the same is recorded again."""
        single = (part.float() if part.dtype not in BITS else part for part in self.parts)
        return sum(sum_of_bits(part.contiguous()) for part in single)


class Recorder:
    """Appends snapshots to a trajectory once, and starts a new trajectory where the old one cannot go on.

    Recording is in two parts, so that the work can be done while training goes on: :meth:`record` copies the snapshot,
    :meth:`finish` takes it in.  All processes have to call each of them at the same times.
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
        self._layout_written = False
        self._worker: ThreadPoolExecutor | None = None
        self._twin: Processes | None = None  # for the worker
        self._pending: tuple[int, Future[bool] | Callable[[], bool]] | None = None
        self._fingerprint: int | None = None  # of the newest snapshot
        self._pinned: Tensor | None = None

    def __len__(self) -> int:
        return len(self.epochs)

    def __getstate__(self) -> dict[str, Any]:  # threads and connections cannot be copied
        return {**vars(self), "_worker": None, "_twin": None, "_pending": None, "_pinned": None, "_shards": None}

    def prepare(self, folder: Path | None) -> None:
        """Get ready for a fit that writes into the folder."""
        self.folder, self.restored, self._layout_written = folder, False, False

    def clear(self) -> None:
        """Forget everything recorded."""
        self.settle()
        self.trajectory, self.epochs, self.interrupted, self._pending = None, [], False, None

    @property
    def busy(self) -> bool:
        """Whether a snapshot is recorded that has not been taken in."""
        return self._pending is not None

    @property
    def newest(self) -> int | None:
        """Completed epochs at the newest snapshot taken in, if the trajectory goes on from it."""
        return self.epochs[-1] if self.epochs and not self.interrupted else None

    def holds(self, epoch: int) -> bool:
        """Whether the snapshot after so many epochs is the newest one recorded."""
        return epoch == (self.newest if self._pending is None else self._pending[0])

    def repeats(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot equals the newest one, or that came from a checkpoint, in all processes."""
        return snapshot.processes.all_agree(self._fingerprint in (None, snapshot.fingerprint()))

    def record(self, epoch: int, snapshot: Snapshot, *, background: bool = False) -> None:
        """Copy the snapshot after ``epoch`` completed epochs, unless it is held already, and start to work on it.

        Args:
            epoch: Completed epochs.
            snapshot: What this process records of it.
            background: Whether to work in another thread; else the work is done by :meth:`finish`.
        """
        if background and self._worker is None:  # also where another callback has recorded this snapshot before
            self._worker, self._twin = _quiet_worker(), snapshot.processes.twin()
        if self.holds(epoch):
            return
        self.processes, self._shards = snapshot.processes, snapshot.shards
        prepared: Callable[[], Array]
        try:
            prepared = self._prepared(snapshot, background)
        except Exception as error:  # the other processes wait for what this one has to add
            prepared = partial(_fail, error)
        work = partial(self._take_in, epoch, prepared, self.processes if self._twin is None else self._twin)
        # where there is a worker, all work is its: one piece after the other
        self._pending = epoch, work if self._worker is None else self._worker.submit(work)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Let the worker do something when it is done with what was recorded; without a worker it is done at once."""
        if self._worker is not None:
            return self._worker.submit(work)
        done: Future[T] = Future()
        done.set_result(work())
        return done

    def settle(self) -> None:
        """Wait until the worker is idle, before anything that it reads is replaced."""
        if self._worker is not None:
            self._worker.submit(_nothing).result()

    def finish(self) -> bool:
        """Take in what was recorded last, if anything.

        Returns:
            Whether there was nothing that could not be taken in: numbers that are not finite, in any process.

        Raises:
            Exception: What went wrong in this process, after the others have been told.
        """
        if self._pending is None:
            return True
        (_, work), self._pending = self._pending, None
        return work.result() if isinstance(work, Future) else work()

    def _take_in(self, epoch: int, prepared: Callable[[], Array], processes: Processes) -> bool:
        failure: Exception | None = None
        try:
            border = prepared()
        except Exception as error:
            failure, border = error, np.full(self._border_size(), np.nan)
        border = processes.all_sum(border)
        if failure is None and self.trajectory is not None and self.trajectory.commit(border):
            self.epochs = [*self.epochs, epoch][-len(self.trajectory) :]
            return True
        self.interrupt()
        if failure is not None:
            raise failure
        return False

    def interrupt(self) -> None:
        """Let the next snapshot start a new trajectory: what follows does not continue what was recorded."""
        self.interrupted = True

    @property
    def _shared(self) -> bool:
        return self.processes.size > 1

    def _prepared(self, snapshot: Snapshot, background: bool) -> Callable[[], Array]:
        """Copy a snapshot; returns the function that does the expensive part of the work."""
        trajectory, numel = self.trajectory, snapshot.numel
        if trajectory is None or self.interrupted or numel != trajectory.n:
            self.settle()
            self.trajectory = None  # before the new one asks for memory
            self.epochs, self.interrupted, self._layout_written = [], False, False
            dtype = snapshot.parts[0].dtype if snapshot.shards is None else getattr(torch, self.settings.dtype)
            self.trajectory = trajectory = Trajectory(
                numel,
                capacity=self.settings.window,
                dtype=dtype,
                sketch=self.settings.sketch,
                all_sum=self.processes.all_sum if self._shared else None,
                **self._storage(),
            )
        self._fingerprint = snapshot.fingerprint()
        parts, arrived = self._off_device(snapshot, background)
        if arrived is None:
            trajectory.stage(parts, offsets=snapshot.offsets)

        def work() -> Array:
            if arrived is not None:
                arrived()
                trajectory.stage(parts, offsets=snapshot.offsets)
            return trajectory.border()

        return work

    def _off_device(self, snapshot: Snapshot, background: bool) -> tuple[list[Tensor], Callable[[], None] | None]:
        """The parts, or pinned copies that are on their way from a GPU with a function that waits for them."""
        parts = [part.float() if part.dtype.itemsize < 4 else part for part in snapshot.parts]
        if not background or not parts or any(part.device.type != "cuda" for part in parts):
            return parts, None
        if self._pinned is None or self._pinned.numel() != snapshot.numel:
            self._pinned = torch.empty(snapshot.numel, pin_memory=True)
        copies = list(torch.split(self._pinned, [part.numel() for part in parts]))
        for copy, part in zip(copies, parts, strict=True):
            copy.copy_(part, non_blocking=True)  # on the stream of the next step, which so cannot write over it
        events = []
        for device in {part.device for part in parts}:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            events.append(event)

        def arrived() -> None:
            for event in events:
                event.synchronize()

        return copies, arrived

    def _border_size(self) -> int:
        """Length of what a process adds, known also where that failed."""
        if self.settings.storage == "sketch":
            return self.settings.sketch + 1
        held = 0 if self.interrupted else len(self.epochs)
        count = held + 1 if self.settings.window is None else min(held + 1, self.settings.window)
        return 2 * count + TALLY

    def _storage(self) -> dict[str, Any]:
        path = None
        if self.settings.storage == "disk" and self.folder is not None:
            path = process_file(self.folder, STORE, self.processes.rank, self.processes.size)
        return {"storage": self.settings.storage, "path": path}

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """State for a checkpoint, the same in all processes; their snapshots go to sidecar files in the folder."""
        if self.trajectory is None or self.folder is None:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        rank, size = self.processes.rank, self.processes.size
        alike = self._shards is None or self.settings.storage == "sketch"  # in all processes
        sidecar = process_file(self.folder, SIDECAR, 0 if alike else rank, 1 if alike else size)
        if alike and rank > 0:
            return {}
        if self._shards is not None and not alike and not self._layout_written:
            write_layout(sidecar, self._shards)
            self._layout_written = True
        return {
            "trajectory": self.trajectory.save(sidecar),
            "epochs": torch.tensor(self.epochs, dtype=torch.int64),
            "interrupted": self.interrupted,
            "sidecar": os.fspath(sidecar),
            "processes": 1 if alike else size,
        }

    def load(self, state: dict[str, Any], sidecar: Path | None, shards: Shards | None) -> int:
        """Restore what :meth:`save` wrote, by any number of processes.

        Args:
            state: What it returned in the first process.
            sidecar: Where that process's sidecar lies now, or None if it is lost.
            shards: What counts as this process's own now, for weights.

        Returns:
            How many snapshots could not be restored.
        """
        saved, epochs = state["trajectory"], state["epochs"].tolist()
        self.processes = Processes() if shards is None else shards.processes
        self._shards = shards
        reader: SidecarReader | Callable[[int, Tensor], bool] | None = _nothing if sidecar is None else None
        own = None
        if shards is not None:
            own = shards.numel
            if sidecar is not None and not saved["sketch"]:
                size, width = int(state["processes"]), getattr(torch, saved["dtype"]).itemsize
                reader = SidecarReader(sidecar, size, shards, width, int(saved["first"]))
        self.trajectory = Trajectory.load(
            saved,
            sidecar or Path(),
            all_sum=self.processes.all_sum if self._shared else None,
            n=own,
            read=reader,
            **self._storage(),
        )
        self.epochs = epochs[len(epochs) - len(self.trajectory) :]
        self.interrupted, self._fingerprint = bool(state["interrupted"]), None
        if not self.epochs:
            self.clear()
        return len(epochs) - len(self.epochs)


def _quiet_worker() -> ThreadPoolExecutor:
    """A worker thread whose PyTorch uses no further threads.

    OpenMP gives each thread that asks for it a team of its own, and from then on lets all teams sleep between any two
    operations where they are more than the cores, which makes training on a CPU half as slow again.
    """
    count = torch.get_num_threads()
    worker = ThreadPoolExecutor(1, thread_name_prefix="koopman")
    worker.submit(torch.get_num_threads).result()  # asked first, or PyTorch would set it again at the first operation
    worker.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(count)  # it is also what threads to come start from
    return worker


def _fail(error: Exception) -> Array:
    raise error


def _nothing(*_: Any) -> bool:
    """Reads nothing."""
    return False
