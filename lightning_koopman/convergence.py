"""Has a training converged, or did it start badly?  The rules of decision; they know of numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from lightning_koopman.dmd import decompose, dmd_rrr
from lightning_koopman.spectrum import Real

RECENT = 6  # fewer losses determine no forecast
LEAST_HORIZON = 6  # fewer steps are too often mistaken for no random walk
SUSPECT_WALK = 5.0  # standard errors; a walk hardly ever exceeds them, a training nearly always does
APART = 3  # epochs between steps that momentum does not link
SWING = 3.0  # fluctuations allowed about a level that stands still, in tolerances
FLOOR = 5.0  # tolerances left above 0, where no hidden drop can be large
MARGIN = 0.02  # share of the chance loss by which a network must differ from it
WILD = 2.0  # times the loss at chance in the first epoch: weights of a wrong scale
SAME_RATE = 1.1  # ratio of two learning rates that count as equal


class StoppingReason(Enum):
    """Why a Koopman callback ended the training, if it did.

    Example:
        >>> from lightning_koopman import EarlyStopOnUnitEigenvalues, StoppingReason
        >>> EarlyStopOnUnitEigenvalues().stopping_reason is StoppingReason.NOT_STOPPED
        True
    """

    NOT_STOPPED = "not stopped"
    CONVERGED = "converged"
    BAD_START = "bad start"


class Hold(Enum):
    """What speaks against stopping now."""

    TOO_EARLY = "too few epochs to tell"
    NOT_FINITE = "the loss or the weights were not finite lately"
    CHANCE = "the loss is no better than that of a network which ignores its input"
    MOVING = "the loss is predicted to move on"
    SWINGING = "the loss fluctuates too much to tell"
    SPREAD = "the eigenvalues of the weights do not cluster at 1"
    WALK = "the weights' steps cannot be told from a random walk"
    DRIFT = "the weights move along a direction that does not fade"
    SCHEDULE = "the learning rate is about to change more than it has without effect"
    PATIENCE = "all witnesses agree, but not yet for long enough"


@dataclass(frozen=True)
class Chance:
    """Mean loss of a network that ignores its input, and the standard error of that mean."""

    loss: float
    error: float = 0.0

    def compare(self, loss: float) -> int:
        """1 for a loss that is worse than chance, 0 for one that cannot be told from it, -1 for a better one."""
        doubt = MARGIN * self.loss + 2 * self.error
        return int(loss > self.loss + doubt) - int(loss < self.loss - doubt)


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
        >>> from lightning_koopman.convergence import forecast_change
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


def _two_sided(values: Real, horizon: int, modes: int, tol: float) -> tuple[Real, Real]:
    """The delay-embedded DMD's values after the newest one (horizon,), and at the given ones (m,)."""
    if not values[:-1].any():  # nothing to fit a model to
        return np.full(horizon, values[-1]), values
    spectrum = dmd_rrr(values, delays=values.size // 2 + 1, tol=tol, max_rank=modes, refine=False)
    return spectrum.forecast(values, horizon)[:, 0], spectrum.reconstruct(values)[:, 0]


def walk_score(steps: Real) -> float:
    """How far the steps are from those of a random walk with the same lengths, in standard errors.

    The surrogate's steps have independent, uniform directions: cosines between them average to zero, at every distance
    in time alike.  Three things tell a training: it still goes somewhere (a positive mean), it is held near a minimum
    (a negative mean), or it turns back (successive steps have a smaller cosine than others).  Momentum carries noise
    from one epoch into the next, so for the positive mean only steps at least three epochs apart count.  The standard
    error is taken from the cosines themselves, whose spread under the walk depends on how many directions the noise
    has.

    Args:
        steps: Factor (r, time) of the steps; those of length zero do not count.

    Returns:
        The largest score of the three, ≥ 0; infinite for fewer than five steps, which no walk makes.
    """
    lengths = np.linalg.norm(steps, axis=0)
    units = steps[:, lengths > 0] / lengths[lengths > 0]
    if units.shape[1] < APART + 2:
        return float("inf")
    first, second = np.triu_indices(units.shape[1], 1)
    cosines = (units.T @ units)[first, second]
    spread = cosines.std(ddof=1)
    if spread == 0.0:
        return float("inf")
    apart, successive = second - first >= APART, second - first == 1
    onward = cosines[apart].mean() * np.sqrt(np.count_nonzero(apart))
    held = -cosines.mean() * np.sqrt(cosines.size)
    shares = 1.0 / np.count_nonzero(successive) + 1.0 / np.count_nonzero(~successive)
    turning_back = (cosines[~successive].mean() - cosines[successive].mean()) / np.sqrt(shares)
    return float(max(onward, held, turning_back, 0.0) / spread)


def drifts(steps: Real, max_residual: float = 0.1) -> bool:
    """Whether the steps have a direction that does not fade: an eigenvalue that may lie on or outside the unit circle.

    A loss stands still at a saddle, and the eigenvalues of the weights cluster at 1, while a small part of the weights
    grows.  In the spectrum of the steps, where the large constant part is gone, that part is an eigenvalue ≥ 1.

    Args:
        steps: Factor (r, time) of the steps.
        max_residual: Largest residual of an eigenvalue that counts, > 0.
    """
    if not steps[:, :-1].any():
        return bool(steps.any())
    spectrum = decompose(steps, tol=1e-2, max_rank=3)
    moduli, trusted = np.abs(spectrum.eigenvalues), spectrum.trusted(max_residual)
    return bool((trusted & (moduli + spectrum.residuals >= 1.0)).any())


def rate_will_matter(
    past: npt.ArrayLike, future: npt.ArrayLike, losses: npt.ArrayLike, *, span: int, tolerance: float
) -> bool:
    """Whether learning rates will change by more than they already have without moving the loss.

    Every plan may wake a loss that stands still: a warm-up that goes on, the next cycle, the next decay.  Where a
    change as large, in the same direction, was already tried and left the loss where it still is, the next one is no
    threat.

    Args:
        past: Array (t, groups): the rates of the epochs so far.
        future: Array (s, groups): the rates planned.
        losses: Array (t,): the losses of the epochs so far.
        span: Epochs within which a change counts as one, ≥ 1.
        tolerance: Largest change of the loss that counts as none, > 0.
    """
    known, planned = np.atleast_2d(np.asarray(past, float)), np.atleast_2d(np.asarray(future, float))
    if planned.size == 0 or known.shape[1] != planned.shape[1]:
        return False
    both = np.concatenate([known, planned])
    logs = np.log(np.maximum(both, 1e-12 * max(both.max(), 1e-300)))
    seen = np.asarray(losses, dtype=np.float64)
    now = known.shape[0]
    for direction in (1.0, -1.0):
        ahead, tried = 0.0, 0.0
        for lag in range(1, min(span, len(logs) - 1) + 1):
            change = (direction * (logs[lag:] - logs[:-lag])).max(axis=1)  # [i]: from epoch i to i + lag
            ahead = max(ahead, change[max(now - lag, 0) :].max(initial=0.0))
            behind = change[: max(now - lag, 0)]
            harmless = np.abs(seen[-1] - seen[: behind.size]) <= tolerance
            tried = max(tried, behind[harmless].max(initial=0.0))
        if ahead > tried + np.log(SAME_RATE):
            return True
    return False


@dataclass(frozen=True)
class Verdict:
    """What the witnesses say after an epoch: NaN where unknown; ``hold`` is None if all of them say converged.

    ``scale`` is what the tolerance is relative to; ``at_floor`` says that the loss is so close to 0 that no drop can be
    large, whatever the weights or the learning rate have in store.
    """

    hold: Hold | None
    unit_fraction: float = float("nan")
    forecast: ChangeForecast = ChangeForecast(float("nan"), float("nan"), float("nan"))
    scale: float = float("nan")
    at_floor: bool = False


@dataclass(frozen=True)
class ConvergenceRule:
    """Two witnesses, and four doubts that overrule them.

    A training has converged when the importance of its weights' trajectory lies at eigenvalue 1 (paper, section 3)
    *and* its loss is predicted to stand still over the horizon.  Both are also true of trainings that have not
    converged; hence they do not count while the loss is no better than chance, where the steps are a random walk's
    (:func:`walk_score`), or have a direction that does not fade (:func:`drifts`).

    Attributes:
        radius: Radius of the disc around 1, > 0.
        fraction: Least share of the importance in it, in [0, 1].
        horizon: Epochs to look ahead, ≥ 6; as many steps are looked back upon.
        tolerance: Largest predicted change of the loss that counts as none, relative to the scale, > 0.
    """

    radius: float = 0.05
    fraction: float = 0.8
    horizon: int = 10
    tolerance: float = 1.5e-3

    def judge(self, losses: npt.ArrayLike, factor: Real | None, chance: Chance | None) -> Verdict:
        """Hear the witnesses.

        Args:
            losses: Array (t,): the losses of all epochs since the start, newest last.
            factor: Factor (r, time) of the newest weights, ``horizon + 1`` snapshots (None: they are not finite).
            chance: Loss of a network that ignores its input; without it, or where losses are negative, their range is
                the scale.
        """
        values = np.asarray(losses, dtype=np.float64)
        newest = values[-(self.horizon + 2) :]
        if factor is None or not np.isfinite(newest).all():
            return Verdict(Hold.NOT_FINITE)
        if newest.size < self.horizon + 2 or factor.shape[1] < self.horizon + 1:
            return Verdict(Hold.TOO_EARLY)
        finite = values[np.isfinite(values)]
        bounded = chance is not None and finite.min() >= 0.0  # a loss that can be negative has no floor
        # without chance: the range, less the first epoch, which may have started anywhere
        scale = chance.loss if chance is not None and bounded else float(np.ptp(finite[1:]))
        forecast = forecast_change(newest, self.horizon)
        fraction = 1.0
        if np.any(factor[:, :-1]):
            fraction = decompose(factor, tol=1e-3, refine=False).unit_fraction(self.radius)
        loss, steps = float(newest[-1]), np.diff(factor, axis=1)
        at_floor = bounded and loss <= FLOOR * self.tolerance * scale
        hold = None
        if chance is not None and chance.compare(loss) >= 0:
            hold = Hold.CHANCE
        elif forecast.bound > self.tolerance * scale:
            hold = Hold.MOVING
        elif forecast.swing > SWING * self.tolerance * scale:
            hold = Hold.SWINGING
        elif fraction < self.fraction:
            hold = Hold.SPREAD
        elif walk_score(steps) < SUSPECT_WALK:
            hold = Hold.WALK
        elif drifts(steps) and not at_floor:
            hold = Hold.DRIFT
        return Verdict(hold, fraction, forecast, scale, at_floor)


def bad_start(losses: npt.ArrayLike, factor: Real | None, chance: Chance, *, horizon: int) -> str | None:
    """Why a training started badly, in words; "" if it is too early to say, None if it did not.

    A start is bad if the loss is no better than chance, and either began far above it, as no network at a sane scale of
    its weights does, or neither falls nor is predicted to.  The weights of both kinds look converged (paper, section
    3).

    Args:
        losses: Array (t,): the losses of all epochs since the start, newest last.
        factor: Factor (r, time) of the newest weights (None: unknown), for the words only.
        chance: Loss of a network that ignores its input.
        horizon: Epochs to look ahead, ≥ 1.
    """
    values = np.asarray(losses, dtype=np.float64)
    newest = values[-RECENT:]
    order = chance.compare(newest[-1])
    if order < 0:
        return None
    if values[0] <= WILD * chance.loss:
        if newest.size < 2:
            return ""
        slope = (newest[-1] - newest[0]) / (newest.size - 1)
        change = forecast_change(newest, horizon).change if newest.size == RECENT else slope * horizon
        fallen = values[values.size // 2] - values[-1]
        if max(-change, fallen) > MARGIN * chance.loss:
            return ""
    reason = (
        f"the loss, {newest[-1]:.3g}, is {'worse' if order > 0 else 'no better'} than {chance.loss:.3g}, that of a "
        "network which ignores its input"
    )
    if factor is not None and factor.shape[1] >= 3 and np.any(factor[:, :-1]):
        fraction = decompose(factor, tol=1e-3, refine=False).unit_fraction()
        reason += f", while {fraction:.0%} of the weights' importance lies at eigenvalue 1"
    return reason
