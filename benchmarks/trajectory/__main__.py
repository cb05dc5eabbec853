"""Time and memory of the spectrum against its peers, the streaming update against memory, the monitor's share."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

from benchmarks.trajectory import kept, monitor, spectrum, streaming
from lightning_koopman.demo.experiments.runner import cores


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", choices=["spectrum", "streaming", "kept", "monitor"], help="run one of them (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each method (default: 3)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[65_558, 1_000_000], help="weights n")
    parser.add_argument("--snapshots", nargs="+", type=int, default=[50, 100], help="snapshots m")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_KOOPMAN_DATA"))
    parser.add_argument("--epochs", type=int, default=110, help="epochs of the monitored training (default: 110)")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {cores()} cores, Python "
          f"{platform.python_version()}")  # fmt: skip
    if options.only in (None, "spectrum"):
        spectrum.run(options.sizes, options.snapshots, options.rounds)
    if options.only in (None, "streaming"):
        streaming.run(options.sizes, options.snapshots)
    if options.only in (None, "kept"):
        kept.run()
    if options.only in (None, "monitor"):
        monitor.run(options.data_root, options.epochs)


if __name__ == "__main__":
    main()
