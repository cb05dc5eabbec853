"""Shared parts of figures: colors, empty figures, and curves with their range."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_koopman.plots import style as plots

INK, GREY, BLUE, ORANGE = plots.INK, plots.MUTED, plots.TRAINING, plots.WALK
GREEN, OLIVE, PURPLE = "#5b7f2b", "#a3b86c", "#6b4ca0"


def blank(width: float, height: float) -> Any:
    """Return an empty figure of the given size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int = 150) -> Path:
    """Save a figure as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path


def band(axis: Any, x: npt.ArrayLike, curves: npt.ArrayLike, style: str = "-", **options: Any) -> None:
    """Draw the geometric mean of curves (count, time), with their range."""
    values = np.asarray(curves)
    axis.fill_between(x, values.min(0), values.max(0), color=options["color"], alpha=0.15, linewidth=0)
    axis.plot(x, np.exp(np.log(values).mean(0)), style, linewidth=1.5, **options)


def grid(axis: Any, **options: Any) -> None:
    """Draw faint grid lines."""
    axis.grid(color=GREY, alpha=0.25, linewidth=0.5, **options)


def legend_below(figure: Any, handles: Sequence[Any], columns: int, **options: Any) -> None:
    """Draw one legend below all panels."""
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, **options)
