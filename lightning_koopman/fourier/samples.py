"""Samples of a function as validated arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_koopman._checks import real_array
from lightning_koopman._types import Array


def as_samples(x: npt.ArrayLike | Tensor, y: npt.ArrayLike | Tensor, fewest: int) -> tuple[Array, Array]:
    """Return points (N, D) and samples (N, M) in float64.

    Raises:
        ValueError: If they are not real and finite, differ in number, or are fewer than ``fewest``.
    """
    points, samples = _as_columns("x", x), _as_columns("y", y)
    if len(points) != len(samples) or len(points) < fewest:
        raise ValueError(
            f"x and y must hold the same number of samples, ≥ {fewest}, got {len(points)}, {len(samples)}."
        )
    return points, samples


def _as_columns(name: str, given: npt.ArrayLike | Tensor) -> Array:
    """Return real, finite numbers as an array (N, columns)."""
    try:
        values = real_array(name, given).astype(np.float64)
    except TypeError as error:  # ValueError, as in scikit-learn
        raise ValueError(str(error)) from error
    if values.ndim not in (1, 2) or (values.ndim == 2 and not values.shape[1]) or not np.isfinite(values).all():
        raise ValueError(
            f"{name} must be (N,) or (N, columns) and finite, got the shape {values.shape}"
            f"{'' if np.isfinite(values).all() else ' with NaN or infinite values'}."
        )
    return values[:, None] if values.ndim == 1 else values
