"""The baseline loss, measured: what the user's own training step gives for a network that ignores its input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_koopman._checks import check_positive
from lightning_koopman.callbacks.dry_run import can_dry_run, dry_run, quiet_copy
from lightning_koopman.callbacks.observables import outermost
from lightning_koopman.parameters.sharded_modules import local_chunks
from lightning_koopman.stopping.evidence import Baseline

if TYPE_CHECKING:
    import pytorch_lightning as pl


TUNED, SCORED, ENOUGH = 8, 16, 4  # batches that set the constant output, that measure its loss, that will do


class BaselineProbe:
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
        self._values: list[Tensor] | None = None  # of the biases, from a checkpoint
        self._gradient_sum: Tensor | None = None
        self._gradients = 0
        self._losses: list[float] = []
        self._tuned = False
        self._last: tuple[int, int] | None = None
        self.wanted = True  # whether another batch helps

    def __getstate__(self) -> dict[str, Any]:  # a copy elsewhere makes its own copy of the module
        return {**vars(self), "_copy": None, "_biases": [], "_values": self._bias_values()}

    def pause(self) -> None:
        """Let go of the module, until another batch comes."""
        self._values, self._copy, self._biases = self._bias_values(), None, []

    def finish(self) -> None:
        """Measure no more."""
        self.wanted, self._copy, self._biases, self._values, self._gradient_sum = False, None, [], None, None

    def _bias_values(self) -> list[Tensor] | None:
        return [bias.detach().clone() for bias in self._biases] if self._copy is not None else self._values

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; tensors and primitives."""
        return {
            "wanted": self.wanted,
            "last": self._last,
            "tuned": self._tuned,
            "losses": list(self._losses),
            "gradient_sum": self._gradient_sum,
            "gradients": self._gradients,
            "biases": self._bias_values(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.restart()
        last = state["last"]
        self._last = None if last is None else (int(last[0]), int(last[1]))
        self.wanted, self._tuned, self._gradients = bool(state["wanted"]), bool(state["tuned"]), int(state["gradients"])
        self._losses = [float(each) for each in state["losses"]]
        self._gradient_sum, self._values = state["gradient_sum"], state["biases"]

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
        if not can_dry_run(module):
            self.finish()
            return
        if self._copy is None:
            self._copy, self._biases = _constant(module, outermost(trainer, module))
            with torch.no_grad():
                for bias, value in zip(self._biases, self._values or [], strict=self._values is not None):
                    bias.copy_(value)
        network = self._copy
        with dry_run(trainer, module, batch, batch_idx) as loss:
            if self._tuned:
                self._losses.append(float(loss(network).detach()))
                return
            gradient = self._gradient(value := loss(network))
            self._gradient_sum = gradient if self._gradient_sum is None else self._gradient_sum + gradient
            self._gradients += 1
            if later or self._gradients == TUNED:  # a full batch is an epoch
                self._tune(float(value.detach()), gradient, lambda: loss(network))

    def _gradient(self, loss: Tensor) -> Tensor:
        """Gradient of all biases, flat."""
        if not loss.requires_grad or not self._biases:
            return torch.zeros(1)
        found = torch.autograd.grad(loss, self._biases, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.reshape(-1).double().cpu() for gradient in found])

    def _tune(self, before: float, gradient: Tensor, loss: Callable[[], Tensor]) -> None:
        """Set the biases: a Newton step along the mean gradient, with the curvature seen on this batch."""
        self._tuned = True
        assert self._gradient_sum is not None
        step = self._gradient_sum / self._gradients
        length = float(step @ step)
        usable = 0 < length < math.inf
        slope = float(gradient @ step)
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

    def measured(self) -> Baseline | None:
        """The mean with its standard error, or None where nothing sensible was measured."""
        if len(self._losses) < ENOUGH:
            return None
        losses = torch.tensor(self._losses, dtype=torch.float64)
        mean = float(losses.mean())
        return Baseline(mean, float(losses.std()) / math.sqrt(len(losses))) if 0 < mean < math.inf else None


class BaselineLoss:
    """The baseline loss of a run, given or measured; the stop and the restart hold one each, and share the measurement.

    Args:
        baseline_loss: Mean loss of a network that ignores its input, > 0, or None to measure it.
        chance_loss: Its former name.

    Raises:
        ValueError: If it is out of its range, or both are given.
    """

    def __init__(self, baseline_loss: float | None, chance_loss: float | None) -> None:
        if baseline_loss is not None and chance_loss is not None:
            raise ValueError(f"baseline_loss={baseline_loss} and chance_loss={chance_loss} are the same: give one.")
        name = "chance_loss" if baseline_loss is None else "baseline_loss"
        given = chance_loss if baseline_loss is None else baseline_loss
        self.given = None if given is None else check_positive(name, given)
        self._own = self.probe = BaselineProbe()
        self._batch: Any = None
        self.forget()

    def forget(self) -> None:
        """Begin as for a first fit."""
        self.value = None if self.given is None else Baseline(self.given)

    def share(self, first: BaselineLoss) -> None:
        """Share the measurement of another callback."""
        self.probe = first._own

    def start(self, *, resumed: bool) -> None:
        """Training starts."""
        if not resumed:
            self._own.restart()

    @property
    def measures(self) -> bool:
        """Whether another batch helps."""
        return self.value is None and self.probe.wanted

    def batch_begins(self, batch: Any) -> None:
        """Keep a batch that is to be measured; steps may take it apart."""
        self._batch = None
        if self.measures:
            self._batch = copy.copy(batch) if isinstance(batch, (dict, list)) else batch

    def batch_ends(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Measure the batch."""
        batch, self._batch = self._batch, None
        if self.measures and batch is not None:
            self.probe.observe(trainer, pl_module, batch, batch_idx)

    def agree(self, trainer: pl.Trainer) -> None:
        """Take what is known at a round's end on all ranks, which also agree on whether to go on measuring."""
        known, wanted = trainer.strategy.broadcast((self.value or self.probe.measured(), self.probe.wanted))
        if trainer.strategy.reduce_boolean_decision(known is not None or not (wanted and self.probe.wanted), all=False):
            self.probe.finish()
        self.value = known

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: a measurement that has begun goes on with the same batches."""
        value = None if self.value is None else [self.value.loss, self.value.error]
        return {"value": value, "probe": self.probe.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.forget()
        if self.value is None and state["value"] is not None:
            loss, error = state["value"]
            self.value = Baseline(float(loss), float(error))
        self._own.load_state_dict(state["probe"])


def share_baseline(callback: Any, trainer: pl.Trainer) -> None:
    """Let a callback that holds a baseline loss share the first one's measurement."""
    held = (getattr(each, "baseline_loss", None) for each in trainer.callbacks)  # type: ignore[attr-defined]
    callback.baseline_loss.share(next(each for each in held if isinstance(each, BaselineLoss)))


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
