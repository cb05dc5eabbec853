"""A few training batches, held to compare weights and to re-estimate batch statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from tqdm import tqdm

from lightning_koopman._types import Array
from lightning_koopman.callbacks.dry_run import NoLossError, can_dry_run, dry_run, quiet_copy
from lightning_koopman.callbacks.observables import outermost
from lightning_koopman.parameters.process_group import Processes
from lightning_koopman.parameters.sharded_modules import clean_name, is_kind, is_sharded, local_chunks

SCORED = 4  # batches to compare losses on
MOST = 2**29  # bytes of batches to hold; two are held in any case
LATE = 3.0  # seconds after which progress is shown
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class TrainingBatches:
    """Copies of the first ``count`` batches of each interval, in main memory."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_held": [], "_bytes": 0}

    def clear(self) -> None:
        """Forget the batches."""
        self._held: list[tuple[Any, int]] = []
        self._next = self._bytes = 0
        self.norms: tuple[str, ...] = ()  # names of the layers whose batch statistics are in use

    def begin(self) -> None:
        """Start an interval, whose batches replace those held."""
        self._next = 0

    def add(self, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Hold a batch if it is one of the first."""
        if self._next >= self.count:
            return
        if self._next == 0:
            self.norms = tuple(name for name, layer in module.named_modules() if _has_statistics(layer))
            self._bytes = 0
        if not can_dry_run(module) or self._next >= (self.count if self.norms else SCORED):
            self._next = self.count
            return
        copied = apply_to_collection(batch, Tensor, lambda each: each.detach().to("cpu", copy=True), allow_frozen=True)
        sizes: list[int] = []
        apply_to_collection(copied, Tensor, lambda each: sizes.append(each.numel() * each.element_size()))
        self._bytes += sum(sizes)
        if self._next >= 2 and self._bytes > MOST:
            self._next = self.count
            return
        self._held[self._next : self._next + 1] = [(copied, batch_idx)]
        self._next += 1

    def trial(self, trainer: pl.Trainer, module: pl.LightningModule, processes: Processes) -> Trial | None:
        """Return a :class:`Trial` if all processes can run one, else None; call on all processes together."""
        cannot = not self._held or not can_dry_run(module) or is_sharded(outermost(trainer, module))
        if processes.any(cannot):
            return None
        least = int(processes.table(np.array([float(len(self._held))])).min())  # equal counts: layers may communicate
        return Trial(trainer, module, processes, self._held[:least], self.norms)


class Trial:
    """A copy of a module for trying out weights.  Nothing is logged, and the run is not affected.

    Losses are those of ``training_step`` in evaluation mode, but with the statistics of each batch, because running
    statistics belong to other weights.  All weights are tried with the same random numbers.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        processes: Processes,
        batches: list[tuple[Any, int]],
        norms: tuple[str, ...],
    ) -> None:
        self._trainer, self._module, self._processes, self._batches = trainer, module, processes, batches
        self._copy = quiet_copy(module)
        self._chunks = local_chunks(self._copy)
        layers = {clean_name(name): layer for name, layer in self._copy.named_modules()}
        self._norms: dict[str, Any] = {name: layers[clean_name(name)] for name in norms}
        self._copy.eval()
        for layer in self._norms.values():
            layer.train()
            layer.momentum = None  # mean over all batches, not a moving one
        self._graph = False  # whether `training_step` itself needs gradients

    @torch.no_grad()
    def set(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into the module, by name."""
        for name, value in weights.items():
            tensor = self._chunks[name].tensor.detach()
            tensor.copy_(value.reshape(tensor.shape))

    def losses(self) -> Array:
        """Return the losses (batches,) of the first batches held in all processes; NaN if there is none."""
        held = self._batches[:SCORED]
        own = [self._loss(batch, index) for batch, index in held] + [float("nan")] * (SCORED - len(held))
        return self._processes.table(np.array(own)).reshape(-1)

    def statistics(self, *, shown: bool) -> dict[str, Tensor]:
        """Return the batch statistics over all batches held, by buffer name, in main memory."""
        for layer in self._norms.values():
            layer.reset_running_stats()
        bar = tqdm(self._batches, desc="Batch statistics", unit="batch", delay=LATE, leave=False, disable=not shown)
        for batch, index in bar:
            self._loss(batch, index)
        found: dict[str, Tensor] = {}
        for name, layer in self._norms.items():
            if not layer.num_batches_tracked:  # not used in `training_step`
                continue
            for part in STATISTICS:
                value = getattr(layer, part).detach().cpu()
                if value.is_floating_point():
                    value = self._processes.add_up(value.double()) / self._processes.size
                found[f"{clean_name(name)}.{part}"] = value
        return found

    def _loss(self, batch: Any, index: int) -> float:
        trainer, module = self._trainer, self._module
        given = move_data_to_device(batch, module.device)  # without the module's transfer hooks, which have already run
        try:
            with dry_run(trainer, module, given, index) as loss, torch.set_grad_enabled(self._graph):
                return float(loss(self._copy).detach())
        except NoLossError:
            return math.nan
        except RuntimeError as error:
            if self._graph or "grad" not in str(error):
                raise
        self._graph = True
        return self._loss(batch, index)


def _has_statistics(layer: nn.Module) -> bool:
    """Return whether a layer is training and keeps running batch statistics."""
    kept = getattr(layer, "running_mean", None)
    return is_kind(layer, "_BatchNorm") and isinstance(kept, Tensor) and layer.training
