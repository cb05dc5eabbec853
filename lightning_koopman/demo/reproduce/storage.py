"""Results on disk: whole or not at all, so that a run that was cut off is not taken for a finished one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]


def save(path: Path, **arrays: Any) -> None:
    """Write arrays."""
    partial = path.with_name(f".{path.name}")
    np.savez_compressed(partial, **arrays)
    partial.rename(path)


def read(path: Path) -> Arrays:
    """Read them."""
    with np.load(path) as stored:
        return {key: stored[key] for key in stored.files}
