"""Evidence for the pruner: ``python -m benchmarks.pruning``.

The paper's CNN on 10,000 images of MNIST, He and Xavier weights, three seeds, is trained for 130 epochs.  From its
checkpoints after 50 and 100 epochs it goes on for 30 more, pruned to 75 % and to 90 % by each method, with the
optimizer's state as it was (Figures 3–6 of the paper); from the one after 50 epochs also with whole channels removed.
Then the times of an epoch and of inference are measured.  Finished runs are kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.pruning import report, times
from benchmarks.pruning.methods import CASES, SEEDS
from benchmarks.pruning.record import tasks
from lightning_koopman.demo.experiments.cache import missing
from lightning_koopman.demo.experiments.runner import cores, run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_KOOPMAN_DATA"))
    parser.add_argument("--output", type=Path, default=Path("pruning-runs"), help="folder of the recorded runs")
    parser.add_argument("--jobs", type=int, default=cores(), help="trainings at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), choices=SEEDS)
    parser.add_argument("--threads", type=int, default=2, help="threads of the timed runs (default: 2)")
    parser.add_argument("--figures", type=Path, help="where figures and table go (default: the output folder)")
    options = parser.parse_args()
    cases, folder = [case for case in CASES if case.seed in options.seeds], options.output.absolute()
    run_all(missing(tasks(cases, options.data_root, folder), folder), options.jobs)
    report.write(cases, folder, options.figures or folder)
    times.run(options.data_root, options.threads)


if __name__ == "__main__":
    main()
