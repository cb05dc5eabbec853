"""Observables of a run: its weights, its training loss and its logged metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_koopman.callbacks.kept import kept, set_back
from lightning_koopman.parameters.process_group import Processes
from lightning_koopman.parameters.select import as_patterns, select_parameters
from lightning_koopman.parameters.sharded_modules import is_kind, local_chunks
from lightning_koopman.parameters.shards import Shards

TRAIN_LOSS = "train_loss"

KEPT = "_validated", "_has_validated"
PENDING = 512  # batch losses to hold before summing them: bounds memory in long epochs


def batch_loss(outputs: Any) -> Tensor | None:
    """Return the loss in the output of ``training_step``, or None unless it is one real number."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if isinstance(loss, Tensor) and loss.layout == torch.strided and loss.numel() == 1 and not loss.is_complex():
        return loss
    return None


class LossMeter:
    """Sum and count of the batch losses since the last :meth:`take`, at little cost per batch."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0
        self._pending: list[Tensor] = []

    def add(self, outputs: Any) -> None:
        """Add the loss of a batch."""
        loss = batch_loss(outputs)
        if loss is not None:
            self._pending.append(loss.detach())
            if len(self._pending) == PENDING:
                self.fold()

    def fold(self) -> None:
        """Add the pending losses to the sum, with one operation and one transfer per device."""
        pending, self._pending = self._pending, []
        for device in {loss.device for loss in pending}:
            losses = [loss.reshape(()).float() for loss in pending if loss.device == device]
            self.total += sum(torch.stack(losses).tolist())
        self.count += len(pending)

    def take(self) -> tuple[float, int]:
        """Return the sum and the count since the last call."""
        self.fold()
        taken, self.total, self.count = (self.total, self.count), 0.0, 0
        return taken

    def start(self, total: float = 0.0, count: int = 0) -> None:
        """Start an interval, or resume one from a checkpoint with its sum and count."""
        self._pending, self.total, self.count = [], total, count

    def mean(self, trainer: pl.Trainer, taken: tuple[float, int]) -> float | None:
        """Return the mean over what :meth:`take` gave on all ranks, or None without a loss; call on all ranks."""
        total, count = taken
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            wide = torch.float32 if device.type == "mps" else torch.float64
            both = torch.tensor([total, count], device=device, dtype=wide)
            total, count = trainer.strategy.reduce(both, reduce_op="sum").tolist()
        # Lightning passes the loss divided by `accumulate_grad_batches`
        return total / count * trainer.accumulate_grad_batches if count else None


class Metric:
    """A metric that the module logs once per interval."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.start_fit()

    def start_fit(self) -> None:
        """Forget the logged values."""
        self._seen: object = None  # value when the interval began; a newly logged value is another object
        self._validated: float | None = None  # value of the last validation, until it is taken
        self._has_validated = False
        self._has_begun = False  # whether the start of this interval was seen

    def begin(self, trainer: pl.Trainer) -> None:
        """Start an interval."""
        self._seen, self._has_begun = trainer.callback_metrics.get(self.name), True

    def validated(self, trainer: pl.Trainer) -> None:
        """Keep the value that a validation has logged."""
        self._has_validated = True
        value = self._logged(trainer)
        self._validated = self._validated if value is None else value

    def take(self, trainer: pl.Trainer) -> float | None:
        """Return the value logged in this interval, or by a validation since the last call."""
        value = self._logged(trainer)
        value, self._validated = self._validated if value is None else value, None
        return value

    def is_missing(self, trainer: pl.Trainer) -> bool:
        """Return whether the metric should have been logged by now, but was not."""
        if not self._has_begun:  # resumed within it: Lightning has lost what was logged before
            return False
        still_to_come = trainer.enable_validation and not self._has_validated
        return self.name not in trainer.callback_metrics and not still_to_come

    def _logged(self, trainer: pl.Trainer) -> float | None:
        """Return the value if logged since the interval began; Lightning keeps old values as the same objects."""
        value = trainer.callback_metrics.get(self.name)
        return None if value is None or value is self._seen else float(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return kept(self, KEPT)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        set_back(self, state, KEPT)


class Weights:
    """The observed weights, of which this process reads its part.

    Args:
        patterns: Name patterns of the parameters, or None for all that require a gradient.
    """

    def __init__(self, patterns: str | Sequence[str] | None) -> None:
        self.patterns = as_patterns(patterns)
        self.names: tuple[str, ...] = ()
        # names of all parameters, and of the trained ones
        self._known: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self.processes = Processes()
        self.shards: Shards | None = None  # from the last read

    def __getstate__(self) -> dict[str, Any]:  # connections belong to this process
        return {**vars(self), "processes": Processes(), "shards": None}

    def connect(self, trainer: pl.Trainer, advice: str) -> None:
        """Connect to the other processes that hold parts of the weights.

        Raises:
            ValueError: If the weights cannot be observed under the strategy.
        """
        self.shards = None
        deep = is_kind(trainer.strategy, "DeepSpeedStrategy")
        shared = trainer.world_size > 1 and not deep
        self.processes = Processes.of_run() if shared else Processes()
        if deep or (shared and self.processes.size != trainer.world_size):
            why = "keeps the weights in partitions of its own" if deep else "does not use torch.distributed"
            raise ValueError(
                f"strategy {type(trainer.strategy).__name__} {why}, so the weights cannot be observed: use 'ddp', "
                f"FSDPStrategy or ModelParallelStrategy (FSDP2){advice}."
            )

    def select(self, root: nn.Module) -> dict[str, nn.Parameter]:
        """Select the parameters by name; raise ValueError as :func:`select_parameters` does."""
        chosen = select_parameters(root, self.patterns)
        self.names = tuple(chosen)
        return chosen

    def read(self, root: nn.Module) -> Shards:
        """Read this process's part of the current weights; call on all processes together."""
        chunks = local_chunks(root)
        trained = tuple(name for name, chunk in chunks.items() if chunk.parameter.requires_grad)
        known, self._known = self._known, (tuple(chunks), trained if self.patterns is None else ())
        if known != self._known:  # some were replaced, added, frozen or unfrozen
            self.select(root)
        shards = Shards({name: chunks[name] for name in self.names}, self.processes, like=self.shards)
        self.shards = shards
        return shards


def outermost(trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Module:
    """Return the module, or FSDP's wrapper around it, which alone knows all parameters."""
    wrapped = trainer.strategy.model
    return wrapped if wrapped is not None and is_kind(wrapped, "FullyShardedDataParallel") else pl_module
