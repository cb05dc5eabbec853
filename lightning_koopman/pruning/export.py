"""Export a pruned network for use without this library."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman._checks import check_instance, check_path
from lightning_koopman.parameters.select import check_network
from lightning_koopman.parameters.sharded_modules import clean_name
from lightning_koopman.pruning.channel_tracing import eager_copy
from lightning_koopman.sobolev.layer_taps import run_once
from lightning_koopman.sobolev.loss import SobolevLoss


def export_network(
    network: nn.Module,
    path: str | os.PathLike[str],
    *,
    changes: Mapping[str, Mapping[str, tuple[Any, Any]]] | None = None,
    example: Any = None,
) -> Path:
    """Write a network as a plain state dict, or as ONNX.

    Args:
        network: The network, masked or with channels removed.  The parameters of a :class:`SobolevLoss` inside it are
            left out.
        path: File to write.  With the suffix ``.onnx``: ONNX with a batch dimension of any size.  Otherwise a dict for
            ``torch.load``: ``state_dict``, and ``arguments``, which holds by module name the constructor arguments
            that differ from the original network.
        changes: :attr:`KoopmanPruner.changes` or :attr:`ChannelRemoval.changes`, the source of ``arguments``.
        example: For ONNX: a tensor (batch, …), or a tuple of all inputs of ``forward`` (default: the module's
            ``example_input_array``).  Tensors as long as the first one share its batch dimension; other tensors and
            numbers are passed unchanged.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: If ONNX is requested and not installed.
        ValueError: If ONNX is requested without an example, or the network fails on it.

    Example:
        >>> import tempfile, torch
        >>> from lightning_koopman import export_network, remove_channels
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
        >>> removal = remove_channels(network, lambda network: network(torch.ones(2, 4)), sparsity=0.75)
        >>> path = export_network(network, tempfile.mkdtemp() + "/small.pt", changes=removal.changes)
        >>> torch.load(path)["arguments"]
        {'0': {'out_features': 8}, '2': {'in_features': 8}}
    """
    check_network("network", network)
    target = check_path("path", path)
    if changes is not None:
        check_instance("changes", changes, Mapping, "a mapping, such as ChannelRemoval.changes")
        for name, each in changes.items():
            check_instance(f"changes[{name!r}]", each, Mapping, "a mapping from arguments to (old, new)")
            for key, pair in each.items():
                if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                    raise ValueError(f"changes[{name!r}][{key!r}] must be a pair (old, new), got {pair!r:.60}.")
    if target.suffix != ".onnx":
        arguments = {name: {key: now for key, (_, now) in each.items()} for name, each in (changes or {}).items()}
        named = {clean_name(name): part for name, part in network.named_modules(remove_duplicate=False)}
        losses = tuple(f"{name}." for name, part in named.items() if isinstance(part, SobolevLoss))
        held = {clean_name(name): value for name, value in network.state_dict().items()}
        state = {  # entries of other types are a module's extra state
            name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
            for name, value in held.items()
            if not name.startswith(losses)
        }
        torch.save({"state_dict": state, "arguments": arguments}, target)
        return target
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"Writing ONNX needs {' and '.join(missing)}: pip install 'lightning_koopman[onnx]'", name=missing[0]
        )
    example = getattr(network, "example_input_array", None) if example is None else example
    if example is None:
        raise ValueError("example=None: ONNX export runs the network, so pass an input of `forward`.")
    if isinstance(example, dict):
        raise ValueError(
            "example must be a tensor or a tuple of tensors in the order that `forward` takes, got a dict."
        )
    given = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    if not any(isinstance(value, Tensor) for value in given):
        raise TypeError(f"example must be a tensor or a tuple with one, got {type(example).__name__}: {example!r:.60}.")
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    given = tuple(value.to(device) if isinstance(value, Tensor) else value for value in given)
    size = next((len(value) for value in given if isinstance(value, Tensor) and value.ndim), None)
    batched = [isinstance(value, Tensor) and value.ndim > 0 and len(value) == size for value in given]
    if size == 1:  # torch.export takes a batch of one for a fixed size
        given = tuple(
            value.expand(2, *value.shape[1:]) if each else value for value, each in zip(given, batched, strict=True)
        )
    if any(hasattr(part, "_orig_mod") for part in network.modules()):  # compiled modules cannot be exported
        network = eager_copy(network, copy.deepcopy)
    run_once(network, given, ())  # its errors are clearer than those of the export
    modes = {part: part.training for part in network.modules()}
    network.eval()
    try:
        batch = torch.export.Dim("batch")
        torch.onnx.export(
            network,
            given,
            target,
            dynamo=True,
            dynamic_shapes=tuple({0: batch} if each else None for each in batched),
            verbose=False,
        )
    finally:
        for part, training in modes.items():
            part.training = training
    return target
