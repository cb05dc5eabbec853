"""Masks that keep pruned weights at zero, in any PyTorch loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn

from lightning_koopman._checks import (
    check_choice,
    check_flag,
    check_function,
    check_instance,
    check_positive,
    check_share,
    is_count,
    is_dense,
)
from lightning_koopman.parameters.select import check_network
from lightning_koopman.parameters.sharded_modules import local_chunks
from lightning_koopman.parameters.shards import Chunk, Shards
from lightning_koopman.pruning.pin import Pin, _bits, _clear, takes_hooks
from lightning_koopman.pruning.prunable import prunable_parameters
from lightning_koopman.pruning.quantile import largest

SCOPES = ("global", "tensor")
SHARE = "it is the share to prune, such as 0.75"


class MaskSet(Mapping[str, Tensor]):
    """Boolean masks of a network's parameters by name: True keeps a weight, False prunes it.

    The network stays an ordinary one: weights are set to zero in place, the names in its state dict do not change, and
    a checkpoint loaded without this library gives the sparse network.

    Args:
        masks: Boolean tensors by parameter name, each in the shape of its parameter; copied to the CPU.

    Raises:
        ValueError: If there is no mask, or one is not boolean.

    Example:
        >>> import torch
        >>> from lightning_koopman import MaskSet
        >>> network = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.Adam(network.parameters())
        >>> masks = MaskSet.from_scores({"weight": network.weight}, sparsity=0.75)
        >>> pin = masks.pin(network, optimizer)  # keeps them at zero in all steps from now on
        >>> network(torch.ones(2, 8)).sum().backward()
        >>> optimizer.step()
        >>> int((network.weight == 0).sum()), masks.sparsity
        (24, 0.75)
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        _check_tensors("masks", masks)
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"masks[{name!r}] must be boolean (True keeps a weight), got {mask.dtype}.")
        self._shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        # one bit per weight, because every process of a sharded run holds the masks of the whole network
        self._bits = {name: np.packbits(mask.detach().cpu().numpy()) for name, mask in masks.items()}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        flat = np.unpackbits(self._bits[name], count=math.prod(shape))
        return torch.from_numpy(flat.view(np.bool_)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self._shapes == other._shapes and all(map(np.array_equal, self._bits.values(), other._bits.values()))

    __hash__ = None  # type: ignore[assignment]  # as of all mappings

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} tensors, {self.pruned:,} of {self.numel:,} weights pruned, {self.sparsity:.2%})"

    @cached_property
    def numel(self) -> int:
        """Number of weights in the masked tensors."""
        return sum(map(math.prod, self._shapes.values()))

    @cached_property
    def pruned(self) -> int:
        """Number of pruned weights."""
        return sum(mask.numel() - int(mask.sum()) for mask in self.values())

    @property
    def sparsity(self) -> float:
        """Pruned share of the masked tensors' weights, in [0, 1]."""
        return self.pruned / max(1, self.numel)

    # -- selection ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_scores(
        cls,
        scores: Mapping[str, Tensor],
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        scope: str = "global",
        within: MaskSet | None = None,
        allow_empty: bool = False,
        shards: Shards | None = None,
    ) -> MaskSet:
        """Prune the weights whose scores are smallest in magnitude (paper, Algorithms 1 and 2).

        With the Koopman reconstruction as scores (:func:`averaged_weights` with ``"persistent"``) this is the paper's
        rule; with the weights themselves it is magnitude pruning; with random numbers it gives a random mask.

        Args:
            scores: Real tensors by parameter name.
            sparsity: Share to prune, in (0, 1), exact up to rounding to whole weights; an alternative to ``threshold``.
            threshold: The paper's ε > 0: weights with a score of smaller magnitude are pruned.
            scope: ``"global"`` takes one quantile over all tensors, ``"tensor"`` prunes the share in each tensor.
            within: Masks of earlier rounds: their pruned weights stay pruned, even if they exceed the share, or no
                longer have scores.
            allow_empty: Whether a tensor may lose all its weights.
            shards: For a network trained by several processes: the scores are then flat, each process passes its own
                part, and all processes must call this together.  All get the same masks of the whole network.

        Raises:
            ValueError: If not exactly one of ``sparsity`` and ``threshold`` is given, an argument is out of range, a
                score is not finite, or a tensor would lose all its weights.
        """
        check_amount(sparsity, threshold, scope)
        allow_empty = check_flag("allow_empty", allow_empty)
        _check_tensors("scores", scores)
        sparsity, threshold = (None if each is None else float(each) for each in (sparsity, threshold))
        if within is not None:
            check_instance("within", within, MaskSet, "a MaskSet")
        if shards is not None:
            check_instance("shards", shards, Shards, "the Shards of several processes")
        parts = shards or Shards({name: Chunk.of(score) for name, score in scores.items()})
        earlier: Mapping[str, Tensor] = within or {}
        for name in earlier.keys() & scores.keys():
            if shards is None and earlier[name].shape != scores[name].shape:
                raise ValueError(
                    f"within[{name!r}] has shape {tuple(earlier[name].shape)}, but its scores "
                    f"{tuple(scores[name].shape)}."
                )
        wide = {name: each if each.is_floating_point() else each.double() for name, each in scores.items()}
        sizes = {name: score.detach().reshape(-1).abs() for name, score in wide.items()}
        finite = np.array([float(not torch.isfinite(size).all()) for size in sizes.values()])
        all_sum = parts.processes.all_sum
        for name, count in zip(sizes, all_sum(finite), strict=True):
            if count:
                raise ValueError(f"scores[{name!r}] holds NaN or infinite values, which cannot be ranked.")
        before = {name: parts[name].take(earlier[name]) if name in earlier else None for name in sizes}
        if threshold is not None:
            # a threshold below the least number of the dtype is 0 in it
            kept = {name: ((size >= threshold) & (size > 0)).cpu() for name, size in sizes.items()}
        else:
            kept = {}
            for names in [list(sizes)] if scope == "global" else [[name] for name in sizes]:
                places = [lambda local, name=name: parts[name].places(local) + parts.offsets[name] for name in names]
                count = round((sparsity or 0.0) * sum(parts[name].chunk.numel for name in names))
                chosen = [sizes[name] for name in names], places, [before[name] for name in names]
                kept |= dict(zip(names, largest(*chosen, count, all_sum), strict=True))
        for name, mask in kept.items():
            known = before[name]
            if known is not None:
                mask &= known
        left = all_sum(np.array([float(mask.sum()) for mask in kept.values()]))
        empty = [name for name, count in zip(kept, left, strict=True) if not count and parts[name].chunk.numel]
        if empty and not allow_empty:
            asked = f"sparsity={sparsity}" if threshold is None else f"threshold={threshold}"
            spread = sparsity is not None and scope == "global"
            itself = "use scope='tensor', " if spread else ""
            raise ValueError(
                f"{asked} prunes all weights of {', '.join(map(repr, empty[:4]))}{', …' if len(empty) > 4 else ''}: "
                f"lower it, exclude these tensors, {itself}or set allow_empty=True."
            )
        masks = {name: parts.assemble(name, mask) for name, mask in kept.items()}
        return cls({**{name: mask for name, mask in earlier.items() if name not in masks}, **masks})

    @classmethod
    def from_zeros(cls, module: nn.Module, parameters: str | Sequence[str] | None = None) -> MaskSet:
        """Return the masks of a network that is already sparse: False where its weights are zero.

        Args:
            module: The network, for instance loaded from a checkpoint that holds only weights.
            parameters: As for :func:`prunable_parameters`.

        Raises:
            ValueError: As for :func:`prunable_parameters`.
        """
        return cls({name: weight.detach() != 0 for name, weight in prunable_parameters(module, parameters).items()})

    def agreement(self, other: MaskSet) -> float:
        """Return the share of weights, in [0, 1], on which two sets of masks over the same tensors agree."""
        check_instance("other", other, MaskSet, "a MaskSet")
        if other._shapes != self._shapes:
            raise ValueError(f"other has masks of {list(other)}, which differ in name or shape from {list(self)}.")
        return sum(int((mask == other[name]).sum()) for name, mask in self.items()) / self.numel if self.numel else 1.0

    # -- pruning ------------------------------------------------------------------------------------------------------

    def apply(self, module: nn.Module) -> None:
        """Set the pruned weights to zero, in place.

        Raises:
            ValueError: If a parameter is missing or has another shape; then nothing is changed.
        """
        for chunk, bits in self._matched(module).values():
            _clear(chunk.tensor, bits)

    def pin(
        self,
        module: nn.Module,
        *optimizers: torch.optim.Optimizer,
        on_error: Callable[[Exception], None] | None = None,
    ) -> Pin:
        """Keep the pruned weights at zero while the network is trained.

        They are set to zero now and after every step of any of the optimizers.  Their gradients are set to zero before
        anything reads them, so that optimizer state such as momentum, which is cleared now, stays zero.

        Args:
            module: The network.
            *optimizers: All optimizers of the network.
            on_error: Called with an exception raised in the middle of a step, instead of raising it there.

        Returns:
            A handle; :meth:`Pin.remove`, or leaving its ``with`` block, releases the weights.

        Raises:
            ValueError: As for :meth:`apply`.
            TypeError: If an optimizer does not support step hooks.
        """
        if on_error is not None:
            check_function("on_error", on_error, "a function of an error")
        for optimizer in optimizers:
            if not takes_hooks(optimizer):
                raise TypeError(
                    f"optimizers: {type(optimizer).__name__} takes no step hooks (it did not call "
                    "torch.optim.Optimizer.__init__): leave it out, and call `clear` on the result of `pin` after "
                    "its steps."
                )
        return Pin(self._matched(module), optimizers, on_error)

    def _matched(self, module: nn.Module) -> dict[str, tuple[Chunk, Tensor]]:
        """Return this process's part of each parameter, with its mask as bits on the parameter's device."""
        check_instance("module", module, nn.Module, "a torch.nn.Module")
        named = local_chunks(module, remove_duplicate=False)
        for name, shape in self._shapes.items():
            if name not in named:
                raise ValueError(f"the module has no parameter {name!r} that the masks could apply to.")
            if named[name].shape != shape:
                raise ValueError(f"the mask of {name!r} has shape {shape}, but the parameter {named[name].shape}.")
        return {name: (named[name], _bits(named[name].take(mask), named[name].tensor)) for name, mask in self.items()}

    # -- reporting ----------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per tensor: ``parameter``, ``shape``, ``pruned``, ``weights`` and ``sparsity`` in [0, 1]."""
        return [
            _row(name, "×".join(map(str, mask.shape)), mask.numel() - int(mask.sum()), mask.numel())
            for name, mask in self.items()
        ]

    def table(self, module: nn.Module | None = None) -> str:
        """Return a table of the sparsity of each tensor and overall.

        Args:
            module: The network; adds a line that counts the parameters without masks too.
        """
        if module is not None:
            check_network("module", module)
        rows = self.rows()
        rows.append(_row("masked tensors", "", self.pruned, self.numel))
        if module is not None:
            rows.append(_row("all parameters", "", self.pruned, sum(each.numel() for each in module.parameters())))
        lines = [("parameter", "shape", "pruned", "of", "sparsity")]
        lines += [
            (row["parameter"], row["shape"], f"{row['pruned']:,}", f"{row['weights']:,}", f"{row['sparsity']:.2%}")
            for row in rows
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)),
                       *(cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True))]).rstrip()
            for line in lines
        ]  # fmt: skip
        return "\n".join(text)

    # -- saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return names, shapes and one bit per weight, safe for ``torch.load(weights_only=True)``."""
        flat = np.concatenate([mask.reshape(-1).numpy() for mask in self.values()])
        return {
            "names": list(self),
            "shapes": [list(mask.shape) for mask in self.values()],
            "bits": torch.from_numpy(np.packbits(flat)),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MaskSet:
        """Restore the masks from :meth:`state_dict`; raise ValueError for an invalid state."""
        check_instance("state", state, Mapping, "the result of state_dict()")
        bits, shapes, names = (cast("Any", state.get(key)) for key in ("bits", "shapes", "names"))
        whole = isinstance(shapes, list) and all(isinstance(each, list) for each in shapes)
        good = whole and isinstance(names, list) and isinstance(bits, Tensor) and bits.dtype == torch.uint8
        good = good and len(set(map(str, names))) == len(names) == len(shapes)
        if not good or not all(is_count(size, 0) for shape in shapes for size in shape):
            raise ValueError("state is not that of a MaskSet: pass the result of state_dict().")
        counts = [math.prod(shape) for shape in shapes]
        if 8 * bits.numel() < sum(counts) or 8 * bits.numel() > sum(counts) + 8:
            raise ValueError(f"state holds {8 * bits.numel()} bits for {sum(counts)} weights: it is damaged.")
        flat = torch.from_numpy(np.unpackbits(state["bits"].cpu().numpy(), count=sum(counts)).astype(bool))
        named = state["names"], state["shapes"], torch.split(flat, counts)
        return cls({name: part.reshape(shape) for name, shape, part in zip(*named, strict=True)})


def _check_tensors(name: str, tensors: object) -> None:
    """Raise TypeError or ValueError unless ``tensors`` maps names to real tensors."""
    check_instance(name, tensors, Mapping, "a mapping from parameter names to tensors")
    assert isinstance(tensors, Mapping)
    if not tensors:
        raise ValueError(f"{name} must not be empty: pass a tensor for each parameter name.")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"{name}[{key!r}] must map a name to a real tensor, got {type(value).__name__}.")
        if not is_dense(value):
            raise TypeError(
                f"{name}[{key!r}] must be a dense tensor with values, got {value.layout} on {value.device}."
            )


def _row(name: str, shape: str, pruned: int, of: int) -> dict[str, Any]:
    return {"parameter": name, "shape": shape, "pruned": pruned, "weights": of, "sparsity": pruned / max(1, of)}


def check_amount(sparsity: object, threshold: object, scope: str) -> None:
    """Raise ValueError unless exactly one of sparsity and threshold is given, in its range."""
    if sparsity is not None and threshold is not None:
        raise ValueError(f"sparsity={sparsity} and threshold={threshold} exclude each other: give one of them.")
    if sparsity is None and threshold is None:
        raise ValueError("sparsity and threshold are both None: give the share to prune, such as sparsity=0.75.")
    if sparsity is not None:
        check_share("sparsity", sparsity, SHARE)
    if threshold is not None:
        check_positive("threshold", threshold, "smaller weights are pruned")
    check_choice("scope", scope, SCOPES)
    if threshold is not None and scope != "global":
        raise ValueError(f"scope={scope!r} needs sparsity, got threshold={threshold}: use scope='global'.")
