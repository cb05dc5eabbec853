"""Independent oracles: Drmač's own DMD in SciPy's LAPACK, Sobolev sums term by term, zeros for removed channels."""

from __future__ import annotations

import cmath
import copy
import ctypes
import itertools
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from torch import nn


@dataclass(frozen=True)
class LapackDMD:
    """What ``dgedmd`` returns: Ritz values (k,) and their residuals (k,)."""

    eigenvalues: np.ndarray
    residuals: np.ndarray


@cache
def lapack() -> ctypes.CDLL | None:
    """Return the LAPACK bundled with SciPy's wheel, or None if SciPy was built against another one."""
    for path in sorted(Path(scipy.__file__).parent.parent.glob("scipy.libs/libscipy_openblas*")):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "scipy_dgedmd_"):
            return library
    return None


def dgedmd(snapshots: np.ndarray, *, tol: float = 1e-3, rank: int | None = None) -> LapackDMD:
    """Compute Ritz pairs and residuals of snapshots (time, n) with scaled columns by LAPACK's ``dgedmd``."""
    data = np.array(snapshots.T, dtype=np.float64, order="F")
    x, y = data[:, :-1].copy(order="F"), data[:, 1:].copy(order="F")  # both are overwritten
    rows, columns = x.shape
    arrays = _Arrays(rows, columns)
    head = ["S", "V", "R", "N", 1, rows, columns, x, rows, y, rows, -1 if rank is None else rank, float(tol)]
    return arrays.call("scipy_dgedmd_", head, n_letters=4)


def dgedmdq(snapshots: np.ndarray, *, tol: float = 1e-3, rank: int | None = None) -> LapackDMD:
    """Apply LAPACK's ``dgedmdq``: a Householder QR of the snapshots (time, n), then ``dgedmd`` of its factor."""
    data = np.array(snapshots.T, dtype=np.float64, order="F")
    rows, count = data.shape
    size = min(rows, count)
    arrays = _Arrays(rows, count - 1, compressed=size)
    x, y = np.zeros((size, count - 1), order="F"), np.zeros((size, count - 1), order="F")
    head = ["S", "V", "R", "N", "N", "N", 1, rows, count, data, rows, x, size, y, size]
    return arrays.call("scipy_dgedmdq_", [*head, -1 if rank is None else rank, float(tol)], n_letters=6)


class _Arrays:
    """Output arrays and the call convention shared by both routines: everything by reference, a query call first."""

    def __init__(self, rows: int, columns: int, compressed: int | None = None) -> None:
        self.columns = columns
        self.k = np.zeros(1, dtype=np.int32)
        self.real, self.imag, self.residuals = np.zeros(columns), np.zeros(columns), np.zeros(columns)
        self.z = np.zeros((rows, columns), order="F")
        inner = rows if compressed is None else compressed
        self.b = np.zeros((inner, columns), order="F")
        # dgedmdq's third matrix (V) has the compressed leading dimension, dgedmd's (W) has columns
        self.w = np.zeros((columns if compressed is None else inner, columns), order="F")
        self.s = np.zeros((columns, columns), order="F")

    def call(self, name: str, head: list[Any], n_letters: int) -> LapackDMD:
        library = lapack()
        assert library is not None
        middle: list[Any] = [self.k, self.real, self.imag, self.z, self.z.shape[0], self.residuals]
        middle += [self.b, self.b.shape[0], self.w, self.w.shape[0], self.s, self.s.shape[0]]
        work, iwork, info = np.zeros(2), np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32)
        query = [*head, *middle, work, -1, iwork, -1, info]
        lengths = [ctypes.c_size_t(1)] * n_letters
        getattr(library, name)(*map(_reference, query), *lengths)
        assert info[0] == 0, f"{name} refused argument {-info[0]}"
        work = np.zeros(int(max(work)))
        iwork = np.zeros(int(iwork[0]), dtype=np.int32)
        getattr(library, name)(*map(_reference, [*head, *middle, work, work.size, iwork, iwork.size, info]), *lengths)
        assert info[0] in (0, 4), f"{name} failed: info = {info[0]}"
        k = int(self.k[0])
        return LapackDMD(self.real[:k] + 1j * self.imag[:k], self.residuals[:k].copy())


def _reference(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, str):
        return ctypes.c_char_p(value.encode())
    return ctypes.byref(ctypes.c_int32(value) if isinstance(value, int) else ctypes.c_double(value))


def sobolev_sum(
    outputs: list[np.ndarray],
    targets: np.ndarray,
    points: np.ndarray,
    scales: tuple[float, ...],
    exponent: float,
    *,
    literal: bool = False,
    norm: int = 1,
    weights: np.ndarray | None = None,
) -> float:
    """Sum equations 7 and 8 term by term over all modes of the box; points (N, D) on the unit torus, values (N, M)."""
    reach = math.ceil(max(scales))
    total = 0.0
    pairs = list(zip(outputs, scales, strict=True)) if len(outputs) > 1 else [(outputs[0], s) for s in scales]
    pairs = pairs if literal or len(outputs) > 1 else pairs[-1:]
    for output, scale in pairs:
        for mode in itertools.product(range(-reach, reach + 1), repeat=points.shape[1]):
            size = sum(abs(k) ** norm for k in mode) ** (1 / norm)
            if abs(size - scale) > 1e-9 if literal else size > scale + 1e-9:
                continue
            for column in range(targets.shape[1]):
                coefficient = sum(
                    (1 / len(points) if weights is None else weights[i])
                    * (targets[i, column] - output[i, column])
                    * cmath.exp(-2j * math.pi * float(np.dot(mode, points[i])))
                    for i in range(len(points))
                )
                total += (1 + (2 * math.pi) ** 2 * sum(k * k for k in mode)) ** exponent * abs(coefficient) ** 2
    return total


def zeroed(network: nn.Module, removal: Any) -> nn.Module:
    """Return a copy of the network with zeros in place of the removed weights."""
    twin = copy.deepcopy(network)
    for name, parameter in twin.named_parameters():
        if name in removal.kept:
            gone = torch.ones(parameter.numel(), dtype=torch.bool)
            gone[removal.kept[name][0]] = False
            parameter.data.masked_fill_(gone.reshape(parameter.shape), 0.0)
    return twin
