"""Listen to a network's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_koopman.parameters import match_names


class Tap:
    """Forward hook that keeps what a layer returned last, until it is taken."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.value: Tensor | None = None
        self.calls = 0
        self.with_grad = True

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Called by PyTorch after the layer."""
        if not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() != -1:  # run again by a checkpoint within a backward pass
                return
            self.calls += 1
        self.value, self.with_grad = output, torch.is_grad_enabled()

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "value": None, "calls": 0, "with_grad": True}  # activations have no place in a copy

    def take(self) -> Tensor:
        """The value, once."""
        value = self.value
        self.value, self.calls, self.with_grad = None, 0, True
        if value is None:
            raise RuntimeError(
                f"layer {self.name!r} has not run since the loss was last called: call the network first, "
                "with all of the samples at once."
            )
        if not isinstance(value, Tensor):
            raise TypeError(f"layer {self.name!r} returns a {type(value).__name__}: name layers that return a tensor.")
        return value


def tap_layers(network: nn.Module, layers: str | Sequence[str]) -> tuple[list[Tap], list[RemovableHandle]]:
    """Hooks on the layers that match, in the network's order.

    Raises:
        ValueError: If a pattern matches no layer.
    """
    if not isinstance(layers, str) and not all(isinstance(each, str) for each in layers):
        raise ValueError(f"layers must be names of layers, got {layers!r}: see network.named_modules().")
    named = {name: part for name, part in network.named_modules() if name}
    chosen = match_names(named, layers, argument="layers", kind="layer")
    taps = [Tap(name) for name in chosen]
    return taps, [named[tap.name].register_forward_hook(tap) for tap in taps]


def run_once(network: nn.Module, example: Any) -> Tensor:
    """The network's output for an example, with nothing of the network changed.

    Raises:
        ValueError: If the network fails on it, or returns no tensor.
    """
    modes = {part: part.training for part in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            output = network(*example) if isinstance(example, tuple) else network(example)
    except Exception as error:
        raise ValueError(
            f"the network fails on the example that shows its layers' widths: {type(error).__name__}: {error}"
        ) from error
    finally:
        for part, training in modes.items():
            part.training = training
    if not isinstance(output, Tensor):
        raise ValueError(f"the network returns a {type(output).__name__} for the example, not one tensor.")
    return output
