"""The persistent part of a trajectory: its Koopman reconstruction at the last snapshot by the modes at 1."""

from __future__ import annotations

from lightning_koopman._types import Array
from lightning_koopman.averaging.profiles import place
from lightning_koopman.dmd.spectrum import Mask, Spectrum
from lightning_koopman.trajectory.trajectory import Trajectory


def persistent(
    trajectory: Trajectory, *, length: int | None = None, radius: float = 0.05, rule: str = "cluster", tol: float = 1e-3
) -> tuple[Array, Spectrum, Mask]:
    """Compute the combination of snapshots that gives the persistent part (paper, section 4).

    The paper prunes weights where this part is small.  It includes the mode at eigenvalue 1 and the modes ranked above
    it.  It is reconstructed at the last snapshot: at the first, the parts that fade later still cancel each other.

    Args:
        trajectory: At least two snapshots of the weights.
        length: Number of newest snapshots to use, ≥ 2 (default: all).
        radius: Radius of the cluster at 1, > 0.
        rule: ``"cluster"`` or ``"paper"``: see :meth:`Spectrum.persistent`.
        tol: Relative singular value below which directions count as zero, in [0, 1).

    Returns:
        Array (time,) for :meth:`Trajectory.combine`, the spectrum, and boolean array (k,): the persistent modes.

    Raises:
        ValueError: If there are too few snapshots, or an argument is out of range.
    """
    spectrum = trajectory.spectrum(last=length, tol=tol, refine=False)
    modes = spectrum.persistent(radius, rule=rule)
    parts = spectrum.combination(spectrum.n_snapshots - 1, modes=modes)[0]
    return place(parts, len(trajectory)), spectrum, modes
