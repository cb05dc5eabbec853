"""The output folder of one callback in one run."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytorch_lightning as pl

from lightning_koopman._checks import check_path
from lightning_koopman.parameters.sharded_modules import is_kind

HISTORY = "history.csv"
CLAIM = ".claimed"  # creating this file claims a folder
SUFFIX = ".ckpt"


class RunFolder:
    """A folder ``name`` in ``dirpath``, or ``name-v1``, ``name-v2``, … if earlier runs have claimed it.

    Runs that start at the same time get different folders: a folder is claimed by exclusive creation of a file in it.

    Args:
        dirpath: Parent folder (default: the folder of the run, as for Lightning's checkpoints).

    Raises:
        ValueError: If ``dirpath`` is not a local folder.
    """

    def __init__(self, dirpath: str | os.PathLike[str] | None) -> None:
        if dirpath is not None and not isinstance(dirpath, (str, os.PathLike)):
            raise ValueError(f"dirpath must be a folder or None, got {dirpath!r}.")
        if dirpath is not None:
            check_path("dirpath", dirpath)
        if dirpath is not None and "://" in os.fspath(dirpath):
            raise ValueError(
                f"dirpath must be a local folder, got {os.fspath(dirpath)!r}: snapshots are memory-mapped there."
            )
        if dirpath is not None and not Path(dirpath).is_absolute() and ".." in Path(dirpath).parts:
            raise ValueError(f"dirpath must not leave the working directory, got {os.fspath(dirpath)!r}: pass an "
                             "absolute path.")  # fmt: skip
        self.dirpath = None if dirpath is None else Path(dirpath).expanduser()
        self.path: Path | None = None
        self._base: Path | None = None

    def claim(self, trainer: pl.Trainer, name: str) -> None:
        """Claim a folder for this run, the same on all ranks; a further fit of the same run keeps it.

        Raises:
            ValueError: If no folder can be created there.
        """
        parent = self._parent(trainer)
        base = parent.absolute() / name
        path, problem = None, None
        if trainer.is_global_zero:
            # a search for a learning rate, for instance, has claimed it and written nothing
            held = [] if self.path is None or not self.path.is_dir() else [each.name for each in self.path.iterdir()]
            goes_on = (trainer.current_epoch > 0 or held == [CLAIM]) and base == self._base
            try:
                path = (self.path if goes_on else None) or _claim(base)
                path.mkdir(parents=True, exist_ok=True)  # it may have been deleted since an earlier fit
            except OSError as error:
                problem = error.strerror or str(error)
        self._base = base
        path, problem = trainer.strategy.broadcast((path, problem))
        if problem is not None:
            raise ValueError(f"dirpath={str(parent)!r} cannot be written ({problem}): pass another `dirpath`.")
        self.path = path

    def _parent(self, trainer: pl.Trainer) -> Path:
        if self.dirpath is not None:
            return self.dirpath
        logger = trainer.loggers[0] if trainer.loggers else None
        if logger is None or is_kind(logger, "TensorBoardLogger", "CSVLogger"):
            parent = str(trainer.log_dir or trainer.default_root_dir)
            return Path() if "://" in parent else Path(parent)  # a remote file cannot be memory-mapped
        if not trainer.is_global_zero:  # only the first process's loggers know their run
            return Path()
        # like ModelCheckpoint: the run's own folder inside one that runs share
        root, version = str(logger.save_dir or trainer.default_root_dir), logger.version
        own = version if isinstance(version, str) else f"version_{version}"
        return (Path() if "://" in root else Path(root)) / str(logger.name) / own

    def write_table(self, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, rewrite: bool = False) -> None:
        """Append rows to the history table, or write it from the start; NaN becomes an empty cell."""
        if self.path is None or not columns:
            return
        with open(self.path / HISTORY, "w" if rewrite else "a", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if rewrite:
                writer.writeheader()
            for row in rows:
                writer.writerow({key: "" if value != value else value for key, value in row.items()})

    def is_too_small(self, needed: int, *, in_memory: bool) -> float | None:
        """Return the free memory, or disk space, in bytes if it is less than ``needed``, else None."""
        if self.path is None:
            return None
        free = available_memory() if in_memory else shutil.disk_usage(self.path).free
        return None if free is None or needed <= free else free


def _claim(base: Path) -> Path:
    """Claim the first of ``name``, ``name-v1``, … that holds no file, and return it."""
    version = 0
    while True:
        path = base if version == 0 else base.with_name(f"{base.name}-v{version}")
        version += 1
        path.mkdir(parents=True, exist_ok=True)
        if any(each.is_file() for each in path.iterdir()):
            continue
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path / CLAIM, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return path


def checked_prefix(prefix: object) -> str:
    """Return the prefix of logged names and of the folder; raise ValueError if it is invalid."""
    if not isinstance(prefix, str) or not prefix.strip("/"):
        raise ValueError(f"prefix must not be empty, got {prefix!r}: logged names begin with it.")
    parts = {*PurePosixPath(prefix).parts, *PureWindowsPath(prefix).parts}
    if ".." in parts or "\0" in prefix or PurePosixPath(prefix).is_absolute() or PureWindowsPath(prefix).anchor:
        raise ValueError(f"prefix must not leave the run's folder, got {prefix!r}: a folder is named after it.")
    if "/dataloader_idx_" in prefix:
        raise ValueError(f"prefix must not contain '/dataloader_idx_', got {prefix!r}: Lightning reserves it.")
    return prefix.strip("/")


def checkpoints(trainer: pl.Trainer) -> list[Path]:
    """Return the local files and folders that are, or may be, checkpoints of this run."""
    found: set[Path] = set()
    for callback in trainer.checkpoint_callbacks:
        named = [getattr(callback, name, "") for name in ("last_model_path", "best_model_path")]
        known = [*named, *getattr(callback, "best_k_models", {})]
        paths = [Path(each) for each in known if each and "://" not in str(each)]
        folder = getattr(callback, "dirpath", None)
        folders = {path.parent for path in paths} | ({Path(folder)} if folder and "://" not in str(folder) else set())
        found.update(paths, *(each.glob(f"*{SUFFIX}") for each in folders if each.is_dir()))
    return sorted(path.absolute() for path in found)


def near(written: Path, ckpt_path: object) -> list[Path]:
    """Return folders that may hold a run's files: where they were written and, if moved, near its checkpoint."""
    found = [written]
    if isinstance(ckpt_path, (str, os.PathLike)):
        parents = list(Path(ckpt_path).absolute().parents)[:3]
        # also with one parent, for prefixes such as "koopman/head"
        found += [parent / Path(*written.parts[-depth:]) for parent in parents for depth in (1, 2)]
    return found


def available_memory() -> int | None:
    """Return the memory in bytes available without swapping, or None if the system does not report it."""
    known = []
    with contextlib.suppress(OSError, IndexError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        known += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        # a container's limit ("max" if none); its usage includes caches, so it is not subtracted
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(known) if known else None
