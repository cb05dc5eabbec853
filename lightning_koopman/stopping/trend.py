"""Trend of the losses: noise, slope and forecast."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lightning_koopman._types import Array
from lightning_koopman.stopping.forecast import RECENT, predicted_change

HORIZON = 10  # intervals to look ahead
SEEN = 12  # newest losses used
NORMAL = 0.4549  # median of a squared standard normal variable


@dataclass(frozen=True)
class LossTrend:
    """Trend of the loss; NaN where too few losses are known.

    Attributes:
        newest: The newest loss.
        noise: Standard deviation of its fluctuations between intervals, ≥ 0.
        slope: Change per interval over the newest 12 losses.
        slope_error: Standard error of the slope, ≥ 0.
        change: Predicted change over the next 10 intervals.
        change_range: Range in which that change lies in nine of ten trainings.
        fell: Drop of the mean loss from the third quarter of all intervals to the last.  It shows a fall too slow to be
            seen from interval to interval.
        fell_error: Its standard error, ≥ 0.
    """

    newest: float = float("nan")
    noise: float = float("nan")
    slope: float = float("nan")
    slope_error: float = float("nan")
    change: float = float("nan")
    change_range: tuple[float, float] = (float("nan"), float("nan"))
    fell: float = float("nan")
    fell_error: float = float("nan")

    @property
    def score(self) -> float:
        """Slope in units of its standard error."""
        return self.slope / self.slope_error if self.slope_error > 0 else float(np.sign(self.slope)) * np.inf


def line_through(losses: Array) -> LossTrend:
    """Estimate noise and slope of losses (t,), newest last, without a forecast."""
    values = losses[-SEEN:]
    if values.size < 4 or not np.isfinite(values).all():
        return LossTrend(newest=float(losses[-1]) if losses.size else float("nan"))
    bends = np.diff(values, 2)  # zero on a straight line
    noise = float(np.sqrt(np.median(bends**2) / NORMAL / 6))
    at = np.arange(values.size) - (values.size - 1) / 2
    slope = float(at @ values / (at @ at))
    rounding = 1e-12 * float(np.abs(values).max())
    return LossTrend(float(values[-1]), noise, slope, float(max(noise, rounding) / np.sqrt(at @ at)))


def loss_trend(losses: Array) -> LossTrend:
    """Estimate the trend of losses (t,), newest last, with a forecast."""
    line = line_through(losses)
    if np.isnan(line.noise) or losses.size < RECENT:
        return line
    change = predicted_change(losses[-SEEN:], HORIZON)
    doubt = 2 * line.noise + 0.5 * abs(change)
    quarter = losses.size // 4
    fell = float(losses[-2 * quarter : -quarter].mean()) - float(losses[-quarter:].mean())
    fell_error = float(np.sqrt(np.mean(np.diff(losses[-2 * quarter - 2 :], 2) ** 2) / 6 * 2 / quarter))
    return replace(line, change=change, change_range=(change - doubt, change + doubt), fell=fell, fell_error=fell_error)
