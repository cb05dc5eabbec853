"""A whole spectrum by each method on the same snapshots: seconds, and peak memory beyond the method's own input.

Ours reads the float32 snapshots as they were recorded.  The peers need float64, time last; that copy is made for them
beforehand and counts neither in their time nor in their memory.  Each method runs in its own processes, in turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).parents[2] / "tests"
METHODS = ("ours", "streaming", "numpy QR", "LAPACK dgedmdq", "PyDMD DMD")


def make_snapshots(path: Path, n: int, m: int) -> None:
    """Write float32 snapshots (m, n) like a training's: slow decay in a few directions, and a slowing random walk."""
    rng = np.random.default_rng(0)
    state = 0.05 * rng.standard_normal(n, dtype=np.float32)
    directions = rng.standard_normal((4, n), dtype=np.float32)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(m, n))
    for t in range(m):
        pull = (np.array([0.97, 0.9, 0.8, 0.5], dtype=np.float32) ** t) @ directions
        state = state + np.float32(0.003 / (1 + 0.1 * t)) * rng.standard_normal(n, dtype=np.float32)
        out[t] = state + np.float32(0.02) * pull
    out.flush()


def prepare(method: str, snapshots: np.ndarray) -> Callable[[], Any]:
    """Return the call to be timed."""
    from lightning_koopman import Trajectory, dmd_rrr

    if method == "ours":
        return lambda: dmd_rrr(snapshots)
    if method == "streaming":  # the work of the last epoch: append one snapshot and take the spectrum
        trajectory = Trajectory(snapshots.shape[1], capacity=snapshots.shape[0])
        for row in snapshots:
            trajectory.append(row)

        def epoch() -> Any:
            trajectory.append(snapshots[-1] * np.float32(1.001))
            return trajectory.spectrum()

        return epoch
    wide = np.asfortranarray(snapshots.T, dtype=np.float64)
    if method == "numpy QR":
        return lambda: np.linalg.qr(wide, mode="r")
    if method == "LAPACK dgedmdq":
        sys.path.insert(0, str(TESTS))
        from oracles import dgedmdq

        return lambda: dgedmdq(wide.T)
    from pydmd import DMD

    rank = dmd_rrr(snapshots, refine=False).rank
    return lambda: DMD(svd_rank=rank).fit(wide)


def memory(field: str) -> float:
    """Return a field of this process's memory in MiB: VmRSS (now) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {field} in /proc/self/status")


def worker(method: str, path: str) -> None:
    """Run one method once (after a small warm-up) and print its seconds and extra MiB."""
    snapshots = np.load(path)
    prepare(method, snapshots[:, :32768].copy())()
    call = prepare(method, snapshots)
    if method in ("numpy QR", "LAPACK dgedmdq", "PyDMD DMD"):
        del snapshots
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    started = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - started
    extra = memory("VmHWM") - before
    del result
    print(json.dumps({"seconds": seconds, "extra": extra}))


def run(sizes: list[int], counts: list[int], rounds: int) -> dict[str, float]:
    """Print the table for all sizes, and return its ratios."""
    ratios = {}
    print("\nOne spectrum, all methods on the same snapshots (median of rounds; extra memory beyond the input)")
    print(
        f"{'n':>9} {'m':>4}  {'method':<15} {'seconds':>8} {'÷ ours':>7} {'extra MiB':>10} {'÷ float32 snapshots':>20}"
    )
    for n in sizes:
        for m in counts:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "snapshots.npy"
                make_snapshots(path, n, m)
                measured: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
                for turn in range(rounds):
                    for method in METHODS:
                        print(
                            f"\r  n = {n}, m = {m}, round {turn + 1} of {rounds}: {method:<20}", end="", file=sys.stderr
                        )
                        command = [
                            sys.executable,
                            "-W",
                            "ignore",
                            "-m",
                            "benchmarks.trajectory.spectrum",
                            method,
                            str(path),
                        ]
                        done = subprocess.run(command, capture_output=True, text=True, check=True)
                        measured[method].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"\r{'':<70}\r", end="", file=sys.stderr)
            seconds = {k: statistics.median(one["seconds"] for one in v) for k, v in measured.items()}
            for method, results in measured.items():
                extra = statistics.median(one["extra"] for one in results)
                size = f"{n:,} weights, {m} snapshots"
                if method != "ours":
                    ratios[f"{size}: seconds of {method} / ours"] = seconds[method] / seconds["ours"]
                ratios[f"{size}: extra memory of {method} / snapshots"] = extra / (4 * n * m / 2**20)
                print(
                    f"{n:>9} {m:>4}  {method:<15} {seconds[method]:>8.3f} {seconds[method] / seconds['ours']:>7.2f} "
                    f"{extra:>10.1f} {extra / (4 * n * m / 2**20):>19.1%}",
                    flush=True,
                )
    return ratios


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2])
