"""Keep small linear algebra on the calling thread."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

from threadpoolctl import ThreadpoolController


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looks through the loaded libraries: milliseconds, so once


def single_blas_thread() -> AbstractContextManager[object]:
    """Context in which NumPy's and SciPy's BLAS use one thread.

    PyTorch's own workers spin for a while after each operation; where they fill the cores, BLAS threads that wait for
    one another make a matrix of 100 × 100 take 100 ms instead of 4.
    """
    limited: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return limited
