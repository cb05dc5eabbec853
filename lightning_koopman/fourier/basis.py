"""Cosines and sines at the sample points, cached between steps and bounded in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_koopman.fourier.domain import Interval, to_torus

WHOLE = 2**28  # bytes: a basis up to this size is computed at once, and cached
PIECE = 2**24  # bytes: a larger one is computed piece by piece, twice per step


def fourier_basis(torus_points: Tensor, modes: Tensor) -> Tensor:
    """Return cosines, then sines, of the modes: (2m, N) from points (N, D) in units of the period and modes (m, D)."""
    turns = torch.zeros(len(modes), len(torus_points), dtype=torus_points.dtype, device=torus_points.device)
    for mode, coordinate in zip(
        modes.unbind(1), torus_points.unbind(1), strict=True
    ):  # a matrix product may have reduced precision
        turns = turns + mode.to(turns.dtype)[:, None] * coordinate
    angles = (turns - turns.round()).mul(2 * math.pi)  # reduced before the cosine, without rounding
    return torch.cat([angles.cos(), angles.sin()])


def modes_at_once(n_modes: int, n_points: int, dtype: torch.dtype) -> int:
    """Return the number of modes to process at a time."""
    return n_modes if 2 * n_modes * n_points * dtype.itemsize <= WHOLE else piece(n_points, dtype)


def piece(n_points: int, dtype: torch.dtype) -> int:
    """Return the number of modes in one piece of the basis."""
    return max(1, PIECE // (2 * n_points * dtype.itemsize))


class BasisCache:
    """Cache of the bases of the last points, looked up by the values of the points.

    Full batches recur every step and validation data every epoch; shuffled mini-batches never do.  The cache is not
    copied, pickled or saved.
    """

    KEPT = 4

    def __init__(self) -> None:
        self._kept: list[tuple[tuple[object, ...], Tensor, Tensor, Tensor]] = []

    def __getstate__(self) -> dict[str, object]:
        return {"_kept": []}

    @property
    def n_bytes(self) -> int:
        """Size of all cached bases, in bytes."""
        return sum(basis.nbytes for *_, basis in self._kept)

    def get(self, points: Tensor, box: Sequence[Interval], modes: Tensor) -> Tensor:
        """Return the whole basis (2m, N) of the modes (m, D) at the points (N, D) in the box."""
        key = (tuple(box), points.shape, points.dtype, points.device)
        for index, (known, their, values, basis) in enumerate(self._kept):
            if their is modes and known == key and torch.equal(values, points):
                self._kept.append(self._kept.pop(index))
                return basis
        size = 2 * len(modes) * points.nbytes // points.shape[1]
        while self._kept and (len(self._kept) == self.KEPT or self.n_bytes + size > WHOLE):
            self._kept.pop(0)
        with torch.inference_mode(mode=False), torch.no_grad():  # usable for training even if made for inference
            values = points.detach().clone()
            basis = _whole_basis(to_torus(values, box), modes)
        self._kept.append((key, modes, values, basis))
        return basis


def _whole_basis(torus_points: Tensor, modes: Tensor) -> Tensor:
    """Compute :func:`fourier_basis` without temporary tensors of its size."""
    basis = torus_points.new_empty(2, len(modes), len(torus_points))
    step = piece(len(torus_points), torus_points.dtype)
    for some, cosines, sines in zip(*(torch.split(each, step) for each in (modes, *basis)), strict=True):
        made = fourier_basis(torus_points, some)
        cosines.copy_(made[: len(some)])
        sines.copy_(made[len(some) :])
    return basis.flatten(0, 1)
