"""Random sketches: so few numbers of each snapshot that its length does not matter, and how far off that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_koopman._checks import check_count, whole_numbers
from lightning_koopman._types import Array
from lightning_koopman.dmd.random_walk import wishart_root
from lightning_koopman.dmd.rrr import decompose
from lightning_koopman.dmd.spectrum import Spectrum

SKETCH = 4093  # a prime, so that no regular layout of the weights falls into few buckets
MOST = 10**8  # numbers in a sketch: their signs alone take gigabytes beyond
TABLE = 2**21  # random signs, of which each block of numbers takes a window
CHUNK = 2**20  # numbers of which the signs are made at a time
DRAWS = 16  # replicates for the error: the standard deviation of 16 is known to about 18 %
SEED = 2020
FARTHEST = 2**53  # index of a number in the whole vector


class Sketch:
    r"""Linear map from n numbers to k by random signs: bucket i mod k gets the numbers i, each with its sign.

    Inner products survive up to a relative error of about :math:`\sqrt{2/k}`, and the map is linear, so that increments
    of sketches are sketches of increments and the sketches of the shards of a snapshot add up.  Choose a prime k: then
    no regular layout of the numbers falls into few buckets.

    Args:
        k: Numbers in a sketch, ≥ 2.
        seed: Of the signs; sketches that are to be added or compared need the same.
    """

    def __init__(self, k: int, *, seed: int = SEED) -> None:
        self.k, self.seed = k, seed
        random = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (TABLE + k,), generator=random, dtype=torch.int8)
        self._tables = {torch.device("cpu"): 2.0 * signs - 1.0}

    def of_parts(self, parts: Sequence[Tensor], offsets: Sequence[int] | None = None) -> Array:
        """Sketch (k,) of a vector made up of tensors, each projected on its own device.

        Args:
            parts: Real tensors on any device.
            offsets: Index in the whole vector at which each begins (default: one after the other).

        Raises:
            ValueError: If the offsets are no whole numbers ≥ 0, one for each tensor.
        """
        found = np.zeros(self.k)
        sizes = [part.numel() for part in parts]
        begins = np.cumsum([0, *sizes])[:-1] if offsets is None else whole_numbers("offsets", offsets, 0, FARTHEST)
        if len(begins) != len(sizes):
            raise ValueError(f"offsets are {len(begins)}, the tensors of the snapshot {len(sizes)}: give one for each.")
        for part, at in zip(parts, begins.tolist(), strict=True):
            found += self.project(part.reshape(-1), offset=at).cpu().numpy()
        return found

    def project(self, values: Tensor, *, offset: int = 0) -> Tensor:
        """Sketch (k,), float64 and on the same device, of a vector, or of the part of it that begins at ``offset``.

        Args:
            values: Real tensor (n,).
            offset: Index of the first of them in the whole vector, ≥ 0.
        """
        if values.device.type == "mps":  # which has no float64
            values = values.cpu()
        k = self.k
        windows = self._windows(values.device)
        sketch = torch.zeros(k, dtype=torch.float64, device=values.device)
        lead = min(-offset % k, values.numel())  # up to the next whole block
        block, column = divmod(offset, k)
        if lead:
            signs = windows[self._places(block, 1).to(values.device)[0]]
            sketch[column : column + lead] += values[:lead].double() * signs[column : column + lead]
            block += 1
        rest = values[lead:]
        rows = max(1, CHUNK // k)
        for start in range(0, rest.numel(), rows * k):
            part = rest[start : start + rows * k]
            count = part.numel() // k
            signs = windows[self._places(block + start // k, count + 1).to(values.device)]
            if count:
                sketch += torch.sum(part[: count * k].reshape(count, k) * signs[:count], dim=0, dtype=torch.float64)
            tail = part[count * k :]
            sketch[: tail.numel()] += tail.double() * signs[count, : tail.numel()]
        return sketch

    def _windows(self, device: torch.device) -> Tensor:
        """All runs (TABLE, k) of the table of signs, without a copy."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device].as_strided((TABLE, self.k), (1, 1))

    def _places(self, first: int, count: int) -> Tensor:
        """Where in the table the signs of some blocks begin: a hash of the block's number (SplitMix64)."""
        with np.errstate(over="ignore"):
            state = np.arange(first, first + count, dtype=np.uint64) + np.uint64(self.seed)
            state = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
        return torch.from_numpy((state % np.uint64(TABLE)).astype(np.int64))


def check_sketch(sketch: object) -> int:
    """The number of combinations that a sketch keeps; raise ValueError if it is out of its range."""
    return check_count("sketch", sketch, 2, "the estimate's error is about √(2 / sketch)", most=MOST)


def with_sketch_errors(spectrum: Spectrum, root: Array, k: int, *, seed: int = 0) -> Spectrum:
    """The spectrum of a sketched trajectory with the standard errors of its eigenvalues.

    By parametric bootstrap: a Gram matrix of sketches is, to a good approximation, Wishart distributed around the true
    one with k degrees of freedom.  So it is sketched once more, by Bartlett's decomposition at O(time³), and the spread
    of as many eigenvalues around those found estimates how far these are from those of the whole snapshots.

    Args:
        spectrum: Of the sketches, without refinement or with.
        root: Array (r, time): their factor.
        k: Numbers in a sketch.
        seed: Of the replicates.
    """
    random = np.random.default_rng(seed)
    misses = np.zeros((DRAWS, spectrum.rank))
    for draw in misses:
        sketched = wishart_root(random, k, root.shape[0]) @ root / np.sqrt(k)
        again = decompose(sketched, tol=0.0, max_rank=spectrum.rank, delays=spectrum.delays, refine=False).ritz_values
        draw[:] = np.abs(spectrum.ritz_values[:, None] - again[None, :]).min(axis=1)
    return replace(spectrum, sketch_errors=np.sqrt(np.mean(misses**2, axis=0)))
