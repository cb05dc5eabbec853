"""Prune a network while it trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_koopman._checks import check_choice, check_flag
from lightning_koopman.callbacks.base import TrajectoryCallback, koopman_callbacks, start_segments
from lightning_koopman.callbacks.channel_rounds import ChannelRounds
from lightning_koopman.callbacks.clock import steps_done
from lightning_koopman.callbacks.mask_rounds import COLUMNS, MaskRounds, Pruned
from lightning_koopman.callbacks.observables import outermost
from lightning_koopman.callbacks.pruning_schedule import HORIZON, SETTLED, PruningSchedule
from lightning_koopman.callbacks.state import take_up
from lightning_koopman.callbacks.survivors import PersistentScores, Survivors, tell_left_out, trained_parameters
from lightning_koopman.parameters.select import as_patterns
from lightning_koopman.parameters.sharded_modules import local_chunks
from lightning_koopman.parameters.shards import copy_replicas
from lightning_koopman.pruning.channel_removal import ChannelRemoval
from lightning_koopman.pruning.masks import SCOPES, MaskSet, check_amount
from lightning_koopman.pruning.optimizer_state import forget
from lightning_koopman.trajectory.recorder import SnapshotSettings


class KoopmanPruner(TrajectoryCallback):
    """Prune weights during training where their persistent part is small (paper, section 4).

    After ``epoch`` epochs, the trajectory of the weights is decomposed.  The modes whose eigenvalues cluster at 1, and
    those ranked above, form the persistent part.  Before the next epoch, weights whose persistent part is small in
    magnitude are set to zero, and are held there (:class:`MaskSet`) while training continues.  The paper's two
    algorithms differ in how they treat the survivors: ``"keep"`` leaves them unchanged (text to Algorithm 1),
    ``"reconstruction"`` sets them to their reconstruction (Algorithm 1 as printed), and ``"reinit"`` reinitializes them
    and resets their optimizer state (Algorithm 2).

    State-dict keys do not change: without this library, a checkpoint loads as the sparse network.  Resumed runs keep
    their masks.  Every Koopman callback starts a new trajectory at each pruning.

    Zeros alone do not make a network faster.  ``structured=True`` removes whole channels and neurons instead
    (:func:`remove_channels`).  Layers that cannot lose any are listed when training starts.  Checkpoints then hold the
    small network: this callback resumes from them, and :func:`resize_like` prepares a network to load one.

    Args:
        sparsity: Share of the selected weights (``structured``: of the channels) to prune, in (0, 1).
        threshold: In place of ``sparsity``, the paper's ε > 0: smaller magnitudes are pruned.
        epoch: Completed epochs before the first pruning, ≥ 1, or ``"settled"``: prune once the weights moved by at most
            ``settled_change`` of their norm in the last 10 epochs and the spectrum predicts no more for the next 10,
            but not while the learning rate is warming up.
        survivors: ``"keep"``, ``"reconstruction"`` or ``"reinit"``.
        parameters: Shell-style patterns for the names of the parameters to prune, such as ``["*.weight", "!head.*"]``
            (default: trainable matrices and kernels, without biases and norms).
        structured: Remove whole channels and neurons.  Requires Torch-Pruning (``lightning_koopman[structured]``), a
            single process and ``sparsity``.
        scope: ``"global"`` for one quantile over all tensors, ``"tensor"`` to prune the share in each (default:
            ``"global"``; ``structured``: ``"tensor"``).
        rounds: Number of prunings, ≥ 1.  Pruning r reaches 1 − (1 − r/rounds)³ of the sparsity, or r/rounds of the
            threshold.
        round_epochs: Epochs between two prunings, ≥ 3.
        rule: ``"cluster"`` or ``"paper"``: which modes are persistent, see :meth:`Spectrum.persistent`.
        radius: Radius of the cluster at 1, > 0.
        window: Number of snapshots to keep and decompose, ≥ 3, or None for all, as in the paper.
        settled_change: See ``epoch``; > 0.
        allow_empty: Whether a tensor may lose all its weights; otherwise such a pruning is skipped with a warning.
        scheme: Initialization for ``"reinit"``: None for each module's own ``reset_parameters``, ``"he"``,
            ``"xavier"``, ``"orthogonal"``, or a callable that receives each module.  It applies to all trainable
            modules or, with ``parameters``, to those that own one of them.
        seed: Seed for ``"reinit"``, ≥ 0; the global random state does not change.
        every_n_steps: Optimizer steps per interval, ≥ 1, for trainings of few, long epochs: an interval then replaces
            the epoch everywhere above.  Under manual optimization, batches are counted.
        dirpath: Local folder in which ``koopman_prune`` is created for the history and the snapshots that checkpoints
            refer to (default: the run's log folder).
        prefix: First part of the logged names and of that folder's name; must differ between pruners of one Trainer.

    Attributes:
        masks: The current :class:`MaskSet`, or None.
        history: List of dicts, one per pruning, with the columns of ``history.csv``: ``magnitude_agreement`` is the
            share of weights or channels on which magnitude pruning would have decided the same, ``parameters`` the
            number of parameters left in the network.
        changes: With ``structured``: old and new values of the changed constructor arguments, by module name.

    Raises:
        ValueError: At construction or before training starts, for arguments out of range, patterns that match nothing,
            or an epoch that training does not reach.

    Example:
        >>> import tempfile
        >>> import pytorch_lightning as pl
        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> from lightning_koopman import KoopmanPruner
        >>> pruner = KoopmanPruner(sparsity=0.75, epoch=4)
        >>> trainer = pl.Trainer(
        ...     max_epochs=6, callbacks=pruner, accelerator="cpu", logger=False, default_root_dir=tempfile.mkdtemp(),
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> model = BoringModel()
        >>> trainer.fit(model)
        >>> int((model.layer.weight == 0).sum()), model.layer.weight.numel()
        (48, 64)
        >>> print(pruner.table())
        parameter       shape  pruned  of  sparsity
        layer.weight    2×32       48  64    75.00%
        masked tensors             48  64    75.00%
    """

    columns = COLUMNS
    advice = "reduce `window`", "reduce `window`"

    def __init__(
        self,
        sparsity: float | None = None,
        threshold: float | None = None,
        *,
        epoch: int | str = SETTLED,
        survivors: str = "keep",
        parameters: str | Sequence[str] | None = None,
        structured: bool = False,
        scope: str | None = None,
        rounds: int = 1,
        round_epochs: int = 5,
        rule: str = "cluster",
        radius: float = 0.05,
        window: int | None = 30,
        settled_change: float = 0.03,
        allow_empty: bool = False,
        scheme: Literal["he", "xavier", "orthogonal"] | Callable[[nn.Module], Any] | None = None,
        seed: int = 0,
        every_n_steps: int | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        prefix: str = "koopman",
    ) -> None:
        super().__init__(SnapshotSettings(window=window, every_n_steps=every_n_steps), dirpath=dirpath, prefix=prefix)
        structured, by_threshold = check_flag("structured", structured), threshold is not None
        scope = ("tensor" if structured else "global") if scope is None else check_choice("scope", scope, SCOPES)
        only = {"by_threshold": by_threshold, "allow_empty": check_flag("allow_empty", allow_empty)}  # masks only
        self.parameters, self.folder = as_patterns(parameters), f"{self.prefix}_prune"
        self.method: MaskRounds | ChannelRounds = MaskRounds(scope, guard=self.guard, **only)
        if structured:
            self.method = ChannelRounds(self.parameters, scope, type(self).__name__, **only)
        check_amount(sparsity, threshold, scope)
        self.schedule = PruningSchedule(sparsity, threshold, epoch, rounds, round_epochs, settled_change)
        if self.schedule.first is None and window is not None and window <= HORIZON:
            raise ValueError(f"window must be at least {HORIZON + 1} with epoch='settled', got {window}.")
        self.survivors = Survivors(survivors, scheme, seed)
        self.scores = PersistentScores(radius, rule)

    def forget(self) -> None:
        super().forget()
        self.schedule.forget()
        self.method.forget()
        self.scores.take()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(prefix=self.prefix)  # a resumed run may use other options

    @property
    def masks(self) -> MaskSet | None:
        return getattr(self.method, "masks", None)

    @property
    def achieved(self) -> float:
        """Share of the selected weights, or of the channels, pruned so far, in [0, 1]."""
        return self.method.share

    @property
    def changes(self) -> dict[str, dict[str, tuple[Any, Any]]]:
        return getattr(self.method, "changes", {})

    def table(self, module: nn.Module | None = None) -> str:
        """Return a table of the sparsity by tensor and in total (``module``: of all weights), or of changed layers."""
        return self.method.table(module)

    def preview(self, pl_module: pl.LightningModule, batch: Any = None) -> MaskSet | ChannelRemoval:
        """Return what all rounds would prune of the current weights; print its ``table()``.  Nothing is changed.

        Args:
            pl_module: The module.
            batch: With ``structured``: a batch for its ``training_step``, to trace the module.
        """
        return self.method.preview(pl_module, batch, self.parameters, self.schedule.final)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.schedule.check_end(trainer, self.clock)
            self.method.check_run(trainer, pl_module)
        super().setup(trainer, pl_module, stage)
        self.method.prepare(pl_module)  # Lightning loads the weights before callback states

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._select(trainer, pl_module)
        if not self.method.needs_batch:
            tell_left_out(self.guard, outermost(trainer, pl_module), self.parameters)
        self.schedule.tell_if_early(type(self).__name__)

    def _select(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        root = outermost(trainer, pl_module)
        chosen = trained_parameters(trainer, root, self.parameters)  # those currently trained
        self.method.check_selected(root, list(chosen), self.schedule.sparsity)
        self.survivors.select(pl_module, None if self.parameters is None else chosen.values())

    # -- when ---------------------------------------------------------------------------------------------------------

    def fit_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights_replaced(trainer, pl_module)
        self._score(self.clock.rounds)

    def round_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._again(trainer, pl_module, "round")
        if not self.method.needs_batch and self.schedule.is_due(self.clock.rounds):
            self._prune(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.active and not self.schedule.finished:  # not guarded: errors before the first step are raised
            self.method.look(trainer, pl_module, batch, batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def batch_begins(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        # channels: tracing needs a batch; masks: only if a resumed epoch had already begun
        if self.schedule.is_due(self.clock.rounds):
            self._prune(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._again(trainer, pl_module, "step")

    def batch_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._again(trainer, pl_module, "batch")

    def snapshot_taken(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        if self.schedule.waits:
            given = self.recording, epoch, recorded, self.rates
            doing = "checking whether the weights have settled"
            if self.on_zero(trainer, doing, lambda: self.schedule.has_settled(trainer, *given)):
                self.schedule.settled_at = epoch
        self._score(epoch)

    def round_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        self._again(trainer, pl_module, "always")
        self.log_values(trainer, pl_module, {"sparsity": self.achieved})

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._again(trainer, pl_module, "always")  # an averaging callback may have overwritten the weights

    def fit_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._again(trainer, pl_module, "always")
        if not self.schedule.finished:
            ended, why = self.clock.when(self.clock.rounds), self.schedule.why_unfinished(self.clock)
            self.guard.warn("unpruned", f"training ended after {ended} at {self.achieved:.0%} sparsity: {why}.")

    def _again(self, trainer: pl.Trainer, pl_module: pl.LightningModule, when: str) -> None:
        with self.guard("reapplying the masks"):
            self.method.again(trainer, pl_module, when)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.method.release()  # Lightning then skips `teardown`

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.method.release()

    @property
    def finished(self) -> bool:
        return self.schedule.finished

    def is_due(self, epoch: int) -> bool:
        due, window = self.schedule.next_due, self.settings.window
        too_early = due is not None and window is not None and epoch <= due - window and self.recording.alone
        return super().is_due(epoch) and not too_early

    # -- what ---------------------------------------------------------------------------------------------------------

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None, batch_idx: int = 0) -> None:
        """Prune once, on all ranks together, each for its own part of the weights."""
        target, processes = self.schedule.target, self.recording.weights.processes
        scores, about = self.scores.take()
        with self.guard.together(f"pruning (round {self.schedule.attempted + 1})", processes) as pruning:
            shards = self.recording.weights.read(outermost(trainer, pl_module))
            self._select(trainer, pl_module)
            scores = {name: scores.get(name, part.values) for name, part in shards.items()}
            done = self.method.prune(trainer, pl_module, shards, scores, target, batch, batch_idx)
        self.schedule.tried(self.clock.rounds)
        if not pruning.succeeded:
            return
        _accept(self, trainer, done)
        with self.guard.together("setting the survivors", processes):
            self.survivors.set(trainer, pl_module, self.recording.weights, done.values, self.schedule.attempted)
        with self.guard("noting what was pruned"):
            row = done.row(self.clock.rounds, steps_done(trainer), target, about)
            self.history.append(row)
            if self.guard.zero:
                self.write_history()
            rank_zero_info(f"{type(self).__name__}: {done.told(row, self.method.unit, self.clock.when(row['epoch']))}")
            self.method.log(trainer, self.prefix)
        start_segments(trainer, pl_module)
        if self.finished and self.recording.alone:
            self.recorder.clear()

    def _score(self, epoch: int) -> None:
        """Reconstruct the weights if a pruning is due, before another pruner ends the trajectory."""
        self.scores.take()
        if self.schedule.is_due(epoch):
            with self.guard.together("the Koopman reconstruction", self.recording.weights.processes) as work:
                self.scores.prepare(self.recording, epoch)
            if not work.succeeded:
                self.scores.take()

    def weights_replaced(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _hold(self, trainer, pl_module)

    def own_state(self) -> dict[str, Any]:
        return {"schedule": self.schedule.state_dict(), "method": self.method.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict:  # now, as validation and test runs do not train
            with self.guard("going on from the checkpoint's state"):
                take_up(self, state_dict)

    def restore_own(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state["schedule"])
        self.method.load_state_dict(state["method"])


def _accept(pruner: KoopmanPruner, trainer: pl.Trainer, done: Pruned) -> None:
    """Adopt what was pruned in all processes, or in none; tell all pruners which channels were removed."""
    with pruner.guard.together("accepting what was pruned", pruner.recording.weights.processes) as accepting:
        pruner.method.accept(done)
        for other in koopman_callbacks(trainer):
            if isinstance(other, KoopmanPruner) and done.removal is not None:
                other.scores.follow(done.removal)
                other.method.follow(done.removal)
    if not accepting.succeeded:
        pruner.method.give_up()


def _hold(pruner: KoopmanPruner, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Hold pruned weights at zero in all processes; or in none, and let all go on from the same weights."""
    processes = pruner.recording.weights.processes
    with pruner.guard.together("holding the pruned weights at zero", processes) as holding:
        pruner.method.hold(trainer, pl_module)
    if not holding.succeeded:
        pruner.method.give_up()
        chunks = local_chunks(outermost(trainer, pl_module)).values()
        forget(trainer.optimizers, [chunk.parameter for chunk in chunks])
        copy_replicas(chunks, processes)
