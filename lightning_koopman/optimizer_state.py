"""What optimizers remember of parameters that are drawn anew or get smaller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def forget(optimizers: Iterable[torch.optim.Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Let optimizers treat parameters as if they had never stepped them.

    Args:
        optimizers: The optimizers.
        parameters: Parameters, of which each optimizer may hold some.
    """
    fresh = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held = [parameter for parameter in group["params"] if id(parameter) in fresh]
            if held and isinstance(optimizer, torch.optim.LBFGS):
                optimizer.state.clear()  # one memory for all parameters together
            for parameter in held:
                if isinstance(optimizer, torch.optim.Adagrad):  # which fills its state when it is built
                    optimizer.state[parameter]["step"].zero_()
                    optimizer.state[parameter]["sum"].fill_(group["initial_accumulator_value"])
                else:
                    optimizer.state.pop(parameter, None)


def replace(
    optimizers: Iterable[torch.optim.Optimizer], exchanged: Sequence[tuple[nn.Parameter, nn.Parameter, Tensor]]
) -> None:
    """Let optimizers step smaller parameters in place of the old ones, remembering what they knew of what is left.

    Args:
        optimizers: The optimizers.
        exchanged: Old parameters, new ones, and the flat indices of the old entries that the new ones keep.
    """
    known = {id(old): (new, index) for old, new, index in exchanged}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for position, old in enumerate(group["params"]):
                if id(old) not in known:
                    continue
                new, index = known[id(old)]
                group["params"][position] = new  # in place: some optimizers keep the list
                if isinstance(optimizer, torch.optim.LBFGS):
                    optimizer.state.clear()
                    optimizer._numel_cache = None
                elif old in optimizer.state:
                    optimizer.state[new] = {
                        key: value.reshape(-1)[index].reshape(new.shape)
                        if isinstance(value, Tensor) and value.shape == old.shape
                        else value
                        for key, value in optimizer.state.pop(old).items()
                    }
