"""Stop a training that has converged."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_koopman._checks import check_choice, check_count, check_positive, check_share
from lightning_koopman.callbacks.averages import replacing_callbacks
from lightning_koopman.callbacks.base import TrajectoryCallback, check_prefix_is_free, koopman_callbacks
from lightning_koopman.callbacks.baseline_loss import BaselineLoss, share_baseline
from lightning_koopman.callbacks.clock import steps_done
from lightning_koopman.callbacks.lr_schedule import planned_rates
from lightning_koopman.callbacks.observables import TRAIN_LOSS, Metric
from lightning_koopman.callbacks.outlook import tell_if_short
from lightning_koopman.callbacks.scalars import publish
from lightning_koopman.callbacks.weight_average import WeightAverage
from lightning_koopman.reading.phase import Phase
from lightning_koopman.stopping.evidence import Baseline
from lightning_koopman.stopping.judge import StopJudge
from lightning_koopman.stopping.rule import LEAST_HORIZON, ConvergenceRule, StoppingReason
from lightning_koopman.stopping.words import collapse, why_converged, why_not
from lightning_koopman.trajectory.recorder import WEIGHTS

if TYPE_CHECKING:
    import pytorch_lightning as pl

MODES = ("stop", "report")
RESTORE = ("average", "last")
# what is logged, and what callbacks that monitor it find while it is unknown: finite, and no evidence of convergence
LOGGED = {"predicted_change": -1.0, "actual_change": -1.0, "predicted_then": -1.0, "unit_fraction": 0.0}
COLUMNS = ("epoch", "step", "value", "phase", *LOGGED, "bound", "swing", "scale", "learning_rate", "hold")


class EarlyStopOnUnitEigenvalues(TrajectoryCallback):
    r"""Stop when the weights' eigenvalues cluster at 1 and the loss is predicted to stand still (paper, section 3).

    The paper proposes to end a training when Koopman eigenvalues cluster around 1.  Alone that is no sign of
    convergence: a random walk has it too, and a frozen bad start.  So two criteria must be met, ``patience`` epochs
    running:

    - the weights: at least ``fraction`` of the importance of the last ``horizon`` + 1 snapshots lies within ``radius``
      of 1;
    - the loss: the delay-embedded DMD of its last ``horizon`` + 2 values predicts that within ``horizon`` epochs its
      level will change by no more than ``tolerance`` times the baseline loss.

    A stop is blocked while the loss is no better than the baseline; the steps of the weights cannot be told from a
    random walk's; they have a direction that does not fade (a saddle); the learning rate is scheduled to change by more
    than it already has without effect (warm-up, next cycle, next decay).

    The baseline loss is measured: that of ``training_step`` on the first batches for a copy of the module which can
    only give a constant (ln C for C equally frequent classes, the targets' variance for a squared error).  No
    validation data are used; hence a network that overfits while its training loss stands still is stopped, one whose
    training loss falls on is not.

    Weights that hover at the noise floor of their learning rate, by :class:`TrainingReading`, have converged as far as
    they can at it, however much the loss fluctuates: after five such epochs running training ends too, unless a
    schedule or :class:`ReduceLROnNoiseFloor` will still lower the rate.  It ends with their average
    (:class:`KoopmanWeightAveraging`), which is what makes the noise harmless.

    Each epoch is a row of ``history.csv``, with what still blocks a stop; logged are
    ``koopman/predicted_change`` (of the loss, over the next ``horizon`` epochs), ``koopman/actual_change`` (over the
    last) beside ``koopman/predicted_then`` (what had been predicted for them), and ``koopman/unit_fraction``;
    none of them before it is known.  Callbacks that monitor them find −1, −1, −1 and 0 until then.

    Args:
        observable: What must stand still: ``"train_loss"``, the epoch's mean of the loss that ``training_step``
            returns, or the name of a logged metric (then one epoch is one logged value).
        radius: Radius of the disc around 1, > 0.
        fraction: Least share of the weights' importance in it, in (0, 1].
        horizon: Epochs to look ahead, and back, ≥ 6.  No decision falls before epoch ``horizon`` + 2 + ``patience`` −
            1.
        tolerance: Largest predicted change that counts as none, relative to the baseline loss, > 0.  Where that is
            unknown (a metric, manual optimization), relative to the range of the values so far.
        patience: Epochs running for which they must be met, ≥ 1.
        min_epochs: Epochs that are trained in any case, ≥ 0; the Trainer's ``min_epochs`` is kept as well.
        every_n_steps: Optimizer steps that take the place of an epoch everywhere above, ≥ 1, for trainings of few, long
            epochs; batches under manual optimization.
        mode: ``"stop"``, or ``"report"`` to train on and only say when it would have stopped.
        restore: ``"average"`` to leave an average of the newest weights in the module when it has stopped, as many of
            the last ``horizon`` + 1 as their loss on a few training batches allows, with batch statistics of their own;
            or ``"last"`` for the last weights, where weights that hover are no reason to stop.
        parameters: Shell-style patterns of the names of the weights to observe (default: all that require a gradient).
        baseline_loss: The baseline loss, > 0, in place of the measurement.
        chance_loss: Its former name.
        dirpath: Local folder below which ``koopman_stop`` is made for the history and the snapshots that checkpoints
            refer to (default: the run's log folder).
        prefix: First part of the logged names and of that folder's; give two of them on one Trainer different ones.

    Attributes:
        stopping_reason: :class:`StoppingReason`.
        message: Why it stopped, or what has spoken against it, in plain words.
        stopped_epoch: Completed epochs when it stopped, or None.
        would_stop_epoch: Completed epochs when the rule was first met, or None; in mode ``"report"`` training goes on.
        history: List of dicts, one an epoch, with the columns of ``history.csv``.
        chance: The baseline loss with its standard error, or None.

    Raises:
        ValueError: At construction or before training starts, for arguments out of range.

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
    any_window = True

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
                "observed in any case."
            )
        horizon = check_count("horizon", horizon, LEAST_HORIZON)
        super().__init__(
            parameters=parameters, every_n_steps=every_n_steps, window=horizon + 1, dirpath=dirpath, prefix=prefix
        )
        self.rule = ConvergenceRule(
            check_positive("radius", radius),
            check_share("fraction", fraction, "it is a share of the weights' importance", closed=True),
            horizon,
            check_positive("tolerance", tolerance),
        )
        self.patience = check_count("patience", patience, 1)
        self.restore = check_choice("restore", restore, RESTORE)
        self.average = WeightAverage(self.recording, self.guard)
        self.min_epochs = check_count("min_epochs", min_epochs, 0)
        self.mode = check_choice("mode", mode, MODES)
        self._averages = False  # it is for this callback to leave an average behind
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
        if stage == "fit":
            check_prefix_is_free(self, trainer)
        super().setup(trainer, pl_module, stage)
        share_baseline(self, trainer)

    def fit_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.baseline_loss.start(resumed=self.resumed)
        if self.stopped_epoch is not None:  # in an earlier fit
            self.stopping_reason, self.stopped_epoch, self.would_stop_epoch = StoppingReason.NOT_STOPPED, None, None
        self._averages = self.mode == "stop" and self.restore == "average" and not replacing_callbacks(trainer)
        publish(trainer, self.prefix, LOGGED)
        tell_if_short(self, trainer, self.rule.horizon + 1 + self.patience, "the first decision")

    def round_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average.begin_round(self.rates, self.clock.rounds)

    def batch_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._needs_baseline:
            self.baseline_loss.batch_begins(batch)
        if self._averages:
            self.average.batches.add(pl_module, batch, batch_idx)

    def batch_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        with self.guard("measuring the baseline loss"):
            self.baseline_loss.batch_ends(trainer, pl_module, batch_idx)

    @property
    def _needs_baseline(self) -> bool:
        return self.observable == TRAIN_LOSS

    def snapshot_taken(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        if self._needs_baseline:
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
        if reason is not StoppingReason.NOT_STOPPED:  # the first process's in all of them
            self._conclude(trainer, epoch, reason)

    def fit_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.baseline_loss.probe.pause()
        if self.stopped_epoch is not None and self._averages:
            self.average.choose(trainer, pl_module)
            self.average.put_in(trainer, pl_module)
            self.average.keep()
            told = f"The module holds the average of {self.average.length} snapshots, which no checkpoint has yet."
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
            text = f"{type(self).__name__}: not stopped in {self.clock.span(self.clock.rounds)}, held back by: {why}."
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
        """Add the epoch's row to the history; returns why to stop, and what to log."""
        if value is None:
            return StoppingReason.NOT_STOPPED, {}
        trajectory, baseline = self.recorder.trajectory, self.baseline_loss.value
        factor = trajectory.factor(last=self.rule.horizon + 1) if recorded and trajectory is not None else None
        phase = self.recording.read(epoch, baseline).phase
        lowered = any(getattr(each, "can_reduce", False) for each in koopman_callbacks(trainer))  # before it ends here
        plan, hovers = (lambda: self._planned(trainer)), phase is Phase.HOVERING and not lowered
        found, reason = self.judge.judge(value, factor, baseline, hovers=hovers, rates=self.rates, planned=plan)
        self.history.append({"epoch": epoch, "step": steps_done(trainer), "phase": phase.value, **found})
        self.write_history()
        return reason, {name: self.history[-1][name] for name in LOGGED}

    def _planned(self, trainer: pl.Trainer) -> list[list[float]]:
        """The learning rates to come, none where they cannot be read ahead."""
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
                self.message += f"The training is {row['phase']}: {Phase(row['phase']).meaning}."
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
            "would_stop_epoch": self.would_stop_epoch,
            "message": self.message,
            "baseline": self.baseline_loss.state_dict(),
        }

    def restore_own(self, state: dict[str, Any]) -> None:
        self.forget()
        self.baseline_loss.load_state_dict(state["baseline"])
        self.judge.load_state_dict(state["judge"])
        self.average.load_state_dict(state["average"])
        met = state["would_stop_epoch"]
        self.would_stop_epoch, self.message = None if met is None else int(met), str(state["message"])
