"""The processes of a run, as far as the analysis needs them: small sums, each agreed on before it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_koopman._types import Array

TOLD = "_koopman_told"  # marks an error that the other processes know of


class ProcessLostError(RuntimeError):
    """Another process does not answer: this one cannot go on either."""


class OtherProcessError(RuntimeError):
    """What was done together failed in another process, which says why."""


@dataclass(frozen=True)
class Processes:
    """This process among all that train one network.

    They talk over connections of their own, from CPU to CPU, so that nothing of theirs gets between the collectives of
    the training.  Before each sum they agree that none has failed, so that none waits for a sum that never comes: see
    :meth:`together`.

    Attributes:
        rank: Its number, 0 ≤ rank < size.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def __reduce__(self) -> tuple[type[Processes], tuple[()]]:
        return Processes, ()  # connections belong to this process: a copy elsewhere begins alone

    @classmethod
    def of_run(cls) -> Processes:
        """All processes of PyTorch's default group, together; or this one alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Context of work that succeeds in all processes, or raises in all of them.

        Whatever fails in one process, wherever in the block, the others are told when they next want to sum something,
        at the latest at the end of the block.

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
        """Tell the others whether this process failed, and hear it from them."""
        count = int(self._reduce(torch.tensor([float(failed)]), None))
        if count:
            raise OtherProcessError(f"it failed in {count} of {self.size} processes: see the warning there")

    def all_sum(self, values: Array) -> Array:
        """Sum of a float64 array over the processes; the same numbers in each of them."""
        if self.size == 1:
            return values
        return self.add_up(torch.from_numpy(np.array(values, dtype=np.float64))).numpy()

    def add_up(self, values: Tensor, group: Any = None) -> Tensor:
        """Sum of a CPU tensor, which is overwritten, over the processes or those of a group.

        All processes have to call this, also those of no group, with an empty tensor.

        Raises:
            OtherProcessError: If one of them has failed in what they do :meth:`together`.
            ProcessLostError: If one of them has ended.
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
        """Give a tensor, on any device, the first process's values in all of them."""
        if self.size > 1:
            self._agree(failed=False)
            dist.broadcast(values, src=0)

    def table(self, row: Array) -> Array:
        """What every process has in a row (p,), as an array (size, p)."""
        rows = np.zeros((self.size, len(row)))
        rows[self.rank] = row
        return self.all_sum(rows)

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in a process."""
        return bool(self.all_sum(np.array([float(flag)]))[0] > 0)
