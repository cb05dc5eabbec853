r"""Estimate the number of layers from the octaves of a function's spectrum (paper, section 5 and Table 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_koopman._checks import check_flag, is_number
from lightning_koopman.depth.frequencies import Lines, dmd_lines, fourier_lines, least_squares_lines
from lightning_koopman.fourier.grid import Grid, find_grid
from lightning_koopman.fourier.samples import as_samples

Array = npt.NDArray[np.float64]
THRESHOLDS = {"fft": 0.01, "dmd": 0.3}  # relative to the largest size
FEWEST = 8  # samples needed for an estimate
MOST_INPUTS = 3
DEVIATIONS = 6  # σ per period: 3σ = T/2
JUMP, STEPS = 0.1, 3.0  # a jump exceeds 0.1 times the range, and 3 times the steps between neighbors
CROWD = 0.5  # share of all frequencies above which they suggest noise, or a jump
GAP = 30  # median distances of neighbors: larger gaps give a note
UNLIKE = 100  # ratio of the inputs' ranges above which there is a note
EXTREME = 1e100  # larger ranges overflow when squared


@dataclass(frozen=True, eq=False)
class DepthEstimate:
    r"""Layers that a function needs, before any training: the result of :func:`estimate_depth`.

    Attributes:
        n_layers: Number of layers L ≥ 1.
        scales: Array (L,), decreasing: standard deviations :math:`\sigma_\ell = 1 / (6 f_\ell)` of the layers'
            Gaussians, in the unit of x.
        gammas: Array (L,), increasing: :math:`\gamma_\ell = 1 / \sigma_\ell^2` of
            :math:`\exp(-\gamma \|x - c\|^2)`.
        layer_frequencies: Array (L,), increasing: :math:`f_\ell`, in cycles per unit of x.
        spectrum_frequencies: Array (F,), increasing: all frequencies of the spectrum, for plotting.
        spectrum_amplitudes: Array (F,), or (F, M) for several outputs, ≥ 0: amplitudes of the waves, in the unit of y.
            For DMD, whose waves may grow or decay: √2 times the root mean square over the samples.
        counts: Boolean (F,): the frequencies that count.  Each layer covers an octave of these.
        cutoff: Amplitude above which a frequency counts; an array (M,) for several outputs.
        method: ``"fft"``, ``"least squares"`` or ``"dmd"``: how the spectrum was computed.
        decay: Least ratio ρ between the scales of two successive layers.
        notes: Possible problems of the estimate, in words, for instance a jump between the ends of the samples.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import estimate_depth
        >>> x = np.linspace(0, 2, 1001)
        >>> estimate = estimate_depth(x, np.cos(2 * np.pi * x) + 3 * np.sin(20 * np.pi * x), method="dmd")
        >>> estimate.frequencies.round(6).tolist(), estimate.amplitudes.round(6).tolist()
        ([1.0, 10.0], [1.0, 3.0])
    """

    n_layers: int
    scales: Array
    gammas: Array
    layer_frequencies: Array
    spectrum_frequencies: Array
    spectrum_amplitudes: Array
    counts: npt.NDArray[np.bool_]
    cutoff: Array
    method: str
    decay: float
    notes: tuple[str, ...]

    @property
    def frequencies(self) -> Array:
        """Array (k,), increasing: the frequencies that count."""
        return self.spectrum_frequencies[self.counts]

    @property
    def amplitudes(self) -> Array:
        """Array (k,) or (k, M): amplitudes of the frequencies that count, in the unit of y."""
        return self.spectrum_amplitudes[self.counts]

    def __repr__(self) -> str:
        scales = ", ".join(f"{scale:.4g}" for scale in self.scales)
        notes = f", notes={list(self.notes)}" if self.notes else ""
        return f"DepthEstimate(n_layers={self.n_layers}, scales=[{scales}], method={self.method!r}{notes})"


def estimate_depth(
    x: npt.ArrayLike | Tensor,
    y: npt.ArrayLike | Tensor,
    method: str = "fft",
    decay: float = 2.0,
    *,
    threshold: float | None = None,
    taper: bool = False,
    max_frequency: float | None = None,
) -> DepthEstimate:
    r"""Estimate from samples how many layers a function needs, and their scales (paper, section 5).

    The frequencies whose size is at least ``threshold`` times the largest count.  The lowest one gives the first layer.
    Each frequency at least ``decay`` times that of the previous layer gives the next; octaves without a frequency get
    no layer.  Three standard deviations of a layer's Gaussian span half a period, :math:`\sigma = 1 / (6 f)`.

    This rule gives the paper's Table 1.  The paper's text instead takes :math:`\gamma_{\ell+1} = \rho \gamma_\ell` and
    as many layers as span all the scales: 14 instead of the table's 7 for the signal below.

    The estimated number is usually sufficient, and often larger than needed: see ``notes``, and ``docs/depth.md``.

    Args:
        x: Points (N,), increasing, or (N, D) with D ≤ 3 inputs, N ≥ 8, all distinct.  One scale serves all inputs:
            bring them to similar ranges.
        y: Samples (N,), or (N, M) for several outputs; a frequency counts if it counts in any of them.
        method: ``"fft"``: the discrete Fourier transform for equidistant samples (for several inputs, on a full grid in
            any order), or a least-squares fit of at most 500 modes for scattered samples; ``"dmd"``: dynamic mode
            decomposition with delays, for equidistant samples of one input.
        decay: Least ratio ρ > 1 between the scales of two successive layers.
        threshold: In (0, 1), relative to the largest size (default: 0.01, for ``"dmd"`` 0.3).  With ``"fft"`` and
            without ``taper``, the largest size includes that of the mean, limited to the range of y.
        taper: With ``"fft"``: fade the samples out at both ends (Hann window), and ignore the skirts of peaks.
            Without it, a jump between the ends, or a wave with a fractional number of periods in the samples' range,
            leaks into all frequencies and adds unnecessary layers.  The paper's table was computed without it.
        max_frequency: Ignore frequencies above it, > 0, in cycles per unit of x: where noise begins.

    Returns:
        The estimate, with notes on possible problems.

    Raises:
        ValueError: If the samples are too few, not sorted, not finite or constant, contain a point twice or do not suit
            the method, or an argument is out of its range.

    Example:
        The paper's multiscale signal needs seven layers:

        >>> import numpy as np
        >>> from lightning_koopman import estimate_depth
        >>> x = np.linspace(0, 2, 1001)
        >>> estimate_depth(x, x + np.sin(2 * np.pi * x**4)).n_layers
        7
        >>> estimate_depth(x, np.cos(2 * np.pi * x) + np.sin(20 * np.pi * x), method="dmd")
        DepthEstimate(n_layers=2, scales=[0.1667, 0.01667], method='dmd')
    """
    points, samples = as_samples(x, y, FEWEST)
    check_rule(method, decay)
    check_flag("taper", taper)
    share = THRESHOLDS[method] if threshold is None else threshold
    if not (is_number(share) and 0 < share < 1):
        raise ValueError(f"threshold must lie in (0, 1), got {threshold!r}: it is relative to the largest size.")
    if max_frequency is not None and not (is_number(max_frequency) and max_frequency > 0):
        raise ValueError(f"max_frequency must be a number > 0, in cycles per unit of x, got {max_frequency!r}.")
    if taper and method == "dmd":
        raise ValueError("taper=True is for method='fft': DMD does not assume periodic samples.")
    if points.shape[1] > 1 and method == "dmd":
        raise ValueError(f"x has {points.shape[1]} inputs, but method='dmd' takes one: use method='fft'.")
    _check_points(points)
    if not np.ptp(samples, axis=0).any():
        raise ValueError(f"y is constant ({samples.flat[0]:g}): it has no scale to estimate.")
    grid = find_grid(points, samples)
    if method == "dmd":
        if grid is None:
            raise ValueError(
                "x is not equidistant, which method='dmd' needs: resample (np.interp onto np.linspace), or use "
                "method='fft', which fits scattered samples by least squares."
            )
        lines = dmd_lines(grid.values, grid.steps[0])
    elif grid:
        lines = fourier_lines(grid, taper=taper)
    else:
        method, lines = "least squares", least_squares_lines(points, samples, taper=taper)
    line = Grid(samples, (1.0,)) if points.shape[1] == 1 else grid  # scattered samples are sorted
    notes = _inputs(points, grid) + (_jumps(line) if line is not None and not taper and method != "dmd" else [])
    extent = float(np.ptp(points, axis=0).max())
    return _layers(lines, method, float(decay), float(share), max_frequency, extent, notes, np.ndim(y) == 1)


def check_rule(method: object, decay: Any) -> None:
    """Raise ValueError unless ``method`` is known and ``decay`` is a number > 1."""
    if not isinstance(method, str) or method not in THRESHOLDS:
        raise ValueError(f"method must be one of {tuple(THRESHOLDS)}, got {method!r}.")
    if not (is_number(decay) and decay > 1):
        raise ValueError(f"decay must be a number > 1, got {decay!r}: it is the ratio of the scales of two layers.")


def check_range(name: str, points: Array) -> None:
    """Raise ValueError for points whose range is too small or too large to compute with."""
    ranges = np.ptp(points, axis=0)
    small, large = ranges.min(), ranges.max()
    if not (small > 1 / EXTREME and large < EXTREME):
        found = large if small > 1 / EXTREME else small
        raise ValueError(f"{name} has a range of {found:g}, too far from 1 to compute with: take another unit.")


def _layers(
    lines: Lines,
    method: str,
    decay: float,
    threshold: float,
    max_frequency: float | None,
    extent: float,
    notes: list[str],
    single: bool,
) -> DepthEstimate:
    """Choose the layers from the frequencies."""
    cutoff = threshold * lines.largest
    meets = lines.sizes >= cutoff if method == "dmd" else lines.sizes > cutoff
    counts = (meets & (lines.largest > 0)).any(axis=1) & lines.candidates
    if max_frequency is not None:
        counts &= lines.frequencies <= max_frequency
    if counts.any():
        layer_frequencies = octaves(lines.frequencies[counts], decay)
    else:
        layer_frequencies = np.array([1 / extent])
        notes.append("no frequency counts: one layer as wide as the samples' range.")
    scales = 1 / (DEVIATIONS * layer_frequencies)
    if lines.full_rank:
        notes.append("DMD takes as many modes as the samples allow, which suggests noise, or too few samples.")
    if method == "dmd" and scales[0] > extent:
        notes.append(
            f"a trend rather than a wave: the first layer's scale is {scales[0]:.3g}, wider than the samples' range; "
            "method='fft' finds scales within it."
        )
    if method != "dmd" and counts.sum() > CROWD * len(counts):
        notes.append(
            f"{counts.sum()} of {len(counts)} frequencies count, which suggests noise, or a jump: raise threshold, or "
            "pass max_frequency."
        )
    if (counts & lines.extreme).any():
        notes.append(lines.note)

    def shaped(values: Array) -> Array:
        return values[..., 0] if single else values

    return DepthEstimate(
        n_layers=len(layer_frequencies),
        scales=scales,
        gammas=1 / scales**2,
        layer_frequencies=layer_frequencies,
        spectrum_frequencies=lines.frequencies,
        spectrum_amplitudes=shaped(lines.amplitudes),
        counts=counts,
        cutoff=shaped(2 * cutoff),
        method=method,
        decay=decay,
        notes=tuple(notes),
    )


def octaves(frequencies: Array, decay: float) -> Array:
    """Return the first of increasing frequencies, and each at least ``decay`` times the one taken before."""
    taken = [frequencies[0]]
    for frequency in frequencies[1:]:
        if frequency >= decay * taken[-1] * (1 - 1e-9):
            taken.append(frequency)
    return np.array(taken)


def _check_points(points: Array) -> None:
    """Raise ValueError unless the inputs are at most three and vary, points differ, and a single input increases."""
    if points.shape[1] > MOST_INPUTS:
        raise ValueError(
            f"x has {points.shape[1]} inputs, more than {MOST_INPUTS}: select some, or pass scales to HSVR."
        )
    constant = np.flatnonzero(np.ptp(points, axis=0) == 0)
    if constant.size:
        raise ValueError(f"x is constant in input {constant[0]}: leave that input out.")
    check_range("x", points)
    if points.shape[1] == 1 and (np.diff(points[:, 0]) < 0).any():
        at = int(np.argmax(np.diff(points[:, 0]) < 0))
        raise ValueError(
            f"x is not sorted: {points[at, 0]:g} comes before {points[at + 1, 0]:g}. Sort both: order = np.argsort(x); "
            "x, y = x[order], y[order]."
        )
    different, counts = np.unique(points, axis=0, return_counts=True)
    if len(different) < len(points):
        twice = ", ".join(f"{value:g}" for value in different[counts.argmax()])
        raise ValueError(f"x holds the point {twice} {counts.max()} times: average the samples of equal points.")


def _inputs(points: Array, grid: Grid | None) -> list[str]:
    """Return notes on the spacing of the points and the ranges of the inputs."""
    notes = []
    if grid is None and points.shape[1] == 1:
        gaps = np.diff(points[:, 0])
        if gaps.max() > GAP * np.median(gaps):
            notes.append(
                f"a gap of {gaps.max():.4g} between neighbors, {gaps.max() / np.median(gaps):.0f} times the median: "
                "samples do not constrain it, which may add layers. Resample, or pass max_frequency."
            )
    ranges = np.ptp(points, axis=0)
    if ranges.max() > UNLIKE * ranges.min():
        notes.append(
            f"the inputs' ranges differ by a factor of {ranges.max() / ranges.min():.3g}, but one scale serves all: "
            "bring them to similar ranges."
        )
    return notes


def _jumps(grid: Grid) -> list[str]:
    """Return a note for each input along which both ends differ, which a periodic transform takes for a jump."""
    notes = []
    axes = tuple(range(len(grid.steps)))
    ranges = np.ptp(grid.values, axis=axes)
    for axis in axes:
        jump = np.abs(grid.values.take(-1, axis) - grid.values.take(0, axis)).max(axis=axes[:-1])
        step = np.quantile(np.abs(np.diff(grid.values, axis=axis)), 0.95, axis=axes)
        if ((jump > JUMP * ranges) & (jump > STEPS * step)).any():
            where = "" if len(grid.steps) == 1 else f" of input {axis}"
            notes.append(
                f"end-point jump{where}: the samples differ by {np.max(jump / np.where(ranges > 0, ranges, 1)):.0%} of "
                "their range between both ends, which adds layers; taper=True avoids them."
            )
    return notes
