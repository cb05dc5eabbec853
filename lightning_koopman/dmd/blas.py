"""Keep small linear algebra on the calling thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

_lock = threading.Lock()
_inside: list[AbstractContextManager[object]] = []  # the limit that is set, once for each that is within it


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looks through the loaded libraries: milliseconds, so once


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Context in which NumPy's and SciPy's BLAS use one thread.

    PyTorch's own workers spin for a while after each operation; where they fill the cores, BLAS threads that wait for
    one another make a matrix of 100 × 100 take 100 ms instead of 4.  The limit is the whole process's: the first thread
    to come sets it and the last to go lifts it.
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
