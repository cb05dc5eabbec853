"""Figures of spectra, of their history, and of depth estimates. The only module that needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_koopman._checks import check_instance, check_positive
from lightning_koopman.depth.estimate import DepthEstimate
from lightning_koopman.dmd.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, MUTED, TRAINING, WALK = "#1b1f24", "#8a929c", "#0b6e99", "#c2571a"
RESIDUALS = (1e-4, 1.0)  # ends of the colour scale


def check_matplotlib() -> None:
    """Raise ModuleNotFoundError, with the mend, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "figures need matplotlib, which is not installed: pip install 'lightning_koopman[plots]'", name="matplotlib"
        )


def plot_spectrum(
    spectrum: Spectrum, surrogate: Spectrum | None = None, *, radius: float = 0.05, title: str = "training"
) -> Figure:
    """Eigenvalues in the unit circle: area by importance, colour by residual, the surrogate beside them.

    Of sketched trajectories, a thin circle around each eigenvalue shows its standard error.

    Args:
        spectrum: The training's spectrum.
        surrogate: Spectrum of the random walk with the same step lengths (default: none drawn).
        radius: Radius of the disc around 1 that is outlined.
        title: Heading of the training's panel.

    Returns:
        A matplotlib figure, not registered with pyplot: nothing needs to be closed.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import dmd_rrr, plot_spectrum
        >>> figure = plot_spectrum(dmd_rrr(1 + 0.5 ** np.arange(10.0), delays=6))
        >>> len(figure.axes)
        2
    """
    check_matplotlib()
    check_instance("spectrum", spectrum, Spectrum, "a Spectrum")
    if surrogate is not None:
        check_instance("surrogate", surrogate, Spectrum, "a Spectrum")
    radius, title = check_positive("radius", radius), str(check_instance("title", title, str, "a text"))
    from matplotlib import colors
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = [(title, spectrum)] + ([("random walk, same step lengths", surrogate)] if surrogate is not None else [])
    figure = Figure(figsize=(4.6 * len(panels) + 0.9, 5.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    scale = colors.LogNorm(*RESIDUALS, clip=True)
    for axis, (name, drawn) in zip(axes, panels, strict=True):
        _draw_eigenvalues(axis, drawn, scale, radius)
        axis.set_title(
            f"{name}\n{drawn.unit_fraction(radius):.0%} of importance within {radius:g} of 1 · rank {drawn.rank}",
            fontsize=10,
            color=INK,
        )
    handles = [
        Line2D([], [], linestyle="", marker="o", color=MUTED, markersize=size, label=label)
        for size, label in ((4, "little importance"), (11, "the largest"))
    ]
    handles.append(Line2D([], [], color=WALK, linewidth=1.2, linestyle=(0, (2, 1.5)), label=f"within {radius:g} of 1"))
    handles.append(Line2D([], [], color=MUTED, linewidth=1, label="modulus 1: neither grows nor decays"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(panels), fontsize=8, frameon=False)
    bar = figure.colorbar(ScalarMappable(scale, "viridis_r"), ax=list(axes), fraction=0.05, pad=0.02)
    bar.set_label("residual of the eigenvalue (dark: uncertain)", fontsize=9, color=INK)
    return figure


def _draw_eigenvalues(axis: Axes, spectrum: Spectrum, scale: object, radius: float) -> None:
    from matplotlib.patches import Circle

    values = spectrum.eigenvalues
    axis.add_patch(Circle((0, 0), 1, fill=False, color=MUTED, linewidth=1))
    axis.add_patch(Circle((1, 0), radius, fill=False, color=WALK, linewidth=1.2, linestyle=(0, (2, 1.5)), zorder=4))
    axis.axhline(0, color=MUTED, linewidth=0.4)
    axis.axvline(0, color=MUTED, linewidth=0.4)
    largest = spectrum.importance.max() or 1.0
    for value, error in zip(values, () if spectrum.sketch_errors is None else spectrum.sketch_errors, strict=False):
        axis.add_patch(Circle((value.real, value.imag), error, fill=False, color=INK, linewidth=0.7, zorder=5))
    axis.scatter(
        values.real,
        values.imag,
        s=12 + 300 * spectrum.importance / largest,
        c=np.clip(spectrum.residuals, *RESIDUALS),
        norm=scale,  # type: ignore[arg-type]
        cmap="viridis_r",
        edgecolors="white",
        linewidths=0.6,
        alpha=0.9,
        zorder=3,
    )
    outside = int(np.count_nonzero(np.abs(values) > 1.25))
    if outside:
        axis.text(0.02, 0.02, f"{outside} outside the frame", transform=axis.transAxes, fontsize=8, color=MUTED)
    axis.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
    axis.set_xlabel("Re λ", fontsize=9, color=INK)
    axis.set_ylabel("Im λ", fontsize=9, color=INK)
    axis.tick_params(labelsize=8, colors=INK)


def plot_history(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss beside the unit fraction of the training and of the random walk, over epochs or steps.

    Where a new trajectory begins there is a dotted line.

    Args:
        history: Rows with ``epoch``, ``train_loss``, ``unit_fraction`` and ``surrogate_unit_fraction``, such as
            :attr:`KoopmanSpectrumMonitor.history`.

    Returns:
        A matplotlib figure, not registered with pyplot.

    Example:
        >>> from lightning_koopman import plot_history
        >>> row = {"epoch": 1, "train_loss": 0.5, "unit_fraction": 0.1, "surrogate_unit_fraction": 0.2}
        >>> len(plot_history([row]).axes)
        2
    """
    check_matplotlib()
    given: Any = history
    needed = "epoch", "train_loss", "unit_fraction", "surrogate_unit_fraction"
    whole = isinstance(given, Sequence) and len(given) and all(isinstance(row, Mapping) for row in given)
    if not whole or not all(isinstance(row.get(key), Real) for row in given for key in needed):
        raise ValueError(f"history must be rows with numbers for {', '.join(needed)}, got {given!r:.60}.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    by_steps = getattr(history, "every_n_steps", None) is not None
    epochs = [row["step" if by_steps else "epoch"] for row in history]
    losses = np.array([row["train_loss"] for row in history], dtype=float)
    top.plot(epochs, losses, color=INK, linewidth=1.4)
    if np.nanmin(losses, initial=np.inf) > 0 and np.isfinite(losses).any():
        top.set_yscale("log")
    top.set_ylabel("training loss", fontsize=9, color=INK)
    for key, label, color, style in (
        ("unit_fraction", "training", TRAINING, "-"),
        ("surrogate_unit_fraction", "random walk, same step lengths", WALK, "--"),
    ):
        bottom.plot(epochs, [row[key] for row in history], style, color=color, linewidth=1.4, label=label)
    bottom.set(ylim=(-0.03, 1.03))
    counts = [row.get("n_snapshots", 0) for row in history]
    begins = [at for at, before, now in zip(epochs[1:], counts, counts[1:], strict=False) if now < before]
    for axis in (top, bottom):
        for at in begins:
            axis.axvline(at, color=MUTED, linewidth=1, linestyle=":")
    if begins:
        bottom.plot([], [], ":", color=MUTED, label="a new trajectory: pruned, restarted or other weights")
    bottom.set_xlabel("optimizer steps" if by_steps else "epochs completed", fontsize=9, color=INK)
    bottom.set_ylabel("importance near 1\n(unit fraction)", fontsize=9, color=INK)
    bottom.legend(fontsize=8, frameon=False)
    for axis in (top, bottom):
        axis.tick_params(labelsize=8, colors=INK)
        axis.grid(color=MUTED, alpha=0.25, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def plot_depth(estimate: DepthEstimate) -> Figure:
    """Amplitudes over frequencies, the cutoff, and where each layer begins.

    Args:
        estimate: What :func:`estimate_depth` found; of several outputs the largest amplitude relative to its cutoff is
            drawn.

    Returns:
        A matplotlib figure, not registered with pyplot.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import estimate_depth, plot_depth
        >>> x = np.linspace(0, 1, 101)
        >>> len(plot_depth(estimate_depth(x, x**2)).axes)
        1
    """
    check_matplotlib()
    check_instance("estimate", estimate, DepthEstimate, "what estimate_depth returns")
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
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
    figure.suptitle(f"{estimate.n_layers} {plural} ({estimate.method})", fontsize=10, color=INK)
    return figure
