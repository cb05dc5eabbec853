"""Other weights in the place of a module's own, and back, whatever happens in between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_koopman.parameters.sharded_modules import named_tensors


class Exchange:
    """Holds the weights that a module does not.

    Attributes:
        inside: Whether the module holds the others.
    """

    def __init__(self) -> None:
        self.inside = False
        self._held: dict[str, Tensor] | None = None  # what the module does not hold now, by name

    def __getstate__(self) -> dict[str, object]:
        return {"inside": False, "_held": None}

    @property
    def ready(self) -> bool:
        """Whether there are others."""
        return self._held is not None

    @property
    def differs(self) -> bool:
        """Whether the others are not the module's own in any case."""
        return bool(self._held)

    def put_in(self, root: nn.Module, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Put others in.

        Args:
            root: The module, or FSDP's wrapper around it.
            module: The module.
            values: What this process holds of parameters, and buffers, by name.
        """
        self._held = dict(values)
        try:
            self.swap(root, module)
        except BaseException:
            self._held = None
            raise

    def take_out(self, root: nn.Module, module: nn.Module) -> None:
        """Put the own ones back, to the last bit."""
        if self.inside:
            self.swap(root, module)
            self._held = None

    def keep(self) -> None:
        """Leave in the module what it holds."""
        self._held, self.inside = None, False

    @torch.no_grad()
    def swap(self, root: nn.Module, module: nn.Module) -> None:
        """Exchange what the module holds with what it does not: all of it or, whatever is raised, nothing."""
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
