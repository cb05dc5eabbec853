"""Stop training when it has converged."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_koopman._checks import check_choice, check_count, check_positive, check_share
from lightning_koopman.callbacks.averages import OURS, averaging_callbacks
from lightning_koopman.callbacks.base import TrajectoryCallback, koopman_callbacks
from lightning_koopman.callbacks.baseline_loss import BaselineLoss, share_baseline
from lightning_koopman.callbacks.clock import steps_done, tell_if_short
from lightning_koopman.callbacks.kept import kept, set_back
from lightning_koopman.callbacks.lr_schedule import planned_rates
from lightning_koopman.callbacks.observables import TRAIN_LOSS, Metric
from lightning_koopman.callbacks.scalars import publish
from lightning_koopman.callbacks.weight_average import WeightAverage
from lightning_koopman.reading.phase import Phase
from lightning_koopman.stopping.evidence import Baseline
from lightning_koopman.stopping.judge import StopJudge
from lightning_koopman.stopping.rule import LEAST_HORIZON, ConvergenceRule, StoppingReason
from lightning_koopman.stopping.words import collapse, why_converged, why_not
from lightning_koopman.trajectory.recorder import WEIGHTS, SnapshotSettings

WALKS = "at the lowered learning rate the weights keep no lasting direction, and the loss no longer falls clearly."
# logged names, and their values for monitoring callbacks while unknown: finite, and no evidence of convergence
LOGGED = {"predicted_change": -1.0, "actual_change": -1.0, "predicted_then": -1.0, "unit_fraction": 0.0}
KEPT = "would_stop_epoch", "message"
COLUMNS = ("epoch", "step", "value", "phase", *LOGGED, "bound", "swing", "scale", "learning_rate", "hold")


class EarlyStopOnUnitEigenvalues(TrajectoryCallback):
    r"""Stop when the weights' eigenvalues cluster at 1 and the loss is predicted not to change (paper, section 3).

    The paper proposes to stop training when Koopman eigenvalues cluster around 1. That alone does not show convergence:
    it is also true of a random walk and of a frozen bad start. So two criteria must be met for ``patience`` successive
    epochs:

    - the weights: at least ``fraction`` of the importance of the last ``horizon`` + 1 snapshots lies within ``radius``
      of 1;
    - the loss: delay-embedded DMD of its last ``horizon`` + 2 values predicts that its level will change by at most
      ``tolerance`` times the baseline loss within ``horizon`` epochs.

    A stop is blocked while the loss is no better than the baseline; the weights' steps cannot be told from a random
    walk; the steps have a direction that does not fade (a saddle); or the learning rate is scheduled to change by more
    than it already has without effect (warm-up, next cycle, next decay).

    The baseline loss is measured: it is the loss of ``training_step`` on the first batches for a copy of the module
    that can only output a constant (ln C for C equally frequent classes, the targets' variance for a squared error).
    Validation data are not used. So a network that overfits is stopped if its training loss no longer changes, but not
    if its training loss still falls.

    Weights that hover at the noise floor of their learning rate (see :class:`TrainingReading`) have converged as far as
    this rate allows, however much the loss fluctuates. After five such epochs in a row training ends too, unless a
    schedule or :class:`ReduceLROnNoiseFloor` will still lower the rate. The module is then left with the average of the
    weights (see :class:`KoopmanWeightAveraging`), which removes the noise.

    Each epoch is a row of ``history.csv``; its column ``hold`` says what blocks a stop. These values are logged once
    they are known: ``koopman/predicted_change`` (of the loss, over the next ``horizon`` epochs),
    ``koopman/actual_change`` (over the last ``horizon`` epochs), ``koopman/predicted_then`` (what had been predicted
    for these) and ``koopman/unit_fraction``. Until then callbacks that monitor them see −1, −1, −1 and 0.

    Args:
        observable: The loss to observe: ``"train_loss"``, the epoch's mean of the loss that ``training_step`` returns,
            or the name of a logged metric (then an epoch is a logged value).
        radius: Radius of the disk around 1, > 0.
        fraction: Minimum share of the weights' importance in the disk, in (0, 1].
        horizon: Epochs to look ahead and back, ≥ 6. The earliest decision is at epoch ``horizon`` + 1 + ``patience``.
        tolerance: Largest predicted change that counts as none, relative to the baseline loss, > 0. If the baseline is
            unknown (a metric, manual optimization), it is relative to the range of the values so far.
        patience: Successive epochs in which both criteria must be met, ≥ 1.
        min_epochs: Minimum number of epochs to train, ≥ 0. The Trainer's ``min_epochs`` applies as well.
        every_n_steps: Optimizer steps that replace an epoch everywhere above, ≥ 1, for training with few, long epochs.
            Under manual optimization, batches.
        mode: ``"stop"``, or ``"report"`` to continue training and only report when it would have stopped.
        restore: ``"average"`` leaves an average of the newest weights in the module after a stop. It averages as many
            of the last ``horizon`` + 1 snapshots as their loss on a few training batches allows, and re-estimates
            batch normalization statistics. ``"last"`` leaves the last weights; then hovering is no reason to stop.
        parameters: Shell-style patterns of the names of the weights to observe (default: all that require a gradient).
        baseline_loss: The baseline loss, > 0 (default: measured).
        chance_loss: Former name of ``baseline_loss``.
        dirpath: Local folder in which ``koopman_stop`` is created for the history and the snapshots that checkpoints
            refer to (default: the run's log folder).
        prefix: First part of the logged names and of the folder's name. Each such callback of a Trainer needs its own.

    Attributes:
        stopping_reason: Why it stopped, a :class:`StoppingReason`.
        message: Why it stopped, or what blocked a stop, in plain words.
        stopped_epoch: Number of completed epochs at the stop, or None.
        would_stop_epoch: Number of completed epochs when a stop was first due, or None. In mode ``"report"`` training
            continues.
        history: List of dicts, one per epoch, with the columns of ``history.csv``.
        chance: The baseline loss with its standard error, or None.

    Raises:
        ValueError: If an argument is out of range, at construction or before training starts.

    Example:
        >>> import tempfile
        >>> import pytorch_lightning as pl
        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> from lightning_koopman import EarlyStopOnUnitEigenvalues
        >>> stop = EarlyStopOnUnitEigenvalues(mode="report", baseline_loss=1.0)
        >>> trainer = pl.Trainer(
        ...     max_epochs=3, callbacks=stop, accelerator="cpu", logger=False, default_root_dir=tempfile.mkdtemp(),
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> stop.history[-1]["epoch"], stop.history[-1]["hold"]
        (3, 'too few epochs to tell')
    """

    columns = COLUMNS

    def __init__(
        self,
        observable: str = TRAIN_LOSS,
        *,
        radius: float = 0.05,
        fraction: float = 0.8,
        horizon: int = 10,
        tolerance: float = 1.5e-3,
        patience: int = 2,
        min_epochs: int = 0,
        every_n_steps: int | None = None,
        mode: str = "stop",
        restore: str = "average",
        parameters: str | Sequence[str] | None = None,
        baseline_loss: float | None = None,
        chance_loss: float | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        prefix: str = "koopman",
    ) -> None:
        if not isinstance(observable, str) or observable in ("", WEIGHTS):
            raise ValueError(
                f"observable must be 'train_loss' or the name of a logged metric, got {observable!r}: the weights are "
                "always observed."
            )
        horizon = check_count("horizon", horizon, LEAST_HORIZON)
        settings = SnapshotSettings(parameters=parameters, every_n_steps=every_n_steps, window=horizon + 1)
        super().__init__(settings, dirpath=dirpath, prefix=prefix)
        self.rule = ConvergenceRule(
            check_positive("radius", radius),
            check_share("fraction", fraction, "it is a share of the weights' importance", closed=True),
            horizon,
            check_positive("tolerance", tolerance),
        )
        self.patience = check_count("patience", patience, 1)
        self.restore = check_choice("restore", restore, ("average", "last"))
        self.average = WeightAverage(self.recording, self.guard)
        self.min_epochs = check_count("min_epochs", min_epochs, 0)
        self.mode = check_choice("mode", mode, ("stop", "report"))
        self._averages = False  # whether this callback leaves an average in the module
        self.baseline_loss = BaselineLoss(baseline_loss, chance_loss)
        self.observable, self.folder = observable, f"{self.prefix}_stop"
        self.recording.metric = Metric(observable)
        self.forget()

    def forget(self) -> None:
        super().forget()
        self.baseline_loss.forget()
        self.stopping_reason, self.message = StoppingReason.NOT_STOPPED, ""
        self.stopped_epoch: int | None = None
        self.would_stop_epoch: int | None = None
        self.judge = StopJudge(self.rule, self.patience, hovering_counts=self.restore == "average")
        self.average.forget()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            observable=self.observable,
            parameters=self.settings.parameters,
            every_n_steps=self.settings.every_n_steps,
            horizon=self.rule.horizon,
            prefix=self.prefix,
        )

    @property
    def chance(self) -> Baseline | None:
        return self.baseline_loss.value

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        share_baseline(self, trainer)

    def fit_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.baseline_loss.start(resumed=self.resumed)
        if self.stopped_epoch is not None:  # in an earlier fit
            self.stopping_reason, self.stopped_epoch, self.would_stop_epoch = StoppingReason.NOT_STOPPED, None, None
        self._averages = self.mode == "stop" and self.restore == "average" and not averaging_callbacks(trainer, OURS)
        publish(trainer, self.prefix, LOGGED)
        tell_if_short(self, trainer, self.rule.horizon + 1 + self.patience, "the first decision")

    def round_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average.begin_round(self.rates, self.clock.rounds)

    def batch_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.observable == TRAIN_LOSS:
            self.baseline_loss.batch_begins(batch)
        if self._averages:
            self.average.batches.add(pl_module, batch, batch_idx)

    def batch_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        with self.guard("measuring the baseline loss"):
            self.baseline_loss.batch_ends(trainer, pl_module, batch_idx)

    def snapshot_taken(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        if self.observable == TRAIN_LOSS:
            self.baseline_loss.agree(trainer)
        value: float | None = None
        with self.guard("reading the observed metric"):
            value = self.recording.value(trainer)
        judged = self.on_zero(trainer, "judging convergence", lambda: self._judge(trainer, epoch, value, recorded))
        reason, logged = judged or (StoppingReason.NOT_STOPPED, {})
        known = {name: value for name, value in logged.items() if not math.isnan(value)}
        publish(trainer, self.prefix, {name: value for name, value in LOGGED.items() if name not in known})
        self.log_values(trainer, pl_module, known)
        self.average.step = steps_done(trainer)
        if reason is not StoppingReason.NOT_STOPPED:  # broadcast from the first process
            self._conclude(trainer, epoch, reason)

    def fit_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.baseline_loss.probe.pause()
        if self.stopped_epoch is not None and self._averages:
            self.average.choose(trainer, pl_module)
            self.average.put_in(trainer, pl_module)
            self.average.keep()
            told = f"The module holds the average of {self.average.length} snapshots, which no checkpoint contains."
            self._tell(trainer, f"{self.message} {told}")
        self.average.batches.clear()
        values = {row["epoch"]: row["value"] for row in self.history}
        met = self.would_stop_epoch
        if self.mode == "report" and met is not None and met in values:
            last = self.history[-1]
            rank_zero_info(
                f"{type(self).__name__}: stopping after {self.clock.when(met)} would have saved "
                f"{self.clock.span(last['epoch'] - met)}, in which {self.observable} changed by "
                f"{last['value'] - values[met]:+.2g}."
            )
        if self.stopping_reason is StoppingReason.NOT_STOPPED and met is None:
            why = why_not(row["hold"] for row in self.history)
            text = f"{type(self).__name__}: not stopped in {self.clock.span(self.clock.rounds)}, blocked by: {why}."
            self._tell(trainer, text)

    def _tell(self, trainer: pl.Trainer, text: str) -> None:
        self.message = trainer.strategy.broadcast(text)
        rank_zero_info(self.message)

    def segment_begins(self) -> None:
        self.judge.start()
        self.average.start_at(self.clock.rounds)

    # -- what ---------------------------------------------------------------------------------------------------------

    def _judge(
        self, trainer: pl.Trainer, epoch: int, value: float | None, recorded: bool
    ) -> tuple[StoppingReason, dict[str, float]]:
        """Add the epoch's row to the history; return why to stop, and what to log."""
        if value is None:
            return StoppingReason.NOT_STOPPED, {}
        trajectory, baseline = self.recorder.trajectory, self.baseline_loss.value
        factor = trajectory.factor(last=self.rule.horizon + 1) if recorded and trajectory is not None else None
        phase = self.recording.read(epoch, baseline).phase
        others = koopman_callbacks(trainer)
        walks = phase is Phase.UNKNOWN and any(getattr(each, "exhausted", False) for each in others)
        lowered = any(getattr(each, "can_reduce", False) for each in others)  # rates fall first
        plan, hovers = (lambda: self._planned(trainer)), (phase is Phase.HOVERING or walks) and not lowered
        found, reason = self.judge.judge(value, factor, baseline, hovers=hovers, rates=self.rates, planned=plan)
        self.history.append({"epoch": epoch, "step": steps_done(trainer), "phase": phase.value, **found})
        self.write_history()
        return reason, {name: self.history[-1][name] for name in LOGGED}

    def _planned(self, trainer: pl.Trainer) -> list[list[float]]:
        """Return the planned learning rates, or none if they cannot be read ahead."""
        with self.guard("reading the learning rates ahead"):
            return planned_rates(trainer, self.settings.every_n_steps)
        return []

    def _conclude(self, trainer: pl.Trainer, epoch: int, reason: StoppingReason) -> None:
        trained = trainer.current_epoch if self.clock.by_steps else epoch
        too_early = epoch < self.min_epochs or trained < (trainer.min_epochs or 0)
        if too_early or trainer.global_step < (trainer.min_steps or 0):
            return
        stops = self.mode == "stop"
        if stops or self.would_stop_epoch is None:
            self.would_stop_epoch = epoch
            if self.guard.zero:
                row, done = self.history[-1], "stopped" if stops else "would have stopped"
                self.message = f"{type(self).__name__}: {done} after {self.clock.when(epoch)}: "
                if reason is StoppingReason.CONVERGED:
                    base = "its range so far" if self.chance is None else "the baseline loss"
                    self.message += why_converged(
                        row, self.rule, self.observable, self.clock.span(self.rule.horizon), base
                    )
                walks = reason is StoppingReason.HOVERING and row["phase"] == Phase.UNKNOWN.value
                self.message += WALKS if walks else f"The training is {row['phase']}: {Phase(row['phase']).meaning}."
                self.message += collapse([each["learning_rate"] for each in self.history])
            self._tell(trainer, self.message)
        if stops:
            self.stopping_reason, self.stopped_epoch = reason, epoch
            trainer.should_stop = True

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        return {
            "judge": self.judge.state_dict(),
            "average": self.average.state_dict(),
            "baseline": self.baseline_loss.state_dict(),
            **kept(self, KEPT),
        }

    def restore_own(self, state: dict[str, Any]) -> None:
        self.forget()
        self.baseline_loss.load_state_dict(state["baseline"])
        self.judge.load_state_dict(state["judge"])
        self.average.load_state_dict(state["average"])
        set_back(self, state, KEPT)
