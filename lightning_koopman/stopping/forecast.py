"""How a scalar, or the weights, will move on, predicted from the newest values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_koopman._types import Array
from lightning_koopman.dmd.rrr import decompose, dmd_rrr
from lightning_koopman.dmd.spectrum import Real

RECENT = 6  # fewer losses determine no forecast


@dataclass(frozen=True)
class ChangeForecast:
    """How a scalar will move within a horizon.

    Attributes:
        change: Predicted change from the newest value to the one at the horizon.
        bound: Largest change of its level, noise aside: predicted, or between the halves of what was seen.
        swing: Size of its fluctuations.
    """

    change: float
    bound: float
    swing: float


UNKNOWN = ChangeForecast(float("nan"), float("nan"), float("nan"))


def forecast_change(values: npt.ArrayLike, horizon: int) -> ChangeForecast:
    """Predict how a scalar moves on, by DMD of its delay embedding (paper, section 3).

    The change and its bound are those of two modes, a level and what decays to it or one oscillation; the bound allows
    for two standard errors of that level.  A third mode fits noise, and can be far off; it serves for the swing, the
    largest of: its forecast of the distance to the newest value, which shows slow oscillations; the range of the newest
    six values; what two modes miss.

    Growing modes are held at their size, so an exponential rise is underestimated: the sign is right, the size is not.

    Args:
        values: Array (m,), m ≥ 6, finite, newest last.
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
    """The change of :func:`forecast_change` alone, at half of the cost; of at least 6 finite values."""
    unit = float(np.abs(values).max()) or 1.0
    level, _ = _two_sided(values / unit, horizon, modes=2, tol=1e-3)
    return float(unit * level[-1] - values[-1])


def _two_sided(values: Real, horizon: int, modes: int, tol: float) -> tuple[Real, Real]:
    """The delay-embedded DMD's values after the newest one (horizon,), and at the given ones (m,)."""
    if not values[:-1].any():  # nothing to fit a model to
        return np.full(horizon, values[-1]), values
    spectrum = dmd_rrr(values, delays=values.size // 2 + 1, tol=tol, max_rank=modes, refine=False)
    return spectrum.forecast(values, horizon)[:, 0], spectrum.reconstruct(values)[:, 0]


def relative_changes(factor: Array, horizon: int, *, tol: float = 1e-3) -> tuple[float, float]:
    """How far the weights will move within ``horizon`` snapshots by the spectrum, and how far they just moved.

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
