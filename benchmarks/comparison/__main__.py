"""What the spectra of trainings tell: ``python -m benchmarks.comparison``.

Compares methods that are known to be conjugate, equal trainings, and networks on digits.  What is finished is kept in
the output folder and not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.comparison.report import report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("koopman_comparison"), help="folder of the recorded runs")
    parser.add_argument("--figure", type=Path, help="where distances are drawn (default: in the output folder)")
    options = parser.parse_args()
    told = []
    for text in report(options.output, options.figure or options.output / "comparison.png"):
        print(f"{text}\n", flush=True)
        told.append(text)
    (options.output / "report.md").write_text("\n\n".join(told) + "\n")


if __name__ == "__main__":
    main()
