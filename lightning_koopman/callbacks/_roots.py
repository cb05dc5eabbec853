"""One base class for both import roots of Lightning."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

__all__ = ["LightningCallback"]

ROOTS = ("pytorch_lightning", "lightning.pytorch")

if TYPE_CHECKING:
    from pytorch_lightning import Callback as LightningCallback
else:

    def _installed_callbacks() -> tuple[type, ...]:
        installed = [root for root in ROOTS if find_spec(root.partition(".")[0]) is not None]
        return tuple(dict.fromkeys(import_module(root).Callback for root in installed))

    # both roots test `isinstance(callback, Callback)`, each with its own class
    LightningCallback = type("LightningCallback", _installed_callbacks(), {"__module__": __name__})
