"""Stop a training that has converged."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_koopman._checks import check_choice, check_count, check_positive, check_share
from lightning_koopman.callbacks.base import TrajectoryCallback, check_prefix_is_free
from lightning_koopman.callbacks.baseline_loss import BaselineLoss, share_baseline
from lightning_koopman.callbacks.clock import steps_done
from lightning_koopman.callbacks.lr_schedule import planned_rates
from lightning_koopman.callbacks.observables import TRAIN_LOSS, Metric
from lightning_koopman.callbacks.outlook import tell_if_short
from lightning_koopman.callbacks.scalars import publish
from lightning_koopman.reading.phase import Phase
from lightning_koopman.stopping.evidence import Baseline, rate_will_matter
from lightning_koopman.stopping.rule import LEAST_HORIZON, ConvergenceRule, Hold, StoppingReason, Verdict
from lightning_koopman.trajectory.recorder import WEIGHTS

if TYPE_CHECKING:
    import pytorch_lightning as pl

MODES = ("stop", "report")
# what is logged, and what callbacks that monitor it find while it is unknown: finite, and no evidence of convergence
LOGGED = {"predicted_change": -1.0, "actual_change": -1.0, "predicted_then": -1.0, "unit_fraction": 0.0}
COLLAPSED = 1e-3  # of the highest learning rate: with less, weights stand still whatever the loss has left to give
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
        self.min_epochs = check_count("min_epochs", min_epochs, 0)
        self.mode = check_choice("mode", mode, MODES)
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
        self._rates: list[list[float]] = []
        self._segment = 0  # rows of the history before the weights were last drawn anew
        self._agreed = 0

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
        publish(trainer, self.prefix, LOGGED)
        tell_if_short(self, trainer, self.rule.horizon + 1 + self.patience, "the first decision")

    def batch_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._needs_baseline:
            self.baseline_loss.batch_begins(batch)

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
        met, logged = judged or (False, {})
        known = {name: value for name, value in logged.items() if not math.isnan(value)}
        publish(trainer, self.prefix, {name: value for name, value in LOGGED.items() if name not in known})
        self.log_values(trainer, pl_module, known)
        if trainer.strategy.reduce_boolean_decision(met, all=False):
            self._conclude(trainer, epoch)

    def fit_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.baseline_loss.probe.pause()
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
            self.message = trainer.strategy.broadcast(text)
            rank_zero_info(self.message)

    def segment_begins(self) -> None:
        self._segment, self._agreed = len(self.history), 0

    # -- what ---------------------------------------------------------------------------------------------------------

    def _judge(
        self, trainer: pl.Trainer, epoch: int, value: float | None, recorded: bool
    ) -> tuple[bool, dict[str, float]]:
        """Add the epoch's row to the history; returns whether the rule is met, and what to log."""
        if value is None:
            return False, {}
        horizon, trajectory = self.rule.horizon, self.recorder.trajectory
        values = [*(row["value"] for row in self.history[self._segment :]), value]
        agreed, self._agreed = self._agreed, 0
        factor = trajectory.factor(last=horizon + 1) if recorded and trajectory is not None else None
        verdict = self.rule.judge(values, factor, self.baseline_loss.value)
        reading = self.recording.read(epoch, self.baseline_loss.value)
        hold = verdict.hold
        if hold in (Hold.MOVING, Hold.SWINGING) and reading.phase is Phase.HOVERING:
            hold = Hold.HOVERING  # a noisy loss that goes nowhere
        if hold is None and not verdict.at_floor and self._rate_will_matter(trainer, values, verdict):
            hold = Hold.SCHEDULE
        if hold is None:
            self._agreed = agreed + 1
            hold = Hold.PATIENCE if self._agreed < self.patience else None
        then = self.history[-horizon] if len(values) > horizon else None
        self.history.append(
            {
                "epoch": epoch,
                "step": steps_done(trainer),
                "value": value,
                "phase": reading.phase.value,
                "predicted_change": verdict.forecast.change,
                "actual_change": math.nan if then is None else value - then["value"],
                "predicted_then": math.nan if then is None else then["predicted_change"],
                "unit_fraction": verdict.unit_fraction,
                "bound": verdict.forecast.bound,
                "swing": verdict.forecast.swing,
                "scale": verdict.scale,
                "learning_rate": max(self.rates, default=math.nan),
                "hold": "" if hold is None else hold.value,
            }
        )
        self._rates.append(self.rates)
        self.write_history()
        return hold is None, {name: self.history[-1][name] for name in LOGGED}

    def _rate_will_matter(self, trainer: pl.Trainer, values: list[float], verdict: Verdict) -> bool:
        """Whether the schedule speaks against stopping; one that cannot be read ahead does not."""
        planned: list[list[float]] = []
        with self.guard("reading the learning rates ahead"):
            planned = planned_rates(trainer, self.settings.every_n_steps)
        tolerance = self.rule.tolerance * verdict.scale
        past = [*self._rates[self._segment :], self.rates]
        return rate_will_matter(past, planned, values, span=self.rule.horizon, tolerance=tolerance)

    def _conclude(self, trainer: pl.Trainer, epoch: int) -> None:
        trained = trainer.current_epoch if self.clock.by_steps else epoch
        too_early = epoch < self.min_epochs or trained < (trainer.min_epochs or 0)
        if too_early or trainer.global_step < (trainer.min_steps or 0):
            return
        stops = self.mode == "stop"
        if stops or self.would_stop_epoch is None:
            self.would_stop_epoch = epoch
            if self.guard.zero:
                row = self.history[-1]
                self.message = (
                    f"{type(self).__name__}: {'stopped' if stops else 'would have stopped'} after "
                    f"{self.clock.when(epoch)}: "
                    f"{row['unit_fraction']:.0%} of the weights' importance lies within {self.rule.radius:g} "
                    f"of eigenvalue 1, and {self.observable} = {row['value']:.3g} is predicted to change by "
                    f"{row['predicted_change']:+.1g} over the next {self.clock.span(self.rule.horizon)}, at most "
                    f"{row['bound']:.1g}: less than {self.rule.tolerance:g} of {row['scale']:.3g}, "
                    f"{'its range so far' if self.chance is None else 'the baseline loss'}. "
                    f"The training is {row['phase']}: {Phase(row['phase']).meaning}."
                )
                self.message += collapse(row["learning_rate"], self._rates)
            self.message = trainer.strategy.broadcast(self.message)
            rank_zero_info(self.message)
        if stops:
            self.stopping_reason, self.stopped_epoch = StoppingReason.CONVERGED, epoch
            trainer.should_stop = True

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        return {
            "rates": [list(rates) for rates in self._rates],
            "segment": self._segment,
            "agreed": self._agreed,
            "would_stop_epoch": self.would_stop_epoch,
            "message": self.message,
            "baseline": self.baseline_loss.state_dict(),
        }

    def restore_own(self, state: dict[str, Any]) -> None:
        self.forget()
        self.baseline_loss.load_state_dict(state["baseline"])
        self._rates = [[float(rate) for rate in rates] for rates in state["rates"]]
        self._segment, self._agreed = int(state["segment"]), int(state["agreed"])
        met = state["would_stop_epoch"]
        self.would_stop_epoch, self.message = None if met is None else int(met), str(state["message"])


def why_not(holds: Iterable[str]) -> str:
    """What held a stop back, in one line, the most frequent first."""
    counts = Counter(hold for hold in holds if hold).most_common(3)
    return "; ".join(f"{hold} ({count} times)" for hold, count in counts) or "nothing was judged"


def collapse(rate: float, before: Sequence[Sequence[float]]) -> str:
    """A sentence where the learning rate has fallen so far that the weights stand still in any case, or nothing."""
    highest = max((each for rates in before for each in rates), default=0.0)
    if not rate < COLLAPSED * highest:
        return ""
    return f" But the learning rate has fallen from {highest:.2g} to {rate:.2g}: nothing can move at that."
