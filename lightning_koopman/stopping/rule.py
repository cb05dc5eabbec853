"""The rule that decides from numbers alone whether a training has converged."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from lightning_koopman.dmd.spectrum import Real
from lightning_koopman.stopping.evidence import SUSPECT_WALK, Baseline, drifts, unit_fraction, walk_score
from lightning_koopman.stopping.forecast import UNKNOWN, ChangeForecast, forecast_change
from lightning_koopman.stopping.trend import line_through

LEAST_HORIZON = 6  # with fewer steps, a random walk is too often mistaken for a training
SWING = 3.0  # largest fluctuation of a loss that stands still, in tolerances
CLEAR = 2.0  # standard errors of the loss's slope beyond which it changes rather than fluctuates
HOVERED = 5  # intervals in a row for which weights must hover before a stop
FLOOR = 5.0  # a loss within this many tolerances of 0 cannot drop by much


class StoppingReason(Enum):
    """Why a Koopman callback ended the training, if it did.

    Example:
        >>> from lightning_koopman import EarlyStopOnUnitEigenvalues, StoppingReason
        >>> EarlyStopOnUnitEigenvalues().stopping_reason is StoppingReason.NOT_STOPPED
        True
    """

    NOT_STOPPED = "not stopped"
    CONVERGED = "converged"
    HOVERING = "hovering at the noise floor"
    BAD_START = "bad start"


class Hold(Enum):
    """What blocks a stop."""

    TOO_EARLY = "too few epochs to tell"
    NOT_FINITE = "the loss or the weights were recently not finite"
    BASELINE = "the loss is no better than that of a network which ignores its input"
    MOVING = "the loss is predicted to keep changing"
    SWINGING = "the loss fluctuates too much to judge"
    HOVERING = "the weights hover at the noise floor of this learning rate: average them, or lower the rate"
    SPREAD = "the eigenvalues of the weights do not cluster near 1"
    WALK = "the steps of the weights cannot be told apart from a random walk"
    DRIFT = "the weights keep moving in one direction without slowing down"
    SCHEDULE = "the learning rate is about to change by more than it already has without effect"
    PATIENCE = "all criteria are met, but not yet for long enough"


NOISY = (Hold.MOVING, Hold.SWINGING, Hold.SPREAD, Hold.WALK, Hold.DRIFT)  # what noise around a point may cause


@dataclass(frozen=True)
class Verdict:
    """The criteria after an epoch, NaN where unknown; ``hold`` is what blocks a stop, None if nothing does.

    The tolerance is relative to ``scale``.  ``at_floor`` means that the loss is so close to 0 that it cannot drop by
    much, whatever the weights or the learning rate will do.
    """

    hold: Hold | None
    unit_fraction: float = float("nan")
    forecast: ChangeForecast = UNKNOWN
    scale: float = float("nan")
    at_floor: bool = False


@dataclass(frozen=True)
class ConvergenceRule:
    """Two criteria for convergence, and three conditions that block a stop even if both are met.

    A training has converged when the importance of its weights' trajectory lies at eigenvalue 1 (paper, section 3)
    *and* its loss is predicted to stand still over the horizon.  Some trainings meet both before they have converged.
    So a stop is blocked while the loss is no better than the baseline, while the steps look like a random walk
    (:func:`walk_score`), and while they have a direction that does not fade (:func:`drifts`).

    Attributes:
        radius: Radius of the disc around 1, > 0.
        fraction: Least share of the importance in that disc, in [0, 1].
        horizon: Epochs to look ahead, ≥ 6; as many newest steps are used.
        tolerance: Largest predicted change of the loss that counts as none, relative to the scale, > 0.
    """

    radius: float = 0.05
    fraction: float = 0.8
    horizon: int = 10
    tolerance: float = 1.5e-3

    def judge(self, losses: npt.ArrayLike, factor: Real | None, baseline: Baseline | None) -> Verdict:
        """Evaluate the stopping criteria.

        Args:
            losses: Array (t,): losses of all epochs since the start, newest last.
            factor: Factor (r, time) of the newest ``horizon + 1`` snapshots of the weights (None: not finite).
            baseline: Loss of a network that ignores its input.  Without it, or if losses are negative, the scale is
                their range.
        """
        values = np.asarray(losses, dtype=np.float64)
        newest = values[-(self.horizon + 2) :]
        if factor is None or not np.isfinite(newest).all():
            return Verdict(Hold.NOT_FINITE)
        if newest.size < self.horizon + 2 or factor.shape[1] < self.horizon + 1:
            return Verdict(Hold.TOO_EARLY)
        finite = values[np.isfinite(values)]
        bounded = baseline is not None and finite.min() >= 0.0  # a loss that can be negative has no floor
        # else the range of the losses, without the first epoch, whose loss may be arbitrary
        scale = baseline.loss if baseline is not None and bounded else float(np.ptp(finite[1:]))
        forecast = forecast_change(newest, self.horizon)
        fraction = unit_fraction(factor, self.radius) if np.any(factor[:, :-1]) else 1.0
        loss, steps = float(newest[-1]), np.diff(factor, axis=1)
        at_floor = bounded and loss <= FLOOR * self.tolerance * scale
        hold = None
        if baseline is not None and baseline.compare(loss) >= 0:
            hold = Hold.BASELINE
        elif forecast.bound > self.tolerance * scale:
            hold = Hold.MOVING if abs(line_through(newest).score) > CLEAR else Hold.SWINGING
        elif forecast.swing > SWING * self.tolerance * scale:
            hold = Hold.SWINGING
        elif fraction < self.fraction:
            hold = Hold.SPREAD
        elif walk_score(steps) < SUSPECT_WALK:
            hold = Hold.WALK
        elif drifts(steps) and not at_floor:
            hold = Hold.DRIFT
        return Verdict(hold, fraction, forecast, scale, at_floor)
