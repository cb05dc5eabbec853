"""Exact quantiles of distributed values, by histograms that are summed over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_koopman._types import AllSum

DIGIT = 16  # bits per pass
PIECE = 2**22  # elements converted to keys at a time
PLACES = 48  # bits of an index: enough for 2.8e14 weights


def largest(
    magnitudes: Sequence[Tensor],
    places: Sequence[Callable[[Tensor], Tensor]],
    earlier: Sequence[Tensor | None],
    count: int,
    all_sum: AllSum,
) -> list[Tensor]:
    """Return boolean tensors (n,), False for the ``count`` smallest magnitudes over all processes.

    Of equal ones, the one with the lower index counts as smaller.

    Args:
        magnitudes: Real, finite tensors (n,).
        places: For each, a function from local to global indices (int64 tensors); global indices are distinct over all
            tensors and processes.
        earlier: For each, None or a boolean tensor (n,): elements with False count as smaller than all others.
        count: Number of elements with False.
        all_sum: Function that sums an array over all processes.
    """
    if count <= 0:
        return [torch.ones(part.numel(), dtype=torch.bool) for part in magnitudes]
    bits = 64 if any(part.dtype == torch.float64 for part in magnitudes) else 32
    sources = [partial(_keys, part, before, bits) for part, before in zip(magnitudes, earlier, strict=True)]
    bound, below = _select(sources, bits, count, all_sum)
    kept, found = [], []
    for source, placed in zip(sources, places, strict=True):
        mask, ties, start = [torch.zeros(0, dtype=torch.bool)], [torch.zeros(0, dtype=torch.int64)], 0
        for keys in source():
            mask.append(keys > bound)
            ties.append(torch.nonzero(keys == bound).reshape(-1) + start)
            start += keys.numel()
        kept.append(torch.cat(mask))
        found.append((torch.cat(ties), placed(torch.cat(ties))))
    # of equal elements the first are pruned
    last, _ = _select([partial(iter, [place]) for _, place in found], PLACES, count - below, all_sum)
    for survivors, (tie, place) in zip(kept, found, strict=True):
        survivors[tie[place > last]] = True
    return kept


def _keys(part: Tensor, earlier: Tensor | None, bits: int) -> Iterator[Tensor]:
    """Yield integer keys in the order of the magnitudes, one piece at a time."""
    for start in range(0, part.numel(), PIECE):
        values = part[start : start + PIECE].abs()
        # the bit patterns of positive floats have the order of the floats
        wide = values.double().view(torch.int64) if bits == 64 else values.float().view(torch.int32)
        key = wide.to(torch.int64).cpu() + 1
        yield key if earlier is None else key.masked_fill_(~earlier[start : start + PIECE], 0)


def _select(
    sources: Sequence[Callable[[], Iterable[Tensor]]], bits: int, count: int, all_sum: AllSum
) -> tuple[int, int]:
    """Return the key of rank ``count`` (1: the smallest) over all processes, and the number of smaller keys.

    Find it digit by digit from the highest, by a histogram of the next digit of the keys that match so far.
    """
    prefix, below = 0, 0
    for shift in range(bits - DIGIT, -1, -DIGIT):
        histogram = torch.zeros(2**DIGIT, dtype=torch.int64)
        for source in sources:
            for keys in source():
                alike = keys[(keys >> (shift + DIGIT)) == prefix] if shift + DIGIT < 64 else keys
                histogram += torch.bincount((alike >> shift) & (2**DIGIT - 1), minlength=2**DIGIT)
        counts = all_sum(histogram.double().numpy())
        up_to = below + np.cumsum(counts)
        digit = int(np.searchsorted(up_to, count))
        below = int(up_to[digit] - counts[digit])
        prefix = (prefix << DIGIT) + digit
    return prefix, below
