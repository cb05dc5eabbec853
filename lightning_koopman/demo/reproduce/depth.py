"""Table 1 and Figure 4: hierarchical support vector regression, and the scale that suits a frequency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lightning_koopman.demo.experiments.cache import Arrays, once
from lightning_koopman.demo.table1 import TABLE, Row, largest_error, samples
from lightning_koopman.depth.hsvr import HSVR

PRODUCTS = np.geomspace(1 / 60, 1, 25)  # σ f; the paper uses 1/6
FREQUENCY = 5.0  # of the test wave


def table(folder: Path) -> Arrays:
    """Return the layers and errors of both methods for each row, cached on disk."""

    def find() -> dict[str, Any]:
        found: dict[str, list[Any]] = {"fft_layers": [], "fft_error": [], "dmd_layers": [], "dmd_error": []}
        for row in TABLE:
            for method in ("fft", "dmd"):
                model = HSVR(method=method, samples_per_scale=None).fit(*samples(row))
                found[f"{method}_layers"].append(model.n_layers_)
                found[f"{method}_error"].append(largest_error(model, row))
        return {"epsilon": [0.01 * np.ptp(samples(row)[1]) for row in TABLE], **found}

    return once(folder / "table-1.npz", find)


def scales(folder: Path) -> Arrays:
    """Return the error of a single layer on a wave, by the product of scale and frequency, cached on disk."""

    def find() -> dict[str, Any]:
        wave = Row("wave", lambda x: np.sin(2 * np.pi * FREQUENCY * x), 0.02, 1, 0, 1, 0)
        errors = [
            largest_error(HSVR(scales=[product / FREQUENCY]).fit(*samples(wave)), wave)
            for product in (*PRODUCTS, 1 / 6)
        ]
        return {"errors": np.array(errors[:-1]) / 0.02, "papers": errors[-1] / 0.02}

    return once(folder / "figure-4.npz", find)
