"""All callbacks that control training, as one list."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightning_koopman.callbacks.averaging import KoopmanWeightAveraging
from lightning_koopman.callbacks.base import TrajectoryCallback
from lightning_koopman.callbacks.early_stopping import EarlyStopOnUnitEigenvalues
from lightning_koopman.callbacks.reduce_lr import ReduceLROnNoiseFloor
from lightning_koopman.callbacks.restart import RestartOnBadInitialization


def koopman_autopilot(
    *,
    factor: float = 0.3,
    modules: str | Sequence[str] | None = None,
    baseline_loss: float | None = None,
    every_n_steps: int | None = None,
    dirpath: str | os.PathLike[str] | None = None,
) -> list[TrajectoryCallback]:
    """Return callbacks for training at a constant learning rate, with no schedule, fixed length or validation data.

    Bad weights are reinitialized. The average of the newest weights is validated, saved and kept. The learning rate is
    reduced when the weights hover at its noise floor. Training ends when they have converged, or hover at the lowest
    rate. The callbacks share one trajectory of 30 snapshots. ``max_epochs`` of the Trainer is an upper limit.

    Args:
        factor: Factor by which the learning rate is reduced, in (0, 1).
        modules: Name patterns of the modules that a restart reinitializes (default: all trainable ones).  For
            fine-tuning, name the new ones.
        baseline_loss: Loss of a network that ignores its input, > 0 (default: measured).
        every_n_steps: Optimizer steps that replace an epoch, ≥ 1.
        dirpath: Local folder below which all callbacks write (default: the run's log folder).

    Returns:
        :class:`RestartOnBadInitialization`, :class:`ReduceLROnNoiseFloor`, :class:`KoopmanWeightAveraging` and
        :class:`EarlyStopOnUnitEigenvalues`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_koopman import koopman_autopilot
        >>> [type(each).__name__ for each in koopman_autopilot()][1:3]
        ['ReduceLROnNoiseFloor', 'KoopmanWeightAveraging']
    """
    return [
        RestartOnBadInitialization(
            modules=modules, baseline_loss=baseline_loss, every_n_steps=every_n_steps, dirpath=dirpath
        ),
        ReduceLROnNoiseFloor(factor, every_n_steps=every_n_steps, dirpath=dirpath),
        KoopmanWeightAveraging(every_n_steps=every_n_steps, dirpath=dirpath),
        EarlyStopOnUnitEigenvalues(baseline_loss=baseline_loss, every_n_steps=every_n_steps, dirpath=dirpath),
    ]
