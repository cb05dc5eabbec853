"""The result of a channel removal, and resizing another network to the same sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman._checks import check_instance
from lightning_koopman.parameters.select import check_network
from lightning_koopman.parameters.sharded_modules import clean_name, is_kind, named_parts
from lightning_koopman.pruning.optimizer_state import replacement


@dataclass(frozen=True)
class ChannelRemoval:
    """Channels and neurons removed from a network: the result of :func:`remove_channels`.

    Attributes:
        changes: By module name, the constructor arguments that changed: ``{"0": {"out_features": (32, 8)}}``.
        removed: By layer name, a sorted list of the removed channels' old indices.
        channels: By layer name, the number of channels before the removal.
        left_alone: By name of each skipped layer, the reason.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_koopman import remove_channels
        >>> network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> removal = remove_channels(network, lambda network: network(torch.zeros(2, 8)), sparsity=0.75)
        >>> removal.changes["0"], len(removal.removed["0"]), removal.share
        ({'out_features': (32, 8)}, 24, 0.75)
        >>> mask = torch.ones(32, 8)  # of the original layer
        >>> removal.left_of("0.weight", mask).shape
        torch.Size([8, 8])
    """

    changes: dict[str, dict[str, tuple[Any, Any]]]
    removed: dict[str, list[int]]
    channels: dict[str, int]
    left_alone: dict[str, str]
    kept: dict[str, tuple[Tensor, torch.Size, torch.Size]] = field(repr=False, compare=False)
    """By name of a changed parameter or buffer: flat indices of the kept elements, the new and the old shape."""

    @property
    def share(self) -> float:
        """Removed share of the removable channels, in [0, 1)."""
        return sum(map(len, self.removed.values())) / max(1, sum(self.channels.values()))

    def left_of(self, name: str, values: Tensor) -> Tensor:
        """Return the kept elements of values that belong to a parameter or buffer, such as scores or a mask."""
        if not check_instance("name", name, str, "the name of a parameter or buffer"):
            raise ValueError("name is empty: pass the name of a parameter or buffer.")
        check_instance("values", values, Tensor, "a tensor")
        if name not in self.kept:
            return values
        index, shape, before = self.kept[name]
        if values.numel() != before.numel():
            raise ValueError(
                f"values has {values.numel()} elements, but {name!r} had {before.numel()}: pass one for each."
            )
        return values.reshape(-1)[index.to(values.device)].reshape(shape)

    def apply(
        self, module: nn.Module, optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = ()
    ) -> None:
        """Remove the same channels from a network of the same structure; if that fails, nothing is changed.

        Args:
            module: The network; its changed parameters are replaced by new objects.
            optimizers: Optimizers of its parameters; their state is carried over.

        Raises:
            ValueError: If the network has other layers, or layers of other sizes.
        """
        check_instance("module", module, nn.Module, "a torch.nn.Module")
        held = as_optimizers(optimizers)
        smaller: list[tuple[nn.Module, str, Tensor]] = []
        exchanged: list[tuple[nn.Parameter, nn.Parameter, Tensor]] = []
        owners = named_parts(module)
        for name, (index, shape, before) in self.kept.items():
            path, _, leaf = name.rpartition(".")
            owner = owners.get(path)
            old = getattr(owner, leaf, None)
            if owner is None or not isinstance(old, Tensor) or old.shape != before:
                found = f"shape {tuple(old.shape)}" if isinstance(old, Tensor) else "no such tensor"
                raise ValueError(
                    f"module has {found} at {name!r}, where the channels were removed from shape {tuple(before)}: pass "
                    "a network of the same structure, from which nothing was removed yet."
                )
            index = index.to(old.device)
            values = old.detach().reshape(-1)[index].reshape(shape)
            if values.ndim == 4 and old.is_contiguous(memory_format=torch.channels_last):
                values = values.contiguous(memory_format=torch.channels_last)
            if isinstance(old, nn.Parameter):
                values = nn.Parameter(values, requires_grad=old.requires_grad)
                vars(values).update(vars(old))
                exchanged.append((old, values, index))
            smaller.append((owner, leaf, values))
        parts = {path: owners[path] for path in self.changes}
        commit = replacement(held, exchanged)
        for owner, leaf, values in smaller:  # from here on nothing can fail
            _put(owner, leaf, values)
        for path, arguments in self.changes.items():
            for argument, (_, now) in arguments.items():
                setattr(parts[path], argument, now)
        commit()

    def table(self) -> str:
        """Return a table of the changed layers, and of the skipped layers by reason."""
        return "\n".join(filter(None, [changes_table(self.changes), left_alone_table(self.left_alone)]))


def as_optimizers(optimizers: object) -> list[torch.optim.Optimizer]:
    """Return one or several optimizers as a list; raise TypeError for anything else."""
    one = isinstance(optimizers, torch.optim.Optimizer)
    several = isinstance(optimizers, (list, tuple, set, frozenset, Iterator))
    held = [optimizers] if one else list(optimizers) if several else [None]  # type: ignore[call-overload]
    if not all(isinstance(each, torch.optim.Optimizer) for each in held):
        raise TypeError(f"optimizers must be an optimizer or a list of them, got {type(optimizers).__name__}.")
    return held  # type: ignore[return-value]


def changes_table(changes: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> str:
    """Format the changed constructor arguments, one line per module."""
    texts = {
        name: ", ".join(f"{key} {old} → {now}" for key, (old, now) in arguments.items())
        for name, arguments in changes.items()
    }
    width = max(map(len, texts), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in texts.items())


def left_alone_table(left_alone: Mapping[str, str], most: int | None = None) -> str:
    """Format the names of skipped layers, one line per reason, with at most ``most`` names each."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_alone.items():
        by_reason.setdefault(reason, []).append(name)
    return "\n".join(
        f"left alone, {reason}: {', '.join(names[:most])}"
        + (f" and {len(names) - most} more" if most is not None and len(names) > most else "")
        for reason, names in by_reason.items()
    )


def is_transposed(part: nn.Module) -> bool:
    """Return whether a module is the ``Conv1D`` of ``transformers``, a linear layer with a transposed weight."""
    return is_kind(part, "Conv1D") and hasattr(part, "nf")


def resize_like(module: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Resize the layers of a network to the sizes in a state dict, so that it can be loaded.

    Args:
        module: The network as its constructor builds it.
        state_dict: State dict of the same network with channels removed, for instance ``checkpoint["state_dict"]``.

    Returns:
        By module name, the constructor arguments that changed, old and new.

    Raises:
        ValueError: If a tensor of another size does not belong to a convolution, linear layer, batch norm or PReLU,
            or differs in more than its channels.

    Example:
        >>> from torch import nn
        >>> from lightning_koopman import resize_like
        >>> network = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> resize_like(network, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).state_dict())
        {'0': {'out_features': (32, 8)}, '2': {'in_features': (32, 8)}}
    """
    check_network("module", module)
    check_instance("state_dict", state_dict, Mapping, "a mapping from names to tensors")
    named = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    known = {clean_name(name) for name, _ in named}
    for name, value in state_dict.items():  # other entries may be a module's extra state
        if not isinstance(name, str) or (clean_name(name) in known and not isinstance(value, Tensor)):
            raise TypeError(f"state_dict[{name!r}] must be a tensor under a string key, got {type(value).__name__}.")
    plan = []
    shapes = {clean_name(name): value.shape for name, value in state_dict.items() if isinstance(value, Tensor)}
    for path, part in named_parts(module).items():
        own = {
            leaf: shapes[name]
            for leaf, tensor in chain(part._parameters.items(), part._buffers.items())
            if tensor is not None and (name := f"{path}.{leaf}" if path else leaf) in shapes
            if shapes[name] != tensor.shape
        }
        for leaf, shape in own.items():
            old, name = getattr(part, leaf).shape, f"{path}.{leaf}".removeprefix(".")
            if len(shape) != len(old) or shape[2:] != old[2:]:
                raise ValueError(
                    f"state_dict[{name!r}] has the shape {tuple(shape)}, the network's {tuple(old)}: only the "
                    "first two dimensions (channels) may differ. Build the network as the saved one was built."
                )
        if own:
            arguments = resized(path, part, own)
            plan.append((path, part, own, arguments))
            _check_bias(path, part, own, arguments)
    made: dict[int, Tensor] = {}  # by id of the old tensor: tied ones stay tied
    for path, part, own, _ in plan:
        for leaf, shape in own.items():
            old = getattr(part, leaf)
            new = made.get(id(old), old.detach().new_empty(shape))
            if new.shape != shape:
                raise ValueError(f"state_dict has two sizes of {path}.{leaf}, which is shared between modules.")
            is_parameter = isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter)
            made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
    for _, part, own, arguments in plan:
        for leaf, new in [(leaf, made[id(getattr(part, leaf))]) for leaf in own]:
            _put(part, leaf, new)
        for key, (_, now) in arguments.items():
            setattr(part, key, now)
    return {path: arguments for path, _, _, arguments in plan}


def _check_bias(
    path: str, part: nn.Module, shapes: Mapping[str, torch.Size], arguments: Mapping[str, tuple[Any, Any]]
) -> None:
    """Raise ValueError if a layer's bias in the state dict does not fit its weight."""
    bias = shapes.get("bias", getattr(part.bias, "shape", None)) if hasattr(part, "bias") else None
    for key in ("out_features", "out_channels"):
        if hasattr(part, key) and isinstance(bias, torch.Size):
            wanted = arguments.get(key, (None, getattr(part, key)))[1]
            if bias != (wanted,):
                raise ValueError(
                    f"state_dict has a bias of {path!r} of shape {tuple(bias)}, but its weight has {wanted} channels: "
                    "pass the state dict of one network."
                )


def _put(part: nn.Module, leaf: str, values: Tensor) -> None:
    """Replace a parameter or a buffer, persistent or not."""
    own: dict[str, Any] = part._parameters if isinstance(values, nn.Parameter) else part._buffers
    own[leaf] = values


def resized(path: str, part: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, tuple[Any, Any]]:
    """Return the constructor arguments that change with the shapes of a layer's tensors, old and new."""
    now: dict[str, Any] = {}
    shape = next(iter(shapes.values()))  # of the weight, or of a batch norm's statistic
    if is_transposed(part) and "weight" in shapes:
        now = {"nx": shape[0], "nf": shape[1]}
    elif isinstance(part, nn.Linear) and "weight" in shapes:
        now = {"in_features": shape[1], "out_features": shape[0]}
    elif isinstance(part, nn.modules.conv._ConvNd) and "weight" in shapes:
        first, second = ("in_channels", "out_channels") if part.transposed else ("out_channels", "in_channels")
        groups = part.groups
        if groups == part.in_channels > 1:  # depthwise: each input channel is a group of its own
            groups = shape[0] if part.transposed else shape[0] * groups // part.out_channels
        now = {first: shape[0], second: shape[1] * groups, "groups": groups}
    elif isinstance(part, nn.modules.batchnorm._NormBase):
        now = {"num_features": shape[0]}
    elif isinstance(part, nn.PReLU):
        now = {"num_parameters": shape[0]}
    else:
        raise ValueError(
            f"{path!r} ({type(part).__name__}) has another size in the state dict: only convolutions, linear layers, "
            "batch norms and PReLU can be resized. Build the network with that size."
        )
    return {key: (getattr(part, key), value) for key, value in now.items() if getattr(part, key) != value}
