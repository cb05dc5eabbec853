"""Which channels of a network go together, found by tracing, and whether they can go at all, found by trying."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.parameters.select import match_names
from lightning_koopman.pruning.channel_removal import ChannelRemoval

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)  # whose outputs are removed
KNOWN = (*LAYERS, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU, nn.Embedding)  # to the tracing
MIXING = ("Bmm", "ScaledDotProduct", "Softmax", "Opaque")  # operations that do more than pass channels through
OUTPUT = "its outputs leave the network"
Run = Callable[[nn.Module], Any]


class Structure:
    """Groups of channels that have to go together, found by tracing a copy of the network.

    Args:
        module: The network.
        run: As for :func:`~lightning_koopman.remove_channels`.
        layers: As for :func:`~lightning_koopman.remove_channels`.
        copy: As for :func:`~lightning_koopman.remove_channels`.
        refused: Layers to leave alone, with the reason.
        also: Further things the network is used for, which must not fail without the channels, whatever they return.
        argument: The user's name of ``layers``, for messages.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Run,
        *,
        layers: str | Sequence[str] | None = None,
        copy: Callable[[nn.Module], nn.Module] = copy.deepcopy,
        refused: Mapping[str, str] | None = None,
        also: Sequence[Run] = (),
        argument: str = "layers",
    ) -> None:
        pruning = torch_pruning()
        self._selected: set[str] | None = None
        if layers is not None:
            names = [f"{name}.weight" for name, part in module.named_modules() if isinstance(part, LAYERS)]
            self._selected = set(match_names(names, layers, argument=argument, kind="weight of a layer"))
        self._run, self._also = run, also
        self._again = partial(Structure, module, run, layers=layers, copy=copy, also=also, argument=argument)
        self._agrees = partial(agrees, module, run, copy=copy, also=also)
        try:
            self.twin = copy(module)
        except Exception as error:
            raise ValueError(
                f"the module cannot be copied, so nothing can be tried out: {type(error).__name__}: {error}"
            ) from error
        self._graph = pruning.DependencyGraph()
        found_groups = self._trace()
        self._names = {part: name for name, part in self.twin.named_modules()}
        self._importance = pruning.importance.GroupMagnitudeImportance(p=2)
        self.groups: dict[str, Any] = {}
        self.left_alone: dict[str, str] = {}
        weights = dict(module.named_parameters(remove_duplicate=False))
        counts = Counter(id(each) for part in module.modules() for each in part._parameters.values())
        order = list(self._names.values())
        found = set()
        for group in found_groups:
            outputs = [
                self._names[dep.target.module]
                for dep, _ in group
                if isinstance(dep.target.module, LAYERS) and self._graph.is_out_channel_pruning_fn(dep.handler)
            ]
            found.update(outputs)
            reason = self._obstacle(group, outputs, weights, counts)
            for name in outputs:
                reason = reason or (refused or {}).get(name)
            if reason is None:
                self.groups[min(outputs, key=order.index)] = group
            else:
                self.left_alone |= dict.fromkeys(outputs, reason)
        for name, part in module.named_modules():
            if isinstance(part, LAYERS) and name not in found:
                self.left_alone[name] = "not reached, or inside a module that is traced as a whole"

    def _trace(self) -> list[Any]:
        """All groups of the twin's channels."""
        hooks = [
            part.register_forward_hook(_hide)
            for part in self.twin.modules()
            if isinstance(part, nn.RNNBase)
            or (not isinstance(part, KNOWN) and not list(part.children()) and list(part.parameters()))
        ]

        def traced(network: nn.Module, _: Any) -> list[Tensor]:
            found = [value for value in _tensors(self._run(network)) if value.requires_grad]
            if not found:
                raise ValueError("`run` returned nothing that depends on the network it was given")
            return found

        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")  # about bare parameters and unknown operations: they are left alone
                self._graph.build_dependency(
                    self.twin,
                    (),
                    forward_fn=traced,
                    verbose=False,
                )
                return list(self._graph.get_all_groups(root_module_types=list(LAYERS)))
        except Exception as error:
            raise ValueError(
                f"the network cannot be traced, so no channel of it can be removed: {type(error).__name__}: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def channels(self) -> dict[str, int]:
        """By name of each group's first layer, the number of its channels."""
        return {name: len(group[0].idxs) for name, group in self.groups.items()}

    def choose(
        self,
        sparsity: float,
        scores: Mapping[str, Tensor] | None = None,
        scope: str = "tensor",
        originals: Mapping[str, int] | None = None,
    ) -> dict[str, list[int]]:
        """The channels of least importance; the arguments are those of :func:`remove_channels`."""
        own = dict(self.twin.named_parameters())
        for name, value in (scores or {}).items():
            if name not in own or own[name].shape != value.shape:
                expected = f"has shape {tuple(own[name].shape)}" if name in own else "does not exist in the network"
                raise ValueError(f"scores[{name!r}] has shape {tuple(value.shape)}, but that parameter {expected}.")
        present = {name: own[name].detach().clone() for name in scores or {}}
        for name, value in (scores or {}).items():
            own[name].data.copy_(value)
        importance = {name: self._importance(group).float().cpu() for name, group in self.groups.items()}
        for name, value in present.items():
            own[name].data.copy_(value)
        channels = self.channels
        full = {name: (originals or {}).get(name, count) for name, count in channels.items()}
        if scope == "tensor":
            excess = {name: count - full[name] + round(sparsity * full[name]) for name, count in channels.items()}
        else:
            together = torch.cat(list(importance.values()))
            spare = sum(channels.values()) - sum(full.values()) + round(sparsity * sum(full.values()))
            lowest = torch.argsort(together, stable=True)[: max(0, spare)]
            chosen = torch.zeros_like(together, dtype=torch.bool)
            chosen[lowest] = True
            parts = torch.split(chosen, list(channels.values()))
            excess = {name: int(part.sum()) for name, part in zip(channels, parts, strict=True)}
        return {
            name: sorted(torch.argsort(value, stable=True)[: min(max(0, excess[name]), channels[name] - 1)].tolist())
            for name, value in importance.items()
        }

    def remove(self, chosen: Mapping[str, Sequence[int]]) -> ChannelRemoval:
        """What remains without the chosen channels; uses the traced copy up, the network itself is not touched."""
        twin, channels = self.twin, self.channels
        before = {name: _arguments(part) for name, part in twin.named_modules()}
        tensors = dict(_tensors_of(twin))
        sizes = {name: tensor.shape for name, tensor in tensors.items()}
        for tensor in tensors.values():  # each entry its own index: what is left of them tells what was kept
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
        for name, channel in chosen.items():
            if channel:
                root = self.groups[name][0].dep
                self._graph.get_pruning_group(root.target.module, root.handler, list(channel)).prune()
        kept = {
            name: (tensor.detach().reshape(-1).round().long(), tensor.shape)
            for name, tensor in _tensors_of(twin)
            if tensor.shape != sizes[name]
        }
        changes = {}
        for name, part in twin.named_modules():
            now = _arguments(part)
            changed = {key: (old, now[key]) for key, old in before[name].items() if now[key] != old}
            if changed:
                changes[name] = changed
        return ChannelRemoval(changes, {k: list(v) for k, v in chosen.items()}, channels, self.left_alone, kept)

    def unfit(self) -> dict[str, str]:
        """Layers whose channels cannot be removed without side effects, with the reason, by trying on copies.

        Raises:
            ValueError: If no layer is left.
        """
        drawn = torch.Generator().manual_seed(0)  # a regular pattern would hide what is regular, such as heads
        halves = {
            name: sorted(torch.randperm(count, generator=drawn)[: count // 2].tolist())
            for name, count in self.channels.items()
        }
        refused: dict[str, str] = {}
        if self._again().problem(halves) is not None:
            for name, half in halves.items():
                problem = self._again().problem({name: half})
                if problem is not None:
                    refused[name] = problem
        if len(refused) == len(self.groups):
            reasons = "; ".join(f"{name!r}: {reason}" for name, reason in {**self.left_alone, **refused}.items())
            raise ValueError(f"no channel of the network can be removed ({reasons or 'no such layer'}).")
        return refused

    def problem(self, chosen: Mapping[str, Sequence[int]]) -> str | None:
        """Why the chosen channels cannot be removed, or None; uses the traced copy up."""
        try:
            alike = self._agrees(self.remove(chosen))
        except Exception as error:  # whatever the user's code raises at an unexpected shape
            return f"the network fails without its channels: {type(error).__name__}: {error}".splitlines()[0]
        return None if alike else "removing its channels is not the same as setting them to zero"

    def _obstacle(
        self, group: Any, outputs: Sequence[str], weights: Mapping[str, nn.Parameter], counts: Mapping[int, int]
    ) -> str | None:
        """Why a group is left alone, or None."""
        kinds = torch_pruning().ops.OPTYPE
        allowed = {
            kinds.CONV, kinds.DEPTHWISE_CONV, kinds.LINEAR, kinds.BN, kinds.PRELU, kinds.CONCAT, kinds.SPLIT,
            kinds.ELEMENTWISE, kinds.RESHAPE, kinds.UNBIND, kinds.EXPAND, kinds.SLICE,
        }  # fmt: skip
        readers = [
            dep.target.module
            for dep, _ in group
            if isinstance(dep.target.module, LAYERS) and not self._graph.is_out_channel_pruning_fn(dep.handler)
        ]
        if not readers or any(dep.target.type == kinds.OUTPUT for dep, _ in group):
            return OUTPUT
        for dep, _ in group:
            target = dep.target
            if target.type not in allowed:
                name = self._names.get(target.module, "a parameter that belongs to no layer")
                return f"coupled with {name!r} ({type(target.module).__name__})"
            operation = str(getattr(target.module, "_grad_fn", ""))
            mixing = next((name for name in MIXING if name in operation), None)
            if mixing is not None:
                return f"coupled by {'an unknown module' if mixing == 'Opaque' else mixing}"
            if target.type == kinds.CONV and target.module.groups > 1:
                return f"coupled with the grouped convolution {self._names[target.module]!r}"
        for part in (dep.target.module for dep, _ in group if dep.target.module in self._names):
            if isinstance(part, LAYERS) and part._parameters.get("weight") is None:
                return f"the weight of {self._names[part]!r} is computed from other parameters"
            for leaf in part._parameters:
                name = f"{self._names[part]}.{leaf}"
                if name in weights and counts[id(weights[name])] > 1:
                    return f"the parameter {name!r} is shared between modules"
        own = [f"{name}.weight" for name in outputs]
        if not all(weights[name].requires_grad for name in own):
            return "frozen"
        if self._selected is not None and not self._selected.issuperset(own):
            apart = [name for name in outputs if f"{name}.weight" not in self._selected]
            return "not selected" if len(apart) == len(own) else f"coupled with {apart[0]!r}, which is not selected"
        return "it has a single channel" if len(group[0].idxs) == 1 else None


def agrees(
    module: nn.Module,
    run: Run,
    removal: ChannelRemoval,
    copy: Callable[[nn.Module], nn.Module],
    also: Sequence[Run] = (),
) -> bool:
    """Whether a copy without the channels computes the same as one in which their weights are zero.

    Both are given the same random weights: the present ones may be zero where it matters.  The copy must also not fail
    in training mode, nor at what else the network is used for.
    """
    zeroed, smaller = copy(module), copy(module)
    for network in (zeroed, smaller):
        _draw(network)
    for name, tensor in zeroed.named_parameters():
        if name in removal.kept:
            gone = torch.ones(tensor.numel(), dtype=torch.bool, device=tensor.device)
            gone[removal.kept[name][0].to(tensor.device)] = False
            tensor.data.masked_fill_(gone.reshape(tensor.shape), 0.0)
    removal.apply(smaller)
    heads = [name for name, reason in removal.left_alone.items() if reason == OUTPUT]
    expected, found = (_outputs(network.eval(), run, heads) for network in (zeroed, smaller))
    if [values.shape for values in expected] != [values.shape for values in found]:
        return False
    half = any(parameter.dtype.itemsize < 4 for parameter in module.parameters())
    allowed = 0.05 if half else 1e-3  # of the largest output
    pairs = zip(expected, found, strict=True)
    if not all(bool((a - b).abs().max() <= allowed * a.abs().max()) for a, b in pairs if a.numel()):
        return False
    for use in (run, *also):
        try:
            _outputs(copy(module).train(), use, [])
        except Exception:  # it fails with all channels too, so it tells nothing
            continue
        _outputs(smaller.train(), use, [])
    return True


def _draw(network: nn.Module) -> None:
    """Give a network random weights of the usual size, the same for the same structure."""
    drawn = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        values = torch.randn(parameter.shape, generator=drawn)
        if parameter.ndim >= 2:
            values *= parameter[0].numel() ** -0.5
        else:
            values = 1 + 0.3 * values
        parameter.data.copy_(values)


def torch_pruning() -> Any:
    """The package that traces which channels go together."""
    try:
        import torch_pruning as package

        package.importance.GroupMagnitudeImportance  # noqa: B018 - since 1.5.2
    except (ModuleNotFoundError, AttributeError) as error:
        raise ModuleNotFoundError(
            "Removing channels needs Torch-Pruning 1.5.2 or newer: pip install 'lightning_koopman[structured]'",
            name="torch_pruning",
        ) from error
    return package


def _outputs(network: nn.Module, run: Run, heads: Sequence[str]) -> list[Tensor]:
    """What some layers and the network as a whole compute."""
    outputs: list[Tensor] = []
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda *given: outputs.append(given[2].detach()))
        for name in heads
    ]
    devices = {parameter.device for parameter in network.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)), torch.enable_grad():
            torch.manual_seed(0)  # a step that draws noise draws the same
            outputs += [value.detach() for value in _tensors(run(network))]
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


class _Opaque(torch.autograd.Function):
    """A node of the graph that stands for all that a module does."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *_: Tensor) -> Tensor:  # noqa: ARG004
        return output.clone()


def _hide(_: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Forward hook: put one node in place of a module's own graph, which tracing could not read."""
    if isinstance(outputs, Tensor):
        given = _tensors(inputs)
        return _Opaque.apply(outputs.detach(), *given) if outputs.is_floating_point() and given else outputs
    return type(outputs)(_hide(_, inputs, each) for each in outputs) if type(outputs) in (tuple, list) else outputs


def _tensors(values: Any) -> list[Tensor]:
    """All tensors of floating point in a nested structure."""
    if isinstance(values, Tensor):
        return [values] if values.is_floating_point() else []
    if isinstance(values, Mapping):
        values = list(values.values())
    return [each for value in values for each in _tensors(value)] if isinstance(values, (list, tuple)) else []


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from chain(module.named_parameters(), module.named_buffers())


def _arguments(part: nn.Module) -> dict[str, Any]:
    """Attributes that may be sizes."""
    return {
        key: value
        for key, value in vars(part).items()
        if (isinstance(value, int) and not isinstance(value, bool)) or isinstance(value, tuple)
    }
