"""Selection of the parameters to prune."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_koopman._checks import check_instance
from lightning_koopman.parameters.derived import underlying
from lightning_koopman.parameters.select import match_names, select_parameters
from lightning_koopman.parameters.sharded_modules import local_chunks

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def prunable_parameters(module: nn.Module, patterns: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Select the parameters to prune, by name; a tied parameter appears once, under its first name.

    Args:
        module: Any module.
        patterns: Shell-style patterns of parameter names, of which a tied parameter has several; ``!`` excludes.
            Default: trainable, real matrices and kernels (two dimensions or more), without norms and parameters that
            other weights are computed from (weight norm and the like).

    Raises:
        ValueError: If nothing is selected, a pattern matches nothing, or a selected parameter is lazy, complex,
            frozen, or one that other weights are computed from.

    Example:
        >>> from torch import nn
        >>> from lightning_koopman import prunable_parameters
        >>> list(prunable_parameters(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))))
        ['0.weight', '2.weight']
    """
    check_instance("module", module, nn.Module, "a torch.nn.Module")
    chunks = local_chunks(module, remove_duplicate=False)
    named = {name: chunk.parameter for name, chunk in chunks.items()}
    first = {id(parameter): name for name, parameter in reversed(named.items())}
    derived = underlying_parameters(module)
    if patterns is None:
        norms = {id(each) for part in module.modules() if isinstance(part, NORMS) for each in part.parameters()}
        chosen = [
            name
            for name, chunk in chunks.items()
            if chunk.parameter.requires_grad
            and len(chunk.shape) >= 2
            and chunk.numel
            and not chunk.parameter.is_complex()
            and id(chunk.parameter) not in norms | derived
        ]
        if not chosen:
            raise ValueError(
                "parameters=None selects trainable matrices and kernels, but the module has none: pass patterns."
            )
    else:
        chosen = match_names(named, patterns, argument="parameters", kind="parameter")
    selected = {first[id(named[name])]: named[name] for name in chosen}
    select_parameters(module, list(selected))  # raises for parameters that cannot be observed
    for name, parameter in selected.items():
        if parameter.is_complex():
            raise ValueError(
                f"parameters={patterns!r} selects {name!r}, which is complex and cannot be masked: exclude it with '!'."
            )
        if id(parameter) in derived:
            raise ValueError(
                f"parameters={patterns!r} selects {name!r}, from which a weight is computed (a parametrization), so "
                "its zeros are not zeros of the weight: exclude it with '!', or remove the parametrization first."
            )
    frozen = [name for name, parameter in selected.items() if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"parameters={patterns!r} selects {frozen[0]!r}, which is frozen (requires_grad=False) and so has no "
            "trajectory to rank it by: unfreeze it, or exclude it with '!'."
        )
    return selected


def underlying_parameters(module: nn.Module) -> set[int]:
    """Return ids of parameters that weights are computed from: parametrizations, weight norm, PyTorch's own pruning."""
    lists = (part for part in module.modules() if isinstance(part, nn.utils.parametrize.ParametrizationList))
    found = {id(parameter) for part in lists for parameter in part.parameters()}
    for part in module.modules():
        found.update(id(part._parameters[name]) for names in underlying(part).values() for name in names)
    return found
