"""How good averages of the weights are: ``python -m benchmarks.averaging``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.averaging.record import SETTINGS, tasks
from benchmarks.reading.problems import PROBLEMS
from lightning_koopman.demo.experiments.cache import missing
from lightning_koopman.demo.experiments.runner import cores, run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.averaging", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_KOOPMAN_DATA"))
    parser.add_argument("--output", type=Path, default=Path("koopman_averaging"), help="folder of the recorded runs")
    parser.add_argument("--jobs", type=int, default=cores(), help="trainings at a time")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    options = parser.parse_args()
    chosen = [each for each in SETTINGS if each.problem in options.problems and each.seed in options.seeds]
    run_all(missing(tasks(chosen, options.data_root, options.output), options.output), options.jobs)


if __name__ == "__main__":
    main()
