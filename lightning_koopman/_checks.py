"""Argument checks: the type first, then the range.  Each returns the value in a plain type."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

T = TypeVar("T")
MOST = sys.float_info.max


def is_number(value: object) -> bool:
    """Return whether a value is a finite real number."""
    if isinstance(value, int):  # Python integers have no upper bound
        return not isinstance(value, bool) and -MOST <= value <= MOST
    return isinstance(value, Real) and -MOST <= float(value) <= MOST


def is_dense(value: object) -> bool:
    """Return whether a value is a tensor with all its elements in memory."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


def _item(value: object) -> object:
    """Return the number in an array or tensor without dimensions, and anything else as it is."""
    return value.item() if (type(value) is np.ndarray or is_dense(value)) and value.ndim == 0 else value  # type: ignore[attr-defined]


def is_count(value: object, least: int = 1) -> bool:
    """Return whether a value is a whole number of at least ``least``."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


def check_count(name: str, value: object, least: int, advice: str = "", *, most: float = math.inf) -> int:
    """Return a whole number from ``least`` to ``most``; raise ValueError for anything else."""
    value = _item(value)
    if not is_count(value, least):
        raise ValueError(f"{name} must be at least {least} and whole, got {value!r}{_colon(advice)}.")
    if value > most:  # type: ignore[operator]
        raise ValueError(f"{name} must be at most {most:,}, got {value!r}{_colon(advice)}.")
    return int(value)  # type: ignore[call-overload, no-any-return]


def check_positive(name: str, value: object, advice: str = "") -> float:
    """Return a positive, finite number; raise ValueError for anything else."""
    value = _item(value)
    if not is_number(value) or not float(value) > 0:  # type: ignore[arg-type]
        raise ValueError(f"{name} must be positive and finite, got {value!r}{_colon(advice)}.")
    return float(value)  # type: ignore[arg-type]


def check_share(name: str, value: object, advice: str = "", *, closed: bool = False) -> float:
    """Return a number in (0, 1), or in (0, 1] if ``closed``; raise ValueError for anything else."""
    value = _item(value)
    if not is_number(value) or not (0 < float(value) < 1 or (closed and value == 1)):  # type: ignore[arg-type]
        raise ValueError(f"{name} must lie in (0, 1{']' if closed else ')'}, got {value!r}{_colon(advice)}.")
    return float(value)  # type: ignore[arg-type]


def check_choice(name: str, value: T, choices: Sequence[object], advice: str = "") -> T:
    """Return one of the given choices; raise ValueError for anything else."""
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}{_colon(advice)}.")
    return str(value) if isinstance(value, str) else value  # type: ignore[return-value]


def check_flag(name: str, value: object) -> bool:
    """Return True or False; raise ValueError for anything else."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def _colon(advice: str) -> str:
    return f": {advice}" if advice else ""


def check_fraction(name: str, value: object, advice: str = "") -> float:
    """Return a number in [0, 1); raise ValueError for anything else."""
    value = _item(value)
    if not is_number(value) or not 0 <= float(value) < 1:  # type: ignore[arg-type]
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}{_colon(advice)}.")
    return float(value)  # type: ignore[arg-type]


def check_instance(name: str, value: T, kinds: type | tuple[type, ...], advice: str) -> T:
    """Return an instance of the given classes; raise TypeError for anything else."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {advice}, got {type(value).__name__}: {_short(value)}.")
    return value


def check_function(name: str, value: T, advice: str, arguments: int = 1) -> T:
    """Return a callable that takes the given number of arguments; raise TypeError for anything else."""
    try:
        if callable(value) and (isinstance(value, type) or signature(value).bind(*[None] * arguments)):
            return value
    except ValueError:  # a built-in without a signature
        return value
    except TypeError:
        pass
    raise TypeError(f"{name} must be {advice}, got {_short(value)}.")


def check_path(name: str, value: object) -> Path:
    """Return a path; raise TypeError or ValueError for anything else."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {type(value).__name__}: {_short(value)}.")
    text = os.fsdecode(value)
    if not text or "\0" in text:
        raise ValueError(f"{name} must be a path, got {value!r}.")
    return Path(text)


def hold_words(values: object) -> bool:
    """Return whether an array-like has strings, records or None among its entries."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        return False
    kinds = (str, bytes, type(None))
    return array.dtype.kind in "USV" or (
        array.dtype.kind == "O" and any(isinstance(each, kinds) for each in array.flat)
    )


def real_array(name: str, value: object) -> npt.NDArray[Any]:
    """Return real numbers as a NumPy array, float32 or else float64; raise TypeError for anything else.

    Accepts tensors that require a gradient, integers, pandas tables, negative strides and other byte orders.
    """
    if isinstance(value, np.ma.MaskedArray) and np.any(value.mask):
        raise TypeError(f"{name} has masked entries: fill or remove them.")
    if isinstance(value, torch.Tensor):
        if value.is_complex() or value.is_sparse or value.device.type == "meta":
            raise TypeError(
                f"{name} must hold real numbers, got a {value.layout} tensor of {value.dtype} on {value.device}."
            )
        found = value.detach().resolve_neg().cpu()
        value = (found if found.dtype in (torch.float32, torch.float64) else found.double()).numpy()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be real numbers, got {_short(value)}: {error}.") from error
    if array.dtype.kind in "biuOf" and array.dtype != np.float32 and not hold_words(array):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            array = array.astype(np.float64)
    if array.dtype.kind != "f":
        mend = "give real and imaginary part as two outputs" if array.dtype.kind == "c" else "convert them"
        raise TypeError(f"{name} must be real numbers, got {array.dtype}: {mend}.")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def whole_numbers(name: str, value: object, least: int, most: int) -> npt.NDArray[np.int64]:
    """Return whole numbers as an array (s,); raise ValueError or TypeError if they are not, or out of range."""
    array = np.atleast_1d(real_array(name, value))
    listed = value if isinstance(value, (list, tuple)) else [value]
    flags = any(getattr(each, "dtype", type(each)) in (bool, np.bool_, torch.bool) for each in listed)
    if flags or array.ndim != 1 or not ((least <= array) & (array <= most)).all() or (array % 1).any():
        raise ValueError(f"{name} must be whole numbers of shape (s,) from {least} to {most}, got {_short(value)}.")
    return array.astype(np.int64)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
