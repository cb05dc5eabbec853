"""Colors and axes that all figures share."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from lightning_koopman.reading.phase import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, TRAINING, WALK = "#1b1f24", "#8a929c", "#0b6e99", "#c2571a"
PHASES = {
    Phase.WARMING_UP: "#d9d9d9",
    Phase.DESCENDING: "#2c7fb8",
    Phase.HOVERING: "#f0a30a",
    Phase.SETTLED: "#2e9e5b",
    Phase.DRIFTING: "#8e6bbf",
    Phase.OSCILLATING: "#d6559e",
    Phase.DIVERGING: "#c92a2a",
    Phase.STUCK: "#6b4226",
    Phase.UNKNOWN: "#a6adb4",
}


def check_matplotlib() -> None:
    """Raise ModuleNotFoundError, with the command to install it, if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "figures need matplotlib, which is not installed: pip install 'lightning_koopman[plots]'", name="matplotlib"
        )


def axes_of(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return the given axes and their figure, or new ones of ``size`` in inches.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If ``ax`` is not Axes of matplotlib.
    """
    check_matplotlib()
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    if ax is None:
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots()
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be Axes of matplotlib, got {type(ax).__name__}: use `figure.subplots()`.")
    found: Any = ax.figure
    return getattr(found, "figure", found), ax  # not a subfigure, which cannot be saved


def plain(axis: Axes) -> None:
    """Style axes with small labels, a light grid and no box."""
    axis.tick_params(which="both", labelsize=8, colors=INK)
    axis.grid(color=MUTED, alpha=0.25, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
