"""The recorded snapshots of one training, and the small matrix that every spectrum is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_koopman._checks import check_choice, check_count, check_function, check_path, real_array
from lightning_koopman._types import AllSum, Array
from lightning_koopman.dmd.gram import factor_from_increment_gram, merge_oldest
from lightning_koopman.dmd.rrr import check_options, decompose
from lightning_koopman.dmd.spectrum import Spectrum
from lightning_koopman.trajectory.increments import Increments, ReadRow, check_state
from lightning_koopman.trajectory.rows import DTYPES
from lightning_koopman.trajectory.sidecar import SegmentReader, SegmentWriter
from lightning_koopman.trajectory.sketch import SKETCH, Sketch, check_sketch, with_sketch_errors

STORAGES = ("ram", "disk", "sketch")
READ = "a function of an index and the tensor to fill"


class Trajectory:
    """Snapshots of a state of n elements: the oldest one, the increments after it, and their Gram matrix.

    Appending takes one pass over the stored increments.  A spectrum then costs O(time³), whatever n is.  Each increment
    corrects the rounding errors of those before it, so that errors do not accumulate.

    If a state is spread over processes, each process keeps a trajectory of its part.  With ``all_sum`` they share one
    Gram matrix, and each returns the spectrum of the whole state.

    Args:
        n: Elements of a snapshot, ≥ 1; with ``all_sum``, of this process's part, ≥ 0.
        capacity: Snapshots to keep, ≥ 2; a new one then replaces the oldest (default: keep all).
        storage: ``"ram"``; ``"disk"`` for a memory-mapped file, of which the system caches what fits into memory; or
            ``"sketch"`` to keep only ``sketch`` random combinations of each snapshot.  The spectrum of sketches is an
            estimate with a standard error, and modes are not available.
        path: Folder of the file for ``storage="disk"`` (default: the system's temporary folder).  The file has no name
            and disappears with the trajectory.
        dtype: Type of the increments: ``torch.float32``; ``torch.float64`` for a few elements in full precision, such
            as a loss; or ``torch.bfloat16`` for half the memory.
        sketch: Elements of a sketch with ``storage="sketch"``, ≥ 2; preferably a prime.
        all_sum: Function that returns the sum of a small float64 array over all processes that hold parts, the same in
            each.  Every process must then append at the same times.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_koopman import Trajectory
        >>> trajectory = Trajectory(3, capacity=20)
        >>> for t in range(30):
        ...     trajectory.append(torch.tensor([1.0, 2.0 + 0.8**t, -(0.8**t)]))
        >>> len(trajectory), trajectory.spectrum().eigenvalues.real.round(3).tolist()
        (20, [1.0, 0.8])
    """

    def __init__(
        self,
        n: int,
        *,
        capacity: int | None = None,
        storage: str = "ram",
        path: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        sketch: int = SKETCH,
        all_sum: AllSum | None = None,
    ) -> None:
        self.n = check_count("n", n, 1 if all_sum is None else 0)
        self.capacity = None if capacity is None else check_count("capacity", capacity, 2)
        self.storage, self.dtype, self.all_sum = storage, dtype, all_sum
        _check_kept(storage, path, dtype, all_sum)
        self._sketch = Sketch(check_sketch(sketch)) if storage == "sketch" else None
        self.sketched = None if self._sketch is None else self._sketch.k  # combinations kept per snapshot
        width, kept = (self.n, dtype) if self._sketch is None else (self._sketch.k, torch.float64)
        folder = check_path("path", path or gettempdir()) if storage == "disk" else None
        if folder is not None and not folder.is_dir():
            raise ValueError(f"path={str(folder)!r} is not a folder: create it first.")
        self._held = Increments(width, self.capacity, kept, folder, scaled=dtype == torch.float64 and all_sum is None)
        self._writer: SegmentWriter | None = None

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"Trajectory(n={self.n}, snapshots={len(self)}, capacity={self.capacity}, storage={self.storage!r})"

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshots held."""
        return self._held.nbytes

    @property
    def total(self) -> int:
        """Elements of a snapshot, over all processes."""
        return self._held.total

    # -- recording ----------------------------------------------------------------------------------------------------

    def append(self, snapshot: Tensor | npt.ArrayLike | Sequence[Tensor]) -> None:
        """Record the next snapshot.

        Args:
            snapshot: Tensor or array (n,) of finite numbers, or a list of tensors to concatenate; copied.

        Raises:
            ValueError: If the shape is not (n,), or an element is not finite in any process.  The trajectory is then
                unchanged.
        """
        if not self.record(snapshot):
            raise ValueError(f"snapshot holds NaN or infinite values, or too large for {self.dtype}: not recorded.")

    def record(
        self, snapshot: Tensor | npt.ArrayLike | Sequence[Tensor], *, offsets: Sequence[int] | None = None
    ) -> bool:
        """Record the next snapshot like :meth:`append`; return whether it is finite in all processes.

        Args:
            snapshot: As for :meth:`append`.
            offsets: Index in the whole state at which each tensor of the list begins, for sketches.
        """
        held, add_up = self._held, self.all_sum or np.asarray
        parts, size = _parts(snapshot, self.n), float(self.n)
        if self._sketch is not None:  # the sum of all sketches is recorded like a small snapshot
            sums = add_up(np.append(size, self._sketch.of_parts(parts, offsets)))
            parts, size, add_up = [torch.from_numpy(sums[1:])], sums[0], np.asarray
        held.write(parts)
        return held.commit(add_up(held.message(size)))

    # -- results ------------------------------------------------------------------------------------------------------

    def snapshots(self) -> Tensor:
        """Return a copy of the snapshots held, tensor (time, n), oldest first."""
        _check_rows(self._sketch, "snapshots")
        return self._held.snapshots() * self._held.unit

    def last(self) -> Tensor:
        """Return a copy of the newest snapshot, tensor (n,); raise IndexError if there is none."""
        _check_rows(self._sketch, "last")
        if not len(self):
            raise IndexError("the trajectory is empty: append a snapshot first.")
        return self._held.newest * self._held.unit

    def step_norms(self) -> Array:
        """Return the Euclidean norms (time − 1,) of the steps between successive snapshots."""
        return np.sqrt(np.maximum(np.diag(self._held.gram)[1:], 0.0)) * self._held.unit

    def step_gram(self) -> Array:
        """Return the inner products (time − 1, time − 1) of the steps, divided by the square of the longest."""
        gram = self._held.gram[1:, 1:]
        return gram / (np.diag(gram).max(initial=0.0) or 1.0)

    def start_norm(self) -> float:
        """Return the Euclidean norm of the oldest snapshot held."""
        _check_some(self, "start_norm")
        return float(np.sqrt(max(self._held.gram[0, 0], 0.0))) * self._held.unit

    def factor(self, *, last: int | None = None) -> Array:
        r"""Return R (r, time), r ≤ time, with :math:`R^\top R` the Gram matrix of the snapshots.

        Args:
            last: Number of newest snapshots to use, ≥ 1 (default: all).
        """
        _check_some(self, "factor")
        drop = 0 if last is None else max(0, len(self) - check_count("last", last, 1))
        return factor_from_increment_gram(merge_oldest(self._held.gram, drop)) * self._held.unit

    def spectrum(
        self,
        *,
        last: int | None = None,
        tol: float = 1e-3,
        max_rank: int | None = None,
        delays: int = 1,
        refine: bool = True,
    ) -> Spectrum:
        """Return the Koopman spectrum of the snapshots held, by :func:`dmd_rrr`.

        Args:
            last: Number of newest snapshots to use, ≥ 1 (default: all).
            tol: Relative singular value below which directions count as zero, in [0, 1).
            max_rank: Upper bound on the rank.
            delays: Snapshots in one delay-embedded snapshot, ≥ 1.
            refine: Compute refined Ritz pairs.

        Returns:
            The spectrum; with ``storage="sketch"`` its ``sketch_errors`` are set.

        Raises:
            ValueError: If there are fewer than ``delays + 1`` snapshots, or an option is out of range.
        """
        tol, max_rank, delays, refine = check_options(tol=tol, max_rank=max_rank, delays=delays, refine=refine)
        held = len(self) if last is None else min(check_count("last", last, 1), len(self))
        if held < delays + 1:
            raise ValueError(
                f"the spectrum needs at least {delays + 1} snapshots with delays={delays}, but only {held} are held: "
                "append more first."
            )
        root = self.factor(last=last)
        found = decompose(root, tol=tol, max_rank=max_rank, delays=delays, refine=refine)
        if self._sketch is None:
            return found
        return with_sketch_errors(found, root, self._sketch.k)

    def combine(self, weights: npt.ArrayLike) -> Tensor:
        """Return the combinations ``weights @ snapshots`` of the snapshots held, in one pass.

        With :meth:`Spectrum.combination` this gives reconstructions and forecasts of any size.

        Args:
            weights: Real array (s, time), or (time,) for one combination.

        Returns:
            Tensor (s, n) or (n,), float64 for float64 snapshots, else float32; accumulated in float64.

        Raises:
            ValueError: If the weights do not match the snapshots, or only sketches are held.
        """
        _check_rows(self._sketch, "combine")
        matrix = torch.from_numpy(real_array("weights", weights).astype(np.float64))
        if matrix.ndim not in (1, 2) or matrix.shape[-1] != len(self) or not torch.isfinite(matrix).all():
            raise ValueError(
                f"weights must be finite and have shape (s, {len(self)}) or ({len(self)},), one weight per snapshot; "
                f"got {tuple(matrix.shape)}."
            )
        combined = self._held.combine(matrix.reshape(-1, len(self)))
        return combined[0] if matrix.ndim == 1 else combined

    # -- saving and loading -------------------------------------------------------------------------------------------

    def save(self, path: str | Path | SegmentWriter) -> dict[str, Any]:
        """Write the snapshots that are not in the files yet, and return the small rest of the state.

        The files are append-only, so what an earlier state needs is still there.  Their names begin with ``path``, and
        each file holds at most about two windows of snapshots.

        Args:
            path: Prefix of the file names; the folder must exist.

        Returns:
            Tensors and numbers for :meth:`load`, safe for ``torch.load(weights_only=True)``.

        Raises:
            OSError: If a file cannot be written.
        """
        if isinstance(path, SegmentWriter):
            self._writer = path
        elif self._writer is None or self._writer.path != check_path("path", path).absolute():
            self._writer = SegmentWriter(check_path("path", path), keep=self.capacity)
        held = self._held
        return {
            "n": self.n,
            "capacity": self.capacity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "sketch": 0 if self._sketch is None else self._sketch.k,
            **self._writer.write(held.first, len(held), held.oldest, held.newest, held.rows.row),
            **held.state_dict(),
        }

    @classmethod
    def load(
        cls,
        state: dict[str, Any],
        path: str | Path,
        *,
        storage: str = "ram",
        folder: str | Path | None = None,
        all_sum: AllSum | None = None,
        n: int | None = None,
        read: ReadRow | None = None,
    ) -> Trajectory:
        """Return the trajectory that :meth:`save` wrote, whose spectrum is the same to the last bit.

        If a file is missing or damaged, the trajectory is empty.

        Args:
            state: What :meth:`save` returned, in any of the processes that saved.
            path: The path given to :meth:`save`, or where the files are now.
            storage: As for the constructor; a sketch stays a sketch.
            folder: The constructor's ``path``.
            all_sum: As for the constructor.
            n: Elements that this process holds (default: those in the state).
            read: Function that fills a tensor with this process's part of the row of an index and returns whether it
                could.  It replaces reading the files at ``path``.

        Raises:
            ValueError: If the state was not returned by :meth:`save`.
        """
        count, path = check_state(state), check_path("path", path)
        kept: dict[str, Any] = {"storage": storage, "path": None if folder is None else check_path("folder", folder)}
        kept = {"storage": "sketch", "sketch": int(state["sketch"])} if state["sketch"] else kept
        trajectory = cls(
            _own_count(state, n),
            capacity=state["capacity"],
            dtype=getattr(torch, state["dtype"]),
            all_sum=all_sum,
            **kept,
        )
        held = trajectory._held
        get = SegmentReader.of(path, state, held.n) if read is None else check_function("read", read, READ, 2)
        marks = held.read(int(state["first"]), count, int(state["start"]), get)
        if all_sum is not None:  # all processes read the same sketches, so only their NaN marks are summed
            marks = all_sum(marks) if trajectory._sketch is None else marks + all_sum(marks * 0)
        held.load_state_dict(state, marks)
        return trajectory


def _check_kept(storage: object, path: object, dtype: object, all_sum: object) -> None:
    """Raise ValueError or TypeError if the storage options are invalid."""
    if all_sum is not None:
        check_function("all_sum", all_sum, "a function of an array")
    check_choice("storage", storage, STORAGES)
    if path is not None:
        check_path("path", path)
    if path is not None and storage != "disk":
        raise ValueError(f"path={str(path)!r} only applies to storage='disk', got storage={storage!r}: omit it.")
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32, torch.float64 or torch.bfloat16, got {dtype}.")
    if storage == "sketch" and dtype != torch.float32:
        raise ValueError(f"dtype={dtype} does not apply to storage='sketch', which is always float64: omit it.")


def _own_count(state: dict[str, Any], n: int | None) -> int:
    """Return how many elements of a saved snapshot this process holds; raise ValueError if more than there are."""
    n = int(state["n"]) if n is None else check_count("n", n, 0)
    if len(state["gram"]) and n > int(state["total"]):
        raise ValueError(
            f"n={n} exceeds the {state['total']} elements of a snapshot in state: pass the number held by this process."
        )
    return n


def _check_rows(sketch: Sketch | None, method: str) -> None:
    """Raise ValueError if there are only sketches."""
    if sketch is not None:
        raise ValueError(
            f"storage='sketch' keeps {sketch.k} combinations of each snapshot, so `{method}` is not available: use "
            "storage='ram' or 'disk'."
        )


def _check_some(trajectory: Trajectory, method: str) -> None:
    """Raise ValueError if nothing has been recorded."""
    if not len(trajectory):
        raise ValueError(f"the trajectory is empty, so `{method}` is undefined: append a snapshot first.")


def _parts(snapshot: Tensor | npt.ArrayLike | Sequence[Tensor], n: int) -> list[Tensor]:
    """Return a snapshot of n elements as a list of tensors; raise ValueError if it has another shape."""
    several = isinstance(snapshot, (list, tuple)) and all(isinstance(part, Tensor) for part in snapshot)
    given: Any = snapshot if several else [snapshot]
    parts = [_real(part) for part in given]
    count = sum(part.numel() for part in parts)
    if count != n or (not several and parts[0].ndim != 1):
        raise ValueError(f"snapshot must have shape ({n},), got {(count,) if several else tuple(parts[0].shape)}.")
    return parts


def _real(part: Any) -> Tensor:
    """Return real numbers as a tensor; a tensor stays on its device."""
    if not isinstance(part, Tensor) or part.is_sparse or part.is_complex() or part.device.type == "meta":
        return torch.from_numpy(np.ascontiguousarray(real_array("snapshot", part)))
    return part.detach().resolve_neg()
