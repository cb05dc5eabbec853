"""Figures of spectra: eigenvalues in the unit circle, and the spectral density of the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_koopman._checks import check_instance, check_positive
from lightning_koopman.dmd.spectrum import Spectrum
from lightning_koopman.plots.style import INK, MUTED, TRAINING, WALK, axes_of, check_matplotlib, plain
from lightning_koopman.reading.reading import TrainingReading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESIDUALS = (1e-4, 1.0)  # ends of the color scale


def plot_spectrum(
    spectrum: Spectrum,
    surrogate: Spectrum | None = None,
    reading: TrainingReading | None = None,
    *,
    radius: float = 0.05,
    title: str = "training",
    ax: Axes | None = None,
) -> Figure:
    """Plot eigenvalues in the unit circle, area by importance and color by residual, with the surrogate beside them.

    For sketched trajectories, a thin circle around each eigenvalue shows its standard error.

    Args:
        spectrum: The training's spectrum.
        surrogate: Spectrum of the random walk with the same step lengths (default: not drawn).
        reading: Reading whose spectral density of the steps is drawn as well (default: not drawn).
        radius: Radius of the outlined disc around 1.
        title: Heading of the training's panel.
        ax: Axes for the training's eigenvalues only, without the other panels (default: a new figure).

    Returns:
        The figure.

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
    if reading is not None:
        check_instance("reading", reading, TrainingReading, "a TrainingReading")
    radius, title = check_positive("radius", radius), str(check_instance("title", title, str, "a string"))
    from matplotlib import colors
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    scale = colors.LogNorm(*RESIDUALS, clip=True)
    if ax is not None:
        figure, axis = axes_of(ax, (0, 0))
        _draw_eigenvalues(axis, spectrum, scale, radius, title)
        return figure
    panels = [(title, spectrum)] + ([("random walk, same step lengths", surrogate)] if surrogate is not None else [])
    dense = reading is not None and reading.steps is not None
    figure = Figure(figsize=(4.6 * (len(panels) + dense) + 0.9, 5.5), layout="constrained")
    axes = figure.subplots(1, len(panels) + dense, squeeze=False)[0]
    for axis, (name, drawn) in zip(axes, panels, strict=False):
        _draw_eigenvalues(axis, drawn, scale, radius, name)
    if dense and reading is not None:
        plot_steps(reading, ax=axes[-1])
        axes[-1].set_box_aspect(1)
    handles = [
        Line2D([], [], linestyle="", marker="o", color=MUTED, markersize=size, label=label)
        for size, label in ((4, "little importance"), (11, "the largest"))
    ]
    handles.append(Line2D([], [], color=WALK, linewidth=1.2, linestyle=(0, (2, 1.5)), label=f"within {radius:g} of 1"))
    handles.append(Line2D([], [], color=MUTED, linewidth=1, label="modulus 1: neither grows nor decays"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2 * len(panels), 4), fontsize=8, frameon=False)
    bar = figure.colorbar(ScalarMappable(scale, "viridis_r"), ax=list(axes[: len(panels)]), fraction=0.05, pad=0.02)
    bar.set_label("residual of the eigenvalue (dark: uncertain)", fontsize=9, color=INK)
    return figure


def plot_steps(reading: TrainingReading, *, ax: Axes | None = None) -> Figure:
    """Plot the Koopman spectral density of the steps over the angle of the eigenvalue, with a random walk's as a band.

    Density at angle 0 is movement in a direction, density at other angles is movement that comes back.  At the noise
    floor of a learning rate, the density at angle 0 lies below the walk's.

    Args:
        reading: What :func:`read_training` returned.
        ax: Axes to draw into (default: a new figure).

    Returns:
        The figure.

    Raises:
        ValueError: If the reading has too few steps.

    Example:
        >>> import torch
        >>> from lightning_koopman import Trajectory, plot_steps, read_training
        >>> trajectory = Trajectory(100)
        >>> for _ in range(12):
        ...     trajectory.append(torch.randn(100))
        >>> len(plot_steps(read_training(trajectory)).axes)
        1
    """
    check_instance("reading", reading, TrainingReading, "a TrainingReading")
    if reading.steps is None:
        raise ValueError(f"reading has {reading.n_steps} steps, too few for a density: record more snapshots first.")
    figure, axis = axes_of(ax, (5.2, 4.2))
    steps = reading.steps
    angles = 360 * steps.frequencies
    doubt = 2 * steps.density_error
    axis.axhspan(max(1 - doubt, 0), 1 + doubt, color=WALK, alpha=0.25, linewidth=0)
    axis.axhline(1, color=WALK, linewidth=1.2, linestyle="--", label="random walk, same step lengths")
    axis.plot(angles, steps.density, color=TRAINING, linewidth=1.6, label="training")
    axis.set(xlim=(0, 180), ylim=(0, None))
    axis.set_xticks([0, 45, 90, 135, 180], ["0\nλ = 1", "45", "90", "135", "180\nλ = −1"])
    axis.set_xlabel("angle of λ in degrees per snapshot", fontsize=9, color=INK)
    axis.set_ylabel("spectral density of the steps", fontsize=9, color=INK)
    axis.set_title(f"newest {steps.count} steps: {reading.phase.value}", fontsize=10, color=INK)
    axis.legend(fontsize=8, frameon=False)
    plain(axis)
    return figure


def _draw_eigenvalues(axis: Axes, spectrum: Spectrum, scale: object, radius: float, name: str) -> None:
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
    axis.set_title(
        f"{name}\n{spectrum.unit_fraction(radius):.0%} of importance within {radius:g} of 1 · rank {spectrum.rank}",
        fontsize=10,
        color=INK,
    )
