"""Detection of equidistant grids among sample points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_koopman._types import Array

JITTER = 1e-2  # tolerance for points of an equidistant grid, in steps


@dataclass(frozen=True, eq=False)
class Grid:
    """Samples on an equidistant grid.

    Attributes:
        values: Array (n_1, …, n_D, M).
        steps: Distance between neighbors along each input.
    """

    values: Array
    steps: tuple[float, ...]


def find_grid(x: Array, y: Array) -> Grid | None:
    """Return the grid that the points (N, D) form, in any order, or None if they form none."""
    ticks, steps = [], []
    for column in x.T:
        step = _step(np.unique(column))
        if step is None:
            return None
        index = np.rint((column - column.min()) / step).astype(np.int64)
        ticks.append(index)
        steps.append(step)
    shape = tuple(int(index.max()) + 1 for index in ticks)
    place = np.ravel_multi_index(tuple(ticks), shape)
    if np.prod(shape) != len(x) or len(np.unique(place)) != len(x):
        return None
    values = np.empty((len(x), y.shape[1]))
    values[place] = y
    return Grid(values.reshape(*shape, -1), tuple(steps))


def _step(different: Array) -> float | None:
    """Return the step of sorted, distinct values, or None if it varies; values that differ by rounding are one."""
    extent = different[-1] - different[0]
    apart = np.diff(different) > 1e-6 * extent / len(different)
    count = int(apart.sum())
    if not count:
        return None
    step = float(extent / count)
    places = (different - different[0]) / step
    return step if np.abs(places - np.rint(places)).max() <= JITTER else None
