"""Tables: CSV files, Markdown, and means with standard errors."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write a table as CSV, with floats of six digits."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{each:.6g}" if isinstance(each, float) else each for each in row])
    return path


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]], left: Collection[int] = (0,)) -> Iterator[str]:
    """Yield the lines of a Markdown table; all columns but those of the indices ``left`` are right-aligned."""
    rule = ["---" if index in left else "---:" for index in range(len(header))]
    for row in itertools.chain((header, rule), rows):
        yield "|" + "".join(f" {each} |" if each != "" else " |" for each in row)


def show(header: Sequence[str], rows: Iterable[Sequence[Any]], left: Collection[int] = (0,)) -> None:
    """Print such a table, each row as soon as it is known."""
    for line in markdown(header, rows, left):
        print(line, flush=True)


def mean_and_error(values: npt.ArrayLike) -> tuple[float, float]:
    """Return the mean and its standard error, which is 0 for a single value."""
    found = np.asarray(values, dtype=np.float64)
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(found.size)) if found.size > 1 else 0.0
