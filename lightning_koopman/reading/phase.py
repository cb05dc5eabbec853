"""The phases of a training, what they mean, and what to do about them."""

from __future__ import annotations

from enum import Enum
from typing import SupportsFloat

from lightning_koopman._checks import whole_numbers


class Phase(Enum):
    """What a training is doing, in one word.

    Example:
        >>> from lightning_koopman import Phase
        >>> Phase.HOVERING.value
        'hovering'
        >>> Phase.HOVERING.advice
        'lower the learning rate or average the weights: at this rate further epochs change nothing'
    """

    WARMING_UP = "warming up"
    DESCENDING = "descending"
    HOVERING = "hovering"
    SETTLED = "settled"
    DRIFTING = "drifting"
    OSCILLATING = "oscillating"
    DIVERGING = "diverging"
    STUCK = "stuck"
    UNKNOWN = "unknown"

    @property
    def meaning(self) -> str:
        """What the weights do."""
        return MEANINGS[self][0]

    @property
    def advice(self) -> str:
        """What to do about it."""
        return MEANINGS[self][1]

    @property
    def code(self) -> int:
        """Index in the list above, from 0: a number for loggers."""
        return list(Phase).index(self)

    @classmethod
    def of(cls, code: SupportsFloat) -> Phase:
        """Return the phase of a code, such as the logged ``koopman/phase``.

        Example:
            >>> from lightning_koopman import Phase
            >>> Phase.of(1.0).value
            'descending'
        """
        phases: list[Phase] = list(cls)
        if getattr(code, "ndim", 0) or isinstance(code, (list, tuple)):
            raise ValueError(f"code must be one number, got {code!r}.")
        return phases[int(whole_numbers("code", code, 0, len(phases) - 1)[0])]


MEANINGS = {
    Phase.WARMING_UP: ("there are too few snapshots to tell", "keep training"),
    Phase.DESCENDING: ("the weights keep moving and the loss falls", "keep training"),
    Phase.HOVERING: (
        "the weights fluctuate around a point at the noise floor of this learning rate",
        "lower the learning rate or average the weights: at this rate further epochs change nothing",
    ),
    Phase.SETTLED: ("no further change is expected at this learning rate", "stop"),
    Phase.DRIFTING: (
        "the weights keep moving while the loss stands still",
        "stop, or judge by the validation loss: the training loss no longer improves",
    ),
    Phase.OSCILLATING: ("the weights swing back and forth", "lower the learning rate or the momentum"),
    Phase.DIVERGING: ("the steps and the loss grow", "lower the learning rate, or clip the gradients"),
    Phase.STUCK: (
        "the loss is no better than that of a network which ignores its input",
        "check the data, the initialization and the learning rate",
    ),
    Phase.UNKNOWN: (
        "the weights keep no lasting direction, and no clear fall of the loss is seen",
        "keep training, or lower the learning rate",
    ),
}
