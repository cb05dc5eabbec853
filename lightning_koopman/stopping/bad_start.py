"""Whether a training started badly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_koopman.dmd.spectrum import Real
from lightning_koopman.stopping.evidence import MARGIN, Baseline, unit_fraction
from lightning_koopman.stopping.forecast import RECENT, forecast_change

WILD = 2.0  # a first loss above this multiple of the baseline means weights of a wrong scale


def bad_start(losses: npt.ArrayLike, factor: Real | None, baseline: Baseline, *, horizon: int) -> str | None:
    """Return why a training started badly, in words; "" if it is too early to say, None if it did not.

    A start is bad if the loss is no better than the baseline, and one of two holds.  Either the loss began far above
    the baseline, which means weights of a wrong scale.  Or it neither falls nor is predicted to fall.  The weights look
    converged in both cases (paper, section 3).

    Args:
        losses: Array (t,): losses of all epochs since the start, newest last.
        factor: Factor (r, time) of the newest weights (None: unknown), used only in the wording.
        baseline: Loss of a network that ignores its input.
        horizon: Epochs to look ahead, ≥ 1.
    """
    values = np.asarray(losses, dtype=np.float64)
    newest = values[-RECENT:]
    order = baseline.compare(newest[-1])
    if order < 0:
        return None
    if values[0] <= WILD * baseline.loss:
        if newest.size < 2:
            return ""
        slope = (newest[-1] - newest[0]) / (newest.size - 1)
        change = forecast_change(newest, horizon).change if newest.size == RECENT else slope * horizon
        fallen = values[values.size // 2] - values[-1]
        if max(-change, fallen) > MARGIN * baseline.loss:
            return ""
    reason = (
        f"the loss of {newest[-1]:.3g} is {'worse' if order > 0 else 'no better'} than {baseline.loss:.3g}, that of a "
        "network which ignores its input"
    )
    if factor is not None and factor.shape[1] >= 3 and np.any(factor[:, :-1]):
        reason += f", while {unit_fraction(factor):.0%} of the weights' importance lies near eigenvalue 1"
    return reason
