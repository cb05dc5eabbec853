"""Evidence for the depth estimate and HSVR: ``python -m benchmarks.depth``.

The paper's Table 1 in full, the error by depth, and HSVR with predicted depth against models whose parameters are
searched for, on the table's 16 functions and on two signals from photographs that scikit-learn brings.  Finished
searches are kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.depth import peers
from benchmarks.depth.table import draw_depths, print_speed, print_table
from lightning_koopman.demo.experiments.cache import missing
from lightning_koopman.demo.experiments.runner import cores, run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.depth", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("depth-runs"), help="folder of the recorded searches")
    parser.add_argument("--jobs", type=int, default=cores(), help="searches at a time")
    parser.add_argument("--figures", type=Path, help="where the figure goes (default: the output folder)")
    parser.add_argument("--only", choices=["table", "peers", "speed"], help="one part (default: all)")
    options = parser.parse_args()
    folder = options.output.absolute()
    if options.only in (None, "table"):
        print_table()
        draw_depths(options.figures or folder)
    if options.only in (None, "speed"):
        print_speed()
    if options.only in (None, "peers"):
        run_all(missing(peers.tasks(folder), folder), options.jobs)
        peers.report(folder)


if __name__ == "__main__":
    main()
