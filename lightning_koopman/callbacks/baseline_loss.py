"""The loss at chance, measured: what the user's own training step gives for a network that ignores its input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_koopman._checks import check_positive
from lightning_koopman.callbacks.base import TrajectoryCallback, outermost
from lightning_koopman.callbacks.dry_run import can_rehearse, quiet_copy, rehearsal
from lightning_koopman.parameters.sharded_modules import local_chunks
from lightning_koopman.stopping.evidence import Chance

if TYPE_CHECKING:
    import pytorch_lightning as pl


TUNED, SCORED, ENOUGH = 8, 16, 4  # batches that set the constant output, that measure its loss, that will do


class ChanceProbe:
    """Runs ``training_step`` on the first batches with a copy of the module that can only give a constant output.

    All trainable weights of the copy are zero.  Its biases are set by one Newton step along their mean gradient, which
    finds the best constant for a squared error, whose loss is the targets' variance.  For a cross-entropy it finds the
    entropy of classes of similar frequency, and up to twice that where one class has 90 % or more.  Works for any loss
    and any structure of batches.  The copy shares the user's data and frozen weights, holds no trainable ones (a zero
    stands for each tensor), logs nothing, and leaves the random state as it was.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was measured."""
        self._copy: pl.LightningModule | None = None
        self._biases: list[nn.Parameter] = []
        self._gradients: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._tuned = False
        self._last: tuple[int, int] | None = None
        self.wanted = True  # whether another batch helps

    def finish(self) -> None:
        """Measure no more."""
        self.wanted, self._copy, self._biases, self._gradients = False, None, [], []

    def observe(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure one batch, once; any failure ends the measurement."""
        now = trainer.current_epoch, batch_idx
        if not self.wanted or now == self._last:  # another callback that shares the probe was first
            return
        later, self._last = self._last is not None and self._last[0] != now[0], now
        try:
            self._measure(trainer, module, batch, batch_idx, later)
        except Exception:
            self.finish()
            raise
        if len(self._losses) == SCORED:
            self.finish()

    def _measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int, later: bool
    ) -> None:
        if not can_rehearse(module):
            self.finish()
            return
        if self._copy is None:
            self._copy, self._biases = _constant(module, outermost(trainer, module))
        network = self._copy
        with rehearsal(trainer, module, batch, batch_idx) as loss:
            if self._tuned:
                self._losses.append(loss(network).detach().double().cpu())
                return
            self._gradients.append(self._gradient(value := loss(network)))
            if later or len(self._gradients) == TUNED:  # a full batch is an epoch
                self._tune(float(value.detach()), lambda: loss(network))

    def _gradient(self, loss: Tensor) -> Tensor:
        """Gradient of all biases, flat."""
        if not loss.requires_grad or not self._biases:
            return torch.zeros(1)
        found = torch.autograd.grad(loss, self._biases, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.reshape(-1).double().cpu() for gradient in found])

    def _tune(self, before: float, loss: Callable[[], Tensor]) -> None:
        """Set the biases: a Newton step along the mean gradient, with the curvature seen on this batch."""
        self._tuned = True
        step = torch.stack(self._gradients).mean(dim=0)
        length = float(step @ step)
        usable = 0 < length < math.inf
        slope = float(self._gradients[-1] @ step)
        if usable:
            self._shift(-step)
        after = float(loss().detach())  # in any case: the step may talk to the other ranks
        if usable:
            curvature = 2 * (after - before + slope) / length
            self._shift((1 - 1 / curvature) * step if 0 < curvature < math.inf else step)

    def _shift(self, change: Tensor) -> None:
        parts = torch.split(change, [bias.numel() for bias in self._biases])
        with torch.no_grad():
            for bias, part in zip(self._biases, parts, strict=True):
                bias.add_(part.reshape(bias.shape).to(bias))

    def measured(self) -> Chance | None:
        """The mean with its standard error, or None where nothing sensible was measured."""
        if len(self._losses) < ENOUGH:
            return None
        losses = torch.stack(self._losses)
        mean = float(losses.mean())
        return Chance(mean, float(losses.std()) / math.sqrt(len(losses))) if 0 < mean < math.inf else None


class ChanceCallback(TrajectoryCallback):
    """Base of the callbacks that compare the loss with that at chance, given or measured.

    Args:
        chance_loss: The loss at chance, > 0, or None to measure it.
        **options: Those of :class:`TrajectoryCallback`.
    """

    def __init__(self, chance_loss: float | None, **options: Any) -> None:
        super().__init__(**options)
        if chance_loss is not None:
            check_positive("chance_loss", chance_loss)
        self.chance_loss = chance_loss
        self._own_probe = self._probe = ChanceProbe()
        self._batch: Any = None
        self._forget()

    def _forget(self) -> None:
        """Begin as for a first fit."""
        self.chance = None if self.chance_loss is None else Chance(self.chance_loss)

    @property
    def _needs_chance(self) -> bool:
        """Whether the loss at chance is of use."""
        return True

    @property
    def _measures(self) -> bool:
        """Whether the present batch is to be measured."""
        return self._active and self.chance is None and self._needs_chance and self._probe.wanted

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        found = [other for other in trainer.callbacks if isinstance(other, ChanceCallback)]  # type: ignore[attr-defined]
        self._probe = found[0]._own_probe  # one measurement serves all

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self._resumed:
            self._own_probe.restart()
        if self._active and self._anew:
            self._forget()
        self.chance = trainer.strategy.broadcast(self.chance)  # restored on global rank zero only

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._measures:
            self._batch = copy.copy(batch) if isinstance(batch, (dict, list)) else batch  # steps may take it apart

    def after_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._measures:
            with self._guard("measuring the loss at chance"):
                self._probe.observe(trainer, pl_module, self._batch, batch_idx)
        self._batch = None

    def _agree_on_chance(self, trainer: pl.Trainer) -> None:
        """Take what is known at an epoch's end on all ranks, which also agree on whether to go on measuring."""
        known, wanted = trainer.strategy.broadcast((self.chance or self._probe.measured(), self._probe.wanted))
        if trainer.strategy.reduce_boolean_decision(
            known is not None or not (wanted and self._probe.wanted), all=False
        ):
            self._probe.finish()
        self.chance = known

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if state:
            state["chance"] = None if self.chance is None else [self.chance.loss, self.chance.error]
        return state

    def _restore_state(self, state: dict[str, Any]) -> None:
        super()._restore_state(state)
        self._forget()
        if self.chance is None and state["chance"] is not None:
            self.chance = Chance(*state["chance"])


def _constant(module: pl.LightningModule, root: nn.Module) -> tuple[pl.LightningModule, list[nn.Parameter]]:
    """Copy of a module with all trainable weights zero, without memory for the large ones, and its biases."""
    memo: dict[int, Any] = {}
    biases = []
    for name, chunk in local_chunks(root).items():
        parameter, shape = chunk.parameter, chunk.shape
        twin = parameter  # frozen ones may make the targets
        if not parameter.requires_grad and not chunk.whole:
            raise ValueError(f"the frozen parameter {name!r} is sharded, so that a copy of the module cannot use it")
        if parameter.requires_grad and len(shape) == 1:
            twin = nn.Parameter(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
            biases.append(twin)
        elif parameter.requires_grad:
            zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            twin = nn.Parameter(zero.expand(shape), requires_grad=False)
        memo[id(parameter)] = twin
    return quiet_copy(module, memo), biases
