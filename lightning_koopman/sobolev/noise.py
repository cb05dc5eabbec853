"""Estimate the signal in noisy samples, mode by mode: the highest mode worth learning, and denoised targets."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import KDTree
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from lightning_koopman._checks import is_count
from lightning_koopman._types import Array
from lightning_koopman.dmd.gram import power_of_two
from lightning_koopman.fourier.domain import Domain, check_domain, check_points, match_domain, observe_domain, to_torus
from lightning_koopman.fourier.modes import orthant
from lightning_koopman.fourier.samples import as_samples
from lightning_koopman.sobolev.bands import check_norm, sobolev_scales

MOST = 1000  # cosines; with more of them, orthogonalization takes seconds
ENTRIES = 2**27  # of the matrix of cosines at the samples: a gigabyte
SHARE = 0.25  # cosines per sample, so that residuals are left to estimate the noise
WORTH = 0.1  # least share of signal in a mode; too few modes cost more than too many
ROUNDING = 1e-12  # relative to the samples' size: less noise is not distinguishable from rounding
FEWEST = 16  # samples needed for an estimate
SURE = 4  # standard deviations by which neighbors must be more alike than noise
SLIGHT = 0.1  # relative to the samples' spread: smaller residuals give no warning


@dataclass(frozen=True, eq=False)
class CosineFit:
    """Least-squares fit of cosines, with the share of signal in each.

    Attributes:
        basis: Orthonormal columns (N, p): the cosines at the samples, each orthogonalized against the lower ones.
        coefficients: Coefficients (p, M) of the samples, divided by their units, in that basis.
        sizes: Norms (p,) of the cosines' modes, non-decreasing, in cycles per period: half those of the integer modes.
        noise: Standard deviation (M,) of the noise, from the residuals of the fit, divided by the units.
        units: Powers of two (M,) of about the size of the outputs, so that squares neither over- nor underflow.
    """

    basis: Array
    coefficients: Array
    sizes: Array
    noise: Array
    units: Array

    @cached_property
    def gains(self) -> Array:
        """Share of signal in each mode and output (p, M), in [0, 1], non-increasing with the mode's norm.

        Among such gains these minimize Stein's unbiased risk estimate: R. Beran, L. Dümbgen, *Modulation of estimators
        and confidence sets*, Ann. Statist. 26 (1998) 1826-1856, section 3.
        """
        power = self.coefficients**2
        starts = np.flatnonzero(np.diff(self.sizes, prepend=-1.0))  # modes of equal norm share one gain
        lengths = np.diff(np.append(starts, len(self.sizes)))
        total = np.maximum(np.add.reduceat(power, starts, axis=0), np.finfo(np.float64).tiny)
        raw = np.where(power.any(axis=0), 1 - self.noise**2 * lengths[:, None] / total, 0.0)
        found = np.ones_like(total)  # the mean, in the first row, is kept whatever its size
        for output in range(total.shape[1] if len(total) > 1 else 0):
            found[1:, output] = isotonic_regression(
                raw[1:, output], sample_weight=total[1:, output], y_min=0.0, y_max=1.0, increasing=False
            )
        return np.repeat(found, lengths, axis=0)


def suggest_scales(
    x: npt.ArrayLike | Tensor,
    y: npt.ArrayLike | Tensor,
    *,
    n_layers: int = 1,
    domain: Domain | None = None,
    norm: int = 1,
) -> tuple[float, ...]:
    """Suggest scales for :class:`SobolevLoss` from noisy samples, up to the highest mode with a tenth of signal.

    Cosines are fitted to the samples by least squares, and the noise is estimated from the residuals.  The share of
    signal in each mode comes from Stein's estimate, constrained not to increase with the mode.  It errs towards too
    many modes: for a single slow wave, or for noise alone, it may keep any number.  This is intended: a network is
    unconstrained above the highest mode, so too few modes cost more than some noise (see ``docs/sobolev.md``).

    The fit reaches N/8 cycles per period for one input, at most 500, and less for more inputs.

    Args:
        x: Points (N, D), or (N,), N ≥ 16.
        y: Samples (N, M), or (N,).
        n_layers: Number of layers with an output, including the network's own.
        domain: As for :func:`sobolev_loss`.
        norm: As for :func:`sobolev_loss`.

    Returns:
        One scale per layer, geometric up to the highest mode.

    Raises:
        ValueError: If there are too few samples, they do not match, are not finite or real, or an argument is out of
            its range.

    Warns:
        UserWarning: If the residuals are not independent noise, for instance signal beyond the reach of the cosines.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import suggest_scales
        >>> rng = np.random.default_rng(1)
        >>> x = rng.uniform(0, 1, 500)
        >>> suggest_scales(x, np.cos(2 * np.pi * 9 * x) + rng.normal(0, 0.2, 500), n_layers=3, domain=(0, 1))
        (4, 7, 14)
    """
    if not is_count(n_layers):
        raise ValueError(f"n_layers must be a whole number ≥ 1, got {n_layers!r}.")
    fit = fit_cosines(*as_samples(x, y, FEWEST), domain, norm)
    signal = (fit.gains >= WORTH).any(axis=1)
    highest = max(1, int(np.ceil(fit.sizes[signal].max())))
    return sobolev_scales(n_layers, highest=highest)


def shrink_noise(
    x: npt.ArrayLike | Tensor,
    y: npt.ArrayLike | Tensor,
    *,
    domain: Domain | None = None,
    norm: int = 1,
) -> Array | Tensor:
    """Denoise samples for use as training targets.

    Cosines are fitted to the samples, and each mode is shrunk to its share of signal as estimated by
    :func:`suggest_scales`.  There is nothing to tune.  Call it once, on the whole data set, before training.

    Args:
        x: Points (N, D), or (N,), N ≥ 16.
        y: Samples, (N, M) or (N,): NumPy or PyTorch.
        domain: As for :func:`sobolev_loss`.
        norm: As for :func:`sobolev_loss`: the norm that orders the modes.

    Returns:
        Targets like ``y``: an array in float64, or a tensor in the floating dtype and on the device of ``y``.

    Raises:
        ValueError: As for :func:`suggest_scales`.

    Warns:
        UserWarning: As for :func:`suggest_scales`; signal in the residuals is then missing in the targets.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import shrink_noise
        >>> rng = np.random.default_rng(0)
        >>> x = rng.uniform(0, 1, 500)
        >>> clean = np.cos(2 * np.pi * x)
        >>> noisy = clean + rng.normal(0, 1, 500)
        >>> np.round([np.std(noisy - clean), np.std(shrink_noise(x, noisy, domain=(0, 1)) - clean)], 2)
        array([0.94, 0.1 ])
    """
    fit = fit_cosines(*as_samples(x, y, FEWEST), domain, norm)
    shrunk = fit.basis @ (fit.gains * fit.coefficients) * fit.units
    if isinstance(y, Tensor):
        dtype = y.dtype if y.is_floating_point() else torch.float64
        return torch.as_tensor(shrunk, dtype=dtype, device=y.device).reshape(y.shape)
    return shrunk.reshape(np.shape(y))


def fit_cosines(x: Array, y: Array, domain: Domain | None, norm: int) -> CosineFit:
    """Fit one cosine per four samples, at most 1000.

    Cosines over half periods treat the function as mirrored at the ends of the domain.  Waves over whole periods would
    see a jump if the values at both ends differ.
    """
    check_norm(norm)
    points = torch.as_tensor(x)
    named = (points, "the points x")
    box = observe_domain(*named) if domain is None else match_domain(check_domain(domain), x.shape[1])
    check_points(points, box, named[1])
    halves = np.pi * to_torus(points, box).numpy()
    modes, sizes = _lowest_modes(min(MOST, int(SHARE * len(x)), ENTRIES // len(x)), x.shape[1], norm)
    values = np.cos(halves[:, :1] * modes[:, 0])
    for axis in range(1, x.shape[1]):
        values *= np.cos(halves[:, axis : axis + 1] * modes[:, axis])
    basis, triangle = np.linalg.qr(values)
    size = np.abs(np.diag(triangle))
    told = size > 1e-6 * np.sqrt(len(x))  # repeated points, or a grid, resolve no more cosines
    basis, sizes = basis[:, told], sizes[told]
    units = np.array([power_of_two(peak) for peak in np.abs(y).max(axis=0).tolist()])
    y = y / units
    coefficients = basis.T @ y
    left = y - basis @ coefficients
    if _neighbors_are_alike(halves, left, y):
        warnings.warn(
            f"x, y: the {len(sizes)} cosines up to {sizes[-1]:g} cycles per period that {len(x)} samples allow leave "
            "residuals that are alike for neighbors: signal at higher frequencies, which counts as noise here, or "
            "noise that is not independent.",
            stacklevel=3,
        )
    noise = np.sqrt((left**2).sum(axis=0) / (len(x) - basis.shape[1]))
    noise = np.maximum(noise, ROUNDING * np.sqrt((y**2).mean(axis=0)))
    return CosineFit(basis, coefficients, sizes, noise, units)


def _neighbors_are_alike(points: Array, left: Array, y: Array) -> bool:
    """Return whether an output has residuals that are not small, and more alike for neighbors than noise."""
    if points.shape[1] == 1:
        order = np.argsort(points[:, 0], kind="stable")
        first, second = order[:-1], order[1:]
    else:
        first, second = np.arange(len(points)), KDTree(points).query(points, k=2)[1][:, 1]
    power = (left**2).mean(axis=0)
    told = power > np.maximum(SLIGHT**2 * y.var(axis=0), ROUNDING**2 * (y**2).mean(axis=0))
    differ = ((left[first] - left[second]) ** 2).mean(axis=0) / 2
    return bool((told & (differ < power * (1 - SURE / np.sqrt(len(first))))).any())


def _lowest_modes(count: int, dim: int, norm: int) -> tuple[npt.NDArray[np.int32], Array]:
    """Return the ``count`` modes (p, D) ≥ 0 of least norm, and their norms in cycles per period."""
    radius = 1.0 if dim > 1 else float(count)
    while len(modes := orthant(radius, dim, norm)) < count:
        radius = max(radius + 1 / norm, radius * 1.1)
    sizes = np.linalg.norm(modes, ord=norm, axis=1)
    chosen = np.argsort(sizes, kind="stable")[:count]
    return modes[chosen], sizes[chosen] / 2
