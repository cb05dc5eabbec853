"""Measure the baseline loss: that of the user's training step for a network that ignores its input."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from lightning_koopman.callbacks.dry_run import NoLossError, can_dry_run, dry_run, quiet_copy
from lightning_koopman.callbacks.kept import kept, set_back
from lightning_koopman.callbacks.observables import outermost
from lightning_koopman.parameters.sharded_modules import local_chunks
from lightning_koopman.stopping.evidence import Baseline

TUNED, SCORED, ENOUGH = 6, 16, 4  # batches per gradient or comparison, to measure the loss, fewest that suffice
ROUNDS, TRIES = 4, 16  # most updates of the constant, and most losses tried in a line search
FACTORS = 0.125, 0.25, 0.5, 0.75, 1.0, 1.5  # multiples of the step length found on one batch, compared on several
STILL, FALLS = 0.02, 0.05  # relative fall of the loss per update: below it has converged, above it is unknown
HUGE = 1e300  # replaces a loss that is not finite
KEPT = (
    "wanted", "_last", "_rounds", "tuned", "_falls", "_losses", "_sum", "_seen", "_direction", "_lengths",
)  # fmt: skip


class _EnoughError(Exception):
    """The line search has tried enough losses."""


class BaselineProbe:
    """Runs ``training_step`` on the first batches with a copy of the module whose output can only be constant.

    All trainable weights of the copy are zero. Its biases are found by steepest descent, along the mean gradient over
    several batches. One batch suggests the step length (Brent's method); the mean loss of others confirms it. Descent
    ends when the loss stops falling. The loss of the best constant is the targets' variance for a squared error, their
    mean distance from the median for an absolute error, and the entropy of the classes for cross-entropy. If the loss
    still falls at the end, it is unknown. Any loss and any batch structure work. The copy shares the user's data and
    frozen weights, holds one zero per weight matrix, logs nothing, and preserves the random state.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Discard the measurement."""
        self._copy: pl.LightningModule | None = None
        self._biases: list[nn.Parameter] = []
        self._values: list[Tensor] | None = None  # of the biases, while there is no copy
        self._sum: Tensor | None = None  # over batches, of gradients or of losses at several step lengths
        self._seen = 0  # batches in the sum
        self._direction: Tensor | None = None  # of descent; once known, step lengths along it are compared
        self._lengths: list[float] = []
        self._losses: list[float] = []
        self._rounds, self._falls = 0, False
        self.tuned = False  # whether the constant is good enough
        self._last: tuple[int, int] | None = None
        self.wanted = True  # whether another batch is needed
        self.still = False  # whether the last update barely lowered the loss

    def __getstate__(self) -> dict[str, Any]:  # the module's copy is not pickled, but made again
        return {**vars(self), "_copy": None, "_biases": [], "_values": self._bias_values()}

    def pause(self) -> None:
        """Release the module until the next batch."""
        self._values, self._copy, self._biases = self._bias_values(), None, []

    def finish(self) -> None:
        """Stop measuring."""
        self.wanted, self._copy, self._biases, self._values = False, None, [], None
        self._sum = self._direction = None

    def _bias_values(self) -> list[Tensor] | None:
        return [bias.detach().clone() for bias in self._biases] if self._copy is not None else self._values

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints: tensors and primitives."""
        return {**kept(self, KEPT), "biases": self._bias_values()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.restart()
        set_back(self, state, KEPT)
        self._values = state["biases"]

    def observe(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure each batch once. Any failure ends the measurement."""
        now = trainer.current_epoch, batch_idx
        if not self.wanted or now == self._last:  # a callback that shares the probe has measured it
            return
        self._last = now
        try:
            self._measure(trainer, module, batch, batch_idx)
        except NoLossError:  # Lightning skips such a batch
            if trainer.world_size > 1:  # the other processes have measured theirs
                self.finish()
                raise
        except Exception:
            self.finish()
            raise
        if len(self._losses) == SCORED:
            self.finish()

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if not can_dry_run(module):
            self.finish()
            return
        if self._copy is None:
            self._copy, self._biases = _constant(module, outermost(trainer, module))
            with torch.no_grad():
                for bias, value in zip(self._biases, self._values or [], strict=self._values is not None):
                    bias.copy_(value)
            self.tuned = self.tuned or not self._biases  # the only constant is zero
        network, alike = self._copy, trainer.world_size > 1
        with dry_run(trainer, module, batch, batch_idx) as loss:
            if self.tuned:
                self._losses.append(float(loss(network).detach()))
                return
            seen = self._seen + 1
            # an epoch may have fewer batches, or only one
            last = seen == TUNED or (trainer.is_last_batch and (seen >= ENOUGH or seen == batch_idx + 1))
            self._seen = 0 if last else seen
            if self._direction is None:
                gradient = self._gradient(value := loss(network))
                self._sum = gradient if self._sum is None else self._sum + gradient
                if last:
                    self._aim(seen, float(value.detach()), lambda: float(loss(network).detach()), alike=alike)
            else:
                found = self._along([0.0, *self._lengths], lambda: float(loss(network).detach()))
                self._sum = torch.tensor(found) if self._sum is None else self._sum + torch.tensor(found)
                if last:
                    self._go(alike=alike)

    def _gradient(self, loss: Tensor) -> Tensor:
        """Return the gradient of all biases as a flat vector."""
        if not loss.requires_grad:
            return torch.zeros(sum(bias.numel() for bias in self._biases))
        found = torch.autograd.grad(loss, self._biases, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.reshape(-1).double().cpu() for gradient in found])

    def _aim(self, batches: int, before: float, loss: Callable[[], float], *, alike: bool) -> None:
        """Choose step lengths to compare on other batches, by a line search on this batch.

        The loss was ``before``. If ``alike``, all processes evaluate equally many losses, as the step may communicate.
        """
        assert self._sum is not None
        self._direction, self._sum = -self._sum, None
        tried = [(0.0, before)]

        def at(length: float) -> float:
            if len(tried) > TRIES:
                raise _EnoughError
            tried.append((float(length), self._along([float(length)], loss)[0]))
            return tried[-1][1]

        if bool(self._direction.isfinite().all()) and bool(self._direction.any()):
            with contextlib.suppress(_EnoughError, RuntimeError):  # no minimum found: use the best length tried
                # at a small slope, a step of 1 would be lost to rounding
                slope = float(self._direction @ self._direction) / batches
                minimize_scalar(at, bracket=(0.0, max(1.0, 0.01 * abs(before) / slope)))
        while alike and len(tried) <= TRIES:
            at(0.0)
        length = min(tried, key=lambda each: each[1])[0]
        self._lengths = [length * factor for factor in FACTORS]

    def _go(self, *, alike: bool) -> None:
        """Take the step of least mean loss over the batches, and check for convergence."""
        assert self._sum is not None
        assert self._direction is not None
        before, *losses = self._sum.tolist()
        value, length = min([(before, 0.0), *zip(losses, self._lengths, strict=True)])
        self._set([bias.detach().clone() for bias in self._biases], length * self._direction)
        self._sum, self._direction = None, None
        self._rounds += 1
        fall = (before - value) / abs(before) if before else 0.0
        self.still, self._falls = fall < STILL, fall > FALLS
        self.tuned = self._rounds == ROUNDS or (self.still and not alike)

    def _along(self, lengths: Sequence[float], loss: Callable[[], float]) -> list[float]:
        """Return the loss at each step length along the direction."""
        assert self._direction is not None
        start = [bias.detach().clone() for bias in self._biases]
        found = []
        for length in lengths:
            self._set(start, length * self._direction)
            value = loss()
            found.append(value if math.isfinite(value) else HUGE)
        self._set(start, 0 * self._direction)
        return found

    def _set(self, start: Sequence[Tensor], change: Tensor) -> None:
        """Set the biases to ``start`` plus ``change``."""
        parts = torch.split(change, [bias.numel() for bias in self._biases])
        with torch.no_grad():
            for bias, value, part in zip(self._biases, start, parts, strict=True):
                bias.copy_(value + part.reshape(bias.shape).to(bias))

    def measured(self) -> Baseline | None:
        """Return the mean loss with its standard error, or None if there is no valid measurement."""
        if len(self._losses) < ENOUGH or self._falls:
            return None
        losses = torch.tensor(self._losses, dtype=torch.float64)
        mean = float(losses.mean())
        return Baseline(mean, float(losses.std()) / math.sqrt(len(losses))) if 0 < mean < math.inf else None


def _constant(module: pl.LightningModule, root: nn.Module) -> tuple[pl.LightningModule, list[nn.Parameter]]:
    """Return a copy of a module with zero trainable weights (only biases take memory), and its biases."""
    memo: dict[int, Any] = {}
    biases = []
    for name, chunk in local_chunks(root).items():
        parameter = chunk.parameter
        shape = tuple(parameter.shape) if parameter.is_complex() else chunk.shape
        twin = parameter  # frozen parameters are shared, as they may produce the targets
        if not parameter.requires_grad and not chunk.whole:
            raise ValueError(f"frozen parameter {name!r} is sharded and cannot be copied: pass baseline_loss")
        if parameter.requires_grad and len(shape) == 1 and not parameter.is_complex():
            twin = nn.Parameter(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
            biases.append(twin)
        elif parameter.requires_grad:
            zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            twin = nn.Parameter(zero.expand(shape), requires_grad=False)
        memo[id(parameter)] = twin
    return quiet_copy(module, memo), biases
