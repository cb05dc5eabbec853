"""Keep small linear algebra on the calling thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

_lock = threading.Lock()
_inside: list[AbstractContextManager[object]] = []  # the limit in force, once per context that is open


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # searches the loaded libraries, which takes milliseconds: once only


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Context in which NumPy's and SciPy's BLAS use one thread.

    PyTorch's workers spin for a while after each operation.  If they fill the cores, BLAS threads wait for one another,
    and a 100 × 100 matrix takes 100 ms instead of 4.  The limit applies to the whole process: the first thread that
    enters sets it, and the last that leaves lifts it.
    """
    with _lock:
        if not _inside:
            limited: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
            limited.__enter__()
            _inside.append(limited)
        else:
            _inside.append(_inside[0])
    try:
        yield
    finally:
        with _lock:
            limit = _inside.pop()
            if not _inside:
                limit.__exit__(None, None, None)
