"""The streaming update: what a new snapshot adds to the Gram matrix of the increments, in one pass over the rows.

The Gram matrix of the increments changes in two rows only when a snapshot is appended and the oldest has left: that of
the oldest snapshot, to which what left is added, and that of the newest increment.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_koopman._types import Array
from lightning_koopman.dmd.blas import single_blas_thread
from lightning_koopman.trajectory._compiled import kernel

LEAST = 2**17  # numbers below which another thread costs more than it saves
WIDTH = 4096  # columns that NumPy works on at a time: 100 rows of float32 are 1.6 MB, about the second-level cache
PRECISE = 2**19  # numbers below which NumPy works in float64 throughout: that takes milliseconds then
Part = Callable[[int, int], Array]
AnyArray = npt.NDArray[Any]


def border_products(
    segments: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    step: Tensor | None = None,
    slab: int | None = None,
    release: Callable[[int, int], None] | None = None,
) -> Array:
    """Inner products of the oldest snapshot and of the newest increment with every increment.

    The products with snapshots are accumulated in float64 and then differenced: that loses log10(‖w‖/‖e‖) of its 16
    digits, as many as storing the snapshots in float32 has already taken from its 7.

    Args:
        segments: CPU tensors (rows_i, n) in order of time: snapshots in float32 or float64; or with ``base`` their
            increments in bfloat16, from the second one on.
        base: The oldest snapshot, float32 (n,), where the segments hold increments.
        step: Increment (n,) of the oldest snapshot on top of the base, if that is one older.
        slab: Columns to go through at a time, where the rows are mapped from a file.
        release: Called with each slab's first and last column when it is done.

    Returns:
        Float64 array (2, time): with the oldest snapshot, which is the first increment, and with the newest increment.
    """
    columns = segments[0].shape[1] if base is None else base.shape[0]
    count = sum(len(segment) for segment in segments) + (base is not None)
    double = segments[0].dtype == torch.float64 if base is None else False
    compiled = _compiled(segments, base, step)
    part = compiled or _eager(segments, base, step, narrow=columns >= PRECISE and not double)
    found = np.zeros((2, count))
    width = slab or max(1, columns)
    # NumPy's own threads would get in the way of ours
    with np.errstate(invalid="ignore"), nullcontext() if compiled else single_blas_thread():
        for start in range(0, columns, width):
            stop = min(start + width, columns)
            found += _in_threads(part, start, stop)
            if release is not None:
                release(start, stop)
    return found


def _in_threads(part: Part, start: int, stop: int) -> Array:
    """The products over some columns, shared out to as many threads as PyTorch uses."""
    count = max(1, min(torch.get_num_threads(), (stop - start) // LEAST))

    def quiet(left: int, right: int) -> Array:
        with np.errstate(
            invalid="ignore", over="ignore"
        ):  # what is not finite shows in the sums; each thread has its own
            return part(left, right)

    if count == 1:
        return quiet(start, stop)
    cuts = [start + (stop - start) * index // count // 16 * 16 for index in range(count)] + [stop]
    cuts[0] = start
    with ThreadPoolExecutor(count) as pool:
        parts: Array = np.sum(list(pool.map(quiet, cuts[:-1], cuts[1:])), axis=0)  # in order: the same sum every time
        return parts


def _compiled(segments: Sequence[Tensor], base: Tensor | None, step: Tensor | None) -> Part | None:
    """The products by the C kernel, or None where there is none for these rows."""
    library = kernel()
    wanted = torch.float32 if base is None else torch.bfloat16
    if library is None or any(segment.dtype != wanted for segment in segments):
        return None
    rows = [row.data_ptr() for segment in segments for row in segment]
    pointers = (ctypes.c_void_p * max(1, len(rows)))(*rows)

    def part(start: int, stop: int) -> Array:
        out = np.zeros(2 * len(rows) + 1)
        where = ctypes.c_int64(start), ctypes.c_int64(stop), out.ctypes.data_as(ctypes.c_void_p)
        products = out[:-1].reshape(2, len(rows))
        if base is None:
            library.border_of_snapshots(pointers, ctypes.c_int64(len(rows)), *where)
            return np.diff(products, prepend=0.0)
        below = ctypes.c_void_p(base.data_ptr()), ctypes.c_void_p(None if step is None else step.data_ptr())
        library.border_of_increments(pointers, ctypes.c_int64(len(rows)), *below, *where)
        return _around_base(products, out[-1])

    return part


def _around_base(products: Array, square: float) -> Array:
    """Both rows of the Gram matrix, from the products of the increments with the base and with the newest of them."""
    across = products[0, -1] if products.size else square
    return np.concatenate([np.array([[square], [across]]), products], axis=1)


def _eager(segments: Sequence[Tensor], base: Tensor | None, step: Tensor | None, narrow: bool) -> Part:
    """The products by NumPy: increments of a block of columns in float32, their products summed up in float64."""
    arrays = [_as_array(segment) for segment in segments]
    below = None if base is None else base.numpy()
    above = None if step is None else _as_array(step)
    rows = sum(map(len, arrays))
    count = rows + (base is not None)

    def part(start: int, stop: int) -> Array:
        found = np.zeros((2, count))
        buffer = np.empty((count, WIDTH), dtype=np.float32 if narrow else np.float64)
        for left in range(start, stop, WIDTH):
            right = min(left + WIDTH, stop)
            block = buffer[:, : right - left]
            if below is not None:
                oldest = below[left:right]
                block[0] = oldest if above is None else oldest + _widened(above[left:right])
            _fill(block[count - rows :], [array[:, left:right] for array in arrays])
            found[0] += block @ block[0]
            found[1] += block @ block[-1]
        return found

    return part


def _fill(block: AnyArray, arrays: Sequence[AnyArray]) -> None:
    """Write the increments of the same columns of all rows, oldest first, into a block (rows, columns)."""
    row, newest = 0, None
    for values in arrays:
        rows = block[row : row + len(values)]
        row += len(values)
        if values.dtype == np.uint16:
            rows[:] = _widened(values)
            continue
        rows[0] = values[0]
        if newest is not None:
            rows[0] -= newest
        np.subtract(values[1:], values[:-1], out=rows[1:], dtype=rows.dtype)
        newest = values[-1]


def _widened(values: AnyArray) -> AnyArray:
    """Float32 from the bits of bfloat16, which are its upper half."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def _as_array(segment: Tensor) -> AnyArray:
    if segment.dtype == torch.bfloat16:
        bits: AnyArray = segment.view(torch.int16).numpy()
        return bits.view(np.uint16)
    array: AnyArray = segment.numpy()
    return array
