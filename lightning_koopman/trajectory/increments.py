"""The oldest snapshot of a trajectory, the increments after it, and their Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_koopman._types import Array
from lightning_koopman.dmd.gram import CHUNKS, merge_oldest, power_of_two, row_products, wide_chunks
from lightning_koopman.trajectory.rows import PIECE, RowStore, sum_of_bits

TALLY = 3  # entries after the products in a message: a snapshot's size and two halves of its fingerprint
HALF = 2**32
STALE = 0.25  # recompute a base's products once its square falls below this fraction of its former peak

ReadRow = Callable[[int, Tensor], bool]


class Increments:
    """Stores snapshots of n elements as the oldest one and the increments after it.

    Each increment is measured from the sum of what is stored before it, so that rounding errors do not accumulate.  A
    snapshot is recorded in three steps: :meth:`write` stores its increment, :meth:`message` computes what it adds to
    the Gram matrix (which processes may sum), and :meth:`commit` adds that.

    Args:
        n: Elements of a snapshot.
        capacity: Snapshots kept, or None for all.
        dtype: Type of the increments; the oldest and the newest snapshot are float64 with float64, else float32.
        folder: Folder of the files that rows are mapped from, or None for memory.
        scaled: Store elements in a unit set by the first snapshot, so that their squares do not over- or underflow; for
            float64 in a single process.

    Attributes:
        unit: Power of two by which elements are divided before they are stored.
        gram: Array (time, time): Gram matrix of the oldest snapshot and the increments.
        first: Index of the oldest snapshot kept, which is the number of snapshots dropped.
        total: Elements of a snapshot, over all processes.
        marks: Fingerprints of the snapshots.
    """

    def __init__(
        self, n: int, capacity: int | None, dtype: torch.dtype, folder: Path | None, *, scaled: bool = False
    ) -> None:
        self.n, self.capacity = n, capacity
        # the increments after the oldest snapshot, and one that is not committed yet
        self.rows = RowStore(n, dtype, capacity, folder=folder)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._ends = RowStore(n, wide, 2, folder=folder)
        self.gram: Array = np.zeros((0, 0))
        self.first, self.total = 0, 0
        self.unit, self._scaled = 1.0, scaled
        self.marks: list[int] = []
        self._peak = 0.0  # square of the largest base since its products were last computed

    def __len__(self) -> int:
        return len(self.gram)

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshots held."""
        return max(0, len(self) - 1) * self.rows.row_bytes + 2 * self._ends.row_bytes

    @property
    def oldest(self) -> Tensor:
        """The oldest snapshot (n,)."""
        return self._ends.row(0)

    @property
    def newest(self) -> Tensor:
        """The newest snapshot (n,)."""
        return self._ends.row(1)

    def segments(self) -> list[Tensor]:
        """Return views (rows, n) of the oldest snapshot and the increments after it, in order of time."""
        return [self.oldest[None], *self.rows.segments(self.first + 1, self.first + len(self))]

    def snapshots(self) -> Tensor:
        """Return a copy (time, n) of the snapshots."""
        found = torch.cat([each.to(self.oldest.dtype) for each in self.segments()])[: len(self)]
        for before, after in pairwise(found):
            after += before
        return found

    def combine(self, weights: Tensor) -> Tensor:
        """Return combinations (s, n) of the snapshots with weights (s, time), summed in float64."""
        rows = weights.flip(1).cumsum(1).flip(1)  # an increment is part of all later snapshots
        combined = torch.empty(rows.shape[0], self.n, dtype=self.newest.dtype)
        start = 0
        for chunk in wide_chunks(self.segments(), CHUNKS):
            combined[:, start : start + chunk.shape[1]] = rows @ chunk
            start += chunk.shape[1]
        combined *= self.unit
        return combined

    # -- recording ----------------------------------------------------------------------------------------------------

    def write(self, parts: Sequence[Tensor]) -> None:
        """Write a snapshot as an increment; the first one is stored as it is."""
        if self._scaled and not self.gram.any():
            peak = max((float(part.double().abs().max()) for part in parts if part.numel()), default=0.0)
            self.unit = power_of_two(peak, 250)  # later snapshots may be far larger or far smaller than the first
        target = self.rows.row(self.first + len(self)) if len(self) else self.oldest
        start = 0
        for part in parts:
            flat = part.reshape(-1)
            for piece in torch.split(flat, PIECE):
                where = slice(start, start + piece.numel())
                piece = piece.to(self.newest) / self.unit if self._scaled else piece
                target[where].copy_(piece.to(self.newest) - self.newest[where] if len(self) else piece)
                start += piece.numel()

    def message(self, size: float) -> Array:
        """Compute what the written snapshot adds: its products, a stale base's new products, and a tally."""
        stop = self.first + len(self)
        if not len(self):
            products, mark = row_products([], self.oldest), sum_of_bits(self.oldest)
        else:
            staged = self.rows.row(stop)
            products = row_products(self.segments(), staged)
            # products of the next base that are summed from older ones may lose digits to cancellation
            if len(self) == self.capacity and self.gram[:2, :2].sum() < STALE * self._peak:
                later = self.rows.segments(self.first + 2, stop + 1)
                products = np.append(products, row_products(later, self.oldest, self.rows.row(self.first + 1)))
            pieces = zip(torch.split(self.newest, PIECE), torch.split(staged, PIECE), strict=True)
            mark = sum(sum_of_bits(before + added) for before, added in pieces) % 2**64
        return np.concatenate([products, [size, *divmod(mark, HALF)]])

    def commit(self, message: Array) -> bool:
        """Record the written snapshot, given its message; return whether its elements were finite."""
        count, full = len(self) + 1, len(self) == self.capacity
        products, (size, high, low) = message[:-TALLY], message[-TALLY:]
        if not np.isfinite(products).all():  # any NaN of a snapshot appears in its products
            return False
        gram = np.empty((count, count))
        gram[:-1, :-1] = self.gram
        gram[-1] = gram[:, -1] = products[:count]
        if count == 1:
            self.newest.copy_(self.oldest)
            self._peak = float(gram[0, 0])
        else:
            _add(self.newest, self.rows.row(self.first + count - 1))
        if full:
            gram = merge_oldest(gram, 1)
            self.first += 1
            _add(self.oldest, self.rows.row(self.first))
            self._peak = max(self._peak, float(gram[0, 0]))
            if len(products) > count:
                gram[0] = gram[:, 0] = np.roll(products[count:], 1)  # `row_products` puts the vector's own square last
                self._peak = float(gram[0, 0])
        self.gram, self.total = gram, int(size)
        self.marks = [*self.marks, _mark(np.array([high, low]))][-len(gram) :]
        return True

    # -- saving and loading -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the snapshots, as tensors and numbers."""
        return {
            "total": self.total,
            "first": self.first,
            "peak": self._peak,
            "unit": self.unit,
            "gram": torch.from_numpy(self.gram.copy()),
            "marks": torch.tensor([mark - 2**64 if mark >= 2**63 else mark for mark in self.marks], dtype=torch.int64),
        }

    def read(self, first: int, held: int, start: int, read: ReadRow) -> Array:
        """Read the snapshot at ``start`` and the increments after it; keep ``held`` snapshots from ``first`` on.

        Returns:
            Array (held, 2): halves of the fingerprints read, which add up over processes; NaN if reading failed.
        """
        unread = np.full((held, 2), np.nan)
        if not held or not read(start, self.newest):
            return unread
        marks, skipped = unread.copy(), torch.empty(self.n, dtype=self.rows.dtype)
        for index in range(start, first + held):
            row = self.rows.row(index) if index > first else skipped
            if index > start:
                if not read(index, row):
                    return unread
                _add(self.newest, row)
            if index == first:
                self.oldest.copy_(self.newest)
            if index >= first:
                marks[index - first] = divmod(sum_of_bits(self.newest), HALF)
        return marks

    def load_state_dict(self, state: dict[str, Any], marks: Array) -> None:
        """Restore :meth:`state_dict` if the fingerprints read match it; otherwise hold nothing."""
        found = [_mark(each) for each in marks]
        if not found or found != [int(mark) % 2**64 for mark in state["marks"]]:
            return
        self.first, self.gram = int(state["first"]), state["gram"].numpy().copy()
        self.total, self._peak, self.marks = int(state["total"]), float(state["peak"]), found
        self.unit = float(state["unit"])


def check_state(state: dict[str, Any]) -> int:
    """Return how many snapshots a state holds; raise ValueError, before allocating memory, unless its parts agree."""
    try:
        gram, marks, first, start = state["gram"], state["marks"], int(state["first"]), int(state["start"])
        held, limit = len(gram), math.inf if state["capacity"] is None else int(state["capacity"])
        int(state["n"]), int(state["total"]), float(state["peak"]), float(state["unit"])
        whole = isinstance(gram, Tensor) and isinstance(marks, Tensor)
        whole = whole and state["dtype"] in ("float32", "float64", "bfloat16") and int(state["sketch"]) >= 0
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"state was not returned by `save`: {type(error).__name__}: {error}.") from error
    if not whole or gram.shape != (held, held) or marks.shape != (held,) or held > limit or not 0 <= start <= first:
        raise ValueError(f"the saved state is damaged: its parts do not match its {held} snapshots.")
    if not torch.isfinite(gram).all():
        raise ValueError("the saved state is damaged: its Gram matrix has NaN or infinite values.")
    return held


def shortened(state: dict[str, Any], window: int | None) -> dict[str, Any]:
    """Return a saved state with its newest snapshots only, as a smaller window would have saved it."""
    drop = 0 if window is None else max(0, check_state(state) - window)
    gram = torch.from_numpy(merge_oldest(state["gram"].numpy(), drop))
    first, marks = int(state["first"]) + drop, state["marks"][drop:]
    return {**state, "capacity": window, "first": first, "gram": gram, "marks": marks}


def _mark(halves: Array) -> int:
    """Return a fingerprint from the sums of its upper and lower halves; −1 if a part is missing."""
    return -1 if np.isnan(halves).any() else (int(halves[0]) * HALF + int(halves[1])) % 2**64


def _add(target: Tensor, row: Tensor) -> None:
    """Add an increment to a snapshot in place, rounded as in :meth:`Increments.message`."""
    for piece, added in zip(torch.split(target, PIECE), torch.split(row, PIECE), strict=True):
        piece += added
