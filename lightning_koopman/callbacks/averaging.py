"""Evaluate, save and keep an average of the weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_koopman._checks import check_choice, check_count, check_function
from lightning_koopman.averaging.average import check_average
from lightning_koopman.callbacks.averaged_checkpoints import AveragedCheckpoints, check_collects_whole_states
from lightning_koopman.callbacks.averages import replacing_callbacks
from lightning_koopman.callbacks.base import TrajectoryCallback
from lightning_koopman.callbacks.clock import steps_done
from lightning_koopman.callbacks.scalars import publish
from lightning_koopman.callbacks.training_batches import SCORED
from lightning_koopman.callbacks.weight_average import WeightAverage

if TYPE_CHECKING:
    import pytorch_lightning as pl

COLUMNS = ("epoch", "step", "average_length", "last_loss", "average_loss")
SEARCHED = 1, 2, 5, 12, 30
UNKNOWN = {"average_length": 1.0}
FIT = "fit"  # not a validation of its own


class KoopmanWeightAveraging(TrajectoryCallback):
    r"""Evaluate, save and keep an average of the weights after the newest epochs in place of the last weights.

    Weights that hover about a point at the noise floor of their learning rate are better where they are averaged:
    often better than after any single epoch.  Weights that still go somewhere are worse.  So the number of snapshots to
    average is chosen again for each validation and checkpoint.  A few lengths, the last weights among them, are
    compared by their loss on four *training* batches, forward only.  The longest is taken whose loss is within 0.025 %
    of the least, relative to the baseline loss (or the range of the losses so far).  Neither validation data nor a
    constant is needed.

    The average is in the module for validation, and at the end of ``fit``; training notices nothing of it.  Checkpoints
    hold it in their ``state_dict``, so that ``ModelCheckpoint(monitor="val_loss")`` keeps the weights that were
    validated; what training goes on from lies beside it, and ``fit(ckpt_path=...)`` with this callback resumes there.

    Statistics of batch normalisation belong to their weights: they are re-estimated over ``n_batches`` training
    batches; all other buffers are the last ones.  A new average starts where the weights are set (pruning, restart) and
    where the learning rate jumps.  Where ``training_step`` cannot be run on a copy of the module (manual optimization,
    sharded weights) the correlation of the steps decides on the length.

    Args:
        profile: As for :func:`averaged_weights`.
        length: Snapshots to average, ≥ 1, or several such numbers to choose from (default: found out).
        power: p of ``profile="ramp"``, > 0.
        n_batches: Training batches that statistics of batch normalisation are re-estimated from, ≥ 4.
        every_n_epochs: Epochs between two snapshots, ≥ 1; or
        every_n_steps: optimizer steps, ≥ 1.
        window: Snapshots kept, ≥ 3: the longest average there can be.
        parameters: Name patterns of the weights to average (default: all that require a gradient).
        storage: ``"ram"`` or ``"disk"`` for the snapshots.
        dtype: ``"float32"`` or ``"bfloat16"`` for the snapshots.
        dirpath: Local folder below which ``koopman_average`` is made for the history and the snapshots that checkpoints
            refer to (default: the run's log folder).
        prefix: First part of the logged name, ``koopman/average_length``, and of that folder's.

    Attributes:
        history: List of dicts, one for each average that was chosen, with the columns of ``history.csv``.

    Raises:
        ValueError: At construction or before training starts, for arguments out of range, beside another callback that
            averages, or where checkpoints are sharded.

    Example:
        >>> import tempfile
        >>> import pytorch_lightning as pl
        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> from lightning_koopman import KoopmanWeightAveraging
        >>> averaging = KoopmanWeightAveraging(length=2)
        >>> trainer = pl.Trainer(
        ...     max_epochs=4, callbacks=averaging, accelerator="cpu", logger=False, default_root_dir=tempfile.mkdtemp(),
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> model = BoringModel()
        >>> trainer.fit(model)  # it now holds the mean of its weights after epochs 3 and 4
        >>> averaging.history[-1]["average_length"]
        2
    """

    columns = COLUMNS
    any_window = True
    advice = "take a smaller window, or set storage='disk'", "take a smaller window, or pass another `dirpath`"

    def __init__(
        self,
        profile: str = "auto",
        *,
        length: int | Sequence[int] | None = None,
        power: float = 1.0,
        n_batches: int = 16,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        window: int = 30,
        parameters: str | Sequence[str] | None = None,
        storage: str = "ram",
        dtype: str = "float32",
        dirpath: str | os.PathLike[str] | None = None,
        prefix: str = "koopman",
    ) -> None:
        check_average(profile, length, power)
        check_choice("storage", storage, ("ram", "disk"), "sketches hold no weights to average")
        super().__init__(
            parameters=parameters,
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            window=check_count("window", window, 3),
            storage=storage,
            dtype=dtype,
            dirpath=dirpath,
            prefix=prefix,
        )
        self.average = WeightAverage(
            self.recording,
            self.guard,
            profile=profile,
            length=length,
            power=float(power),
            n_batches=check_count("n_batches", n_batches, SCORED),
        )
        self.checkpoints = AveragedCheckpoints(self.average)
        self.folder = f"{self.prefix}_average"

    @property
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.settings.every_n_steps, prefix=self.prefix)

    def forget(self) -> None:
        super().forget()
        self.average.forget()

    def apply(self, module: nn.Module) -> None:
        """Copy the average that was chosen last, with its batch statistics, into the module or a copy of it.

        Args:
            module: A module with parameters of the same names.

        Raises:
            ValueError: If no average was chosen yet, or a parameter is missing.
        """
        self.average.copy_to(module)

    def search(
        self,
        pl_module: pl.LightningModule,
        loss: Callable[[pl.LightningModule], float],
        lengths: Sequence[int] = SEARCHED,
    ) -> dict[int, float]:
        """Choose the length after training, by a loss of your own such as that on validation data.

        Only a few coefficients change between lengths, so that no weights besides the snapshots are kept.  The module
        is left with the average whose loss is least.  That loss is the least of several, and so a little too good:
        judge the result on other data.

        Args:
            pl_module: The module that was trained.
            loss: Gives the loss of the module as it is, for instance by ``trainer.validate(module)``.
            lengths: Snapshots to average, ≥ 1 each.

        Returns:
            The loss of each length that was tried.

        Raises:
            ValueError: If no training has ended yet, or a length is out of its range.
        """
        check_function("loss", loss, "a function of the module that returns its loss")
        self.average.search(pl_module.trainer, pl_module, lengths, lambda: loss(pl_module))
        found = dict(zip(self.average.tried, self.average.losses[:, 0].tolist(), strict=True))
        rank_zero_info(
            f"{type(self).__name__}: the average of {self.average.length} snapshots has the least loss, "
            f"{found[self.average.length]:.4g}, of {len(found)} lengths that were tried."
        )
        return found

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_alone(self, trainer)
            check_collects_whole_states(trainer)
        super().setup(trainer, pl_module, stage)

    def fit_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        publish(trainer, self.prefix, UNKNOWN)
        self.checkpoints.training_starts()
        self.average.step = steps_done(trainer)
        if self.average.kept and self.resumed:
            self.guard.warn(
                "kept",
                "the checkpoint was written after `fit`, which leaves the average in the module: training goes on from "
                "it. Checkpoints written during training hold the weights in training as well.",
            )
            self.average.start_at(self.clock.rounds)
            self.recording.start_segment(trainer, pl_module, due=self.is_due(self.clock.rounds))
        self.average.kept = False
        self.checkpoints.watch(trainer, pl_module, lambda: self._choose(trainer, pl_module))

    def round_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average.begin_round(self.rates, self.clock.rounds)

    def batch_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.average.batches.add(pl_module, batch, batch_idx)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.active and not trainer.sanity_checking and trainer.state.fn == FIT:
            self._record_now(trainer, pl_module)
            self._choose(trainer, pl_module)
            self.average.put_in(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == FIT:
            self.average.take_out(trainer, pl_module)
        super().on_validation_end(trainer, pl_module)

    def snapshot_taken(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        self.average.step = steps_done(trainer)
        if self.average.chosen_after is not None:
            self.log_values(trainer, pl_module, {"average_length": float(self.average.length)})

    def segment_begins(self) -> None:
        self.average.start_at(self.clock.rounds)

    def fit_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._choose(trainer, pl_module)
        self.average.put_in(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.average.take_out(trainer, pl_module)
        self.checkpoints.release()  # Lightning then leaves `teardown` out

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.checkpoints.release()
        self.average.keep()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.checkpoints.fit_ends(trainer, pl_module)

    # -- what ---------------------------------------------------------------------------------------------------------

    def _record_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the weights before the validation at the end of an epoch, not after it."""
        completed = trainer.current_epoch + 1
        if self.clock.by_steps or not trainer.is_last_batch or not self.is_due(completed):
            return
        self.recording.take(trainer, pl_module, completed)
        self.average.step = steps_done(trainer)

    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the average, unless that was done since the newest snapshot."""
        average, before = self.average, self.average.chosen_after
        average.choose(trainer, pl_module)
        if average.chosen_after in (None, before):
            return
        row = {"epoch": average.chosen_after, "step": average.step, "average_length": average.length}
        publish(trainer, self.prefix, {"average_length": float(average.length)})
        if self.guard.zero:
            losses = {"last_loss": average.loss_of(1), "average_loss": average.loss_of(average.length)}
            self.history.append({**row, **losses})
            self.write_history()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        return self.average.state_dict()

    def restore_own(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.checkpoints.add_trained(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == FIT:
            self.checkpoints.restore_trained(trainer, pl_module, checkpoint)


def check_alone(callback: TrajectoryCallback, trainer: pl.Trainer) -> None:
    """Raise ValueError if another callback of the run averages the weights."""
    others = [each for each in replacing_callbacks(trainer) if each is not callback]
    if others:
        raise ValueError(
            f"{type(callback).__name__} and {type(others[0]).__name__} both put averages in the place of the weights: "
            "give the Trainer one of them."
        )
