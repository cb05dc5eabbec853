"""A callback base class for both import roots of Lightning."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import rank_zero

__all__ = ["LightningCallback"]
ROOTS = ("pytorch_lightning", "lightning.pytorch")


def _own_state(self: Any) -> dict[str, Any]:
    """Return the state to copy, without the module methods that Lightning sets: they would copy the module."""
    return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}


if TYPE_CHECKING:
    from pytorch_lightning import Callback as LightningCallback
else:
    used = next((root for root in ROOTS if root in sys.modules), ROOTS[0])
    installed = [root for root in ROOTS if find_spec(root.partition(".")[0]) is not None]
    # both roots test `isinstance(callback, Callback)`, each with its own class
    classes = tuple(import_module(root).Callback for root in installed)
    # the root imported last takes over Lightning's messages: give them back to the one that the user imported
    rank_zero.log = logging.getLogger(f"{used}.utilities.rank_zero")
    own = {"__module__": __name__, "__getstate__": _own_state}
    LightningCallback = type("LightningCallback", classes, own)
