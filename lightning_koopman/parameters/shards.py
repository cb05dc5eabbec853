"""What each process holds of a network's parameters, and which of it counts as its own.

Under FSDP each process holds a chunk of a parameter, under DDP all of it, under hybrid schemes a chunk that others hold
too.  Processes that hold the same chunk share it out, so that every number counts once, and memory and work of the
analysis divide by the number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_koopman.parameters.process_group import Processes

Indices = npt.NDArray[np.int64]
EXACT = 2**50  # hashes below it are whole numbers in float64


@dataclass(frozen=True, eq=False)
class Chunk:
    """What this process holds of one parameter.

    Attributes:
        parameter: The parameter as the optimizers know it.
        tensor: Its numbers here, sharing the parameter's memory.
        shape: Shape of the whole parameter.
        starts: Array (runs,): where in the whole, flattened parameter each run of successive numbers begins.
        lengths: Array (runs,): their lengths; the runs are in the order of ``tensor.reshape(-1)``.
    """

    parameter: nn.Parameter
    tensor: Tensor
    shape: tuple[int, ...]
    starts: Indices
    lengths: Indices

    @classmethod
    def of(cls, tensor: Any) -> Chunk:
        """All of a tensor that is not sharded; complex numbers are pairs of real ones."""
        held = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor
        return cls(tensor, held, tuple(held.shape), *one_run(0, held.numel()))

    @property
    def numel(self) -> int:
        """Number of numbers of the whole parameter."""
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """Whether the parameter is an ordinary one, all of which is here."""
        return self.tensor is self.parameter or self.parameter.is_complex()

    def like(self, value: Tensor | None) -> Tensor | None:
        """This process's numbers of a tensor that is sharded as the parameter is, such as its gradient."""
        if value is None:
            return None
        local: Tensor = value.to_local() if hasattr(value, "to_local") else value
        return local if local.numel() == self.tensor.numel() else None

    def take(self, whole: Tensor) -> Tensor:
        """What this process holds, from a tensor of the whole parameter's shape."""
        if self.tensor.shape == whole.shape:
            return whole
        return _gathered(whole, self.starts, self.lengths).reshape(self.tensor.shape)


@dataclass(frozen=True, eq=False)
class Part:
    """What of one parameter counts as this process's own.

    Attributes:
        chunk: What the process holds.
        start: First of its numbers in the flattened chunk.
        stop: One after the last.
        starts: As the chunk's, of these numbers only.
        lengths: As the chunk's, of these numbers only.
    """

    chunk: Chunk
    start: int
    stop: int
    starts: Indices
    lengths: Indices

    @property
    def values(self) -> Tensor:
        """The numbers, a flat view (or copy where the chunk's memory has gaps)."""
        return self.chunk.tensor.detach().reshape(-1)[self.start : self.stop]

    def take(self, whole: Tensor) -> Tensor:
        """The own numbers, flat, from a tensor of the whole parameter's shape."""
        return _gathered(whole, self.starts, self.lengths)

    def places(self, local: Tensor) -> Tensor:
        """Flat indices in the whole parameter of numbers given by their indices here."""
        ends = torch.from_numpy(np.cumsum(self.lengths))
        run = torch.searchsorted(ends, local, right=True)
        before = ends - torch.from_numpy(self.lengths)
        return torch.from_numpy(self.starts)[run] + local - before[run]


class Shards(Mapping[str, Part]):
    """The own parts of some parameters, by name.

    Args:
        chunks: What this process holds of each; the same names in the same order in every process.
        processes: All processes that hold something of them.
        like: Earlier ones: where the chunks are of the same kind, nothing needs to be asked of the other processes.
    """

    def __init__(
        self, chunks: Mapping[str, Chunk], processes: Processes | None = None, *, like: Shards | None = None
    ) -> None:
        self.processes = processes or Processes()
        self.chunks = dict(chunks)
        self._holders: dict[str, tuple[int, ...]]
        self._sharing: list[tuple[int, ...]]
        self._groups: dict[tuple[int, ...], Any]
        self._marks = np.array([_mark(name, chunk) for name, chunk in self.chunks.items()], dtype=np.float64)
        self._kind = [(name, chunk.shape) for name, chunk in self.chunks.items()]
        changed = like is None or like._kind != self._kind or not np.array_equal(like._marks, self._marks)
        if not self.processes.any(changed) and like is not None:
            self._holders, self._sharing, self._groups = like._holders, like._sharing, like._groups
        else:
            table = self.processes.table(self._marks)
            self._holders = {
                name: tuple(np.flatnonzero(table[:, at] == self._marks[at]).tolist())
                for at, name in enumerate(self.chunks)
            }
            self._sharing = _sharing(table)
            self._groups = {}
        self._parts = {name: self._own(chunk, self._holders[name]) for name, chunk in self.chunks.items()}
        sizes = np.cumsum([0, *(chunk.numel for chunk in self.chunks.values())])
        self.offsets = dict(zip(self.chunks, sizes[:-1].tolist(), strict=True))

    def __getitem__(self, name: str) -> Part:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def numel(self) -> int:
        """Number of own numbers."""
        return sum(part.stop - part.start for part in self.values())

    def runs(self) -> Iterator[tuple[int, Tensor]]:
        """The own numbers in runs: where each begins in the sequence of all parameters, and its values."""
        for name, part in self.items():
            at, values = 0, part.values
            for start, length in zip(part.starts.tolist(), part.lengths.tolist(), strict=True):
                yield self.offsets[name] + start, values[at : at + length]
                at += length

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector of all own numbers, by parameter."""
        sizes = [part.stop - part.start for part in self.values()]
        return dict(zip(self, torch.split(flat, sizes), strict=True))

    def complete(self, name: str, own: Tensor) -> Tensor:
        """Numbers of the chunk that this process holds, from those of its own part and of its replicas' parts."""
        chunk, part = self.chunks[name], self[name]
        filled = torch.zeros(chunk.tensor.numel(), dtype=own.dtype)
        filled[part.start : part.stop] = own.cpu()
        self._make_groups()
        group = self._groups.get(self._holders[name])
        shared = self.processes.add_up(filled if group is not None else filled[:0], group)
        return (filled if group is None else shared).reshape(chunk.tensor.shape)

    def assemble(self, name: str, own: Tensor) -> Tensor:
        """Mask of the whole parameter's shape from all processes' parts: a byte a weight is sent, no weights."""
        part = self[name]
        whole = torch.zeros(part.chunk.numel, dtype=torch.uint8)
        at = 0
        for start, length in zip(part.starts.tolist(), part.lengths.tolist(), strict=True):
            whole[start : start + length] = own[at : at + length].to(torch.uint8)
            at += length
        return self.processes.add_up(whole).bool().reshape(part.chunk.shape)

    def _own(self, chunk: Chunk, holders: Sequence[int]) -> Part:
        count, size = len(holders), chunk.tensor.numel()
        place = holders.index(self.processes.rank)
        start, stop = size * place // count, size * (place + 1) // count
        return Part(chunk, start, stop, *_cut(chunk.starts, chunk.lengths, start, stop))

    def _make_groups(self) -> None:
        """A group of processes for each set of replicas; made by all processes together, at first need."""
        if self._sharing and not self._groups:
            self.processes.any(False)  # all of them are here
        everyone = tuple(range(self.processes.size))
        for ranks in self._sharing if not self._groups else ():
            own = ranks == everyone
            self._groups[ranks] = self.processes.group if own else dist.new_group(list(ranks), backend="gloo")


def _sharing(table: npt.NDArray[np.float64]) -> list[tuple[int, ...]]:
    """The sets of processes that hold the same chunk of something, from all their marks; the same in each of them."""
    found = set()
    for column in table.T:
        for mark in np.unique(column[column > 0]):
            found.add(tuple(np.flatnonzero(column == mark).tolist()))
    return sorted(ranks for ranks in found if len(ranks) > 1)


def one_run(start: int, length: int) -> tuple[Indices, Indices]:
    """One contiguous range as run-length arrays (empty if length is 0)."""
    kept = slice(None) if length else slice(0)
    return np.array([start], dtype=np.int64)[kept], np.array([length], dtype=np.int64)[kept]


def _gathered(whole: Tensor, starts: Indices, lengths: Indices) -> Tensor:
    """The numbers of some runs, one after the other."""
    flat, runs = whole.reshape(-1), zip(starts.tolist(), lengths.tolist(), strict=True)
    return torch.cat([flat[:0], *(flat[start : start + length] for start, length in runs)])


def _cut(starts: Indices, lengths: Indices, start: int, stop: int) -> tuple[Indices, Indices]:
    """The runs of the numbers start … stop − 1 in their order."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    left, right = np.maximum(begins, start), np.minimum(ends, stop)
    kept = right > left
    return (starts + left - begins)[kept], (right - left)[kept]


def _mark(name: str, chunk: Chunk) -> float:
    """Hash of what is held of a parameter, 0 where that is nothing."""
    if not chunk.tensor.numel():
        return 0.0
    digest = hashlib.blake2b(name.encode(), digest_size=8)
    digest.update(chunk.starts.tobytes())
    digest.update(chunk.lengths.tobytes())
    return float(int.from_bytes(digest.digest(), "little") % (EXACT - 1) + 1)
