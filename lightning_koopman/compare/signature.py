"""What trainings are compared by: their eigenvalues and the spectral measures of their steps."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Recorded(NamedTuple):
    """A factor (r, time) of a training's snapshots, and if known their epochs or steps and the time between them."""

    factor: Array
    rounds: tuple[int, ...] = ()
    every: tuple[int, str] | None = None


def signatures(runs: Sequence[Run], rank: int) -> tuple[list[Complex], list[Array]]:
    """Compute what trainings are compared by, each from the same number of snapshots.

    Args:
        runs: The trainings.
        rank: Largest number of eigenvalues.

    Returns:
        For each training, equally many eigenvalues (r,), the most important first; and the shares (g,) of the spectral
        measure of its steps at each frequency from 0 to half a cycle per interval, or none if spectra are given.

    Raises:
        TypeError: If a run is of another type.
        ValueError: If they cannot be compared.
    """
    spectra = [run for run in runs if isinstance(run, Spectrum)]
    if spectra:
        made = sorted({(each.n_snapshots, each.delays) for each in spectra})
        if len(spectra) < len(runs):
            raise ValueError("runs must be all spectra or none: a spectrum cannot be cut. Pass trajectories instead.")
        if len(made) > 1:
            raise ValueError(f"spectra must have equally many snapshots and delays, got {made}: pass trajectories.")
        least = min(rank, *(each.eigenvalues.size for each in spectra))
        return [each.eigenvalues[:least] for each in spectra], []
    factors = _aligned([_recorded(run) for run in runs])
    found = [decompose(factor, max_rank=rank, refine=False) for factor in factors]
    ranks = {each.rank for each in found}
    if len(ranks) > 1:
        found = [decompose(factor, max_rank=min(ranks), refine=False) for factor in factors]
    return [each.eigenvalues for each in found], [step_measure(np.diff(factor)) for factor in factors]


def save_run(folder: Path | None, recorder: Recorder) -> None:
    """Save what :func:`signatures` needs of recorded weights in a folder."""
    trajectory, settings = recorder.trajectory, recorder.settings
    if folder is None or not trajectory or settings.observable != WEIGHTS:
        return
    steps = settings.every_n_steps
    every, unit = (settings.every_n_epochs, "epochs") if steps is None else (steps, "steps")
    partial = folder / f".{FILE}"
    np.savez_compressed(partial, factor=trajectory.factor(), rounds=np.array(recorder.epochs), unit=unit, every=every)
    partial.replace(folder / FILE)


def _recorded(run: Any) -> Recorded:
    """Read a trajectory, or the one in a monitor's folder."""
    if isinstance(run, Trajectory):
        return Recorded(run.factor() if len(run) else np.zeros((0, 0)))
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
            return Recorded(stored["factor"], rounds, (int(stored["every"]), str(stored["unit"])))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"runs: {str(file)!r} cannot be read: {error}.") from error


def _aligned(runs: Sequence[Recorded]) -> list[Array]:
    """Cut runs to the snapshots of their common epochs or steps, or else to equally many of the newest."""
    intervals = sorted({run.every for run in runs if run.every is not None})
    if len(intervals) > 1:
        told = " and ".join(f"every {count} {unit}" for count, unit in intervals)
        raise ValueError(f"runs must have snapshots at the same interval, got {told}: they cannot be compared.")
    common = sorted(set.intersection(*(set(run.rounds) for run in runs)))
    if all(run.rounds for run in runs):
        found = [run.factor[:, np.searchsorted(run.rounds, common)] for run in runs]
    else:
        least = min(run.factor.shape[1] for run in runs)
        found = [run.factor[:, run.factor.shape[1] - least :] for run in runs]
    if len(set(np.diff(common))) > 1:
        raise ValueError("runs must have equally spaced snapshots in common: some runs miss snapshots in between.")
    if found[0].shape[1] < LEAST:
        raise ValueError(f"runs must have at least {LEAST} snapshots in common, got {found[0].shape[1]}: record more, "
                         "or use a larger window.")  # fmt: skip
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
