"""Trial removals of channels on copies of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.parameters.randomness import seeded
from lightning_koopman.parameters.sharded_modules import clean_name, named_parts
from lightning_koopman.pruning.channel_removal import ChannelRemoval
from lightning_koopman.pruning.channel_tracing import Run, eager, eager_copy, tensors

OUTPUT = "its outputs leave the network"
Copy = Callable[[Any], Any]  # of a module


def agrees(module: nn.Module, run: Run, removal: ChannelRemoval, copy: Copy, also: Sequence[Run] = ()) -> bool:
    """Return whether a copy without the channels computes the same as one with their weights set to zero.

    Both get the same random weights, because the present ones may be zero where it matters.  The smaller copy must also
    run in training mode, and in all other uses of the network.
    """
    zeroed, smaller = eager_copy(module, copy), eager_copy(module, copy)
    for network in (zeroed, smaller):
        _draw(network)
    for path, tensor in zeroed.named_parameters():
        name = clean_name(path)
        if name in removal.kept:
            gone = torch.ones(tensor.numel(), dtype=torch.bool, device=tensor.device)
            gone[removal.kept[name][0].to(tensor.device)] = False
            tensor.data.masked_fill_(gone.reshape(tensor.shape), 0.0)
    removal.apply(smaller)
    heads = [name for name, reason in removal.left_alone.items() if reason == OUTPUT]
    expected, found = (_outputs(network.eval(), run, heads) for network in (zeroed, smaller))
    if not _alike(expected, found, module):
        return False
    for use in (run, *also):
        try:
            _outputs(eager_copy(module, copy).train(), use, [])
        except Exception:  # it fails with all channels too
            continue
        _outputs(smaller.train(), use, [])
    return True


def check_repeats(module: nn.Module, run: Run, copy: Copy) -> None:
    """Raise ValueError if two equal copies compute different outputs, so that copies cannot be compared."""
    twice = []
    for _ in range(2):
        network = eager_copy(module, copy)
        _draw(network)
        twice.append(_outputs(network.eval(), run, []))
    if twice[0] and not any(bool(values.isfinite().any()) for values in twice[0]):
        raise ValueError("`run` gives only NaN or infinite values for random weights, so copies cannot be compared.")
    if not _alike(twice[0], twice[1], module):
        raise ValueError(
            "the step is not reproducible: two equal copies of the network, with the same batch and the same seeds of "
            "PyTorch, NumPy and Python, gave different outputs. Draw random numbers from these generators, or from one "
            "that the module holds."
        )


def _alike(expected: Sequence[Tensor], found: Sequence[Tensor], module: nn.Module) -> bool:
    """Return whether outputs are equal up to rounding."""
    if [values.shape for values in expected] != [values.shape for values in found]:
        return False
    half = any(parameter.dtype.itemsize < 4 for parameter in module.parameters())
    allowed = 0.05 if half else 1e-3  # relative to the largest output
    return all(_close(a, b, allowed) for a, b in zip(expected, found, strict=True))


def _close(a: Tensor, b: Tensor, allowed: float) -> bool:
    """Return whether values are equal relative to the largest; masked logits, for instance, are infinite in both."""
    largest = a[a.isfinite()].abs().max() if a.isfinite().any() else 0.0
    return torch.allclose(b, a, rtol=0, atol=allowed * float(largest), equal_nan=True)


def _draw(network: nn.Module) -> None:
    """Set random weights of the usual size, equal for networks of the same structure."""
    drawn = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        values = torch.randn(parameter.shape, generator=drawn)
        if parameter.ndim >= 2:
            values *= max(1, parameter[:1].numel()) ** -0.5
        else:
            values = 1 + 0.3 * values
        parameter.data.copy_(values)


def _outputs(network: nn.Module, run: Run, heads: Sequence[str]) -> list[Tensor]:
    """Return the outputs of some layers and of the whole network."""
    outputs: list[Tensor] = []
    parts = named_parts(network)
    hooks = [
        parts[name].register_forward_hook(lambda *given: outputs.append(given[2].detach().clone())) for name in heads
    ]
    try:
        with seeded(0, {parameter.device for parameter in network.parameters()}), torch.enable_grad(), eager():
            outputs += [value.detach() for value in tensors(run(network))]
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
