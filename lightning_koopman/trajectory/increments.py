"""The increments of a trajectory on top of its oldest snapshot, and the Gram matrix that they add up to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_koopman._checks import real_array
from lightning_koopman._types import Array
from lightning_koopman.dmd.gram import CHUNKS, merge_oldest, power_of_two, row_products, wide_chunks
from lightning_koopman.trajectory.rows import RowStore, sum_of_bits

TALLY = 3  # numbers beside the products in a message: those of a snapshot, and two halves of its fingerprint
HALF = 2**32
PIECE = 2**20  # numbers worked on at a time: 4 MB, which the caches hold from one pass to the next
STALE = 0.25  # a base whose square has fallen below this share of what its products were summed from needs new ones

ReadRow = Callable[[int, Tensor], bool]


class Increments:
    """Snapshots of n numbers as the oldest of them and the increments after it.

    Each increment is measured from what those before it add up to, so that roundings do not add up.  A new one is
    taken in in three parts: :meth:`write` it, let :meth:`message` say what it adds to the Gram matrix, which processes
    may sum, and :meth:`commit` that.

    Args:
        n: Numbers in a snapshot.
        capacity: Snapshots kept, or None for all.
        dtype: Of the increments; the snapshots at both ends are float64 with float64, else float32.
        folder: Folder of the files that they are mapped from, or None for memory.
        scaled: Whether numbers are kept in a unit that the first snapshot decides on, so that no square of theirs is
            too large or too small: for float64, where no other process holds a part.

    Attributes:
        unit: A power of two.
        gram: Array (time, time), of the oldest snapshot and the increments.
        first: Snapshots that have left: the oldest one kept has this index.
        total: Numbers in a snapshot, in all processes.
        marks: Fingerprints of the snapshots.
    """

    def __init__(
        self, n: int, capacity: int | None, dtype: torch.dtype, folder: Path | None, *, scaled: bool = False
    ) -> None:
        self.n, self.capacity = n, capacity
        # all increments but that of the oldest snapshot, and one that is not yet taken in
        self.rows = RowStore(n, dtype, capacity, folder=folder)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._ends = RowStore(n, wide, 2, folder=folder)
        self.gram: Array = np.zeros((0, 0))
        self.first, self.total = 0, 0
        self.unit, self._scaled = 1.0, scaled
        self.marks: list[int] = []
        self._peak = 0.0  # square of the largest base since the products with it were computed

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
        """Views (rows, n) of the oldest snapshot and of the increments after it, in order of time."""
        return [self.oldest[None], *self.rows.segments(self.first + 1, self.first + len(self))]

    def snapshots(self) -> Tensor:
        """Copy (time, n) of the snapshots."""
        found = torch.empty(len(self), self.n, dtype=self.oldest.dtype)
        for index in range(len(self)):
            if index == 0:
                found[0] = self.oldest
            else:
                torch.add(found[index - 1], self.rows.row(self.first + index).to(found), out=found[index])
        return found

    def combine(self, weights: Tensor) -> Tensor:
        """Combinations (s, n) of the snapshots with weights (s, time), in float64, rounded to the snapshots' type."""
        rows = weights.flip(1).cumsum(1).flip(1)  # an increment is part of all later snapshots
        combined = torch.empty(rows.shape[0], self.n, dtype=self.newest.dtype)
        start = 0
        for chunk in wide_chunks(self.segments(), CHUNKS):
            combined[:, start : start + chunk.shape[1]] = rows @ chunk
            start += chunk.shape[1]
        combined *= self.unit
        return combined

    # -- taking in ----------------------------------------------------------------------------------------------------

    def write(self, parts: Sequence[Tensor]) -> None:
        """Write a snapshot as the increment that it adds; the first one as what the others lie upon."""
        if self._scaled and not self.gram.any():
            self.unit = _unit(parts)
        target = self.rows.row(self.first + len(self)) if len(self) else self.oldest
        start = 0
        for part in parts:
            flat = part.reshape(-1)
            for piece in (flat[where] for where in _slices(flat.numel())):
                where = slice(start, start + piece.numel())
                piece = piece.to(self.newest) / self.unit if self._scaled else piece
                target[where].copy_(piece.to(self.newest) - self.newest[where] if len(self) else piece)
                start += piece.numel()

    def message(self, size: float) -> Array:
        """What the written snapshot adds: its products, new ones of the oldest where they are needed, and a tally."""
        stop = self.first + len(self)
        if not len(self):
            products, mark = row_products([], self.oldest), sum_of_bits(self.oldest)
        else:
            staged = self.rows.row(stop)
            products = row_products(self.segments(), staged)
            if len(self) == self.capacity and self._base_is_stale():
                later = self.rows.segments(self.first + 2, stop + 1)
                products = np.append(products, row_products(later, self.oldest, self.rows.row(self.first + 1)))
            mark = sum(sum_of_bits(self.newest[where] + staged[where]) for where in _slices(len(staged))) % 2**64
        return np.concatenate([products, [size, *divmod(mark, HALF)]])

    def commit(self, message: Array) -> bool:
        """Take the written snapshot in, given its message; returns whether its numbers were finite."""
        count, full = len(self) + 1, len(self) == self.capacity
        message = as_message(message, count + TALLY, *([2 * count - 1 + TALLY] if full else []))
        products, (size, high, low) = message[:-TALLY], message[-TALLY:]
        if not np.isfinite(products).all():  # every NaN of a snapshot ends up in the products
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
                gram[0] = gram[:, 0] = np.roll(products[count:], 1)  # the vector's own square comes last
                self._peak = float(gram[0, 0])
        self.gram, self.total = gram, int(size)
        self.marks = [*self.marks, _mark(np.array([high, low]))][-len(gram) :]
        return True

    def _base_is_stale(self) -> bool:
        """Whether the next base's products, summed from those of what left, would have lost digits to cancellation."""
        return bool(self.gram[:2, :2].sum() < STALE * self._peak)

    # -- keeping ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All but the snapshots; tensors and numbers."""
        return {
            "total": self.total,
            "first": self.first,
            "peak": self._peak,
            "unit": self.unit,
            "gram": torch.from_numpy(self.gram.copy()),
            "marks": torch.tensor([mark - 2**64 if mark >= 2**63 else mark for mark in self.marks], dtype=torch.int64),
        }

    def read(self, first: int, held: int, start: int, read: ReadRow) -> Array:
        """Read the snapshot at ``start`` and the increments after it, up to those held from ``first`` on.

        Returns:
            Halves (held, 2) of the fingerprints of what was read, NaN where that failed: they add up over processes.
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
        """Take up :meth:`state_dict`, if what was read has its fingerprints; else nothing is held."""
        found = [_mark(each) for each in marks]
        if not found or found != [int(mark) % 2**64 for mark in state["marks"]]:
            return
        self.first, self.gram = int(state["first"]), state["gram"].numpy().copy()
        self.total, self._peak, self.marks = int(state["total"]), float(state["peak"]), found
        self.unit = float(state["unit"])


def _unit(parts: Sequence[Tensor]) -> float:
    """The power of two in which the first snapshot is about 2^−250: what follows may be far larger, or far smaller."""
    peak = max((float(part.abs().max()) for part in parts if part.numel()), default=0.0)
    return power_of_two(peak, 250)


def as_message(message: object, *lengths: int) -> Array:
    """A message of one of some lengths; raise ValueError or TypeError if it is none."""
    found = real_array("message", message)
    if found.ndim != 1 or len(found) not in lengths:
        raise ValueError(
            f"message has the shape {found.shape}, not ({lengths[0]},): give what `message` returned for what was "
            "staged last, or its sum over all processes."
        )
    return found


def check_state(state: dict[str, Any]) -> int:
    """Snapshots that a state holds; raise ValueError unless its parts agree, before anything of their size is made."""
    try:
        gram, marks, first, start = state["gram"], state["marks"], int(state["first"]), int(state["start"])
        held, limit = len(gram), math.inf if state["capacity"] is None else int(state["capacity"])
        int(state["n"]), int(state["total"]), float(state["peak"]), float(state["unit"])
        whole = isinstance(gram, Tensor) and isinstance(marks, Tensor)
        whole = whole and state["dtype"] in ("float32", "float64", "bfloat16") and int(state["sketch"]) >= 0
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"state is none that `save` returned: {type(error).__name__}: {error}.") from error
    if not whole or gram.shape != (held, held) or marks.shape != (held,) or held > limit or not 0 <= start <= first:
        raise ValueError(f"the saved state holds {held} snapshots, but its parts do not fit that: it is damaged.")
    if not torch.isfinite(gram).all():
        raise ValueError("the saved state has a Gram matrix with NaN or infinite values: it is damaged.")
    return held


def shortened(state: dict[str, Any], window: int | None) -> dict[str, Any]:
    """A saved state as one with another window would have saved it: with its newest snapshots only."""
    drop = 0 if window is None else max(0, check_state(state) - window)
    gram = torch.from_numpy(merge_oldest(state["gram"].numpy(), drop))
    first, marks = int(state["first"]) + drop, state["marks"][drop:]
    return {**state, "capacity": window, "first": first, "gram": gram, "marks": marks}


def _mark(halves: Array) -> int:
    """A fingerprint from the sums of its upper and lower half; −1 where a part of it is missing."""
    return -1 if np.isnan(halves).any() else (int(halves[0]) * HALF + int(halves[1])) % 2**64


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE))


def _add(target: Tensor, row: Tensor) -> None:
    """Add an increment to a snapshot in place, rounded as everywhere."""
    for where in _slices(len(target)):
        target[where] += row[where]
