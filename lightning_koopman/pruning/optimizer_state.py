"""Optimizer state of parameters that are reinitialized or get smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def forget(optimizers: Iterable[torch.optim.Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Reset the optimizer state of parameters, as if they had never been stepped.

    Args:
        optimizers: The optimizers.
        parameters: Parameters, of which each optimizer may hold some.
    """
    fresh = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held = [parameter for parameter in group["params"] if id(parameter) in fresh]
            if held and isinstance(optimizer, torch.optim.LBFGS):
                optimizer.state.clear()  # one memory for all parameters
            for parameter in held:
                if isinstance(optimizer, torch.optim.Adagrad):  # its constructor creates the state
                    optimizer.state[parameter]["step"].zero_()
                    optimizer.state[parameter]["sum"].fill_(group["initial_accumulator_value"])
                else:
                    optimizer.state.pop(parameter, None)


def hand_over(before: Sequence[torch.optim.Optimizer], after: Sequence[torch.optim.Optimizer]) -> None:
    """Give newly built optimizers the parameters that had been added to the old ones, such as unfrozen layers.

    Args:
        before: The old optimizers.
        after: The new optimizers, in the same order.
    """
    stepped = {id(each) for optimizer in after for group in optimizer.param_groups for each in group["params"]}
    for old, new in zip(before, after, strict=False):
        for group in old.param_groups:
            missing = [each for each in group["params"] if id(each) not in stepped and each.requires_grad]
            if missing:
                new.add_param_group(group | {"params": missing})


def replacement(
    optimizers: Iterable[torch.optim.Optimizer], exchanged: Sequence[tuple[nn.Parameter, nn.Parameter, Tensor]]
) -> Callable[[], None]:
    """Prepare optimizers to step smaller parameters in place of the old ones, with the state of the kept elements.

    Args:
        optimizers: The optimizers.
        exchanged: Old parameters, new ones, and the flat indices of the old elements that the new ones keep.

    Returns:
        A function that makes the exchange; everything that can fail is done before it is returned.
    """
    known = {id(old): (old, new, index) for old, new, index in exchanged}
    held = list(optimizers)
    states = {
        (number, id(old)): _smaller(optimizer.state[old], old, new, index)
        for number, optimizer in enumerate(held)
        for old, new, index in known.values()
        if old in optimizer.state
    }

    def commit() -> None:
        for number, optimizer in enumerate(held):
            flat = isinstance(optimizer, torch.optim.LBFGS)  # one memory for all parameters
            for group in optimizer.param_groups:
                for position, parameter in enumerate(group["params"]):
                    if id(parameter) not in known:
                        continue
                    old, new, _ = known[id(parameter)]
                    group["params"][position] = new  # in place, because some optimizers keep the list
                    optimizer.state.pop(old, None)
                    if flat:
                        optimizer.state.clear()
                        optimizer._numel_cache = None  # type: ignore[attr-defined]
                    elif states.get((number, id(old))):
                        optimizer.state[new] = states[number, id(old)]

    return commit


def check_replacement(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Check that optimizers can step a parameter that got smaller, by trying it on a twin of each.

    Raises:
        ValueError: If one cannot.  An optimizer whose twin cannot be built from its defaults, or cannot take a first
            step, is skipped.
    """
    for optimizer in optimizers:
        given = next((each for group in optimizer.param_groups for each in group["params"]), None)
        if given is None:
            continue
        old = nn.Parameter(torch.ones(4, 3, device=given.device))
        new = nn.Parameter(old.detach()[:2].clone())
        try:
            twin = type(optimizer)([old], **optimizer.defaults)
            _step(twin, old)
        except Exception:  # it has requirements of its own
            continue
        try:
            replacement([twin], [(old, new, torch.arange(6, device=given.device))])()
            _step(twin, new)
        except Exception as error:
            name = type(optimizer).__name__
            raise ValueError(
                f"structured=True gives the optimizer smaller parameters, which {name} cannot step: "
                f"{type(error).__name__}: {error}: take another optimizer, or prune with structured=False."
            ) from error


def _step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Take one step with a gradient of ones."""
    parameter.grad = torch.ones_like(parameter)
    optimizer.step(lambda: float(parameter.detach().sum()))


def _smaller(state: Mapping[str, Any], old: Tensor, new: Tensor, index: Tensor) -> dict[str, Any]:
    """Return the optimizer state of the kept elements; empty if its tensors have other shapes than the parameter."""
    tensors = [value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1]
    if any(value.shape != old.shape for value in tensors):  # such as Adafactor's sums over rows and columns
        return {}
    return {
        key: value.reshape(-1)[index].reshape(new.shape)
        if isinstance(value, Tensor) and value.shape == old.shape
        else value
        for key, value in state.items()
    }
