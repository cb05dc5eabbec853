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
    """

    def __init__(self) -> None:
        self.inside = False
        self._held: dict[str, Tensor] | None = None  # tensors that the module does not hold now, by name

    def __getstate__(self) -> dict[str, object]:
        return {"inside": False, "_held": None}

    @property
    def ready(self) -> bool:
        """Whether there are weights to swap."""
        return self._held is not None

    @property
    def differs(self) -> bool:
        """Whether any tensor is swapped, so that the weights may differ."""
        return bool(self._held)

    def put_in(self, root: nn.Module, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Put other weights into the module.

        Args:
            root: The module, or FSDP's wrapper around it.
            module: The module.
            values: This process's part of the parameters and buffers, by name.
        """
        self._held = dict(values)
        try:
            self.swap(root, module)
        except BaseException:
            self._held = None
            raise

    def take_out(self, root: nn.Module, module: nn.Module) -> None:
        """Restore the module's own weights exactly."""
        if self.inside:
            self.swap(root, module)
            self._held = None

    def keep(self) -> None:
        """Keep the weights that are in the module and discard the others."""
        self._held, self.inside = None, False

    @torch.no_grad()
    def swap(self, root: nn.Module, module: nn.Module) -> None:
        """Swap all weights of the module with those held, or none if an error is raised."""
        assert self._held is not None
        known = named_tensors(root, module)
        tensors = {name: known[name].detach() for name in self._held}
        others = {name: value.reshape(tensors[name].shape) for name, value in self._held.items()}
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        try:
            for name, tensor in tensors.items():
                tensor.copy_(others[name])
        except BaseException:
            for name, tensor in tensors.items():
                tensor.copy_(own[name])
            raise
        self._held, self.inside = own, not self.inside
