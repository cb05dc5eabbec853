"""What each process holds of a network's parameters, and which part of it counts as its own.

Under FSDP each process holds a chunk of a parameter, under DDP all of it, and under hybrid schemes a chunk that others
hold, too.  Replicas of a chunk divide it among themselves.  So every element counts once, and the memory and work of
the analysis are divided by the number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_koopman.parameters.process_group import Processes, open_group

Indices = npt.NDArray[np.int64]
EXACT = 2**50  # hashes below it are exact in float64


@dataclass(frozen=True, eq=False)
class Chunk:
    """What this process holds of one parameter.

    Attributes:
        parameter: The parameter as the optimizers know it.
        tensor: The elements held here, sharing the parameter's memory.
        shape: Shape of the whole parameter.
        starts: Array (runs,): index in the flattened whole parameter at which each run of contiguous elements begins.
        lengths: Array (runs,): lengths of the runs, which follow the order of ``tensor.reshape(-1)``.
    """

    parameter: nn.Parameter
    tensor: Tensor
    shape: tuple[int, ...]
    starts: Indices
    lengths: Indices

    @classmethod
    def of(cls, tensor: Any) -> Chunk:
        """Return all of a tensor that is not sharded; complex elements are pairs of real ones."""
        held = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor
        return cls(tensor, held, tuple(held.shape), *one_run(0, held.numel()))

    @property
    def numel(self) -> int:
        """Number of elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """Whether the parameter is not sharded: all of it is here."""
        return self.tensor is self.parameter or self.parameter.is_complex()

    def like(self, value: Tensor | None) -> Tensor | None:
        """Return this process's part of a tensor that is sharded like the parameter, such as its gradient, or None."""
        if value is None:
            return None
        local: Tensor = value.to_local() if hasattr(value, "to_local") else value
        return local if local.numel() == self.tensor.numel() else None

    def take(self, whole: Tensor) -> Tensor:
        """Return what this process holds of a tensor of the whole parameter's shape."""
        if self.tensor.shape == whole.shape:
            return whole
        return _gathered(whole, self.starts, self.lengths).reshape(self.tensor.shape)


def copy_replicas(chunks: Iterable[Chunk], processes: Processes) -> None:
    """Overwrite the parameters that every process holds whole with the first process's values."""
    for tensor in {id(each.tensor): each.tensor.detach() for each in chunks if each.whole}.values():
        processes.copy_from_first(tensor)


@dataclass(frozen=True, eq=False)
class Part:
    """The part of one parameter that counts as this process's own.

    Attributes:
        chunk: What the process holds.
        start: Index of the part's first element in the flattened chunk.
        stop: Index after the last.
        starts: As in the chunk, for this part only.
        lengths: As in the chunk, for this part only.
    """

    chunk: Chunk
    start: int
    stop: int
    starts: Indices
    lengths: Indices

    @property
    def values(self) -> Tensor:
        """The elements, as a flat view (or a copy if the chunk's memory has gaps)."""
        return self.chunk.tensor.detach().reshape(-1)[self.start : self.stop]

    def take(self, whole: Tensor) -> Tensor:
        """Return the own elements, flat, of a tensor of the whole parameter's shape."""
        return _gathered(whole, self.starts, self.lengths)

    def places(self, local: Tensor) -> Tensor:
        """Return the flat indices in the whole parameter of elements given by their indices in this part."""
        ends = torch.from_numpy(np.cumsum(self.lengths))
        run = torch.searchsorted(ends, local, right=True)
        before = ends - torch.from_numpy(self.lengths)
        return torch.from_numpy(self.starts)[run] + local - before[run]


class Shards(dict[str, Part]):
    """This process's own parts of some parameters, by name.

    Args:
        chunks: What this process holds of each parameter; the same names in the same order in every process.
        processes: All processes that hold a part of them.
        like: Earlier shards: if no process's chunks have changed since, the table of replicas is not exchanged again.
    """

    def __init__(
        self, chunks: Mapping[str, Chunk], processes: Processes | None = None, *, like: Shards | None = None
    ) -> None:
        self.processes = processes or Processes()
        self.chunks = dict(chunks)
        self._marks = np.array([_mark(name, chunk) for name, chunk in self.chunks.items()], dtype=np.float64)
        self._kind = [(name, chunk.shape) for name, chunk in self.chunks.items()]
        changed = like is None or like._kind != self._kind or not np.array_equal(like._marks, self._marks)
        if self.processes.any(changed) or like is None:
            table = self.processes.table(self._marks)
            self._holders = {
                name: tuple(np.flatnonzero(table[:, at] == self._marks[at]).tolist())
                for at, name in enumerate(self.chunks)
            }
            self._sharing = _sharing(table)
            self._groups: dict[tuple[int, ...], Any] = {}
        else:
            self._holders, self._sharing, self._groups = like._holders, like._sharing, like._groups
        super().__init__({name: self._own(chunk, self._holders[name]) for name, chunk in self.chunks.items()})
        sizes = np.cumsum([0, *(chunk.numel for chunk in self.chunks.values())])
        self.offsets = dict(zip(self.chunks, sizes[:-1].tolist(), strict=True))

    @property
    def numel(self) -> int:
        """Number of own elements."""
        return sum(part.stop - part.start for part in self.values())

    def runs(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the own elements in runs: the index of each among all parameters' elements, and its values."""
        for name, part in self.items():
            at, values = 0, part.values
            for start, length in zip(part.starts.tolist(), part.lengths.tolist(), strict=True):
                yield self.offsets[name] + start, values[at : at + length]
                at += length

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a vector of all own elements by parameter."""
        sizes = [part.stop - part.start for part in self.values()]
        return dict(zip(self, torch.split(flat, sizes), strict=True))

    def complete(self, name: str, own: Tensor) -> Tensor:
        """Return the chunk that this process holds, from the values of its own part and of its replicas' parts."""
        chunk, part = self.chunks[name], self[name]
        filled = torch.zeros(chunk.tensor.numel(), dtype=own.dtype)
        filled[part.start : part.stop] = own.cpu()
        self._make_groups()
        group = self._groups.get(self._holders[name])
        shared = self.processes.add_up(filled if group is not None else filled[:0], group)
        return (filled if group is None else shared).reshape(chunk.tensor.shape)

    def assemble(self, name: str, own: Tensor) -> Tensor:
        """Return a mask of the whole parameter from all processes' parts; sends one byte per weight, no weights."""
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
        """Create a process group for each set of replicas, in all processes together, when first needed."""
        if self._sharing and not self._groups:
            self.processes.any(False)  # check that no process has failed before creating groups
            self._groups.update({ranks: open_group(ranks) for ranks in self._sharing})


def _sharing(table: npt.NDArray[np.float64]) -> list[tuple[int, ...]]:
    """Return the sets of processes that hold the same chunk, from all their marks; the same in each of them."""
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
    """Return the elements of some runs, concatenated."""
    flat, runs = whole.reshape(-1), zip(starts.tolist(), lengths.tolist(), strict=True)
    return torch.cat([flat[:0], *(flat[start : start + length] for start, length in runs)])


def _cut(starts: Indices, lengths: Indices, start: int, stop: int) -> tuple[Indices, Indices]:
    """Return the runs of the elements ``start`` … ``stop − 1``, in order."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    left, right = np.maximum(begins, start), np.minimum(ends, stop)
    kept = right > left
    return (starts + left - begins)[kept], (right - left)[kept]


def _mark(name: str, chunk: Chunk) -> float:
    """Return a hash of what is held of a parameter; 0 if nothing is."""
    if not chunk.tensor.numel():
        return 0.0
    digest = hashlib.blake2b(name.encode(), digest_size=8)
    digest.update(chunk.starts.tobytes())
    digest.update(chunk.lengths.tobytes())
    return float(int.from_bytes(digest.digest(), "little") % (EXACT - 1) + 1)
