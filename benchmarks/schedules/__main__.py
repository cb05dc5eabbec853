"""Learning rates that fall by themselves: ``python -m benchmarks.schedules``.

Trains six problems at three rates with each way to set the learning rate and to end a training: koopman_autopilot,
the same without falls, a constant rate, schedules with a known end, and a rule on the validation loss.
What is finished is kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.schedules.record import CEILINGS, SEEDS, settings, tasks
from benchmarks.schedules.report import report
from lightning_koopman.demo.experiments.cache import missing
from lightning_koopman.demo.experiments.runner import cores, run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_KOOPMAN_DATA"))
    parser.add_argument("--output", type=Path, default=Path("koopman_schedules"), help="folder of the recorded runs")
    parser.add_argument("--jobs", type=int, default=cores(), help="trainings at a time")
    parser.add_argument("--figure", type=Path, help="where curves are drawn (default: in the output folder)")
    parser.add_argument("--problems", nargs="+", choices=list(CEILINGS), default=list(CEILINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS[:1])
    options = parser.parse_args()
    chosen = [each for seed in options.seeds for problem in options.problems for each in settings(problem, seed)]
    run_all(missing(tasks(chosen, options.data_root, options.output), options.output), options.jobs)
    text = report(options.output, chosen, options.figure or options.output / "schedules.png")
    print(text)
    (options.output / "report.md").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
