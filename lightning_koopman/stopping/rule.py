"""Has a training converged, or did it start badly?  The rules of decision; they know of numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from lightning_koopman.dmd.spectrum import Real
from lightning_koopman.stopping.evidence import SUSPECT_WALK, Baseline, drifts, unit_fraction, walk_score
from lightning_koopman.stopping.forecast import UNKNOWN, ChangeForecast, forecast_change
from lightning_koopman.stopping.trend import line_through

LEAST_HORIZON = 6  # fewer steps are too often mistaken for no random walk
SWING = 3.0  # fluctuations allowed about a level that stands still, in tolerances
CLEAR = 2.0  # standard errors of the loss's slope beyond which it moves, and does not merely fluctuate
HOVERED = 5  # rounds running for which weights must hover, once that is beyond doubt
FLOOR = 5.0  # tolerances left above 0, where no hidden drop can be large


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
    """What blocks stopping now."""

    TOO_EARLY = "too few epochs to tell"
    NOT_FINITE = "the loss or the weights were not finite lately"
    BASELINE = "the loss is no better than that of a network which ignores its input"
    MOVING = "the loss is predicted to move on"
    SWINGING = "the loss fluctuates too much to tell"
    HOVERING = "the weights hover at the noise floor of this learning rate: average them, or lower the rate"
    SPREAD = "the eigenvalues of the weights do not cluster at 1"
    WALK = "the weights' steps cannot be told from a random walk"
    DRIFT = "the weights move along a direction that does not fade"
    SCHEDULE = "the learning rate is about to change more than it has without effect"
    PATIENCE = "all criteria are met, but not yet for long enough"


NOISY = (Hold.MOVING, Hold.SWINGING, Hold.SPREAD, Hold.WALK, Hold.DRIFT)  # what may be noise about a point


@dataclass
class Patience:
    """For how many rounds running a stop was not blocked, or only by noise about a point.

    Attributes:
        least: Rounds running for which it must not be blocked, ≥ 1.
        hovering_counts: Whether weights that hover may end a training: where their average is kept.
    """

    least: int
    hovering_counts: bool
    met: int = 0
    hovering: int = 0

    def hear(self, hold: Hold | None) -> tuple[Hold | None, StoppingReason]:
        """Take in what blocks a stop in this round; returns what does so now, and why it is time to stop."""
        self.met = self.met + 1 if hold is None else 0
        self.hovering = self.hovering + 1 if hold in (None, Hold.HOVERING) else 0
        if self.met >= self.least:
            return None, StoppingReason.CONVERGED
        if self.hovering_counts and hold is Hold.HOVERING and self.hovering >= HOVERED:
            return None, StoppingReason.HOVERING
        return Hold.PATIENCE if hold is None else hold, StoppingReason.NOT_STOPPED


@dataclass(frozen=True)
class Verdict:
    """The criteria after an epoch: NaN where unknown; ``hold`` is what blocks a stop, None if nothing does.

    ``scale`` is what the tolerance is relative to; ``at_floor`` says that the loss is so close to 0 that no drop can be
    large, whatever the weights or the learning rate have in store.
    """

    hold: Hold | None
    unit_fraction: float = float("nan")
    forecast: ChangeForecast = UNKNOWN
    scale: float = float("nan")
    at_floor: bool = False


@dataclass(frozen=True)
class ConvergenceRule:
    """Two criteria, and four conditions that block a stop even where both are met.

    A training has converged when the importance of its weights' trajectory lies at eigenvalue 1 (paper, section 3)
    *and* its loss is predicted to stand still over the horizon.  Both are also true of trainings that have not
    converged; hence they do not count while the loss is no better than the baseline, where the steps are a random
    walk's (:func:`walk_score`), or have a direction that does not fade (:func:`drifts`).

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

    def judge(self, losses: npt.ArrayLike, factor: Real | None, baseline: Baseline | None) -> Verdict:
        """Hear the witnesses.

        Args:
            losses: Array (t,): the losses of all epochs since the start, newest last.
            factor: Factor (r, time) of the newest weights, ``horizon + 1`` snapshots (None: they are not finite).
            baseline: Loss of a network that ignores its input; without it, or where losses are negative, their range is
                the scale.
        """
        values = np.asarray(losses, dtype=np.float64)
        newest = values[-(self.horizon + 2) :]
        if factor is None or not np.isfinite(newest).all():
            return Verdict(Hold.NOT_FINITE)
        if newest.size < self.horizon + 2 or factor.shape[1] < self.horizon + 1:
            return Verdict(Hold.TOO_EARLY)
        finite = values[np.isfinite(values)]
        bounded = baseline is not None and finite.min() >= 0.0  # a loss that can be negative has no floor
        # without a baseline: the range, less the first epoch, which may have started anywhere
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
