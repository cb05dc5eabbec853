"""Tables: CSV files, Markdown, and means with their errors."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write a table; floats with six digits."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{each:.6g}" if isinstance(each, float) else each for each in row])
    return path


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """A Markdown table; all columns but the first ``left`` are numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("|" + "".join(f" {each}".rstrip() + " |" for each in row) for row in (header, rule, *rows))


def mean_and_error(values: npt.ArrayLike) -> tuple[float, float]:
    """Mean, and its standard error: 0 for a single value."""
    found = np.asarray(values, dtype=np.float64)
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(found.size)) if found.size > 1 else 0.0
