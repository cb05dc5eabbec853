"""Pruning by masks, and the interface of both pruning methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
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

COLUMNS = (
    "epoch", "step", "target", "sparsity", "pruned", "of", "parameters", "modes", "rank", "snapshots", "misfit",
    "magnitude_agreement",
)  # fmt: skip


WATCHED = 8  # batches checked for moved weights: a check is a pass over the weights and a device sync


@dataclass(frozen=True)
class Pruned:
    """Result of one pruning.

    In total, ``pruned`` of ``of`` weights or channels are pruned, and the network has ``left`` parameters.
    ``agreement`` is the share on which magnitude pruning would have decided the same; ``values`` are this process's
    scores without removed channels; ``masks`` or ``removal`` describe what was pruned.
    """

    pruned: int
    of: int
    left: int
    agreement: float
    values: dict[str, Tensor] = field(default_factory=dict)
    masks: MaskSet | None = None
    removal: ChannelRemoval | None = None

    def row(self, epoch: int, step: int, target: float, about: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row of the history; ``about`` describes the scores."""
        return {
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

    def told(self, row: Mapping[str, Any], unit: str, when: str) -> str:
        """Describe a row in words."""
        return (
            f"pruned {self.pruned:,} of {self.of:,} {unit} ({row['sparsity']:.1%}) after {when}, by "
            f"{row['modes']} of {row['rank']} Koopman modes of {row['snapshots']} snapshots. Magnitude pruning agrees "
            f"on {self.agreement:.1%}. {self.left:,} parameters remain."
        )


class PruningMethod:
    """A way to prune a network: by masks, or by removing channels. It ignores what it does not override."""

    def check_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise ValueError if the method cannot work in this run."""

    def prepare(self, pl_module: pl.LightningModule) -> None:
        """Prepare the module to load a checkpoint of a pruned one."""

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Inspect the first batch before it is trained on."""

    def accept(self, pruned: Pruned) -> None:
        """Adopt what was pruned once it has succeeded in all processes."""

    def hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hold pruned weights at zero from now on; called when training starts and after weights were replaced."""

    def give_up(self) -> None:
        """Hold nothing any more, since a process cannot."""

    def again(self, trainer: pl.Trainer, pl_module: pl.LightningModule, when: str) -> None:
        """Set pruned weights back to zero; ``when`` is ``"round"``, ``"batch"``, ``"step"`` or ``"always"``."""

    def follow(self, removal: ChannelRemoval) -> None:
        """Discard state of removed channels, whichever callback removed them."""

    def log(self, trainer: pl.Trainer, prefix: str) -> None:
        """Log the sparsity of each tensor."""


class MaskRounds(PruningMethod):
    """Pruning by masks: each round keeps the masks of earlier rounds.

    Targets are sparsities or, if ``by_threshold``, thresholds. If ``allow_empty``, a tensor may lose all its weights.
    """

    unit = "weights"
    needs_batch = False  # pruning runs before the first batch

    def __init__(self, scope: str, *, by_threshold: bool, allow_empty: bool, guard: Guard) -> None:
        self.scope, self.by_threshold, self.allow_empty, self._guard = scope, by_threshold, allow_empty, guard
        self._names: list[str] = []
        self._pin: Pin | None = None
        self._quiet = False  # gradients are set without calling hooks
        self._unseen = 0  # batches left to check for moved weights
        self.forget()

    def __getstate__(self) -> dict[str, Any]:  # a copy gets no hooks: they belong to this module
        return {**vars(self), "_pin": None}

    def forget(self) -> None:
        self.masks: MaskSet | None = None

    @property
    def share(self) -> float:
        """Share of the selected weights pruned so far."""
        return 0.0 if self.masks is None else self.masks.sparsity

    def table(self, module: nn.Module | None) -> str:
        return "nothing has been pruned yet" if self.masks is None else self.masks.table(module)

    def log(self, trainer: pl.Trainer, prefix: str) -> None:
        rows = [] if self.masks is None else self.masks.rows()
        scalars = {f"{prefix}/sparsity/{row['parameter']}": row["sparsity"] for row in rows}
        give(trainer, scalars)

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
        amount: dict[str, Any] = {"threshold" if self.by_threshold else "sparsity": target}
        return MaskSet.from_scores(weights, **amount, scope=self.scope, allow_empty=self.allow_empty)

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

    def hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.release()
        if self.masks is None:
            return
        hooked, root = _stepping(trainer), outermost(trainer, pl_module)
        self._pin = self.masks.pin(root, *hooked, on_error=self._failed)
        self._quiet = root is not pl_module  # FSDP sets gradients without calling hooks
        self._unseen = WATCHED
        for average in averages(trainer):
            self.masks.apply(getattr(average, "module", average))

    def give_up(self) -> None:
        self.release()
        self.masks = None

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
                    "pruned weights were moved, and set back to zero after the batch. Within the batch the network was "
                    "not the pruned one: update weights only by `step` of the optimizers from "
                    "`configure_optimizers`.",
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
    """Return the optimizers that support step hooks."""
    return [optimizer for optimizer in trainer.optimizers if takes_hooks(optimizer)]
