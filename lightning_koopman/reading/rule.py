"""The rule that chooses a phase from the evidence."""

from __future__ import annotations

import math

from lightning_koopman.reading.movement import Movement
from lightning_koopman.reading.phase import Phase
from lightning_koopman.reading.steps import LEAST, SURE, StepStatistics
from lightning_koopman.stopping.evidence import Baseline
from lightning_koopman.stopping.trend import HORIZON, LossTrend

FALLS = 2.0  # standard errors by which the slope of a falling loss is negative
LEFT = 4e-3  # least predicted change of the loss within the horizon that counts, relative to the scale
FELL = 6e-3  # least fall of the loss from the third to the last quarter that counts, relative to the scale
CLEARLY = 3.0  # least size of that fall, in standard errors
LASTING = 1.4  # hysteresis: FALLS and LEFT are divided by it while descending, multiplied by it in other phases
EARLY = 10  # number of steps up to which an unclear phase counts as warming up
CONFIRMED = 3  # intervals in a row for which another phase must be found before it takes over
TURNED = 0.03  # steps turn back if the mean cosine of successive ones is below minus this
PEAK, LEAST_PEAK = 0.2, 2.5  # least density of an oscillation: as a share of the largest possible, and absolute
GROWTH = 1.03  # least factor per interval of growing steps
SLOW = 4e-4  # squared distance, relative to the fastest span, below which weights hardly move
NEAR = 0.03  # remaining distance, relative to the distance covered, that counts as none


def judge(
    taken: int,
    steps: StepStatistics | None,
    loss: LossTrend,
    moved: Movement,
    scale: float,
    baseline: Baseline | None,
    now: Phase | None = None,
) -> tuple[Phase, str]:
    """Choose the phase, and give the evidence for it in words.

    Args:
        taken: Number of steps between the snapshots held.
        steps: Their statistics, None if fewer than five have a nonzero length.
        loss: Trend of the losses.
        moved: How fast the weights move.
        scale: Scale for changes of the loss, NaN if unknown.
        baseline: Loss of a network that ignores its input, None if unknown.
        now: The previous phase, if any.
    """
    ease = 1.0 if now is None else 1 / LASTING if now is Phase.DESCENDING else LASTING
    falls = loss.score < -FALLS * ease and not -loss.change <= LEFT * ease * scale
    stuck = baseline is not None and baseline.compare(loss.newest) >= 0 and not falls
    if taken < LEAST:
        return Phase.WARMING_UP, f"{taken} of the {LEAST} steps needed"
    if steps is None:
        return (Phase.STUCK, _stuck(loss, baseline)) if stuck else (Phase.SETTLED, "the weights do not change")
    grows = steps.growth > GROWTH and math.log(steps.growth) > SURE * steps.growth_error
    if grows and loss.score > SURE and loss.slope * HORIZON > LEFT * scale:
        return Phase.DIVERGING, f"the steps grow by {steps.growth - 1:.0%} per interval, and the loss rises"
    if stuck:
        return Phase.STUCK, _stuck(loss, baseline)
    turns, density = steps.peak
    if density > max(PEAK * steps.count, LEAST_PEAK) and density > 2 * steps.weight:
        return (
            Phase.OSCILLATING,
            f"the steps repeat every {1 / turns:.1f} intervals (density {density:.1f}; random walk: 1)",
        )
    successive = f"successive steps have a correlation of {steps.correlation[0]:.2f} ± {steps.errors[0]:.2g}"
    distant = f"distant steps have a correlation of {steps.onward:.2f} ± {steps.onward_error:.2g}"
    turned = steps.correlation[0] < -max(SURE * steps.errors[0], TURNED)
    still = moved.slowing >= 1 - SLOW
    if falls and (steps.directed or still or loss.score < -SURE):
        return Phase.DESCENDING, f"the loss falls, and {distant} (random walk: 0)"
    if still or moved.remaining_range[1] <= NEAR:
        return Phase.SETTLED, "the weights hardly move any more, and no fall of the loss is seen"
    if (turned or not steps.directed) and loss.fell > max(FELL * scale, CLEARLY * loss.fell_error):
        fallen = f"the mean loss fell by {loss.fell:.2g} from the third to the last quarter of the training so far"
        return Phase.DESCENDING, f"{fallen}, although {successive} (random walk: 0)"
    if turned:
        return Phase.HOVERING, f"{successive}: they turn back (random walk: 0)"
    if steps.directed and math.isnan(loss.score):
        return Phase.DESCENDING, f"{distant} (random walk: 0); the loss is unknown"
    if steps.directed:
        change = f"the loss is predicted to change by {loss.change:+.2g} within {HORIZON} intervals"
        return Phase.DRIFTING, f"{distant} (random walk: 0), but {change}: no clear fall of {LEFT:.2%} of {scale:.3g}"
    if steps.count <= EARLY:
        return Phase.WARMING_UP, f"{successive} (random walk: 0)"
    return Phase.UNKNOWN, f"{distant}, {successive} (random walk: 0), and no clear fall of the loss is seen"


def _stuck(loss: LossTrend, baseline: Baseline | None) -> str:
    return f"the loss is {loss.newest:.3g}" + (
        "" if baseline is None else f"; a network that ignores its input has {baseline.loss:.3g}"
    )
