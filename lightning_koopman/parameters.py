"""Which of a network's parameters are observed, and how they become one flat vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter


def select_parameters(module: nn.Module, patterns: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Parameters of a module by name; shared ones appear once.

    Args:
        module: Any module.
        patterns: Shell-style patterns over the names of ``module.named_parameters()``, such as ``"encoder.*"`` or
            ``["*.weight", "!head.*"]``; one that begins with ``!`` excludes.  Default: all that require a gradient.

    Returns:
        Names and parameters, in the module's order.

    Raises:
        ValueError: If nothing is selected, a pattern matches nothing, or a selected parameter cannot be observed (lazy,
            complex or sharded).

    Example:
        >>> from torch import nn
        >>> from lightning_koopman import select_parameters
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> list(select_parameters(network, ["*.weight", "!0.*"]))
        ['2.weight']
    """
    named = dict(module.named_parameters())
    if patterns is None:
        chosen = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        if not chosen:
            raise ValueError(
                f"parameters=None selects the trainable parameters, but the module has none among {_names(named)}: "
                "name the ones to observe, or unfreeze some."
            )
    else:
        wanted = [patterns] if isinstance(patterns, str) else list(patterns)
        for pattern in wanted:
            if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in named):
                raise ValueError(f"parameters={pattern!r} matches no parameter; the module has {_names(named)}.")
        include = [pattern for pattern in wanted if not pattern.startswith("!")] or ["*"]
        exclude = [pattern[1:] for pattern in wanted if pattern.startswith("!")]
        chosen = {
            name: parameter
            for name, parameter in named.items()
            if any(fnmatchcase(name, pattern) for pattern in include)
            and not any(fnmatchcase(name, pattern) for pattern in exclude)
        }
        if not chosen:
            raise ValueError(f"parameters={wanted!r} selects nothing: the exclusions remove every match.")
    for name, parameter in chosen.items():
        _check_observable(name, parameter)
    return chosen


def flatten(parameters: Mapping[str, Tensor]) -> Tensor:
    """One float32 vector (n,) on the CPU of all given tensors, in order; at most one transfer from each device."""
    pieces = [parameter.detach().reshape(-1).to(torch.float32) for parameter in parameters.values()]
    if len({piece.device for piece in pieces}) > 1:
        pieces = [piece.cpu() for piece in pieces]
    return torch.cat(pieces).cpu()


def _check_observable(name: str, parameter: nn.Parameter) -> None:
    problem = None
    if isinstance(parameter, UninitializedParameter):
        problem = "is a lazy parameter without a shape yet: run one batch through the module before fitting"
    elif parameter.is_complex():
        problem = "is complex, which is not supported: exclude it with a '!' pattern"
    elif hasattr(parameter, "device_mesh"):
        problem = "is sharded over processes (a DTensor), which is not supported yet: use a replicated strategy"
    if problem:
        raise ValueError(f"parameter {name!r} {problem}.")


def _names(named: Mapping[str, object]) -> str:
    """The first few names, for messages."""
    return ", ".join(list(named)[:8]) + (", …" if len(named) > 8 else "") if named else "no parameters at all"
