r"""The Sobolev loss as a function of outputs and targets (paper, equations 6 to 8)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial, reduce
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_koopman._checks import is_number
from lightning_koopman.fourier.basis import BasisCache, fourier_basis, modes_at_once
from lightning_koopman.fourier.domain import (
    Domain,
    Interval,
    check_domain,
    check_points,
    is_hidden,
    match_domain,
    observe_domain,
    to_torus,
)
from lightning_koopman.sobolev.bands import Bands, SobolevNorm


def sobolev_loss(
    outputs: Tensor | Sequence[Tensor],
    targets: Tensor,
    points: Tensor | None = None,
    *,
    scales: float | Sequence[float],
    exponent: float | None = None,
    literal: bool = False,
    norm: int = 1,
    domain: Domain | None = None,
    weights: Tensor | None = None,
    n_samples: float | None = None,
) -> Tensor:
    r"""Compute the squared negative Sobolev norm of the residual in bands of Fourier modes (paper, equations 6 to 8).

    .. math:: \sum_{\ell=1}^{L} \sum_{m=1}^{M} \sum_{\|k\| \le s(\ell)} (1 + (2\pi\|k\|_2)^2)^s
        \, |\hat r_{\ell m}(k)|^2, \qquad \hat r(k) = \sum_{i=1}^{N} w_i \, (y_i - f_i) \, e^{-2\pi i k \cdot t_i}

    with the points t in units of the period.  A single output gives Sobolev loss 2 of the paper, one output per layer
    Sobolev loss 1.  :class:`SobolevLoss` is the same as a module; it caches the basis and finds the layers.

    Args:
        outputs: The network's values f: a tensor (N, M) at the points, or (N,) for M = 1; or one such tensor per layer,
            the network's own last.  Without ``points``: (B, M, n_1, …, n_D) on equidistant grids that span one period.
        targets: Samples y, in the shape of one output.
        points: Tensor (N, D), or (N,) for one input, in the unit of ``domain``; None for values on a grid.
        scales: Highest mode in cycles per period, or one for each output.  A single output takes the bands of all
            scales; for several outputs a single scale is expanded to geometric ones (:func:`sobolev_scales`).
        exponent: :math:`s` (default: −1/4; with ``literal`` −1/2, as in the paper).
        literal: Use shells :math:`\|k\| = s(\ell)`, as in equations 7 and 8, instead of balls.
        norm: 1 as in the paper, or 2: the norm of the mode that is compared with the scale.
        domain: ``(low, high)``, the ends of one period, or one such pair per input (default: the range of the points
            plus one mean spacing).
        weights: Quadrature weights (N,) that sum to 1 over the whole data set (default: all equal).
        n_samples: Number of samples in the whole data set, if the call has a random part of it.  The value is then
            unbiased: its mean over all parts of B ≥ 2 samples is the value of the whole set.  It may be negative.
            ``math.inf``: unbiased for the loss of infinitely many samples; then it has no lower bound.

    Returns:
        Scalar in the widest dtype of outputs, targets and points, at least float32, also under autocast.

    Raises:
        TypeError: If an input is complex, or not floating point.
        ValueError: If shapes do not match, a point lies outside the period, a shell contains no mode, or an argument is
            out of its range.  (In a compiled step, points are not checked and there are no warnings.)

    Warns:
        UserWarning: If there are more modes than the samples can distinguish, or the points have half precision, which
            is too coarse for high modes.

    Example:
        >>> import torch
        >>> from lightning_koopman import sobolev_loss
        >>> x = torch.arange(8) / 8
        >>> missed = torch.cos(2 * torch.pi * 3 * x)  # power 1/4 in each of the modes 3 and −3
        >>> sobolev_loss(missed, torch.zeros(8), x, scales=3, exponent=0.0)
        tensor(0.5000)
        >>> sobolev_loss(missed, torch.zeros(8), x, scales=2, exponent=0.0) < 1e-12
        tensor(True)
    """
    rule = SobolevNorm(cast("tuple[float, ...]", scales), exponent, literal, norm)
    box = None if domain is None else check_domain(domain)
    n_samples = check_n_samples(n_samples)
    stack, targets, points = check_tensors(outputs, targets, points)
    if points is None:
        check_grid_arguments(box, weights, n_samples)
        if not torch.compiler.is_compiling():
            warn_of_aliases(rule.bands(len(stack), targets.dim() - 2), targets.shape[2:])
        return grid_loss(stack, targets, rule)
    weights = check_weights(weights, targets, n_samples)
    box = observe_domain(points) if box is None else match_domain(box, points.shape[1])
    check_points(points, box)
    if not is_hidden(points):
        warn_of_modes(rule.bands(len(stack), points.shape[1]), len(targets) if n_samples is None else n_samples)
    return scattered_loss(stack, targets, points, rule, box, weights, n_samples)


def scattered_loss(
    outputs: Sequence[Tensor],
    targets: Tensor,
    points: Tensor,
    rule: SobolevNorm,
    box: tuple[Interval, ...],
    weights: Tensor | None,
    n_samples: float | None,
    cache: BasisCache | None = None,
) -> Tensor:
    """Compute the loss at scattered points; all arguments are checked."""
    dtype = precision(*outputs, targets, points)
    n_points = len(targets)
    with torch.autocast(points.device.type, enabled=False):
        points = points.to(dtype)
        missed = torch.cat([targets.to(dtype) - output.to(dtype) for output in outputs], dim=1)  # (N, L M)
        scaled = missed / n_points if weights is None else missed * weights.to(dtype)[:, None]
        modes, factors = rule.tensors(len(outputs), points.shape[1], points)
        step = modes_at_once(len(modes), n_points, dtype)
        if step >= len(modes):
            if cache is None or points.requires_grad or is_hidden(points):
                basis = fourier_basis(to_torus(points, box), modes)
            else:
                basis = cache.get(points, box, modes)
            total = weighted_power(basis @ scaled, factors)
        else:
            torus_points, total = to_torus(points, box), scaled.new_zeros(())
            for some, their in zip(torch.split(modes, step), torch.split(factors, step, dim=1), strict=True):
                piece = partial(power_of_modes, some, their)
                # recompute the piece of the basis for the gradient, which torch.func does not support
                if torch.is_grad_enabled() and not is_hidden(torus_points, scaled):
                    total = total + checkpoint(
                        piece, torus_points, scaled, use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    total = total + piece(torus_points, scaled)
        return total if n_samples is None else without_bias(total, scaled, factors, n_samples)


def precision(*tensors: Tensor) -> torch.dtype:
    """Return the widest dtype of all, at least float32."""
    return reduce(torch.promote_types, (each.dtype for each in tensors), torch.float32)


def power_of_modes(modes: Tensor, factors: Tensor, torus_points: Tensor, scaled: Tensor) -> Tensor:
    """Return the contribution of some of the modes."""
    return weighted_power(fourier_basis(torus_points, modes) @ scaled, factors)


def weighted_power(coefficients: Tensor, factors: Tensor) -> Tensor:
    """Return the weighted sum of |r̂|² over modes, layers and outputs; coefficients (2m, L M), weights (L, m)."""
    n_layers, n_modes = factors.shape
    power = coefficients.square().view(2, n_modes, n_layers, -1).sum(dim=(0, 3))
    return (power * factors.mT).sum()


def without_bias(total: Tensor, scaled: Tensor, factors: Tensor, n_samples: float) -> Tensor:
    """Estimate the loss of N samples, without bias, from the loss of B of them.

    The loss is a sum over pairs of samples, of which a part holds B (B − 1) out of N (N − 1), and over samples with
    themselves, of which it holds B out of N.  The latter terms are the same for all modes.
    """
    n_points = len(scaled)
    alone = (scaled.square().view(n_points, len(factors), -1).sum(dim=(0, 2)) * factors.sum(1)).sum()
    rest = 1 - 1 / n_samples  # (N − 1) / N, also for N = ∞
    pairs = n_points / (n_points - 1) * rest if n_points > 1 else 0.0  # a single sample has no pairs
    return pairs * (total - alone) + n_points / n_samples * alone


def grid_loss(outputs: Sequence[Tensor], targets: Tensor, rule: SobolevNorm) -> Tensor:
    """Compute the mean loss over B grids (B, M, n_1, …, n_D) that span one period; all arguments are checked."""
    sizes = targets.shape[2:]
    axes = tuple(range(-len(sizes), 0))
    dtype = precision(*outputs, targets)
    with torch.autocast(targets.device.type, enabled=False):
        missed = torch.stack([targets.to(dtype) - output.to(dtype) for output in outputs])  # (L, B, M, n_1, …, n_D)
        transformed = torch.view_as_real(torch.fft.rfftn(missed, dim=axes, norm="forward"))
        power = transformed.square().sum(-1).mean(1).sum(1).flatten(1)  # (L, number of stored modes)
        modes, factors = rule.tensors(len(outputs), len(sizes), power)
        return (power[:, stored_at(modes, sizes)] * factors).sum()


def stored_at(modes: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the index of each mode in a flattened real FFT; modes outside the stored half use that of −k."""
    extent = torch.tensor(sizes, device=modes.device)
    half = sizes[-1] // 2
    wrapped = modes % extent
    wrapped = torch.where(wrapped[:, -1:] > half, -modes % extent, wrapped)
    index = torch.zeros(len(modes), dtype=torch.int64, device=modes.device)
    for column, size in zip(wrapped.unbind(1), (*sizes[:-1], half + 1), strict=True):
        index = index * size + column
    return index


def check_tensors(
    outputs: Tensor | Sequence[Tensor], targets: Tensor, points: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Return outputs and targets (N, M) and points (N, D), or grids (B, M, n_1, …); raise if they do not match."""
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [cast("Tensor", outputs)]
    if not outputs:
        raise ValueError("outputs is an empty list: pass the network's values, or one tensor per layer.")
    named = [(f"outputs[{index}]" if len(outputs) > 1 else "outputs", each) for index, each in enumerate(outputs)]
    named += [("targets", targets)] + ([] if points is None else [("points", points)])
    for name, tensor in named:
        check_floating(name, tensor)
    for name, tensor in named[: len(outputs)]:
        if tensor.shape != targets.shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, targets {tuple(targets.shape)}: the shapes must be "
                "equal, because there is no broadcasting."
            )
    for name, tensor in named:
        check_device(name, tensor, "targets", targets)
    if not targets.numel():
        raise ValueError(f"targets are empty, with the shape {tuple(targets.shape)}: pass at least one sample.")
    if points is None:
        if targets.dim() < 3:
            raise ValueError(
                f"points=None is for values on a grid, (B, M, n_1, …, n_D), but targets have the shape "
                f"{tuple(targets.shape)}: give points (N, D)."
            )
        return outputs, targets, None
    if targets.dim() not in (1, 2) or points.dim() not in (1, 2) or len(points) != len(targets) or not points.numel():
        raise ValueError(
            f"targets must be (N, M) and points (N, D) with the same N ≥ 1, got {tuple(targets.shape)} and "
            f"{tuple(points.shape)}; leave points out for values on a grid."
        )
    if points.dtype.itemsize < 4 and not torch.compiler.is_compiling():
        warnings.warn(
            f"points are {points.dtype}, which is too coarse for high modes: pass them in float32 (as "
            "precision='bf16-mixed' does, unlike 'bf16-true').",
            stacklevel=3,
        )
    if targets.dim() == 1:
        outputs, targets = [each[:, None] for each in outputs], targets[:, None]
    return outputs, targets, points[:, None] if points.dim() == 1 else points


def check_floating(name: str, tensor: object) -> None:
    """Raise TypeError unless ``tensor`` is a dense floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}.")
    if tensor.is_complex():
        raise TypeError(f"{name} is complex ({tensor.dtype}): give real and imaginary part as two outputs.")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}: convert it with .float().")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {tensor.layout}: convert it with .to_dense().")


def check_device(name: str, tensor: Tensor, beside: str, other: Tensor) -> None:
    """Raise ValueError unless two tensors are on the same device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {beside} on {other.device}: move them to one device.")


def check_n_samples(n_samples: Any) -> float | None:
    """Return ``n_samples`` as a Python number; raise ValueError unless it is None or a number ≥ 1."""
    if n_samples is None:
        return None
    if not ((is_number(n_samples) or (isinstance(n_samples, Real) and n_samples == math.inf)) and n_samples >= 1):
        raise ValueError(f"n_samples must be the number of samples in the data set, ≥ 1, or None, got {n_samples!r}.")
    return n_samples if isinstance(n_samples, (int, float)) else float(n_samples)


def check_weights(weights: Tensor | None, targets: Tensor, n_samples: float | None) -> Tensor | None:
    """Return quadrature weights scaled to this part of the data set; raise ValueError if an argument does not fit."""
    n_points = len(targets)
    if n_samples is not None and n_samples < n_points:
        raise ValueError(f"n_samples={n_samples!r} is less than the {n_points} samples of this call: give the total.")
    if weights is None:
        return None
    fits = isinstance(weights, Tensor) and weights.shape == targets.shape[:1] and weights.layout == torch.strided
    if not fits or weights.is_complex():
        got = [weights.dtype, tuple(weights.shape), weights.layout] if isinstance(weights, Tensor) else type(weights)
        raise ValueError(f"weights must be a dense, real tensor ({n_points},), one for each sample, got {got}.")
    check_device("weights", weights, "targets", targets)
    if n_samples == math.inf:
        raise ValueError("weights of infinitely many samples are all zero: leave weights or n_samples=inf out.")
    if not is_hidden(weights):
        total = float(weights.detach().sum())
        if not -math.inf < total <= 1.01 or (n_samples in (None, n_points) and total < 0.99):
            raise ValueError(f"weights sum to {total:.6g}, not to 1: divide them by their sum over the whole data set.")
        if (n_samples or 0) / n_points * abs(total) > math.sqrt(torch.finfo(precision(weights)).max):
            raise ValueError(f"n_samples={n_samples!r} is too large: give the number of samples in the data set.")
    return weights if n_samples is None else weights * (n_samples / n_points)


def check_grid_arguments(box: object, weights: object, n_samples: object) -> None:
    """Raise ValueError for arguments that have no meaning on a grid."""
    for name, value in (("domain", box), ("weights", weights), ("n_samples", n_samples)):
        if value is not None:
            raise ValueError(f"{name} is for scattered points: leave it out on a grid, which spans one whole period.")


def warn_of_modes(bands: Bands, n_samples: float) -> None:
    """Warn if the cosines and sines outnumber the samples."""
    if bands.n_functions > n_samples:
        warnings.warn(
            f"scales: the {bands.n_functions} cosines and sines up to the highest mode are more than the "
            f"{n_samples} samples, so noise is fitted: lower the highest mode.",
            stacklevel=3,
        )


def warn_of_aliases(bands: Bands, sizes: Sequence[int]) -> None:
    """Warn if a grid is too coarse for a mode."""
    highest = abs(bands.modes).max(axis=0).tolist()
    for axis, (size, mode) in enumerate(zip(sizes, highest, strict=True)):
        if 2 * mode > size:
            warnings.warn(
                f"scales: the grid has {size} points in dimension {axis}, too few to distinguish mode {mode} from a "
                f"lower one: take no mode above {min(sizes) // 2}.",
                stacklevel=3,
            )
            return
