"""Evidence for the Sobolev losses: ``python -m benchmarks.sobolev``.

Three noisy signals are learned by a network of nine hidden layers with 20 neurons: the chirp of the paper (section 6,
Figure 5), Donoho's Doppler signal, and two functions of two inputs.  Five seeds each draw samples, noise and weights;
75 % of the samples train, 25 % are used for nothing but early stopping and the choice of a weight decay, which favours
those two baselines.  The score is the RMSE against the clean signal on a fine grid.  Everything that could be chosen
was chosen on the chirp with the seeds 100 to 103, which are not reported.  Finished runs are kept in the output folder
and not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.sobolev import peers, report, times
from benchmarks.sobolev.runs import SEEDS, tasks
from lightning_koopman.demo.experiments.cache import missing
from lightning_koopman.demo.experiments.runner import cores, run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sobolev", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("sobolev-runs"), help="folder of the recorded runs")
    parser.add_argument("--jobs", type=int, default=cores(), help="trainings at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), choices=SEEDS)
    parser.add_argument("--threads", type=int, default=1, help="threads of the timed steps (default: 1)")
    parser.add_argument("--figures", type=Path, help="where figures and table go (default: the output folder)")
    options = parser.parse_args()
    folder, seeds = options.output.absolute(), tuple(options.seeds)
    run_all(missing(tasks(seeds, folder) + peers.tasks(seeds, folder), folder), options.jobs)
    report.write(folder, seeds, options.figures or folder)
    times.run(options.threads)


if __name__ == "__main__":
    main()
