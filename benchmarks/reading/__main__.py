"""What the reading says, and what then happened: ``python -m benchmarks.reading``.

Trains six problems with several optimizers, rates and schedules, and labels each epoch by whether the loss of an
average of the weights is lower ten epochs later at that rate.  Thresholds are chosen on the runs with seed 0 and
reported on those with seeds 1 and 2.  Finished runs are kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.reading.problems import PROBLEMS, SETTINGS
from benchmarks.reading.record import tasks
from benchmarks.reading.report import report
from benchmarks.reading.synthetic import table
from lightning_koopman.demo.experiments.cache import missing
from lightning_koopman.demo.experiments.runner import cores, run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_KOOPMAN_DATA"))
    parser.add_argument("--output", type=Path, default=Path("koopman_reading"), help="folder of the recorded runs")
    parser.add_argument("--jobs", type=int, default=cores(), help="trainings at a time")
    parser.add_argument("--synthetic", type=int, default=200, help="trajectories of each kind with a known phase")
    parser.add_argument("--figure", type=Path, help="where the phases are drawn (default: in the output folder)")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    options = parser.parse_args()
    chosen = [each for each in SETTINGS if each.problem in options.problems]
    known = table(seed=1, count=options.synthetic)  # thresholds were chosen on seed 0
    print(known, flush=True)
    run_all(missing(tasks(chosen, options.data_root, options.output), options.output), options.jobs)
    text = report(options.output, options.figure or options.output / "phases.png")
    print(f"\n{text}")
    (options.output / "report.md").write_text(f"{known}\n\n{text}\n")


if __name__ == "__main__":
    main()
