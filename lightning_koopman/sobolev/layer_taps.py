"""Forward hooks that record what a network's layers return."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman._checks import check_instance
from lightning_koopman.parameters.select import as_patterns, match_names


class Tap:
    """Forward hook that keeps a layer's last output until it is taken, as long as its loss exists."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.value: Any = None
        self.calls = 0  # with gradients enabled
        self.with_grad = True
        self._owner: weakref.ref[nn.Module] | None = None

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Called by PyTorch after the layer."""
        with_grad = torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            if self._owner is None or self._owner() is None:  # in a copy of the network without the loss
                return
            if torch._C._current_graph_task_id() != -1:  # rerun by a checkpoint in a backward pass
                return
            self.calls += with_grad
        self.value, self.with_grad = output, with_grad

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}  # activations are not copied; the copied loss calls `belong_to`

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def belong_to(self, loss: nn.Module) -> None:
        """Set the loss that this tap records for."""
        self._owner = weakref.ref(loss)

    def take(self) -> Tensor:
        """Return the recorded output and clear it."""
        value: Any = self.value
        self.value, self.calls, self.with_grad = None, 0, True
        if value is None:
            raise RuntimeError(
                f"layer {self.name!r} has not run since the loss was last called: run the network first, on all "
                "samples at once. A compiled network must not have run before its loss was created."
            )
        if not isinstance(value, Tensor):
            raise TypeError(f"layer {self.name!r} returns a {type(value).__name__}: name layers that return a tensor.")
        return value


def layer_names(network: nn.Module, layers: str | Sequence[str]) -> list[str]:
    """Return the names of the layers that match.

    Raises:
        ValueError: If a pattern matches no layer.
    """
    check_instance("network", network, nn.Module, "a torch.nn.Module")
    try:
        layers = as_patterns(layers, "layers") or ()
    except TypeError as error:
        raise ValueError(f"layers must be names of layers, got {layers!r}: see network.named_modules().") from error
    named = [name for name, _ in network.named_modules() if name]
    return match_names(named, layers, argument="layers", kind="layer")


def run_once(network: nn.Module, example: Any, layers: Sequence[str]) -> tuple[Any, dict[str, list[Any]]]:
    """Run a network on an example without changing it; return its output and what its layers returned.

    Raises:
        ValueError: If the network fails on it.
    """
    modes = {part: part.training for part in network.modules()}
    heard: dict[str, list[Any]] = {}  # in the order in which they run

    def hear(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        heard.setdefault(name, []).append(output)

    hooks = [network.get_submodule(name).register_forward_hook(partial(hear, name)) for name in layers]
    network.eval()
    try:
        with torch.no_grad():
            output = network(*example) if isinstance(example, tuple) else network(example)
    except Exception as error:
        raise ValueError(
            f"the network fails on the example: {type(error).__name__}: {error}: give an input that `forward` takes."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for part, training in modes.items():
            part.training = training
    return output, heard
