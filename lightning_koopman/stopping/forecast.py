"""Forecasts of a scalar, or of the weights, from the newest values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_koopman._types import Array
from lightning_koopman.dmd.rrr import decompose, dmd_rrr
from lightning_koopman.dmd.spectrum import Real

RECENT = 6  # fewest values for a forecast


@dataclass(frozen=True)
class ChangeForecast:
    """Forecast of a scalar within a horizon.

    Attributes:
        change: Predicted change from the newest value to the one at the horizon.
        bound: Largest change of its level, without noise: predicted, or between the two halves of the given values.
        swing: Size of its fluctuations.
    """

    change: float
    bound: float
    swing: float


UNKNOWN = ChangeForecast(float("nan"), float("nan"), float("nan"))


def forecast_change(values: npt.ArrayLike, horizon: int) -> ChangeForecast:
    """Forecast a scalar by DMD of its delay embedding (paper, section 3).

    Two modes give the change and its bound: a level with a decay toward it, or one oscillation.  The bound adds two
    standard errors of that level.  A third mode fits noise and can be far off, so it is used for the swing only.  The
    swing is the largest of three: the distance from the newest value that the three modes predict, which shows slow
    oscillations; the range of the newest six values; the misfit of the two modes.

    Growing modes are held at their size, so an exponential rise gets the right sign but too small a size.

    Args:
        values: Array (m,): finite values, m ≥ 6, newest last.
        horizon: Steps to look ahead, ≥ 1.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman.stopping.forecast import forecast_change
        >>> round(forecast_change(0.5 ** np.arange(12.0), horizon=10).change, 6)  # 0.5**21 - 0.5**11
        -0.000488
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or given.size < RECENT or not np.isfinite(given).all():
        raise ValueError(f"values must be at least {RECENT} finite numbers, got {values!r}.")
    unit = float(np.abs(given).max()) or 1.0
    given = given / unit
    level, seen = _two_sided(given, horizon, modes=2, tol=1e-3)
    misfit = float(np.sqrt(np.mean((seen - given) ** 2)))
    shift = abs(given[given.size // 2 :].mean() - given[: given.size // 2].mean())
    free, _ = _two_sided(given - given[-1], horizon, modes=3, tol=1e-2)
    return ChangeForecast(
        change=unit * float(level[-1] - given[-1]),
        bound=unit * float(max(np.abs(level - seen[-1]).max() + 2 * misfit / np.sqrt(given.size), shift)),
        swing=unit * float(max(np.abs(free).max(), np.ptp(given[-RECENT:]), misfit)),
    )


def predicted_change(values: Real, horizon: int) -> float:
    """Compute the ``change`` of :func:`forecast_change` alone, at half the cost, from at least 6 finite values."""
    unit = float(np.abs(values).max()) or 1.0
    level, _ = _two_sided(values / unit, horizon, modes=2, tol=1e-3)
    return float(unit * level[-1] - values[-1])


def _two_sided(values: Real, horizon: int, modes: int, tol: float) -> tuple[Real, Real]:
    """Return the values of the delay-embedded DMD after the newest one (horizon,), and at the given ones (m,)."""
    if not values[:-1].any():  # nothing to fit a model to
        return np.full(horizon, values[-1]), values
    spectrum = dmd_rrr(values, delays=values.size // 2 + 1, tol=tol, max_rank=modes, refine=False)
    return spectrum.forecast(values, horizon)[:, 0], spectrum.reconstruct(values)[:, 0]


def relative_changes(factor: Array, horizon: int, *, tol: float = 1e-3) -> tuple[float, float]:
    """Predict how far the weights will move within ``horizon`` snapshots, and measure how far they just moved.

    Args:
        factor: Array (r, m), m > ``horizon``: :meth:`Trajectory.factor` of the newest snapshots.
        horizon: Snapshots to look ahead and back, ≥ 1.
        tol: As for :func:`dmd_rrr`.

    Returns:
        Both changes, relative to the norm of the last snapshot.
    """
    count = factor.shape[1]
    spectrum = decompose(factor, tol=tol, refine=False)
    ahead = spectrum.combination(count - 1 + horizon, clip=True)[0]
    ahead[-1] -= 1.0
    size = max(float(np.linalg.norm(factor[:, -1])), np.finfo(np.float64).tiny)
    past = factor[:, -1] - factor[:, -1 - horizon]
    return float(np.linalg.norm(factor @ ahead)) / size, float(np.linalg.norm(past)) / size
