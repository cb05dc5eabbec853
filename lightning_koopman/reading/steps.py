r"""The autocorrelation of the steps, and the Koopman spectral measure that it is the moments of.

With unit steps :math:`u_t = e_t/\|e_t\|`, :math:`\rho_k` is the mean of :math:`\langle u_t, u_{t+k}\rangle`: the k-th
moment :math:`\int \lambda^k d\mu(\lambda)` of the spectral measure of the steps (paper, equation 3, its continuous part
included).  A Fejér sum of the moments is a density that is never negative and never ill-conditioned (Korda, Putinar,
Mezić 2020).  Nothing but inner products of the steps enters, however many weights there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_koopman._types import Array

LEAST = 5  # steps; fewer say nothing
NEWEST = 24  # steps that are read: older ones are of another time
APART = 3  # rounds between steps that momentum does not link
SURE = 4.0  # standard errors beyond the walk's
ONWARD = 0.03  # mean cosine of distant steps from which the weights go somewhere
FREQUENCIES = np.linspace(0.0, 0.5, 65)  # of the density, in turns a round
FREQUENCIES.setflags(write=False)  # shared by all readings


@dataclass(frozen=True, eq=False)
class StepStatistics:
    r"""How the newest steps of a trajectory lie to each other.

    Under the null, a random walk with the same step lengths, every correlation is 0 and the density is 1.

    Attributes:
        count: Steps that were read, those of length zero left out.
        correlation: Array (count − 1,): :math:`\rho_k` for k = 1, 2, …, in [−1, 1].
        errors: Array (count − 1,): their standard errors under the null.
        onward: Mean cosine between steps far apart in time, which momentum does not link; positive where the weights
            go somewhere.
        onward_error: Its standard error under the null.
        frequencies: Array (g,): turns a round, in [0, 0.5].
        density: Array (g,): spectral density of the steps at :math:`e^{2\pi i f}`, ≥ 0; 1 for a walk.
        density_error: Its standard error under the null.
        growth: Mean growth of the steps' length a round, as a factor.
        growth_error: Standard error of its logarithm.
    """

    count: int
    correlation: Array
    errors: Array
    onward: float
    onward_error: float
    frequencies: Array
    density: Array
    density_error: float
    growth: float
    growth_error: float

    @property
    def weight(self) -> float:
        r"""Spectral weight at eigenvalue 1, :math:`\|\sum u_t\|^2/\text{count}`, in [0, count]; 1 for a walk."""
        return float(self.density[0])

    @property
    def weight_error(self) -> float:
        """Its standard error under the null, that of the density."""
        return self.density_error

    @property
    def directed(self) -> bool:
        """Whether the weights go somewhere, beyond doubt."""
        return self.onward > max(SURE * self.onward_error, ONWARD)

    @property
    def peak(self) -> tuple[float, float]:
        """Turns a round of the strongest oscillation that comes round in the time read, and its density."""
        slowest = int(np.searchsorted(self.frequencies, 1.5 / self.count))
        at = slowest + int(self.density[slowest:].argmax())
        return float(self.frequencies[at]), float(self.density[at])


def step_density(sums: npt.NDArray[Any], count: int) -> Array:
    """Spectral density (g,), ≥ 0, of unit steps at :data:`FREQUENCIES`: a Fejér sum.

    Args:
        sums: Array (count − 1,): their inner products, summed over all pairs so many rounds apart, from 1 on.
        count: Number of steps, ≥ 1.
    """
    density: Array = 1 + 2 / count * np.cos(2 * np.pi * np.outer(FREQUENCIES, np.arange(1, count))) @ sums
    return np.maximum(density, 0.0)


def step_statistics(gram: Array, *, sketched: int | None = None) -> StepStatistics | None:
    """Statistics of the newest steps.

    Args:
        gram: Array (t, t): inner products of the steps, newest last.
        sketched: Combinations that a sketch keeps of each step, which adds its noise to the null's.

    Returns:
        The statistics, or None where there are fewer than five steps of a length above 0.
    """
    lengths = np.sqrt(np.maximum(np.diag(gram), 0.0))[-NEWEST:]
    moved = lengths > 0
    lengths = lengths[moved]
    count = lengths.size
    if count < LEAST:
        return None
    cosines = gram[-NEWEST:, -NEWEST:][np.ix_(moved, moved)] / lengths[:, None] / lengths
    first, second = np.triu_indices(count, 1)
    pairs, lags = cosines[first, second], second - first
    numbers = np.bincount(lags, minlength=count)[1:]
    sums = np.bincount(lags, pairs, minlength=count)[1:]
    correlation = sums / numbers
    # what cosines of one lag scatter by is the noise; their mean is what is looked for
    spread = np.sqrt(np.sum((pairs - correlation[lags - 1]) ** 2) / max(pairs.size - (count - 1), 1))
    spread = float(np.hypot(spread, 0.0 if sketched is None else 1.0 / np.sqrt(sketched)))
    apart = lags >= max(APART, count // 3)
    at = np.arange(count) - (count - 1) / 2
    logs = np.log(lengths)
    slope = float(at @ logs / (at @ at))
    rest = logs - logs.mean() - slope * at
    return StepStatistics(
        count=count,
        correlation=correlation,
        errors=spread / np.sqrt(numbers),
        onward=float(pairs[apart].mean()),
        onward_error=spread / float(np.sqrt(np.count_nonzero(apart))),
        frequencies=FREQUENCIES,
        density=step_density(sums, count),
        density_error=2 * spread * float(np.sqrt(pairs.size)) / count,
        growth=float(np.exp(slope)),
        growth_error=float(np.sqrt(rest @ rest / max(count - 2, 1) / (at @ at))),
    )
