"""Readings of a training, one per interval, shared by the callbacks that share a recorder."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_koopman.reading.phase import Phase
from lightning_koopman.reading.reading import TrainingReading, read_gram
from lightning_koopman.stopping.evidence import Baseline
from lightning_koopman.trajectory.recorder import WEIGHTS, Recorder


class Reader:
    """Losses of the current trajectory, and its newest reading."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.told: set[str] = set()  # topics of the warnings about the trajectory in this fit
        self.forget()

    def forget(self) -> None:
        """Reset to the state before a first fit."""
        self.reading: TrainingReading | None = None
        self._losses: list[float] = []
        self._newest = -1  # completed intervals at the newest reading

    def read(
        self, epoch: int, loss: float | None, baseline: Baseline | None = None, *, finite: bool = True
    ) -> TrainingReading:
        """Return the reading after ``epoch`` completed intervals.

        Args:
            epoch: Completed intervals; a snapshot was due after them.
            loss: Training loss of the interval, or None if unknown; an observed scalar replaces it.
            baseline: Loss of a network that ignores its input, or None if unknown.
            finite: Whether the weights were finite.
        """
        if epoch == self._newest and self.reading is not None:
            return self.reading
        if not self.recorder.holds(epoch) or self.recorder.trajectory is None:
            lost = loss is not None and not math.isfinite(loss)
            if lost or not finite:
                return TrainingReading(Phase.DIVERGING, "the loss or the weights are not finite")
            return TrainingReading(Phase.UNKNOWN, "no snapshot was taken")
        if self.recorder.epochs[0] >= self._newest:
            self.forget()  # a new trajectory has begun
        trajectory = self.recorder.trajectory
        of_weights = self.recorder.settings.observable == WEIGHTS
        loss = loss if of_weights else float(trajectory.last())
        self._losses.append(math.nan if loss is None else loss)
        found = read_gram(
            trajectory.step_gram() if of_weights else np.zeros((0, 0)),
            np.array(self._losses if loss is not None else []),
            unit=float(trajectory.step_norms().max(initial=0.0)),
            baseline=baseline,
            sketched=trajectory.sketched,
            before=self.reading,
        )
        if not of_weights and found.phase is Phase.WARMING_UP:
            found = replace(found, phase=Phase.UNKNOWN, evidence="only the weights have a phase")
        self.reading, self._newest = found, epoch
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        known = self.reading or TrainingReading(Phase.WARMING_UP, "")
        return {
            "losses": list(self._losses),
            "newest": self._newest,
            "phase": known.phase.value,
            "judged": [known.judged[0].value, known.judged[1]],
            "fastest": list(known.fastest),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.forget()
        self._losses, self._newest = [float(loss) for loss in state["losses"]], int(state["newest"])
        (distance, span), (judged, running) = state["fastest"], state["judged"]
        self.reading = TrainingReading(
            Phase(state["phase"]),
            "",
            fastest=(float(distance), int(span)),
            judged=(Phase(judged), int(running)),
        )
