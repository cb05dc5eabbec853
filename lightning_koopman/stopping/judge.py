"""Judges round by round whether a training should end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning_koopman.dmd.spectrum import Real
from lightning_koopman.stopping.evidence import Baseline, rate_will_matter
from lightning_koopman.stopping.rule import NOISY, ConvergenceRule, Hold, Patience, StoppingReason


class StopJudge:
    """The losses and learning rates since the weights were last set, and for how long nothing has blocked a stop.

    Args:
        rule: What must be met.
        patience: Rounds running for which it must be, ≥ 1.
        hovering_counts: Whether weights that hover may end a training.
    """

    def __init__(self, rule: ConvergenceRule, patience: int, *, hovering_counts: bool) -> None:
        self.rule, self.running = rule, Patience(patience, hovering_counts)
        self.start()

    def start(self) -> None:
        """The weights were set: what was before does not count."""
        self.losses: list[float] = []
        self.predicted: list[float] = []  # changes of the loss
        self.rates: list[list[float]] = []
        self.running.met = self.running.hovering = 0

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
        """Take in a round.

        Args:
            loss: Its loss.
            factor: As for :meth:`ConvergenceRule.judge`.
            baseline: As for it.
            hovers: Whether the training's phase is hovering.
            rates: The round's learning rates.
            planned: Gives those of the rounds to come; asked only where nothing else blocks a stop.

        Returns:
            What the history keeps of the round, and why it is time to stop.
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
        hold, reason = self.running.hear(hold)
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

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; primitives."""
        return {
            "losses": list(self.losses),
            "predicted": list(self.predicted),
            "rates": [list(rates) for rates in self.rates],
            "running": [self.running.met, self.running.hovering],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.losses = [float(loss) for loss in state["losses"]]
        self.predicted = [float(change) for change in state["predicted"]]
        self.rates = [[float(rate) for rate in rates] for rates in state["rates"]]
        self.running.met, self.running.hovering = (int(each) for each in state["running"])
