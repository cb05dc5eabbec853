"""Aliases that many modules share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
AllSum = Callable[[Array], Array]  # sums a small array over the processes that hold parts of a state
