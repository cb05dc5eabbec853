"""Signature of a training: its eigenvalues and the spectral measure of its steps."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_koopman._types import Array
from lightning_koopman.dmd.rrr import decompose
from lightning_koopman.dmd.spectrum import Complex, Spectrum
from lightning_koopman.reading.steps import FREQUENCIES, step_density
from lightning_koopman.trajectory.recorder import WEIGHTS, Recorder
from lightning_koopman.trajectory.trajectory import Trajectory

FILE = "trajectory.npz"  # in a monitor's folder
LEAST = 6  # fewest snapshots for a spectrum worth comparing

Run = Trajectory | Spectrum | str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class Signature:
    """The quantities by which a training is compared.

    Attributes:
        eigenvalues: Complex array (r,), the most important first.
        measure: Array (g,): share of the steps' spectral measure at each frequency from 0 to half a cycle per interval,
            or None if only a spectrum is given.
    """

    eigenvalues: Complex
    measure: Array | None


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A factor (r, time) of a training's snapshots with, if known, their epochs or steps and the time between them."""

    factor: Array
    rounds: tuple[int, ...] | None = None
    every: tuple[int, str] | None = None


def signatures(runs: Sequence[Run], rank: int) -> list[Signature]:
    """Compute the signatures of trainings, each from the same number of snapshots and eigenvalues.

    Args:
        runs: The trainings.
        rank: Largest number of eigenvalues to compare.

    Raises:
        TypeError: If a run is of another type.
        ValueError: If they cannot be compared.
    """
    spectra = [run for run in runs if isinstance(run, Spectrum)]
    if spectra:
        return _of_spectra(spectra, len(runs), rank)
    factors = _aligned([_recorded(run) for run in runs])
    found = [decompose(each, max_rank=rank, refine=False) for each in factors]
    least = min(each.rank for each in found)
    return [
        Signature(
            (known if known.rank == least else decompose(factor, max_rank=least, refine=False)).eigenvalues,
            step_measure(np.diff(factor)),
        )
        for known, factor in zip(found, factors, strict=True)
    ]


def save_run(folder: Path | None, recorder: Recorder) -> None:
    """Save what :func:`signatures` needs of recorded weights in a folder."""
    trajectory, settings = recorder.trajectory, recorder.settings
    if folder is None or trajectory is None or settings.observable != WEIGHTS:
        return
    steps = settings.every_n_steps
    every, unit = (settings.every_n_epochs, "epochs") if steps is None else (steps, "steps")
    partial = folder / f".{FILE}"
    np.savez_compressed(partial, factor=trajectory.factor(), rounds=np.array(recorder.epochs), unit=unit, every=every)
    partial.replace(folder / FILE)


def _of_spectra(spectra: list[Spectrum], count: int, rank: int) -> list[Signature]:
    if len(spectra) < count:
        raise ValueError("runs must be all spectra or none: a spectrum cannot be cut. Pass trajectories instead.")
    made = sorted({(each.n_snapshots, each.delays) for each in spectra})
    if len(made) > 1:
        raise ValueError(f"spectra must have equally many snapshots and delays, got {made}: pass trajectories instead.")
    least = min(rank, *(each.eigenvalues.size for each in spectra))
    return [Signature(each.eigenvalues[:least], None) for each in spectra]


def _recorded(run: Any) -> _Recorded:
    """Read a trajectory, or the one in a monitor's folder."""
    if isinstance(run, Trajectory):
        return _Recorded(run.factor() if len(run) else np.zeros((0, 0)))
    if not isinstance(run, (str, os.PathLike)):
        raise TypeError(f"runs must be trajectories, spectra or folders of KoopmanSpectrumMonitor, got {run!r:.60}.")
    path = Path(run)
    file = next((each for each in (path / FILE, path / "koopman" / FILE) if each.is_file()), None)
    if file is None:
        raise ValueError(
            f"runs: {str(path)!r} holds no finished run: there is no {FILE} in it or in its subfolder koopman. "
            "KoopmanSpectrumMonitor writes that file at the end of a fit."
        )
    try:
        with open(file, "rb") as opened, np.load(opened) as stored:
            rounds = tuple(int(each) for each in stored["rounds"])
            return _Recorded(stored["factor"], rounds, (int(stored["every"]), str(stored["unit"])))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"runs: {str(file)!r} cannot be read: {error}.") from error


def _aligned(runs: Sequence[_Recorded]) -> list[Array]:
    """Cut runs to the snapshots of their common epochs or steps, or else to equally many of the newest."""
    distances = {each.every for each in runs if each.every is not None}
    if len(distances) > 1:
        told = " and ".join(f"every {count} {unit}" for count, unit in sorted(distances))
        raise ValueError(
            f"runs must have snapshots at the same interval, got {told}: their eigenvalues cannot be compared."
        )
    known = [each.rounds for each in runs if each.rounds is not None]
    if len(known) == len(runs):
        common = sorted(set(known[0]).intersection(*known[1:]))
        found = [each.factor[:, [(each.rounds or ()).index(when) for when in common]] for each in runs]
        if len(set(np.diff(common))) > 1:
            raise ValueError("runs must have equally spaced snapshots in common: some runs miss snapshots in between.")
    else:
        least = min(each.factor.shape[1] for each in runs)
        found = [each.factor[:, each.factor.shape[1] - least :] for each in runs]
    if found[0].shape[1] < LEAST:
        raise ValueError(
            f"runs must have at least {LEAST} snapshots in common, got {found[0].shape[1]}: record more, or use a "
            "larger window."
        )
    return found


def step_measure(steps: Array) -> Array:
    """Compute the spectral measure of steps (r, t) as shares (g,), a Fejér sum of the mean cosines between them."""
    lengths = np.linalg.norm(steps, axis=0)
    units = steps[:, lengths > 0] / lengths[lengths > 0]
    count = units.shape[1]
    if not count:
        return np.full(FREQUENCIES.size, 1.0 / FREQUENCIES.size)
    first, second = np.triu_indices(count, 1)
    sums = np.bincount(second - first, (units.T @ units)[first, second], minlength=count)[1:]
    density = step_density(sums, count)
    shares: Array = density / density.sum()
    return shares
