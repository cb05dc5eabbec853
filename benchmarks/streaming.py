"""The streaming update against the machine's memory: its bandwidth as a ratio to that of reading the same rows once.

The limit is a sum over the rows with as many threads, the fastest way to read them.  The update reads each row once and
multiplies it with two vectors, in float64.  Then how its time grows with the weights n and the snapshots m, beside the
time of the spectrum, which does not depend on n.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from lightning_koopman.trajectory._compiled import kernel
from lightning_koopman.trajectory.border import border_products
from tqdm import tqdm

from lightning_koopman import Trajectory
from lightning_koopman.trajectory import border

ROUNDS = 7


def seconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def without_compiler(call: Callable[[], object]) -> Callable[[], object]:
    """The same call as on a machine without a compiler."""

    def run() -> object:
        before, border.kernel = border.kernel, lambda: None
        try:
            return call()
        finally:
            border.kernel = before

    return run


def run(sizes: list[int], counts: list[int]) -> None:
    """Print the tables."""
    print(f"\nStreaming update, {torch.get_num_threads()} threads (median of {ROUNDS}); limit: reading the rows once")
    print(f"{'n':>9} {'m':>4}  {'way':<22} {'ms':>8} {'GB/s':>7} {'of the limit':>13}")
    for n in sizes:
        for m in counts:
            rows = torch.randn(m, n)
            half = rows.bfloat16()
            limit = rows.numel() * 4 / seconds(rows.sum)
            base = rows[0].clone()
            ways: list[tuple[str, Callable[[], object], int]] = [
                ("float32, NumPy", without_compiler(lambda rows=rows: border_products([rows])), 4),
                ("bfloat16, NumPy", without_compiler(lambda h=half, b=base: border_products([h], base=b)), 2),
            ]
            if kernel() is not None:
                ways[:0] = [
                    ("float32, compiled", lambda rows=rows: border_products([rows]), 4),
                    ("bfloat16, compiled", lambda h=half, b=base: border_products([h], base=b), 2),
                ]
            print(f"{n:>9} {m:>4}  {'reading once':<22} {1e3 * rows.numel() * 4 / limit:>8.1f} {limit / 1e9:>7.1f}")
            for name, call, width in tqdm(ways, leave=False):
                spent = seconds(call)
                rate = rows.numel() * width / spent
                print(
                    f"{'':>9} {'':>4}  {name:<22} {1e3 * spent:>8.1f} {rate / 1e9:>7.1f} {rate / limit:>12.0%}",
                    flush=True,
                )
    growth()


def growth() -> None:
    """Print how the cost of a snapshot grows."""
    print("\nOne more snapshot in a full window, and its spectrum (milliseconds)")
    print(f"{'n':>9} {'m':>4} {'append':>9} {'per number':>12} {'spectrum':>9}")
    for n in (10**5, 10**6, 10**7):
        for m in (25, 50, 100):
            trajectory, row = Trajectory(n, capacity=m), torch.randn(n)
            for _ in range(m + 1):
                trajectory.append(row.add_(torch.randn(()), alpha=0.1).mul_(0.99))
            append = seconds(lambda t=trajectory, row=row: t.append(row), 5)
            spectrum = seconds(trajectory.spectrum, 5)
            print(
                f"{n:>9} {m:>4} {1e3 * append:>9.2f} {1e9 * append / n / m:>9.3f} ns {1e3 * spectrum:>9.2f}", flush=True
            )
