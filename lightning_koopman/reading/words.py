"""A reading in plain words."""

from __future__ import annotations

import math

from lightning_koopman.reading.phase import Phase
from lightning_koopman.reading.reading import TrainingReading
from lightning_koopman.stopping.trend import HORIZON


def describe(reading: TrainingReading | None, *, observable: str = "Loss", every: int = 1, unit: str = "epochs") -> str:
    """Describe a reading: the phase with advice, then the numbers behind it, one per line.

    Args:
        reading: The reading, or None if there is none yet.
        observable: Name of the losses.
        every: Epochs or steps between two snapshots.
        unit: ``"epochs"`` or ``"steps"``.

    Example:
        >>> from lightning_koopman.reading.words import describe
        >>> describe(None)
        'Nothing is known yet: too few snapshots.'
    """
    if reading is None:
        return "Nothing is known yet: too few snapshots."
    phase, nothing = reading.phase, reading.phase is Phase.UNKNOWN and not reading.n_steps
    verdict = f"{phase.value.capitalize()}: {phase.meaning}. What to do: {phase.advice}."
    lines = [f"Unknown: {reading.evidence}."] if nothing else [verdict, f"- Evidence: {reading.evidence}."]
    if math.isfinite(reading.step_correlation):
        lines.append(
            f"- Steps: the correlation of successive steps is {reading.step_correlation:.2f} ± "
            f"{reading.step_correlation_error:.2g} (random walk: 0), their spectral weight at eigenvalue 1 is "
            f"{reading.spectral_weight:.2f} ± {reading.spectral_weight_error:.2g} (random walk: 1)."
        )
    if math.isfinite(reading.slowing):
        span = f"{reading.fastest[1] * every} {unit}"
        pace = math.sqrt(1 - reading.slowing)
        lines.append(f"- Pace: in the newest {span}, weights moved {pace:.2g} times as far as in the fastest {span}.")
    if math.isfinite(reading.rate):
        low, high = (_time(each * every) for each in reading.half_life_range)
        lines.append(
            f"- Rate: the directed part of the steps changes by a factor of {reading.rate:.3f} every "
            f"{_span(every, unit)}, so it halves in {_time(reading.half_life * every)} {unit} ({low} to {high}). "
            f"Distance left, relative to the distance since the oldest snapshot: {_share(reading.remaining)}."
        )
    if math.isfinite(reading.loss_change):
        low, high = (f"{each:+.2g}" for each in reading.loss_change_range)
        lines.append(
            f"- {observable}: {reading.loss:.3g}, with noise of {reading.loss_noise:.2g}; predicted change over the "
            f"next {HORIZON * every} {unit}: {reading.loss_change:+.2g} ({low} to {high})."
        )
    return "\n".join(lines)


def _span(every: int, unit: str) -> str:
    return unit.removesuffix("s") if every == 1 else f"{every} {unit}"


def _time(rounds: float) -> str:
    return "∞" if not math.isfinite(rounds) else f"{rounds:.1f}" if rounds < 100 else f"{rounds:.0f}"


def _share(remaining: float) -> str:
    if not math.isfinite(remaining):
        return "unknown"
    return f"{remaining:.0%}" if remaining < 10 else f"{remaining:.0f} times"
