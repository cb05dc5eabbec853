"""Checks of arguments: the type first, then the range."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real

import numpy as np


def is_number(value: object) -> bool:
    """Whether it is a finite real number."""
    most = sys.float_info.max  # also of whole numbers, which know no bound
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(-most <= value <= most)


def is_count(value: object) -> bool:
    """Whether it is a whole number ≥ 1."""
    return isinstance(value, (int, np.integer)) and int(value) >= 1


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: object, least: int) -> None:
    """Raise ValueError unless a count is whole and large enough."""
    if not _is_integer(value) or value < least:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least {least} and whole, got {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless a number is positive and finite."""
    if not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}.")
