"""Watch the Koopman spectrum of a training."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_koopman._checks import check_count, check_positive
from lightning_koopman.callbacks.base import TrajectoryCallback, check_prefix_is_free
from lightning_koopman.callbacks.clock import steps_done
from lightning_koopman.callbacks.figures import deliver
from lightning_koopman.callbacks.outlook import tell_if_short
from lightning_koopman.callbacks.scalars import publish
from lightning_koopman.dmd.random_walk import random_walk_spectrum
from lightning_koopman.dmd.rrr import check_options
from lightning_koopman.dmd.spectrum import Spectrum
from lightning_koopman.dmd.summary import summarize
from lightning_koopman.plots import check_matplotlib, plot_history, plot_spectrum
from lightning_koopman.trajectory.recorder import WEIGHTS
from lightning_koopman.trajectory.sketch import SKETCH
from lightning_koopman.trajectory.trajectory import Trajectory

if TYPE_CHECKING:
    import pytorch_lightning as pl


# what is logged while nothing is known yet: finite for EarlyStopping, and no evidence of convergence
NO_EVIDENCE = {
    "unit_fraction": 0.0,
    "surrogate_unit_fraction": 0.0,
    "slowest_modulus": 1.0,
    "residual_at_one": 1.0,
    "misfit": 1.0,
    "rank": 0.0,
}
COLUMNS = ("epoch", "step", "n_snapshots", "train_loss", *NO_EVIDENCE, "sketch_error", "seconds")


class KoopmanSpectrumMonitor(TrajectoryCallback):
    r"""Log, epoch by epoch, the Koopman spectrum of the weights, of the loss or of a metric (paper, section 3).

    After each epoch the last ``window`` snapshots are decomposed by DMD_RRR, and six scalars are logged that stock
    callbacks can monitor in the same epoch:

    - ``koopman/unit_fraction``: share of the importance :math:`|b_j|` within ``radius`` of 1, in [0, 1];
    - ``koopman/surrogate_unit_fraction``: the same for a random walk with the same step lengths.  Where the two agree,
      the unit fraction says nothing about convergence;
    - ``koopman/slowest_modulus``: largest modulus of the trusted eigenvalues that can be told from 1 (1 if none can);
    - ``koopman/residual_at_one``: smallest :math:`\|Az - z\|` over unit z: how well a fixed direction fits the data;
    - ``koopman/misfit``: :math:`\|Y - AX\|_F/\|Y\|_F`: what the linear model misses from one snapshot to the next;
    - ``koopman/rank``: the numerical rank of the snapshots.

    Until the spectrum can be computed (3 snapshots of the weights, 6 values of a scalar) callbacks that monitor them
    find values that are no evidence of convergence (0, 0, 1, 1, 1, 0), and so with modulus and misfit while the rank is
    as large as the number of snapshots allows; loggers get what is known only.  Eigenvalues belong to one step between
    snapshots, ``every_n_epochs``.

    It works under DDP, FSDP and FSDP2: each process keeps its part of the snapshots, and a small sum a snapshot is all
    that they exchange.

    Everything written to disk lies in one folder: ``history.csv`` (one row an analysed epoch; empty cells where nothing
    is known), the snapshots that checkpoints refer to, and figures if no logger takes them.

    Args:
        observable: ``"weights"``; ``"train_loss"``, the epoch's mean of the loss that ``training_step`` returns; or the
            name of any logged metric.  Scalars are delay-embedded over half of the window.
        every_n_epochs: Epochs between two snapshots, ≥ 1.
        every_n_steps: Instead, optimizer steps between two snapshots, ≥ 1, for trainings of few, long epochs: so many
            steps then take the place of an epoch everywhere, the mean loss and the history's ``epoch`` included.
        window: Number of the newest snapshots to analyse, ≥ 3, or None for all since the start.  Memory is 4 bytes a
            weight and snapshot, divided by the number of processes.
        parameters: Shell-style patterns of the names of the parameters to observe, such as ``"encoder.*"`` or
            ``["*.weight", "!head.*"]`` (default: all that require a gradient when training starts).
        radius: Radius of the disc around 1 for the unit fraction, > 0.
        tol: Relative singular value below which directions count as zero, in [0, 1).
        max_residual: Largest residual of a trusted eigenvalue, > 0.
        storage: ``"ram"``; ``"disk"`` for a mapped file without a name in the folder below, of which the system keeps
            in memory what there is room for; or ``"sketch"`` to keep a few thousand random combinations of each
            snapshot, whatever its size, computed where the weights are: the history then has the standard error of the
            eigenvalues.
        dtype: ``"float32"``, or ``"bfloat16"`` to keep increments at half the size; that moves
            eigenvalues by about 1e-4.
        sketch: Numbers kept of a snapshot with ``storage="sketch"``, ≥ 2, best a prime; the error falls as 1/√sketch.
        log_figure: Draw the spectrum and the history when training ends; with a number k, also every k epochs.
            Figures go to the loggers that take them (TensorBoard, W&B, MLflow), else to PNG files.
        dirpath: Local folder below which a folder named like ``prefix`` is made for everything written to disk; where
            that exists and is not empty, ``prefix-v1`` and so on, so that no run overwrites another or the run it is
            resumed from (default: the run's log folder).
        prefix: First part of the logged names; give monitors on one Trainer different ones.

    Attributes:
        spectrum: :class:`Spectrum` of the last analysis, or None.
        surrogate: :class:`Spectrum` of the random walk beside it, or None.
        history: List of dicts, one an analysed epoch, with the columns of ``history.csv``.
        trajectory: :class:`Trajectory` of the recorded snapshots, or None; in a run of several processes, of this one's
            part of them, with the spectrum of the whole.

    Raises:
        ValueError: At construction or before training starts, for arguments out of range, patterns that match nothing,
            snapshots that cannot fit into memory, a folder that cannot be written, or two monitors with one prefix.
        ModuleNotFoundError: Before training starts, if figures are asked for and matplotlib is not installed.

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
        >>> "koopman/unit_fraction" in trainer.callback_metrics
        True
    """

    columns = COLUMNS
    storable = True
    advice = (
        "take a smaller window, observe fewer `parameters`, or set storage='disk'",
        "take a smaller window, observe fewer `parameters`, or pass another `dirpath`",
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
        super().__init__(
            observable=observable,
            parameters=parameters,
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            window=window,
            storage=storage,
            dtype=dtype,
            sketch=sketch,
            dirpath=dirpath,
            prefix=prefix,
        )
        check_options(tol=tol, max_rank=None, delays=1)
        self.radius, self.tol = check_positive("radius", radius), float(tol)
        self.max_residual = check_positive("max_residual", max_residual)
        flag = isinstance(log_figure, (bool, np.bool_))
        advice = "it is True, False or a number of epochs"
        self.log_figure = bool(log_figure) if flag else check_count("log_figure", log_figure, 0, advice)
        self.folder = self.prefix
        self.spectrum: Spectrum | None = None
        self.surrogate: Spectrum | None = None
        self.figure_paths: list[Path] = []

    @property
    def state_key(self) -> str:
        settings = self.settings
        return self._generate_state_key(
            observable=settings.observable,
            parameters=settings.parameters,
            every_n_epochs=settings.every_n_epochs,
            every_n_steps=settings.every_n_steps,
            window=settings.window,
            kept=f"sketch-{settings.sketch}" if settings.storage == "sketch" else settings.dtype,
            prefix=self.prefix,
        )

    @property
    def trajectory(self) -> Trajectory | None:
        return self.recorder.trajectory

    def summary(self) -> str:
        """What the last spectrum says, in plain words, several lines."""
        return summarize(
            self.spectrum,
            self.surrogate,
            observable=self.settings.observable,
            radius=self.radius,
            max_residual=self.max_residual,
            every=self.settings.every_n_steps or self.settings.every_n_epochs,
            unit="epochs" if self.settings.every_n_steps is None else "steps",
        )

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_prefix_is_free(self, trainer)
            if self.log_figure:
                check_matplotlib()
        super().setup(trainer, pl_module, stage)

    def forget(self) -> None:
        super().forget()
        self.spectrum, self.surrogate, self.figure_paths = None, None, []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self.active:  # stock callbacks look for the scalars all the same
            publish(trainer, self.prefix, NO_EVIDENCE)

    def fit_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known = self.history[-1] if self.history and not self.anew else None  # which the first process alone keeps
        logged = self.on_zero(trainer, "reading the history", lambda: known and self._logged(known))
        publish(trainer, self.prefix, {**NO_EVIDENCE, **(logged or {})})
        tell_if_short(self, trainer, 2 if self.settings.observable == WEIGHTS else 6, "the first spectrum")

    def snapshot_taken(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        logged = self.on_zero(trainer, "analysing the spectrum", lambda: self._analyse(trainer, epoch))
        known = logged or {}
        publish(trainer, self.prefix, {name: value for name, value in NO_EVIDENCE.items() if name not in known})
        self.log_values(trainer, pl_module, known)
        if self.log_figure is not True and self.log_figure and epoch % self.log_figure == 0:
            self._draw(trainer)

    def fit_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.log_figure:
            self._draw(trainer)

    # -- what ---------------------------------------------------------------------------------------------------------

    def _analyse(self, trainer: pl.Trainer, epoch: int) -> dict[str, float] | None:
        """Spectrum and surrogate of the window, a row of the history, and the scalars to log."""
        started = time.perf_counter()
        trajectory, loss = self.recorder.trajectory, self.recording.train_loss
        delays = self._delays(len(self.recorder))
        scalars: dict[str, float] = dict.fromkeys(NO_EVIDENCE, math.nan)
        still = trajectory is not None and delays is not None and not trajectory.step_norms().any()
        if still:
            self.guard.warn(
                "constant",
                f"the observable {self.settings.observable!r} has not changed over the last {len(self.recorder)} "
                "snapshots: its only eigenvalue is 1. Are these weights in the optimizer, at a learning rate > 0?",
            )
        recorded = self.recorder.newest == epoch
        error = math.nan
        if recorded and trajectory is not None and delays is not None and not (still and trajectory.start_norm() == 0):
            self.spectrum = trajectory.spectrum(tol=self.tol, delays=delays)
            self.surrogate = self._walk(trajectory, self.spectrum)
            scalars = self._scalars(self.spectrum, self.surrogate)
            error = self.spectrum.sketch_error()
        self.history.append(
            {
                "epoch": epoch,
                "step": steps_done(trainer),
                "n_snapshots": len(self.recorder),
                "train_loss": math.nan if loss is None else loss,
                **scalars,
                "sketch_error": error,
                "seconds": self.recording.seconds + time.perf_counter() - started,
            }
        )
        self.write_history()
        return self._logged(scalars)

    def _logged(self, row: dict[str, Any]) -> dict[str, float]:
        """The scalars of a row that are known."""
        return {name: row[name] for name in NO_EVIDENCE if not math.isnan(row[name])}

    def _walk(self, trajectory: Trajectory, spectrum: Spectrum, *, refine: bool = False) -> Spectrum:
        """The random walk's spectrum, under the same settings as the training's."""
        return random_walk_spectrum(
            trajectory.step_norms(),
            trajectory.start_norm(),
            trajectory.total,
            tol=self.tol,
            delays=spectrum.delays,
            refine=refine,
        )

    def _delays(self, count: int) -> int | None:
        """Snapshots in an embedded one, or None while there are too few to say anything."""
        if self.settings.observable == WEIGHTS:
            return 1 if count >= 3 else None
        return count // 2 + 1 if count >= 6 else None

    def _scalars(self, spectrum: Spectrum, surrogate: Spectrum) -> dict[str, float]:
        unknown = spectrum.full_rank  # any data are fitted then, so neither residuals nor misfit mean a thing
        return {
            "unit_fraction": spectrum.unit_fraction(self.radius),
            "surrogate_unit_fraction": surrogate.unit_fraction(self.radius),
            "slowest_modulus": math.nan if unknown else spectrum.slowest_modulus(self.max_residual),
            "residual_at_one": spectrum.residual_at(1.0),
            "misfit": math.nan if unknown else spectrum.misfit,
            "rank": float(spectrum.rank),
        }

    def _draw(self, trainer: pl.Trainer) -> None:
        if self.spectrum is None or self.trajectory is None or not self.guard.zero:
            return
        with self.guard("drawing figures"):
            walk = self._walk(self.trajectory, self.spectrum, refine=True)
            title = self.settings.observable
            figures = {
                "spectrum": plot_spectrum(self.spectrum, walk, radius=self.radius, title=title),
                "history": plot_history(self.history),
            }
            for name, figure in figures.items():
                where = (trainer.loggers, trainer.global_step, self.run_folder.path)
                path, failures = deliver(figure, f"{self.prefix}/{name}", *where)
                if path is not None and path not in self.figure_paths:
                    self.figure_paths.append(path)
                for failure in failures:
                    self.guard.warn("logger", failure)
