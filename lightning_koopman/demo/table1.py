"""The functions of the paper's Table 1 (supplement, section 11), with the values it reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy import cos, pi, sin

Array = npt.NDArray[np.float64]

DOMAIN, N_SAMPLES, N_FINE = (0.0, 2.0), 1001, 2001  # end points included, as the ε of all 16 rows shows


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: The function's formula.
        function: The function.
        epsilon: ε of the models, 1 % of the range.
        fft_layers: Number of layers from the Fourier transform.
        fft_error: Error of that model.
        dmd_layers: Number of layers from DMD.
        dmd_error: Error of that model.
    """

    name: str
    function: Callable[[Array], Array]
    epsilon: float
    fft_layers: int
    fft_error: float
    dmd_layers: int
    dmd_error: float


TABLE = (
    Row("sin(2πx)", lambda x: sin(2 * pi * x), 0.02, 1, 0.02, 1, 0.02),
    Row("sin(20πx)", lambda x: sin(20 * pi * x), 0.0199, 1, 0.021, 1, 0.02),
    Row("sin(200πx)", lambda x: sin(200 * pi * x), 0.019, 1, 0.093, 1, 0.097),
    Row("100 sin(20πx)", lambda x: 100 * sin(20 * pi * x), 1.99, 1, 2, 1, 2.01),
    Row("40 cos(2πx)", lambda x: 40 * cos(2 * pi * x), 0.8, 1, 0.8, 1, 0.8),
    Row("100 cos(20πx)", lambda x: 100 * cos(20 * pi * x), 2, 1, 2.03, 1, 2),
    Row("sin(2πx²)", lambda x: sin(2 * pi * x**2), 0.0199, 5, 0.02, 1, 0.02),
    Row("x + x² + x³", lambda x: x + x**2 + x**3, 0.14, 2, 0.14, 1, 8),
    Row("x + sin(2πx⁴)", lambda x: x + sin(2 * pi * x**4), 0.03, 7, 0.037, 1, 0.034),
    Row("cos(2πx) + sin(20πx)", lambda x: cos(2 * pi * x) + sin(20 * pi * x), 0.0397, 2, 0.0404, 2, 0.042),
    Row("cos(20πx) sin(15πx)", lambda x: cos(20 * pi * x) * sin(15 * pi * x), 0.02, 2, 0.021, 2, 0.022),
    Row("cos(32πx)³", lambda x: cos(32 * pi * x) ** 3, 0.0199, 1, 0.022, 2, 0.022),
    Row(
        "sin(13πx) + sin(17πx) + sin(19πx) + sin(23πx)",
        lambda x: sin(13 * pi * x) + sin(17 * pi * x) + sin(19 * pi * x) + sin(23 * pi * x),
        *(0.076, 1, 0.077, 1, 0.077),
    ),
    Row(
        "sin(50πx) sin(20πx) cos(15πx)",
        lambda x: sin(50 * pi * x) * sin(20 * pi * x) * cos(15 * pi * x),
        *(0.0187, 3, 0.02, 2, 0.02),
    ),
    Row(
        "sin(40πx) cos(10πx) + 3 sin(20x) sin(40x)",
        lambda x: sin(40 * pi * x) * cos(10 * pi * x) + 3 * sin(20 * x) * sin(40 * x),
        *(0.064, 5, 0.065, 3, 0.066),
    ),
    Row("sin(2x) cos(32x)", lambda x: sin(2 * x) * cos(32 * x), 0.0198, 5, 0.02, 1, 0.02),
)


def samples(row: Row, n: int = N_SAMPLES) -> tuple[Array, Array]:
    """Return equidistant points (n, 1) and the function's values (n,) there."""
    points = np.linspace(*DOMAIN, n)
    return points[:, None], row.function(points)


def largest_error(model: Any, row: Row) -> float:
    """Return a fitted model's largest error on the fine grid: the samples and the points between them."""
    points, values = samples(row, N_FINE)
    return float(np.abs(model.predict(points) - values).max())
