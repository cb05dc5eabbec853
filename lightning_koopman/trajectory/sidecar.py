"""The files of snapshots beside checkpoints: one for each process, readable by any other number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_koopman.parameters.shards import Indices, Shards
from lightning_koopman.trajectory.trajectory import base_path, read_into

SIDECAR = "snapshots"


def process_file(folder: Path, name: str, rank: int, size: int) -> Path:
    """The file of that name of one process."""
    return folder / (f"{name}.bin" if size == 1 else f"{name}-{rank}-of-{size}.bin")


def write_layout(sidecar: Path, shards: Shards) -> None:
    """Write beside a sidecar which numbers of which parameters make up its rows."""
    runs = [(name, part.starts, part.lengths) for name, part in shards.items()]
    layout = {
        "names": [name for name, _, _ in runs],
        "counts": torch.tensor([len(starts) for _, starts, _ in runs]),
        "starts": torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *(starts for _, starts, _ in runs)])),
        "lengths": torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *(each for _, _, each in runs)])),
    }
    target = _layout_path(sidecar)
    scratch = target.with_suffix(".part")
    torch.save(layout, scratch)
    scratch.replace(target)


@dataclass(frozen=True)
class Piece:
    """Numbers that lie side by side in a row of the one and in a row of the other."""

    rank: int
    source: int
    target: int
    length: int


class SidecarReader:
    """Reads this process's part of snapshots that some processes saved, as many as there were.

    Args:
        sidecar: The file of the first process.
        size: Number of processes that saved.
        shards: What counts as this process's own now.
        itemsize: Bytes of a number in the rows.
        first: Index of the oldest snapshot, for increments that lie on top of it.
    """

    def __init__(self, sidecar: Path, size: int, shards: Shards, itemsize: int, first: int) -> None:
        self._files = [process_file(sidecar.parent, SIDECAR, rank, size) for rank in range(size)]
        self._itemsize, self._first = itemsize, first
        layouts = [_read_layout(path) for path in self._files]
        self._row_sizes = [sum(int(runs[1].sum()) for runs in layout.values()) for layout in layouts]
        self._pieces, self._found = _overlaps(layouts, shards)

    def __call__(self, slot: int, out: Tensor) -> bool:
        """Fill a tensor with the row in a slot, or with the oldest snapshot for −1; returns whether it could."""
        if not self._found:
            return False
        for piece in self._pieces:
            path, row = self._files[piece.rank], self._row_sizes[piece.rank] * self._itemsize
            start, size = max(slot, 0) * row, self._itemsize
            if slot < 0:
                path, size = base_path(path, self._first), 4
            target = out[piece.target : piece.target + piece.length]
            if not read_into(path, start + piece.source * size, target):
                return False
        return True


def _overlaps(layouts: list[dict[str, tuple[Indices, Indices]]], shards: Shards) -> tuple[list[Piece], bool]:
    """Where the own numbers lie in the rows of others, and whether all of them were found."""
    pieces: list[Piece] = []
    offsets = [_row_offsets(layout) for layout in layouts]
    at = 0
    for name, part in shards.items():
        for rank, layout in enumerate(layouts):
            if name not in layout:
                continue
            starts, lengths = layout[name]
            order = np.argsort(starts)
            begins, ends = starts[order], (starts + lengths)[order]
            places = (offsets[rank][name] + np.cumsum(lengths) - lengths)[order]
            target = at
            for start, length in zip(part.starts.tolist(), part.lengths.tolist(), strict=True):
                left = int(np.searchsorted(ends, start, side="right"))
                right = int(np.searchsorted(begins, start + length, side="left"))
                for run in range(left, right):
                    low, high = max(start, int(begins[run])), min(start + length, int(ends[run]))
                    source = int(places[run]) + low - int(begins[run])
                    pieces.append(Piece(rank, source, target + low - start, high - low))
                target += length
        at += part.stop - part.start
    return pieces, sum(piece.length for piece in pieces) == shards.numel


def _row_offsets(layout: Mapping[str, tuple[Indices, Indices]]) -> dict[str, int]:
    sizes = np.cumsum([0, *(int(lengths.sum()) for _, lengths in layout.values())])
    return dict(zip(layout, sizes.tolist(), strict=False))


def _read_layout(sidecar: Path) -> dict[str, tuple[Indices, Indices]]:
    """By parameter, the runs of its numbers in a process's rows; empty where the file is missing."""
    try:
        layout: dict[str, Any] = torch.load(_layout_path(sidecar), weights_only=True)
    except Exception:  # missing or damaged: what it describes is lost
        return {}
    counts = np.cumsum(layout["counts"].numpy())[:-1]
    starts, lengths = (np.split(layout[key].numpy(), counts) for key in ("starts", "lengths"))
    return dict(zip(layout["names"], zip(starts, lengths, strict=True), strict=True))


def _layout_path(sidecar: Path) -> Path:
    return sidecar.with_name(f"{sidecar.name}.layout")
