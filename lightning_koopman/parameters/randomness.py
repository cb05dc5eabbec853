"""Reproducible random draws that do not change the run's random state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Context in which PyTorch, NumPy and Python are seeded; their random states are restored afterwards.

    Args:
        seed: Seed of all three.
        devices: Devices whose generators are restored besides the CPU's; only CUDA devices matter.
    """
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002  # users' code draws from these
    try:
        with torch.random.fork_rng({device for device in devices if device.type == "cuda"}):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)
