"""Figures of a whole training: its losses with the phases, and its phase portrait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_koopman.plots.style import INK, MUTED, PHASES, TRAINING, WALK, axes_of, check_matplotlib, plain
from lightning_koopman.reading.phase import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Rows = Sequence[Mapping[str, Any]]

NEEDED = "epoch", "train_loss", "step_length", "step_correlation", "step_correlation_error", "slowing"


def plot_history(history: Rows, *, ax: Axes | None = None) -> Figure:
    """Plot the training loss below a strip of the phases, and the numbers behind the phases.

    A dotted line marks where a new trajectory begins (another learning rate, pruned, restarted, other weights), with
    the new learning rate if that has changed.

    Args:
        history: Rows such as :attr:`KoopmanSpectrumMonitor.history`, with ``epoch``, ``train_loss``, ``phase``,
            ``step_length``, ``step_correlation``, ``step_correlation_error`` and ``slowing``.
        ax: Axes for the loss and the strip only, without the numbers (default: a new figure).

    Returns:
        The figure.

    Raises:
        ValueError: If the history is empty or lacks one of these columns.

    Example:
        >>> from lightning_koopman import plot_history
        >>> row = {"epoch": 6, "train_loss": 0.5, "phase": "descending", "slowing": 0.1, "step_length": 0.5}
        >>> row |= {"step_correlation": 0.4, "step_correlation_error": 0.01}
        >>> len(plot_history([row]).axes)
        2
    """
    _check_rows(history)
    check_matplotlib()
    from matplotlib.figure import Figure

    by_steps = getattr(history, "every_n_steps", None) is not None
    at = np.array([row["step" if by_steps else "epoch"] for row in history], dtype=float)
    name = "optimizer steps" if by_steps else "epochs completed"
    if ax is not None:
        figure, axis = axes_of(ax, (0, 0))
        _draw_losses(axis, history, at)
        axis.set_xlabel(name, fontsize=9, color=INK)
        return figure
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    _draw_losses(top, history, at)
    values = {key: np.array([row[key] for row in history], dtype=float) for key in NEEDED}
    correlation, doubt = values["step_correlation"], 2 * values["step_correlation_error"]
    bottom.fill_between(
        at, -doubt, doubt, color=WALK, alpha=0.25, linewidth=0, label="random walk, two standard errors"
    )
    bottom.axhline(0, color=WALK, linewidth=1, linestyle="--")
    bottom.plot(at, correlation, color=TRAINING, linewidth=1.6, label="step correlation")
    bottom.plot(at, values["slowing"], color=MUTED, linewidth=1.4, label="slowing (0: at full pace, 1: at rest)")
    bottom.set(ylim=(-0.85, 1.05))
    begins = _begins(history, at)
    for where, told in begins.items():
        for axis in (top, bottom):
            axis.axvline(where, color=INK, linewidth=1, linestyle=":")
        place = {"xytext": (3, 0), "textcoords": "offset points", "rotation": 90, "fontsize": 8, "color": INK}
        top.annotate(told, (where, 0.35), xycoords=top.get_xaxis_transform(), **place)
    if begins:
        bottom.plot([], [], ":", color=INK, label="new trajectory: another rate, pruned, restarted or other weights")
    bottom.set_xlabel(name, fontsize=9, color=INK)
    bottom.legend(fontsize=8, frameon=False, loc="lower right", ncols=2)
    plain(bottom)
    return figure


def plot_portrait(history: Rows, *, ax: Axes | None = None) -> Figure:
    """Plot the phase portrait of a training: its path in step correlation over relative step length.

    A training starts at the right, with long steps in one direction.  It moves to the left as it settles, and falls
    below the walk's band when it hovers.

    Args:
        history: Rows such as :attr:`KoopmanSpectrumMonitor.history`; see :func:`plot_history`.
        ax: Axes to draw into (default: a new figure).

    Returns:
        The figure.

    Raises:
        ValueError: If the history is empty or lacks one of these columns.

    Example:
        >>> from lightning_koopman import plot_portrait
        >>> row = {"epoch": 6, "train_loss": 0.5, "phase": "descending", "slowing": 0.1, "step_length": 0.5}
        >>> row |= {"step_correlation": 0.4, "step_correlation_error": 0.01}
        >>> len(plot_portrait([row]).axes)
        1
    """
    _check_rows(history)
    figure, axis = axes_of(ax, (6.0, 4.8))
    known = [row for row in history if np.isfinite(row["step_correlation"]) and row["step_length"] > 0]
    if not known:
        axis.text(0.5, 0.5, "too few steps", transform=axis.transAxes, ha="center", color=MUTED)
        return figure
    lengths = np.array([row["step_length"] for row in known], dtype=float)
    lengths /= max((row["step_length"] for row in history if np.isfinite(row["step_length"])), default=1.0)
    correlation = np.array([row["step_correlation"] for row in known], dtype=float)
    doubt = 2 * float(np.median([row["step_correlation_error"] for row in known]))
    axis.axhspan(-doubt, doubt, color=WALK, alpha=0.25, linewidth=0, label="random walk, two standard errors")
    axis.axhline(0, color=WALK, linewidth=1, linestyle="--")
    axis.plot(lengths, correlation, color=MUTED, linewidth=0.8, zorder=2)
    phases = [Phase(row["phase"]) for row in known]
    for phase, color in PHASES.items():
        chosen = np.array([each is phase for each in phases])
        if chosen.any():
            axis.scatter(
                lengths[chosen], correlation[chosen], s=26, color=color, edgecolors="white", linewidths=0.5, zorder=3,
                label=phase.value,
            )  # fmt: skip
    for row, x, y in {0: (known[0], lengths[0], correlation[0]), 1: (known[-1], lengths[-1], correlation[-1])}.values():
        axis.annotate(f"{row['epoch']}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8, color=INK)
    axis.set_xscale("log")
    axis.set_xlabel("step length relative to the longest", fontsize=9, color=INK)
    axis.set_ylabel("step correlation\n(below 0: turns back; above 0: keeps its direction)", fontsize=9, color=INK)
    axis.legend(fontsize=8, frameon=False)
    plain(axis)
    return figure


def _check_rows(history: object) -> None:
    """Raise ValueError unless these are rows with a phase and the numbers needed."""
    whole = isinstance(history, Sequence) and len(history) and all(isinstance(row, Mapping) for row in history)
    rows: Any = history
    if not whole or not all(isinstance(row.get(key), Real) for row in rows for key in NEEDED):
        raise ValueError(f"history must be rows with numbers for {', '.join(NEEDED)}, got {history!r:.60}.")
    known = {phase.value for phase in Phase}
    unknown = next((row.get("phase") for row in rows if row.get("phase") not in known), None)
    if unknown is not None or any("phase" not in row for row in rows):
        raise ValueError(
            f"history must have a phase in each row, one of {', '.join(sorted(known))}; got {unknown!r:.60}."
        )


def _draw_losses(axis: Axes, history: Rows, at: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    """Draw the losses, and above them a strip of the phases."""
    from matplotlib.patches import Patch, Rectangle

    losses = np.array([row["train_loss"] for row in history], dtype=float)
    axis.plot(at, losses, color=INK, linewidth=1.4)
    if np.nanmin(losses, initial=np.inf) > 0 and np.isfinite(losses).any():
        axis.set_yscale("log")
    axis.set_ylabel("training loss", fontsize=9, color=INK)
    width = float(np.median(np.diff(at))) if len(at) > 1 else 1.0
    phases = [Phase(row["phase"]) for row in history]
    for where, phase in zip(at, phases, strict=True):
        strip = Rectangle((where - width, 1.01), width, 0.06, color=PHASES[phase], linewidth=0, clip_on=False)
        strip.set_transform(axis.get_xaxis_transform())
        axis.add_patch(strip)
    handles = [Patch(color=color, label=phase.value) for phase, color in PHASES.items() if phase in phases]
    axis.legend(handles=handles, fontsize=8, frameon=False, loc="upper right", ncols=2)
    plain(axis)


def _begins(history: Rows, at: np.ndarray[Any, np.dtype[np.float64]]) -> dict[float, str]:
    """Find where new trajectories begin, with the new learning rate if it has changed."""
    found = {}
    for before, now, where in zip(history, history[1:], at, strict=False):
        if now.get("n_snapshots", 0) < before.get("n_snapshots", 0):
            rates = [row.get("learning_rate", np.nan) for row in (before, now)]
            found[float(where)] = f"rate {rates[1]:.2g}" if abs(rates[1] - rates[0]) > 0 else ""
    return found
