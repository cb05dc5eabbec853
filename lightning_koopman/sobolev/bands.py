r"""Bands of Fourier modes on the torus, and their weights in a Sobolev norm (paper, section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_koopman._checks import check_count, check_flag, is_count, is_number
from lightning_koopman.fourier.modes import half_space

LOWEST = 4  # first geometric scale: networks learn lower modes easily
NORMS = (1, 2)
MOST_LAYERS = 10_000  # with an output of their own
KINDS = ("geometric", "linear", "exponential")
KEPT = 8  # cached bands: millions of modes take hundreds of megabytes


def sobolev_scales(
    n_layers: int,
    kind: str | Callable[[int], float] = "geometric",
    *,
    highest: float | None = None,
    lowest: float | None = None,
    start: int = 1,
) -> tuple[float, ...]:
    r"""Return the scale :math:`s(\ell)` of each layer: the highest mode that the layer is trained on.

    Args:
        n_layers: Number of layers L ≥ 1 with an output, including the network's own.
        kind: ``"geometric"``: from ``lowest`` to ``highest`` in equal ratios, rounded to whole numbers below
            ``highest``; from section 6 of the paper ``"linear"``, :math:`s(\ell) = \ell`, or ``"exponential"``,
            :math:`s(\ell) = 2^\ell`; or a non-decreasing function of :math:`\ell`.
        highest: Last scale of ``"geometric"``, required there; see :func:`suggest_scales`.
        lowest: First scale of ``"geometric"`` (default: 4, or ``highest`` if that is less).
        start: First :math:`\ell` of the other kinds: 1 as in equation 7, 0 as in equation 8.

    Returns:
        L non-decreasing scales in cycles per period.

    Raises:
        ValueError: If an argument is out of its range, or a scale is negative, not finite or less than its predecessor.

    Example:
        >>> from lightning_koopman import sobolev_scales
        >>> sobolev_scales(9, highest=64)
        (4, 6, 8, 11, 16, 23, 32, 45, 64)
        >>> sobolev_scales(4, "linear"), sobolev_scales(4, "exponential"), sobolev_scales(3, lambda layer: 3 * layer)
        ((1, 2, 3, 4), (2, 4, 8, 16), (3, 6, 9))
    """
    if not is_count(n_layers) or n_layers > MOST_LAYERS:
        raise ValueError(f"n_layers must be a whole number ≥ 1 and ≤ {MOST_LAYERS}, got {n_layers!r}.")
    if not (callable(kind) or (isinstance(kind, str) and kind in KINDS)):
        raise ValueError(f"kind must be one of {KINDS} or a callable, got {kind!r}.")
    start = check_count("start", start, 0)
    if isinstance(kind, str) and kind == "exponential" and start + n_layers > 1000:
        raise ValueError(
            f"start={start} and n_layers={n_layers} give scales up to 2^{start + n_layers - 1}, which is too large: "
            "lower one of them."
        )
    if isinstance(kind, str) and kind == "geometric":
        if highest is None:
            raise ValueError("highest=None: geometric scales need the highest mode; suggest_scales(x, y) suggests one.")
        first = min(LOWEST, highest) if lowest is None else lowest
        if not (is_number(first) and is_number(highest) and 0 < first <= highest):
            raise ValueError(f"lowest and highest must satisfy 0 < lowest ≤ highest, got {first!r} and {highest!r}.")
        if math.isinf(float(highest) / float(first)):
            raise ValueError(f"lowest={first!r} is too far below highest={highest!r}: raise it, to 1 for instance.")
        ratio = (highest / first) ** (1 / max(1, n_layers - 1))
        inner = [min(round(first * ratio**layer), highest) for layer in range(n_layers - 1)]
        return check_scales((*inner, highest))
    if highest is not None or lowest is not None:
        raise ValueError(f"highest and lowest belong to kind='geometric', got kind={kind!r}: leave them out.")
    function = kind if callable(kind) else {"linear": lambda layer: layer, "exponential": lambda layer: 2**layer}[kind]
    return check_scales([function(layer) for layer in range(start, start + n_layers)])


def check_scales(scales: object) -> tuple[float, ...]:
    """Return scales as a tuple; raise ValueError unless they are non-decreasing numbers ≥ 0."""
    loose: Any = scales.tolist() if isinstance(scales, (np.ndarray, Tensor)) else scales
    listed = isinstance(loose, Sequence) and not isinstance(loose, (bytes, bytearray))
    given = tuple(loose) if listed else (loose,)
    if not given or not all(is_number(each) for each in given) or min(given) < 0:
        raise ValueError(
            f"scales must be the highest mode, a number ≥ 0, or one such number per layer, got {scales!r}: "
            f"see sobolev_scales(n_layers, kind)."
        )
    if any(after < before for before, after in pairwise(given)):
        raise ValueError(f"scales must not decrease from layer to layer, got {scales!r}: sort them.")
    return tuple(int(each) if float(each).is_integer() else float(each) for each in given)


def check_norm(norm: object) -> None:
    """Raise ValueError unless ``norm`` is 1 or 2."""
    if isinstance(norm, bool) or not is_number(norm) or norm not in NORMS:
        raise ValueError(f"norm must be 1 or 2, got {norm!r}.")


@dataclass(frozen=True)
class SobolevNorm:
    r"""Rule for the modes of each layer and their weights :math:`w_k = (1 + (2\pi\|k\|_2)^2)^s`.

    Args:
        scales: Scale of each layer; a single one is the last of geometric scales from 4 on.
        exponent: :math:`s`, usually negative (default: −1/4; with ``literal`` −1/2, as in equations 7 and 8).
        literal: Whether a layer has the shell :math:`\|k\| = s(\ell)`, as in the paper, instead of the ball
            :math:`\|k\| \le s(\ell)`.
        norm: 1 or 2: the norm of the mode that is compared with the scale.

    Raises:
        ValueError: If an argument is out of its range.
    """

    scales: tuple[float, ...]
    exponent: float | None = None
    literal: bool = False
    norm: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", check_scales(self.scales))
        if self.exponent is not None and not is_number(self.exponent):
            raise ValueError(f"exponent must be a finite number or None, got {self.exponent!r}.")
        check_norm(self.norm)
        object.__setattr__(self, "literal", check_flag("literal", self.literal))

    def bands(self, n_layers: int, dim: int) -> Bands:
        """Return the modes in ``dim`` dimensions and their weights for each of ``n_layers`` outputs.

        Raises:
            ValueError: If there is neither one scale nor one for each output, or a shell contains no mode.
        """
        return make_bands(self.per_layer(n_layers), n_layers, dim, self.index, self.literal, self.norm)

    def tensors(self, n_layers: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return modes (m, D) and weights (L, m) on the device of ``like``; the weights have its dtype."""
        rule = (tuple(map(fixed, self.per_layer(n_layers))), n_layers, dim, fixed(self.index), self.literal, self.norm)
        return cast("tuple[Tensor, Tensor]", constant_tensors(like.dtype, like.device, *rule))

    @property
    def index(self) -> float:
        """The exponent s, as given or the default."""
        return (-0.5 if self.literal else -0.25) if self.exponent is None else self.exponent

    def per_layer(self, n_layers: int) -> tuple[float, ...]:
        """Return the scale of each layer; all scales for a single output."""
        scales = self.scales
        if n_layers > 1 and len(scales) == 1:
            return scales * n_layers if not scales[0] else sobolev_scales(n_layers, highest=scales[0])
        if n_layers > 1 and len(scales) != n_layers:
            raise ValueError(
                f"scales={scales!r} has length {len(scales)}, but {n_layers} outputs are trained: pass one for each."
            )
        return scales


@dataclass(frozen=True, eq=False)
class Bands:
    """Modes and their weights, in one half of the space, because k and −k have the same power.

    Attributes:
        modes: Integers (m, D), by increasing norm: one of each pair k and −k, and the zero mode if a layer has it.
        weights: Array (L, m), ≥ 0: weight of each mode for each layer, k and −k together.
    """

    modes: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float64]

    @property
    def n_functions(self) -> int:
        """Number of real functions (cosines and sines) of the modes."""
        return 2 * len(self.modes) - int(not self.modes.any(axis=1).all())


def fixed(value: float) -> float:
    """Return a plain float while compiling, because the compiler makes symbols of numbers that vary between calls."""
    return float(f"{value}") if torch.compiler.is_compiling() else value


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def constant_tensors(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Call :func:`make_tensors` without the compiler tracing into it."""
    return make_tensors(*arguments)


@lru_cache(maxsize=KEPT)
def make_tensors(dtype: torch.dtype, device: torch.device, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return modes and weights of :func:`make_bands` as tensors."""
    bands = make_bands(*arguments)
    if not bands.weights.max() < torch.finfo(dtype).max:
        raise ValueError(f"exponent={arguments[3]!r} gives a mode a weight beyond {dtype}: lower it.")
    with torch.inference_mode(mode=False):  # usable for training even if made for inference
        return torch.tensor(bands.modes, device=device), torch.tensor(bands.weights, dtype=dtype, device=device)


@lru_cache(maxsize=KEPT)
def make_bands(scales: tuple[float, ...], n_layers: int, dim: int, exponent: float, literal: bool, norm: int) -> Bands:
    """Build the bands of a :class:`SobolevNorm`."""
    modes = half_space(scales[-1], dim, norm)
    squares = (modes.astype(np.int64) ** 2).sum(axis=1)
    sizes = np.abs(modes).sum(axis=1) if norm == 1 else squares
    order = np.argsort(sizes, kind="stable")
    modes, squares, sizes = modes[order], squares[order], sizes[order]
    limits = np.asarray(scales, dtype=np.float64) ** norm
    if literal:
        members = np.isclose(sizes, limits[:, None], rtol=1e-9, atol=1e-9)
        for scale, member in zip(scales, members, strict=True):
            if not member.any():
                raise ValueError(
                    f"scales={scales!r}: no mode k has ‖k‖_{norm} = {scale!r}, so its shell is empty: "
                    "take a whole number, or literal=False for the ball ‖k‖ ≤ s(ℓ)."
                )
    else:
        members = sizes <= limits[:, None] * (1 + 1e-9)
    if n_layers == 1:  # equation 8: one output has all bands; the last ball contains the others
        members = members.sum(axis=0, keepdims=True) if literal else members[-1:]
    counted = members.any(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):  # `make_tensors` raises
        decay = (1 + (2 * np.pi) ** 2 * squares) ** exponent * np.where(squares > 0, 2.0, 1.0)
        return Bands(modes[counted], (members * decay)[:, counted])
