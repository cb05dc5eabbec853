r"""Estimate depth and scales of a fully connected network before any training (paper, section 5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_koopman.depth.estimate import FEWEST, DepthEstimate, estimate_depth
from lightning_koopman.fourier.domain import Interval, observe_domain
from lightning_koopman.fourier.grid import find_grid
from lightning_koopman.fourier.samples import as_samples
from lightning_koopman.sobolev.bands import check_scales


@dataclass(frozen=True, eq=False)
class MLPSuggestion:
    r"""Result of :func:`suggest_mlp`.

    Attributes:
        n_layers: Number of hidden layers.
        scales: Highest mode of each hidden layer's octave, in cycles per period; the last is also that of the network's
            output.  Pass them to :class:`SobolevLoss` as ``scales``, with the first ``n_layers - 1`` hidden layers as
            ``layers``.
        domain: The period of each input, to pass to :class:`SobolevLoss` as ``domain``.
        depth: The estimate used.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import estimate_depth, suggest_mlp
        >>> x = np.linspace(0, 1, 201)
        >>> y = np.sin(2 * np.pi * x) + np.sin(16 * np.pi * x)
        >>> suggestion = suggest_mlp(x, y, depth=estimate_depth(x, y, taper=True))
        >>> suggestion.n_layers, suggestion.scales
        (2, (1, 8))
    """

    n_layers: int
    scales: tuple[float, ...]
    domain: tuple[Interval, ...]
    depth: DepthEstimate


def suggest_mlp(
    x: npt.ArrayLike | Tensor, y: npt.ArrayLike | Tensor, *, depth: DepthEstimate | None = None
) -> MLPSuggestion:
    """Suggest hidden layers of a fully connected network for the samples, one per octave of their spectrum.

    This is a heuristic of the paper (whose section 6 takes nine layers where the estimate is seven); a network of
    another depth may do as well.  See ``docs/depth.md``.

    Args:
        x: Points, as for :func:`estimate_depth`.
        y: Samples, as for :func:`estimate_depth`.
        depth: The estimate to use (default: ``estimate_depth(x, y)``).  For noisy samples pass one whose
            ``max_frequency`` is the last of :func:`suggest_scales` divided by the period.

    Returns:
        Number of layers, scales and period.

    Raises:
        ValueError: As for :func:`estimate_depth`, or if ``depth`` is not a :class:`DepthEstimate`.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import suggest_mlp
        >>> x = np.linspace(0, 2, 1001)
        >>> suggestion = suggest_mlp(x, x + np.sin(2 * np.pi * x**4))
        >>> suggestion.n_layers, suggestion.scales
        (7, (1, 3, 7, 15, 31, 63, 68))
    """
    if not isinstance(depth, DepthEstimate | None):
        raise ValueError(f"depth must be what estimate_depth returns, or None, got {depth!r}.")
    depth = estimate_depth(x, y) if depth is None else depth
    points, samples = as_samples(x, y, FEWEST)
    domain, grid = observe_domain(torch.as_tensor(points), "the points x"), find_grid(points, samples)
    if grid is not None:  # coordinates that differ only by rounding are one
        lengths = np.multiply(grid.steps, grid.values.shape[:-1])
        domain = tuple((low, low + float(length)) for (low, _), length in zip(domain, lengths, strict=True))
    longest = max(high - low for low, high in domain)
    frequencies = depth.frequencies if depth.counts.any() else depth.layer_frequencies
    ends = np.searchsorted(frequencies, depth.layer_frequencies[1:])  # ends of the layers' octaves
    reach = frequencies[np.append(ends - 1, -1)]
    # the ℓ1 norm of a mode is at most √D times the Euclidean one
    modes = np.maximum(1, np.ceil(reach * longest * np.sqrt(len(domain)) - 1e-6))
    return MLPSuggestion(depth.n_layers, check_scales(modes.tolist()), domain, depth)
