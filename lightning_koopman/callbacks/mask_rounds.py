"""Rounds of pruning by masks, and what both methods of pruning have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lightning_koopman.callbacks.averages import averages
from lightning_koopman.callbacks.guard import Guard
from lightning_koopman.callbacks.observables import outermost
from lightning_koopman.callbacks.scalars import give
from lightning_koopman.parameters.sharded_modules import local_chunks
from lightning_koopman.parameters.shards import Shards
from lightning_koopman.pruning.channel_removal import ChannelRemoval
from lightning_koopman.pruning.masks import MaskSet
from lightning_koopman.pruning.pin import Pin, takes_hooks
from lightning_koopman.pruning.prunable import prunable_parameters

if TYPE_CHECKING:
    import pytorch_lightning as pl


COLUMNS = (
    "epoch", "step", "target", "sparsity", "pruned", "of", "parameters", "modes", "rank", "snapshots", "misfit",
    "magnitude_agreement",
)  # fmt: skip


WATCHED = 8  # batches: looking costs a pass over the weights, and on an accelerator a wait


@dataclass(frozen=True)
class Pruned:
    """What one pruning did: of ``of`` weights or channels ``pruned`` are gone in all, the network has ``left``.

    ``agreement`` is the share on which present magnitudes would have decided alike; ``values`` are what stays of the
    scores of this process's part; ``masks`` or ``removal`` say what went.
    """

    pruned: int
    of: int
    left: int
    agreement: float
    values: dict[str, Tensor] = field(default_factory=dict)
    masks: MaskSet | None = None
    removal: ChannelRemoval | None = None

    def row(self, epoch: int, step: int, target: float, about: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the history; ``about`` says what the scores come from."""
        row = {
            "epoch": epoch,
            "step": step,
            "target": target,
            "sparsity": self.pruned / max(1, self.of),
            "pruned": self.pruned,
            "of": self.of,
            "parameters": self.left,
            **about,
            "magnitude_agreement": self.agreement,
        }
        return {column: row[column] for column in COLUMNS}

    def told(self, row: Mapping[str, Any], unit: str) -> str:
        """A row in plain words."""
        return (
            f"after epoch {row['epoch']} pruned {self.pruned:,} of {self.of:,} {unit} ({row['sparsity']:.1%}), by "
            f"{row['modes']} of {row['rank']} modes of {row['snapshots']} snapshots; {self.agreement:.1%} agree with "
            f"pruning by magnitude. {self.left:,} parameters are left."
        )


class PruningMethod(Protocol):
    """How a network is pruned: by masks, or by removing channels."""

    unit: str
    needs_batch: bool  # whether it prunes with a batch at hand, or before the first one

    @property
    def share(self) -> float:
        """Share that is pruned now, in [0, 1]."""

    def check_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise ValueError for a run in which it cannot work."""

    def prepare(self, pl_module: pl.LightningModule) -> None:
        """Get the module ready for a checkpoint of a pruned one."""

    def check_selected(self, root: nn.Module, names: Sequence[str], sparsity: float | None) -> None:
        """Raise ValueError where the parameters of these names cannot be pruned."""

    def preview(
        self, pl_module: pl.LightningModule, batch: Any, parameters: Sequence[str] | None, target: float
    ) -> MaskSet | ChannelRemoval:
        """What a pruning by the present weights would do."""

    def prune(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, shards: Shards, scores: dict[str, Tensor],
        target: float, batch: Any, batch_idx: int,
    ) -> Pruned:  # fmt: skip
        """Prune once, where the scores of this process's part are small in magnitude."""

    def accept(self, pruned: Pruned) -> None:
        """Take over what :meth:`prune` did, once it has succeeded in all processes."""

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the first batch."""

    def hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep pruned weights at zero, after they were set or training started."""

    def again(self, trainer: pl.Trainer, pl_module: pl.LightningModule, when: str) -> None:
        """Set pruned weights to zero again, ``"round"``, ``"batch"``, ``"step"`` or ``"always"``."""

    def release(self) -> None:
        """Let go of the module."""

    def follow(self, removal: ChannelRemoval) -> None:
        """Let go of what belongs to channels that are gone, whoever removed them."""

    def table(self, module: nn.Module | None) -> str:
        """What was pruned, as a table."""

    def log(self, trainer: pl.Trainer, prefix: str) -> None:
        """Give loggers what was pruned of each tensor."""

    def forget(self) -> None:
        """Begin as for a first fit."""

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint needs."""

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint."""


class MaskRounds:
    """Prunes by masks, each within those of the rounds before.

    Args:
        scope: As for :meth:`MaskSet.from_scores`.
        by_threshold: Whether the target is a threshold, not a sparsity.
        allow_empty: Whether a tensor may lose all its weights.
        guard: The callback's.
    """

    unit = "weights"
    needs_batch = False

    def __init__(self, scope: str, *, by_threshold: bool, allow_empty: bool, guard: Guard) -> None:
        self.scope, self.by_threshold, self.allow_empty, self._guard = scope, by_threshold, allow_empty, guard
        self._names: list[str] = []
        self._pin: Pin | None = None
        self._quiet = False  # gradients come without a hook being called
        self._unseen = 0  # batches after which it is yet to be seen whether pruned weights were moved
        self.forget()

    def __getstate__(self) -> dict[str, Any]:  # hooks belong to this module
        return {**vars(self), "_pin": None}

    def forget(self) -> None:
        self.masks: MaskSet | None = None

    @property
    def share(self) -> float:
        """Share of the selected weights that is pruned now."""
        return 0.0 if self.masks is None else self.masks.sparsity

    def table(self, module: nn.Module | None) -> str:
        return "nothing has been pruned yet" if self.masks is None else self.masks.table(module)

    def log(self, trainer: pl.Trainer, prefix: str) -> None:
        rows = [] if self.masks is None else self.masks.rows()
        scalars = {f"{prefix}/sparsity/{row['parameter']}": row["sparsity"] for row in rows}
        give(trainer, scalars)

    def check_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Any run will do."""

    def prepare(self, pl_module: pl.LightningModule) -> None:
        """Masks change no shape."""

    def check_selected(self, root: nn.Module, names: Sequence[str], sparsity: float | None) -> None:
        self._names = list(names)
        if self.scope != "tensor" or sparsity is None or self.allow_empty:
            return
        chunks = local_chunks(root)
        for name in names:
            if round(sparsity * chunks[name].numel) == chunks[name].numel:
                raise ValueError(
                    f"sparsity={sparsity} prunes all {chunks[name].numel} weights of {name!r} (scope='tensor'): "
                    "exclude it from `parameters` with '!', or set allow_empty=True."
                )

    def preview(
        self, pl_module: pl.LightningModule, batch: Any, parameters: Sequence[str] | None, target: float
    ) -> MaskSet:
        weights = prunable_parameters(pl_module, parameters)
        sparsity, threshold = (None, target) if self.by_threshold else (target, None)
        return MaskSet.from_scores(
            weights, sparsity=sparsity, threshold=threshold, scope=self.scope, allow_empty=self.allow_empty
        )

    def prune(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, shards: Shards, scores: dict[str, Tensor],
        target: float, batch: Any, batch_idx: int,
    ) -> Pruned:  # fmt: skip
        amount = {"threshold" if self.by_threshold else "sparsity": target}

        def choose(by: Mapping[str, Tensor], *, empty: bool) -> MaskSet:
            return MaskSet.from_scores(
                {name: by[name] for name in self._names},
                **amount,
                scope=self.scope,
                within=self.masks,
                allow_empty=empty,
                shards=shards,
            )

        masks = choose(scores, empty=self.allow_empty)
        agreement = masks.agreement(choose({name: part.values for name, part in shards.items()}, empty=True))
        total = sum(chunk.numel for chunk in local_chunks(outermost(trainer, pl_module)).values())
        kept = {name: scores[name] for name in self._names}
        return Pruned(masks.pruned, masks.numel, total - masks.pruned, agreement, kept, masks)

    def accept(self, pruned: Pruned) -> None:
        self.masks = pruned.masks

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Masks need no batch."""

    def hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.release()
        if self.masks is None:
            return
        hooked, root = _stepping(trainer), outermost(trainer, pl_module)
        self._pin = self.masks.pin(root, *hooked, on_error=self._failed)
        self._quiet = root is not pl_module  # FSDP's gradients come without a hook being called
        self._unseen = WATCHED
        for average in averages(trainer):
            self.masks.apply(getattr(average, "module", average))

    def _failed(self, error: Exception) -> None:
        with self._guard("keeping pruned weights at zero"):
            raise error

    def again(self, trainer: pl.Trainer, pl_module: pl.LightningModule, when: str) -> None:
        if self._pin is None:
            return
        if when == "round" and not self._pin.holds(outermost(trainer, pl_module), _stepping(trainer)):
            self.hold(trainer, pl_module)
        elif when == "step" and self._quiet:
            self._pin.clear_gradients()
        elif when in ("batch", "always"):
            if self._unseen and self._pin.moved():
                self._guard.warn(
                    "moved",
                    "pruned weights were moved, and set to zero again after the batch: something steps that is no "
                    "optimizer of `configure_optimizers`, or not by its `step`. What it computed with those weights "
                    "within the batch was not of the pruned network.",
                )
            self._unseen = max(0, self._unseen - 1)
            self._pin.clear()

    def release(self) -> None:
        if self._pin is not None:
            self._pin.remove()
            self._pin = None

    def follow(self, removal: ChannelRemoval) -> None:
        if self.masks is not None:
            self.release()
            self.masks = MaskSet({name: removal.left_of(name, mask) for name, mask in self.masks.items()})

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.masks is None else self.masks.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.masks = None if state is None else MaskSet.from_state_dict(state)


def _stepping(trainer: pl.Trainer) -> list[torch.optim.Optimizer]:
    """The optimizers that tell when they have stepped."""
    return [optimizer for optimizer in trainer.optimizers if takes_hooks(optimizer)]
