"""Figure of a depth estimate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_koopman._checks import check_instance
from lightning_koopman.depth.estimate import DepthEstimate
from lightning_koopman.plots.style import INK, MUTED, TRAINING, WALK, axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_depth(estimate: DepthEstimate, *, ax: Axes | None = None) -> Figure:
    """Plot amplitudes over frequency, the cutoff, and the frequency at which each layer begins.

    Args:
        estimate: What :func:`estimate_depth` returned.  For several outputs, the largest amplitude relative to its
            cutoff is drawn.
        ax: Axes to draw into (default: a new figure).

    Returns:
        The figure.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import estimate_depth, plot_depth
        >>> x = np.linspace(0, 1, 101)
        >>> len(plot_depth(estimate_depth(x, x**2)).axes)
        1
    """
    check_instance("estimate", estimate, DepthEstimate, "a DepthEstimate")
    figure, axis = axes_of(ax, (6.4, 3.6))
    from matplotlib.ticker import NullFormatter

    cutoff = np.where(estimate.cutoff > 0, estimate.cutoff, np.inf)
    relative = estimate.spectrum_amplitudes / cutoff
    relative = relative if relative.ndim == 1 else relative.max(axis=1)
    for chosen, color, label in ((~estimate.counts, MUTED, "left out"), (estimate.counts, TRAINING, "counts")):
        if not chosen.any():
            continue
        axis.vlines(estimate.spectrum_frequencies[chosen], 1e-4, relative[chosen], color=color, linewidth=1)
        axis.plot(estimate.spectrum_frequencies[chosen], relative[chosen], ".", color=color, markersize=5, label=label)
    axis.axhline(1, color=INK, linewidth=0.8, linestyle="--", label="cutoff")
    for layer, frequency in enumerate(estimate.layer_frequencies):
        label = "layer begins" if layer == 0 else "_"
        axis.axvline(frequency, color=WALK, linewidth=3, alpha=0.35, zorder=0, label=label)
        axis.annotate(
            str(layer + 1),
            (frequency, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=WALK,
        )
    positive = relative[relative > 0]
    lowest = max(1e-3, 0.5 * float(positive.min(initial=0.1)))
    axis.set(xscale="log", yscale="log", ylim=(lowest, 2 * max(1.0, float(relative.max(initial=1.0)))))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("frequency in cycles per unit of x", fontsize=9, color=INK)
    axis.set_ylabel("amplitude / cutoff", fontsize=9, color=INK)
    axis.legend(fontsize=8, frameon=False)
    axis.tick_params(labelsize=8, colors=INK)
    axis.spines[["top", "right"]].set_visible(False)
    plural = "layer" if estimate.n_layers == 1 else "layers"
    axis.set_title(f"{estimate.n_layers} {plural} ({estimate.method})", fontsize=10, color=INK, pad=18)
    return figure
