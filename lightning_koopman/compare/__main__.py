"""Compare finished runs: ``python -m lightning_koopman.compare RUN RUN … [--with RUN RUN …]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_koopman.compare.comparison import compare_trainings
from lightning_koopman.compare.figure import plot_comparison


def main(arguments: list[str] | None = None) -> None:
    """Print the distances and the verdict; exit with status 2 if the runs cannot be compared."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_koopman.compare",
        description="Compare trainings by their Koopman spectra. A RUN is a folder written by KoopmanSpectrumMonitor. "
        "Each run is a group of its own; with --with, the runs before it form one group and those after it another.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--with", dest="others", nargs="+", type=Path, metavar="RUN", default=[], help="second group")
    parser.add_argument("--figure", type=Path, help="image file for a plot of the distances")
    options = parser.parse_args(arguments)
    try:
        found = compare_trainings(*([options.runs, options.others] if options.others else options.runs))
        if options.figure is not None:
            plot_comparison(found).savefig(options.figure, dpi=150)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for group, run in zip(found.groups, [*options.runs, *options.others], strict=True):
        print(f"{group}  {run}")
    for by, matrix in found.distances.items():
        print(f"\ndistances of the {by}:", *("  ".join(f"{value:.4f}" for value in row) for row in matrix), sep="\n")
    print(f"\n{found}")


if __name__ == "__main__":
    main()
