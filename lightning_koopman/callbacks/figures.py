"""Send a figure to the loggers that accept figures, or else write it to disk."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def deliver(
    figure: Figure, name: str, loggers: Iterable[Any], step: int, directory: Path | None
) -> tuple[Path | None, list[str]]:
    """Send the figure to every logger that accepts figures. If none does, write ``<last part of name>.png``.

    Loggers are recognized by their methods, not their class, so both import roots and compatible classes work.

    Returns:
        Path of the file written, if any, and a message for each logger that failed.
    """
    taken, failures = False, []
    for logger in loggers:
        try:
            taken |= _give(figure, name, logger, step)
        except Exception as error:  # noqa: PERF203 - one logger's failure must not affect the others
            failures.append(f"{type(logger).__name__} could not log the figure {name}: {type(error).__name__}: {error}")
    if taken or directory is None:
        return None, failures
    path = directory / f"{name.rsplit('/', 1)[-1]}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path, failures


def _give(figure: Figure, name: str, logger: Any, step: int) -> bool:
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):  # TensorBoard
        experiment.add_figure(name, figure, global_step=step, close=False)
    elif hasattr(logger, "log_image"):  # W&B
        logger.log_image(key=name, images=[_pixels(figure)], step=step)
    elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_figure(logger.run_id, figure, f"{name}-step={step}.png")
    else:
        return False
    return True


def _pixels(figure: Figure) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the RGBA pixels (height, width, 4) of the rendered figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=150)
    width, height = (round(side * 150) for side in figure.get_size_inches())
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8).reshape(height, width, 4)
