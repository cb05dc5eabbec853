"""Restart a badly initialized training."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_koopman._checks import check_count
from lightning_koopman.callbacks.averages import averaging_callbacks
from lightning_koopman.callbacks.base import TrajectoryCallback, start_segments
from lightning_koopman.callbacks.baseline_loss import BaselineLoss, share_baseline
from lightning_koopman.callbacks.clock import steps_done, tell_if_short
from lightning_koopman.callbacks.kept import kept, set_back
from lightning_koopman.callbacks.lr_schedule import warming_up
from lightning_koopman.callbacks.observables import outermost
from lightning_koopman.parameters.frozen import FrozenTensors
from lightning_koopman.parameters.reinitialize import check_scheme, reinitialize_by_name, select_modules, without_reset
from lightning_koopman.parameters.select import as_patterns
from lightning_koopman.pruning.optimizer_state import hand_over
from lightning_koopman.stopping.bad_start import bad_start
from lightning_koopman.stopping.evidence import Baseline
from lightning_koopman.stopping.forecast import RECENT
from lightning_koopman.stopping.rule import StoppingReason
from lightning_koopman.trajectory.recorder import SnapshotSettings

FAR_SEED = 7_919_000_000  # far from the seed of the bad start, which would give the same weights
KEPT = "restarts", "message", "_start", "_start_losses", "_start_rates", "_settled", "_due", "_chosen"


class RestartOnBadInitialization(TrajectoryCallback):
    """Reinitialize the weights if the loss is no better than the baseline after some epochs.

    The baseline is the loss of a network that ignores its input.  The paper's third initialization, standard normal
    weights, leaves the loss above it (section 3), while the frozen weights look converged.  A start counts as bad if

    - the loss or a weight is not finite (checked after every epoch);
    - or after ``check_epoch`` epochs, the loss is no better than the baseline and either began above twice the
      baseline, or neither falls nor is predicted to fall.

    Before the next epoch, the selected modules are then reinitialized, ``configure_optimizers`` rebuilds optimizers and
    schedulers, and every Koopman callback starts a new trajectory.  After ``max_restarts`` restarts, training ends
    instead, with the reason.  The check is postponed while the learning rate is warming up.

    All trainable modules are reinitialized, even pretrained ones: for fine-tuning, set ``modules`` to the new ones.
    Models of ``transformers`` use their own initialization.  Parameters of modules without ``reset_parameters``, such
    as class tokens and layer scales, are set back to their values before training.

    Args:
        check_epoch: Epochs after a start before it is judged, ≥ 1.
        max_restarts: Restarts before training is ended, ≥ 0.
        scheme: None for each module's own ``reset_parameters``; ``"he"``, ``"xavier"`` or ``"orthogonal"``; or a
            callable that receives each module.
        modules: Shell-style patterns for the names of the modules to reinitialize, such as ``["*", "!backbone.*"]``
            (default: all that own a parameter that requires a gradient).
        seed: Seed of the first restart, ≥ 0, plus 1 for each later one.  The global random state does not change.
        baseline_loss: The baseline loss, > 0 (default: measured, which manual optimization does not allow).
        chance_loss: Former name of ``baseline_loss``.
        every_n_steps: Optimizer steps per interval, ≥ 1, for trainings of few, long epochs: an interval then replaces
            the epoch everywhere above.  Under manual optimization, batches are counted.
        dirpath: Local folder in which ``koopman_restart`` is created for the snapshots that checkpoints refer to
            (default: the run's log folder).

    Attributes:
        restarts: List of dicts, one per restart: completed ``epoch`` and ``step``, and the ``reason`` in words.
        stopping_reason: :class:`StoppingReason`.
        message: Why it last restarted or ended training, in words.
        stopped_epoch: Completed epochs when it ended training, or None.

    Raises:
        ValueError: At construction or before training starts, for arguments out of range, patterns that match nothing,
            or a module that cannot be reinitialized.

    Example:
        >>> from lightning_koopman import RestartOnBadInitialization
        >>> restart = RestartOnBadInitialization(check_epoch=5, scheme="he", max_restarts=1)
        >>> restart.restarts
        []
    """

    folder = "koopman_restart"

    def __init__(
        self,
        check_epoch: int = 10,
        *,
        max_restarts: int = 3,
        scheme: Literal["he", "xavier", "orthogonal"] | Callable[[nn.Module], Any] | None = None,
        modules: str | Sequence[str] | None = None,
        seed: int = 0,
        baseline_loss: float | None = None,
        chance_loss: float | None = None,
        every_n_steps: int | None = None,
        dirpath: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(SnapshotSettings(window=RECENT, every_n_steps=every_n_steps), dirpath=dirpath)
        self.check_epoch = check_count("check_epoch", check_epoch, 1)
        self.max_restarts = check_count("max_restarts", max_restarts, 0)
        self.seed = check_count("seed", seed, 0)
        check_scheme(scheme)
        self.scheme, self.modules = scheme, as_patterns(modules, "modules")
        self.baseline_loss = BaselineLoss(baseline_loss, chance_loss)
        self._frozen = FrozenTensors()
        self._chosen: list[str] = []  # names of the modules to reinitialize, selected when training began
        self.forget()

    def forget(self) -> None:
        super().forget()
        self.baseline_loss.forget()
        self.restarts: list[dict[str, Any]] = []
        self.stopping_reason, self.message = StoppingReason.NOT_STOPPED, ""
        self.stopped_epoch: int | None = None
        self._begin(0)
        self._settled = False  # the start is good, or there is none to judge
        self._due: str | None = None  # why to reinitialize the weights when the next epoch begins

    def _begin(self, epoch: int) -> None:
        self._start = epoch
        self._start_losses: list[float] = []
        self._start_rates: list[float] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.settings.every_n_steps)

    @property
    def chance(self) -> Baseline | None:
        return self.baseline_loss.value

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        share_baseline(self, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.active:
            chosen = select_modules(pl_module, self.modules, self.scheme, strict=False)
            lacking = without_reset(pl_module, chosen, self.scheme)
            self._chosen = [name for name in chosen if name not in lacking]
            owned = {name: dict(chosen[name].named_parameters(recurse=False)) for name in lacking}
            kept = [f"{name}.{leaf}".lstrip(".") for name, leaves in owned.items() for leaf in leaves]
            self._frozen.keep(outermost(trainer, pl_module), kept)
            if not pl_module.automatic_optimization and self.baseline_loss.given is None:
                self.guard.warn(
                    "baseline",
                    "the baseline loss cannot be measured under manual optimization, so only non-finite losses are "
                    "detected: pass `baseline_loss`, for instance ln C for C classes.",
                )

    def fit_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.baseline_loss.start(resumed=self.resumed)
        if self.fresh:
            self._settled = self.clock.rounds > 0  # resumed from a checkpoint without our state
        tell_if_short(self, trainer, self.check_epoch, "judging the start")
        if not self.resumed:
            self._due = None  # left by an earlier fit
            self._begin(self.clock.rounds)

    def round_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reason, self._due = self._due, None
        if reason is not None:
            with self.guard.together("reinitializing the weights", self.recording.weights.processes):
                self._restart(trainer, pl_module, reason)
            start_segments(trainer, pl_module)

    def batch_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._settled:
            self.baseline_loss.batch_begins(batch)

    def batch_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        with self.guard("measuring the baseline loss"):
            self.baseline_loss.batch_ends(trainer, pl_module, batch_idx)

    def snapshot_taken(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        if self._settled or self._due is not None:
            return
        self.baseline_loss.agree(trainer)
        judged = self.on_zero(trainer, "judging the start", lambda: self._judge(trainer, epoch))
        reason, verdict = judged or (None, "")
        self._settled = bool(verdict)
        if reason is not None:
            self._act(trainer, epoch, reason)
        elif self._settled and not self.message:
            self.message = f"{type(self).__name__}: {verdict}, after {self.clock.when(epoch)}."
        if self._settled and self.recording.alone:
            self.recorder.clear()  # nothing more is recorded: see `is_due`
        if self._settled:
            self._frozen.forget()

    def fit_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.baseline_loss.probe.pause()
        self._frozen.forget()
        if not self.message:
            known = "training began before this callback did" if self._settled else "training ended too early"
            self.message = f"{type(self).__name__}: the start was not judged, since {known}."

    @property
    def finished(self) -> bool:
        return self._settled

    # -- what ---------------------------------------------------------------------------------------------------------

    def _judge(self, trainer: pl.Trainer, epoch: int) -> tuple[str | None, str]:
        """Return why the start is bad, or None, and the verdict once judging has ended."""
        loss = self.recording.train_loss
        if loss is not None and not math.isfinite(loss):
            return f"the loss is {loss}", ""
        if not self.recording.finite:
            return "the weights are not finite", ""
        if loss is not None:
            self._start_losses.append(loss)
        self._start_rates.append(max(self.rates, default=0.0))
        if epoch < self._start + self.check_epoch:
            return None, ""
        baseline = self.baseline_loss.value
        if not self._start_losses or (baseline is None and not self.baseline_loss.probe.wanted):
            self.guard.warn(
                "baseline",
                "the baseline loss is unknown, so only non-finite losses are detected: pass `baseline_loss`, for "
                "instance ln C for C classes, and return the loss from `training_step`.",
            )
            return None, "the start was not judged, since the baseline loss is unknown"
        if baseline is None:
            return None, ""
        with self.guard("reading the learning rates ahead"):
            if warming_up(trainer, self._start_rates, self.settings.every_n_steps):
                return None, ""
        trajectory = self.recorder.trajectory
        factor = trajectory.factor(last=RECENT) if trajectory is not None and len(trajectory) else None
        reason = bad_start(self._start_losses, factor, baseline, horizon=self.check_epoch)
        return reason or None, "the start was judged good" if reason is None else ""

    def _act(self, trainer: pl.Trainer, epoch: int, reason: str) -> None:
        """Schedule a restart for the next epoch, so that this epoch's checkpoints keep its weights, or end training."""
        if len(self.restarts) < self.max_restarts:
            self._due = reason
            follow = f"restart {len(self.restarts) + 1} of at most {self.max_restarts} before the next epoch"
        else:
            self.stopping_reason, self.stopped_epoch = StoppingReason.BAD_START, epoch
            self._settled = trainer.should_stop = True
            follow = f"training ends after {len(self.restarts)} restarts"
        self.message = f"{type(self).__name__}: bad start, after {self.clock.when(epoch)} {reason}; {follow}."
        rank_zero_info(self.message)

    def _restart(self, trainer: pl.Trainer, pl_module: pl.LightningModule, reason: str) -> None:
        seed = FAR_SEED + self.seed + len(self.restarts)
        root, processes = outermost(trainer, pl_module), self.recording.weights.processes
        # counted even if it fails, or it would be retried forever
        self.restarts.append({"epoch": self.clock.rounds, "step": steps_done(trainer), "reason": reason})
        self._begin(self.clock.rounds)
        reinitialize_by_name(root, self._chosen, self.scheme, seed=seed, processes=processes)
        held = trainer.optimizers
        trainer.strategy.setup_optimizers(trainer)
        hand_over(held, trainer.optimizers)
        lost = self._frozen.restore(root)
        if lost:
            self.guard.warn(
                "lost",
                f"{len(lost)} tensors that are not reinitialized, such as {lost[0]!r}, are not finite and were too "
                "large to copy beforehand: set them in `configure_optimizers`, which every restart calls.",
            )
        for other in averaging_callbacks(trainer):
            self.guard.warn("average", f"the average of {type(other).__name__} still holds weights of the bad start.")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        return {
            **kept(self, KEPT),
            "initial": {name: value.cpu() for name, value in self._frozen.initial.items() if type(value) is Tensor},
            "baseline": self.baseline_loss.state_dict(),
        }

    def restore_own(self, state: dict[str, Any]) -> None:
        self.forget()
        self.baseline_loss.load_state_dict(state["baseline"])
        set_back(self, state, KEPT)
        self._frozen.initial |= state["initial"]
