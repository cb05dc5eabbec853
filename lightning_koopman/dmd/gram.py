r"""From snapshots to the small factor ``R`` from which every spectrum is computed.

Dynamic mode decomposition does not need the snapshots :math:`W` (time, n) themselves, only some ``R`` with
:math:`R^\top R = W W^\top`.  Any two matrices with equal Gram matrices have the same Ritz values, residuals and
coefficients.  For a network, n is millions, but R is at most (time, time).

A Gram matrix of the raw weights is useless in floating point, because successive weights differ only in the third or
fourth digit.  The Gram matrix of the *increments* :math:`e_t = w_t - w_{t-1}` (with :math:`e_0 = w_0`) in float64 is
accurate: Cholesky's error is relative to each increment's own norm.  A cumulative sum over the columns of its factor
then gives the factor of the snapshots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.linalg
import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor

from lightning_koopman._types import Array
from lightning_koopman.dmd.blas import single_blas_thread

CHUNK = 8192  # columns: 100 rows of float64 are 6.5 MB, which stays in the L2 and L3 caches
CHUNKS = 64  # minimum number: two float64 buffers of a chunk then take 1/16 of the float32 snapshots
BLOCK = 2**21  # bytes of a block of float64 rows: about the L2 cache
SUMMED = 1024  # columns whose products are summed in float32; minimum columns of a float64 block
WIDEST = 2**18  # columns of a block of float32 rows, which are read in place
PRECISE = 2**19  # with fewer columns, float64 throughout costs milliseconds
EXACT_SIZE = 2**20  # up to this many elements, a Householder QR costs milliseconds, so accuracy is free
VANISHED = 1e-14  # relative norm below which a snapshot is rounding error
EXACT_TOL = 1e-6  # a Gram matrix squares the condition number: finer rank decisions need QR


def power_of_two(peak: float, spare: int = 0) -> float:
    """Return the power of two in which numbers up to ``peak`` are below 2^−spare; 1 if ``peak`` is 0 or infinite."""
    return 2.0 ** min(math.frexp(peak)[1] + spare, 1000) if 0 < peak < math.inf else 1.0


def factor(snapshots: Tensor, *, exact: bool = False) -> Array:
    r"""Return a factor ``R`` with :math:`R^\top R = W W^\top` of the snapshots ``W``.

    Args:
        snapshots: Real tensor (time, n), float32 or float64, on any device: one row per snapshot.
        exact: Factor by blocked Householder QR in float64 (on the CPU) instead of through the increment Gram matrix.

    Returns:
        Float64 array (r, time), r ≤ time, upper trapezoidal: column t represents snapshot t.

    Raises:
        ValueError: If a snapshot is not finite.
    """
    small = _blocked_qr(snapshots) if exact else increment_gram(snapshots)
    if not np.isfinite(small).all():  # any NaN of the snapshots appears in the small matrix
        raise ValueError("snapshots holds NaN or infinite values: cut the trajectory before the first of them.")
    return small if exact else factor_from_increment_gram(small)


def increment_gram(snapshots: Tensor) -> Array:
    """Return the float64 Gram matrix (time, time) of the increments of snapshots (time, n), by chunks of columns."""
    rows = snapshots.shape[0]
    if snapshots.device.type != "cpu":
        # one matrix product per chunk, on the device that holds the snapshots
        gram = torch.zeros(rows, rows, dtype=torch.float64, device=snapshots.device)
        for increments in _increment_chunks(snapshots, widest=2**18):
            gram.addmm_(increments, increments.T)
        return gram.cpu().numpy()
    upper = np.zeros((rows, rows), order="F")
    with single_blas_thread():
        for increments in _increment_chunks(snapshots):
            upper = dsyrk(1.0, increments.numpy().T, beta=1.0, c=upper, trans=1, overwrite_c=1)
    return upper + np.triu(upper, 1).T


def _increment_chunks(snapshots: Tensor, widest: int = CHUNK) -> Iterator[Tensor]:
    """Yield the float64 increments of the snapshots, a chunk of columns at a time, in one reused buffer."""
    increments = torch.empty(0)
    for wide in wide_chunks([snapshots], CHUNKS, widest):
        if increments.shape != wide.shape:
            increments = torch.empty_like(wide)
        increments[0].copy_(wide[0])
        torch.sub(wide[1:], wide[:-1], out=increments[1:])
        yield increments


def wide_chunks(segments: list[Tensor], chunks: int, widest: int = CHUNK) -> Iterator[Tensor]:
    """Yield the concatenated segments in float64, a chunk of columns at a time, in one reused buffer."""
    rows = sum(segment.shape[0] for segment in segments)
    columns = segments[0].shape[1]
    width = max(1, min(widest, -(-columns // chunks) if columns > 2**14 else columns))
    buffer = torch.empty(0)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        if buffer.shape != (rows, stop - start):
            buffer = torch.empty(rows, stop - start, dtype=torch.float64, device=segments[0].device)
        row = 0
        for segment in segments:
            buffer[row : row + segment.shape[0]].copy_(segment[:, start:stop])
            row += segment.shape[0]
        yield buffer


def row_products(segments: Sequence[Tensor], *addends: Tensor) -> Array:
    """Return the inner products of a vector with stored rows, and with itself: one new row of a Gram matrix.

    Takes one pass over the rows by BLAS, in blocks of columns.  Computes in float64 below 524,288 columns, or for
    float64 input; otherwise in float32, with the sums over each 1024 columns accumulated in float64.

    Args:
        segments: CPU tensors (rows_i, n), of any dtype.
        *addends: CPU tensors (n,) whose sum is the vector.

    Returns:
        Float64 array (rows + 1,), the vector's squared norm last.
    """
    columns, rows = addends[0].shape[0], sum(len(segment) for segment in segments) + 1
    found = torch.zeros(rows, dtype=torch.float64)
    if columns < PRECISE or any(each.dtype == torch.float64 for each in (*addends, *segments)):
        vector = torch.stack([each.double() for each in addends]).sum(dim=0)
        for chunk in wide_chunks([*segments, vector[None]], 1, max(SUMMED, BLOCK // (8 * rows))):
            found += chunk.mv(chunk[-1])
        return found.numpy()
    width = WIDEST if all(segment.dtype == torch.float32 for segment in segments) else CHUNK  # converted in the cache
    for start in range(0, columns, width):
        where, row = slice(start, start + width), 0
        vector = torch.stack([each[where].float() for each in addends]).sum(dim=0)
        for segment in segments:
            found[row : row + len(segment)] += _products(segment[:, where].float(), vector)
            row += len(segment)
        exact = vector.double()  # one long sum in float32 would have a relative error of 1e-6
        found[-1] += exact.dot(exact)
    return found.numpy()


def _products(rows: Tensor, vector: Tensor) -> Tensor:
    """Return the products (r,) of float32 rows (r, n) with a vector (n,), summed in float64 from ``SUMMED`` columns on.

    The sums over so many columns are a single batch of products, which costs no more than one product of all columns.
    """
    count = len(vector) // SUMMED
    whole = count * SUMMED
    pieces = rows[:, :whole].view(len(rows), count, SUMMED).permute(1, 2, 0)
    found = torch.bmm(vector[:whole].view(count, 1, SUMMED), pieces).sum(dim=(0, 1), dtype=torch.float64)
    return found + rows[:, whole:].mv(vector[whole:])


@single_blas_thread()
def factor_from_increment_gram(gram: Array) -> Array:
    """Return the factor ``R`` (r, time) of the snapshots from the Gram matrix (time, time) of their increments."""
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    if not len(gram):
        return np.zeros((0, 0))
    scale = np.where(norms > 0, norms, 1.0)
    # scale to a unit diagonal: Cholesky does not need it, the eigendecomposition below does
    scaled = gram / np.outer(scale, scale)
    try:
        root = scipy.linalg.cholesky(scaled, check_finite=False)
    except np.linalg.LinAlgError:
        # dependent increments (constant weights, an exact period): use the nearest positive semidefinite Gram matrix
        values, vectors = np.linalg.eigh(scaled)
        noise = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
        root = np.sqrt(np.where(values > noise, values, 0.0))[:, None] * vectors.T
    found = np.cumsum(root * scale, axis=1)
    # a snapshot negligible beside the increments before it has no correct digit
    found[:, np.linalg.norm(found, axis=0) < VANISHED * np.maximum.accumulate(norms)] = 0.0
    return found


def merge_oldest(gram: Array, count: int) -> Array:
    """Return the increment Gram matrix without the oldest ``count`` snapshots; increments 0 … count become the base."""
    merged = gram[count:, count:].copy()
    base = gram[: count + 1].sum(axis=0)
    merged[0, :] = merged[:, 0] = base[count:]
    merged[0, 0] = base[: count + 1].sum()
    return merged


def hankel(factor: Array, delays: int) -> Array:
    """Return the factor of the delay-embedded snapshots ``[w_t, …, w_{t+delays-1}]`` from that of the plain ones.

    Stacked, shifted factors have the Gram matrix of the stacked snapshots, so the snapshots themselves are not needed.

    Args:
        factor: Array (r, time).
        delays: Number of consecutive snapshots in one embedded snapshot, 1 ≤ delays ≤ time.

    Returns:
        Array (r', time − delays + 1).
    """
    if delays == 1:
        return factor
    columns = factor.shape[1] - delays + 1
    stacked = np.concatenate([factor[:, shift : shift + columns] for shift in range(delays)])
    return stacked if stacked.shape[0] <= columns else triangle(stacked)


def triangle(matrix: Array) -> Array:
    """Return the triangular factor R (min(r, c), c) of a Householder QR of an array (r, c)."""
    return np.asarray(np.linalg.qr(matrix, mode="r"))


def _blocked_qr(snapshots: Tensor) -> Array:
    """Return R of a float64 Householder QR of ``snapshots.T``, block by block (tall-skinny QR) in bounded memory."""
    rows, columns = snapshots.shape
    width = max(2 * rows, EXACT_SIZE // max(rows, 1))
    root: Array = np.empty((0, rows))
    for start in range(0, columns, width):
        block = snapshots[:, start : start + width].T.to(device="cpu", dtype=torch.float64).numpy()
        root = triangle(np.concatenate([root, block]))
    return root
