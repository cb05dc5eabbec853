"""Attributes as the state that a checkpoint holds."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any


def kept(holder: object, names: Iterable[str]) -> dict[str, Any]:
    """Return copies of attributes, which must be tensors, primitives, or lists, tuples and dicts of these."""
    return {name: copy.deepcopy(getattr(holder, name)) for name in names}


def set_back(holder: object, state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Set attributes to the values returned by :func:`kept`; raise KeyError if one is missing."""
    for name in names:
        setattr(holder, name, state[name])
