"""Figure of compared trainings: the matrix of distances between their spectra."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from lightning_koopman._checks import check_instance
from lightning_koopman.compare.comparison import TrainingComparison
from lightning_koopman.plots.style import INK, axes_of, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_comparison(
    comparison: TrainingComparison, *, by: str = "eigenvalues", names: list[str] | None = None, ax: Axes | None = None
) -> Figure:
    """Plot the matrix of distances between runs, with groups in the order of an average-linkage clustering.

    Args:
        comparison: What :func:`compare_trainings` returned.
        by: ``"eigenvalues"``, or ``"steps"`` for the spectral measures of the steps.
        names: Names of the groups (default: their numbers).
        ax: Axes to draw into (default: a new figure).

    Returns:
        The figure.

    Raises:
        ValueError: If these distances are unknown, or there are not as many names as groups.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import compare_trainings, dmd_rrr, plot_comparison
        >>> runs = [dmd_rrr(1 + rate ** np.arange(12.0), delays=6) for rate in (0.5, 0.6, 0.9)]
        >>> len(plot_comparison(compare_trainings(*runs)).axes)
        2
    """
    check_matplotlib()
    check_instance("comparison", comparison, TrainingComparison, "a TrainingComparison")
    order, groups = comparison.order(by), max(comparison.groups) + 1
    names = [str(index) for index in range(groups)] if names is None else names
    if not isinstance(names, (list, tuple)) or [isinstance(each, str) for each in names] != [True] * groups:
        raise ValueError(f"names must be one string for each of the {groups} groups, got {names!s:.60}.")
    figure, axis = axes_of(ax, (6.6, 5.0))
    runs = [index for group in order for index, member in enumerate(comparison.groups) if member == group]
    shown = axis.imshow(comparison.distances[by][runs][:, runs], cmap="cividis")
    ends = np.cumsum([comparison.groups.count(group) for group in order])
    middles = ends - [comparison.groups.count(group) / 2 + 0.5 for group in order]
    for side, rotation in ((axis.xaxis, 90), (axis.yaxis, 0)):
        side.set_ticks(middles, [names[group] for group in order], rotation=rotation, fontsize=8, color=INK)
    for line, end in itertools.product((axis.axhline, axis.axvline), ends[:-1] - 0.5):
        line(end, color="white", linewidth=0.8)
    axis.tick_params(length=0)
    measured = by if by == "eigenvalues" else "spectral measures of the steps"
    figure.colorbar(shown, ax=axis).set_label(f"distance of the {measured}", fontsize=9)
    return figure
