"""Trace a copy of a network with Torch-Pruning to find channels that must be removed together."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_koopman.parameters.derived import underlying
from lightning_koopman.parameters.randomness import seeded
from lightning_koopman.parameters.sharded_modules import named_parts
from lightning_koopman.pruning.channel_removal import is_transposed

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)  # whose output channels are removed
KNOWN = (*LAYERS, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU, nn.Embedding)  # traceable
SECONDS = 60.0  # time limit of tracing: a thousand layers take a few seconds
Run = Callable[[nn.Module], Any]
eager = partial(torch.compiler.set_stance, "force_eager")  # context in which compiled functions run eagerly


def is_layer(part: nn.Module) -> bool:
    """Return whether a module is a convolution or a linear layer, including ``Conv1D`` of ``transformers``."""
    return isinstance(part, LAYERS) or is_transposed(part)


def eager_copy(module: nn.Module, copy: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Copy a module without compiled parts, which would recompile for each size, and without key-value caches.

    Raises:
        ValueError: If the module cannot be copied.
    """
    for part in [each for each in module.modules() if not isinstance(each, torch.jit.ScriptModule)]:
        for leaf in underlying(part):  # a weight that each call computes; a tensor with a graph cannot be copied
            vars(part)[leaf] = vars(part)[leaf].detach()
    try:
        twin = copy(module)
    except Exception as error:
        raise ValueError(
            f"the module cannot be copied, which trial removals need: {type(error).__name__}: {error}"
        ) from error
    twin = getattr(twin, "_orig_mod", twin)
    for part in [each for each in twin.modules() if not isinstance(each, torch.jit.ScriptModule)]:
        for leaf, child in part._modules.items():
            part._modules[leaf] = getattr(child, "_orig_mod", child)
        config = getattr(part, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False  # type: ignore[union-attr]
    return twin


class Tracing:
    """A traced copy of a network, and the groups of channels that must be removed together.

    Args:
        twin: The copy; its transposed linear layers are replaced by ordinary ones.
        run: Called with the copy; returns outputs or a loss, with a graph.

    Attributes:
        twin: The copy.
        names: Name of each of its modules.
        transposed: Names of the layers whose weight is transposed in the network.
        graph: The dependency graph of Torch-Pruning.
        groups: Groups of all channels of a layer, each with an attribute ``closures``.

    Raises:
        ValueError: If the network cannot be traced, or not within a minute.
    """

    def __init__(self, twin: nn.Module, run: Run) -> None:
        self.twin = twin
        self.transposed = {name for name, part in named_parts(twin).items() if is_transposed(part)}
        for owner in [each for each in twin.modules() if not isinstance(each, torch.jit.ScriptModule)]:
            for leaf, part in owner._modules.items():
                owner._modules[leaf] = _readable(part) if part is not None else None
        self.names = {part: name for name, part in named_parts(twin).items()}
        for parameter in twin.parameters():  # frozen parameters must be traced too
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        hooks = [part.register_forward_hook(_hide) for part in _unknown(twin)]

        def traced(network: nn.Module, _: Any) -> list[Tensor]:
            found = [value for value in tensors(run(network)) if value.requires_grad]
            if not found:
                raise ValueError("`run` returned nothing that depends on the network it was given")
            return found

        self.graph = _graph_type()()
        try:
            devices = {parameter.device for parameter in twin.parameters()}
            with warnings.catch_warnings(), seeded(0, devices), torch.enable_grad(), eager(), _Spelled():
                warnings.simplefilter("ignore")  # about bare parameters and unknown operations, which are skipped
                self.graph.build_dependency(twin, (), forward_fn=traced, verbose=False)
                self.groups = list(self.graph.get_all_groups(root_module_types=list(LAYERS)))
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            made = " (clone tensors that were made under torch.inference_mode)" if "nference" in why else ""
            raise ValueError(
                f"the network cannot be traced, so no channel of it can be removed: {why}{made}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()


def torch_pruning() -> Any:
    """Import Torch-Pruning; raise ModuleNotFoundError if it is missing or too old."""
    try:
        import torch_pruning as package
        from torch_pruning.dependency import index_mapping  # noqa: F401 - since 1.6
    except ImportError as error:
        raise ModuleNotFoundError(
            "Removing channels needs Torch-Pruning 1.6 or newer: pip install 'lightning_koopman[structured]'",
            name="torch_pruning",
        ) from error
    return package


@cache
def _graph_type() -> Any:
    """Return a dependency graph class whose groups know which channels can only be removed together."""
    pruning = torch_pruning()
    from torch_pruning._helpers import GroupItem, _HybridIndex
    from torch_pruning.dependency import Dependency, Group, index_mapping

    class Graph(pruning.DependencyGraph):  # type: ignore[misc, name-defined]
        deadline = time.monotonic() + SECONDS

        def __init__(self) -> None:
            super().__init__()
            self.deadline = time.monotonic() + SECONDS

        def get_pruner_of_module(self, module: nn.Module) -> Any:  # called in every long loop
            if time.monotonic() > self.deadline:
                raise TimeoutError(f"it took more than {SECONDS:.0f} s")
            return super().get_pruner_of_module(module)

        def _build_dependency(self, module2node: Mapping[Any, Any]) -> None:
            for node in module2node.values():
                if node.type == pruning.ops.OPTYPE.SPLIT:
                    node.grad_fn = _split_of_channels(node.grad_fn)
            super()._build_dependency(module2node)

        def get_pruning_group(self, module: nn.Module, pruning_fn: Any, idxs: Sequence[int]) -> Any:
            # Torch-Pruning's own revisits channels when a group meets itself, and does not record which ones coincide
            if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1:
                pruning_fn = pruning.function.prune_depthwise_conv_out_channels
            index_mapping.update_index_mapping(self)
            root = self.module2node[module]
            meeting = {int(index): int(index) for index in idxs}  # by channel of the first layer, one coupled to it

            def leader(channel: int) -> int:
                while meeting.setdefault(channel, channel) != channel:
                    meeting[channel] = channel = meeting[meeting[channel]]
                return channel

            widest = max(
                getattr(part, size, 0)
                for part in self.model.modules()
                for size in ("in_features", "out_features", "in_channels", "out_channels")
            )
            first = Dependency(pruning_fn, pruning_fn, source=root, target=root)
            stack = [(first, [_HybridIndex(idx=int(index), root_idx=int(index)) for index in idxs])]
            reached: dict[Any, tuple[Any, dict[int, int]]] = {}
            misread = False
            while stack:
                self.get_pruner_of_module(module)
                dep, indices = stack.pop()
                known = reached.setdefault((dep.target, dep.handler), (dep, {}))[1]
                is_out = self.is_out_channel_pruning_fn(dep.handler)
                part = dep.target.module
                channels = None
                if isinstance(part, KNOWN):
                    channels = (self.get_out_channels if is_out else self.get_in_channels)(part)
                new = []
                for index in indices:
                    if index.idx >= (channels or widest):  # of a misread operation: may grow without end
                        misread = misread or channels is not None
                    elif index.idx in known:
                        meeting[leader(known[index.idx])] = leader(index.root_idx)
                    else:
                        known[index.idx] = index.root_idx
                        new.append(index)
                for following in dep.target.dependencies if new else ():
                    if following.is_triggered_by(dep.handler):
                        moved = new
                        try:
                            for mapping in following.index_mapping:
                                moved = moved if mapping is None else mapping(moved)
                        except IndexError:  # of an operation that was misread
                            misread, moved = True, []
                        if len(moved):
                            stack.append((following, moved))
            group = Group()
            group._DG = self
            for dep, known in reached.values():
                item = GroupItem(dep, list(known))
                item.root_idxs = list(known.values())
                group.items.append(item)
            together: dict[int, list[int]] = {}
            for channel in sorted(reached[root, pruning_fn][1]):
                together.setdefault(leader(channel), []).append(channel)
            group.closures, group.misread = list(together.values()), misread
            return group

    return Graph


def _split_of_channels(operation: Any) -> Any:
    """Present a split of the last dimension, where linear layers have their channels, as one of dimension 1."""
    sizes = getattr(operation, "_saved_self_sym_sizes", getattr(operation, "_saved_self_sizes", ()))
    if len(sizes) < 3 or getattr(operation, "_saved_dim", None) not in (len(sizes) - 1, 2**64 - 1, -1):
        return operation
    found = {"_saved_self_sizes": sizes, "_saved_self_sym_sizes": sizes, "_saved_dim": 1}
    for name in ("_saved_split_sizes", "_saved_split_size"):
        if hasattr(operation, name):
            found[name] = getattr(operation, name)
    return SimpleNamespace(**found)


def _readable(part: nn.Module) -> nn.Module:
    """Return a traceable stand-in: an ordinary linear layer for a transposed one, a wrapper for a scripted module."""
    if isinstance(part, torch.jit.ScriptModule):  # it does not support hooks
        return Scripted(part)
    if not is_transposed(part):
        return part
    weight: Any = part.weight
    width, height = weight.shape
    linear = nn.Linear(width, height, bias=part.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    linear.bias = part.bias  # type: ignore[assignment]
    return linear.train(part.training)


class _Spelled(TorchFunctionMode):
    """Context that replaces gated linear units by operations that the tracing knows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.glu:
            return func(*args, **(kwargs or {}))
        first, second = _halves(*args, **(kwargs or {}))
        return first * second.sigmoid()


def _halves(input: Tensor, dim: int = -1) -> tuple[Tensor, ...]:  # noqa: A002  # named as in torch.nn.functional.glu
    return input.chunk(2, dim % input.ndim)


class Scripted(nn.Module):
    """Wrapper of a scripted module, whose submodules cannot be traced."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.inside = (part,)  # in a tuple, so that it is not registered as a child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output."""
        return _hide(self, [args, kwargs], self.inside[0](*args, **kwargs))


def _unknown(twin: nn.Module) -> list[nn.Module]:
    """Return the modules that are traced as a whole, because their own graph cannot be read."""
    return [
        part
        for part in twin.modules()
        if isinstance(part, nn.RNNBase)
        or (not isinstance(part, KNOWN) and not list(part.children()) and list(part.parameters()))
    ]


class _Opaque(torch.autograd.Function):
    """A single graph node that stands for a whole module."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *_: Tensor) -> Tensor:  # noqa: ARG004
        return output.clone()


def _hide(_: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Forward hook: replace a module's own graph, which cannot be traced, by a single node."""
    if isinstance(outputs, Tensor):
        given = tensors(inputs)
        return _Opaque.apply(outputs.detach(), *given) if outputs.is_floating_point() and given else outputs
    return type(outputs)(_hide(_, inputs, each) for each in outputs) if type(outputs) in (tuple, list) else outputs


def tensors(values: Any) -> list[Tensor]:
    """Return all floating-point tensors in a nested structure."""
    if isinstance(values, Tensor):
        return [values] if values.is_floating_point() else []
    if isinstance(values, Mapping):
        values = list(values.values())
    return [each for value in values for each in tensors(value)] if isinstance(values, (list, tuple)) else []
