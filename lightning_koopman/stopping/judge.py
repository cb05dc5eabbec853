"""Decides after each interval whether a training should end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning_koopman.dmd.spectrum import Real
from lightning_koopman.stopping.evidence import Baseline, rate_will_matter
from lightning_koopman.stopping.rule import HOVERED, NOISY, ConvergenceRule, Hold, StoppingReason


class StopJudge:
    """Losses and learning rates since the weights were last set, and for how long nothing has blocked a stop.

    Args:
        rule: Criteria that must be met.
        patience: Intervals in a row for which they must be met, ≥ 1.
        hovering_counts: Whether hovering weights may end a training.
    """

    def __init__(self, rule: ConvergenceRule, patience: int, *, hovering_counts: bool) -> None:
        self.rule, self.patience, self.hovering_counts = rule, patience, hovering_counts
        self.start()

    def start(self) -> None:
        """Start over after the weights were set: discard all earlier values."""
        self.losses: list[float] = []
        self.predicted: list[float] = []  # predicted changes of the loss
        self.rates: list[list[float]] = []
        self.met = self.hovering = 0  # intervals in a row that nothing blocked, or only noise around a point

    def judge(
        self,
        loss: float,
        factor: Real | None,
        baseline: Baseline | None,
        *,
        hovers: bool,
        rates: Sequence[float],
        planned: Callable[[], list[list[float]]],
    ) -> tuple[dict[str, Any], StoppingReason]:
        """Judge the newest interval.

        Args:
            loss: Loss of the interval.
            factor: As for :meth:`ConvergenceRule.judge`.
            baseline: As for :meth:`ConvergenceRule.judge`.
            hovers: Whether the training's phase is hovering.
            rates: Learning rates of the interval.
            planned: Returns the planned learning rates; called only if nothing but noise blocks a stop.

        Returns:
            The row for the history, and the reason to stop.
        """
        self.losses.append(loss)
        verdict = self.rule.judge(self.losses, factor, baseline)
        noise = hovers and verdict.hold in NOISY
        hold = Hold.HOVERING if noise else verdict.hold
        self.rates.append(list(rates))
        if noise or (hold is None and not verdict.at_floor):
            tolerance = self.rule.tolerance * verdict.scale
            ahead = planned()
            if rate_will_matter(self.rates, ahead, self.losses, span=self.rule.horizon, tolerance=tolerance):
                hold = Hold.SCHEDULE
        hold, reason = self._count(hold)
        forecast, horizon = verdict.forecast, self.rule.horizon
        self.predicted.append(forecast.change)
        seen = len(self.losses) > horizon
        return {
            "value": loss,
            "predicted_change": forecast.change,
            "actual_change": loss - self.losses[-1 - horizon] if seen else math.nan,
            "predicted_then": self.predicted[-1 - horizon] if seen else math.nan,
            "unit_fraction": verdict.unit_fraction,
            "bound": forecast.bound,
            "swing": forecast.swing,
            "scale": verdict.scale,
            "learning_rate": max(rates, default=math.nan),
            "hold": "" if hold is None else hold.value,
        }, reason

    def _count(self, hold: Hold | None) -> tuple[Hold | None, StoppingReason]:
        """Count an interval with its block, if any; return what blocks a stop now, and the reason to stop."""
        self.met = self.met + 1 if hold is None else 0
        self.hovering = self.hovering + 1 if hold in (None, Hold.HOVERING) else 0
        if self.met >= self.patience:
            return None, StoppingReason.CONVERGED
        if self.hovering_counts and hold is Hold.HOVERING and self.hovering >= HOVERED:
            return None, StoppingReason.HOVERING
        return Hold.PATIENCE if hold is None else hold, StoppingReason.NOT_STOPPED

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, made of primitives."""
        return {
            "losses": list(self.losses),
            "predicted": list(self.predicted),
            "rates": [list(rates) for rates in self.rates],
            "running": [self.met, self.hovering],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.losses = [float(loss) for loss in state["losses"]]
        self.predicted = [float(change) for change in state["predicted"]]
        self.rates = [[float(rate) for rate in rates] for rates in state["rates"]]
        self.met, self.hovering = (int(each) for each in state["running"])
