"""Lower the learning rates of a run by a factor, under most schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import pytorch_lightning as pl

# these continue from the groups' current rates or multiply `base_lrs`: scaling both scales the schedule
SCHEDULES = (
    "ConstantLR", "CosineAnnealingLR", "ExponentialLR", "LambdaLR", "LinearLR", "MultiStepLR", "MultiplicativeLR",
    "PolynomialLR", "ReduceLROnPlateau", "StepLR",
)  # fmt: skip

ABOVE = 1.0 + 1e-6  # multiple of the minimum rate that counts as above it


def rate_groups(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the parameter groups of all optimizers, in order."""
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


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


def lower_rates(trainer: pl.Trainer, groups: Sequence[int] | None, factor: float, least: Sequence[float]) -> bool:
    """Multiply rates, and the rates that schedulers store, by a factor, down to a minimum.

    Args:
        trainer: The run.
        groups: Indices of the groups, or None for all.
        factor: The factor, in (0, 1).
        least: Minimum rate of each group.

    Returns:
        Whether a rate can still be lowered.
    """
    left, index = False, 0
    for optimizer in trainer.optimizers:
        schedulers = [each.scheduler for each in trainer.lr_scheduler_configs if each.scheduler.optimizer is optimizer]
        for place, group in enumerate(optimizer.param_groups):
            own, index = index, index + 1
            rate = float(group["lr"]) if "lr" in group else 0.0
            if (groups is not None and own not in groups) or not rate > ABOVE * least[own]:
                continue
            share = max(factor, least[own] / rate)
            group["lr"] = group["lr"].mul_(share) if isinstance(group["lr"], Tensor) else rate * share
            for scheduler in schedulers:
                _lower(scheduler, place, share)
            left = left or rate * share > ABOVE * least[own]
    return left


def _lower(scheduler: Any, place: int, share: float) -> None:
    """Scale the rates that a scheduler stores for a group."""
    for name in ("base_lrs", "_last_lr"):
        rates = getattr(scheduler, name, None)
        if rates is not None:
            setattr(scheduler, name, [each * (share if index == place else 1.0) for index, each in enumerate(rates)])
    group = scheduler.optimizer.param_groups[place]
    if "initial_lr" in group:
        group["initial_lr"] = group["initial_lr"] * share
    if place == 0 and hasattr(scheduler, "eta_min"):  # CosineAnnealingLR has one for all groups
        scheduler.eta_min *= share
