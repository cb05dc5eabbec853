"""Why a training was stopped, and why not, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_koopman.stopping.rule import ConvergenceRule

COLLAPSED = 1e-3  # of the highest learning rate: with less, weights stand still whatever the loss has left to give


def why_converged(row: Mapping[str, Any], rule: ConvergenceRule, observable: str, span: str, scale: str) -> str:
    """The evidence of a stop.

    Args:
        row: Of the history.
        rule: What it was judged by.
        observable: Name of the loss.
        span: Its horizon, as a length of time.
        scale: Name of what changes are relative to.
    """
    return (
        f"{row['unit_fraction']:.0%} of the weights' importance lies within {rule.radius:g} of eigenvalue 1, and "
        f"{observable} = {row['value']:.3g} is predicted to change by {row['predicted_change']:+.1g} over the next "
        f"{span}, at most {row['bound']:.1g}: less than {rule.tolerance:g} of {row['scale']:.3g}, {scale}. "
    )


def why_not(holds: Iterable[str]) -> str:
    """What held a stop back, in one line, the most frequent first."""
    counts = Counter(hold for hold in holds if hold).most_common(3)
    return "; ".join(f"{hold} ({count} times)" for hold, count in counts) or "nothing was judged"


def collapse(rates: Sequence[float]) -> str:
    """A sentence where the learning rate has fallen so far that the weights stand still in any case, or nothing."""
    highest, rate = max(rates), rates[-1]
    if not rate < COLLAPSED * highest:
        return ""
    return f" But the learning rate has fallen from {highest:.2g} to {rate:.2g}: nothing can move at that."
