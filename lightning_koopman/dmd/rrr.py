r"""DMD_RRR: refined Rayleigh-Ritz data-driven modal decomposition.

Z. Drmač, I. Mezić, R. Mohr, *Data driven modal decompositions: analysis and enhancements*, SIAM J. Sci. Comput. 40(4),
A2253–A2285, 2018.  The paper uses this algorithm for every spectrum (its section 2, reference 7).
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch import Tensor

from lightning_koopman._checks import check_count, check_flag, check_fraction, real_array
from lightning_koopman.dmd.blas import single_blas_thread
from lightning_koopman.dmd.gram import EXACT_SIZE, EXACT_TOL, factor, hankel, power_of_two, triangle
from lightning_koopman.dmd.spectrum import Complex, Real, Spectrum

REFINE_COST = 2 * 10**9  # k³ summed over the refined pairs: about two seconds
REFINE_MEMORY = 10**6  # matrix entries held at a time


def dmd_rrr(
    snapshots: npt.ArrayLike | Tensor,
    *,
    tol: float = 1e-3,
    max_rank: int | None = None,
    delays: int = 1,
    refine: bool = True,
) -> Spectrum:
    r"""Compute the Koopman spectrum of a trajectory by DMD_RRR (Drmač, Mezić, Mohr 2018, Algorithm 3).

    Finds the pairs :math:`(\lambda, z)` of the linear map A with :math:`w_{t+1} \approx A w_t`, their residuals
    :math:`\|A z - \lambda z\|`, and the coefficients of the trajectory in those modes.

    Large inputs use the float64 Gram matrix of the increments, in one pass with almost no extra memory.  Small inputs,
    and all with ``tol`` below 1e-6, use Householder QR.

    Args:
        snapshots: Array or tensor (time, n), or (time,) for a scalar: one row per snapshot, float32 or float64
            (integers and lists are read as float64), NumPy, or PyTorch on the CPU or an accelerator.
        tol: Singular values of the unit-norm snapshots below ``tol`` times the largest count as zero, 0 ≤ tol < 1.
            1e-3 suits training runs; float32 snapshots carry nothing below 1e-7.
        max_rank: Upper bound on the rank, ≥ 1 (default: none).
        delays: Snapshots in one delay-embedded (Hankel) snapshot, ≥ 1.  For a scalar such as the loss, use more than
            half the number of snapshots.
        refine: Replace each Ritz pair in ``eigenvalues`` and ``residuals`` by the refined one, whose residual is the
            smallest that the data allow, at O(k³) per pair.  Beyond rank 200 only the most important are refined.

    Returns:
        The spectrum.

    Raises:
        ValueError: If there are fewer than ``delays + 1`` snapshots, a value is not finite, all snapshots are zero, or
            an argument is out of range.
        TypeError: If the snapshots are complex or of half precision.

    Example:
        A rotation that shrinks has a conjugate pair of eigenvalues:

        >>> import numpy as np
        >>> from lightning_koopman import dmd_rrr
        >>> turn = 0.9 * np.array([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]])
        >>> states = [np.array([1.0, 0.0])]
        >>> for _ in range(10):
        ...     states.append(turn @ states[-1])
        >>> spectrum = dmd_rrr(np.stack(states))
        >>> np.abs(spectrum.eigenvalues).round(6).tolist(), np.angle(spectrum.eigenvalues).round(6).tolist()
        ([0.9, 0.9], [1.0, -1.0])
    """
    values = _as_matrix(snapshots)
    tol, max_rank, delays, refine = check_options(tol=tol, max_rank=max_rank, delays=delays, refine=refine)
    if values.shape[0] < delays + 1:
        raise ValueError(
            f"snapshots has {values.shape[0]} row(s), but delays={delays} needs at least {delays + 1}: "
            "record more snapshots or use fewer delays."
        )
    exact = tol < EXACT_TOL or values.numel() <= EXACT_SIZE
    unit = _unit(float(values.abs().max())) if values.dtype == torch.float64 else 1.0  # squares of float32 fit anyway
    root = factor(values if unit == 1.0 else values / unit, exact=exact) * unit
    return decompose(root, tol=tol, max_rank=max_rank, delays=delays, refine=refine)


def check_options(
    *, tol: object, max_rank: object = None, delays: object = 1, refine: object = True
) -> tuple[float, int | None, int, bool]:
    """Return the DMD options as plain numbers; raise ValueError if one is out of range."""
    return (
        check_fraction("tol", tol, "it is relative to the largest singular value"),
        None if max_rank is None else check_count("max_rank", max_rank, 1, "pass None for no bound"),
        check_count("delays", delays, 1, "1 means no delay embedding"),
        check_flag("refine", refine),
    )


@single_blas_thread()
def decompose(
    root: Real, *, tol: float = 1e-3, max_rank: int | None = None, delays: int = 1, refine: bool = True
) -> Spectrum:
    """Return the spectrum of the trajectory with factor ``root`` (r, time); arguments as for :func:`dmd_rrr`."""
    unit = _unit(float(np.abs(root).max(initial=0.0)))
    if unit != 1.0:
        found = decompose(root / unit, tol=tol, max_rank=max_rank, delays=delays, refine=refine)
        return replace(found, coefficients=found.coefficients * unit, mode_weights=found.mode_weights / unit)
    n_snapshots = root.shape[1]
    embedded = hankel(root, delays)
    x, y = embedded[:, :-1], embedded[:, 1:]
    norms = np.linalg.norm(x, axis=0)
    tiny = norms < 1e-140  # their squares underflow or lose digits
    peaks = np.abs(x[:, tiny]).max(axis=0, initial=0.0)
    norms[tiny] = peaks * np.linalg.norm(x[:, tiny] / np.where(peaks > 0, peaks, 1.0), axis=0)
    if not norms.any():
        raise ValueError(f"all snapshots {'but the last ' if y.any() else ''}are zero: there is nothing to decompose.")
    # unit columns, so that the late, small snapshots of a decaying trajectory count
    scale = np.where(norms > 0, norms, 1.0)
    left, singular, right = scipy.linalg.svd(x / scale, full_matrices=False, check_finite=False)
    rank = int(np.count_nonzero(singular > tol * singular[0]))
    rank = rank if max_rank is None else min(rank, max_rank)
    basis = left[:, :rank]
    weights = (right[:rank].T / singular[:rank]) / scale[:, None]  # x @ weights = basis, y @ weights = A basis

    image = y @ weights
    rayleigh = basis.T @ image
    complement = triangle(image - basis @ rayleigh)
    values, vectors = scipy.linalg.eig(rayleigh, check_finite=False)  # lists λ (Im > 0) right before its conjugate
    coefficients = _least_squares(basis.T @ embedded, values, vectors)
    order = _by_importance(values, coefficients)
    values, vectors, coefficients = values[order], vectors[:, order], coefficients[order]

    residuals = _residuals(rayleigh, complement, values, vectors)
    refined = (values, residuals)
    if refine:
        refined = _refine(rayleigh, complement, refined)
    return Spectrum(
        eigenvalues=refined[0],
        residuals=refined[1],
        ritz_values=values,
        ritz_residuals=residuals,
        coefficients=coefficients,
        misfit=float(np.linalg.norm(y - image @ (basis.T @ x)) / (np.linalg.norm(y) or 1.0)),
        rank=rank,
        n_snapshots=n_snapshots,
        delays=delays,
        mode_weights=weights @ vectors,
        rayleigh=rayleigh,
        complement=complement,
    )


def _unit(peak: float) -> float:
    """Return a power of two in units of which squares neither over- nor underflow; 1 for usual sizes."""
    return 1.0 if 1e-50 < peak < 1e50 else power_of_two(peak)


def _least_squares(states: Real, values: Complex, vectors: Complex) -> Complex:
    """Return the b that minimize Σ_t ‖s_t − Σ_j b_j λ_j^t v_j‖² over the projected snapshots ``states`` (k, time).

    Unknowns are scaled by the largest power of their λ, so that neither growth nor decay over- or underflows.
    """
    rank, count = states.shape
    growing = np.abs(values) > 1.0
    base = np.where(growing, values, 1.0)
    decaying = np.where(growing, 1.0 / base, values)
    powers = np.vander(decaying, count, increasing=True)
    powers[growing] = powers[growing, ::-1]  # λ^t / λ^(count−1)
    gram = (vectors.conj().T @ vectors) * (powers.conj() @ powers.T)
    norms = np.sqrt(np.diag(gram).real)
    lower, info = scipy.linalg.lapack.zpotrf(gram / np.outer(norms, norms), lower=True)
    if info or np.diag(lower).real.min() < 1e-6:
        # nearly equal eigenvalues: use the least-squares solution of minimum norm
        design = (vectors.T[:, :, None] * (powers / norms[:, None])[:, None, :]).reshape(rank, -1).T
        solution = np.linalg.lstsq(design, states.reshape(-1).astype(np.complex128), rcond=None)[0] / norms
    else:
        # corrected semi-normal equations: refinement gives nearly the accuracy of QR at a fraction of its cost
        solution = np.zeros(rank, dtype=np.complex128)
        for _ in range(3):
            missed = states - vectors @ (solution[:, None] * powers)
            gradient = np.sum((vectors.conj().T @ missed) * powers.conj(), axis=1)
            solution = solution + scipy.linalg.cho_solve((lower, True), gradient / norms, check_finite=False) / norms
    with np.errstate(under="ignore"):
        return np.asarray(solution * np.where(growing, (1.0 / base) ** (count - 1), 1.0))


def _by_importance(values: Complex, coefficients: Complex) -> npt.NDArray[np.intp]:
    """Return the order of decreasing |b| that keeps conjugate pairs together, positive imaginary part first."""
    importance = np.abs(coefficients)
    first = np.flatnonzero(values.imag > 0)
    importance[first + 1] = importance[first]
    return np.argsort(-importance, kind="stable")


def _residuals(rayleigh: Real, complement: Real, values: Complex, vectors: Complex) -> Real:
    """Return ‖A z − λ z‖ of unit vectors z = basis @ v, from its parts inside and outside the span."""
    inside = np.linalg.norm(rayleigh @ vectors - vectors * values, axis=0)
    return np.asarray(np.hypot(inside, np.linalg.norm(complement @ vectors, axis=0)))


def _refine(rayleigh: Real, complement: Real, plain: tuple[Complex, Real]) -> tuple[Complex, Real]:
    """Return the refined pairs: for each λ, Rayleigh quotient and residual of the unit vector of least residual."""
    values = plain[0]
    rank = values.size
    upper = np.flatnonzero(values.imag >= 0)
    upper = upper[: max(8, REFINE_COST // rank**3)]
    vectors = np.empty((rank, upper.size), dtype=np.complex128)
    batch = max(1, REFINE_MEMORY // rank**2)
    for start in range(0, upper.size, batch):
        some = values[upper[start : start + batch]]
        shifted = np.empty((some.size, rank + complement.shape[0], rank), dtype=np.complex128)
        shifted[:, :rank] = rayleigh - some[:, None, None] * np.eye(rank)
        shifted[:, rank:] = complement
        vectors[:, start : start + batch] = np.linalg.svd(np.linalg.qr(shifted, mode="r"))[2][:, -1].conj().T
    quotients = np.einsum("ij,ij->j", vectors.conj(), rayleigh @ vectors)
    quotients[values[upper].imag == 0] = quotients[values[upper].imag == 0].real
    residuals = _residuals(rayleigh, complement, quotients, vectors)

    refined, refined_residuals = plain[0].copy(), plain[1].copy()
    refined[upper], refined_residuals[upper] = quotients, residuals
    paired = upper[values[upper].imag > 0]
    refined[paired + 1], refined_residuals[paired + 1] = refined[paired].conj(), refined_residuals[paired]
    return refined, refined_residuals


def _as_matrix(snapshots: npt.ArrayLike | Tensor) -> Tensor:
    """Return snapshots as a real float32 or float64 tensor (time, n), without a copy if they already are one."""
    if isinstance(snapshots, Tensor) and not snapshots.is_sparse and snapshots.device.type != "meta":
        values = snapshots.detach().resolve_neg()
        if not values.is_floating_point() and not values.is_complex():
            values = values.to(torch.float64)
    else:
        kind = getattr(snapshots, "dtype", None)
        if kind == np.float16:
            raise TypeError("snapshots must be float32 or float64, got float16: half precision hides late updates.")
        with warnings.catch_warnings():
            # a read-only memory map is only read here, and a copy may not fit into memory
            warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
            array = real_array("snapshots", snapshots)
            backwards = any(stride < 0 for stride in array.strides)  # PyTorch cannot view negative strides
            values = torch.from_numpy(array.copy() if backwards else array)
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"snapshots must be float32 or float64, got {values.dtype}: half precision hides late updates and complex "
            "snapshots are not supported. Convert the weights with .float() before recording them."
        )
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2:
        raise ValueError(
            f"snapshots must have shape (time, n), one row per snapshot; got {tuple(values.shape)}. "
            "Flatten each snapshot first."
        )
    if values.shape[1] == 0:
        raise ValueError(f"snapshots must have at least one column, got shape {tuple(values.shape)}.")
    return values
