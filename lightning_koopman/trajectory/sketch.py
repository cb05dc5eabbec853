"""Random sketches: a fixed number of combinations of each snapshot, and the error that they cause."""

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

SKETCH = 4093  # a prime, so that no regular layout of the weights concentrates in few buckets
MOST = 10**8  # elements of a sketch: beyond it the signs alone take gigabytes
TABLE = 2**21  # random signs, of which each block of elements uses a window
CHUNK = 2**20  # elements whose signs are generated at a time
DRAWS = 16  # bootstrap replicates: a standard deviation from 16 is known to about 18 %
SEED = 2020
FARTHEST = 2**53  # largest index of an element in the whole vector


class Sketch:
    r"""Linear map from n elements to k buckets: element i is added, with a random sign, to bucket i mod k.

    Inner products are preserved up to a relative error of about :math:`\sqrt{2/k}`.  Since the map is linear,
    increments of sketches are sketches of increments, and the sketches of a snapshot's shards add up.  Choose a prime
    k, so that no regular layout of the elements concentrates in few buckets.

    Args:
        k: Elements of a sketch, ≥ 2.
        seed: Seed of the signs; sketches that are added or compared need the same.
    """

    def __init__(self, k: int, *, seed: int = SEED) -> None:
        self.k, self.seed = k, seed
        random = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (TABLE + k,), generator=random, dtype=torch.int8)
        self._tables = {torch.device("cpu"): 2.0 * signs - 1.0}

    def of_parts(self, parts: Sequence[Tensor], offsets: Sequence[int] | None = None) -> Array:
        """Return the sketch (k,) of a vector given as several tensors, each projected on its own device.

        Args:
            parts: Real tensors on any device.
            offsets: Index in the whole vector at which each tensor begins (default: one after the other).

        Raises:
            ValueError: If the offsets are not whole numbers ≥ 0, one per tensor.
        """
        found = np.zeros(self.k)
        sizes = [part.numel() for part in parts]
        begins = np.cumsum([0, *sizes])[:-1] if offsets is None else whole_numbers("offsets", offsets, 0, FARTHEST)
        if len(begins) != len(sizes):
            raise ValueError(f"offsets has {len(begins)} entries for {len(sizes)} tensors: pass one per tensor.")
        for part, at in zip(parts, begins.tolist(), strict=True):
            found += self.project(part.reshape(-1), offset=at).cpu().numpy()
        return found

    def project(self, values: Tensor, *, offset: int = 0) -> Tensor:
        """Return the float64 sketch (k,) of a vector, or of its part from ``offset`` on, on its device (CPU for MPS).

        Args:
            values: Real tensor (n,).
            offset: Index of the first value in the whole vector, ≥ 0.
        """
        if values.device.type == "mps":  # MPS has no float64
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
        count, rows = rest.numel() // k, max(1, CHUNK // k)
        # in buffers, since new pages cost more than the sums
        signs = windows.new_empty(min(rows, count), k)
        signed = torch.empty_like(signs, dtype=torch.promote_types(values.dtype, signs.dtype))
        for start in range(0, count, rows):
            part = rest[start * k : min(start + rows, count) * k].reshape(-1, k)
            held = slice(len(part))
            torch.index_select(windows, 0, self._places(block + start, len(part)).to(values.device), out=signs[held])
            sketch += torch.mul(part, signs[held], out=signed[held]).sum(dim=0, dtype=torch.float64)
        tail = rest[count * k :]
        last = windows[self._places(block + count, 1).to(values.device)[0]]
        sketch[: len(tail)] += tail.double() * last[: len(tail)]
        return sketch

    def _windows(self, device: torch.device) -> Tensor:
        """Return all windows (TABLE, k) of the table of signs as a view."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device].as_strided((TABLE, self.k), (1, 1))

    def _places(self, first: int, count: int) -> Tensor:
        """Return the index in the table at which each block's signs begin, a hash of the block's index (SplitMix64)."""
        with np.errstate(over="ignore"):
            state = np.arange(first, first + count, dtype=np.uint64) + np.uint64(self.seed)
            state = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
        return torch.from_numpy((state % np.uint64(TABLE)).astype(np.int64))


def check_sketch(sketch: object) -> int:
    """Return the number of elements of a sketch; raise ValueError if it is out of range."""
    return check_count("sketch", sketch, 2, "the estimate's error is about √(2 / sketch)", most=MOST)


def with_sketch_errors(spectrum: Spectrum, root: Array, k: int, *, seed: int = 0) -> Spectrum:
    """Return the spectrum of a sketched trajectory with standard errors of its eigenvalues.

    The errors come from a parametric bootstrap.  The Gram matrix of sketches is approximately Wishart distributed with
    k degrees of freedom around the true one.  Each replicate therefore sketches the sketches once more, by Bartlett's
    decomposition at O(time³).  An eigenvalue's error is its root-mean-square distance from the replicates' nearest one.

    Args:
        spectrum: Spectrum of the sketches, refined or not.
        root: Array (r, time): factor of the sketches.
        k: Elements of a sketch.
        seed: Seed of the replicates.
    """
    random = np.random.default_rng(seed)
    misses = np.zeros((DRAWS, spectrum.rank))
    for draw in misses:
        sketched = wishart_root(random, k, root.shape[0]) @ root / np.sqrt(k)
        again = decompose(sketched, tol=0.0, max_rank=spectrum.rank, delays=spectrum.delays, refine=False).ritz_values
        draw[:] = np.abs(spectrum.ritz_values[:, None] - again[None, :]).min(axis=1)
    return replace(spectrum, sketch_errors=np.sqrt(np.mean(misses**2, axis=0)))
