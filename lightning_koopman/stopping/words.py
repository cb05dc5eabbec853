"""Why a training was stopped, or was not, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_koopman.stopping.rule import ConvergenceRule

COLLAPSED = 1e-3  # share of the highest learning rate below which weights stand still, converged or not


def why_converged(row: Mapping[str, Any], rule: ConvergenceRule, observable: str, span: str, scale: str) -> str:
    """Return the evidence for a stop, in words.

    Args:
        row: Row of the history.
        rule: Rule by which it was judged.
        observable: Name of the loss.
        span: Horizon of the rule, in words.
        scale: Name of the loss that the tolerance is relative to.
    """
    return (
        f"{row['unit_fraction']:.0%} of the weights' importance in the last {rule.horizon + 1} snapshots lies within "
        f"{rule.radius:g} of eigenvalue 1, and "
        f"{observable} = {row['value']:.3g} is predicted to change by {row['predicted_change']:+.1g} over the next "
        f"{span} (bound {row['bound']:.1g}), less than {rule.tolerance:g} times {scale} ({row['scale']:.3g}). "
    )


def why_not(holds: Iterable[str]) -> str:
    """Return what blocked a stop, in one line, the most frequent first."""
    counts = Counter(hold for hold in holds if hold).most_common(3)
    told = (f"{hold} ({count} {'time' if count == 1 else 'times'})" for hold, count in counts)
    return "; ".join(told) or "no epoch was judged, since the observed loss was never logged"


def collapse(rates: Sequence[float]) -> str:
    """Return a caution if the learning rate has fallen so far that the weights stand still anyway, else nothing."""
    highest, rate = max(rates), rates[-1]
    if not rate < COLLAPSED * highest:
        return ""
    return f" But the learning rate has fallen from {highest:.2g} to {rate:.2g}, at which the weights can hardly move."
