"""Find the channels that can be removed from a network, choose among them and remove them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_koopman.parameters.select import match_names
from lightning_koopman.parameters.sharded_modules import clean_name, named_parts
from lightning_koopman.pruning.channel_removal import ChannelRemoval, left_alone_table, resized
from lightning_koopman.pruning.channel_tracing import (
    LAYERS,
    Run,
    Scripted,
    Tracing,
    eager_copy,
    is_layer,
    torch_pruning,
)
from lightning_koopman.pruning.channel_trial import OUTPUT, Copy, agrees, check_repeats

MIXING = {  # operations that mix channels
    "Bmm": "attention or a product",
    "ScaledDotProduct": "attention",
    "Softmax": "a softmax",
    "Opaque": "a module that is traced as a whole",
}
FROZEN = "frozen"
NOT_RUN = "not run, or inside a module that is traced as a whole"


@dataclass(frozen=True)
class Coupled:
    """Layers whose channels have to be removed together.

    Attributes:
        group: The group of Torch-Pruning.
        closures: Sets of channels of the first layer that can only be removed together.
        uses: Array (layers, closures): number of channels that each layer has in each closure.
    """

    group: Any
    closures: list[list[int]]
    uses: npt.NDArray[np.int64]

    @classmethod
    def of(cls, group: Any) -> Coupled:
        """Build from a group that holds all channels of a layer."""
        place = {channel: at for at, closure in enumerate(group.closures) for channel in closure}
        rows = [
            np.bincount([place[channel] for channel in item.root_idxs], minlength=len(group.closures))
            for item in group
            if isinstance(item.dep.target.module, nn.Module) and len(item.idxs)
        ]
        return cls(group, group.closures, np.stack(rows))

    @property
    def channels(self) -> int:
        """Number of channels of the first layer."""
        return sum(map(len, self.closures))


class Structure:
    """Groups of channels that have to be removed together, found by tracing a copy of the network.

    Args:
        module: The network.
        run: As for :func:`~lightning_koopman.remove_channels`.
        layers: As for :func:`~lightning_koopman.remove_channels`.
        copy: As for :func:`~lightning_koopman.remove_channels`.
        refused: Layers to skip, with the reason by name.
        also: Further functions of the network that must run without the channels too; their results are ignored.
        argument: Name of ``layers`` in error messages.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Run,
        *,
        layers: str | Sequence[str] | None = None,
        copy: Copy = copy.deepcopy,
        refused: Mapping[str, str] | None = None,
        also: Sequence[Run] = (),
        argument: str = "layers",
    ) -> None:
        pruning, self._parts = torch_pruning(), named_parts(module)
        self._selected: set[str] | None = None
        if layers is not None:
            matrices = [f"{name}.weight" for name, part in self._parts.items() if is_layer(part)]
            self._selected = set(match_names(matrices, layers, argument=argument, kind="weight of a layer"))
        self._again = partial(Structure, module, run, layers=layers, copy=copy, also=also, argument=argument)
        self._agrees = partial(agrees, module, run, copy=copy, also=also)
        self._check_repeats = partial(check_repeats, module, run, copy)
        self._tracing = Tracing(eager_copy(module, copy), run)
        self._importance = pruning.importance.GroupMagnitudeImportance(p=2)
        self.groups: dict[str, Coupled] = {}
        self.left_alone: dict[str, str] = {}
        names = self._tracing.names
        weights = {clean_name(name): each for name, each in module.named_parameters(remove_duplicate=False)}
        counts = Counter(id(each) for part in set(module.modules()) for each in part._parameters.values())
        order = list(names.values())
        for group in self._tracing.groups:
            outputs = [
                names[dep.target.module]
                for dep, _ in group
                if isinstance(dep.target.module, LAYERS) and self._tracing.graph.is_out_channel_pruning_fn(dep.handler)
            ]
            reason = self._obstacle(group, outputs, weights, counts)
            for name in outputs:
                reason = reason or (refused or {}).get(name)
            if reason is None:
                self.groups[min(outputs, key=order.index)] = Coupled.of(group)
            else:
                self.left_alone |= dict.fromkeys(outputs, reason)
        found = {*self.left_alone, *(names[item.dep.target.module] for coupled in self.groups.values()
                                     for item in coupled.group if item.dep.target.module in names)}  # fmt: skip
        self.left_alone |= _not_seen(names, found)

    @property
    def channels(self) -> dict[str, int]:
        """Number of channels by the name of each group's first layer."""
        return {name: coupled.channels for name, coupled in self.groups.items()}

    def choose(
        self,
        sparsity: float,
        scores: Mapping[str, Tensor] | None = None,
        scope: str = "tensor",
        originals: Mapping[str, int] | None = None,
    ) -> dict[str, list[int]]:
        """Choose the least important channels; the arguments are those of :func:`remove_channels`."""
        importance = self._importance_by(scores or {})
        channels = self.channels
        full = {name: (originals or {}).get(name, count) for name, count in channels.items()}
        if scope == "tensor":
            quotas = {name: count - full[name] + round(sparsity * full[name]) for name, count in channels.items()}
            picked = [self._pick({name: importance[name]}, quota) for name, quota in quotas.items()]
            return {name: gone for each in picked for name, gone in each.items()}
        spare = sum(channels.values()) - sum(full.values()) + round(sparsity * sum(full.values()))
        return self._pick(importance, spare)

    def _importance_by(self, scores: Mapping[str, Tensor]) -> dict[str, npt.NDArray[np.float64]]:
        """Return the importance of each closure of each group, with scores in place of some parameters."""
        own = dict(self._tracing.twin.named_parameters())
        turned = {f"{name}.weight" for name in self._tracing.transposed}
        oriented = {name: value.T if name in turned else value for name, value in scores.items()}
        for name, value in oriented.items():
            if name not in own or own[name].shape != value.shape:
                expected = "does not exist in the network"
                if name in own:
                    expected = f"has shape {tuple(own[name].T.shape if name in turned else own[name].shape)}"
                raise ValueError(
                    f"scores[{name!r}] has shape {tuple(scores[name].shape)}, but that parameter {expected}."
                )
        present = {name: own[name].detach().clone() for name in oriented}
        for name, value in oriented.items():
            own[name].data.copy_(value)
        found = {}
        for name, coupled in self.groups.items():
            single = self._importance(coupled.group).double().cpu().numpy()
            found[name] = np.array([single[closure].mean() for closure in coupled.closures])
        for name, value in present.items():
            own[name].data.copy_(value)
        return found

    def _pick(self, importance: Mapping[str, npt.NDArray[np.float64]], quota: int) -> dict[str, list[int]]:
        """Pick about ``quota`` channels, by the least important closures; each layer keeps at least one channel."""
        picked: dict[str, list[int]] = {name: [] for name in importance}
        left = {name: self.groups[name].uses.sum(axis=1) for name in importance}
        places = [(name, at) for name, values in importance.items() for at in range(len(values))]
        taken = 0
        for place in np.argsort(np.concatenate([*importance.values(), []]), kind="stable"):
            name, at = places[place]
            coupled = self.groups[name]
            closure, uses = coupled.closures[at], coupled.uses[:, at]
            if taken + len(closure) / 2 <= quota and (left[name] - uses >= (uses > 0)).all():
                left[name] = left[name] - uses
                picked[name] += closure
                taken += len(closure)
        return {name: sorted(gone) for name, gone in picked.items()}

    def remove(self, chosen: Mapping[str, Sequence[int]]) -> ChannelRemoval:
        """Remove the chosen channels from the traced copy, which is then used up; the network is unchanged.

        Raises:
            ValueError: If a layer would keep no channel.
        """
        graph, channels = self._tracing.graph, self.channels
        turned = {f"{name}.weight" for name in self._tracing.transposed}
        sizes = {}
        for name, tensor in _tensors_of(self._tracing.twin):
            sizes[name] = tensor.shape
            # each element becomes its own index in the network, so that the remaining ones show what was kept
            index = torch.arange(tensor.numel(), dtype=torch.float64)
            tensor.data = index.reshape(tensor.T.shape).T if name in turned else index.reshape(tensor.shape)
        removed: dict[str, list[int]] = {name: [] for name in chosen}
        for name, channel in chosen.items():
            if channel:
                root = self.groups[name].group[0].dep
                group = graph.get_pruning_group(root.target.module, root.handler, list(channel))
                group.prune()
                removed[name] = sorted(group[0].idxs)
        kept = {}
        for name, tensor in _tensors_of(self._tracing.twin):
            if tensor.shape != sizes[name]:
                if not tensor.numel():
                    raise ValueError(f"{name!r} would keep no channel")
                oriented = tensor.T if name in turned else tensor
                whole = torch.Size(reversed(sizes[name])) if name in turned else sizes[name]
                kept[name] = (oriented.detach().reshape(-1).round().long(), oriented.shape, whole)
        shapes: dict[str, dict[str, torch.Size]] = {}
        for name, (_, shape, _) in kept.items():
            path, _, leaf = name.rpartition(".")
            shapes.setdefault(path, {})[leaf] = shape
        changes = {path: resized(path, part, shapes[path]) for path, part in self._parts.items() if path in shapes}
        return ChannelRemoval(changes, removed, channels, self.left_alone, kept)

    def read_elsewhere(self) -> dict[str, str]:
        """Return the layers whose channels may be read by a layer that did not run, with the reason."""
        idle = {name: self._parts[name] for name, reason in self.left_alone.items() if reason == NOT_RUN}
        inner = [f"{name}." for name, part in self._parts.items() if isinstance(part, nn.MultiheadAttention)]
        idle = {name: part for name, part in idle.items() if not name.startswith(tuple(inner))}
        sizes = {getattr(part, "in_features", getattr(part, "in_channels", 0)): name for name, part in idle.items()}
        reason = "its channels may be read by {!r}, which does not run in a training step"
        return {name: reason.format(sizes[count]) for name, count in self.channels.items() if count in sizes}

    def unfit(self, *, thaw: bool = False) -> dict[str, str]:
        """Try removals on copies; return the layers where they have side effects, with the reason.

        Args:
            thaw: Whether frozen layers may be unfrozen later.

        Raises:
            ValueError: If no layer is left, or the network's output is not reproducible.
        """
        self._check_repeats()
        drawn = np.random.default_rng(0)  # random: a regular choice could match attention heads
        halves: dict[str, list[int]] = {}
        for name, coupled in self.groups.items():
            halves |= self._pick({name: drawn.random(len(coupled.closures))}, coupled.channels // 2)
        refused: dict[str, str] = {}
        if self._again().problem(halves) is not None:
            for name, half in halves.items():
                problem = self._again().problem({name: half})
                if problem is not None:
                    refused[name] = problem
        left_alone = {**self.left_alone, **refused}
        if len(refused) == len(self.groups) and not (thaw and FROZEN in left_alone.values()):
            table = left_alone_table(left_alone, most=8)
            raise ValueError(
                f"no channel of the network can be removed. {table or 'It has no convolution or linear layer.'}"
            )
        return refused

    def without_unfit(self) -> Structure:
        """Return the structure without the layers that :meth:`unfit` returns; raise what it raises."""
        refused = self.unfit()
        return self._again(refused=refused) if refused else self

    def problem(self, chosen: Mapping[str, Sequence[int]]) -> str | None:
        """Return why the chosen channels cannot be removed, or None; the traced copy is then used up."""
        try:
            alike = self._agrees(self.remove(chosen))
        except Exception as error:  # user code may raise anything at an unexpected shape
            return f"the network fails without its channels: {type(error).__name__}: {error}".splitlines()[0]
        return None if alike else "removing its channels is not the same as setting them to zero"

    def _obstacle(
        self, group: Any, outputs: Sequence[str], weights: Mapping[str, nn.Parameter], counts: Mapping[int, int]
    ) -> str | None:
        """Return why a group is skipped, or None."""
        kinds, names = torch_pruning().ops.OPTYPE, self._tracing.names
        allowed = {
            kinds.CONV, kinds.DEPTHWISE_CONV, kinds.LINEAR, kinds.BN, kinds.PRELU, kinds.CONCAT, kinds.SPLIT,
            kinds.ELEMENTWISE, kinds.RESHAPE, kinds.UNBIND, kinds.EXPAND, kinds.SLICE,
        }  # fmt: skip
        readers = [
            dep.target.module
            for dep, _ in group
            if isinstance(dep.target.module, LAYERS) and not self._tracing.graph.is_out_channel_pruning_fn(dep.handler)
        ]
        if not readers or any(dep.target.type == kinds.OUTPUT for dep, _ in group):
            return OUTPUT
        for dep, _ in group:
            target = dep.target
            if target.type not in allowed:
                kind = type(target.module).__name__
                return f"coupled with {kind if target.module in names else 'a parameter that belongs to no layer'}"
            operation = str(getattr(target.module, "_grad_fn", ""))
            mixing = next((name for name in MIXING if name in operation), None)
            if mixing is not None:
                return f"coupled by {MIXING[mixing]}"
            if target.type == kinds.CONV and target.module.groups > 1:
                return "coupled with a grouped convolution"
        if group.misread:
            return "coupled by an operation over channels that is not understood"
        for part in (dep.target.module for dep, _ in group if dep.target.module in names):
            if isinstance(part, LAYERS) and part._parameters.get("weight") is None:
                return f"the weight of {names[part]!r} is computed from other parameters"
            for leaf in part._parameters:
                name = f"{names[part]}.{leaf}"
                if name in weights and counts[id(weights[name])] > 1:
                    return f"the parameter {name!r} is shared between modules"
        own = [f"{name}.weight" for name in outputs]
        if not all(weights[name].requires_grad for name in own):
            return FROZEN
        if self._selected is not None and not self._selected.issuperset(own):
            apart = [name for name in outputs if f"{name}.weight" not in self._selected]
            return "not selected" if len(apart) == len(own) else f"coupled with {apart[0]!r}, which is not selected"
        if not group.closures or not all(weights[name].numel() for name in own):
            return "it is empty"
        return "it has one channel, or all its channels are coupled" if len(group.closures) == 1 else None


def _not_seen(names: Mapping[nn.Module, str], found: set[str]) -> dict[str, str]:
    """Return the other modules that have matrices, and why their channels cannot be removed."""
    reasons = {}
    for part, name in names.items():
        matrices = [leaf for leaf, each in part._parameters.items() if each is not None and each.ndim >= 2]
        if isinstance(part, Scripted):
            reasons[name] = "scripted"
        elif not matrices or name in found or isinstance(part, nn.utils.parametrize.ParametrizationList):
            continue
        elif isinstance(part, LAYERS):
            reasons[name] = NOT_RUN
        elif list(part.children()) and not type(part).__module__.startswith("torch.nn"):
            reasons |= {f"{name}.{leaf}".lstrip("."): "a parameter that belongs to no layer" for leaf in matrices}
        else:
            reasons[name] = f"unsupported layer type ({type(part).__name__})"
    return reasons


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from chain(module.named_parameters(), module.named_buffers())
