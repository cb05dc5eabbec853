"""The result of a dynamic mode decomposition."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lightning_koopman._checks import (
    check_choice,
    check_count,
    check_flag,
    check_positive,
    is_number,
    real_array,
    whole_numbers,
)

Real = npt.NDArray[np.float64]
Complex = npt.NDArray[np.complex128]
Mask = npt.NDArray[np.bool_]
MOST_STEPS, MOST_TIME = 10**6, 10**9  # steps of a forecast, which take a row each; times of a combination
PERSISTENT = ("cluster", "paper")  # rules of `Spectrum.persistent`


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    r"""Koopman spectrum of a trajectory, returned by :func:`dmd_rrr` and :meth:`Trajectory.spectrum`.

    The trajectory is modeled as :math:`w_t \approx \sum_j b_j \lambda_j^t z_j` with unit modes :math:`z_j` (paper,
    equation 4).  Pairs are sorted by importance :math:`|b_j|`, largest first.  Complex ones come as conjugate pairs.

    Attributes:
        eigenvalues: Complex array (k,): refined Rayleigh quotients, or plain Ritz values with ``refine=False``.
        residuals: Array (k,), ≥ 0: :math:`\|A z - \lambda z\|_2` of each eigenvalue with its unit vector.
        ritz_values: Complex array (k,): plain Ritz values, to which ``coefficients`` belong.
        ritz_residuals: Array (k,), ≥ 0: residuals of the plain Ritz pairs.
        coefficients: Complex array (k,): least-squares :math:`b_j` over all snapshots, in the unit of the weights.
        misfit: :math:`\|Y - A X\|_F / \|Y\|_F`, ≥ 0: relative error of the model from one snapshot to the next; 0 at
            full rank, whatever the data.
        rank: Number k of pairs: the numerical rank of the scaled snapshots.
        n_snapshots: Number of snapshots the spectrum was computed from.
        delays: Number of snapshots in one delay-embedded snapshot (1: no embedding).
        sketch_errors: Array (k,), ≥ 0: standard error of each eigenvalue if it was computed from sketches of the
            snapshots, else None.  The rank is taken as known: where sketches change it, errors are larger.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import dmd_rrr
        >>> t = np.arange(12)
        >>> spectrum = dmd_rrr(np.stack([3 * 0.5**t + 1, 0.5**t - 2], axis=1))
        >>> spectrum
        Spectrum(rank=2, n_snapshots=12, misfit=..., eigenvalues=[0.5000, 1.0000])
        >>> bool(spectrum.residuals.max() < 1e-12)
        True
    """

    eigenvalues: Complex
    residuals: Real
    ritz_values: Complex
    ritz_residuals: Real
    coefficients: Complex
    misfit: float
    rank: int
    n_snapshots: int
    delays: int = 1
    sketch_errors: Real | None = None
    mode_weights: Complex = field(kw_only=True)
    """Complex array (n_snapshots − delays, k): unit modes as combinations of all (embedded) snapshots but the last."""
    rayleigh: Real = field(kw_only=True)
    """Array (k, k): compression of A to the snapshots' span (its eigenvalues are the Ritz values)."""
    complement: Real = field(kw_only=True)
    """Array (r, k): triangular factor of the part of A's image outside that span, which gives the residuals."""

    def __post_init__(self) -> None:
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    def __repr__(self) -> str:
        shown = ", ".join(_format(value) for value in self.eigenvalues[:6]) + (", …" if self.rank > 6 else "")
        return (
            f"Spectrum(rank={self.rank}, n_snapshots={self.n_snapshots}, misfit={self.misfit:.1e}, "
            f"eigenvalues=[{shown}])"
        )

    @property
    def full_rank(self) -> bool:
        """Whether the rank is as large as the number of snapshots allows.

        Then any data are fitted without misfit, and small residuals certify nothing.
        """
        return self.rank >= self.n_snapshots - self.delays

    @property
    def importance(self) -> Real:
        """Array (k,): :math:`|b_j|`, the size of each mode in the trajectory (paper, section 3)."""
        return np.abs(self.coefficients)

    def sketch_error(self) -> float:
        """Return the mean standard error of the eigenvalues, weighted by importance; NaN without sketches."""
        if self.sketch_errors is None:
            return float("nan")
        return float(self.sketch_errors @ self.importance / (self.importance.sum() or 1.0))

    def unit_cluster(self, radius: float = 0.05) -> Mask:
        """Return a boolean array (k,): the Ritz values within ``radius`` of 1, the paper's cluster at 1.

        Args:
            radius: Radius of the disc around 1, > 0.
        """
        return np.asarray(np.abs(self.ritz_values - 1.0) < check_positive("radius", radius))

    def persistent(self, radius: float = 0.05, *, rule: str = "cluster") -> Mask:
        """Return a boolean array (k,): the modes of the persistent part of the trajectory (paper, section 4).

        Args:
            radius: Radius of the cluster at 1, > 0.
            rule: ``"cluster"`` selects all Ritz values within ``radius`` of 1 (if there are none, the nearest) and the
                modes ranked above the first of them.  ``"paper"`` selects the one nearest 1 and those ranked above it,
                which is ill-conditioned if several lie close together.

        Raises:
            ValueError: If the rule is unknown.
        """
        check_choice("rule", rule, PERSISTENT)
        distance = np.abs(self.ritz_values - 1.0)
        chosen = self.unit_cluster(radius)
        if rule == "paper" or not chosen.any():
            chosen = distance <= distance.min() * (1 + 1e-9)  # a conjugate pair is equally near
        leading = self.importance[chosen].max()
        chosen = chosen | (self.importance > leading)
        pairs = np.conj(self.ritz_values[chosen])
        return np.asarray(chosen | np.isin(self.ritz_values, pairs))

    def unit_fraction(self, radius: float = 0.05) -> float:
        """Return the share of the importance in the cluster at 1, in [0, 1].

        A value near 1 alone does not show convergence: a random walk has one, too.  Compare it with the value of
        :func:`random_walk_spectrum`.

        Args:
            radius: Radius of the disc around 1, > 0.
        """
        total = float(self.importance.sum())
        return float(self.importance[self.unit_cluster(radius)].sum()) / total if total > 0 else 0.0

    def trusted(self, max_residual: float = 3e-2) -> Mask:
        """Return a boolean array (k,): the eigenvalues with a residual of at most ``max_residual``.

        Args:
            max_residual: Largest residual to trust, > 0.
        """
        return np.asarray(self.residuals <= check_positive("max_residual", max_residual))

    def slowest_modulus(self, max_residual: float = 3e-2) -> float:
        """Return the largest modulus of the trusted eigenvalues distinguishable from 1, or NaN if there are none.

        If all eigenvalues but 1 lie inside the unit circle, this one sets the rate of convergence (paper, section 3).
        An eigenvalue closer to 1 than its own residual counts as 1 and is ignored.

        Args:
            max_residual: Largest residual to trust, > 0.
        """
        apart = np.abs(self.eigenvalues - 1.0) > np.maximum(self.residuals, 1e-12)
        moduli = np.abs(self.eigenvalues[self.trusted(max_residual) & apart])
        return float(moduli.max()) if moduli.size else float("nan")

    def residual_at(self, point: complex) -> float:
        r"""Return the least :math:`\|A z - \zeta z\|_2` over unit z in the snapshots' span: 0 at an exact eigenvalue.

        Args:
            point: Complex number ζ, for instance 1.
        """
        if not (is_number(point) or (isinstance(point, (complex, np.complexfloating)) and np.isfinite(point))):
            raise ValueError(f"point must be a finite real or complex number, got {point!r}.")
        shifted = np.concatenate([self.rayleigh - complex(point) * np.eye(self.rank), self.complement])
        return float(np.linalg.svd(shifted, compute_uv=False)[-1])

    def combination(self, times: npt.ArrayLike, *, modes: npt.ArrayLike | None = None, clip: bool = False) -> Real:
        r"""Return the weights that combine the snapshots into the model's state at the given times.

        ``spectrum.combination(times) @ snapshots`` is the reconstruction :math:`\sum_j b_j \lambda_j^t z_j`.  Only this
        small matrix depends on the spectrum, so it applies to snapshots of any size, on any device.

        Args:
            times: Integers (s,): times in snapshots since the first one; ``n_snapshots - 1`` is the last snapshot.
            modes: Boolean (k,): the modes to include, closed under conjugation (default: all).
            clip: Hold growing modes at their size at the last snapshot (|λ| clipped to 1 beyond it).

        Returns:
            Array (s, n_snapshots).

        Raises:
            ValueError: If ``modes`` has the wrong shape or splits a conjugate pair.
        """
        at, clip = whole_numbers("times", times, -MOST_TIME, MOST_TIME), check_flag("clip", clip)
        chosen = np.ones(self.rank, dtype=bool) if modes is None else _flags("modes", modes)
        if chosen.shape != (self.rank,):
            raise ValueError(f"modes must have shape ({self.rank},), one entry per mode; got {chosen.shape}.")
        selected = self.ritz_values[chosen]
        if np.count_nonzero(selected.imag > 0) != np.count_nonzero(selected.imag < 0):
            raise ValueError("modes splits a conjugate pair: select both λ and its conjugate, or neither.")
        columns = self.n_snapshots - self.delays
        weights = np.zeros((at.size, self.n_snapshots))
        for row, time in enumerate(at):
            block = int(np.clip(time, 0, self.delays - 1))  # the part of the embedded snapshot that holds this time
            powers = _powers(selected, int(time) - block, self.n_snapshots - 1 - block if clip else None)
            state = self.mode_weights[:, chosen] @ (self.coefficients[chosen] * powers)
            weights[row, block : block + columns] = state.real
        if not np.isfinite(weights).all():
            raise ValueError(f"the modes overflow at times from {at.min()} to {at.max()}: pass times closer to 0.")
        return weights

    def reconstruct(self, snapshots: npt.ArrayLike, *, modes: npt.ArrayLike | None = None) -> Real:
        """Return the model's values at the times of the snapshots.

        Args:
            snapshots: Array (n_snapshots, n), the same that the spectrum was computed from.
            modes: Boolean (k,): the modes to include (default: all).

        Returns:
            Array (n_snapshots, n).
        """
        return self.combination(np.arange(self.n_snapshots), modes=modes) @ self._matching(snapshots)

    def forecast(self, snapshots: npt.ArrayLike, steps: int, *, clip: bool = True) -> Real:
        """Return the model's values after the last snapshot.

        Args:
            snapshots: Array (n_snapshots, n), the same that the spectrum was computed from.
            steps: Number of snapshots to look ahead, ≥ 1.
            clip: Hold growing modes at their size at the last snapshot.

        Returns:
            Array (steps, n).

        Example:
            >>> import numpy as np
            >>> from lightning_koopman import dmd_rrr
            >>> loss = 0.25 + 0.5 ** np.arange(10.0)[:, None]
            >>> dmd_rrr(loss, delays=5).forecast(loss, steps=2).round(6).ravel().tolist()
            [0.250977, 0.250488]
        """
        steps = check_count("steps", steps, 1, "use `combination` for single times", most=MOST_STEPS)
        ahead = np.arange(self.n_snapshots, self.n_snapshots + steps)
        return self.combination(ahead, clip=clip) @ self._matching(snapshots)

    def _matching(self, snapshots: npt.ArrayLike) -> Real:
        values = real_array("snapshots", snapshots).astype(np.float64)
        values = values[:, None] if values.ndim == 1 else values
        if not np.isfinite(values).all():
            raise ValueError("snapshots holds NaN or infinite values: pass those that the spectrum was computed from.")
        if values.ndim != 2 or not values.size or values.shape[0] != self.n_snapshots:
            raise ValueError(
                f"snapshots has shape {values.shape}, but the spectrum was computed from {self.n_snapshots} snapshots: "
                "pass the same snapshots, time first."
            )
        return values


def _flags(name: str, value: npt.ArrayLike) -> Mask:
    """Return booleans as an array; raise TypeError for anything else."""
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.dtype != bool or np.ma.isMaskedArray(value):
        raise TypeError(f"{name} must be booleans, one per mode, got {array.dtype}: pass a boolean mask.")
    return array


def _powers(values: Complex, exponent: int, clip_beyond: int | None) -> Complex:
    """Return λ^exponent; with ``clip_beyond``, growing λ rotate on but stop growing after that exponent."""
    if clip_beyond is None or exponent <= clip_beyond:
        return np.asarray(values**exponent)
    clipped = values / np.maximum(np.abs(values), 1.0)
    return np.asarray(values**clip_beyond * clipped ** (exponent - clip_beyond))


def _format(value: complex) -> str:
    return f"{value.real:.4f}" if value.imag == 0 else f"{value.real:.4f}{value.imag:+.4f}j"
