from __future__ import annotations

import threading

from threadpoolctl import threadpool_info

from lightning_koopman.dmd.blas import single_blas_thread


def blas() -> list[int]:
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


def test_threads_that_overlap_leave_the_limit_as_it_was():
    before, entered, leave = blas(), threading.Event(), threading.Event()

    def work() -> None:
        with single_blas_thread():
            entered.set()
            leave.wait()

    worker = threading.Thread(target=work)
    worker.start()
    entered.wait()
    with single_blas_thread():
        leave.set()
        worker.join()
        assert set(blas()) == {1}  # this thread is still inside
    assert blas() == before


def test_it_can_be_nested():
    before = blas()
    with single_blas_thread(), single_blas_thread():
        assert set(blas()) == {1}
    assert blas() == before
