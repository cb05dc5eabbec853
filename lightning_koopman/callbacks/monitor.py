"""Monitor the Koopman spectrum during training."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from lightning_koopman._checks import check_count, check_positive
from lightning_koopman.callbacks.base import TrajectoryCallback
from lightning_koopman.callbacks.baseline_loss import known_baseline
from lightning_koopman.callbacks.clock import steps_done, tell_if_short
from lightning_koopman.callbacks.figures import deliver
from lightning_koopman.callbacks.progress import hide, show
from lightning_koopman.callbacks.scalars import publish
from lightning_koopman.compare.signature import save_run
from lightning_koopman.dmd.random_walk import random_walk_spectrum
from lightning_koopman.dmd.rrr import check_options
from lightning_koopman.dmd.spectrum import Spectrum
from lightning_koopman.dmd.summary import summarize
from lightning_koopman.plots.spectrum import plot_spectrum
from lightning_koopman.plots.style import check_matplotlib
from lightning_koopman.plots.training import plot_history, plot_portrait
from lightning_koopman.reading.phase import Phase
from lightning_koopman.reading.reading import TrainingReading
from lightning_koopman.reading.steps import LEAST
from lightning_koopman.reading.words import describe
from lightning_koopman.stopping.evidence import Baseline, unit_fraction
from lightning_koopman.trajectory.recorder import WEIGHTS, SnapshotSettings
from lightning_koopman.trajectory.sketch import SKETCH
from lightning_koopman.trajectory.trajectory import Trajectory

# placeholders until values are known: finite, those of a random walk, and no sign of convergence
WINDOW = 11  # snapshots for the unit fraction, as in early stopping
UNKNOWN = {
    "phase": float(Phase.UNKNOWN.code),
    "step_correlation": 0.0,
    "spectral_weight": 1.0,
    "slowing": 0.0,
    "remaining": 1.0,
    "half_life": 1e6,
    "loss_change": -1.0,
    "loss_noise": 1.0,
}
COLUMNS = (
    "epoch", "step", "n_snapshots", "train_loss", "learning_rate", "phase", "step_correlation",
    "step_correlation_error", "spectral_weight", "spectral_weight_error", "step_length", "slowing", "rate", "half_life",
    "remaining", "loss_change", "loss_noise", "unit_fraction", "seconds",
)  # fmt: skip


class KoopmanSpectrumMonitor(TrajectoryCallback):
    r"""Report the phase of a training after each epoch, with a few numbers, and record its Koopman spectrum.

    The reading (:class:`TrainingReading`) is computed from the inner products of the weights' steps and from the
    training loss.  It uses the Koopman spectral measure of the steps (paper, equation 3) instead of single eigenvalues,
    which are ill-conditioned.  The progress bar shows the phase.  Eight scalars are logged, which stock callbacks can
    monitor in the same epoch:

    - ``koopman/phase``: index of the phase in :class:`Phase`, from 0 (warming up) to 8 (unknown);
    - ``koopman/step_correlation``: mean cosine between successive steps, in [−1, 1]: positive if the weights keep their
      direction, negative if they turn back, 0 for a random walk;
    - ``koopman/spectral_weight``: spectral density of the steps at eigenvalue 1, ≥ 0; 1 for a random walk;
    - ``koopman/slowing``: loss of speed relative to the fastest so far, in [0, 1]; it grows to 1 as a training
      converges and stays near 0 for a random walk;
    - ``koopman/remaining``: distance the weights still have to go, relative to the distance they have come;
    - ``koopman/half_life``: half-life of the directed part of the steps, in snapshots;
    - ``koopman/loss_change``: predicted change of the training loss over the next 10 snapshots;
    - ``koopman/loss_noise``: standard deviation of its fluctuation between snapshots.

    Unknown values are not logged.  Until they are known, monitoring callbacks read 8, 0, 1, 0, 1, 1e6, −1 and 1.

    An observed loss or metric has no phase: its predicted change and noise are logged, and its spectrum is plotted.

    The eigenvalues of the paper (section 3) are computed on request: by ``spectrum``, ``surrogate`` and the figures.
    ``unit_fraction`` in the history is the share of their importance near 1 over the last eleven snapshots, as in
    :class:`EarlyStopOnUnitEigenvalues`.  Alone it means little: it is also high for a random walk.

    It works under DDP, FSDP and FSDP2: each process keeps its part of the snapshots, and the processes exchange only a
    small sum per snapshot.

    All files are written to one folder: ``history.csv`` (one row per analyzed epoch, empty cells for unknown values),
    ``trajectory.npz`` for :func:`compare_trainings`, the snapshots that checkpoints refer to, and the figures if no
    logger takes them.

    Args:
        observable: ``"weights"``; ``"train_loss"``, the epoch's mean of the loss that ``training_step`` returns; or the
            name of any logged metric.  Scalars are delay-embedded over half of the window.
        every_n_epochs: Epochs between two snapshots, ≥ 1.
        every_n_steps: Optimizer steps between two snapshots, ≥ 1, instead of epochs, for trainings of few, long epochs.
            Such an interval then replaces the epoch everywhere, also in the mean loss and the history's ``epoch``.
        window: Number of newest snapshots to analyze, ≥ 3, or None for all since the start.  They take 4 bytes per
            weight and snapshot, divided by the number of processes.  A reading uses the newest 25.
        parameters: Shell-style patterns for the names of the parameters to observe, such as ``"encoder.*"`` or
            ``["*.weight", "!head.*"]`` (default: all that require a gradient when training starts).
        radius: Radius of the disc around 1 for the unit fraction, > 0.
        tol: Relative singular value below which directions count as zero, in [0, 1).
        max_residual: Largest residual of a trusted eigenvalue, > 0.
        storage: ``"ram"``; ``"disk"`` for an unnamed memory-mapped file in the folder under ``dirpath``, which the
            system caches as far as memory allows; or ``"sketch"`` to keep a few thousand random combinations of each
            snapshot, whatever its size, computed where the weights are.
        dtype: ``"float32"``, or ``"bfloat16"`` to halve the size of increments, which moves eigenvalues by about 1e-4.
        sketch: Elements kept per snapshot with ``storage="sketch"``, ≥ 2, best a prime; the error falls as 1/√sketch.
        log_figure: Plot the history, the phase portrait and the spectrum when training ends; an integer k also plots
            every k epochs.  Figures go to the loggers that take them (TensorBoard, W&B, MLflow), else to PNG files.
        dirpath: Local folder in which a folder named after ``prefix`` is created for all files (default: the run's log
            folder).  If that folder already holds files, ``prefix-v1`` and so on is used, so no run overwrites another
            one or the run it is resumed from.
        prefix: First part of the logged names; must differ between the monitors of one Trainer.

    Attributes:
        reading: The newest :class:`TrainingReading`, or None.
        spectrum: :class:`Spectrum` of the recorded snapshots, computed on access, or None if there are too few.
        surrogate: :class:`Spectrum` of a random walk with the same step lengths, or None.
        history: List of dicts, one per analyzed epoch, with the columns of ``history.csv``.
        trajectory: :class:`Trajectory` of the recorded snapshots, or None.  With several processes it holds this
            process's part of them, but gives the spectrum of the whole.

    Raises:
        ValueError: At construction or before training starts, for arguments out of range, patterns that match nothing,
            snapshots that do not fit into memory, a folder that cannot be written, or two monitors with one prefix.
        ModuleNotFoundError: Before training starts, if figures are requested and matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> import pytorch_lightning as pl
        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> from lightning_koopman import KoopmanSpectrumMonitor
        >>> monitor = KoopmanSpectrumMonitor(window=20)
        >>> trainer = pl.Trainer(
        ...     max_epochs=4, callbacks=monitor, accelerator="cpu", logger=False, default_root_dir=tempfile.mkdtemp(),
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> [row["epoch"] for row in monitor.history]
        [1, 2, 3, 4]
        >>> monitor.history[-1]["phase"]
        'warming up'
    """

    columns = COLUMNS
    chosen = True
    advice = (
        "reduce `window`, observe fewer `parameters`, or set storage='disk'",
        "reduce `window`, observe fewer `parameters`, or pass another `dirpath`",
    )

    def __init__(
        self,
        observable: str = WEIGHTS,
        *,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        window: int | None = 100,
        parameters: str | Sequence[str] | None = None,
        radius: float = 0.05,
        tol: float = 1e-3,
        max_residual: float = 3e-2,
        storage: str = "ram",
        dtype: str = "float32",
        sketch: int = SKETCH,
        log_figure: bool | int = False,
        dirpath: str | os.PathLike[str] | None = None,
        prefix: str = "koopman",
    ) -> None:
        settings = SnapshotSettings(
            observable=observable,
            parameters=parameters,
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            window=window,
            storage=storage,
            dtype=dtype,
            sketch=sketch,
        )
        super().__init__(settings, dirpath=dirpath, prefix=prefix)
        check_options(tol=tol, max_rank=None, delays=1)
        self.radius, self.tol = check_positive("radius", radius), float(tol)
        self.max_residual = check_positive("max_residual", max_residual)
        flag = isinstance(log_figure, (bool, np.bool_))
        advice = "pass True, False or a number of epochs"
        self.log_figure = bool(log_figure) if flag else check_count("log_figure", log_figure, 0, advice)
        self.folder = self.prefix
        self.reading: TrainingReading | None = None
        self.figure_paths: list[Path] = []

    @property
    def state_key(self) -> str:
        settings = self.settings
        return self._generate_state_key(
            observable=settings.observable,
            parameters=settings.parameters,
            **settings.interval,
            window=settings.window,
            kept=f"sketch-{settings.sketch}" if settings.storage == "sketch" else settings.dtype,
            prefix=self.prefix,
        )

    @property
    def trajectory(self) -> Trajectory | None:
        return self.recorder.trajectory

    @property
    def spectrum(self) -> Spectrum | None:
        delays = self._delays()
        return (
            None if delays is None or self.trajectory is None else self.trajectory.spectrum(tol=self.tol, delays=delays)
        )

    @property
    def surrogate(self) -> Spectrum | None:
        return self._walk()

    def summary(self) -> str:
        """Return what the training is doing, what to do about it, and what the spectrum shows, in words."""
        settings, observable = self.settings, self.settings.observable
        unit = "epochs" if settings.every_n_steps is None else "steps"
        told: dict[str, Any] = {"every": settings.every_n_steps or settings.every_n_epochs, "unit": unit}
        given: dict[str, Any] = {"observable": observable, "radius": self.radius, "max_residual": self.max_residual}
        said = summarize(self.spectrum, self.surrogate, **given, **told)
        return f"{describe(self.reading, observable='Loss' if observable == WEIGHTS else observable, **told)}\n{said}"

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.log_figure:
            check_matplotlib()
        super().setup(trainer, pl_module, stage)

    def forget(self) -> None:
        super().forget()
        self.reading, self.figure_paths = None, []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self.active:  # stock callbacks monitor the scalars here too
            publish(trainer, self.prefix, UNKNOWN)

    def fit_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known = self.history[-1] if self.history and not self.fresh else None  # kept by the first process only
        logged = self.on_zero(trainer, "reading the history", lambda: known and self._logged(known))
        publish(trainer, self.prefix, {**UNKNOWN, **(logged or {})})
        tell_if_short(self, trainer, LEAST, "the first reading")
        with self.guard("showing the phase"):
            show(trainer, self)

    def snapshot_taken(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        baseline = known_baseline(trainer)
        found = self.on_zero(trainer, "reading the training", lambda: self._read(trainer, epoch, recorded, baseline))
        self.reading, known = found or (self.reading, {})
        publish(trainer, self.prefix, {name: value for name, value in UNKNOWN.items() if name not in known})
        self.log_values(trainer, pl_module, known)
        if self.log_figure is not True and self.log_figure and epoch % self.log_figure == 0:
            self._draw(trainer)

    def fit_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep(trainer)
        if self.log_figure:
            self._draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._keep(trainer)

    # -- what ---------------------------------------------------------------------------------------------------------

    def _read(
        self, trainer: pl.Trainer, epoch: int, recorded: bool, baseline: Baseline | None
    ) -> tuple[TrainingReading, dict[str, float]]:
        """Return the reading and the scalars to log, and append a row to the history."""
        started = time.perf_counter()
        trajectory, loss = self.recorder.trajectory, self.recording.train_loss
        reading = self.recording.read(epoch, baseline)
        held = recorded and trajectory is not None
        lengths = trajectory.step_norms() if held and trajectory is not None else np.zeros(0)
        if lengths.size > 1 and not lengths.any():
            observable, count = self.settings.observable, len(self.recorder)
            message = f"observable={observable!r} has not changed over the last {count} snapshots"
            if self.recording.of_weights:
                message += ": check that an optimizer updates the weights at a rate > 0"
            self.guard.warn("constant", f"{message}.")
        self.history.append(
            {
                **{name: getattr(reading, name, math.nan) for name in COLUMNS},
                "epoch": epoch,
                "step": steps_done(trainer),
                "n_snapshots": len(self.recorder),
                "train_loss": math.nan if loss is None else loss,
                "learning_rate": max(self.rates, default=math.nan),
                "phase": reading.phase.value,
                "step_length": float(lengths[-1]) if lengths.size else math.nan,
                "unit_fraction": self._unit_fraction(trajectory) if lengths.size > 1 else math.nan,
                "seconds": self.recording.seconds + time.perf_counter() - started,
            }
        )
        self.write_history()
        return reading, self._logged(self.history[-1])

    def _keep(self, trainer: pl.Trainer) -> None:
        """Save the run for :func:`compare_trainings`."""
        hide(trainer, self)
        with self.guard("writing the history"):
            save_run(self.run_folder.path if self.guard.zero else None, self.recorder)

    def _logged(self, row: dict[str, Any]) -> dict[str, float]:
        """Return the known scalars of a row."""
        values = {**row, "phase": float(Phase(row["phase"]).code)}
        return {name: values[name] for name in UNKNOWN if math.isfinite(values[name])}

    def _unit_fraction(self, trajectory: Trajectory | None) -> float:
        """Return the share of the importance near 1 over the newest ``WINDOW`` snapshots."""
        factor = None if trajectory is None else trajectory.factor(last=WINDOW)
        if factor is None or not factor[:, :-1].any():
            return math.nan
        return unit_fraction(factor, self.radius)

    def _walk(self, *, refine: bool = False) -> Spectrum | None:
        """Return the spectrum of a random walk with the step lengths of the snapshots and the same settings."""
        trajectory, delays = self.recorder.trajectory, self._delays()
        if trajectory is None or delays is None:
            return None
        given = trajectory.step_norms(), trajectory.start_norm() or 1.0, trajectory.total
        return random_walk_spectrum(*given, tol=self.tol, delays=delays, refine=refine)

    def _delays(self) -> int | None:
        """Return the number of snapshots per embedded one, or None if there are too few or all are zero."""
        trajectory, count = self.recorder.trajectory, len(self.recorder)
        if trajectory is None or not count or not (trajectory.start_norm() or trajectory.step_norms().any()):
            return None
        if self.settings.observable == WEIGHTS:
            return 1 if count >= 3 else None
        return count // 2 + 1 if count >= 6 else None

    def _draw(self, trainer: pl.Trainer) -> None:
        if not self.guard.zero or not self.history:
            return
        with self.guard("drawing figures"):
            figures = {}
            if self.settings.observable == WEIGHTS:
                figures = {"history": plot_history(self.history), "portrait": plot_portrait(self.history)}
            if (spectrum := self.spectrum) is not None:
                walk, title = self._walk(refine=True), self.settings.observable
                figures["spectrum"] = plot_spectrum(spectrum, walk, self.reading, radius=self.radius, title=title)
            for name, figure in figures.items():
                where = (trainer.loggers, trainer.global_step, self.run_folder.path)
                path, failures = deliver(figure, f"{self.prefix}/{name}", *where)
                if path is not None and path not in self.figure_paths:
                    self.figure_paths.append(path)
                for failure in failures:
                    self.guard.warn("logger", failure)
