"""Checkpoints of runs with averaged weights: they hold the validated average and the weights in training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_koopman.callbacks.observables import outermost
from lightning_koopman.callbacks.weight_average import WeightAverage
from lightning_koopman.parameters.sharded_modules import clean_name, is_kind, is_sharded, local_chunks, named_tensors

TRAINED = "koopman_trained_weights"  # checkpoint key of the weights and buffers in training
COLLECT = "lightning_module_state_dict"  # name of the strategy's method


class AveragedCheckpoints:
    """Makes a strategy save the average in ``state_dict``, in full and weights-only checkpoints."""

    def __init__(self, average: WeightAverage) -> None:
        self._average = average
        self._strategy: Any = None
        self._average_loaded: dict[str, Any] = {}  # the checkpoint's average, until training starts
        self._collect: Callable[[], dict[str, Any]] | None = None  # the strategy's original method

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_strategy": None, "_collect": None, "_average_loaded": {}}

    def watch(self, trainer: pl.Trainer, module: pl.LightningModule, choose: Callable[[], None]) -> None:
        """Make the strategy save the average until :meth:`release`, calling ``choose`` before each."""
        self.release()
        self._average_loaded = {}  # training produces a new one
        strategy: Any = trainer.strategy
        collect = self._collect = getattr(strategy, COLLECT)

        def averaged() -> dict[str, Any]:
            choose()
            with self._average.held(trainer, module, average=True):
                return copied(collect())

        setattr(strategy, COLLECT, averaged)
        self._strategy = strategy

    def release(self) -> None:
        """Restore the strategy's original method."""
        strategy, self._strategy, self._collect = self._strategy, None, None
        if strategy is not None:
            vars(strategy).pop(COLLECT, None)

    def add_trained(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint the weights in training that differ from the average."""
        if self._collect is None:
            return
        with self._average.held(trainer, module, average=False):
            trained, average = self._collect(), checkpoint["state_dict"]
            differing = {name: value for name, value in trained.items() if not _equal(value, average.get(name))}
            checkpoint[TRAINED] = copied(differing)

    def restore_trained(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the weights in training from a checkpoint."""
        trained = checkpoint.get(TRAINED, {})
        average = checkpoint.get("state_dict", {})
        self._average_loaded = {name: average[name] for name in trained if name in average}
        self._load(trainer, module, trained)

    def fit_ends(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Put the checkpoint's average into the module if nothing was left to train."""
        loaded, self._average_loaded = self._average_loaded, {}
        self._load(trainer, module, loaded)

    @torch.no_grad()
    def _load(self, trainer: pl.Trainer, module: pl.LightningModule, state: dict[str, Any]) -> None:
        root = outermost(trainer, module)
        if not is_sharded(root):
            module.load_state_dict(state, strict=False)  # the module may use its own names
            return
        chunks, known = local_chunks(root), named_tensors(root, module)
        for name, value in state.items():
            clean = clean_name(name)
            if clean in known:
                tensor = known[clean].detach()
                tensor.copy_((chunks[clean].take(value) if clean in chunks else value).reshape(tensor.shape))


def check_collects_whole_states(trainer: pl.Trainer) -> None:
    """Raise ValueError if a run writes sharded checkpoints, which cannot hold a second set of weights."""
    strategy: Any = trainer.strategy
    by_parts = is_kind(strategy, "ModelParallelStrategy") and strategy._save_distributed_checkpoint
    if by_parts or (is_kind(strategy, "FSDPStrategy") and strategy._state_dict_type == "sharded"):
        option = "save_distributed_checkpoint=False" if by_parts else "state_dict_type='full'"
        raise ValueError(
            f"strategy {type(strategy).__name__} writes sharded checkpoints, which cannot hold both the average and "
            f"the weights in training: create it with {option}."
        )


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in which tensors that shared memory still do; anything that cannot be copied is kept as it is."""
    known: dict[int, Any] = {}
    found = {}
    for name, value in state.items():
        own = value.detach() if isinstance(value, Tensor) else value
        try:
            found[name] = copy.deepcopy(own, known)
        except Exception:  # of a module's extra state
            found[name] = own
    return found


def _equal(value: Any, other: Any) -> bool:
    """Return whether two entries of a state are equal. Non-tensors count as equal, as averaging keeps them."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return True
    return value.shape == other.shape and torch.equal(value, other)
