"""Results on disk, written as a whole or not at all, so that no partial result passes for a finished one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_koopman.demo.experiments.runner import Task

Arrays = dict[str, npt.NDArray[Any]]


def save(path: Path, **arrays: Any) -> None:
    """Write arrays to a file, and create its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    np.savez_compressed(partial, **arrays)
    partial.rename(path)


def read(path: Path) -> Arrays:
    """Read the arrays of a file."""
    with np.load(path) as stored:
        return {key: stored[key] for key in stored.files}


def once(path: Path, find: Callable[[], dict[str, Any]]) -> Arrays:
    """Return the arrays of a file, computing and saving them if it does not exist."""
    if not path.exists():
        save(path, **find())
    return read(path)


def missing(tasks: Iterable[Task], folder: Path) -> list[Task]:
    """Return the tasks whose results, files named after them, are not in the folder."""
    return [task for task in tasks if not (folder / f"{task.name}.npz").exists()]
