"""Validate, save and keep an average of the weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_koopman._checks import check_choice, check_count, check_function
from lightning_koopman.averaging.average import check_average, check_lengths
from lightning_koopman.callbacks.averaged_checkpoints import AveragedCheckpoints, check_collects_whole_states
from lightning_koopman.callbacks.averages import OURS, averaging_callbacks
from lightning_koopman.callbacks.base import TrajectoryCallback
from lightning_koopman.callbacks.clock import steps_done
from lightning_koopman.callbacks.scalars import publish
from lightning_koopman.callbacks.training_batches import SCORED
from lightning_koopman.callbacks.weight_average import WeightAverage
from lightning_koopman.parameters.select import check_network
from lightning_koopman.trajectory.recorder import SnapshotSettings

SEARCHED = 1, 2, 5, 12, 30
UNKNOWN = {"average_length": 1.0}
FIT = "fit"  # `trainer.state.fn` during `fit`, as opposed to `validate`


class KoopmanWeightAveraging(TrajectoryCallback):
    r"""Validate, save and keep an average of the newest weights in place of the last weights.

    At the noise floor of a learning rate the weights hover about a point. Their average is then better than the last
    weights, and often better than any single epoch. While the weights still move, an average is worse. So the number of
    snapshots to average is chosen again for each validation and checkpoint. A few lengths, including 1 (the last
    weights), are compared by their loss on four *training* batches, forward only. The longest average is chosen whose
    loss exceeds the least by at most 0.025 % of the baseline loss (or of the range of the losses so far). This needs no
    validation data and no constant to tune.

    The module holds the average during validation and after ``fit``. Training itself is not affected. Checkpoints hold
    the average in ``state_dict``, so ``ModelCheckpoint(monitor="val_loss")`` keeps the weights that were validated.
    They hold the weights in training as well, from which ``fit(ckpt_path=...)`` with this callback resumes.

    Batch normalization statistics of the average are re-estimated over ``n_batches`` training batches; all other
    buffers are the last ones. A new average starts when the weights are replaced (pruning, restart) or the learning
    rate jumps. If ``training_step`` cannot run on a copy of the module (manual optimization, sharded weights), the
    correlation of the steps determines the length; with batch normalization, the last weights are kept.

    Args:
        profile: As for :func:`averaged_weights`.
        length: Number of snapshots to average, ≥ 1, or several to choose from (default: chosen automatically).  As
            long as fewer are held, all are averaged, the weights before training among them.
        power: Exponent p of ``profile="ramp"``, > 0.
        n_batches: Number of training batches for re-estimating batch normalization statistics, ≥ 4.
        every_n_epochs: Epochs between snapshots, ≥ 1.
        every_n_steps: Optimizer steps between snapshots, ≥ 1, in place of epochs.
        window: Number of snapshots kept, ≥ 3, which is the maximum length of the average.
        parameters: Name patterns of the weights to average (default: all that require a gradient).
        storage: Where snapshots are stored, ``"ram"`` or ``"disk"``.
        dtype: Data type of stored snapshots, ``"float32"`` or ``"bfloat16"``.
        dirpath: Local folder in which ``koopman_average`` is created for the history and the snapshots that checkpoints
            refer to (default: the run's log folder).
        prefix: First part of the logged name, ``koopman/average_length``, and of the folder's name.

    Attributes:
        history: List of dicts, one per chosen average, with the columns of ``history.csv``.

    Raises:
        ValueError: At construction or before training starts, if an argument is out of range, another callback averages
            the weights, or checkpoints are sharded.

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

    columns = ("epoch", "step", "average_length", "last_loss", "average_loss")
    advice = "pass a smaller `window`, or storage='disk'", "pass a smaller `window`, or another `dirpath`"

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
        lengths = check_average(profile, length, power)
        if max(lengths or [0]) > check_count("window", window, 3):
            raise ValueError(f"length={length!r} exceeds window={window}: raise `window`, which costs memory.")
        check_choice("storage", storage, ("ram", "disk"), "sketches hold no weights to average")
        settings = SnapshotSettings(
            parameters=parameters,
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            window=window,
            storage=storage,
            dtype=dtype,
        )
        super().__init__(settings, dirpath=dirpath, prefix=prefix)
        self.average = WeightAverage(
            self.recording,
            self.guard,
            profile=profile,
            lengths=lengths,
            power=float(power),
            n_batches=check_count("n_batches", n_batches, SCORED),
        )
        self.checkpoints = AveragedCheckpoints(self.average)
        self.folder = f"{self.prefix}_average"

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**self.settings.interval, prefix=self.prefix)

    def forget(self) -> None:
        super().forget()
        self.average.forget()

    def apply(self, module: nn.Module) -> None:
        """Copy the last chosen average, with its batch normalization statistics, into a module.

        Args:
            module: The trained module or a copy, with parameters of the same names.

        Raises:
            ValueError: If no average has been chosen yet, or a parameter is missing or has another shape.
        """
        check_network("module", module)
        self.average.copy_to(module)

    def search(
        self,
        pl_module: pl.LightningModule,
        loss: Callable[[pl.LightningModule], float],
        lengths: Sequence[int] = SEARCHED,
    ) -> dict[int, float]:
        """Choose the length after training by a loss of your own, such as the validation loss.

        The module is left with the average of least loss. Lengths differ only in their coefficients, so no weights
        besides the snapshots are stored. The least of several losses is biased low: evaluate the result on other data.

        Args:
            pl_module: The trained module.
            loss: Function that returns the loss of the module, for instance by ``trainer.validate(module)``.
            lengths: Numbers of snapshots to try, ≥ 1 each; at most as many as are held are averaged.

        Returns:
            The loss of each length tried.

        Raises:
            TypeError: If ``loss`` returns no number.
            ValueError: If no average has been chosen yet, a length is not positive, or all losses are NaN.
        """
        check_function("loss", loss, "a function of the module that returns its loss")
        asked = check_lengths("lengths", lengths)
        self.average.search(pl_module.trainer, pl_module, asked, lambda: loss(pl_module))
        found = dict(zip(self.average.tried, self.average.losses[:, 0].tolist(), strict=True))
        rank_zero_info(
            f"{type(self).__name__}: of {len(found)} lengths tried, the average of {self.average.length} snapshots has "
            f"the least loss, {found[self.average.length]:.4g}."
        )
        return found

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            others = [each for each in averaging_callbacks(trainer, OURS) if each is not self]
            if others:
                raise ValueError(
                    f"{type(self).__name__} and {type(others[0]).__name__} both replace the weights by an average: "
                    "give the Trainer only one of them."
                )
            check_collects_whole_states(trainer)
        super().setup(trainer, pl_module, stage)

    def fit_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        publish(trainer, self.prefix, UNKNOWN)
        self.average.step = steps_done(trainer)
        if self.average.kept and self.resumed:
            self.guard.warn(
                "kept",
                "the checkpoint was written after `fit` and holds only the average: training continues from it. To "
                "continue from the weights in training, resume from a checkpoint written during `fit`.",
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
        if self.average.length > 1:
            rank_zero_info(f"{type(self).__name__}: the module holds the average of {self.average.length} snapshots.")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.average.take_out(trainer, pl_module)
        self.checkpoints.release()  # Lightning skips `teardown` after an exception

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.checkpoints.release()
        self.average.keep()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.checkpoints.fit_ends(trainer, pl_module)

    # -- what ---------------------------------------------------------------------------------------------------------

    def _record_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the weights before, not after, the validation at the end of an epoch."""
        completed = trainer.current_epoch + 1
        if self.clock.by_steps or not trainer.is_last_batch or not self.is_due(completed):
            return
        self.recording.take(trainer, pl_module, completed)
        self.average.step = steps_done(trainer)

    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the average if there is a new snapshot, and add it to the history."""
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
