"""Fourier modes on the torus, enumerated by their norm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

MOST = 10**7  # modes; with more of them, their weights alone take gigabytes


def half_space(radius: float, dim: int, norm: int) -> npt.NDArray[np.int32]:
    """Return modes (m, dim) with ‖k‖ ≤ radius whose first nonzero component is positive, and the zero mode."""
    return ball(radius, dim, norm, lambda modes, reach: np.where(modes.any(axis=1), -reach, 0))


def orthant(radius: float, dim: int, norm: int) -> npt.NDArray[np.int32]:
    """Return modes (m, dim) with ‖k‖ ≤ radius and no negative component."""
    return ball(radius, dim, norm, lambda _, reach: np.zeros_like(reach))


def ball(radius: float, dim: int, norm: int, least: Callable[..., npt.NDArray[np.int64]]) -> npt.NDArray[np.int32]:
    """Return modes with ‖k‖ ≤ radius, built dimension by dimension without forming the box around them.

    Args:
        radius: Largest norm.
        dim: Number of dimensions.
        norm: 1 or 2.
        least: Function of the modes so far (m, d) and the remaining reach (m,) that returns the least next component.

    Raises:
        ValueError: If there are far more than ten million.
    """
    modes = np.zeros((1, 0), dtype=np.int32)
    left = np.array([float(radius) ** norm])
    for _ in range(dim):
        reach = np.floor(left ** (1 / norm) * (1 + 1e-9))
        if 2 * reach.sum() > 4 * MOST:  # before anything of that size is allocated
            raise ValueError(
                f"scales: there are more than {MOST:,} modes up to {radius:g} in {dim} dimensions: lower the scale."
            )
        reach = reach.astype(np.int64)
        lowest = least(modes, reach)
        many = reach - lowest + 1
        ends = np.cumsum(many)
        added = np.arange(ends[-1]) - np.repeat(ends - many, many) + np.repeat(lowest, many)
        modes = np.column_stack([np.repeat(modes, many, axis=0), added]).astype(np.int32)
        left = np.maximum(np.repeat(left, many) - np.abs(added.astype(np.float64)) ** norm, 0)
    return modes
