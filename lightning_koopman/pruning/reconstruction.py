"""What of a trajectory stays: its Koopman reconstruction at the last snapshot, and how far it still moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lightning_koopman._checks import check_instance
from lightning_koopman._types import Array
from lightning_koopman.dmd.rrr import decompose
from lightning_koopman.dmd.spectrum import Mask, Spectrum
from lightning_koopman.trajectory.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class PersistentWeights:
    """The part of the weights that stays: what :func:`persistent_weights` returns.

    Attributes:
        values: Tensor (n,): the reconstruction at the last snapshot by the chosen modes.
        spectrum: The :class:`Spectrum` it comes from.
        modes: Boolean array (k,): the chosen modes.
    """

    values: Tensor
    spectrum: Spectrum
    modes: Mask

    @property
    def n_modes(self) -> int:
        """Number of chosen modes."""
        return int(self.modes.sum())


def persistent_weights(
    trajectory: Trajectory,
    *,
    last: int | None = None,
    radius: float = 0.05,
    rule: str = "cluster",
    tol: float = 1e-3,
) -> PersistentWeights:
    """Koopman reconstruction of the last snapshot by the modes that stay (paper, section 4).

    The paper prunes where this is small.  It includes the mode at eigenvalue 1 and the modes ranked above; the
    reconstruction at the first snapshot is of no use, since there the parts that later fade still cancel each other.

    Args:
        trajectory: At least two snapshots of the weights.
        last: Use only so many of the newest snapshots, ≥ 2 (default: all).
        radius: Radius of the cluster at 1, > 0.
        rule: ``"cluster"`` or ``"paper"``: see :meth:`Spectrum.persistent`.
        tol: Relative singular value below which directions count as zero, in [0, 1).

    Raises:
        ValueError: If there are too few snapshots, or an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_koopman import Trajectory, persistent_weights
        >>> trajectory = Trajectory(2)
        >>> for t in range(12):
        ...     trajectory.append(torch.tensor([1.0 + 0.5**t, 0.5**t]))  # the second weight fades
        >>> kept = persistent_weights(trajectory, last=8)
        >>> [round(value, 3) + 0.0 for value in kept.values.tolist()], kept.n_modes
        ([1.0, 0.0], 1)
    """
    check_instance("trajectory", trajectory, Trajectory, "a Trajectory")
    weights, chosen = persistent_combination(trajectory, last=last, radius=radius, rule=rule, tol=tol)
    return PersistentWeights(trajectory.combine(weights), chosen.spectrum, chosen.modes)


@dataclass(frozen=True, eq=False)
class PersistentModes:
    """The modes that stay: ``modes``, boolean array (k,), of a ``spectrum``."""

    spectrum: Spectrum
    modes: Mask


def persistent_combination(
    trajectory: Trajectory,
    *,
    last: int | None = None,
    radius: float = 0.05,
    rule: str = "cluster",
    tol: float = 1e-3,
) -> tuple[Array, PersistentModes]:
    """How the snapshots combine to what :func:`persistent_weights` gives, from its arguments.

    Returns:
        Array (time,) for :meth:`Trajectory.combine`, and the modes.
    """
    spectrum = trajectory.spectrum(last=last, tol=tol, refine=False)
    modes = spectrum.persistent(radius, rule=rule)
    weights = np.zeros(len(trajectory))
    weights[len(trajectory) - spectrum.n_snapshots :] = spectrum.combination(spectrum.n_snapshots - 1, modes=modes)[0]
    return weights, PersistentModes(spectrum, modes)


def relative_changes(factor: Array, horizon: int, *, tol: float = 1e-3) -> tuple[float, float]:
    """How far the weights will move within ``horizon`` snapshots by the spectrum, and how far they just moved.

    Args:
        factor: Array (r, m), m > ``horizon``: :meth:`Trajectory.factor` of the newest snapshots.
        horizon: Snapshots to look ahead and back, ≥ 1.
        tol: As for :func:`dmd_rrr`.

    Returns:
        Both changes, relative to the norm of the last snapshot.
    """
    count = factor.shape[1]
    spectrum = decompose(factor, tol=tol, refine=False)
    ahead = spectrum.combination(count - 1 + horizon, clip=True)[0]
    ahead[-1] -= 1.0
    size = max(float(np.linalg.norm(factor[:, -1])), np.finfo(np.float64).tiny)
    past = factor[:, -1] - factor[:, -1 - horizon]
    return float(np.linalg.norm(factor @ ahead)) / size, float(np.linalg.norm(past)) / size
