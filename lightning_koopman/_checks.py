"""Checks of arguments: the type first, then the range.  Each returns the value as a plain Python one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypeVar

import numpy as np

T = TypeVar("T")
MOST = sys.float_info.max


def is_number(value: object) -> bool:
    """Whether it is a finite real number."""
    if isinstance(value, int):  # which knows no bound
        return not isinstance(value, bool) and -MOST <= value <= MOST
    return isinstance(value, Real) and -MOST <= float(value) <= MOST


def is_count(value: object, least: int = 1) -> bool:
    """Whether it is a whole number and large enough."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


def check_count(name: str, value: object, least: int, advice: str = "") -> int:
    """A whole number ≥ ``least``; raise ValueError if it is none."""
    if not is_count(value, least):
        raise ValueError(f"{name} must be at least {least} and whole, got {value!r}{_colon(advice)}.")
    return int(value)  # type: ignore[call-overload, no-any-return]


def check_positive(name: str, value: object, advice: str = "") -> float:
    """A positive, finite number; raise ValueError if it is none."""
    if not is_number(value) or not float(value) > 0:  # type: ignore[arg-type]
        raise ValueError(f"{name} must be positive and finite, got {value!r}{_colon(advice)}.")
    return float(value)  # type: ignore[arg-type]


def check_share(name: str, value: object, advice: str = "", *, closed: bool = False) -> float:
    """A number in (0, 1), or with ``closed`` in (0, 1]; raise ValueError if it is none."""
    if not is_number(value) or not (0 < float(value) < 1 or (closed and value == 1)):  # type: ignore[arg-type]
        raise ValueError(f"{name} must lie in (0, 1{']' if closed else ')'}, got {value!r}{_colon(advice)}.")
    return float(value)  # type: ignore[arg-type]


def check_choice(name: str, value: T, choices: Sequence[object], advice: str = "") -> T:
    """One of some values; raise ValueError if it is none."""
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}{_colon(advice)}.")
    return value


def check_flag(name: str, value: object) -> bool:
    """True or False; raise ValueError if it is neither."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def _colon(advice: str) -> str:
    return f": {advice}" if advice else ""
