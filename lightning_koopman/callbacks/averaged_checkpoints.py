"""What checkpoints hold where weights are averaged: the average, which was validated, and the weights in training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_koopman.callbacks.observables import outermost
from lightning_koopman.callbacks.weight_average import WeightAverage
from lightning_koopman.parameters.sharded_modules import clean_name, is_kind, is_sharded, local_chunks, named_tensors

if TYPE_CHECKING:
    import pytorch_lightning as pl

TRAINED = "koopman_trained_weights"  # in checkpoints: the weights and buffers that training goes on from
COLLECT = "lightning_module_state_dict"  # the strategy's method


class AveragedCheckpoints:
    """Lets the state that a strategy collects for checkpoints, with or without all else, be the average.

    Args:
        average: What takes the place of the weights.
    """

    def __init__(self, average: WeightAverage) -> None:
        self._average = average
        self._strategy: Any = None
        self._average_loaded: dict[str, Any] = {}  # from a checkpoint, until training starts
        self._collect: Callable[[], dict[str, Any]] | None = None  # the strategy's own method

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_strategy": None, "_collect": None, "_average_loaded": {}}

    def watch(self, trainer: pl.Trainer, module: pl.LightningModule, choose: Callable[[], None]) -> None:
        """Collect averages, each after it was chosen, until :meth:`release`."""
        self.release()
        strategy: Any = trainer.strategy
        collect = self._collect = getattr(strategy, COLLECT)

        def averaged() -> dict[str, Any]:
            choose()
            with self._average.held(trainer, module, average=True):
                return _copied(collect())

        setattr(strategy, COLLECT, averaged)
        self._strategy = strategy

    def release(self) -> None:
        """Leave the strategy as it was."""
        strategy, self._strategy, self._collect = self._strategy, None, None
        if strategy is not None:
            vars(strategy).pop(COLLECT, None)

    def add_trained(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the weights in training to a checkpoint, as far as they are others than the average."""
        if self._collect is None:
            return
        with self._average.held(trainer, module, average=False):
            trained, average = self._collect(), checkpoint["state_dict"]
            differing = {name: value for name, value in trained.items() if not _equal(value, average.get(name))}
            checkpoint[TRAINED] = _copied(differing)

    @torch.no_grad()
    def restore_trained(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from the weights in training."""
        trained = checkpoint.get(TRAINED, {})
        average = checkpoint.get("state_dict", {})
        self._average_loaded = {name: average[name] for name in trained if name in average}
        self._load(trainer, module, trained)

    def training_starts(self) -> None:
        """There will be a new average."""
        self._average_loaded = {}

    def fit_ends(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Leave the checkpoint's average in the module where there was nothing left to train."""
        loaded, self._average_loaded = self._average_loaded, {}
        self._load(trainer, module, loaded)

    @torch.no_grad()
    def _load(self, trainer: pl.Trainer, module: pl.LightningModule, state: dict[str, Any]) -> None:
        root = outermost(trainer, module)
        if not is_sharded(root):
            module.load_state_dict(state, strict=False)  # the module may have names of its own for them
            return
        chunks, known = local_chunks(root), named_tensors(root, module)
        for name, value in state.items():
            clean = clean_name(name)
            if clean in known:
                tensor = known[clean].detach()
                tensor.copy_((chunks[clean].take(value) if clean in chunks else value).reshape(tensor.shape))


def check_collects_whole_states(trainer: pl.Trainer) -> None:
    """Raise ValueError if a run's checkpoints are sharded, so that they have no place for a second set of weights."""
    strategy: Any = trainer.strategy
    by_parts = is_kind(strategy, "ModelParallelStrategy") and strategy._save_distributed_checkpoint
    if by_parts or (is_kind(strategy, "FSDPStrategy") and strategy._state_dict_type == "sharded"):
        option = "save_distributed_checkpoint=False" if by_parts else "state_dict_type='full'"
        raise ValueError(
            f"strategy {type(strategy).__name__} writes sharded checkpoints, which cannot hold the average beside the "
            f"weights in training: pass it {option}."
        )


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in which tensors that share memory still do."""
    return copy.deepcopy(
        {name: value.detach() if isinstance(value, Tensor) else value for name, value in state.items()}
    )


def _equal(value: Any, other: Any) -> bool:
    """Whether two entries of a state are the same; entries that are no tensors are those of the module in any case."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return True
    return value.shape == other.shape and torch.equal(value, other)
