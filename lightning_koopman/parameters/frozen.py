"""Tensors as they were when training began: those that reinitialization does not reset."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from lightning_koopman.parameters.sharded_modules import clean_name

MOST = 2  # copies take at most this many times the memory of the trained parameters


class FrozenTensors:
    """Copies of a module's frozen parameters and buffers, up to twice the memory of its trained parameters.

    They are needed where, for example, a teacher follows a network that became NaN: only a copy makes it finite again.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self.initial: dict[str, Tensor] = {}  # of the parameters that are set back in any case

    def __getstate__(self) -> dict[str, dict[str, Tensor]]:  # a pickled or deep-copied object makes its own copies
        return {"_copies": {}, "initial": {}}

    def keep(self, module: nn.Module, initial: Sequence[str] = ()) -> None:
        """Copy the tensors that can become non-finite, the smallest first, while they fit.

        Args:
            module: The module.
            initial: Names of parameters that are set back in any case, and so are copied in any case.
        """
        room = MOST * sum(each.numel() * each.element_size() for each in module.parameters() if each.requires_grad)
        self.forget()
        named = {clean_name(name): each.detach() for name, each in module.named_parameters()}
        self.initial = {name: named[name].clone() for name in initial if name in named}
        for name, tensor in sorted(_untrained(module).items(), key=lambda item: item[1].numel()):
            room -= tensor.numel() * tensor.element_size()  # `nbytes` is not defined for sparse tensors
            if room < 0:
                return
            self._copies[name] = tensor.clone()

    def restore(self, module: nn.Module) -> list[str]:
        """Restore the tensors that are no longer finite, and the chosen parameters.

        Returns:
            Names of those without a copy.
        """
        lost = []
        for name, parameter in module.named_parameters():
            value = self.initial.get(clean_name(name))
            if value is not None and value.shape == parameter.shape:
                parameter.detach().copy_(value)
        for name, tensor in _untrained(module).items():
            if not torch.isfinite(tensor).all():
                copy = self._copies.get(name)
                if copy is not None and copy.shape == tensor.shape:
                    tensor.copy_(copy)
                else:
                    lost.append(name)
        return lost

    def forget(self) -> None:
        """Free the copies."""
        self._copies, self.initial = {}, {}


def _untrained(module: nn.Module) -> dict[str, Tensor]:
    """Return the frozen parameters and buffers of floating-point or complex type, detached, by name."""
    named = chain(module.named_parameters(), module.named_buffers())
    return {
        name: tensor.detach()
        for name, tensor in named
        if not tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex())
    }
