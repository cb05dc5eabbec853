"""The random walk that every spectrum is compared with: a training without any direction."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_koopman._checks import check_count, check_positive, real_array
from lightning_koopman._types import Array
from lightning_koopman.dmd.rrr import check_options, decompose
from lightning_koopman.dmd.spectrum import Spectrum

MOST_WALK = 2**62  # dimensions: larger values make no difference


def random_walk_spectrum(
    step_norms: npt.ArrayLike,
    start_norm: float,
    n: int,
    *,
    tol: float = 1e-3,
    max_rank: int | None = None,
    delays: int = 1,
    refine: bool = False,
    seed: int = 0,
) -> Spectrum:
    r"""Return the spectrum of an n-dimensional random walk with given step lengths and independent, uniform directions.

    A random walk, too, has a dominant eigenvalue at 1.  So eigenvalues near 1 are evidence about a training only where
    they differ from those of this surrogate.

    Only the Gram matrix of the directions matters, and its distribution is known (Bartlett's decomposition of a Wishart
    matrix).  Hence no n-dimensional vector is drawn, and the cost is O(time³) for any n.

    Args:
        step_norms: Array (time − 1,) of step lengths, ≥ 0, for instance :meth:`Trajectory.step_norms`.
        start_norm: Norm of the first snapshot, > 0, for instance :meth:`Trajectory.start_norm`.
        n: Dimension of the walk, ≥ 1.
        tol: As for :func:`dmd_rrr`.
        max_rank: As for :func:`dmd_rrr`.
        delays: As for :func:`dmd_rrr`.
        refine: As for :func:`dmd_rrr`.
        seed: Seed of the directions.

    Raises:
        ValueError: If ``step_norms`` is not one-dimensional, or an argument is out of range.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import random_walk_spectrum
        >>> walk = random_walk_spectrum(np.full(99, 0.1), start_norm=10.0, n=1_000_000)
        >>> nearest = walk.eigenvalues[np.argmin(abs(walk.eigenvalues - 1))]
        >>> bool(abs(nearest - 1) < 5e-3)
        True
    """
    steps = real_array("step_norms", step_norms).astype(np.float64)
    if steps.ndim != 1 or not steps.size or not np.isfinite(steps.sum()) or steps.min() < 0:
        raise ValueError(
            f"step_norms must have shape (time - 1,) with values ≥ 0 and a finite sum, got shape {steps.shape}."
        )
    start_norm, n = check_positive("start_norm", start_norm), min(check_count("n", n, 1), MOST_WALK)
    tol, max_rank, delays, refine = check_options(tol=tol, max_rank=max_rank, delays=delays, refine=refine)
    count = steps.size + 1
    if count < delays + 1:
        raise ValueError(f"step_norms has {steps.size} steps, but delays={delays} needs at least {delays}.")
    random = np.random.default_rng(check_count("seed", seed, 0))
    directions = wishart_root(random, n, count)
    directions /= np.linalg.norm(directions, axis=0)
    root = np.cumsum(directions * np.concatenate([[start_norm], steps]), axis=1)
    return decompose(root, tol=tol, max_rank=max_rank, delays=delays, refine=refine)


def wishart_root(random: np.random.Generator, n: int, count: int) -> Array:
    """Return an array (min(n, count), count) whose Gram matrix is distributed like that of standard normal n-vectors.

    For n > count this uses Bartlett's decomposition and draws no n-dimensional vector.
    """
    root = random.standard_normal((min(n, count), count))
    if n > count:
        root = np.triu(root, 1)
        np.fill_diagonal(root, np.sqrt(random.chisquare(n - np.arange(count))))
    return root
