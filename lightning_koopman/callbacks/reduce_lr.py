"""Lower the learning rate when the weights hover at its noise floor."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_koopman._checks import check_choice, check_positive, check_share, whole_numbers
from lightning_koopman.callbacks.base import TrajectoryCallback, koopman_callbacks, start_segments
from lightning_koopman.callbacks.baseline_loss import known_baseline
from lightning_koopman.callbacks.clock import steps_done, tell_if_short
from lightning_koopman.callbacks.kept import kept, set_back
from lightning_koopman.callbacks.rate_groups import (
    Change,
    check_rates,
    chosen_rates,
    first_rates,
    lowered_rates,
    set_rates,
)
from lightning_koopman.callbacks.scalars import publish
from lightning_koopman.reading.phase import Phase
from lightning_koopman.trajectory.recorder import SnapshotSettings

COLUMNS = ("epoch", "step", "phase", "step_correlation", "learning_rate", "reductions")
LEAST = 0.01  # default minimum rate, relative to a group's first rate
SOONEST = 8  # intervals needed to detect hovering
WINDOW = 30  # snapshots, as in KoopmanWeightAveraging, to share them
WALKED = 24  # intervals in a row of phase unknown: a reason for the first reduction; later, a sign that one was in vain
MOST_GROUPS = 10**6
KEPT = "reductions", "_first", "_due", "_lowest", "_walked"


class ReduceLROnNoiseFloor(TrajectoryCallback):
    r"""Multiply the learning rate by ``factor`` when the weights hover at its noise floor.

    At a constant rate, training first descends and then hovers: the steps turn back, and only a lower rate reduces the
    loss further.  :class:`TrainingReading` detects this from the weights and the training loss alone.  Its phase
    changes once three successive snapshots agree, or at once after warming up.  When it is hovering, the rate is
    lowered and all Koopman callbacks start a new trajectory.  This repeats until the minimum rate is reached, so a
    training needs neither a schedule nor a fixed number of epochs.

    The rate is lowered a first time also after 24 snapshots in a row of phase unknown: the weights keep no direction
    and the loss shows no clear fall.

    The noise may also come from the data, as with wrong labels.  A lower rate then only makes the weights walk at
    random, and the loss stands still; :class:`EarlyStopOnUnitEigenvalues` may end such a training.

    Schedulers keep running: the rates that they store are lowered too, so the schedule continues ``factor`` times as
    high.  Schedulers for which this is impossible (``OneCycleLR``, ``CyclicLR``, warm restarts, chains of several)
    raise an error before training.

    Args:
        factor: Factor for the rates, in (0, 1).
        min_lr: Minimum rate, > 0 (default: a hundredth of each group's first rate).
        groups: Indices of the parameter groups to lower, counted over all optimizers (default: all).
        every_n_epochs: Epochs between two snapshots, ≥ 1.
        every_n_steps: Optimizer steps between two snapshots, ≥ 1, instead of epochs.
        mode: ``"reduce"``, or ``"report"`` to report once that the rate should be lowered.
        parameters: Name patterns of the weights to observe (default: all that require a gradient).
        dirpath: Local folder in which ``koopman_reduce`` is created for the history and the snapshots that checkpoints
            refer to (default: the run's log folder).
        prefix: First part of the logged name, ``koopman/reductions``, and of that folder's name.

    Attributes:
        reductions: List of dicts, one per reduction: ``epoch``, ``step``, and the largest rate ``from`` and ``to``.
        history: List of dicts, one per snapshot, with the columns of ``history.csv``.

    Raises:
        ValueError: At construction or before training starts, for arguments out of range, or a scheduler whose rates
            cannot be lowered.

    Example:
        >>> import tempfile
        >>> import pytorch_lightning as pl
        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> from lightning_koopman import ReduceLROnNoiseFloor
        >>> reduce = ReduceLROnNoiseFloor(factor=0.5)
        >>> trainer = pl.Trainer(
        ...     max_epochs=3, callbacks=reduce, accelerator="cpu", logger=False, default_root_dir=tempfile.mkdtemp(),
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> reduce.reductions, reduce.history[-1]["phase"]
        ([], 'warming up')
    """

    columns = COLUMNS

    def __init__(
        self,
        factor: float = 0.3,
        *,
        min_lr: float | None = None,
        groups: Sequence[int] | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        mode: str = "reduce",
        parameters: str | Sequence[str] | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        prefix: str = "koopman",
    ) -> None:
        settings = SnapshotSettings(
            parameters=parameters, every_n_epochs=every_n_epochs, every_n_steps=every_n_steps, window=WINDOW
        )
        super().__init__(settings, dirpath=dirpath, prefix=prefix)
        self.factor = check_share("factor", factor)
        self.min_lr = None if min_lr is None else check_positive("min_lr", min_lr)
        self.groups = (
            None if groups is None else tuple(whole_numbers("groups", groups, 0, MOST_GROUPS).ravel().tolist())
        )
        if self.groups == ():
            raise ValueError(f"groups must name at least one parameter group, got {groups!r}.")
        self.mode, self.folder = check_choice("mode", mode, ("reduce", "report")), f"{self.prefix}_reduce"
        self.forget()

    def forget(self) -> None:
        super().forget()
        self.reductions: list[dict[str, Any]] = []
        self._first: list[list[float]] = []  # rates of each optimizer's groups when training began
        self._due = False  # lower the rates when the next interval begins
        self._lowest = False  # the rates are at their minimum
        self._walked = 0  # intervals in a row of phase unknown, since a reduction if there is one

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**self.settings.interval, prefix=self.prefix)

    @property
    def can_reduce(self) -> bool:
        """Whether lowering the rates may still bring something."""
        return self.mode == "reduce" and not self._lowest and not self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether the last reduction brought nothing: the weights walk at random, and the loss no longer falls."""
        return self.mode == "reduce" and bool(self.reductions) and self._walked >= WALKED

    # -- when ---------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.active:
            self._check_alone(trainer)
            check_rates(trainer, self.groups)

    def fit_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        publish(trainer, self.prefix, {"reductions": float(len(self.reductions))})
        tell_if_short(self, trainer, SOONEST, "detecting whether the weights hover")

    def snapshot_taken(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        baseline = known_baseline(trainer)
        found = self.on_zero(
            trainer, "reading the training", lambda: self.recording.read(epoch, baseline) if recorded else None
        )
        self._walked = self._walked + 1 if found is not None and found.phase is Phase.UNKNOWN else 0
        hovers = found is not None and found.phase is Phase.HOVERING
        walks = self._walked >= WALKED and not self.reductions
        self._due = (hovers or walks) and not self._lowest
        self.history.append(
            {
                "epoch": epoch,
                "step": steps_done(trainer),
                "phase": Phase.UNKNOWN.value if found is None else found.phase.value,
                "step_correlation": math.nan if found is None else found.step_correlation,
                "learning_rate": max(self.rates, default=math.nan),
                "reductions": len(self.reductions),
            }
        )
        if self.guard.zero:
            self.write_history()
        self.log_values(trainer, pl_module, {"reductions": float(len(self.reductions))})

    def round_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = first_rates(trainer, self._first)  # groups may be added
        due, self._due = self._due, False
        if due and self._reduce(trainer):
            start_segments(trainer, pl_module)

    # -- what ---------------------------------------------------------------------------------------------------------

    def _check_alone(self, trainer: pl.Trainer) -> None:
        for each in koopman_callbacks(trainer):
            if each is self or not isinstance(each, ReduceLROnNoiseFloor) or "report" in (each.mode, self.mode):
                continue
            if self.groups is None or each.groups is None or set(self.groups) & set(each.groups):
                raise ValueError(
                    "two ReduceLROnNoiseFloor lower the same parameter groups: keep one (koopman_autopilot has one), "
                    "or give each `groups` of its own."
                )

    def _reduce(self, trainer: pl.Trainer) -> bool:
        """Lower the rates in all processes, or in none; return whether they were lowered."""
        row = self.history[-1]
        when, name = self.clock.when(row["epoch"]), type(self).__name__
        correlation = f"(step correlation {row['step_correlation']:.2f})"
        why = f"the weights hover at the noise floor of the learning rate {correlation}"
        if row["phase"] != Phase.HOVERING.value:
            span = self.clock.span(WALKED * self.settings.every_n_epochs)
            why = f"the weights have kept no direction for {span}, and the loss shows no clear fall"
        told = f"{name}: after {when} {why}"
        if self.mode == "report":
            if not self.reductions:
                held = chosen_rates(trainer, self.groups)
                self._note(row, held, held)
                rank_zero_info(f"{told}: lower it.")
            return False
        least = [[LEAST * rate if self.min_lr is None else self.min_lr for rate in rates] for rates in self._first]
        before: list[float] = []
        changes: list[Change] = []
        with self.guard.together("lowering the learning rate", self.recording.weights.processes) as lowering:
            before = chosen_rates(trainer, self.groups)
            changes, left = lowered_rates(trainer, self.groups, self.factor, least)
            set_rates(changes)
        if not lowering.succeeded:
            set_rates(changes, back=True)
            return False
        self._lowest, now = not left, chosen_rates(trainer, self.groups)
        if now == before:  # already at the minimum
            return False
        self._note(row, before, now)
        self._walked = 0
        rank_zero_info(
            f"{told}: lowered from {max(before):.2g} to {max(now):.2g}{' (minimum)' if self._lowest else ''}."
        )
        return True

    def _note(self, row: dict[str, Any], before: list[float], now: list[float]) -> None:
        self.reductions.append({"epoch": row["epoch"], "step": row["step"], "from": max(before), "to": max(now)})

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        return kept(self, KEPT)

    def restore_own(self, state: dict[str, Any]) -> None:
        self.forget()
        set_back(self, state, KEPT)
