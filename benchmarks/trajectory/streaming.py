"""Bandwidth of the streaming update relative to reading the same rows once.

The limit is a sum over the rows with as many threads, the fastest way to read them.  The update reads each increment
once and multiplies it with the newest one.  A second table shows how its time grows with the weights n and the
snapshots m, beside the time of the spectrum, which does not depend on n.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from lightning_koopman import Trajectory
from lightning_koopman.dmd.gram import row_products

ROUNDS = 7


def seconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median time of a call, after one warm-up call."""
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def run(sizes: list[int], counts: list[int]) -> dict[str, float]:
    """Print the tables, and return the share of the memory's bandwidth that the update reaches."""
    ratios = {}
    print(f"\nStreaming update, {torch.get_num_threads()} threads (median of {ROUNDS}); limit: reading the rows once")
    print(f"{'n':>9} {'m':>4}  {'way':<22} {'ms':>8} {'GB/s':>7} {'of the limit':>13}")
    for n in sizes:
        for m in counts:
            rows = torch.randn(m, n)
            newest = torch.randn(n)
            limit = rows.nbytes / seconds(rows.sum)
            print(f"{n:>9} {m:>4}  {'reading once':<22} {1e3 * rows.nbytes / limit:>8.1f} {limit / 1e9:>7.1f}")
            ways = [("float32", rows, newest), ("bfloat16", rows.bfloat16(), newest.bfloat16())]
            for name, kept, row in tqdm(ways, leave=False):
                spent = seconds(lambda kept=kept, row=row: row_products([kept], row))
                rate = kept.nbytes / spent
                ratios[f"{n:,} weights, {m} snapshots in {name}: update's bandwidth / memory's"] = rate / limit
                print(
                    f"{'':>9} {'':>4}  {name:<22} {1e3 * spent:>8.1f} {rate / 1e9:>7.1f} {rate / limit:>12.0%}",
                    flush=True,
                )
    growth()
    return ratios


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
