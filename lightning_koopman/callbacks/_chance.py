"""The loss at chance, measured: what the user's own training step gives for a network that ignores its input."""

from __future__ import annotations

import copy
import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_koopman.callbacks._loss import batch_loss
from lightning_koopman.convergence import Chance

if TYPE_CHECKING:
    import pytorch_lightning as pl

BATCHES = 32  # enough for the mean of a regression's batches; classification gives ln C on each


class ChanceProbe:
    """Runs ``training_step`` on the first batches with a copy of the module whose parameters are all zero.

    With zero parameters the output is constant: zero logits (ln C for C classes), a zero regression (the targets' mean
    square).  Works for any loss and any structure of batches.  The copy shares the user's data, holds no weights (one
    zero stands for each tensor), logs nothing, and leaves the random state as it was.
    """

    def __init__(self) -> None:
        self._copy: pl.LightningModule | None = None
        self._losses: list[Tensor] = []

    def restart(self) -> None:
        """Forget what was measured."""
        self._copy, self._losses = None, []

    @property
    def wanted(self) -> bool:
        """Whether another batch helps."""
        return len(self._losses) < BATCHES

    def observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure one batch."""
        expected = inspect.signature(pl_module.training_step).parameters
        if not pl_module.automatic_optimization or "dataloader_iter" in expected:
            return
        if self._copy is None:
            self._copy = _at_zero(pl_module)
        arguments = (batch, batch_idx) if len(expected) > 1 else (batch,)
        with isolate_rng(), torch.no_grad(), trainer.precision_plugin.train_step_context():
            loss = batch_loss(self._copy.training_step(*arguments))
        if loss is not None:
            self._losses.append(loss.float())
        if not self.wanted:
            self._copy = None

    def measured(self) -> Chance | None:
        """The mean with its standard error, or None where nothing sensible was measured."""
        self._copy = None
        if not self._losses:
            return None
        losses = torch.stack(self._losses).double()
        mean = float(losses.mean())
        if not 0 < mean < math.inf:
            return None
        return Chance(mean, float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0)


def _at_zero(module: pl.LightningModule) -> pl.LightningModule:
    """Copy of a module with all parameters zero, without memory for them."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(
            torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape), requires_grad=False
        )
        for parameter in module.parameters()
    }
    # data kept on the module may be large, and is only read
    shared = [value for value in vars(module).values() if isinstance(value, (Tensor, Dataset, DataLoader))]
    memo |= {id(value): value for value in (*shared, module.trainer)}
    network = copy.deepcopy(module, memo)
    network.trainer = module.trainer
    network.log = _nothing  # type: ignore[method-assign]
    return network


def _nothing(*_: Any, **__: Any) -> None:
    """In place of ``self.log``."""
