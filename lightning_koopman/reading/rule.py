"""Which phase the evidence tells."""

from __future__ import annotations

import math

from lightning_koopman.reading.movement import Movement
from lightning_koopman.reading.phase import Phase
from lightning_koopman.reading.steps import LEAST, SURE, StepStatistics
from lightning_koopman.stopping.evidence import Baseline
from lightning_koopman.stopping.trend import HORIZON, LossTrend

FALLS = 2.0  # standard errors of the loss's slope
LEFT = 4e-3  # predicted change of the loss within the horizon that counts as one, relative to the scale
FELL = 6e-3  # fall from the third to the last quarter of all rounds, relative to the scale, that goes on
CLEARLY = 3.0  # standard errors of that fall
LASTING = 1.4  # factor by which these two are lower for a phase to last than for it to begin
EARLY = 10  # steps up to which doubt is put down to their small number
CONFIRMED = 3  # rounds running for which another phase must be told before it takes over
TURNED = 0.03  # mean cosine of successive steps, below 0, from which they turn back
PEAK, LEAST_PEAK = 0.2, 2.5  # share of the largest density possible, and the density, of an oscillation
GROWTH = 1.03  # factor a round of growing steps
SLOW = 4e-4  # of the fastest squared span: that of weights that hardly move
NEAR = 0.03  # remaining distance relative to the distance come that counts as none


def judge(
    taken: int,
    steps: StepStatistics | None,
    loss: LossTrend,
    moved: Movement,
    scale: float,
    baseline: Baseline | None,
    now: Phase | None = None,
) -> tuple[Phase, str]:
    """The phase, and the evidence for it in words.

    Args:
        taken: Steps between the snapshots held.
        steps: Their statistics, None where fewer than five have a length.
        loss: Trend of the losses.
        moved: How fast the weights move.
        scale: What changes of the loss are relative to, NaN where unknown.
        baseline: Loss of a network that ignores its input, where it is known.
        now: The phase so far.
    """
    ease = 1.0 if now is None else 1 / LASTING if now is Phase.DESCENDING else LASTING
    falls = loss.score < -FALLS * ease and not -loss.change <= LEFT * ease * scale
    stuck = baseline is not None and baseline.compare(loss.newest) >= 0 and not falls
    if taken < LEAST:
        return Phase.WARMING_UP, f"{taken} of {LEAST} steps"
    if steps is None:
        return (Phase.STUCK, _stuck(loss, baseline)) if stuck else (Phase.SETTLED, "the weights do not change")
    grows = steps.growth > GROWTH and math.log(steps.growth) > SURE * steps.growth_error
    if grows and loss.score > SURE and loss.slope * HORIZON > LEFT * scale:
        return Phase.DIVERGING, f"the steps grow by {steps.growth - 1:.0%} a round, and the loss rises"
    if stuck:
        return Phase.STUCK, _stuck(loss, baseline)
    turns, density = steps.peak
    if density > max(PEAK * steps.count, LEAST_PEAK) and density > 2 * steps.weight:
        return (
            Phase.OSCILLATING,
            f"the steps return every {1 / turns:.1f} rounds (density {density:.1f}; a walk's is 1)",
        )
    successive = f"successive steps have a correlation of {steps.correlation[0]:.2f} ± {steps.errors[0]:.2g}"
    distant = f"distant steps have a correlation of {steps.onward:.2f} ± {steps.onward_error:.2g}"
    turned = steps.correlation[0] < -max(SURE * steps.errors[0], TURNED)
    still = moved.slowing >= 1 - SLOW
    if falls and (steps.directed or still or loss.score < -SURE):
        return Phase.DESCENDING, f"the loss falls, and {distant} (a walk's is 0)"
    if still or moved.remaining_range[1] <= NEAR:
        return Phase.SETTLED, "the weights hardly move any more, and the loss stands still"
    if (turned or not steps.directed) and loss.fell > max(FELL * scale, CLEARLY * loss.fell_error):
        fallen = f"the mean loss fell by {loss.fell:.2g} from the third to the last quarter of all rounds"
        return Phase.DESCENDING, f"{fallen}, though {successive} (a walk's is 0)"
    if turned:
        return Phase.HOVERING, f"{successive}: they turn back (a walk's is 0)"
    if steps.directed and math.isnan(loss.score):
        return Phase.DESCENDING, f"{distant} (a walk's is 0); the loss is not known"
    if steps.directed:
        change = f"the loss is predicted to change by {loss.change:+.2g} within {HORIZON} rounds"
        return Phase.DRIFTING, f"{distant} (a walk's is 0), but {change}: no fall of {LEFT:.2%} of {scale:.3g}"
    return Phase.WARMING_UP if steps.count <= EARLY else Phase.UNKNOWN, f"{successive}, a walk's is 0"


def confirm(judged: Phase, before: Phase, running: int) -> Phase:
    """The phase that holds, where another one than before has been told for some rounds running."""
    at_once = before is Phase.WARMING_UP or judged is Phase.DIVERGING
    return judged if at_once or running >= CONFIRMED else before


def _stuck(loss: LossTrend, baseline: Baseline | None) -> str:
    return f"loss {loss.newest:.3g}" + (
        "" if baseline is None else f", {baseline.loss:.3g} without looking at the input"
    )
