"""Reinitialize the weights of chosen modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.parameters.derived import check_can_be_set, plain_weights
from lightning_koopman.parameters.process_group import Processes
from lightning_koopman.parameters.randomness import seeded
from lightning_koopman.parameters.select import match_names
from lightning_koopman.parameters.sharded_modules import is_kind, local_chunks, named_parts
from lightning_koopman.parameters.shards import Chunk, copy_replicas

Scheme = Callable[[nn.Module], Any] | str | None
Initializer = Callable[[nn.Module], Any] | None
SCHEMES: dict[str, Callable[[Tensor], Any]] = {
    "he": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "xavier": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
}


def check_scheme(scheme: object) -> None:
    """Raise ValueError unless ``scheme`` is a known way to initialize weights."""
    if not (scheme is None or callable(scheme) or (isinstance(scheme, str) and scheme in SCHEMES)):
        raise ValueError(f"scheme must be None, one of {sorted(SCHEMES)} or a callable, got {scheme!r}.")
    if getattr(scheme, "__module__", "") == "torch.nn.init":
        raise ValueError(f"scheme must take a module, but {scheme!r} takes a tensor: wrap it in a function.")


def select_modules(
    module: nn.Module, patterns: str | Sequence[str] | None, scheme: Scheme, *, strict: bool = True
) -> dict[str, nn.Module]:
    """Return the modules, by name, that own parameters and are to be reinitialized.

    Args:
        module: Any module.
        patterns: Shell-style patterns over the names of ``module.named_modules()``, such as ``"head*"`` or
            ``["*", "!backbone.*"]``; one that begins with ``!`` excludes (default: all that own a parameter that
            requires a gradient, and norms without parameters).
        scheme: As for :func:`reinitialize`.
        strict: Whether to refuse modules that :func:`without_reset` names.

    Raises:
        ValueError: If nothing is selected, a pattern matches nothing, or a module cannot be reinitialized.
    """
    parts = named_parts(module)
    inside = {id(each) for part in parts.values() for each in getattr(part, "parametrizations", {}).values()}
    owners = {
        name: owner
        for name, owner in parts.items()
        if (list(_own(owner)) or hasattr(owner, "reset_running_stats")) and id(owner) not in inside
    }
    if patterns is None:
        chosen = {
            name: owner
            for name, owner in owners.items()
            if any(parameter.requires_grad for parameter in _own(owner))
            or not list(_own(owner))  # a norm without parameters, which keeps running statistics
        }
    else:
        names = match_names(owners, patterns, argument="modules", kind="module that owns parameters")
        chosen = {name: owners[name] for name in names}
    if not any(list(_own(owner)) for owner in chosen.values()):
        raise ValueError(
            f"modules={patterns!r} selects no module with trainable parameters: pass names of such modules."
        )
    for name, owner in chosen.items():
        check_can_be_set(owner, name)
    lacking = without_reset(module, chosen, scheme)
    if lacking and (strict or len(lacking) == len(chosen)):
        raise ValueError(
            f"module {lacking[0] or 'itself'!r} ({type(chosen[lacking[0]]).__name__}) owns parameters but has no "
            "`reset_parameters`: define it, pass a callable `scheme`, or exclude it from `modules` with '!'."
        )
    return chosen


def without_reset(root: nn.Module, chosen: Mapping[str, nn.Module], scheme: Scheme) -> list[str]:
    """Return the names of chosen modules that neither they themselves nor the scheme can reinitialize."""
    if callable(scheme):
        return []
    known = _initializers(root)
    return [
        name
        for name, owner in chosen.items()
        if _own_reset(owner) is None and id(owner) not in known and not (scheme and _matrices(owner))
    ]


def _initializers(root: nn.Module) -> dict[int, Callable[[nn.Module], Any]]:
    """Return the initialization of the models of ``transformers``, by the id of each module in them."""
    models: list[Any] = [part for part in root.modules() if is_kind(part, "PreTrainedModel")]  # outer ones first
    return {id(part): model._init_weights for model in models for part in model.modules()}


def reinitialize(
    modules: Sequence[nn.Module],
    scheme: Scheme = None,
    *,
    seed: int,
    chunks: Sequence[Mapping[str, Chunk]] | None = None,
    root: nn.Module | None = None,
) -> None:
    """Reinitialize the parameters of modules reproducibly, without changing the global random state.

    Args:
        modules: The modules; only parameters that they own themselves are changed.
        scheme: None for each module's own ``reset_parameters``; ``"he"``, ``"xavier"`` or ``"orthogonal"`` for its
            matrices and kernels, with zero biases (embeddings, and modules without matrices, use their own);
            or a callable that is given each module.
        seed: Seed of the random draws.
        chunks: For each module, what this process holds of its parameters, by their names in the module.  Sharded ones
            are drawn whole, a module at a time, and cut, so that all processes draw what a single one would.
        root: The network that they belong to; a model of ``transformers`` in it initializes its own modules.

    Example:
        >>> import torch
        >>> from lightning_koopman.parameters.reinitialize import reinitialize
        >>> layer = torch.nn.Linear(3, 3)
        >>> reinitialize([layer], "orthogonal", seed=0)
        >>> bool(torch.allclose(layer.weight @ layer.weight.T, torch.eye(3), atol=1e-6))
        True
    """
    devices = {parameter.device for module in modules for parameter in module.parameters(recurse=False)}
    known = {} if root is None else _initializers(root)
    with seeded(seed, devices), torch.no_grad():
        for module, own in zip(modules, chunks or [{} for _ in modules], strict=True):
            if all(chunk.whole for chunk in own.values()):
                _draw(module, scheme, known.get(id(module)))
            else:
                _draw_whole(module, scheme, known.get(id(module)), own)


def reinitialize_by_name(
    root: nn.Module, names: Sequence[str], scheme: Scheme, *, seed: int, processes: Processes
) -> None:
    """Reinitialize some modules of a network, alike in all processes; if that fails, restore the network.

    Args:
        root: The network; under FSDP the outermost wrapped module.
        names: Names of the modules, without wrappers' prefixes.
        scheme: As for :func:`reinitialize`.
        seed: As for :func:`reinitialize`.
        processes: All processes that train the network.
    """
    chunks = local_chunks(root, remove_duplicate=False)
    owned: dict[str, dict[str, Chunk]] = {}
    for name, chunk in chunks.items():
        owner, _, leaf = name.rpartition(".")
        owned.setdefault(owner, {})[leaf] = chunk
    modules = named_parts(root)
    held = [chunk.tensor.detach() for chunk in chunks.values()]
    before = [(tensor, tensor.clone()) for tensor in (*held, *root.buffers())]
    own = [owned.get(name, {}) for name in names]
    try:
        with processes.together():
            reinitialize([modules[name] for name in names], scheme, seed=seed, chunks=own, root=root)
    except Exception:  # in any process: restore what was changed
        for tensor, value in before:
            tensor.copy_(value)
        raise
    copy_replicas(chunks.values(), processes)  # other hardware may draw other numbers
    for buffer in root.buffers():
        processes.copy_from_first(buffer)


def _draw_whole(module: nn.Module, scheme: Scheme, initialize: Initializer, chunks: Mapping[str, Chunk]) -> None:
    """Reinitialize what one module owns as whole parameters in place of sharded ones, and keep this process's part."""
    twin: nn.Module = object.__new__(type(module))  # FSDP's layers cannot be copied
    vars(twin).update({name: value for name, value in vars(module).items() if name not in chunks})
    fresh = {name: torch.full(each.shape, math.nan).to(each.tensor) for name, each in chunks.items()}
    twin._parameters = {name: nn.Parameter(value) for name, value in fresh.items()}
    _draw(twin, scheme, initialize)
    for name, chunk in chunks.items():
        drawn = chunk.take(twin._parameters[name].detach())  # type: ignore[union-attr]
        held = chunk.tensor.detach()
        held.copy_(torch.where(torch.isnan(drawn), held, drawn))  # NaN where the scheme set nothing


def _draw(module: nn.Module, scheme: Scheme, initialize: Initializer) -> None:
    """Reinitialize what one module owns; computed weights are set through the parameters they come from."""
    with plain_weights(module):
        if callable(scheme):
            scheme(module)
            return
        own = _own_reset(module)
        if own is not None:
            own()  # with a named scheme, too: resets all but matrices and biases, such as running statistics
        if initialize is not None:
            for parameter in module.parameters(recurse=False):
                vars(parameter).pop("_is_hf_initialized", None)  # set on pretrained weights, which it would keep
            initialize(module)
        matrices = _matrices(module)
        if scheme is None or not matrices or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return
        for matrix in matrices:
            SCHEMES[scheme](matrix)
        for name, parameter in module.named_parameters(recurse=False):
            if "bias" in name:
                parameter.zero_()


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that a module owns itself, including those that its weights are computed from."""
    yield from module.parameters(recurse=False)
    for each in getattr(module, "parametrizations", {}).values():
        yield from each.parameters()


def _own_reset(module: nn.Module) -> Callable[[], Any] | None:
    """Return the module's own initialization (``nn.MultiheadAttention`` has it under a private name)."""
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters(recurse=False) if parameter.ndim >= 2]
