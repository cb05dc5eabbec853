"""Storage for the rows of a trajectory: a ring in memory, or mapped from a file without a name."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

PIECE = 2**20  # elements processed at a time: 4 MB of float32, which stay in cache between passes
GROWTH = 32  # rows allocated at a time without a capacity; pages are committed only when written
# NumPy has no bfloat16: its bits are mapped as int16
DTYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.int16}
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}


class RowStore:
    """Rows of n elements by a running index, of which the newest ``slots`` are kept.

    The file of mapped rows never has a name.  So no other run can pick it up, nothing can truncate it while it is
    mapped, and it disappears with the process, however that ends.

    Args:
        n: Elements of a row.
        dtype: float32, float64 or bfloat16.
        slots: Rows kept, or None for all.
        folder: Folder of the file that rows are mapped from, or None for memory.
    """

    def __init__(self, n: int, dtype: torch.dtype, slots: int | None, *, folder: Path | None = None) -> None:
        self.n, self.dtype, self.slots = n, dtype, slots
        self._file: IO[bytes] | None = None
        if folder is not None and n > 0:  # an empty file cannot be mapped
            self._file = TemporaryFile(dir=folder, prefix="koopman-")  # noqa: SIM115  # stays open as long as the store
            weakref.finalize(self, self._file.close)
        self._blocks: list[Tensor] = []
        self._block_rows = GROWTH if slots is None else slots

    def __getstate__(self) -> dict[str, Any]:  # a copy is held in memory
        return {**vars(self), "_file": None, "_blocks": [block.clone() for block in self._blocks]}

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return self.n * self.dtype.itemsize

    def row(self, index: int) -> Tensor:
        """Return a view (n,) of a row; allocate storage as needed."""
        block, row = self._place(index)
        while block >= len(self._blocks):
            self._blocks.append(self._new_block())
        return self._blocks[block][row]

    def segments(self, start: int, stop: int) -> list[Tensor]:
        """Return views (rows, n) of rows ``start`` … ``stop − 1``, in order of time."""
        found = []
        while start < stop:
            block, row = self._place(start)
            rows = min(self._block_rows - row, stop - start)
            found.append(self._blocks[block][row : row + rows])
            start += rows
        return found

    def _place(self, index: int) -> tuple[int, int]:
        return divmod(index if self.slots is None else index % self.slots, self._block_rows)

    @torch.inference_mode(False)  # rows made in inference mode could not be written outside of it
    def _new_block(self) -> Tensor:
        shape = (self._block_rows, self.n)
        if self._file is None:
            return torch.empty(shape, dtype=self.dtype)
        size = self._block_rows * self.row_bytes
        offset = len(self._blocks) * size
        self._file.truncate(offset + size)
        if hasattr(os, "posix_fallocate"):  # raises here if the disk is full, instead of crashing at the first write
            os.posix_fallocate(self._file.fileno(), offset, size)
        mapped = np.memmap(self._file, dtype=DTYPES[self.dtype], mode="r+", offset=offset, shape=shape)
        rows = torch.from_numpy(mapped)
        return rows.view(torch.bfloat16) if self.dtype == torch.bfloat16 else rows


def sum_of_bits(values: Tensor) -> int:
    """Return the sum of the bits of contiguous elements, a fingerprint; those of parts add up."""
    pieces = torch.split(values.view(BITS[values.dtype]), PIECE)  # since `sum` copies them, as int64
    return sum(int(piece.sum(dtype=torch.int64)) for piece in pieces) % 2**64
