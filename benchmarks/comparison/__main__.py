"""What the spectra of trainings tell: ``python -m benchmarks.comparison``.

Compares methods that are known to be conjugate, equal trainings, networks on digits, and modular addition that
generalizes late.  What is finished is kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.comparison.report import GROUP, report
from benchmarks.comparison.runs import additions
from lightning_koopman.demo.experiments.cache import missing
from lightning_koopman.demo.experiments.runner import cores, run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("koopman_comparison"), help="folder of the recorded runs")
    parser.add_argument("--jobs", type=int, default=cores(), help="trainings at a time")
    parser.add_argument("--figure", type=Path, help="where distances are drawn (default: in the output folder)")
    options = parser.parse_args()
    folder, seeds = options.output, range(1, GROUP + 1)  # seed 0 served to choose the sizes of modular addition
    run_all(missing(additions(seeds, folder), folder), options.jobs)
    told = []
    for text in report(folder, seeds, options.figure or folder / "comparison.png"):
        print(f"{text}\n", flush=True)
        told.append(text)
    (folder / "report.md").write_text("\n\n".join(told) + "\n")


if __name__ == "__main__":
    main()
