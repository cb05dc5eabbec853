"""Time and memory of the spectrum against its peers, the streaming update against memory, the monitor's share."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

from benchmarks.trajectory import kept, monitor, spectrum, streaming
from lightning_koopman.demo.experiments.runner import cores
from lightning_koopman.demo.experiments.tables import markdown

PARTS = "spectrum", "streaming", "kept", "monitor"


def compare(found: dict[str, float], committed: dict[str, float]) -> str:
    """Return a table of ratios beside the committed ones; processors differ, so no difference is a failure."""
    rows = [[name, f"{committed[name]:.3g}", f"{value:.3g}"] for name, value in found.items() if name in committed]
    return "\n".join(markdown(("ratio", "committed", "now"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="run some of them (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each method (default: 3)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[65_558, 1_000_000], help="weights n")
    parser.add_argument("--snapshots", nargs="+", type=int, default=[50, 100], help="snapshots m")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_KOOPMAN_DATA"))
    parser.add_argument("--epochs", type=int, default=110, help="epochs of the monitored training (default: 110)")
    parser.add_argument("--ratios", type=Path, help="JSON file that the ratios are written to")
    parser.add_argument("--compare", type=Path, help="such a file, whose ratios are printed beside those found")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {cores()} cores, Python "
          f"{platform.python_version()}")  # fmt: skip
    found: dict[str, float] = {}
    if "spectrum" in options.only:
        found |= spectrum.run(options.sizes, options.snapshots, options.rounds)
    if "streaming" in options.only:
        found |= streaming.run(options.sizes, options.snapshots)
    if "kept" in options.only:
        found |= kept.run()
    if "monitor" in options.only:
        found |= monitor.run(options.data_root, options.epochs)
    if options.ratios is not None:
        options.ratios.write_text(
            json.dumps({name: float(f"{each:.4g}") for name, each in found.items()}, indent=1) + "\n"
        )
    if options.compare is not None:
        print(f"\n{compare(found, json.loads(options.compare.read_text()))}")


if __name__ == "__main__":
    main()
