"""How much of noisy samples is signal, mode by mode: the highest mode worth learning, targets without the rest."""

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
from lightning_koopman.fourier.domain import Domain, check_domain, check_points, match_domain, observe_domain, to_torus
from lightning_koopman.fourier.modes import orthant
from lightning_koopman.fourier.samples import as_samples
from lightning_koopman.sobolev.bands import check_norm, sobolev_scales

MOST = 1000  # cosines: their orthogonalisation takes seconds beyond
ENTRIES = 2**27  # of the cosines at the samples: a gigabyte
SHARE = 0.25  # of the samples: cosines to fit; the other samples tell the noise
WORTH = 0.1  # share of signal in a mode; too low a highest mode costs more than too high a one
ROUNDING = 1e-12  # of the samples' size: no less noise is told from rounding
FEWEST = 16  # samples below which nothing can be told
SURE = 4  # standard deviations: how alike neighbors must be to be no noise
SLIGHT = 0.1  # of the samples' spread: what is left is not worth a word


@dataclass(frozen=True, eq=False)
class CosineFit:
    """Least-squares fit of cosines, and what of it is signal.

    Attributes:
        basis: Orthonormal columns (N, p): the cosines at the samples, each without what the lower ones explain.
        coefficients: Array (p, M) of the samples in that basis.
        sizes: Norms (p,) of the cosines' modes, increasing, in cycles per period: half of whole numbers.
        noise: Standard deviation (M,) of the noise, from what the cosines leave.
    """

    basis: Array
    coefficients: Array
    sizes: Array
    noise: Array

    @cached_property
    def gains(self) -> Array:
        """Share of signal in each mode and output (p, M), in [0, 1], that does not increase with the mode's norm.

        The gains of this kind with the least risk by Stein's unbiased estimate: R. Beran, L. Dümbgen, *Modulation of
        estimators and confidence sets*, Ann. Statist. 26 (1998) 1826-1856, section 3.
        """
        power = self.coefficients**2
        starts = np.flatnonzero(np.diff(self.sizes, prepend=-1.0))  # modes of equal norm share one gain
        lengths = np.diff(np.append(starts, len(self.sizes)))
        total = np.maximum(np.add.reduceat(power, starts, axis=0), np.finfo(np.float64).tiny)
        raw = np.where(power.any(axis=0), 1 - self.noise**2 * lengths[:, None] / total, 0.0)
        found = np.empty_like(total)
        for output in range(total.shape[1]):
            found[:, output] = isotonic_regression(
                raw[:, output], sample_weight=total[:, output], y_min=0.0, y_max=1.0, increasing=False
            )
        found[0] = 1.0  # the mean
        return np.repeat(found, lengths, axis=0)


def suggest_scales(
    x: npt.ArrayLike | Tensor,
    y: npt.ArrayLike | Tensor,
    *,
    n_layers: int = 1,
    domain: Domain | None = None,
    norm: int = 1,
) -> tuple[float, ...]:
    """Scales for :class:`SobolevLoss` from noisy samples: up to the highest mode that may be a tenth signal.

    Cosines are fitted to the samples by least squares, the noise is estimated from what they leave, and the share of
    signal in each mode by Stein's estimate under the one condition that it does not rise with the mode.  The estimate
    errs towards too many modes: of a single slow wave, or of noise alone, it may keep any number.  That is meant: with
    too few a network is free above them, which costs more than some noise (see ``docs/sobolev.md``).

    Least squares reach up to N/8 cycles per period for one input, 500 at most, and less for more inputs.

    Args:
        x: Points (N, D), or (N,), N ≥ 16.
        y: Samples (N, M), or (N,).
        n_layers: Number of layers with an output, the network's own among them.
        domain: As for :func:`sobolev_loss`.
        norm: As for :func:`sobolev_loss`.

    Returns:
        As many scales as layers, geometric up to the highest mode.

    Raises:
        ValueError: If there are too few samples, they do not match, are not finite or real, or an argument is out of
            its range.

    Warns:
        UserWarning: If what the cosines leave is no independent noise, for instance signal beyond their reach.

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
    """Noisy samples without what is more likely noise than signal: targets for training.

    A linear fit in cosines, each mode shrunk to its share of signal as :func:`suggest_scales` estimates it; nothing is
    to be set.  It needs the whole data set, once, before training.

    Args:
        x: Points (N, D), or (N,), N ≥ 16.
        y: Samples, (N, M) or (N,): NumPy or PyTorch.
        domain: As for :func:`sobolev_loss`.
        norm: As for :func:`sobolev_loss`: the norm of the modes that orders them.

    Returns:
        Targets as ``y``: an array in float64, or a tensor in the floating dtype and on the device of ``y``.

    Raises:
        ValueError: As for :func:`suggest_scales`.

    Warns:
        UserWarning: As for :func:`suggest_scales`; what is left is missing in the targets.

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
    shrunk = fit.basis @ (fit.gains * fit.coefficients)
    if isinstance(y, Tensor):
        dtype = y.dtype if y.is_floating_point() else torch.float64
        return torch.as_tensor(shrunk, dtype=dtype, device=y.device).reshape(y.shape)
    return shrunk.reshape(np.shape(y))


def fit_cosines(x: Array, y: Array, domain: Domain | None, norm: int) -> CosineFit:
    """Fit as many cosines as a quarter of the samples allow, at most 1000.

    Cosines over half periods take the function as mirrored at the ends of the domain, where waves over whole periods
    would take a function with different values at both ends for one that jumps.
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
    told = size > 1e-6 * np.sqrt(len(x))  # few different points, or a grid, cannot tell more cosines
    basis, sizes = basis[:, told], sizes[told]
    coefficients = basis.T @ y
    left = y - basis @ coefficients
    if _neighbors_are_alike(halves, left, y):
        warnings.warn(
            f"x, y: beside the {len(sizes)} cosines up to {sizes[-1]:g} cycles per period that {len(x)} samples allow, "
            "they hold something that neighboring samples share: signal beyond that, which counts as noise here, or "
            "noise that is not independent.",
            stacklevel=3,
        )
    noise = np.sqrt((left**2).sum(axis=0) / (len(x) - basis.shape[1]))
    noise = np.maximum(noise, ROUNDING * np.sqrt((y**2).mean(axis=0)))
    return CosineFit(basis, coefficients, sizes, noise)


def _neighbors_are_alike(points: Array, left: Array, y: Array) -> bool:
    """Whether an output leaves more than a little, and nearest neighbors have more of it in common than noise has."""
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
    """The modes (p, D) ≥ 0 of least norm, and their norms in cycles per period."""
    radius = 1.0 if dim > 1 else float(count)
    while len(modes := orthant(radius, dim, norm)) < count:
        radius = max(radius + 1 / norm, radius * 1.1)
    sizes = np.linalg.norm(modes, ord=norm, axis=1)
    chosen = np.argsort(sizes, kind="stable")[:count]
    return modes[chosen], sizes[chosen] / 2
