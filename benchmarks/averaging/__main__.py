"""How good averages of the weights are: ``python -m benchmarks.averaging``.

Trains six problems with several optimizers, rates and schedules, keeps the weights after each epoch, and judges their
averages on test data at every tenth of each training.  Rules were chosen on seed 0; the others are reported.  What is
finished is kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.averaging import compare, prune, record
from benchmarks.averaging.record import KNOWN, SETTINGS, UNSEEN
from benchmarks.averaging.report import report
from benchmarks.averaging.times import times
from benchmarks.reading.problems import PROBLEMS
from lightning_koopman.demo.experiments.cache import missing
from lightning_koopman.demo.experiments.runner import cores, run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.averaging", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_KOOPMAN_DATA"))
    parser.add_argument("--output", type=Path, default=Path("koopman_averaging"), help="folder of the recorded runs")
    parser.add_argument("--jobs", type=int, default=cores(), help="trainings at a time")
    parser.add_argument("--figure", type=Path, help="where curves are drawn (default: in the output folder)")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--seeds", nargs="+", type=int, choices=(*KNOWN, *UNSEEN), default=UNSEEN)
    parser.add_argument("--times", action="store_true", help="only measure what averaging takes of an epoch")
    options = parser.parse_args()
    if options.times:
        print(times())
        return
    folder, root = options.output, options.data_root
    chosen = [each for each in SETTINGS if each.problem in options.problems and each.seed in options.seeds]
    run_all(missing(record.tasks(chosen, root, folder), folder), options.jobs)
    run_all(missing(compare.tasks(chosen, root, folder), folder / "compared"), options.jobs)
    run_all(missing(prune.tasks(options.seeds, root, folder), folder / "pruned"), options.jobs)
    text = report(folder, tuple(options.seeds), options.figure or folder / "averages.png")
    print(text)
    (folder / "report.md").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
