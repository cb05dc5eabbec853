"""Selection of the parameters of a network that are observed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_koopman._checks import check_instance
from lightning_koopman.parameters.sharded_modules import local_chunks


def check_network(name: str, module: nn.Module) -> None:
    """Raise TypeError or ValueError unless ``module`` is a network whose parameters have values."""
    check_instance(name, module, nn.Module, "a torch.nn.Module")
    for path, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name} has a lazy parameter, {path!r}: run one batch through the module first.")
        if parameter.is_meta:
            raise ValueError(f"{name} has {path!r} on the meta device, without values: move it with `to_empty` first.")


def select_parameters(module: nn.Module, patterns: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Return the parameters of a module by name; shared ones appear once.

    Args:
        module: Any module; under FSDP the outermost wrapped one.
        patterns: Shell-style patterns over the names of ``module.named_parameters()``, such as ``"encoder.*"`` or
            ``["*.weight", "!head.*"]``; one that begins with ``!`` excludes.  Default: all that require a gradient.

    Returns:
        Names and parameters, in the module's order.

    Raises:
        ValueError: If nothing is selected, a pattern matches nothing, or a selected parameter is lazy.

    Example:
        >>> from torch import nn
        >>> from lightning_koopman import select_parameters
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> list(select_parameters(network, ["*.weight", "!0.*"]))
        ['2.weight']
    """
    check_instance("module", module, nn.Module, "a torch.nn.Module")
    named = {name: chunk.parameter for name, chunk in local_chunks(module).items()}
    if patterns is None:
        chosen = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        if not chosen:
            raise ValueError(
                f"parameters=None selects the trainable parameters, but the module has none (it has "
                f"{_listed(list(named)) or 'no parameters at all'}): name the ones to observe, or unfreeze some."
            )
    else:
        names = match_names(named, patterns, argument="parameters", kind="parameter")
        chosen = {name: named[name] for name in names}
    for name, parameter in chosen.items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} is lazy and has no shape yet: run one batch through the module first."
            )
    return chosen


def as_patterns(patterns: str | Sequence[str] | None, argument: str = "parameters") -> tuple[str, ...] | None:
    """Return patterns, one or several or none, as a tuple or None; raise TypeError unless they are strings."""
    if patterns is None or isinstance(patterns, str):
        return None if patterns is None else (str(patterns),)
    loose: Any = patterns
    several = (isinstance(loose, Sequence) and not isinstance(loose, bytes)) or getattr(loose, "ndim", 0) == 1
    given = list(loose) if several else [None]
    if not all(isinstance(each, str) for each in given):
        raise TypeError(
            f"{argument} must be shell-style patterns of names, a string or a list of strings, got {patterns!r}."
        )
    return tuple(map(str, given))


def match_names(names: Iterable[str], patterns: str | Sequence[str], *, argument: str, kind: str) -> list[str]:
    """Return the names that match a shell-style pattern and none of those that begin with ``!``, in their order.

    Args:
        names: All names.
        patterns: One pattern or several; if all exclude, ``"*"`` is added.
        argument: Name of the user's argument, for messages.
        kind: What the names denote, for messages.

    Raises:
        ValueError: If there is no pattern, one matches nothing, or nothing is left.
    """
    known = list(names)
    wanted = list(as_patterns(patterns, argument) or ())
    if not wanted:
        raise ValueError(f"{argument}={patterns!r} is empty: pass one or more patterns, or None for the default.")
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in known):
            raise ValueError(
                f"{argument}={pattern!r} matches no {kind}; the module has {_listed(known) or 'none'}: "
                "fix the patterns."
            )
    include = [pattern for pattern in wanted if not pattern.startswith("!")] or ["*"]
    exclude = [pattern[1:] for pattern in wanted if pattern.startswith("!")]
    chosen = [
        name
        for name in known
        if any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not chosen:
        raise ValueError(
            f"{argument}={wanted!r} selects nothing: the exclusions remove every match, so fix the patterns."
        )
    return chosen


def _listed(names: list[str]) -> str:
    """Return the first few names, for messages."""
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
