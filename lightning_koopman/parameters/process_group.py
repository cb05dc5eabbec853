"""The processes of a run, as far as the analysis needs them: small sums, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_koopman._types import Array


class ProcessLostError(RuntimeError):
    """Another process does not answer: this one cannot go on either."""


@dataclass(frozen=True)
class Processes:
    """This process among all that train one network.

    They talk over connections of their own, from CPU to CPU, so that nothing of theirs gets between the collectives of
    the training, whatever thread it comes from.

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

    def twin(self) -> Processes:
        """The same processes over other connections, for another thread."""
        return self if self.size == 1 else self.of_run()

    def all_sum(self, values: Array) -> Array:
        """Sum of a float64 array over the processes; the same numbers in each of them."""
        if self.size == 1:
            return values
        return self.add_up(torch.from_numpy(np.array(values, dtype=np.float64))).numpy()

    def add_up(self, values: Tensor, group: Any = None) -> Tensor:
        """Sum of a CPU tensor, which is overwritten, over the processes or those of a group.

        Raises:
            ProcessLostError: If one of them has ended.
        """
        if self.size == 1:
            return values
        try:
            dist.all_reduce(values, group=group or self.group)
        except RuntimeError as error:
            raise ProcessLostError(f"process {self.rank} of {self.size} could not reach the others: {error}") from error
        return values

    def table(self, row: Array) -> Array:
        """What every process has in a row (p,), as an array (size, p)."""
        rows = np.zeros((self.size, len(row)))
        rows[self.rank] = row
        return self.all_sum(rows)

    def all_agree(self, flag: bool) -> bool:
        """Whether a flag is set in every process."""
        return bool(self.all_sum(np.array([float(not flag)]))[0] == 0)
