"""Reading of a training: its phase, the evidence for it, and a few numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lightning_koopman._checks import check_instance, check_positive, real_array
from lightning_koopman._types import Array
from lightning_koopman.reading.movement import movement
from lightning_koopman.reading.phase import Phase
from lightning_koopman.reading.rule import CONFIRMED, judge
from lightning_koopman.reading.steps import StepStatistics, step_statistics
from lightning_koopman.stopping.evidence import Baseline
from lightning_koopman.stopping.trend import loss_trend
from lightning_koopman.trajectory.trajectory import Trajectory

NAN = float("nan")


@dataclass(frozen=True, eq=False)
class TrainingReading:
    r"""Reading of a training at one moment, as :func:`read_training` returns it.

    An interval is the epochs, or optimizer steps, between two snapshots.  Numbers that are unknown or hidden by noise
    are NaN.  The null model is a random walk with the same step lengths: its steps have correlation 0 and spectral
    weight 1.  Standard errors are those under this null.

    Attributes:
        phase: :class:`Phase`.
        evidence: Reasons for the phase, in words.
        n_steps: Number of steps used, at most the newest 24.
        step_correlation: :math:`\rho_1`, mean cosine between successive steps, in [−1, 1]: positive where the weights
            keep their direction, negative where they turn back.
        step_correlation_error: Its standard error.
        spectral_weight: :math:`\|\sum u_t\|^2/\text{n\_steps}` of the unit steps, ≥ 0: their spectral density at
            eigenvalue 1.
        spectral_weight_error: Its standard error.
        rate: Factor per interval by which the directed part of the steps changes, ≥ 0.
        rate_range: ``rate`` ± two standard errors, at least 0.
        remaining: Distance left at this rate, relative to that from the oldest snapshot held to the newest.
        remaining_range: ``remaining`` at both ends of ``rate_range``.
        slowing: 1 − (distance over the newest 12 intervals)²/(distance over the fastest 12)², in [0, 1].  It stays near
            0 for a random walk and at constant speed, and grows to 1 as a training converges.
        loss: The newest loss.
        loss_change: Predicted change of the loss over the next 10 intervals.
        loss_change_range: Range in which that change lies in nine of ten cases.
        loss_noise: Standard deviation of the loss's fluctuations between intervals, ≥ 0.
        scale: Scale for changes of the loss: the baseline loss, or else the range of the losses so far.
        steps: :class:`StepStatistics` with all correlations and the spectral density, or None.

    Example:
        >>> import torch
        >>> from lightning_koopman import Trajectory, read_training
        >>> trajectory, losses = Trajectory(2), []
        >>> for t in range(20):
        ...     trajectory.append(torch.tensor([0.9**t, 2.0]))
        ...     losses.append(0.1 + 0.81**t)
        >>> reading = read_training(trajectory, losses[1:])
        >>> reading.phase.value, round(reading.rate, 3), round(reading.half_life, 1)
        ('descending', 0.9, 6.6)
    """

    phase: Phase
    evidence: str
    n_steps: int = 0
    step_correlation: float = NAN
    step_correlation_error: float = NAN
    spectral_weight: float = NAN
    spectral_weight_error: float = NAN
    rate: float = NAN
    rate_range: tuple[float, float] = (NAN, NAN)
    remaining: float = NAN
    remaining_range: tuple[float, float] = (NAN, NAN)
    slowing: float = NAN
    loss: float = NAN
    loss_change: float = NAN
    loss_change_range: tuple[float, float] = (NAN, NAN)
    loss_noise: float = NAN
    scale: float = NAN
    steps: StepStatistics | None = field(default=None, repr=False)
    fastest: tuple[float, int] = field(default=(0.0, 0), repr=False)
    """Distance of the fastest span, and its length in intervals."""
    judged: tuple[Phase, int] = field(default=(Phase.UNKNOWN, 0), repr=False)
    """Phase by this interval alone, and the intervals in a row that gave it; a new phase takes over after three."""

    @property
    def half_life(self) -> float:
        """Intervals in which the directed part of the steps halves; infinite where it does not shrink."""
        return _half_life(self.rate)

    @property
    def half_life_range(self) -> tuple[float, float]:
        """Half-lives at both ends of ``rate_range``."""
        return _half_life(self.rate_range[0]), _half_life(self.rate_range[1])


def read_training(
    trajectory: Trajectory,
    losses: npt.ArrayLike = (),
    *,
    baseline_loss: float | None = None,
    before: TrainingReading | None = None,
) -> TrainingReading:
    r"""Determine what a training is doing, from the inner products of its steps and its losses.

    Args:
        trajectory: Snapshots of the weights.  Only their Gram matrix is used: sketches, shards and any ``dtype`` work.
        losses: Array (t,): training losses so far, one per interval, newest last.  Without them the weights alone
            determine the phase.
        baseline_loss: Loss of a network that ignores its input, > 0: ln C for C equally frequent classes.
        before: The previous reading.  It remembers what the trajectory no longer holds, and its phase is kept until
            another one has been found for three intervals in a row.

    Returns:
        The reading; its phase is ``WARMING_UP`` for fewer than five steps.

    Raises:
        TypeError: If ``trajectory`` is not a Trajectory, or ``before`` not a reading.
        ValueError: If the losses are not a list of numbers, or the baseline is not positive.

    Example:
        >>> import torch
        >>> from lightning_koopman import Trajectory, read_training
        >>> random, trajectory = torch.Generator().manual_seed(0), Trajectory(10_000)
        >>> for _ in range(30):  # about a point, as at the noise floor of a learning rate
        ...     trajectory.append(torch.randn(10_000, generator=random))
        >>> reading = read_training(trajectory)
        >>> reading.phase.value, round(reading.step_correlation, 1)
        ('hovering', -0.5)
    """
    check_instance("trajectory", trajectory, Trajectory, "a Trajectory")
    if before is not None:
        check_instance("before", before, TrainingReading, "a TrainingReading")
    values = real_array("losses", losses).astype(np.float64)
    if values.ndim != 1:
        raise ValueError(f"losses must have shape (t,), got {values.shape}.")
    known = None if baseline_loss is None else Baseline(check_positive("baseline_loss", baseline_loss))
    unit = float(trajectory.step_norms().max(initial=0.0))
    return read_gram(
        trajectory.step_gram(), values, unit=unit, baseline=known, sketched=trajectory.sketched, before=before
    )


def read_gram(
    gram: Array,
    losses: Array,
    *,
    unit: float = 1.0,
    baseline: Baseline | None = None,
    sketched: int | None = None,
    before: TrainingReading | None = None,
) -> TrainingReading:
    """Read a training from the inner products (t, t) of its steps; see :func:`read_training`.

    Args:
        gram: Inner products of the steps, newest last, on any scale.
        losses: Training losses so far.
        unit: Length that the inner products are relative to.
        baseline: Loss of a network that ignores its input.
        sketched: Number of combinations of the weights that a sketch keeps, if only sketches are held.
        before: The previous reading.
    """
    if not np.isfinite(gram).all() or (losses.size and not np.isfinite(losses[-1])):
        return TrainingReading(Phase.DIVERGING, "the loss or the weights are not finite")
    steps, trend = step_statistics(gram, sketched=sketched), loss_trend(losses)
    moved = movement(gram, steps, unit, None if before is None else before.fastest)
    scale = _scale(losses, baseline)
    judged, evidence = judge(len(gram), steps, trend, moved, scale, baseline, None if before is None else before.phase)
    phase, running = judged, 1
    if before is not None:
        running += before.judged[1] if before.judged[0] is judged else 0
        at_once = before.phase is Phase.WARMING_UP or judged is Phase.DIVERGING
        phase = judged if at_once or running >= CONFIRMED else before.phase
        if phase is not judged:
            evidence = f"the previous phase is kept; {judged.value} for {running} interval(s) so far: {evidence}"
    known = (NAN,) * 4
    if steps is not None:
        known = float(steps.correlation[0]), float(steps.errors[0]), steps.weight, steps.density_error
    return TrainingReading(
        phase,
        evidence,
        len(gram) if steps is None else steps.count,
        *known,
        **vars(moved),
        loss=trend.newest,
        loss_change=trend.change,
        loss_change_range=trend.change_range,
        loss_noise=trend.noise,
        scale=scale,
        steps=steps,
        judged=(judged, running),
    )


def _scale(values: Array, baseline: Baseline | None) -> float:
    """Scale for changes of the loss: the baseline, or else the range of the losses."""
    finite = values[np.isfinite(values)]
    if baseline is not None and finite.size and finite.min() >= 0:  # a loss that can be negative has no floor
        return baseline.loss
    return float(np.ptp(finite[1:])) if finite.size > 2 else math.nan


def _half_life(rate: float) -> float:
    if not rate > 0:
        return rate  # 0 (gone at once) or NaN
    return math.log(0.5) / math.log(rate) if rate < 1 else math.inf
