"""The trajectory against an earlier commit, in one run: ``python -m benchmarks.trajectory.before``.

Checks out that commit into a temporary worktree.  Both versions append a snapshot to a full window and take its
spectrum, in processes of their own and in turns; the earlier one in each of the ways it has (with and without its
compiled kernel).  Then the eigenvalues of both are compared with those of a float64 Householder QR of the recorded
weights, on real trainings on both sides of 524,288 weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
COMMIT = "0a014fe"  # the last commit with a compiled kernel
WAYS = {"now": {}, "before, compiled": {}, "before, NumPy": {"LIGHTNING_KOOPMAN_COMPILE": "0"}}
ROUNDS = 5
TRAININGS = ("CNN, digits", "digits", None), ("CNN, MNIST", "mnist", None), ("wide, digits", "digits", 800)


def worker(n: int, m: int, rounds: int) -> None:
    """Time append and spectrum of a full window, and print both medians in seconds."""
    from lightning_koopman import Trajectory

    random = torch.Generator().manual_seed(0)
    state, step = torch.randn(n, generator=random) * 0.05, torch.randn(n, generator=random) * 1e-3
    trajectory = Trajectory(n, capacity=m)
    for _ in range(m + 1):
        state += step.roll(1)
        step.mul_(0.97).add_(torch.randn(n, generator=random), alpha=1e-4)
        trajectory.append(state)
    appended, decomposed = [], []
    for _ in range(rounds + 1):
        state += step
        started = time.perf_counter()
        trajectory.append(state)
        between = time.perf_counter()
        trajectory.spectrum()
        appended.append(between - started)
        decomposed.append(time.perf_counter() - between)
    print(json.dumps([statistics.median(appended[1:]), statistics.median(decomposed[1:])]))


def eigenvalues(path: str) -> None:
    """Append the snapshots in a file one by one, and print the plain Ritz values."""
    from lightning_koopman import Trajectory

    snapshots = torch.from_numpy(np.load(path))
    trajectory = Trajectory(snapshots.shape[1], capacity=len(snapshots) - 5)  # some have left the window
    for snapshot in snapshots:
        trajectory.append(snapshot)
    found = trajectory.spectrum(refine=False).eigenvalues
    print(json.dumps([[value.real, value.imag] for value in found]))


def run(code: str, folder: Path, environment: dict[str, str]) -> list[list[float]]:
    """Run a worker with the package in a folder, and return what it prints."""
    given = {**os.environ, **environment, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-W", "ignore", __file__, *code.split()]
    done = subprocess.run(command, env=given, cwd=folder, capture_output=True, text=True, check=True)
    found: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Check out the earlier version into a temporary worktree."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(folder), commit], check=True, capture_output=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def compare_times(folders: dict[str, Path], sizes: list[int], counts: list[int], turns: int) -> None:
    """Print the table of times."""
    print(
        f"\nAppend to a full window, and its spectrum, {torch.get_num_threads()} threads: median of {turns} turns (ms)"
    )
    print(f"{'n':>9} {'m':>4}  {'way':<17} {'append':>8} {'spectrum':>9} {'both':>8} {'÷ the fastest before':>21}")
    for n in sizes:
        for m in counts:
            times: dict[str, list[tuple[float, float]]] = {way: [] for way in folders}
            for turn in range(turns):
                for way, folder in folders.items():
                    print(
                        f"\r  {n} weights, {m} snapshots, turn {turn + 1} of {turns}: {way:<20}",
                        end="",
                        file=sys.stderr,
                    )
                    append, spectrum = run(f"time {n} {m} {ROUNDS}", folder, WAYS[way])
                    times[way].append((append, spectrum))
            print(f"\r{'':<78}\r", end="", file=sys.stderr)
            both = {way: statistics.median(a + s for a, s in each) for way, each in times.items()}
            fastest = min(value for way, value in both.items() if way != "now")
            for way, each in times.items():
                append, spectrum = (1e3 * statistics.median(column) for column in zip(*each, strict=True))
                print(f"{n:>9} {m:>4}  {way:<17} {append:>8.2f} {spectrum:>9.2f} {1e3 * both[way]:>8.2f} "
                      f"{both[way] / fastest:>21.2f}", flush=True)  # fmt: skip


def record(data: str, root: Path | None, width: int | None, epochs: int) -> np.ndarray:
    """Record the weights of a real training: the paper's CNN, or a wide network of more than 524,288 weights."""
    sys.path.insert(0, str(ROOT / "tests"))
    from problems import record as record_cnn

    from lightning_koopman.demo.data import load

    images = load(data, root=root, n_train=640)
    if width is None:
        return record_cnn(images, epochs)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(784, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    rows = [torch.nn.utils.parameters_to_vector(network.parameters()).detach().numpy().copy()]
    for _ in range(epochs):
        for inputs, labels in torch.utils.data.DataLoader(images.train, batch_size=64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(inputs), labels).backward()
            optimizer.step()
        rows.append(torch.nn.utils.parameters_to_vector(network.parameters()).detach().numpy().copy())
    return np.stack(rows)


def compare_accuracy(folders: dict[str, Path], root: Path | None, epochs: int) -> None:
    """Print the table of errors."""
    from lightning_koopman.dmd.rrr import decompose

    print("\nLargest distance of an eigenvalue from those of a float64 Householder QR of the recorded weights")
    print(f"{'training':<22} {'n':>9} {'m':>4} {'rank':>5} " + " ".join(f"{way:>17}" for way in folders))
    for name, data, width in (
        ("CNN, digits", "digits", None),
        ("CNN, MNIST", "mnist", None),
        ("wide, digits", "digits", 800),
    ):
        if data == "mnist" and root is None:
            continue
        snapshots = record(data, root, width, epochs)
        kept = snapshots[5:].astype(np.float64)
        exact = decompose(np.linalg.qr(kept.T, mode="r"), refine=False)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "snapshots.npy"
            np.save(path, snapshots)
            errors = []
            for way, folder in folders.items():
                found = np.array(run(f"eigenvalues {path}", folder, WAYS[way])) @ np.array([1, 1j])
                same = len(found) == exact.rank
                far = np.abs(found[:, None] - exact.eigenvalues).min(axis=1).max() if same else np.nan
                errors.append(f"{far:>17.1e}")
        print(f"{name:<22} {snapshots.shape[1]:>9} {len(kept):>4} {exact.rank:>5} " + " ".join(errors), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trajectory.before", description=__doc__)
    parser.add_argument("--commit", default=COMMIT)
    parser.add_argument("--sizes", nargs="+", type=int, default=[65_558, 1_000_000, 10_000_000], help="weights n")
    parser.add_argument("--snapshots", nargs="+", type=int, default=[50, 100], help="snapshots m")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100, help="of the trainings whose eigenvalues are compared")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_KOOPMAN_DATA"))
    options = parser.parse_args()
    with checkout(options.commit) as before:
        folders = {way: ROOT if way == "now" else before for way in WAYS}
        compare_accuracy(folders, options.data_root, options.epochs)
        compare_times(folders, options.sizes, options.snapshots, options.turns)


if __name__ == "__main__":
    if sys.argv[1:2] == ["time"]:
        worker(*map(int, sys.argv[2:]))
    elif sys.argv[1:2] == ["eigenvalues"]:
        eigenvalues(sys.argv[2])
    else:
        main()
