"""Keep masked weights at zero while a network is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_koopman.parameters.sharded_modules import local_chunks
from lightning_koopman.parameters.shards import Chunk

# integer type by size: a float's bits AND 0 give zero, AND −1 the float itself, for NaN and infinity too
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Pin:
    """Handle that keeps masked weights at zero until :meth:`remove`; created by :meth:`MaskSet.pin`.

    Args:
        matched: By name, this process's part of a parameter, and its mask as bits.
        optimizers: Their optimizers.
        on_error: Called with an exception raised in a hook, instead of raising it in the middle of a step.
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
            parameter.requires_grad_(True)  # it may be unfrozen later, and takes no hook while frozen
            hook: Any = parameter.register_post_accumulate_grad_hook  # untyped in PyTorch
            self._handles.append(hook(partial(_guarded, on_error, partial(_mask_gradient, chunk, bits))))
            parameter.requires_grad_(not frozen)
        self.clear_gradients()
        for optimizer in optimizers:
            self._forget_pruned(optimizer)
            self._handles.append(optimizer.register_step_post_hook(partial(_guarded, on_error, self._after_step)))

    def remove(self) -> None:
        """Stop keeping the pruned weights at zero."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def clear(self) -> None:
        """Set the pruned weights to zero again, in case something else changed them."""
        for chunk, bits in self._matched:
            _clear(chunk.tensor, bits)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Set the optimizer's pruned weights to zero; others may be needed as they are, for a backward pass to come."""
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for chunk, bits in self._matched:
            if id(chunk.parameter) in stepped:
                _clear(chunk.tensor, bits)

    def moved(self) -> bool:
        """Return whether a pruned weight is not zero."""
        return any(bool(_masked(chunk.tensor, bits).any()) for chunk, bits in self._matched)

    def clear_gradients(self) -> None:
        """Set the gradients of pruned weights to zero, where no hook is called for them, as under FSDP."""
        for chunk, bits in self._matched:
            _mask_gradient(chunk, bits, chunk.parameter)

    def holds(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Return whether the pin still matches the module's parameters and the optimizers."""
        own = {id(chunk.parameter) for chunk in local_chunks(module).values()}
        return self._optimizers == [id(optimizer) for optimizer in optimizers] and all(
            id(chunk.parameter) in own for chunk, _ in self._matched
        )

    def _forget_pruned(self, optimizer: torch.optim.Optimizer) -> None:
        """Clear the optimizer state of pruned weights: momentum would move them."""
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.state.clear()  # its memory is one flat vector, and refers to the unpruned weights
        for chunk, bits in self._matched:
            for value in optimizer.state.get(chunk.parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == chunk.parameter.shape and value.is_floating_point():
                    held = chunk.like(value)
                    if held is not None:
                        _clear(held, bits)


def _guarded(on_error: Callable[[Exception], None] | None, hook: Callable[..., None], *given: Any) -> None:
    """Call a hook, and pass its exceptions to ``on_error``, if that is given."""
    try:
        hook(*given)
    except Exception as error:
        if on_error is None:
            raise
        on_error(error)


def _mask_gradient(chunk: Chunk, bits: Tensor, parameter: Tensor) -> None:
    """Mask a parameter's gradient."""
    gradient = parameter.grad
    if gradient is not None and gradient.is_sparse:  # of an embedding: only some rows
        rows = parameter.grad = gradient.coalesce()
        _clear(rows._values(), bits[rows._indices()[0]])
        return
    held = chunk.like(gradient)
    if held is not None:
        _clear(held, bits)


def _clear(values: Tensor, bits: Tensor) -> None:
    """Set values to zero, in place, where the bits are zero; integer views need no gradient mode."""
    if bits.dtype.itemsize != values.dtype.itemsize or bits.device != values.device:  # the module was converted
        bits = _bits(bits != 0, values)
    values.detach().view(bits.dtype).bitwise_and_(bits.reshape(values.shape))


def _masked(values: Tensor, bits: Tensor) -> Tensor:
    """Return the values of pruned weights, zero elsewhere; −0 counts as zero."""
    kept = (bits != 0).reshape(values.shape).to(values.device)
    return torch.where(kept, 0, values.detach())


def takes_hooks(optimizer: object) -> bool:
    """Return whether an optimizer supports step hooks."""
    return hasattr(optimizer, "_optimizer_step_post_hooks")


def _bits(mask: Tensor, like: Tensor) -> Tensor:
    """Return −1 where a weight is kept and 0 elsewhere, as integers of the weights' size on their device."""
    return -mask.to(device=like.device).to(BITS[like.dtype.itemsize])
