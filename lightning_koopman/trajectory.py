"""The recorded snapshots of one training, with the small matrix that every spectrum is computed from."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_koopman.dmd import check_options, decompose
from lightning_koopman.factor import (
    CHUNKS,
    Array,
    border_products,
    factor_from_increment_gram,
    merge_oldest,
    wide_chunks,
)
from lightning_koopman.spectrum import Spectrum

GROWTH = 32  # rows added at a time while there is no capacity; pages are committed only when written
STORAGES = ("ram", "disk")
DTYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


class Trajectory:
    """Snapshots of a state of n numbers, appended one at a time: a ring buffer and the Gram matrix of its increments.

    Appending costs one pass over the stored snapshots; a spectrum then costs only O(time³), whatever n is.

    Args:
        n: Numbers in one snapshot, ≥ 1.
        capacity: Snapshots to keep, ≥ 2; the oldest leaves when a new one finds no room (default: keep all).
        storage: ``"ram"``, or ``"disk"`` for a memory-mapped file.
        path: File for ``storage="disk"`` (default: a temporary file, deleted with the trajectory).
        dtype: ``torch.float32``, or ``torch.float64`` for a few numbers of full precision, such as a loss.

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
    ) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}: a snapshot holds one number or more.")
        if capacity is not None and capacity < 2:
            raise ValueError(f"capacity must be at least 2, got {capacity}: pass None to keep all snapshots.")
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {list(STORAGES)}, got {storage!r}.")
        if path is not None and storage != "disk":
            raise ValueError(f"path={str(path)!r} goes with storage='disk', got storage={storage!r}.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}.")
        self.n, self.capacity, self.storage, self.dtype = n, capacity, storage, dtype
        if storage == "disk" and path is None:
            folder = tempfile.mkdtemp(prefix="koopman-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            path = Path(folder) / "snapshots.bin"
        self._path = None if path is None else Path(path).absolute()
        self._blocks: list[Tensor] = []
        self._block_rows = GROWTH if capacity is None else capacity
        self._gram: Array = np.zeros((0, 0))
        self._first = 0  # number of snapshots that have left: the oldest one kept has this index
        self._saved: dict[int, int] = {}  # checksum of each snapshot already in the file `_saved_path`
        self._saved_path: Path | None = None

    def __len__(self) -> int:
        return len(self._gram)

    def __repr__(self) -> str:
        return f"Trajectory(n={self.n}, snapshots={len(self)}, capacity={self.capacity}, storage={self.storage!r})"

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshots held."""
        return len(self) * self._row_bytes

    def append(self, snapshot: Tensor | npt.ArrayLike) -> None:
        """Record the next snapshot.

        Args:
            snapshot: Tensor or array (n,) of finite numbers, copied.

        Raises:
            ValueError: If the shape is not (n,) or a number is not finite; the trajectory is then unchanged.
        """
        row = torch.as_tensor(snapshot).detach()
        if row.shape != (self.n,):
            raise ValueError(f"snapshot must have shape ({self.n},), got {tuple(row.shape)}.")
        row = row.to(device="cpu", dtype=self.dtype)
        if not is_finite(row):
            raise ValueError("snapshot holds NaN or infinite values: it was not recorded.")
        if len(self) == self.capacity:
            self._drop_oldest(1)
        index = self._first + len(self)
        self._row(index).copy_(row)
        first, last = border_products(self._segments(self._first, index + 1))
        gram = np.empty((len(last), len(last)))
        gram[:-1, :-1] = self._gram
        # the oldest row anew too: merging what left into it would cancel digits where the trajectory started far off
        gram[0] = gram[:, 0] = first
        gram[-1] = gram[:, -1] = last
        self._gram = gram

    def snapshots(self) -> Tensor:
        """Copy of the snapshots held, tensor (time, n), oldest first."""
        return torch.cat(list(self._segments(self._first, self._first + len(self))) or [torch.empty(0, self.n)])

    def last(self) -> Tensor:
        """Copy of the newest snapshot, tensor (n,).

        Raises:
            IndexError: If nothing has been recorded.
        """
        if not len(self):
            raise IndexError("the trajectory is empty: append a snapshot first.")
        return self._row(self._first + len(self) - 1).clone()

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
        return decompose(self.factor(last=last), tol=tol, max_rank=max_rank, delays=delays, refine=refine)

    def combine(self, weights: npt.ArrayLike) -> Tensor:
        """Combinations of the snapshots held, in one pass: ``weights @ snapshots``.

        With :meth:`Spectrum.combination` this gives reconstructions and forecasts of any size.

        Args:
            weights: Real array (s, time), or (time,) for one combination.

        Returns:
            Tensor (s, n) or (n,) of the trajectory's dtype, accumulated in float64.

        Raises:
            ValueError: If the weights' last dimension is not the number of snapshots held.
        """
        matrix = torch.as_tensor(np.asarray(weights, dtype=np.float64))
        if matrix.shape[-1] != len(self) or matrix.ndim not in (1, 2):
            raise ValueError(
                f"weights must have shape (s, {len(self)}) or ({len(self)},), one weight a snapshot; "
                f"got {tuple(matrix.shape)}."
            )
        segments = list(self._segments(self._first, self._first + len(self)))
        rows = matrix.reshape(-1, len(self))
        combined = torch.empty(rows.shape[0], self.n, dtype=self.dtype)
        start = 0
        for chunk in wide_chunks(segments, CHUNKS):
            combined[:, start : start + chunk.shape[1]] = rows @ chunk
            start += chunk.shape[1]
        return combined[0] if matrix.ndim == 1 else combined

    def save(self, path: str | Path) -> dict[str, Any]:
        """Write the snapshots to a sidecar file and return the small rest of the state.

        Only snapshots that are not yet in the file are written.

        Args:
            path: The file; its folder must exist.

        Returns:
            Tensors and numbers that :meth:`load` takes, safe for ``torch.load(weights_only=True)``.

        Raises:
            OSError: If the file cannot be written.
        """
        target = Path(path).absolute()
        if target != self._saved_path or not target.exists():
            self._saved, self._saved_path = {}, target
        indices = range(self._first, self._first + len(self))
        in_place = target == self._path
        if not in_place:
            with open(target, "r+b" if target.exists() else "w+b") as file:
                for index in indices:
                    if index not in self._saved:
                        data = _bytes(self._row(index))
                        file.seek(self._slot(index) * len(data))
                        file.write(data)
        for index in indices:
            if index not in self._saved:
                self._saved[index] = zlib.crc32(_bytes(self._row(index)))
        self._saved = {index: self._saved[index] for index in indices}
        return {
            "n": self.n,
            "capacity": self.capacity,
            "double": self.dtype == torch.float64,
            "first": self._first,
            "gram": torch.from_numpy(self._gram.copy()),
            "checksums": torch.tensor([self._saved[index] for index in indices], dtype=torch.int64),
        }

    @classmethod
    def load(
        cls, state: dict[str, Any], sidecar: str | Path, *, storage: str = "ram", path: str | Path | None = None
    ) -> Trajectory:
        """Trajectory from :meth:`save`'s state and its sidecar file: the same spectrum, to the last bit.

        Snapshots that the file has since lost to newer ones are left out: the trajectory then holds the newest that are
        intact, and may be shorter or empty.

        Args:
            state: What :meth:`save` returned.
            sidecar: The file that it wrote.
            storage: As for the constructor.
            path: As for the constructor.

        Raises:
            OSError: If the file cannot be read.
        """
        trajectory = cls(
            int(state["n"]),
            capacity=state["capacity"],
            storage=storage,
            path=path,
            dtype=torch.float64 if state["double"] else torch.float32,
        )
        checksums, first = state["checksums"].tolist(), int(state["first"])
        trajectory._first, trajectory._gram = first, state["gram"].numpy().copy()
        source = Path(sidecar).absolute()
        size = trajectory._row_bytes
        intact = 0
        with open(source, "rb") as file:
            for index in reversed(range(first, first + len(checksums))):
                file.seek(trajectory._slot(index) * size)
                data = bytearray(file.read(size))
                if len(data) < size or zlib.crc32(data) != checksums[index - first]:
                    break
                row = trajectory._row(index)
                if source != trajectory._path:  # else the storage is the sidecar itself
                    row.copy_(torch.frombuffer(data, dtype=trajectory.dtype))
                intact += 1
        if intact == 0:
            trajectory._gram, trajectory._first = np.zeros((0, 0)), 0
        elif intact < len(checksums):
            trajectory._drop_oldest(len(checksums) - intact)
        return trajectory

    @property
    def _row_bytes(self) -> int:
        return self.n * (8 if self.dtype == torch.float64 else 4)

    def _drop_oldest(self, count: int) -> None:
        self._gram = merge_oldest(self._gram, count)
        self._first += count

    def _slot(self, index: int) -> int:
        return index if self.capacity is None else index % self.capacity

    def _row(self, index: int) -> Tensor:
        """The stored row of a snapshot, as a view; storage grows as needed."""
        block, row = divmod(self._slot(index), self._block_rows)
        while block >= len(self._blocks):
            self._blocks.append(self._new_block())
        return self._blocks[block][row]

    def _new_block(self) -> Tensor:
        shape = (self._block_rows, self.n)
        if self._path is None:
            return torch.empty(shape, dtype=self.dtype)
        size = self._block_rows * self._row_bytes
        offset = len(self._blocks) * size
        with open(self._path, "r+b" if self._path.exists() else "w+b") as file:
            file.truncate(max(offset + size, file.seek(0, 2)))
            if hasattr(os, "posix_fallocate"):  # a full disk is then an error here, not a crash at the first write
                os.posix_fallocate(file.fileno(), offset, size)
        mapped = np.memmap(self._path, dtype=DTYPES[self.dtype], mode="r+", offset=offset, shape=shape)
        return torch.from_numpy(mapped)

    def _segments(self, start: int, stop: int) -> Iterator[Tensor]:
        """Views (rows, n) of the snapshots with indices start … stop − 1, in order of time."""
        while start < stop:
            block, row = divmod(self._slot(start), self._block_rows)
            rows = min(self._block_rows - row, stop - start)
            yield self._blocks[block][row : row + rows]
            start += rows


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite, in one pass without a temporary: NaN and infinity survive in the sum."""
    return bool(torch.isfinite(values.sum(dtype=torch.float64)))


def _bytes(row: Tensor) -> memoryview:
    view: Any = row.numpy()
    return memoryview(view).cast("B")
