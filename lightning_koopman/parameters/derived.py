"""Weights that are computed from other parameters: weight norm, spectral norm, parametrizations, PyTorch's pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

STEMS = ("g", "v", "orig")  # suffixes that the older utilities append to a weight's name


def underlying(module: nn.Module) -> dict[str, list[str]]:
    """Return, by weight that the older utilities compute, the names of the parameters that it is computed from."""
    found: dict[str, list[str]] = {}
    own = dict(module.named_parameters(recurse=False))  # scripted modules have no dict of them
    for name in own:
        stem, _, kind = name.rpartition("_")
        if stem and kind in STEMS and stem not in own and hasattr(module, stem):
            found.setdefault(stem, []).append(name)
    return found


def check_can_be_set(module: nn.Module, name: str) -> None:
    """Raise ValueError if a module computes a weight in a way that cannot be inverted to set it."""
    for leaf, steps in getattr(module, "parametrizations", {}).items():
        if not all(hasattr(step, "right_inverse") for step in steps):
            raise ValueError(
                f"the {leaf} of module {name!r} is computed by {type(steps[-1]).__name__}, which has no "
                "`right_inverse`, so it cannot be reinitialized: exclude the module from `modules` with '!'."
            )


@contextmanager
def plain_weights(module: nn.Module) -> Iterator[None]:
    """Context in which all weights of a module are plain parameters, also those computed from other parameters.

    On exit, the parameters that a weight is computed from are set to reproduce its value.  They are the same objects as
    before.
    """
    old = underlying(module)
    new = dict(getattr(module, "parametrizations", {}))
    if not old and not new:
        yield
        return
    kind, own = type(module), dict(module._parameters)
    computed = {leaf: getattr(module, leaf).detach().clone() for leaf in (*old, *new)}
    if new:
        module.__class__ = parametrize.type_before_parametrizations(module)
    for leaf, names in old.items():
        vars(module).pop(leaf, None)
        for name in names:
            del module._parameters[name]
    module._parameters |= {leaf: nn.Parameter(value, requires_grad=False) for leaf, value in computed.items()}
    try:
        yield
        drawn = {leaf: module._parameters[leaf] for leaf in computed}
    finally:
        module.__class__ = kind
        module._parameters.clear()
        module._parameters.update(own)
        vars(module).update({leaf: computed[leaf] for leaf in old})
    for leaf in old:
        _set_older(module, leaf, drawn[leaf].detach())  # type: ignore[union-attr]
    for leaf, steps in new.items():
        value: Any = drawn[leaf].detach()  # type: ignore[union-attr]
        for step in reversed(list(steps)):
            value = step.right_inverse(value)
        values = [value] if isinstance(value, Tensor) else list(value)
        originals = [each for name, each in steps.named_parameters(recurse=False) if name.startswith("original")]
        for original, fresh in zip(originals, values, strict=True):
            original.data.copy_(fresh)


def _set_older(module: nn.Module, leaf: str, value: Tensor) -> None:
    """Set the parameters from which the older utilities compute a weight."""
    gain, direction = module._parameters.get(f"{leaf}_g"), module._parameters.get(f"{leaf}_v")
    if gain is None or direction is None:
        original = module._parameters[f"{leaf}_orig"]
        assert original is not None
        original.data.copy_(value)
    else:
        hooks: list[Callable[..., Any]] = [
            hook for hook in module._forward_pre_hooks.values() if getattr(hook, "name", None) == leaf
        ]
        dim = getattr(hooks[0], "dim", 0) if hooks else 0
        gain.data.copy_(torch.norm_except_dim(value, 2, dim))
        direction.data.copy_(value)
    vars(module)[leaf] = value
