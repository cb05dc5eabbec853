"""Random draws that can be repeated and leave the run's own alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Context in which PyTorch, NumPy and Python draw what the seed says; their states are restored afterwards.

    Args:
        seed: Of all three.
        devices: Whose generators are seeded beside the processor's; only CUDA has others.
    """
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002  # what users' code draws from
    try:
        with torch.random.fork_rng({device for device in devices if device.type == "cuda"}):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)
