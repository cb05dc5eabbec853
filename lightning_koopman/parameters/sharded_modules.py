"""What this process holds of a module's parameters, whichever wrapper shards them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_koopman.parameters.shards import Chunk, Indices, one_run

# components of names that wrappers add
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def local_chunks(module: nn.Module, *, remove_duplicate: bool = True) -> dict[str, Chunk]:
    """Return what this process holds of a module's parameters, by their names without wrappers.

    Args:
        module: Any module; under FSDP the outermost wrapped one.  Layers that FSDP left gathered are resharded.
        remove_duplicate: Whether a shared parameter appears once, under its first name.
    """
    _reshard(module)
    named: dict[str, Chunk] = {}
    flat: set[int] = set()
    for path, part in module.named_modules():
        handle = getattr(part, "_handle", None) if is_kind(part, "FullyShardedDataParallel") else None
        if handle is not None and handle.uses_sharded_strategy:
            flat.add(id(handle.flat_param))
            named.update(_flat_chunks(clean_name(path), handle))
    inside = {id(chunk.parameter) for chunk in named.values()}
    for name, parameter in module.named_parameters(remove_duplicate=remove_duplicate):
        if id(parameter) not in inside | flat:
            named[clean_name(name)] = _chunk(parameter)
    order: dict[str, int] = {}
    for place, (path, _) in enumerate(module.named_modules()):
        order.setdefault(clean_name(path), place)
    return dict(sorted(named.items(), key=lambda item: order[item[0].rpartition(".")[0]])) if inside else named


def named_tensors(root: nn.Module, module: nn.Module) -> dict[str, Tensor]:
    """Return what this process holds of a module's parameters, and its buffers, by their names without wrappers.

    Args:
        root: The module, or FSDP's wrapper around it.
        module: The module.
    """
    parameters = {name: chunk.tensor for name, chunk in local_chunks(root).items()}
    return parameters | {clean_name(name): buffer for name, buffer in module.named_buffers()}


def is_sharded(root: nn.Module) -> bool:
    """Return whether this process holds less than all of some parameter."""
    return any(not chunk.whole for chunk in local_chunks(root).values())


def _chunk(parameter: nn.Parameter) -> Chunk:
    """Return the chunk of a plain parameter or of a DTensor."""
    if isinstance(parameter, UninitializedParameter):
        return Chunk(parameter, parameter, (), *one_run(0, 0))
    if not hasattr(parameter, "device_mesh"):
        return Chunk.of(parameter)
    shape, sharded = tuple(parameter.shape), cast("Any", parameter)
    local = sharded.to_local()
    runs = [_box_runs(shape, tuple(box.offsets), tuple(box.sizes)) for box in sharded.__create_chunk_list__()]
    starts, lengths = (np.concatenate(each) for each in zip(one_run(0, 0), *runs, strict=True))
    found = Chunk(parameter, local, shape, starts, lengths)
    if int(found.lengths.sum()) != local.numel():
        raise ValueError(f"a parameter of shape {shape} has a sharding that is not supported: {sharded.placements}.")
    return found


def _flat_chunks(path: str, handle: Any) -> Iterator[tuple[str, Chunk]]:
    """Yield the chunks of the parameters that FSDP has joined into one flat parameter."""
    flat = handle.flat_param
    if flat._params is None:
        raise ValueError("FSDP with use_orig_params=False hides the parameters: use Lightning's default, True.")
    shard = getattr(flat, "_local_shard", flat).detach()
    infos = zip(flat._fqns, flat._params, flat._shapes, flat._shard_param_infos, strict=True)
    for name, parameter, shape, info in infos:
        begin, length = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
        at = info.offset_in_shard or 0
        full = f"{path}.{name}" if path else name
        yield clean_name(full), Chunk(parameter, shard[at : at + length], tuple(shape), *one_run(begin, length))


def _box_runs(shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Indices, Indices]:
    """Return the runs of the flat indices of a box within a tensor."""
    if not math.prod(sizes):
        return one_run(0, 0)
    whole = len(shape)  # trailing dimensions from here on are contiguous
    while whole > 0 and sizes[whole - 1] == shape[whole - 1]:
        whole -= 1
    inner = max(0, whole - 1)
    length = math.prod(sizes[inner:])
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    starts = np.array([sum(o * s for o, s in zip(offsets, strides, strict=True))], dtype=np.int64)
    for axis in range(inner):
        starts = (starts[:, None] + np.arange(sizes[axis], dtype=np.int64) * strides[axis]).reshape(-1)
    return starts, np.full(len(starts), length, dtype=np.int64)


def _reshard(module: nn.Module) -> None:
    """Free what FSDP left gathered after a forward pass without a backward pass."""
    for part in module.modules():
        if is_kind(part, "FSDPModule"):
            part.reshard()  # type: ignore[operator]
        elif is_kind(part, "FullyShardedDataParallel"):
            handle: Any = part._handle
            begun = handle is not None and hasattr(handle.flat_param, "_local_shard")
            if begun and handle.uses_sharded_strategy and not handle.needs_unshard():
                handle.reshard(True)
                handle.post_reshard()


def is_kind(value: object, *kinds: str) -> bool:
    """Return whether a class of the object has one of these names; its module differs between versions and packages."""
    return any(base.__name__ in kinds for base in type(value).__mro__)


def clean_name(name: str) -> str:
    """Return a module's or parameter's name without the components that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def named_parts(module: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by their names without wrappers: the wrapped module, not the wrapper."""
    return {clean_name(name): part for name, part in module.named_modules()}
