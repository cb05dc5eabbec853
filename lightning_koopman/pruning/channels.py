"""Remove whole channels and neurons from a network, which makes it smaller and faster."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_koopman._checks import check_choice, check_count, check_function, check_instance, check_share, is_dense
from lightning_koopman.parameters.select import check_network
from lightning_koopman.pruning.channel_graph import Structure
from lightning_koopman.pruning.channel_removal import ChannelRemoval, as_optimizers
from lightning_koopman.pruning.channel_tracing import Run
from lightning_koopman.pruning.channel_trial import agrees
from lightning_koopman.pruning.masks import SCOPES, SHARE


def remove_channels(
    module: nn.Module,
    run: Run,
    *,
    sparsity: float,
    scores: Mapping[str, Tensor] | None = None,
    scope: str = "tensor",
    layers: str | Sequence[str] | None = None,
    originals: Mapping[str, int] | None = None,
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
    copy: Callable[[nn.Module], nn.Module] = copy.deepcopy,
) -> ChannelRemoval:
    """Remove the least important channels and neurons from a network, in place.

    Layers coupled by residual connections, batch norms or concatenations lose the same channels; Torch-Pruning finds
    them by tracing.  Only removals without side effects are made: before the network is touched, a copy without the
    channels must give the same outputs as one with the channels set to zero, both with random weights.

    Args:
        module: The network: convolutions, linear layers, batch norms and the operations between them.  Layers coupled
            to anything else (attention, layer and group norms, grouped convolutions, embeddings, bare parameters) and
            layers whose outputs leave the network are skipped.
        run: Called with copies of the network; returns outputs or a loss for an example, with a graph: for instance
            ``lambda network: network(images)``.  It should run everything the network is used for: layers that it does
            not reach are not resized.
        sparsity: Share of the channels to remove, in (0, 1); each layer keeps at least one.
        scores: Values to rank by, in place of the parameters of the same names: for instance the Koopman
            reconstruction of the weights.  A channel's importance is the sum of squares of its weights in all coupled
            layers, relative to the mean over the channels (Torch-Pruning's group magnitude).
        scope: ``"tensor"`` removes the share from each layer, ``"global"`` from all layers together.
        layers: Shell-style patterns of the names of the layers' weights; ``!`` excludes (default: all).
        originals: By layer name, the number of channels that ``sparsity`` refers to, if earlier removals took some.
        optimizers: Optimizers of the network's parameters; their state is carried over.
        copy: Function that copies the network.

    Raises:
        ModuleNotFoundError: If Torch-Pruning is not installed, or is too old.
        ValueError: If no channel can be removed, or an argument is out of its range; the network is then unchanged.

    Example:
        >>> import torch
        >>> from lightning_koopman import remove_channels
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
        >>> removal = remove_channels(network, lambda network: network(torch.ones(2, 4)), sparsity=0.75)
        >>> print(removal.table())
        0  out_features 32 → 8
        2  in_features 32 → 8
        left alone, its outputs leave the network: 2
    """
    sparsity = check_share("sparsity", sparsity, SHARE)
    check_choice("scope", scope, SCOPES)
    check_network("module", module)
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError("module is scripted, so it cannot be resized: pass the network that was scripted.")
    check_function("run", run, "a function of the network")
    check_function("copy", copy, "a function of the network")
    _check_mappings(scores, originals)
    held = as_optimizers(optimizers)
    with torch.inference_mode(False), torch.enable_grad():
        structure = Structure(module, run, layers=layers, copy=copy).without_unfit()
        _check_originals(originals or {}, structure)
        removal = structure.remove(structure.choose(sparsity, scores, scope, originals))
        if not agrees(module, run, removal, copy):  # not seen so far if each group agrees by itself
            raise ValueError(
                "removing the chosen channels is not the same as setting them to zero: nothing was removed."
            )
        removal.apply(module, held)
    return removal


def _check_originals(originals: Mapping[str, int], structure: Structure) -> None:
    """Raise ValueError if a layer is unknown, or has more channels than its original number."""
    known = structure.channels
    for name, count in originals.items():
        if name not in known and name not in structure.left_alone:
            raise ValueError(f"originals[{name!r}] names no layer; those with channels to remove: {', '.join(known)}.")
        if known.get(name, 0) > count:
            raise ValueError(f"originals[{name!r}] is {count}, but the layer has {known[name]} channels now.")


def _check_mappings(scores: object, originals: object) -> None:
    """Raise TypeError or ValueError unless ``scores`` are real tensors by name, and ``originals`` are counts."""
    for name, value in (("scores", scores), ("originals", originals)):
        if value is not None:
            check_instance(name, value, Mapping, "a mapping by name")
    for key, score in (scores or {}).items():  # type: ignore[attr-defined]
        if not is_dense(score) or score.is_complex() or not torch.isfinite(score).all():
            raise ValueError(f"scores[{key!r}] must be a tensor of finite, real numbers, got {type(score).__name__}.")
    for key, count in (originals or {}).items():  # type: ignore[attr-defined]
        check_count(f"originals[{key!r}]", count, 1)
