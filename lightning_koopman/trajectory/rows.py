"""Where the rows of a trajectory lie: a ring of them in memory, or mapped from a file with bounded resident memory."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GROWTH = 32  # rows added at a time while there is no capacity; pages are committed only when written
STORAGES = ("ram", "disk", "sketch")
# NumPy has no bfloat16: its bits are mapped
DTYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.int16}
RESIDENT = 2**28  # bytes of mapped rows that are in memory at a time


class RowStore:
    """Rows of n numbers by a running index, of which the newest ``slots`` are kept.

    Args:
        n: Numbers in a row.
        dtype: float32, float64 or bfloat16.
        slots: Rows kept, or None for all.
        path: The file that they are mapped from, or None for memory.
        temporary: Whether to map them from a file that is deleted with the store.
    """

    def __init__(
        self, n: int, dtype: torch.dtype, slots: int | None, *, path: Path | None = None, temporary: bool = False
    ) -> None:
        self.n, self.dtype, self.slots = n, dtype, slots
        self.row_bytes = n * dtype.itemsize
        if temporary:
            folder = tempfile.mkdtemp(prefix="koopman-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            path = Path(folder) / "snapshots.bin"
        self.path = None if path is None or n == 0 else path.absolute()  # nothing cannot be mapped
        self._blocks: list[Tensor] = []
        self._maps: list[np.memmap[Any, Any]] = []
        self._block_rows = GROWTH if slots is None else slots

    def slot(self, index: int) -> int:
        """Place of a row in the ring, and in a file of the ring's rows."""
        return index if self.slots is None else index % self.slots

    def row(self, index: int) -> Tensor:
        """View (n,) of a row; storage grows as needed."""
        block, row = divmod(self.slot(index), self._block_rows)
        while block >= len(self._blocks):
            self._blocks.append(self._new_block())
        return self._blocks[block][row]

    def segments(self, start: int, stop: int) -> list[Tensor]:
        """Views (rows, n) of the rows with indices start … stop − 1, in order of time."""
        found = []
        while start < stop:
            block, row = divmod(self.slot(start), self._block_rows)
            rows = min(self._block_rows - row, stop - start)
            found.append(self._blocks[block][row : row + rows])
            start += rows
        return found

    def slab(self, rows: int) -> int | None:
        """Columns to go through at a time so that mapped rows stay within their memory; None: all at once."""
        if self.path is None or rows * self.row_bytes <= RESIDENT:
            return None
        page = mmap.ALLOCATIONGRANULARITY
        return max(1, RESIDENT // rows // page) * page // self.dtype.itemsize

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Let the mapped pages of some columns go from memory; what was written to them stays in the file."""
        held = len(self._maps) * self._block_rows * self.row_bytes
        if held <= RESIDENT or not hasattr(mmap, "MADV_DONTNEED"):
            return
        page = mmap.PAGESIZE
        for mapped in self._maps:
            raw: Any = mapped._mmap  # type: ignore[attr-defined]
            lead = len(raw) - mapped.nbytes  # the map begins at a page's start
            for row in range(self._block_rows):
                left = (lead + row * self.row_bytes + start * self.dtype.itemsize) // page * page
                right = lead + row * self.row_bytes + (self.n if stop is None else stop) * self.dtype.itemsize
                raw.madvise(mmap.MADV_DONTNEED, left, right - left)

    def _new_block(self) -> Tensor:
        shape = (self._block_rows, self.n)
        if self.path is None:
            return torch.empty(shape, dtype=self.dtype)
        size = self._block_rows * self.row_bytes
        offset = len(self._blocks) * size
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.truncate(max(offset + size, file.seek(0, 2)))
            if hasattr(os, "posix_fallocate"):  # a full disk is then an error here, not a crash at the first write
                os.posix_fallocate(file.fileno(), offset, size)
        mapped = np.memmap(self.path, dtype=DTYPES[self.dtype], mode="r+", offset=offset, shape=shape)
        self._maps.append(mapped)
        rows = torch.from_numpy(mapped)
        return rows.view(torch.bfloat16) if self.dtype == torch.bfloat16 else rows
