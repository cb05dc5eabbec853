"""Snapshot files beside checkpoints: append-only, and readable by any number of processes."""

from __future__ import annotations

import re
import uuid
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from lightning_koopman.parameters.shards import Indices, Shards

TOKEN = "koopman-reference-"  # prefix of the reference in a checkpoint that needs files; 16 hexadecimal digits follow
Row = Callable[[int], Tensor]


class SegmentWriter:
    """Writes one trajectory to append-only files, so that nothing a checkpoint needs is overwritten.

    Each file begins with a whole snapshot, in float32 or float64, followed by the increments after it.  Once a file
    holds a window of increments, a new one begins, so that old ones can be deleted.

    Args:
        path: Prefix of the file names.
        keep: Snapshots in the window, or None for all.
        segment: Distinguishes this trajectory's files from others with the same path (default: random).
        shards: Which elements make up the rows, if several processes write; stored in a file of its own.
    """

    def __init__(
        self, path: Path, *, keep: int | None, segment: str | None = None, shards: Shards | None = None
    ) -> None:
        self.path, self.keep = path.absolute(), keep
        self.segment, self._shards = segment or uuid.uuid4().hex[:12], shards
        self._layout = [] if shards is None else [write_layout(self.path, self.segment, shards)]
        self.written = list(self._layout)
        self._starts: list[int] = []
        self._needed: list[int] = []  # the starts that the newest checkpoint needs
        self._end = -1  # index of the newest snapshot in the files

    def __getstate__(self) -> dict[str, Any]:  # shards refer to the module
        return {**vars(self), "_shards": None}

    def write(self, first: int, held: int, oldest: Tensor, newest: Tensor, row: Row) -> dict[str, Any]:
        """Write those of the snapshots ``first`` … ``first + held − 1`` that the files do not hold yet.

        Args:
            first: Index of the oldest snapshot.
            held: Number of snapshots.
            oldest: The oldest snapshot.
            newest: The newest snapshot.
            row: Function that returns the increment of an index.

        Returns:
            State for a checkpoint, which :class:`SegmentReader` needs.

        Raises:
            OSError: If a file cannot be written; the next call tries again.
        """
        if not all(file.is_file() for file in self.current):  # deleted in mid-run
            if self._shards is not None:
                write_layout(self.path, self.segment, self._shards)
            self._starts, self._needed, self._end = [], [], -1
        if held:
            last = first + held - 1
            if self._end < first:  # nothing written yet, or a gap since
                self._begin(first, oldest)
            start = self._starts[-1]
            lead, each = oldest.nbytes, row(last).nbytes if held > 1 else 0
            with self._file(start).open("r+b") as file:
                for index in range(self._end + 1, last + 1):
                    file.seek(lead + (index - start - 1) * each)
                    _dump(row(index), file)
            self._end = last
            if self.keep is not None and last - start >= self.keep:
                self._begin(last, newest)
        before = [start for start in self._starts if start <= first][-1:]
        self._needed = before + [start for start in self._starts if start > first]
        return {"segment": self.segment, "starts": list(self._needed), "start": (self._needed or [0])[0]}

    def files(self, state: Mapping[str, Any]) -> list[Path]:
        """Return the files that a state returned by :meth:`write` needs."""
        return [*self._layout, *(self._file(start) for start in state["starts"])]

    @property
    def current(self) -> list[Path]:
        """The files that the next checkpoint may need."""
        needed = min(self._needed, default=0)
        return [*self._layout, *(self._file(start) for start in self._starts if start >= needed)]

    def _begin(self, start: int, snapshot: Tensor) -> None:
        file = self._file(start)
        self.written.append(file)
        with file.open("w+b") as handle:
            _dump(snapshot, handle)
        self._starts.append(start)
        self._end = start

    def _file(self, start: int) -> Path:
        return segment_file(self.path, self.segment, start)


def segment_file(path: Path, segment: str, start: int) -> Path:
    """Return the path of the file that begins with snapshot ``start``."""
    return path.with_name(f"{path.name}-{segment}-{start}.bin")


@dataclass(frozen=True)
class SegmentReader:
    """Reads rows that one process wrote.

    Attributes:
        path: Prefix of the file names.
        segment: See :class:`SegmentWriter`.
        starts: Indices of the snapshots that the files begin with.
        n: Elements of a row.
        wide: Bytes per element of a snapshot.
        narrow: Bytes per element of an increment.
    """

    path: Path
    segment: str
    starts: Sequence[int]
    n: int
    wide: int
    narrow: int

    @classmethod
    def of(cls, path: Path, state: Mapping[str, Any], n: int) -> SegmentReader:
        """Create a reader from what :meth:`Trajectory.save` returned."""
        narrow = torch.float64.itemsize if state["sketch"] else getattr(torch, state["dtype"]).itemsize
        return cls(path, str(state["segment"]), [int(each) for each in state["starts"]], n, max(4, narrow), narrow)

    def __call__(self, index: int, out: Tensor, column: int = 0) -> bool:
        """Fill a tensor from a column of the first snapshot, or of a later increment, on; return whether that worked.

        It fails if the file is missing, too short or not a regular file.
        """
        if not self.starts:
            return False
        if index == self.starts[0]:
            return _read_into(segment_file(self.path, self.segment, index), column * self.wide, out)
        start = self.starts[max(0, bisect_left(self.starts, index) - 1)]
        offset = self.n * self.wide + (index - start - 1) * self.n * self.narrow
        return _read_into(segment_file(self.path, self.segment, start), offset + column * self.narrow, out)


# -- files of several processes ---------------------------------------------------------------------------------------


def process_path(path: Path, rank: int, size: int) -> Path:
    """Return the prefix of one process's file names."""
    return path if size == 1 else path.with_name(f"{path.name}-{rank}-of-{size}")


def write_layout(path: Path, segment: str, shards: Shards) -> Path:
    """Write which elements of which parameters make up the rows of a segment; return the file."""
    layout = {name: torch.from_numpy(np.stack([part.starts, part.lengths])) for name, part in shards.items()}
    target = _layout_path(path, segment)
    scratch = target.with_suffix(".part")
    torch.save(layout, scratch)
    scratch.replace(target)
    return target


@dataclass(frozen=True)
class Piece:
    """Elements that are contiguous both in a saved row and in this process's row."""

    rank: int
    source: int
    target: int
    length: int


class ShardReader:
    """Reads this process's part of snapshots that any number of processes saved.

    Args:
        path: Prefix of all processes' file names.
        state: What :meth:`Trajectory.save` returned in the first process.
        size: Number of processes that saved.
        shards: This process's own elements now.
    """

    def __init__(self, path: Path, state: Mapping[str, Any], size: int, shards: Shards) -> None:
        self._readers: list[SegmentReader] = []
        layouts: list[dict[str, tuple[Indices, Indices]]] = []
        for rank in range(size):
            own = process_path(path, rank, size)
            layout = _read_layout(own, str(state["segment"]))
            if layout is None:  # without it this rank's rows cannot be read
                break
            layouts.append(layout)
            n = sum(int(lengths.sum()) for _, lengths in layout.values())
            self._readers.append(SegmentReader.of(own, state, n))
        self._pieces, self._found = _overlaps(layouts, shards)

    def __call__(self, index: int, out: Tensor) -> bool:
        """Read like :class:`SegmentReader`."""
        return self._found and all(
            self._readers[each.rank](index, out[each.target : each.target + each.length], each.source)
            for each in self._pieces
        )


def _overlaps(layouts: list[dict[str, tuple[Indices, Indices]]], shards: Shards) -> tuple[list[Piece], bool]:
    """Return where this process's elements lie in the saved rows, and whether all were found."""
    pieces: list[Piece] = []
    offsets = [_row_offsets(layout) for layout in layouts]
    at = 0
    for name, part in shards.items():
        for rank, layout in enumerate(layouts):
            if name not in layout:
                continue
            starts, lengths = layout[name]
            order = np.argsort(starts)
            begins, ends = starts[order], (starts + lengths)[order]
            places = (offsets[rank][name] + np.cumsum(lengths) - lengths)[order]
            target = at
            for start, length in zip(part.starts.tolist(), part.lengths.tolist(), strict=True):
                left = int(np.searchsorted(ends, start, side="right"))
                right = int(np.searchsorted(begins, start + length, side="left"))
                for run in range(left, right):
                    low, high = max(start, int(begins[run])), min(start + length, int(ends[run]))
                    source = int(places[run]) + low - int(begins[run])
                    pieces.append(Piece(rank, source, target + low - start, high - low))
                target += length
        at += part.stop - part.start
    return pieces, sum(piece.length for piece in pieces) == shards.numel


def _row_offsets(layout: Mapping[str, tuple[Indices, Indices]]) -> dict[str, int]:
    sizes = np.cumsum([0, *(int(lengths.sum()) for _, lengths in layout.values())])
    return dict(zip(layout, sizes.tolist(), strict=False))


def _read_layout(path: Path, segment: str) -> dict[str, tuple[Indices, Indices]] | None:
    """Return the runs of elements in a process's rows by parameter, or None if the file is missing or damaged."""
    file = _layout_path(path, segment)
    if not file.is_file():
        return None
    try:
        return {name: tuple(runs.numpy()) for name, runs in torch.load(file, weights_only=True).items()}
    except Exception:
        return None


def _layout_path(path: Path, segment: str) -> Path:
    return path.with_name(f"{path.name}-{segment}.layout")


# -- retention --------------------------------------------------------------------------------------------------------


class Retention:
    """Deletes files that no checkpoint on disk needs any more, and never one that may be needed.

    Each checkpoint holds a random reference.  A file is deleted once every checkpoint seen with a reference to it has
    been deleted or overwritten.  Files whose reference was never seen are kept: their checkpoint may lie elsewhere.
    """

    def __init__(self) -> None:
        self.changed = False  # since files were last released
        self._needed: dict[str, list[Path]] = {}
        self._places: dict[str, set[Path]] = {}

    def note(self, word: int, files: Iterable[Path]) -> str:
        """Return a reference to files, for a checkpoint that is about to be written.

        Args:
            word: Number below 2⁶⁴, unique to this reference and equal in all processes, since one writes for all.
            files: This process's files.
        """
        reference = f"{TOKEN}{word:016x}"
        self._needed[reference] = list(files)
        self.changed = True
        return reference

    def release(self, checkpoints: Iterable[Path], written: Iterable[Path], current: Iterable[Path]) -> list[Path]:
        """Delete the files that are not needed.

        Args:
            checkpoints: Files and folders that are, or may be, checkpoints.
            written: All snapshot files so far.
            current: Files that the next checkpoint will need.

        Returns:
            The files deleted.
        """
        self.changed = False
        for path in {*checkpoints, *(place for places in self._places.values() for place in places)}:
            found = references_in(path)
            if found is None:
                continue
            for reference in self._needed:
                places = self._places.setdefault(reference, set()) if reference in found else None
                if places is not None:
                    places.add(path)
                elif reference in self._places:
                    self._places[reference].discard(path)
        for reference in [each for each, places in self._places.items() if not places]:
            del self._places[reference], self._needed[reference]
        alive = {*current, *(file for files in self._needed.values() for file in files)}
        gone = [file for file in written if file not in alive]
        for file in gone:
            file.unlink(missing_ok=True)
        return gone


def references_in(checkpoint: Path) -> frozenset[str] | None:
    """Return the references in a checkpoint: none if it is gone, None if it cannot be read yet."""
    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    try:
        stat = file.stat()
    except FileNotFoundError:
        return frozenset()
    except OSError:
        return None
    return _references(file, stat.st_mtime_ns, stat.st_size) if file.is_file() else None


@lru_cache(maxsize=4096)
def _references(file: Path, _: int, __: int) -> frozenset[str] | None:
    """Return the references in a ``torch.save`` file; its tensors are stored apart and are not read."""
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(each for each in archive.namelist() if each.endswith("data.pkl"))
            found = re.findall(TOKEN.encode() + rb"[0-9a-f]{16}", archive.read(name))
    except (OSError, zipfile.BadZipFile, StopIteration, KeyError):
        return None
    return frozenset(each.decode() for each in found)


# -- bytes ------------------------------------------------------------------------------------------------------------


def _dump(row: Tensor, file: IO[bytes]) -> None:
    file.write(row.view(torch.uint8).numpy())  # type: ignore[call-overload]


def _read_into(file: Path, start: int, out: Tensor) -> bool:
    """Fill a tensor from a file, from byte ``start`` on; return whether that worked."""
    if not out.numel():
        return True
    if not file.is_file():  # reading a pipe would block
        return False
    with file.open("rb") as handle:
        handle.seek(start)
        return handle.readinto(out.view(torch.uint8).numpy()) == out.nbytes  # type: ignore[arg-type]
