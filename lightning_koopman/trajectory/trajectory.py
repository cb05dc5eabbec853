"""The recorded snapshots of one training, with the small matrix that every spectrum is computed from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_koopman._types import AllSum, Array
from lightning_koopman.dmd.gram import CHUNKS, factor_from_increment_gram, merge_oldest, wide_chunks
from lightning_koopman.dmd.rrr import check_options, decompose
from lightning_koopman.dmd.spectrum import Spectrum
from lightning_koopman.trajectory.border import border_products
from lightning_koopman.trajectory.rows import DTYPES, STORAGES, RowStore
from lightning_koopman.trajectory.sketch import Sketch, with_sketch_errors

SKETCH = 4093  # a prime, so that no regular layout of the weights falls into few buckets
TALLY = 3  # numbers beside the products in a border: those of a snapshot, and two halves of its fingerprint
HALF = 2**32
PIECE = 2**24  # numbers copied at a time, so that no more of a mapped row than that is in memory
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}
ReadRow = Callable[[int, Tensor], bool]


class Trajectory:
    """Snapshots of a state of n numbers, appended one at a time: a ring buffer and the Gram matrix of its increments.

    Appending costs one pass over the stored snapshots; a spectrum then costs only O(time³), whatever n is.

    A state that is spread over processes or machines is recorded in parts: each process keeps a trajectory of what it
    holds.  With ``all_sum`` they share one Gram matrix, and all give the spectrum of the whole; without it they are
    joined later by :meth:`merge`.

    Args:
        n: Numbers in one snapshot, ≥ 1; of what this process holds of it, ≥ 0.
        capacity: Snapshots to keep, ≥ 2; the oldest leaves when a new one finds no room (default: keep all).
        storage: ``"ram"``; ``"disk"`` for a memory-mapped file, of which a few hundred MB are in memory at a time; or
            ``"sketch"`` to keep ``sketch`` random combinations of each snapshot only: the spectrum is then an estimate
            with a standard error, and there are no modes.
        path: File for ``storage="disk"`` (default: a temporary file, deleted with the trajectory).
        dtype: ``torch.float32``; ``torch.float64`` for a few numbers of full precision, such as a loss; or
            ``torch.bfloat16`` to keep the increments at half the size, each corrected by what the ones before it have
            missed, so that errors do not add up.
        sketch: Numbers kept of a snapshot with ``storage="sketch"``, ≥ 2; best a prime.
        offset: Index of this process's first number in the whole state, for sketches, ≥ 0.
        all_sum: Function that sums a small float64 array over all processes that hold parts, and gives each of them the
            same sum.  Every process then has to append at the same times.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_koopman import Trajectory
        >>> trajectory = Trajectory(3, capacity=20)
        >>> for t in range(30):
        ...     trajectory.append(torch.tensor([1.0, 2.0 + 0.8**t, -(0.8**t)]))
        >>> len(trajectory), trajectory.spectrum().eigenvalues.real.round(3).tolist()
        (20, [1.0, 0.8])
    """

    def __init__(
        self,
        n: int,
        *,
        capacity: int | None = None,
        storage: str = "ram",
        path: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        sketch: int = SKETCH,
        offset: int = 0,
        all_sum: AllSum | None = None,
    ) -> None:
        least = 1 if all_sum is None else 0
        if n < least:
            raise ValueError(f"n must be at least {least}, got {n}: a snapshot holds one number or more.")
        if capacity is not None and capacity < 2:
            raise ValueError(f"capacity must be at least 2, got {capacity}: pass None to keep all snapshots.")
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {list(STORAGES)}, got {storage!r}.")
        if path is not None and storage != "disk":
            raise ValueError(f"path={str(path)!r} goes with storage='disk', got storage={storage!r}.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be torch.float32, torch.float64 or torch.bfloat16, got {dtype}.")
        if sketch < 2:
            raise ValueError(f"sketch must be at least 2, got {sketch}: it is the numbers kept of a snapshot.")
        if offset < 0:
            raise ValueError(f"offset must be at least 0, got {offset}: it is the index of the first number.")
        if storage == "sketch" and dtype != torch.float32:
            raise ValueError(f"dtype={dtype} goes with stored snapshots: a sketch is always float64.")
        self.n, self.capacity, self.storage, self.dtype = n, capacity, storage, dtype
        self.offset, self.all_sum = offset, all_sum
        self.total = 0
        self._sketch = Sketch(sketch) if storage == "sketch" else None
        # one more than is kept: a snapshot is written before it is known whether it will do
        slots = None if capacity is None else capacity + 1
        kept = (n, dtype) if self._sketch is None else (sketch, torch.float64)
        given = None if path is None else Path(path)
        self._store = RowStore(*kept, slots, path=given, temporary=storage == "disk" and path is None)
        # increments lie on top of the oldest snapshot; the newest one is known up to what the last of them missed
        self._base = torch.zeros(n) if dtype == torch.bfloat16 else None
        self._newest = torch.zeros(n) if dtype == torch.bfloat16 else None
        self._message: Array | None = None  # what is staged, where that is no row
        self._gram: Array = np.zeros((0, 0))
        self._first = 0  # number of snapshots that have left: the oldest one kept has this index
        self._fingerprints: list[int] = []
        self._saved_path: Path | None = None
        self._saved: set[int] = set()  # indices of the snapshots already in that file

    def __len__(self) -> int:
        return len(self._gram)

    def __repr__(self) -> str:
        return f"Trajectory(n={self.n}, snapshots={len(self)}, capacity={self.capacity}, storage={self.storage!r})"

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshots held."""
        around = 0 if self._base is None else 8 * self.n
        return len(self) * self._store.row_bytes + around

    # -- recording ----------------------------------------------------------------------------------------------------

    def append(self, snapshot: Tensor | npt.ArrayLike | Sequence[Tensor]) -> None:
        """Record the next snapshot.

        Args:
            snapshot: Tensor or array (n,) of finite numbers, or a list of tensors that make it up in order; copied.

        Raises:
            ValueError: If the shape is not (n,) or a number is not finite, in any process; the trajectory is then
                unchanged.
        """
        self.stage(snapshot)
        border = self.border()
        if not self.commit(border if self.all_sum is None else self.all_sum(border)):
            raise ValueError("snapshot holds NaN or infinite values: it was not recorded.")

    def stage(
        self, snapshot: Tensor | npt.ArrayLike | Sequence[Tensor], *, offsets: Sequence[int] | None = None
    ) -> None:
        """First part of :meth:`append`: copy a snapshot to where it will be kept, without recording it yet."""
        parts = _parts(snapshot)
        count = sum(part.numel() for part in parts)
        if count != self.n or (not isinstance(snapshot, (list, tuple)) and parts[0].ndim != 1):
            shown = tuple(parts[0].shape) if len(parts) == 1 else (count,)
            raise ValueError(f"snapshot must have shape ({self.n},), got {shown}.")
        if self._sketch is not None:
            self._message = self._sketched(parts, offsets, self._sketch)
            return
        row, start = self._store.row(self._first + len(self)), 0
        for part in parts:
            for piece in _pieces(part.reshape(-1)):
                self._write(row, start, piece)
                start += piece.numel()

    def border(self) -> Array:
        """Second part of :meth:`append`, the expensive one: what the staged snapshot adds, from this process's part."""
        if self._message is not None:
            return self._message
        return self._row_border(self.n)

    def commit(self, border: Array) -> bool:
        """Last part of :meth:`append`: take the staged snapshot in, given the sum of :meth:`border` over all parts.

        Returns:
            Whether its numbers were finite; else nothing has changed.
        """
        index = self._first + len(self)
        if self._message is not None:  # the sum of all sketches: the rest of the work is small
            self._message = None
            self._store.row(index).copy_(torch.from_numpy(border[1:]))
            border = self._row_border(border[0])
        products, (size, high, low) = border[:-TALLY].reshape(2, -1), border[-TALLY:]
        if not np.isfinite(products).all():  # every NaN of a snapshot ends up in the products
            return False
        if self._base is not None:
            assert self._newest is not None
            if len(self):
                self._add_row(self._newest, index)
            else:
                self._newest.copy_(self._base)
        if len(self) == self.capacity:
            self._drop_oldest(1)
        first, last = products
        gram = np.empty((len(last), len(last)))
        gram[:-1, :-1] = self._gram
        # the oldest row anew too: merging what left into it would cancel digits where the trajectory started far off
        gram[0] = gram[:, 0] = first
        gram[-1] = gram[:, -1] = last
        self._gram, self.total = gram, int(size)
        self._fingerprints.append((int(high) * HALF + int(low)) % 2**64)
        return True

    def _sketched(self, parts: Sequence[Tensor], offsets: Sequence[int] | None, sketch: Sketch) -> Array:
        """How many numbers there are, and the sketch of them."""
        found, offset = torch.zeros(sketch.k, dtype=torch.float64), self.offset
        for index, part in enumerate(parts):
            offset = offset if offsets is None else offsets[index]
            found += sketch.project(part.reshape(-1).cpu(), offset=offset)
            offset += part.numel()
        return np.append(float(self.n), found.numpy())

    def _write(self, row: Tensor, start: int, piece: Tensor) -> None:
        """Write a piece of a snapshot into the row it is staged in."""
        where = slice(start, start + piece.numel())
        if self._base is None or self._newest is None:
            row[where].copy_(piece)
        elif len(self):
            row[where].copy_(piece.to(device="cpu", dtype=torch.float32) - self._newest[where])
        else:
            self._base[where].copy_(piece)
        self._store.release(where.start, where.stop)

    def _row_border(self, size: float) -> Array:
        """The products of the staged row, and its tally: so many numbers, and both halves of its fingerprint."""
        halves = divmod(self._fingerprint(self._first + len(self)), HALF)
        return np.concatenate([self._products().ravel(), [size, *halves]])

    def _products(self) -> Array:
        """Inner products of oldest snapshot and newest increment with every increment, the staged one included."""
        full = len(self) == self.capacity
        oldest, stop = self._first + full, self._first + len(self) + 1
        step = self._store.row(oldest) if full and self._base is not None else None
        rows = self._store.segments(oldest if self._base is None else oldest + 1, stop)
        slab, release = self._store.slab(stop - oldest), self._store.release
        return border_products(rows, base=self._base, step=step, slab=slab, release=release)

    def _fingerprint(self, index: int) -> int:
        """Sum of the bits of a stored row, or of the base where the row is the first: those of parts add up."""
        row = self._store.row(index) if self._base is None or index > self._first else self._base
        total = 0
        for where in _slices(row.numel()):
            total += sum_of_bits(row[where])
            self._store.release(where.start, where.stop)
        return total % 2**64

    # -- what is known ------------------------------------------------------------------------------------------------

    def snapshots(self) -> Tensor:
        """Copy of the snapshots held, tensor (time, n), oldest first."""
        self._check_rows("snapshots")
        if not len(self):
            return torch.empty(0, self.n, dtype=self.dtype)
        rows = torch.cat([segment.to(self._wide) for segment in self._segments()])
        for index in range(1, len(rows) if self._base is not None else 0):  # rounded as when they were recorded
            rows[index] += rows[index - 1]
        return rows

    def last(self) -> Tensor:
        """Copy of the newest snapshot, tensor (n,).

        Raises:
            IndexError: If nothing has been recorded.
        """
        self._check_rows("last")
        if not len(self):
            raise IndexError("the trajectory is empty: append a snapshot first.")
        newest = self._store.row(self._first + len(self) - 1) if self._newest is None else self._newest
        return newest.clone()

    def step_norms(self) -> Array:
        """Euclidean norms (time − 1,) of the steps between successive snapshots."""
        return np.sqrt(np.maximum(np.diag(self._gram)[1:], 0.0))

    def start_norm(self) -> float:
        """Euclidean norm of the oldest snapshot held."""
        return float(np.sqrt(self._gram[0, 0]))

    def factor(self, *, last: int | None = None) -> Array:
        r"""Array R (r, time), r ≤ time, with :math:`R^\top R` the Gram matrix of the snapshots.

        Args:
            last: Use only so many of the newest snapshots, ≥ 1 (default: all).
        """
        drop = 0 if last is None else max(0, len(self) - last)
        return factor_from_increment_gram(merge_oldest(self._gram, drop))

    def spectrum(
        self,
        *,
        last: int | None = None,
        tol: float = 1e-3,
        max_rank: int | None = None,
        delays: int = 1,
        refine: bool = True,
    ) -> Spectrum:
        """Koopman spectrum of the snapshots held, by :func:`dmd_rrr`.

        Args:
            last: Use only so many of the newest snapshots (default: all).
            tol: Relative singular value below which directions count as zero, in [0, 1).
            max_rank: Upper bound on the rank.
            delays: Snapshots in one delay-embedded snapshot, ≥ 1.
            refine: Compute refined Ritz pairs.

        Returns:
            The spectrum; with ``storage="sketch"`` its ``sketch_errors`` are set.

        Raises:
            ValueError: If there are fewer than ``delays + 1`` snapshots, or an option is out of its range.
        """
        check_options(tol=tol, max_rank=max_rank, delays=delays)
        held = len(self) if last is None else min(last, len(self))
        if held < delays + 1:
            raise ValueError(
                f"the spectrum needs at least {delays + 1} snapshots with delays={delays}, but only {held} are held: "
                "append more first."
            )
        root = self.factor(last=last)
        found = decompose(root, tol=tol, max_rank=max_rank, delays=delays, refine=refine)
        if self._sketch is None:
            return found
        return with_sketch_errors(found, root, self._sketch.k, tol=tol, max_rank=max_rank)

    def combine(self, weights: npt.ArrayLike) -> Tensor:
        """Combinations of the snapshots held, in one pass: ``weights @ snapshots``.

        With :meth:`Spectrum.combination` this gives reconstructions and forecasts of any size.

        Args:
            weights: Real array (s, time), or (time,) for one combination.

        Returns:
            Tensor (s, n) or (n,), float64 for float64 snapshots, else float32; accumulated in float64.

        Raises:
            ValueError: If the weights' last dimension is not the number of snapshots held, or only sketches are held.
        """
        self._check_rows("combine")
        matrix = torch.as_tensor(np.asarray(weights, dtype=np.float64))
        if matrix.shape[-1] != len(self) or matrix.ndim not in (1, 2):
            raise ValueError(
                f"weights must have shape (s, {len(self)}) or ({len(self)},), one weight a snapshot; "
                f"got {tuple(matrix.shape)}."
            )
        rows = matrix.reshape(-1, len(self))
        if self._base is not None:  # an increment is part of all later snapshots
            rows = rows.flip(1).cumsum(1).flip(1)
        combined = torch.empty(rows.shape[0], self.n, dtype=self._wide)
        start = 0
        for chunk in wide_chunks(self._segments(), CHUNKS):
            combined[:, start : start + chunk.shape[1]] = rows @ chunk
            start += chunk.shape[1]
            self._store.release(start - chunk.shape[1], start)
        return combined[0] if matrix.ndim == 1 else combined

    def _check_rows(self, method: str) -> None:
        if self._sketch is not None:
            raise ValueError(
                f"storage='sketch' keeps {self._sketch.k} combinations of each snapshot, from which `{method}` cannot "
                "give them back: take storage='ram' or 'disk'."
            )

    @property
    def _wide(self) -> torch.dtype:
        """Dtype of whole snapshots."""
        return torch.float32 if self.dtype == torch.bfloat16 else self.dtype

    def _segments(self) -> list[Tensor]:
        """What is stored of the snapshots held, oldest first: themselves, or the oldest and the increments after it."""
        stop = self._first + len(self)
        if self._base is None:
            return self._store.segments(self._first, stop)
        return [self._base[None], *self._store.segments(self._first + 1, stop)]

    def _drop_oldest(self, count: int) -> None:
        self._gram = merge_oldest(self._gram, count)
        del self._fingerprints[:count]
        for _ in range(count):
            self._first += 1
            if self._base is not None:
                self._add_row(self._base, self._first)

    def _add_row(self, target: Tensor, index: int) -> None:
        """Add a stored increment to a snapshot, in pieces, so that little of the row is in memory."""
        row = self._store.row(index)
        for where in _slices(self.n):
            target[where] += row[where]
            self._store.release(where.start, where.stop)

    # -- joining ------------------------------------------------------------------------------------------------------

    @classmethod
    def merge(
        cls, parts: Sequence[Trajectory], *, storage: str | None = None, path: str | Path | None = None
    ) -> Trajectory:
        """Join trajectories of the parts of one state, recorded at the same times by processes or machines.

        Args:
            parts: The trajectories, in the order of the numbers in the state.  Where they hold different times, those
                that all hold are kept; times are counted from each trajectory's first snapshot.
            storage: ``"ram"`` or ``"disk"`` (default: as the first part); sketches stay sketches.
            path: As for the constructor.

        Returns:
            A trajectory of all numbers, as if it had been recorded in one place.

        Raises:
            ValueError: If there are no parts, they are of different kinds, were recorded with ``all_sum``, or have no
                time in common.

        Example:
            >>> import numpy as np
            >>> from lightning_koopman import Trajectory
            >>> left, right = Trajectory(2), Trajectory(3)
            >>> for t in range(20):
            ...     left.append(np.full(2, 0.3**t))
            ...     right.append(np.array([1.0, 2.0, 0.8**t]))
            >>> Trajectory.merge([left, right]).spectrum().eigenvalues.real.round(3).tolist()
            [1.0, 0.3, 0.8]
        """
        parts = list(parts)
        if not parts:
            raise ValueError("parts must not be empty: give the trajectories to join.")
        if any(part.all_sum is not None for part in parts):
            raise ValueError("parts were recorded with all_sum: each already gives the spectrum of the whole.")
        kinds = {(part.dtype, part.capacity, None if part._sketch is None else part._sketch.k) for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"parts must have the same dtype, capacity and sketch, got {sorted(map(str, kinds))}.")
        first = max(part._first for part in parts)
        stop = min(part._first + len(part) for part in parts)
        if stop <= first:
            raise ValueError("parts have no time in common: record the same epochs in all of them.")
        lead, sketch = parts[0], parts[0]._sketch
        n = sum(part.n for part in parts)
        kept: dict[str, Any] = {"storage": storage or lead.storage, "path": path}
        if sketch is not None:
            kept = {"storage": "sketch", "sketch": sketch.k}
        whole = cls(n, capacity=lead.capacity, dtype=lead.dtype, offset=lead.offset, **kept)
        for index in range(first, stop):
            if sketch is not None:
                summed = sum(part._store.row(index) for part in parts)
                whole._message = np.append(float(n), np.asarray(summed))
                whole.commit(whole._message)
                continue
            row, at = whole._store.row(index - first), 0
            for part in parts:
                row[at : at + part.n].copy_(part._store.row(index))
                at += part.n
        if sketch is not None:
            return whole
        grams = [merge_oldest(part._gram, first - part._first)[: stop - first, : stop - first] for part in parts]
        whole._gram, whole.total = np.sum(grams, axis=0), n
        if whole._base is not None and whole._newest is not None:
            whole._base.copy_(torch.cat([part._snapshot_before(first) for part in parts]))
            whole._newest.copy_(whole._snapshot_before(stop - first - 1))
        whole._fingerprints = [whole._fingerprint(at) for at in range(stop - first)]
        return whole

    def _snapshot_before(self, index: int) -> Tensor:
        """The oldest snapshot of those from an index on, for increments that lie on top of it."""
        assert self._base is not None
        base = self._base.clone()
        for row in range(self._first + 1, index + 1):
            self._add_row(base, row)
        return base

    # -- keeping ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> dict[str, Any]:
        """Write the snapshots to a sidecar file and return the small rest of the state.

        Only snapshots that are not yet in the file are written.  Increments in bfloat16 lie on top of the oldest
        snapshot; that goes to a file of its own, of which those of the last two calls are kept.

        Args:
            path: The file; its folder must exist.

        Returns:
            Tensors and numbers that :meth:`load` takes, safe for ``torch.load(weights_only=True)``.

        Raises:
            OSError: If a file cannot be written.
        """
        target = Path(path).absolute()
        if target != self._saved_path or not target.exists():
            self._saved, self._saved_path = set(), target
            for old in target.parent.glob(f"{target.name}.base-*"):  # of another trajectory
                old.unlink(missing_ok=True)
        indices = range(self._first, self._first + len(self))
        if target != self._store.path:
            with open(target, "r+b" if target.exists() else "w+b") as file:
                for index in indices:
                    if index not in self._saved:
                        file.seek(self._store.slot(index) * self._store.row_bytes)
                        _dump(self._store.row(index), file)
                        self._store.release()
        if self._base is not None and len(self):
            self._save_base(target)
        self._saved = set(indices)
        prints = [mark - 2**64 if mark >= 2**63 else mark for mark in self._fingerprints]
        return {
            "n": self.n,
            "total": self.total,
            "capacity": self.capacity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "sketch": 0 if self._sketch is None else self._sketch.k,
            "first": self._first,
            "gram": torch.from_numpy(self._gram.copy()),
            "fingerprints": torch.tensor(prints, dtype=torch.int64),
        }

    def _save_base(self, target: Path) -> None:
        assert self._base is not None
        mine = base_path(target, self._first)
        if not mine.exists():
            scratch = mine.with_suffix(".part")
            with open(scratch, "wb") as file:
                _dump(self._base, file)
            scratch.replace(mine)  # whole or not at all
        known = sorted(target.parent.glob(f"{target.name}.base-*"), key=lambda each: each.stat().st_mtime)
        for old in known[:-2]:
            if old != mine:
                old.unlink(missing_ok=True)

    @classmethod
    def load(
        cls,
        state: dict[str, Any],
        sidecar: str | Path,
        *,
        storage: str = "ram",
        path: str | Path | None = None,
        offset: int = 0,
        all_sum: AllSum | None = None,
        n: int | None = None,
        read: ReadRow | None = None,
    ) -> Trajectory:
        """Trajectory from :meth:`save`'s state and its sidecar file: the same spectrum, to the last bit.

        Snapshots that the file has since lost to newer ones are left out: the trajectory then holds the newest that are
        intact, and may be shorter or empty.

        Args:
            state: What :meth:`save` returned; in any process, where several saved their parts.
            sidecar: The file that it wrote.
            storage: As for the constructor; a sketch stays one.
            path: As for the constructor.
            offset: As for the constructor.
            all_sum: As for the constructor.
            n: Numbers that this process holds, if that is not what the state says.
            read: Fills a tensor with this process's part of the row in a slot of the ring, or of the oldest snapshot
                for an index of −1, and tells whether it could; in place of reading ``sidecar``.

        Raises:
            OSError: If the file cannot be read.
        """
        kept: dict[str, Any] = {"storage": storage, "path": path}
        if state["sketch"]:
            kept = {"storage": "sketch", "sketch": int(state["sketch"])}
        trajectory = cls(
            int(state["n"]) if n is None else n,
            capacity=state["capacity"],
            dtype=getattr(torch, state["dtype"]),
            offset=offset,
            all_sum=all_sum,
            **kept,
        )
        first, held = int(state["first"]), len(state["fingerprints"])
        trajectory._first, trajectory._gram = first, state["gram"].numpy().copy()
        trajectory.total = int(state["total"])
        source = Path(sidecar).absolute()
        get = read or _reader(source, trajectory._store, first)
        expected = [int(mark) % 2**64 for mark in state["fingerprints"]]
        marks = np.full((2, held), np.nan)  # a sum with NaN is NaN: what one process lost, all leave out
        failure: Exception | None = None
        if trajectory._base is not None and held:  # its file is written whole or not at all
            expected[0] = 0
        try:
            based = trajectory._base is None or (held > 0 and get(-1, trajectory._base))
            if based and trajectory._base is not None:
                marks[:, :1] = 0.0
            for at in range(trajectory._base is not None, held if based else 0):
                row = trajectory._store.row(first + at)
                in_place = source == trajectory._store.path
                if in_place or get(trajectory._store.slot(first + at), row):
                    marks[:, at] = divmod(trajectory._fingerprint(first + at), HALF)
        except Exception as error:  # the other processes wait for what this one could read
            failure, marks = error, np.full((2, held), np.nan)
        if all_sum is not None:  # sketches are the same everywhere: only what is missing counts
            marks = all_sum(marks) if trajectory._sketch is None else marks + all_sum(marks * 0)
        if failure is not None:
            raise failure
        intact = 0
        while intact < held and _whole(marks[:, held - 1 - intact]) == expected[held - 1 - intact]:
            intact += 1
        if intact == 0 or (trajectory._base is not None and intact < held):
            trajectory._gram, trajectory._first = np.zeros((0, 0)), 0
            return trajectory
        trajectory._fingerprints = expected
        if intact < held:
            trajectory._drop_oldest(held - intact)
        if trajectory._newest is not None:
            trajectory._newest.copy_(trajectory._snapshot_before(first + held - 1))
        return trajectory


def base_path(sidecar: Path, first: int) -> Path:
    """File of the oldest snapshot, on top of which the increments in a sidecar lie."""
    return sidecar.with_name(f"{sidecar.name}.base-{first}")


def sum_of_bits(values: Tensor) -> int:
    """A fingerprint of contiguous numbers: those of parts add up."""
    return int(values.view(BITS[values.dtype]).sum(dtype=torch.int64))


def read_into(path: Path, start: int, out: Tensor) -> bool:
    """Fill a tensor from a file, from a byte on; returns whether the file has so much."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            for piece in _pieces(out):
                view = _bytes(piece)
                if file.readinto(view) < len(view):
                    return False
    except FileNotFoundError:
        return False
    return True


def _reader(sidecar: Path, store: RowStore, first: int) -> ReadRow:
    if not sidecar.exists():
        raise FileNotFoundError(f"there is no sidecar {os.fspath(sidecar)!r}.")

    def read(slot: int, out: Tensor) -> bool:
        if slot < 0:
            return read_into(base_path(sidecar, first), 0, out)
        return read_into(sidecar, slot * store.row_bytes, out)

    return read


def _whole(halves: Array) -> int:
    """A fingerprint from the sums of its upper and lower half; −1 where a part of it is missing."""
    return -1 if np.isnan(halves).any() else (int(halves[0]) * HALF + int(halves[1])) % 2**64


def _parts(snapshot: Tensor | npt.ArrayLike | Sequence[Tensor]) -> list[Tensor]:
    """A snapshot as the tensors that make it up."""
    if isinstance(snapshot, (list, tuple)) and all(isinstance(part, Tensor) for part in snapshot):
        return [part.detach() for part in snapshot]
    return [torch.as_tensor(snapshot).detach()]


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE))


def _pieces(row: Tensor) -> Iterator[Tensor]:
    return (row[where] for where in _slices(row.numel()))


def _dump(row: Tensor, file: IO[bytes]) -> None:
    for piece in _pieces(row):
        file.write(_bytes(piece))


def _bytes(row: Tensor) -> memoryview:
    view: Any = row.view(BITS[row.dtype]).numpy()
    return memoryview(view).cast("B")
