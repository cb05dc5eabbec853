"""Lower the learning rates of a run by a factor, under most schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

# these continue from the groups' current rates or multiply `base_lrs`: scaling both scales the schedule
SCHEDULES = (
    "ConstantLR", "CosineAnnealingLR", "ExponentialLR", "LambdaLR", "LinearLR", "MultiStepLR", "MultiplicativeLR",
    "PolynomialLR", "ReduceLROnPlateau", "StepLR",
)  # fmt: skip

Change = tuple[dict[str, Any], str, Any, Any]  # a dict, a key in it, its value before and after
ABOVE = 1.0 + 1e-6  # multiple of the minimum rate that counts as above it


def rate_groups(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the parameter groups of all optimizers, in order."""
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def first_rates(trainer: pl.Trainer, known: Sequence[Sequence[float]] = ()) -> list[list[float]]:
    """Return the first rates of the groups of each optimizer; those of new groups are their present ones."""
    found = []
    for index, optimizer in enumerate(trainer.optimizers):
        groups = optimizer.param_groups
        held = list(known[index])[: len(groups)] if index < len(known) else []
        new = groups[len(held) :]
        found.append(held + [float(group.get("initial_lr", group.get("lr", 0.0))) for group in new])
    return found


def chosen_rates(trainer: pl.Trainer, groups: Sequence[int] | None) -> list[float]:
    """Return the rates of the groups with these indices (None: of all); 0 for groups without a rate."""
    rates = [float(group.get("lr", 0.0)) for group in rate_groups(trainer)]
    return rates if groups is None else [rates[index] for index in groups]


def check_rates(trainer: pl.Trainer, groups: Sequence[int] | None) -> None:
    """Raise ValueError if a group does not exist, or a scheduler sets rates that cannot be scaled.

    Args:
        trainer: The run, with its optimizers set up.
        groups: Indices of the groups to lower, or None for all.
    """
    known = rate_groups(trainer)
    for index in groups or ():
        if index >= len(known):
            raise ValueError(
                f"groups={list(groups or ())!r}, but there are only {len(known)} parameter groups: count them from 0."
            )
    for config in trainer.lr_scheduler_configs:
        name = type(config.scheduler).__name__
        if name not in SCHEDULES:
            raise ValueError(
                f"ReduceLROnNoiseFloor cannot lower the rates of the scheduler {name}: remove the scheduler or the "
                f"callback (of koopman_autopilot too), or use one of {', '.join(SCHEDULES)}."
            )


def lowered_rates(
    trainer: pl.Trainer, groups: Sequence[int] | None, factor: float, least: Sequence[Sequence[float]]
) -> tuple[list[Change], bool]:
    """Multiply rates, and the rates that schedulers store, by a factor, down to a minimum; nothing is set yet.

    Args:
        trainer: The run.
        groups: Indices of the groups, or None for all.
        factor: The factor, in (0, 1).
        least: Minimum rates of the groups of each optimizer.

    Returns:
        The changes for :func:`set_rates`, and whether a rate can be lowered further after them.
    """
    changes: list[Change] = []
    left, index = False, 0
    for optimizer, lowest in zip(trainer.optimizers, least, strict=True):
        schedulers = [each.scheduler for each in trainer.lr_scheduler_configs if each.scheduler.optimizer is optimizer]
        shares = []
        for group, minimum in zip(optimizer.param_groups, lowest, strict=True):
            rate = float(group["lr"]) if "lr" in group else 0.0
            wanted = groups is None or index in groups
            share = max(factor, minimum / rate) if wanted and rate > ABOVE * minimum else 1.0
            left, index = left or (share < 1 and rate * share > ABOVE * minimum), index + 1
            shares.append(share)
            for name in ("lr", "initial_lr"):
                if share < 1 and name in group:
                    held = group[name]
                    before = held.clone() if isinstance(held, Tensor) else float(held)
                    changes.append((group, name, before, before * share))
        for scheduler in schedulers:
            for name in ("base_lrs", "_last_lr"):
                rates = getattr(scheduler, name, None)
                if rates is not None:
                    known = [*shares[: len(rates)], *[1.0] * (len(rates) - len(shares))]
                    changes.append((vars(scheduler), name, rates, [a * b for a, b in zip(rates, known, strict=True)]))
            if hasattr(scheduler, "eta_min"):  # CosineAnnealingLR has one for all groups
                changes.append((vars(scheduler), "eta_min", scheduler.eta_min, scheduler.eta_min * shares[0]))
    return changes, left


def set_rates(changes: Sequence[Change], *, back: bool = False) -> None:
    """Set the rates of :func:`lowered_rates`, or set them back."""
    for holder, name, before, after in changes:
        value = before if back else after
        if isinstance(holder[name], Tensor):  # stays the same object, which a captured graph may read
            holder[name].copy_(value)
        else:
            holder[name] = value
