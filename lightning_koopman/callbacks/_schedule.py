"""The learning rates that the run's schedulers have planned."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

if TYPE_CHECKING:
    import pytorch_lightning as pl

MOST_STEPS = 20_000  # of schedulers, a fraction of a second
FAR = 100  # epochs looked ahead where the run has no end


def current_rates(trainer: pl.Trainer) -> list[float]:
    """Learning rates of all parameter groups of all optimizers."""
    return [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]


def planned_rates(trainer: pl.Trainer) -> list[list[float]]:
    """Learning rates at the starts of the epochs to come, (epochs, groups), read at the end of an epoch.

    Copies of the schedulers are stepped ahead.  The plan of a ``ReduceLROnPlateau`` is its next reduction, unless it
    has reached its minimum.
    """
    configs = trainer.lr_scheduler_configs
    if not configs:
        return []
    stand_ins = {id(optimizer): _stand_in(optimizer) for optimizer in trainer.optimizers}
    schedulers = [copy.deepcopy(config.scheduler, dict(stand_ins)) for config in configs]
    now = trainer.current_epoch
    last = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else now + FAR
    batches = int(trainer.num_training_batches) if trainer.num_training_batches < float("inf") else 1
    steps = max(1, batches // trainer.accumulate_grad_batches)
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            _reduce(scheduler)
    planned, taken = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on the order of steps does not concern a rehearsal
        for epoch in range(now + 1, last):
            planned.append([float(group["lr"]) for stand_in in stand_ins.values() for group in stand_in.param_groups])
            if taken > MOST_STEPS:
                break
            for config, scheduler in zip(configs, schedulers, strict=True):
                due = steps // config.frequency if config.interval == "step" else (epoch + 1) % config.frequency == 0
                if not isinstance(scheduler, ReduceLROnPlateau):
                    taken += int(due)
                    for _ in range(due):
                        scheduler.step()
    return planned


def _stand_in(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer with the same hyperparameters and one weight in each group."""
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    stand_in.param_groups = [
        {key: copy.copy(value) for key, value in group.items() if key != "params"} | {"params": [torch.zeros(1)]}
        for group in optimizer.param_groups
    ]
    stand_in.defaults = dict(optimizer.defaults)
    return stand_in


def _reduce(scheduler: ReduceLROnPlateau) -> None:
    for group, least in zip(scheduler.optimizer.param_groups, scheduler.min_lrs, strict=True):
        group["lr"] = max(float(group["lr"]) * scheduler.factor, least)
