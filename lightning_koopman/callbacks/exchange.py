"""Swap a module's weights for others and back, also if an error is raised."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_koopman.parameters.sharded_modules import named_tensors


class Exchange:
    """Swaps weights with a module and holds those that the module does not.

    Attributes:
        inside: Whether the module holds the other weights.
        held: Tensors that the module does not hold now, by name, or None if there are no other weights.
    """

    def __init__(self) -> None:
        self.inside = False
        self.held: dict[str, Tensor] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"inside": False, "held": None}

    def put_in(self, root: nn.Module, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Put other parameters and buffers, this process's part of them by name, into a module with its wrapper."""
        self.held = dict(values)
        try:
            self.swap(root, module)
        except BaseException:
            self.held = None
            raise

    def take_out(self, root: nn.Module, module: nn.Module) -> None:
        """Restore the module's own weights exactly."""
        if self.inside:
            self.swap(root, module)
            self.held = None

    def keep(self) -> None:
        """Keep the weights that are in the module and discard the others."""
        self.held, self.inside = None, False

    @torch.no_grad()
    def swap(self, root: nn.Module, module: nn.Module) -> None:
        """Swap all weights of the module with those held, or none if an error is raised."""
        assert self.held is not None
        known = named_tensors(root, module)
        tensors = {name: known[name].detach() for name in self.held}
        others = {name: value.reshape(tensors[name].shape) for name, value in self.held.items()}
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        try:
            for name, tensor in tensors.items():
                tensor.copy_(others[name])
        except BaseException:
            for name, tensor in tensors.items():
                tensor.copy_(own[name])
            raise
        self.held, self.inside = own, not self.inside
