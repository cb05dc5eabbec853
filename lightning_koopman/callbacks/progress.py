"""The phase of a training in the progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl


class PhaseItems:
    """Replacement for a progress bar's ``get_metrics`` that adds the phases of monitors."""

    def __init__(self, before: Callable[..., dict[str, Any]]) -> None:
        self.before, self.monitors = before, list[Any]()

    def __call__(self, *given: Any) -> dict[str, Any]:
        """Return all items."""
        known = [each for each in self.monitors if each.reading is not None]
        return {**self.before(*given), **{f"{each.prefix}/phase": each.reading.phase.value for each in known}}


def show(trainer: pl.Trainer, monitor: Any) -> None:
    """Add a monitor's phase to the progress bar (tqdm or Rich), until :func:`hide`."""
    bar: Any = trainer.progress_bar_callback
    if bar is None or not hasattr(bar, "get_metrics"):
        return
    if not isinstance(bar.get_metrics, PhaseItems):
        bar.get_metrics = PhaseItems(bar.get_metrics)
    if monitor not in bar.get_metrics.monitors:
        bar.get_metrics.monitors.append(monitor)


def hide(trainer: pl.Trainer, monitor: Any) -> None:
    """Remove a monitor's phase from the progress bar, and restore the bar after the last one."""
    items: Any = getattr(trainer.progress_bar_callback, "get_metrics", None)
    if isinstance(items, PhaseItems):
        items.monitors = [each for each in items.monitors if each is not monitor]
        if not items.monitors:
            trainer.progress_bar_callback.get_metrics = items.before  # type: ignore[union-attr, method-assign]
