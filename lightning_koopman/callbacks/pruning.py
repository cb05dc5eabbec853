"""Prune a network while it trains."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_koopman._checks import check_count, check_positive
from lightning_koopman.callbacks.averages import averages
from lightning_koopman.callbacks.base import TrajectoryCallback, checked_prefix, draw_anew, outermost, start_segments
from lightning_koopman.callbacks.channel_rounds import ChannelRounds
from lightning_koopman.callbacks.lr_schedule import warming_up
from lightning_koopman.dmd.spectrum import PERSISTENT
from lightning_koopman.parameters.reinitialize import check_scheme, select_modules
from lightning_koopman.parameters.select import as_patterns
from lightning_koopman.parameters.sharded_modules import clean_name, local_chunks
from lightning_koopman.parameters.shards import Shards
from lightning_koopman.pruning.channel_graph import Structure
from lightning_koopman.pruning.channel_removal import ChannelRemoval, changes_table
from lightning_koopman.pruning.masks import MaskSet, check_amount
from lightning_koopman.pruning.optimizer_state import forget
from lightning_koopman.pruning.pin import Pin, takes_hooks
from lightning_koopman.pruning.prunable import prunable_parameters
from lightning_koopman.pruning.reconstruction import persistent_combination, relative_changes

if TYPE_CHECKING:
    import pytorch_lightning as pl

Round = tuple[dict[str, Any], MaskSet | None, dict[str, Tensor]]  # a row, the masks, what survivors are set to
SETTLED = "settled"
HORIZON = 10  # epochs looked ahead and back to tell whether the weights have settled
LEAST = 3  # snapshots of which a spectrum can be taken
SURVIVORS = ("keep", "reconstruction", "reinit")
COLUMNS = (
    "epoch", "step", "target", "sparsity", "pruned", "of", "parameters", "modes", "rank", "snapshots", "misfit",
    "magnitude_agreement",
)  # fmt: skip


class KoopmanPruner(TrajectoryCallback):
    """Prune weights in mid-training where the part of them that stays is small (paper, section 4).

    After ``epoch`` epochs, before the next one begins, the weights' trajectory is decomposed.  The modes whose
    eigenvalues cluster at 1, and those ranked above, make up what stays of the weights; where that is small in
    magnitude, the weights are set to zero and held there (:class:`MaskSet`) while training goes on.  What becomes of
    the survivors is the difference between the paper's two algorithms:

    - ``"keep"``: they go on from where they are (the text to Algorithm 1);
    - ``"reconstruction"``: they are set to their reconstruction (Algorithm 1 as printed);
    - ``"reinit"``: they are drawn anew, and the optimizer forgets them (Algorithm 2).

    State-dict keys do not change, and a checkpoint loaded without this library gives the sparse network.  Resumed runs
    go on with the same masks.  Every Koopman callback starts a new trajectory at a pruning.

    Zeros alone make no network faster.  With ``structured=True`` whole channels and neurons are removed instead
    (:func:`remove_channels`): layers get smaller, the optimizer keeps what it knows of the rest.  Layers that cannot
    lose channels are named when training starts; those whose outputs leave the network, attention and layer norms are
    left alone.  Checkpoints then hold the small network: this callback resumes from them, and :func:`resize_like`
    prepares a network to load one.

    Args:
        sparsity: Share of the selected weights (``structured``: of the channels) to prune, in (0, 1); or
        threshold: the paper's ε > 0: what is smaller in magnitude is pruned.
        epoch: Completed epochs after which to prune, ≥ 1, or ``"settled"``: as soon as the spectrum predicts that the
            weights will move by no more than ``settled_change`` of their norm within 10 epochs, and they moved by no
            more in the last 10; not while the learning rate is still warming up.
        survivors: ``"keep"``, ``"reconstruction"`` or ``"reinit"``.
        parameters: Shell-style patterns of the names of the parameters to prune, such as ``["*.weight", "!head.*"]``
            (default: trainable matrices and kernels; biases and norms are left alone).
        structured: Remove whole channels and neurons; needs Torch-Pruning (``lightning_koopman[structured]``), a single
            process and a sparsity.
        scope: ``"global"``: one quantile over all of them; ``"tensor"``: the share is pruned in each (default: global;
            ``structured``: tensor).
        rounds: Number of prunings, ≥ 1.  The sparsity rises as 1 − (1 − r/rounds)³ of the target, a threshold as
            r/rounds.
        round_epochs: Epochs between two rounds, ≥ 3.
        rule: ``"cluster"`` or ``"paper"``: the modes that stay, see :meth:`Spectrum.persistent`.
        radius: Radius of the cluster at 1, > 0.
        window: Snapshots that are kept and decomposed, ≥ 3, or None for all, as in the paper.
        settled_change: See ``epoch``; > 0.
        allow_empty: Whether a tensor may lose all its weights; otherwise such a pruning is refused with a warning.
        scheme: For ``"reinit"``: None for each module's own ``reset_parameters``, ``"he"``, ``"xavier"``,
            ``"orthogonal"``, or a callable that is given each module.  All trainable modules are drawn anew; with
            ``parameters`` given, those that own one of them.
        seed: Seed of that draw, ≥ 0; the run's own random state is left alone.
        every_n_steps: Optimizer steps that take the place of an epoch everywhere above, ≥ 1, for trainings of few, long
            epochs.
        dirpath: Local folder below which ``koopman_prune`` is made for the table and the snapshots that checkpoints
            refer to (default: the run's log folder).
        prefix: First part of the logged names and of that folder's; give two of them on one Trainer different ones.

    Attributes:
        masks: The :class:`MaskSet` in force, or None.
        history: List of dicts, one a pruning, with the columns of ``history.csv``: ``magnitude_agreement`` is the share
            of weights or channels on which their present magnitude would have decided alike, ``parameters`` how many
            the network has left.
        changes: With ``structured``: by module name, the constructor arguments that changed, old and new.

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
    any_window = True

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
        scheme: Callable[[nn.Module], Any] | str | None = None,
        seed: int = 0,
        every_n_steps: int | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        prefix: str = "koopman",
    ) -> None:
        scope = scope or ("tensor" if structured else "global")
        if structured and threshold is not None:
            raise ValueError(
                f"threshold={threshold} is for weights: give the share of channels to remove as `sparsity`."
            )
        if structured and allow_empty:
            raise ValueError("allow_empty=True is for masks: with structured=True each layer keeps a channel.")
        check_amount(sparsity, threshold, scope)
        if epoch != SETTLED:
            if isinstance(epoch, str):
                raise ValueError(f"epoch must be a number of completed epochs or 'settled', got {epoch!r}.")
            check_count("epoch", epoch, 1)
        check_count("rounds", rounds, 1)
        check_count("round_epochs", round_epochs, LEAST)
        check_count("seed", seed, 0)
        check_positive("radius", radius)
        check_positive("settled_change", settled_change)
        for name, value, known in (("survivors", survivors, SURVIVORS), ("rule", rule, PERSISTENT)):
            if value not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {value!r}.")
        check_scheme(scheme)
        if scheme is not None and survivors != "reinit":
            raise ValueError(f"scheme={scheme!r} goes with survivors='reinit', got survivors={survivors!r}: drop it.")
        if epoch == SETTLED and window is not None and window <= HORIZON:
            raise ValueError(f"window must be at least {HORIZON + 1} with epoch='settled', got {window}.")
        super().__init__(
            window=window,
            every_n_steps=every_n_steps,
            dirpath=dirpath,
        )
        self.sparsity, self.threshold, self.epoch, self.survivors = sparsity, threshold, epoch, survivors
        self.parameters = as_patterns(parameters)
        self.scope, self.rounds, self.round_epochs, self.rule, self.radius = scope, rounds, round_epochs, rule, radius
        self.settled_change, self.allow_empty, self.scheme, self.seed = settled_change, allow_empty, scheme, seed
        self.prefix = checked_prefix(prefix)
        self.folder = f"{self.prefix}_prune"
        self._channels = ChannelRounds(self.parameters, scope) if structured else None
        self._loading: Any = None
        self._pin: Pin | None = None
        self._quiet = False  # gradients come without a hook being called
        self._unhooked = False  # an optimizer does not tell when it has stepped
        self._selected: list[str] = []
        self._redrawn: list[str] = []
        self._forget()

    def _forget(self) -> None:
        self.history = []
        self.masks: MaskSet | None = None
        if self._channels is not None:
            self._channels.restart()
        self._attempted = 0  # rounds, those that were refused too
        self._last_round: int | None = None  # completed epochs
        self._settled_at: int | None = None  # completed epochs
        self._changes = (math.nan, math.nan)
        self._ready: tuple[dict[str, Tensor], dict[str, Any]] | None = None  # scores and where they come from
        self._highest_rate = 0.0

    @property
    def state_key(self) -> str:
        return self._generate_state_key(prefix=self.prefix)  # a resumed run may be given other options

    @property
    def achieved(self) -> float:
        """Share of the selected weights, or of the channels, that is pruned now, in [0, 1]."""
        if self._channels is not None:
            return self._channels.share
        return 0.0 if self.masks is None else self.masks.sparsity

    @property
    def changes(self) -> dict[str, dict[str, tuple[Any, Any]]]:
        return {} if self._channels is None else self._channels.changes

    def table(self, module: nn.Module | None = None) -> str:
        """The sparsity of each pruned tensor and overall, or the layers that got smaller, as a table.

        Args:
            module: The network; its total then counts the parameters that are left alone too.
        """
        if self.changes:
            return changes_table(self.changes)
        return "nothing has been pruned yet" if self.masks is None else self.masks.table(module)

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._check_prefix(trainer)
            self._check_epoch(trainer)
            if self._channels is not None:
                self._channels.check_run(trainer, pl_module)
        super().setup(trainer, pl_module, stage)
        if self._channels is not None:
            self._loading = self._channels.load_smaller(pl_module)  # Lightning loads the weights before our state

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._stop_loading()
        root = outermost(trainer, pl_module)
        chosen = prunable_parameters(root, self.parameters)
        if not self._active:
            return
        if self.parameters is None:  # others, such as a teacher's or an average's, are not trained
            stepped = {
                id(each) for stepper in trainer.optimizers for group in stepper.param_groups for each in group["params"]
            }
            chosen = {name: each for name, each in chosen.items() if id(each) in stepped} or chosen
        self._selected = list(chosen)
        if self._channels is None and self.scope == "tensor" and self.sparsity is not None and not self.allow_empty:
            chunks = local_chunks(root)
            for name in chosen:
                if round(self.sparsity * chunks[name].numel) == chunks[name].numel:
                    raise ValueError(
                        f"sparsity={self.sparsity} prunes all {chunks[name].numel} weights of {name!r} "
                        "(scope='tensor'): exclude it from `parameters` with '!', or set allow_empty=True."
                    )
        if self.survivors == "reinit":
            owned = {id(parameter) for parameter in chosen.values()}
            owners = [
                clean_name(name)
                for name, module in pl_module.named_modules()
                if any(id(parameter) in owned for parameter in module.parameters(recurse=False))
            ]
            self._redrawn = list(select_modules(pl_module, owners if self.parameters else None, self.scheme))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._active and not self._pending and (trainer.current_epoch == 0 or trainer.ckpt_path is not None):
            self._forget()  # before the first snapshot is taken, which depends on it
        super().on_train_start(trainer, pl_module)
        if self._active:
            self.weights_replaced(trainer, pl_module)
            self._prepare(self._rounds)

    def on_round_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_round_start(trainer, pl_module)
        if self._pin is not None and not self._pin.holds(outermost(trainer, pl_module), self._stepping(trainer)):
            self.weights_replaced(trainer, pl_module)
        if self._channels is None and self._is_due:
            self._prune(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._active or self._finished:
            return
        if self._channels is not None and self._channels.refused is None:
            self._say_what_can_go(self._channels.try_out(trainer, pl_module, batch, batch_idx))
        # channels not before, as tracing takes a batch; masks only where a resumed epoch had begun already
        if self._is_due:
            self._prune(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._pin is not None and self._quiet:
            self._pin.clear_gradients()

    def after_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._pin is not None and self._unhooked:
            self._pin.clear()

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        super().on_round_end(trainer, pl_module, epoch)
        self._reapply()
        self._log(trainer, pl_module, {"sparsity": self.achieved})

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reapply()  # averages of the weights may have been written over them

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reapply()
        if self._active and self._attempted < self.rounds:
            due = self._next_due
            why = "" if due is None else f"round {self._attempted + 1} of {self.rounds} was due after {self._when(due)}"
            if due is None:
                ahead, past = self._changes
                why = (
                    f"epoch='settled' waited for changes of at most {self.settled_change:.1%} within "
                    f"{self._span(HORIZON)}, "
                    f"the last were {ahead:.1%} (predicted) and {past:.1%} (past)"
                )
            self._warn("unpruned", f"training ended after {self._when(self._rounds)} at {self.achieved:.0%}: {why}.")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()  # Lightning then leaves `teardown` out
        self._stop_loading()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()
        self._stop_loading()

    def on_snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        if self.epoch == SETTLED and self._settled_at is None:
            settled = False
            if self._zero and recorded:
                with self._guard("telling whether the weights have settled"):
                    settled = self._has_settled(trainer)
            if trainer.strategy.broadcast(settled):
                self._settled_at = epoch
        self._prepare(epoch)

    @property
    def _next_due(self) -> int | None:
        """Completed epochs after which the next round is due, if that is known."""
        if self._finished:
            return None
        if self._last_round is not None:
            return self._last_round + self.round_epochs
        return self._settled_at if self.epoch == SETTLED else int(self.epoch)

    @property
    def _is_due(self) -> bool:
        due = self._next_due
        return self._active and due is not None and self._rounds >= due

    @property
    def _finished(self) -> bool:
        return self._attempted >= self.rounds

    def _due_at(self, epoch: int) -> bool:
        due, window = self._next_due, self.settings.window
        too_early = due is not None and window is not None and epoch <= due - window and self._alone
        return super()._due_at(epoch) and not too_early

    # -- what ---------------------------------------------------------------------------------------------------------

    def _has_settled(self, trainer: pl.Trainer) -> bool:
        trajectory = self.recorder.trajectory
        self._highest_rate = max([self._highest_rate, *self.rates])
        if trajectory is None or len(trajectory) <= HORIZON:
            return False
        self._changes = relative_changes(trajectory.factor(last=HORIZON + 1), HORIZON)
        return max(self._changes) <= self.settled_change and not warming_up(
            trainer, [self._highest_rate], self.settings.every_n_steps
        )

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None, batch_idx: int = 0) -> None:
        """Prune once; all ranks decide together, each about its own part of the weights."""
        done = None
        with self._guard(f"pruning (round {self._attempted + 1})"):
            if self._channels is None:
                done = self._mask(trainer, pl_module)
            else:
                done = self._remove(trainer, pl_module, self._channels, batch, batch_idx)
        done = self._agreed(done)
        self._attempted += 1
        self._last_round = self._rounds
        if done is None:
            return
        row, masks, values = done
        self.history.append(row)
        self.masks = masks
        if self.survivors == "reinit":
            with self._guard("drawing the survivors anew"):
                self._redraw(trainer, pl_module)
        if values:
            with self._guard("setting the survivors"):
                self._set(self._own_parts(trainer, pl_module), values)
        if self._zero:
            self._write_history()
            self._report(trainer)
        start_segments(trainer, pl_module)
        if self._finished and self._alone:
            self.recorder.clear()

    def _agreed(self, done: Round | None) -> Round | None:
        """What was found, if no process failed to find it."""
        return done if self._processes.all_agree(done is not None) else None

    def _redraw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the survivors anew, or leave everything as it was where that fails."""
        held = [chunk.tensor.detach() for chunk in local_chunks(outermost(trainer, pl_module)).values()]
        before = [(tensor, tensor.clone()) for tensor in (*held, *pl_module.buffers())]
        try:
            draw_anew(trainer, pl_module, self._redrawn, self.scheme, self.seed + self._attempted)
        except Exception:
            for tensor, value in before:
                tensor.copy_(value)
            raise
        modules = {clean_name(name): module for name, module in pl_module.named_modules()}
        redrawn = [modules[name] for name in self._redrawn]
        forget(trainer.optimizers, [each for module in redrawn for each in module.parameters(recurse=False)])
        for average in averages(trainer):  # what it holds was trained from other weights
            fresh = dict(pl_module.named_parameters())
            for name, parameter in getattr(average, "module", average).named_parameters():
                parameter.data.copy_(fresh[name].data)
            counter = getattr(average, "n_averaged", None)
            if isinstance(counter, Tensor):
                counter.zero_()

    @property
    def _target(self) -> float:
        """Sparsity or threshold of the next round."""
        done = (self._attempted + 1) / self.rounds
        if self.threshold is not None:
            return self.threshold * done
        assert self.sparsity is not None
        return self.sparsity * (1 - (1 - done) ** 3)

    def _mask(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Round:
        """Choose masks by what stays of the weights."""
        shards = self._own_parts(trainer, pl_module)
        everything, about = self._decisive({name: part.values for name, part in shards.items()})
        scores = {name: everything[name] for name in self._selected}
        present = {name: shards[name].values for name in self._selected}
        sparsity, threshold = (self._target, None) if self.threshold is None else (None, self._target)

        def choose(by: Mapping[str, Tensor], *, empty: bool) -> MaskSet:
            return MaskSet.from_scores(
                by, sparsity=sparsity, threshold=threshold, scope=self.scope, within=self.masks, allow_empty=empty,
                shards=shards,
            )  # fmt: skip

        masks = choose(scores, empty=self.allow_empty)
        agreement = masks.agreement(choose(present, empty=True))
        total = sum(chunk.numel for chunk in local_chunks(outermost(trainer, pl_module)).values())
        row = self._row(trainer, masks.pruned, masks.numel, total - masks.pruned, about, agreement)
        return row, masks, scores if self.survivors == "reconstruction" else {}

    def _remove(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        channels: ChannelRounds,
        batch: Any,
        batch_idx: int,
    ) -> Round:
        """Remove channels."""
        shapes = {name: chunk.shape for name, chunk in local_chunks(pl_module).items()}
        parts = self._own_parts(trainer, pl_module)
        flat, about = self._decisive({name: part.values for name, part in parts.items()})
        scores = {name: value.reshape(shapes[name]) for name, value in flat.items()}
        agreement = channels.remove(trainer, pl_module, batch, batch_idx, scores=scores, sparsity=self._target)
        removal = channels.last
        assert removal is not None
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, KoopmanPruner):
                other._follow(removal)
        values = {}
        if self.survivors == "reconstruction":
            values = {name: removal.left_of(name, scores[name]).reshape(-1) for name in self._selected}
        left = sum(parameter.numel() for parameter in pl_module.parameters())
        row = self._row(trainer, channels.removed, sum(channels.originals.values()), left, about, agreement)
        return row, self.masks, values

    def _follow(self, removal: ChannelRemoval) -> None:
        """Let go of what belongs to channels that are gone, whoever removed them."""
        if self._ready is not None:
            scores, about = self._ready
            self._ready = {name: removal.left_of(name, value).reshape(-1) for name, value in scores.items()}, about
        if self.masks is not None:
            self._release()
            self.masks = MaskSet({name: removal.left_of(name, mask) for name, mask in self.masks.items()})

    def _row(
        self, trainer: pl.Trainer, pruned: int, of: int, left: int, about: Mapping[str, Any], agreement: float
    ) -> dict[str, Any]:
        row = {
            "epoch": self._rounds,
            "step": trainer.global_step,
            "target": self._target,
            "sparsity": pruned / of,
            "pruned": pruned,
            "of": of,
            "parameters": left,
            **about,
            "magnitude_agreement": agreement,
        }
        return {column: row[column] for column in COLUMNS}

    @staticmethod
    def _set(shards: Shards, values: Mapping[str, Tensor]) -> None:
        """Set weights to values given for each process's own part."""
        for name, value in values.items():
            tensor = shards.chunks[name].tensor.detach()
            tensor.copy_(shards.complete(name, value).reshape(tensor.shape))

    def _prepare(self, epoch: int) -> None:
        """Reconstruct the weights if a pruning follows, before another callback that prunes ends the trajectory."""
        self._ready = None
        due = self._next_due
        if due is None or epoch < due:
            return
        trajectory, last = self.recorder.trajectory, self.settings.window
        count = 0 if trajectory is None else min(len(trajectory), last or len(trajectory))
        chosen, about = np.zeros(0 if trajectory is None else len(trajectory)), np.zeros(4)
        if self._zero:
            with self._guard("the Koopman reconstruction"):
                if trajectory is None or count < LEAST or self.recorder.newest != epoch:
                    raise ValueError(f"{count} snapshots are too few: the weights' present magnitudes decide instead.")
                chosen, kept = persistent_combination(trajectory, last=last, radius=self.radius, rule=self.rule)
                about = np.array([1, kept.modes.sum(), kept.spectrum.rank, kept.spectrum.misfit])
        told = self._processes.all_sum(np.concatenate([about, chosen]))  # one process has decided
        if not told[0]:
            return
        found = None
        with self._guard("the Koopman reconstruction"):
            assert trajectory is not None
            assert self._shards is not None
            scores = self._shards.split(trajectory.combine(told[4:]))
            found = scores, {"modes": int(told[1]), "rank": int(told[2]), "misfit": float(told[3]), "snapshots": count}
        if self._processes.all_agree(found is not None):  # else magnitudes decide everywhere
            self._ready = found

    def _decisive(self, present: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What stays of the own weights and what it was computed from; where that failed, their present values."""
        ready, self._ready = self._ready, None
        return ready or (present, {"modes": 0, "rank": 0, "misfit": math.nan, "snapshots": 0})

    def weights_replaced(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the pruned weights to zero and keep them there, in averages of the weights too."""
        self._release()
        if self.masks is None:
            return
        with self._guard("holding the masks"):
            hooked, root = self._stepping(trainer), outermost(trainer, pl_module)
            self._pin = self.masks.pin(root, *hooked)
            self._quiet = root is not pl_module  # FSDP's gradients come without a hook being called
            self._unhooked = len(hooked) < len(trainer.optimizers)
            for average in averages(trainer):
                self.masks.apply(getattr(average, "module", average))

    @staticmethod
    def _stepping(trainer: pl.Trainer) -> list[torch.optim.Optimizer]:
        """The optimizers that tell when they have stepped."""
        return [optimizer for optimizer in trainer.optimizers if takes_hooks(optimizer)]

    def _release(self) -> None:
        if self._pin is not None:
            self._pin.remove()
            self._pin = None

    def _reapply(self) -> None:
        if self._pin is not None:
            with self._guard("applying the masks again"):
                self._pin.clear()

    def _stop_loading(self) -> None:
        if self._loading is not None:
            self._loading.remove()
            self._loading = None

    def _say_what_can_go(self, structure: Structure) -> None:
        channels = self._channels
        assert channels is not None
        assert channels.refused is not None
        reasons = {**structure.left_alone, **channels.refused}
        alone = "; ".join(f"{name} ({reason})" for name, reason in reasons.items()) or "no layer"
        rank_zero_info(
            f"{type(self).__name__}: {sum(channels.originals.values()):,} channels and neurons of "
            f"{len(channels.originals)} independent groups can be removed. Left alone: {alone}."
        )

    def _report(self, trainer: pl.Trainer) -> None:
        row = self.history[-1]
        rank_zero_info(
            f"{type(self).__name__}: after epoch {row['epoch']} pruned {row['pruned']:,} of {row['of']:,} "
            f"{'weights' if self._channels is None else 'channels'} ({row['sparsity']:.1%}), by {row['modes']} of "
            f"{row['rank']} modes of {row['snapshots']} snapshots; {row['magnitude_agreement']:.1%} agree with pruning "
            f"by magnitude. {row['parameters']:,} parameters are left."
        )
        if self.masks is None:
            return
        scalars = {f"{self.prefix}/sparsity/{each['parameter']}": each["sparsity"] for each in self.masks.rows()}
        for logger in trainer.loggers:
            with self._guard("logging the sparsity"):
                logger.log_metrics(scalars, step=trainer.global_step)

    def _mend(self, in_memory: bool) -> str:
        return "take a smaller window"

    # -- checks before training ---------------------------------------------------------------------------------------

    def _check_epoch(self, trainer: pl.Trainer) -> None:
        every = self.settings.every_n_steps
        end, name = trainer.max_epochs, "max_epochs"
        if every is not None:
            end, name = trainer.max_steps // every if trainer.max_steps > 0 else None, f"max_steps/{every}"
        if trainer.fast_dev_run or end is None or end < 0:  # type: ignore[attr-defined]
            return
        if self.epoch == SETTLED:
            if end <= HORIZON + (self.rounds - 1) * self.round_epochs:
                raise ValueError(
                    f"epoch='settled' looks {HORIZON} epochs back, but {name}={end}"
                    f"{f' with rounds={self.rounds}' if self.rounds > 1 else ''}: give a number, or train longer."
                )
            return
        last = int(self.epoch) + (self.rounds - 1) * self.round_epochs
        if last >= end:
            rounds = f" with rounds={self.rounds}, the last after epoch {last}," if self.rounds > 1 else ""
            raise ValueError(f"epoch={self.epoch}{rounds} must be below {name}={end}: the pruned network has to train.")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if state:
            state |= {
                "attempted": self._attempted,
                "last_round": self._last_round,
                "settled_at": self._settled_at,
                "highest_rate": self._highest_rate,
                "masks": None if self.masks is None else self.masks.state_dict(),
                "channels": None if self._channels is None else self._channels.state_dict(),
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict:  # at once: not every run trains
            self._restore_state(state_dict)

    def _restore_state(self, state: dict[str, Any]) -> None:
        super()._restore_state(state)
        self._attempted, self._last_round = state["attempted"], state["last_round"]
        self._settled_at, self._highest_rate = state["settled_at"], state["highest_rate"]
        self.masks = None if state["masks"] is None else MaskSet.from_state_dict(state["masks"])
        if self._channels is not None and state["channels"] is not None:
            self._channels.load_state_dict(state["channels"])
