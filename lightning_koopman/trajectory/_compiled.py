"""The C kernel of the streaming update: built once by the system's compiler, and done without where there is none."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("_border.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno")
SWITCH = "LIGHTNING_KOOPMAN_COMPILE"  # "0" turns the kernel off
SECONDS = 60  # after which a compiler is given up


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be had; then NumPy does the same at about half the speed."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get(SWITCH) == "0" or compiler is None or sys.platform == "win32":
        return None
    try:
        return ctypes.CDLL(os.fspath(_built(compiler)))
    except (
        OSError,
        RuntimeError,
        subprocess.SubprocessError,
    ):  # an old compiler, no home: nothing the user has to mend
        return None


def _built(compiler: str) -> Path:
    """The library in the user's cache, for this source, compiler and processor; built there if it is missing."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=SECONDS).stdout
    parts = (SOURCE.read_bytes(), version, " ".join(FLAGS).encode(), _processor().encode())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_koopman"
    target = folder / f"border-{name}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when whole: other processes build too
            built = Path(scratch) / target.name
            command = [compiler, *FLAGS, os.fspath(SOURCE), "-o", os.fspath(built)]
            subprocess.run(command, capture_output=True, check=True, timeout=SECONDS)
            built.replace(target)
    return target


def _processor() -> str:
    """What tells processors with other instructions apart, for homes that machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags}"
