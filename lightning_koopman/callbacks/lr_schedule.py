"""Future learning rates of a run, read from its schedulers."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from numbers import Real

import pytorch_lightning as pl
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_koopman.callbacks.rate_groups import rate_groups

MOST_STEPS = 100_000  # scheduler steps to simulate: a fraction of a second
FAR = 100  # epochs to look ahead if the run has no end
WARMING_UP = 2.0  # ratio of the highest planned rate to the highest so far above which rates are warming up


def current_rates(trainer: pl.Trainer) -> list[float]:
    """Return the learning rates of all parameter groups of all optimizers; groups without a rate are skipped."""
    given = (group.get("lr") for group in rate_groups(trainer))
    return [float(rate) for rate in given if isinstance(rate, (Real, torch.Tensor))]


def planned_rates(trainer: pl.Trainer, every_n_steps: int | None = None) -> list[list[float]]:
    """Return the learning rates at the starts of the coming epochs, (epochs, groups); call at the end of an epoch.

    Copies of the schedulers are stepped ahead.  A ``ReduceLROnPlateau`` is assumed to reduce once more, down to its
    minimum.

    Args:
        trainer: The run.
        every_n_steps: Length of an interval in optimizer steps, if intervals replace epochs.
    """
    configs = trainer.lr_scheduler_configs
    if not configs:
        return []
    stand_ins = {id(optimizer): _stand_in(optimizer) for optimizer in trainer.optimizers}
    # a schedule's functions may be methods of the module: do not copy it with them
    kept = {id(owner): owner for owner in (trainer, trainer.lightning_module)}
    schedulers = [copy.deepcopy(config.scheduler, {**stand_ins, **kept}) for config in configs]
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            _reduce(scheduler)
    planned: list[list[float]] = []
    # a schedule may end early with ValueError; warnings about the order of steps do not apply to a dry run
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        for due in _times(trainer, every_n_steps):
            planned.append([float(group["lr"]) for stand_in in stand_ins.values() for group in stand_in.param_groups])
            for config, scheduler in zip(configs, schedulers, strict=True):
                count = sum(time % config.frequency == 0 for time in due[config.interval])
                if not isinstance(scheduler, ReduceLROnPlateau):
                    for _ in range(count):
                        scheduler.step()
    return planned


def _times(trainer: pl.Trainer, every_n_steps: int | None) -> Iterator[dict[str, Sequence[int]]]:
    """Yield, for each coming epoch, the batch and epoch numbers after which Lightning steps the schedulers."""
    now = trainer.current_epoch
    last = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else now + FAR
    known = batches_in_an_epoch(trainer, within=every_n_steps is not None)
    batches = known or 1
    every = trainer.accumulate_grad_batches
    taken = [batch for batch in range(1, batches + 1) if batch % every == 0 or batch == batches]
    left = MOST_STEPS if trainer.max_steps < 0 else min(MOST_STEPS, trainer.max_steps - trainer.global_step)
    if every_n_steps is None:
        for epoch in range(now + 1, last):
            yield {"step": taken, "epoch": [epoch + 1]}
            left -= len(taken)
            if left < 0:
                return
        return
    per_epoch = len(taken) if known else MOST_STEPS
    done = trainer.global_step
    left = min(left, last * per_epoch - done)
    for start in range(done, done + left, every_n_steps):
        steps = range(start, start + every_n_steps)
        ends = [step // per_epoch + 1 for step in steps if (step + 1) % per_epoch == 0]
        yield {"step": [taken[step % len(taken)] for step in steps], "epoch": ends}


def batches_in_an_epoch(trainer: pl.Trainer, *, within: bool) -> int | None:
    """Return the batches per epoch: from the data, else from past epochs, or None before the first has ended.

    Args:
        trainer: The run.
        within: Whether the current epoch may still be running.
    """
    if trainer.num_training_batches < float("inf"):
        return int(trainer.num_training_batches)
    progress = trainer.fit_loop.epoch_loop.batch_progress
    earlier = progress.total.ready - progress.current.ready
    if earlier > 0 and trainer.current_epoch > 0:
        return max(1, round(earlier / trainer.current_epoch))
    return None if within else max(1, progress.current.ready)


def warming_up(trainer: pl.Trainer, past: list[float], every_n_steps: int | None = None) -> bool:
    """Return whether the learning rate is planned to rise above ``WARMING_UP`` times the highest so far."""
    planned = max((max(rates) for rates in planned_rates(trainer, every_n_steps)), default=0.0)
    return planned > WARMING_UP * max(past, default=0.0)


def _stand_in(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return an optimizer with the same hyperparameters and one weight per group."""
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
