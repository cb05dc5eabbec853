"""Masked weights held at zero while a network is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_koopman.parameters.sharded_modules import local_chunks
from lightning_koopman.parameters.shards import Chunk

# of equal size: a float's bits ANDed with 0 or −1 give zero or itself, for NaN and infinity too
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Pin:
    """Holds masked parameters at zero through training, until :meth:`remove`; made by :meth:`MaskSet.pin`.

    Args:
        matched: By name, what this process holds of a parameter and its mask as bits.
        optimizers: Those that step them.
        on_error: Called with what fails in a hook, in place of raising it in the middle of a step.
    """

    def __init__(
        self,
        matched: Mapping[str, tuple[Chunk, Tensor]],
        optimizers: Sequence[torch.optim.Optimizer],
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self._matched = list({id(chunk.parameter): (chunk, bits) for chunk, bits in matched.values()}.values())
        self._optimizers = [id(optimizer) for optimizer in optimizers]
        self._handles: list[RemovableHandle] = []
        for chunk, bits in self._matched:
            _clear(chunk.tensor, bits)
            parameter = chunk.parameter
            frozen = not parameter.requires_grad
            parameter.requires_grad_(True)  # it may be thawed later, and takes no hook before
            hook: Any = parameter.register_post_accumulate_grad_hook  # untyped in PyTorch
            self._handles.append(hook(_Hook(_GradientMask(chunk, bits), on_error)))
            parameter.requires_grad_(not frozen)
        self.clear_gradients()
        for optimizer in optimizers:
            self._forget_pruned(optimizer)
            self._handles.append(optimizer.register_step_post_hook(_Hook(self._after_step, on_error)))

    def remove(self) -> None:
        """Let the pruned weights move again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def clear(self) -> None:
        """Set the pruned weights to zero again, in case something else wrote over them."""
        for chunk, bits in self._matched:
            _clear(chunk.tensor, bits)

    def moved(self) -> bool:
        """Whether a pruned weight is not zero."""
        return any(bool(_masked(chunk.tensor, bits).any()) for chunk, bits in self._matched)

    def clear_gradients(self) -> None:
        """Set the pruned weights' gradients to zero, where they come without a hook being called, as under FSDP."""
        for chunk, bits in self._matched:
            _GradientMask(chunk, bits)(chunk.parameter)

    def holds(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Whether it holds the parameters that the module and the optimizers have now."""
        own = {id(chunk.parameter) for chunk in local_chunks(module).values()}
        return self._optimizers == [id(optimizer) for optimizer in optimizers] and all(
            id(chunk.parameter) in own for chunk, _ in self._matched
        )

    def _after_step(self, *_: Any) -> None:
        self.clear()

    def _forget_pruned(self, optimizer: torch.optim.Optimizer) -> None:
        """Clear what the optimizer remembers of pruned weights: momentum would move them."""
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.state.clear()  # its memory is flat, and of a path that has ended
        for chunk, bits in self._matched:
            for value in optimizer.state.get(chunk.parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == chunk.parameter.shape and value.is_floating_point():
                    held = chunk.like(value)
                    if held is not None:
                        _clear(held, bits)


class _Hook:
    """A function that PyTorch calls, whose failure is told to somebody else if that is asked for."""

    def __init__(self, function: Callable[..., None], on_error: Callable[[Exception], None] | None) -> None:
        self.function, self.on_error = function, on_error

    def __call__(self, *given: Any) -> None:
        try:
            self.function(*given)
        except Exception as error:
            if self.on_error is None:
                raise
            self.on_error(error)


class _GradientMask:
    """Called with a parameter whenever its gradient has been accumulated."""

    def __init__(self, chunk: Chunk, bits: Tensor) -> None:
        self.chunk, self.bits = chunk, bits

    def __call__(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse:  # of an embedding: some rows
            rows = gradient.coalesce()
            parameter.grad = rows
            values = rows._values()
            _clear(values, self.bits[rows._indices()[0]])
            return
        held = self.chunk.like(gradient)
        if held is not None:
            _clear(held, self.bits)


def _clear(values: Tensor, bits: Tensor) -> None:
    """Set to zero, in place, where the bits are zero; integers need no gradient mode."""
    if bits.dtype.itemsize != values.dtype.itemsize or bits.device != values.device:  # the module was converted
        bits = _bits(bits != 0, values)
    values.detach().view(bits.dtype).bitwise_and_(bits.reshape(values.shape))


def _masked(values: Tensor, bits: Tensor) -> Tensor:
    """The values that are masked, zero elsewhere; −0 counts as zero."""
    kept = (bits != 0).reshape(values.shape).to(values.device)
    return torch.where(kept, 0, values.detach())


def takes_hooks(optimizer: object) -> bool:
    """Whether an optimizer can tell when it has stepped."""
    return hasattr(optimizer, "_optimizer_step_post_hooks")


def _bits(mask: Tensor, like: Tensor) -> Tensor:
    """−1 where a weight survives and 0 where not, as integers of the weights' size, on their device."""
    return -mask.to(device=like.device).to(BITS[like.dtype.itemsize])
