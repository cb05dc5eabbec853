"""The processes of a run, and small sums over them, each preceded by a check that no process has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_koopman._types import Array

TOLD = "_koopman_told"  # marks an error that the other processes know about
_opened = WeakKeyDictionary[Any, dict[tuple[int, ...], Any]]()  # our groups beside each default group


class ProcessLostError(RuntimeError):
    """Another process does not respond, so this one cannot continue."""


class OtherProcessError(RuntimeError):
    """Joint work failed in another process, which reports why."""


def open_group(ranks: tuple[int, ...]) -> Any:
    """Return a gloo group of these processes; all processes must call this.

    It is opened once beside PyTorch's default group, for all trainings: each holds threads and files.
    """
    groups = _opened.setdefault(dist.group.WORLD, {})
    if ranks not in groups:
        groups[ranks] = dist.new_group(list(ranks), backend="gloo")
    return groups[ranks]


@dataclass(frozen=True)
class Processes:
    """This process among all that train one network.

    They communicate in a gloo group of their own, from CPU to CPU, so as not to interfere with the collectives of the
    training.  Before each sum they check that none has failed, so that none waits for a sum that never comes: see
    :meth:`together`.

    Attributes:
        rank: Index of this process, 0 ≤ rank < size.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def __reduce__(self) -> tuple[type[Processes], tuple[()]]:
        return Processes, ()  # connections belong to this process: a copy is a single process

    @classmethod
    def of_run(cls) -> Processes:
        """Return all processes of PyTorch's default group, or this one alone if there is none."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        size = dist.get_world_size()
        return cls(dist.get_rank(), size, open_group(tuple(range(size))))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Context of work that succeeds in all processes, or raises in all of them.

        If one process fails anywhere in the block, the others learn of it at their next sum, or at the end of the block
        at the latest.

        Raises:
            OtherProcessError: If another process failed and this one did not.
            ProcessLostError: If another process has ended.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except (ProcessLostError, OtherProcessError):
            raise
        except Exception as error:
            if not hasattr(error, TOLD):  # an inner block has not yet told the others
                setattr(error, TOLD, True)
                with contextlib.suppress(OtherProcessError):
                    self._agree(failed=True)
            raise
        self._agree(failed=False)

    def _agree(self, *, failed: bool) -> None:
        """Tell the other processes whether this one failed; raise OtherProcessError if any did."""
        count = int(self._reduce(torch.tensor([float(failed)]), None))
        if count:
            raise OtherProcessError(f"it failed in {count} of {self.size} processes: see their warnings")

    def all_sum(self, values: Array) -> Array:
        """Return the sum of a float64 array over the processes, the same in each of them."""
        return self.add_up(torch.from_numpy(np.array(values, dtype=np.float64))).numpy()

    def add_up(self, values: Tensor, group: Any = None) -> Tensor:
        """Return the sum of a CPU tensor over all processes, or over a group; the tensor is overwritten.

        All processes must call this; those outside any group pass an empty tensor.

        Raises:
            OtherProcessError: If a process has failed within :meth:`together`.
            ProcessLostError: If a process has ended.
        """
        if self.size == 1:
            return values
        self._agree(failed=False)
        return self._reduce(values, group) if values.numel() else values

    def _reduce(self, values: Tensor, group: Any) -> Tensor:
        try:
            dist.all_reduce(values, group=group or self.group)
        except RuntimeError as error:
            raise ProcessLostError(f"process {self.rank} of {self.size} could not reach the others: {error}") from error
        return values

    def copy_from_first(self, values: Tensor) -> None:
        """Overwrite a tensor, on any device, with the first process's values, over the default group."""
        if self.size > 1:
            self._agree(failed=False)
            dist.broadcast(values, src=0)

    def table(self, row: Array) -> Array:
        """Return the rows (p,) of all processes as an array (size, p)."""
        rows = np.zeros((self.size, len(row)))
        rows[self.rank] = row
        return self.all_sum(rows)

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        return bool(self.all_sum(np.array([float(flag)]))[0] > 0)
