"""Start a badly initialised training anew."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_koopman._checks import check_count
from lightning_koopman.callbacks.averages import averaging_callbacks
from lightning_koopman.callbacks.base import draw_anew, start_segments
from lightning_koopman.callbacks.baseline_loss import ChanceCallback
from lightning_koopman.callbacks.lr_schedule import warming_up
from lightning_koopman.parameters.reinitialize import check_scheme, select_modules
from lightning_koopman.parameters.select import as_patterns
from lightning_koopman.stopping.bad_start import bad_start
from lightning_koopman.stopping.forecast import RECENT
from lightning_koopman.stopping.rule import StoppingReason

if TYPE_CHECKING:
    import pytorch_lightning as pl

FAR_SEED = 7_919_000_000  # far from the seed that drew the bad start, or the same weights would be drawn again


class RestartOnBadInitialization(ChanceCallback):
    """Draw the weights anew where the initialisation was bad: the loss is no better than chance after some epochs.

    The paper's third initialisation, standard normal weights, leaves the network at a loss above that of guessing
    (section 3), with weights that look converged: frozen.  After ``check_epoch`` epochs a start counts as bad if the
    loss

    - is not finite (this is seen at once);
    - or is no better than chance, the loss of a network that ignores its input, and began at more than twice that, or
      neither falls nor is predicted to.

    Then, before the next epoch, the chosen modules are initialised anew, optimizers and schedulers are built anew by
    ``configure_optimizers``, and every Koopman callback starts a new trajectory.  After ``max_restarts`` such restarts
    the training is ended instead, with the reason.  While the learning rate is still warming up, judgement is put off.

    All trainable modules are drawn anew, pretrained ones too: when you fine-tune, name the new ones in ``modules``.

    Args:
        check_epoch: Epochs after a start until it is judged, ≥ 1.
        max_restarts: Restarts until the training is ended, ≥ 0.
        scheme: None for each module's own ``reset_parameters``; ``"he"``, ``"xavier"`` or ``"orthogonal"``; or a
            callable that is given each module.
        modules: Shell-style patterns of the names of the modules to draw anew, such as ``["*", "!backbone.*"]``
            (default: all that own a parameter which requires a gradient).
        seed: Seed of the first restart, ≥ 0; later ones count up.  The run's own random state is left alone.
        chance_loss: The loss at chance, > 0, in place of the measurement; manual optimization needs it.
        every_n_steps: Optimizer steps that take the place of an epoch above, ≥ 1, for trainings of few, long epochs.
        dirpath: Local folder below which ``koopman_restart`` is made for the snapshots that checkpoints refer to
            (default: the run's log folder).

    Attributes:
        restarts: List of dicts, one a restart: completed ``epoch`` and ``step``, and the ``reason`` in plain words.
        stopping_reason: :class:`StoppingReason`.
        message: Why it restarted or ended the training last, in plain words.
        stopped_epoch: Completed epochs when it ended the training, or None.

    Raises:
        ValueError: At construction or before training starts, for arguments out of range, patterns that match nothing,
            or a module that cannot be drawn anew.

    Example:
        >>> from lightning_koopman import RestartOnBadInitialization
        >>> restart = RestartOnBadInitialization(check_epoch=5, scheme="he", max_restarts=1)
        >>> restart.restarts
        []
    """

    folder = "koopman_restart"
    enough = RECENT
    any_window = True

    def __init__(
        self,
        check_epoch: int = 10,
        *,
        max_restarts: int = 3,
        scheme: Callable[[nn.Module], Any] | str | None = None,
        modules: str | Sequence[str] | None = None,
        seed: int = 0,
        chance_loss: float | None = None,
        every_n_steps: int | None = None,
        dirpath: str | os.PathLike[str] | None = None,
    ) -> None:
        check_count("check_epoch", check_epoch, 1)
        check_count("max_restarts", max_restarts, 0)
        check_count("seed", seed, 0)
        super().__init__(
            chance_loss,
            window=RECENT,
            every_n_steps=every_n_steps,
            dirpath=dirpath,
        )
        check_scheme(scheme)
        self.check_epoch, self.max_restarts, self.seed = check_epoch, max_restarts, seed
        self.scheme = scheme
        self.modules = as_patterns(modules)
        self._chosen: list[str] = []  # names of the modules to draw anew, as they were when training began

    def _forget(self) -> None:
        super()._forget()
        self.restarts: list[dict[str, Any]] = []
        self.stopping_reason, self.message = StoppingReason.NOT_STOPPED, ""
        self.stopped_epoch: int | None = None
        self._begin(0)
        self._settled = False  # the start was found good, or there was none to judge
        self._due: str | None = None  # why the weights will be drawn anew when the next epoch begins

    def _begin(self, epoch: int) -> None:
        self._start = epoch
        self._start_losses: list[float] = []
        self._start_rates: list[float] = []

    # -- when ---------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._active:
            self._chosen = list(select_modules(pl_module, self.modules, self.scheme))
            if not pl_module.automatic_optimization and self.chance_loss is None:
                self._warn(
                    "chance",
                    "the loss at chance cannot be measured under manual optimization, so only losses that are not "
                    "finite are found: pass `chance_loss`, for instance ln C for C classes.",
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self._active:
            return
        if self._anew:
            self._settled = self._rounds > 0  # resumed from a checkpoint that knows nothing of us
        if not self._resumed:
            self._due = None  # of an earlier fit
            self._begin(self._rounds)
        self._share_state(trainer)

    def on_round_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_round_start(trainer, pl_module)
        if self._active and self._due is not None:
            with self._guard("drawing the weights anew"):
                self._restart(trainer, pl_module, self._due)
            self._due = None

    @property
    def _needs_chance(self) -> bool:
        return not self._settled

    def on_snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        if self._settled or self._due is not None:
            return
        self._agree_on_chance(trainer)
        reason = None
        if self._zero:
            with self._guard("judging the start"):
                reason = self._judge(trainer, epoch)
        reason, settled = trainer.strategy.broadcast((reason, self._settled))
        self._settled = bool(settled)
        if reason is not None:
            self._act(trainer, epoch, reason)
        if self._settled and self._alone:
            self.recorder.clear()  # and nothing more is recorded: see `_due_at`

    @property
    def _finished(self) -> bool:
        return self._settled

    # -- what ---------------------------------------------------------------------------------------------------------

    def _judge(self, trainer: pl.Trainer, epoch: int) -> str | None:
        """Why the start is bad, or None."""
        loss = self.train_loss
        if loss is not None and not math.isfinite(loss):
            return f"the loss is {loss}"
        if not self.finite:
            return "the weights are not finite"
        if loss is not None:
            self._start_losses.append(loss)
        self._start_rates.append(max(self.rates, default=0.0))
        if epoch < self._start + self.check_epoch:
            return None
        if not self._start_losses or (self.chance is None and not self._probe.wanted):
            self._settled = True
            self._warn(
                "chance",
                "the loss at chance is not known, so only losses that are not finite are found: pass `chance_loss`, "
                "for instance ln C for C classes, and return the loss from `training_step`.",
            )
            return None
        if self.chance is None:
            return None
        with self._guard("reading the learning rates ahead"):
            if warming_up(trainer, self._start_rates, self.settings.every_n_steps):
                return None
        trajectory = self.recorder.trajectory
        factor = trajectory.factor(last=RECENT) if trajectory is not None and len(trajectory) else None
        reason = bad_start(self._start_losses, factor, self.chance, horizon=self.check_epoch)
        self._settled = reason is None
        return reason or None

    def _act(self, trainer: pl.Trainer, epoch: int, reason: str) -> None:
        """Restart before the next epoch, so that this epoch's checkpoints hold what this epoch trained; or give up."""
        if len(self.restarts) < self.max_restarts:
            self._due = reason
            follow = f"restart {len(self.restarts) + 1} of at most {self.max_restarts} before the next epoch"
        else:
            self.stopping_reason, self.stopped_epoch = StoppingReason.BAD_START, epoch
            self._settled = trainer.should_stop = True
            follow = f"training ends after {len(self.restarts)} restarts"
        self.message = f"{type(self).__name__}: bad start, after {self._when(epoch)} {reason}; {follow}."
        rank_zero_info(self.message)

    def _restart(self, trainer: pl.Trainer, pl_module: pl.LightningModule, reason: str) -> None:
        seed = FAR_SEED + self.seed + len(self.restarts)
        draw_anew(trainer, pl_module, self._chosen, self.scheme, seed)
        trainer.strategy.setup_optimizers(trainer)
        self.restarts.append({"epoch": self._rounds, "step": trainer.global_step, "reason": reason})
        self._begin(self._rounds)
        for other in averaging_callbacks(trainer):
            self._warn("average", f"the average of {type(other).__name__} still holds weights of the bad start.")
        start_segments(trainer, pl_module)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if state:
            state |= {
                "restarts": [dict(row) for row in self.restarts],
                "message": self.message,
                "start": [self._start, list(self._start_losses), list(self._start_rates)],
                "settled": self._settled,
                "due": self._due,
                "chosen": list(self._chosen),
            }
        return state

    def _restore_state(self, state: dict[str, Any]) -> None:
        super()._restore_state(state)
        self.restarts, self.message = state["restarts"], state["message"]
        self._start, self._start_losses, self._start_rates = state["start"]
        self._settled, self._due, self._chosen = state["settled"], state["due"], state["chosen"]

    def _share_state(self, trainer: pl.Trainer) -> None:
        """Give every rank what was restored on global rank zero."""
        known = (self.restarts, self.message, self._start, self._settled, self._due, self._chosen)
        known = trainer.strategy.broadcast(known)
        self.restarts, self.message, self._start, self._settled, self._due, self._chosen = known
