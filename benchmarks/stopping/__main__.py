"""Evidence for the stop and the restart: ``python -m benchmarks.stopping``.

Trains every combination of problem, initialization, optimizer and seed to the end, with the callbacks only reporting;
then replays the stop rules on what was recorded.  Thresholds are chosen on the runs with seeds 0 and 1 and reported on
those with seeds 2 and 3.  Finished runs are kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.stopping.record import CASES, PROBLEMS, tasks
from benchmarks.stopping.report import report
from lightning_koopman.demo.experiments.cache import missing
from lightning_koopman.demo.experiments.runner import cores, run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stopping", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_KOOPMAN_DATA"))
    parser.add_argument("--output", type=Path, default=Path("koopman_stopping"), help="folder of the recorded runs")
    parser.add_argument("--jobs", type=int, default=cores(), help="trainings at a time")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--figure", type=Path, help="where the curve is drawn (default: in the output folder)")
    options = parser.parse_args()
    cases = [case for case in CASES if case.problem in options.problems]
    if options.data_root is None and "mnist" in options.problems:
        print("MNIST is left out: LIGHTNING_KOOPMAN_DATA or --data-root names the folder that holds MNIST/.")
        cases = [case for case in cases if case.problem != "mnist"]
    run_all(missing(tasks(cases, options.data_root, options.output), options.output), options.jobs)
    text = report(options.output, options.figure or options.output / "stopping.png")
    (options.output / "report.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
