r"""Frequencies in samples of a function, and their sizes, by Fourier transform, least squares, or DMD."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from scipy.ndimage import maximum_filter

from lightning_koopman.dmd.rrr import dmd_rrr
from lightning_koopman.fourier.basis import fourier_basis
from lightning_koopman.fourier.domain import observe_domain, to_torus
from lightning_koopman.fourier.grid import Grid
from lightning_koopman.fourier.modes import half_space

Array = npt.NDArray[np.float64]
Modes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
SHARE = 0.25  # modes per scattered sample, with two functions each
MOST = 500  # modes; with more of them, least squares takes seconds
PIECE = 4096  # points at a time: their sines and cosines take 32 MB at most
RIDGE = 1e-8
SKIRT = 0.6  # relative to a neighbor: smaller sizes are a peak's skirt, caused by the taper
DELAYS = 500  # at most, in the Hankel matrix: as for the paper's 1001 samples
DMD_TOL = 1e-12
FULL = 0.9  # share of the rank that the samples allow
NEAR = 0.9  # share of the highest mode that the samples resolve
ROUNDING = 1e-12  # relative to the samples' size
DENSER = "frequencies up to the highest that the samples resolve count: sample more densely."


@dataclass(frozen=True, eq=False)
class Lines:
    """Frequencies and their sizes.

    Attributes:
        frequencies: Array (F,), increasing, > 0, in cycles per unit of x: the Euclidean norm over the inputs.
        sizes: Array (F, M), ≥ 0: modulus of the wave's complex coefficient in each output.
        amplitudes: Array (F, M): twice the sizes, except for waves that are their own conjugates.
        largest: Array (M,): the size that thresholds are relative to; 0 for an output without waves.
        candidates: Boolean (F,): frequencies that may count; False for skirts caused by a taper.
        extreme: Boolean (F,): frequencies close to the highest that the samples resolve.
        note: Note for the user if extreme frequencies count.
        full_rank: Whether DMD took nearly as many modes as the samples allow, which can fit anything.
    """

    frequencies: Array
    sizes: Array
    amplitudes: Array
    largest: Array
    candidates: Mask
    extreme: Mask
    note: str
    full_rank: bool = False


def fourier_lines(grid: Grid, *, taper: bool) -> Lines:
    """Compute lines by the discrete Fourier transform on an equidistant grid with any number of inputs."""
    shape = grid.values.shape[:-1]
    axes = tuple(range(len(shape)))
    values = grid.values
    if taper:
        fades = [2 * np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in shape]
        window = reduce(np.multiply.outer, fades)[..., None]  # its mean is 1: waves keep their amplitude
        values = (values - (values * window).mean(axis=axes)) * window
    sizes = (np.abs(np.fft.fftn(values, axes=axes)) / np.prod(shape)).reshape(-1, values.shape[-1])
    index = np.indices(shape).reshape(len(shape), -1)
    own = np.arange(index.shape[1])
    conjugate = np.ravel_multi_index(tuple(-index % np.array(shape)[:, None]), shape)
    modes = np.where(2 * index > np.array(shape)[:, None], index - np.array(shape)[:, None], index).T
    extreme = np.asarray((2 * np.abs(modes) > NEAR * np.array(shape)).any(axis=1))
    return _lines(
        modes,
        sizes,
        periods=np.array(shape) * grid.steps,
        taper=taper,
        scale=_scale(grid.values.reshape(-1, values.shape[-1])),
        first=own <= conjugate,
        alone=own == conjugate,
        extreme=extreme,
        note=DENSER,
    )


def least_squares_lines(x: Array, y: Array, *, taper: bool) -> Lines:
    """Compute lines by least squares in sines and cosines at scattered points, with a slight ridge."""
    box = observe_domain(torch.as_tensor(x))
    torus_points = to_torus(torch.as_tensor(x), box)
    highest = _highest(int(SHARE * len(x)), x.shape[1])
    modes = half_space(highest, x.shape[1], 1).astype(np.int64)
    constant = int(np.flatnonzero(~modes.any(axis=1))[0])
    mean = y.mean(axis=0)
    values = y - mean  # the ridge would spread the mean over all modes
    if taper:
        window = (2 * np.sin(np.pi * torus_points.numpy()) ** 2).prod(axis=1)[:, None]
        values = window * np.column_stack([values, np.ones(len(y))])
    gram, projected = RIDGE * len(x) * np.eye(2 * len(modes)), np.zeros((2 * len(modes), values.shape[1]))
    for start in range(0, len(x), PIECE):
        basis = fourier_basis(torus_points[start : start + PIECE], torch.as_tensor(modes)).numpy()
        gram += basis @ basis.T
        projected += basis @ values[start : start + PIECE]
    fitted = scipy.linalg.solve(gram, projected, assume_a="pos", overwrite_a=True, check_finite=False)
    if taper:  # subtract the waves of the window itself
        fitted = fitted[:, :-1] - np.outer(fitted[:, -1], fitted[constant, :-1] / fitted[constant, -1])
    sizes = np.hypot(*fitted.reshape(2, len(modes), -1)) / 2
    sizes[constant] = 0.0 if taper else np.abs(fitted[constant] + mean)
    return _lines(
        modes,
        sizes,
        periods=np.ptp(np.array(box), axis=1),
        taper=taper,
        scale=_scale(y),
        first=np.ones(len(modes), dtype=bool),
        alone=np.zeros(len(modes), dtype=bool),
        extreme=np.abs(modes).sum(axis=1) > NEAR * highest,
        note=f"frequencies up to the highest fitted one count ({len(modes)} modes are fitted to {len(x)} scattered "
        "samples): resample onto a grid.",
    )


def dmd_lines(values: Array, step: float) -> Lines:
    r"""Compute lines by DMD of a delay-embedded series, :math:`f = |\arg\lambda| / (2\pi h)`.

    Each mode's size is the root mean square of its part over the samples, fitted to the series itself.
    """
    n = len(values)
    ranges, least = _scale(values)
    scaled = values / np.where(ranges > least, ranges, 1.0)  # so that the units of outputs do not matter
    delays = min(n // 2, DELAYS)
    spectrum = dmd_rrr(scaled, delays=delays, tol=DMD_TOL, refine=False)
    ritz = spectrum.ritz_values
    growing = np.abs(ritz) > 1
    times = np.where(growing[None], np.arange(n)[:, None] - (n - 1), np.arange(n)[:, None])
    with np.errstate(under="ignore"):
        waves = ritz[None] ** times
    waves /= np.sqrt((np.abs(waves) ** 2).mean(axis=0))
    sizes = np.abs(np.linalg.lstsq(waves, values.astype(np.complex128), rcond=None)[0])
    frequencies = np.abs(np.angle(ritz)) / (2 * np.pi * step)
    upper = np.flatnonzero((ritz.imag >= 0) & (frequencies > 1e-9 / (n * step)))
    upper = upper[np.argsort(frequencies[upper], kind="stable")]
    frequencies, sizes = frequencies[upper], sizes[upper]
    largest = sizes.max(axis=0, initial=0.0)
    return Lines(
        frequencies,
        sizes,
        amplitudes=sizes * np.where(ritz[upper].imag > 0, 2, 1)[:, None],
        largest=np.where(largest > least, largest, 0.0),
        candidates=np.ones(len(upper), dtype=bool),
        extreme=2 * step * frequencies > NEAR,
        note=DENSER,
        full_rank=spectrum.rank > FULL * min(delays * values.shape[1], n - delays),
    )


def _scale(values: Array) -> tuple[Array, Array]:
    """Return the range (M,) of each output, and the size below which it is rounding error."""
    return np.ptp(values, axis=0), ROUNDING * np.abs(values).max(axis=0)


def _lines(
    modes: Modes,
    sizes: Array,
    *,
    periods: Array,
    taper: bool,
    scale: tuple[Array, Array],
    first: Mask,
    alone: Mask,
    extreme: Mask,
    note: str,
) -> Lines:
    """Select the ``first`` of each pair of modes k and −k, and sort by frequency."""
    waves = modes.any(axis=1)
    ranges, least = scale
    # a mean beyond the range reflects the offset of y, not its scales
    largest = np.maximum(sizes[waves].max(axis=0, initial=0.0), np.minimum(sizes[~waves].max(axis=0), ranges))
    frequencies = np.linalg.norm(modes / periods, axis=1)
    order = np.flatnonzero(first & waves)
    order = order[np.argsort(frequencies[order], kind="stable")]
    counted = ~_skirts(modes, sizes) if taper else np.ones(len(modes), dtype=bool)
    return Lines(
        frequencies[order],
        sizes[order],
        amplitudes=sizes[order] * np.where(alone[order], 1, 2)[:, None],
        largest=np.where(largest > least, largest, 0.0),
        candidates=counted[order],
        extreme=extreme[order],
        note=note,
    )


def _skirts(modes: Modes, sizes: Array) -> Mask:
    """Return which modes are much smaller than a neighbor, in every output."""
    reach = np.abs(modes).max(axis=0)
    found = np.ones(len(modes), dtype=bool)
    for column in sizes.T:
        lattice = np.zeros(2 * reach + 1)
        for sign in (1, -1):
            lattice[tuple((sign * modes + reach).T)] = np.where(modes.any(axis=1), column, 0.0)
        neighbors = maximum_filter(lattice, size=3, mode="constant")
        found &= column < SKIRT * neighbors[tuple((modes + reach).T)]
    return found


def _highest(n_modes: int, dim: int) -> int:
    """Return the largest whole ‖k‖₁ with at most ``n_modes`` modes, at least 1."""
    highest = 1
    while len(half_space(highest + 1, dim, 1)) <= min(n_modes, MOST):
        highest += 1
    return highest
