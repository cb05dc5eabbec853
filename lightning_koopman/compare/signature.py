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
from lightning_koopman.reading.steps import FREQUENCIES, step_statistics
from lightning_koopman.trajectory.recorder import WEIGHTS, Recorder
from lightning_koopman.trajectory.trajectory import Trajectory

FILE = "trajectory.npz"  # in a monitor's folder
LEAST = 6  # fewest snapshots for a spectrum worth comparing

Run = Trajectory | Spectrum | str | os.PathLike[str]


class Recorded(NamedTuple):
    """A factor (r, time) of a training's snapshots; their epochs or steps and the time between them, if known."""

    factor: Array
    rounds: Sequence[int] = ()
    every: str = ""


def signatures(runs: Sequence[Run], rank: int) -> tuple[list[Complex], list[Array]]:
    """Compute what trainings are compared by, each from the same number of snapshots.

    It is equally many eigenvalues (r,), at most ``rank``, and :func:`step_measure` unless spectra are given.
    """
    spectra = [run for run in runs if isinstance(run, Spectrum)]
    if spectra:
        if len(spectra) < len(runs):
            raise ValueError("runs must be all spectra or none: a spectrum cannot be cut. Pass trajectories instead.")
        if len(made := sorted({(each.n_snapshots, each.delays) for each in spectra})) > 1:
            raise ValueError(f"spectra must have equally many snapshots and delays, got {made}: pass trajectories.")
        most = min(rank, *(each.eigenvalues.size for each in spectra))
        whole = [k for k in range(1, most + 1) if all(abs(each.eigenvalues[:k].imag.sum()) < 1e-9 for each in spectra)]
        return [each.eigenvalues[: max(whole, default=most)] for each in spectra], []  # no conjugate pair is split
    factors = _aligned([_recorded(run) for run in runs])
    found = [decompose(factor, max_rank=rank, refine=False) for factor in factors]
    if len(ranks := {each.rank for each in found}) > 1:
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
    np.savez_compressed(partial, factor=trajectory.factor(), rounds=recorder.epochs, unit=unit, every=every)
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
        raise ValueError(f"runs: {str(path)!r} holds no finished run: there is no {FILE} in it or in its subfolder "
                         "koopman. KoopmanSpectrumMonitor writes that file at the end of a fit.")  # fmt: skip
    try:
        with open(file, "rb") as opened, np.load(opened) as stored:
            return Recorded(stored["factor"], stored["rounds"].tolist(), f"every {stored['every']} {stored['unit']}")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"runs: {str(file)!r} cannot be read: {error}.") from error


def _aligned(runs: Sequence[Recorded]) -> list[Array]:
    """Cut runs to the snapshots of their common epochs or steps, or else to equally many of the newest."""
    intervals = sorted({run.every for run in runs if run.every})
    if len(intervals) > 1:
        raise ValueError(f"runs must have snapshots at the same interval, got {' and '.join(intervals)}.")
    known = all(run.rounds for run in runs)
    times = [run.rounds if known else range(-run.factor.shape[1], 0) for run in runs]
    common = sorted(set.intersection(*(set(each) for each in times)))
    if len(set(np.diff(common))) > 1:
        raise ValueError("runs must have equally spaced snapshots in common: some runs miss snapshots in between.")
    if len(common) < LEAST:
        raise ValueError(f"runs must have {LEAST} or more snapshots in common, got {len(common)}: record more of them.")
    return [run.factor[:, np.searchsorted(each, common)] for run, each in zip(runs, times, strict=True)]


def step_measure(steps: Array) -> Array:
    """Compute the spectral measure of steps (r, t) as shares (g,), a Fejér sum of the mean cosines between them."""
    found = step_statistics(steps.T @ steps, newest=steps.shape[1])
    density = np.ones(FREQUENCIES.size) if found is None else found.density
    return np.asarray(density / density.sum())
