"""An average of the weights along a trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_koopman._checks import (
    check_choice,
    check_count,
    check_function,
    check_instance,
    check_positive,
    real_array,
)
from lightning_koopman._types import Array
from lightning_koopman.averaging import profiles
from lightning_koopman.averaging.persistent import persistent
from lightning_koopman.averaging.profiles import PROFILES
from lightning_koopman.reading.steps import step_statistics
from lightning_koopman.trajectory.trajectory import Trajectory

AT_ONCE = 2**26  # elements of several averages held in memory at a time
LOSS = "a function of a tensor (n,) of weights that returns their loss, or an array of losses on several batches"


@dataclass(frozen=True, eq=False)
class AveragedWeights:
    """An average of the weights, as :func:`averaged_weights` returns it.

    Attributes:
        values: Tensor (n,): the averaged weights.
        coefficients: Array (time,): share of each snapshot; they sum to 1, except for ``"persistent"``.
        length: Number of snapshots averaged; 1 is the last weights.
        tried: Lengths that were compared, shortest first.
        losses: Array (tried, batches): losses of these lengths; empty without a loss function.

    Example:
        >>> import torch
        >>> from lightning_koopman import Trajectory, averaged_weights
        >>> trajectory = Trajectory(2)
        >>> for t in range(4):
        ...     trajectory.append(torch.tensor([1.0, float(t)]))
        >>> average = averaged_weights(trajectory, "ramp", length=2)
        >>> average.values.tolist(), average.length, average.coefficients.round(2).tolist()
        ([1.0, 2.6666667461395264], 2, [0.0, 0.0, 0.33, 0.67])
    """

    values: Tensor
    coefficients: Array
    length: int
    tried: tuple[int, ...]
    losses: Array


def averaged_weights(
    trajectory: Trajectory,
    profile: str = "auto",
    *,
    length: int | Sequence[int] | None = None,
    power: float = 1.0,
    loss: Callable[[Tensor], Any] | None = None,
    scale: float | None = None,
) -> AveragedWeights:
    r"""Average the newest snapshots of the weights.

    Averaging improves weights that hover around a point at the noise floor of a learning rate, and worsens weights that
    still make progress.  So the number of snapshots is chosen from the data.  With ``loss``, averages of a few lengths
    are compared; a few batches of the *training* data suffice.  The longest average is chosen that no other one beats
    by more than 0.025 % of ``scale``.  Without ``loss`` the correlation of the steps decides, more cautiously.

    Args:
        trajectory: Snapshots of the weights.
        profile: ``"tail"``, equal shares of the newest snapshots; ``"ramp"``, shares that grow as :math:`t^p`;
            ``"fixed_point"``, the combination that moves least, regularized by the noise of the steps;
            ``"persistent"``, the Koopman reconstruction by the modes at 1 (paper, section 4), which fits the noise;
            ``"auto"``, a tail of chosen length.
        length: Number of snapshots to average, ≥ 1, or several lengths to choose from by ``loss`` (default: all that
            are held; for ``"auto"``, chosen as above).
        power: p of the ramp, > 0.
        loss: Function of weights, a tensor (n,), that returns their loss, or an array (batches,) of losses on a few
            batches, the same at each call.
        scale: Loss that differences are relative to, > 0, such as ln C for C classes (default: any difference counts).

    Returns:
        The average.

    Raises:
        TypeError: If ``trajectory`` is not a Trajectory, or ``loss`` not a function.
        ValueError: If an argument is out of range, or the trajectory is empty or holds only sketches.

    Example:
        >>> import torch
        >>> from lightning_koopman import Trajectory, averaged_weights
        >>> random, trajectory = torch.Generator().manual_seed(0), Trajectory(1000)
        >>> for t in range(40):  # about a point, as at the noise floor of a learning rate
        ...     trajectory.append(1.0 + torch.randn(1000, generator=random))
        >>> average = averaged_weights(trajectory)
        >>> average.length, round(float((average.values - 1).std()), 1)
        (10, 0.3)
        >>> best = averaged_weights(trajectory, length=(1, 5, 20), loss=lambda weights: float((weights - 1).norm()))
        >>> best.length, best.tried
        (20, (1, 5, 20))
    """
    check_instance("trajectory", trajectory, Trajectory, "a Trajectory")
    asked = check_average(profile, length, power)
    if loss is not None:
        check_function("loss", loss, LOSS)
    scale = None if scale is None else check_positive("scale", scale)
    if not len(trajectory):
        raise ValueError("the trajectory is empty: append a snapshot first.")
    if trajectory.sketched is not None:
        raise ValueError("a trajectory of sketches holds no weights to average: record with storage='ram' or 'disk'.")
    count, compared = len(trajectory), loss is not None
    lengths = lengths_to_try(trajectory, profile, asked, held=count, compared=compared)
    given = None if loss is None else lambda rows: [_losses(loss(values)) for values in combined(trajectory, rows)]
    parts, index, losses = choose(trajectory, profile, lengths, power=float(power), loss=given, scale=scale)
    return AveragedWeights(trajectory.combine(parts), parts, lengths[index], tuple(lengths), losses)


def check_average(profile: str, length: int | Sequence[int] | None, power: float) -> list[int] | None:
    """Return the lengths to try, None for any; raise ValueError or TypeError if an argument is out of range."""
    check_choice("profile", profile, PROFILES)
    check_positive("power", power)
    return None if length is None else check_lengths("length", length)


def check_lengths(name: str, length: object) -> list[int]:
    """Return one or several numbers of snapshots as a list; raise ValueError for anything else."""
    listed: Any = length.tolist() if isinstance(length, np.ndarray) else length
    if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes, bytearray)) or not len(listed):
        listed = [length]
    return [check_count(name, each, 1, "pass a number of snapshots or a list of such numbers") for each in listed]


def lengths_to_try(
    trajectory: Trajectory, profile: str, lengths: Sequence[int] | None, *, held: int, compared: bool
) -> list[int]:
    """Return the lengths to try, shortest first.

    Args:
        trajectory: The snapshots.
        profile: As for :func:`averaged_weights`.
        lengths: The lengths that were asked for, or None.
        held: Number of newest snapshots that may be averaged.
        compared: Whether losses will be compared; if not, only one length is returned.
    """
    if lengths is not None:
        found = sorted({min(each, held) for each in lengths})
    elif profile != "auto":
        found = [held]
    elif compared:
        found = profiles.lengths_up_to(held)
    else:
        gram = trajectory.step_gram()[len(trajectory) - held :, len(trajectory) - held :]
        found = [profiles.safe_length(step_statistics(gram), held)]
    return found if compared else found[-1:]


def choose(
    trajectory: Trajectory,
    profile: str,
    lengths: Sequence[int],
    *,
    power: float = 1.0,
    loss: Callable[[Array], Sequence[Array]] | None = None,
    scale: float | None = None,
) -> tuple[Array, int, Array]:
    """Choose the best of several lengths by a loss of coefficients (lengths, time); see :func:`averaged_weights`.

    Returns:
        Coefficients (time,), index of the chosen length, and the losses (lengths, batches).
    """
    given = [coefficients(trajectory, profile, each, power) for each in lengths]
    if loss is None:
        return given[-1], len(lengths) - 1, np.zeros((0, 0))
    found = loss(np.stack(given))
    if len({each.size for each in found}) > 1:
        raise ValueError("loss must return equally many losses at each call, those of the same batches.")
    losses = np.stack(found)
    index = profiles.longest_good(losses, lengths, scale)
    return given[index], index, losses


def combined(trajectory: Trajectory, rows: Array) -> Iterator[Tensor]:
    """Yield the averages of given coefficients (lengths, time), computed in one pass if they fit into memory."""
    step = len(rows) if trajectory.n * len(rows) <= AT_ONCE else 1
    for start in range(0, len(rows), step):
        yield from trajectory.combine(rows[start : start + step])


def coefficients(trajectory: Trajectory, profile: str, length: int, power: float = 1.0) -> Array:
    """Return the coefficients (time,) of an average of the newest ``length`` snapshots."""
    if length == 1 or profile in ("auto", "tail"):
        parts = profiles.tail(length)
    elif profile == "ramp":
        parts = profiles.ramp(length, power)
    elif profile == "fixed_point":  # no step ends at the oldest snapshot held
        parts = profiles.fixed_point(trajectory.step_gram()[-length:, -length:])
    else:
        return persistent(trajectory, length=length)[0]
    return profiles.place(parts, len(trajectory))


def _losses(values: npt.ArrayLike | Tensor) -> Array:
    """Convert what a loss function returned to an array (batches,); raise TypeError or ValueError if it is no loss."""
    if isinstance(values, (list, tuple)) and any(isinstance(each, Tensor) for each in values):
        values = [float(each.detach()) if isinstance(each, Tensor) else each for each in values]
    found = real_array("what loss returned", values).astype(np.float64).reshape(-1)
    if not found.size:
        raise ValueError("loss returned no number: return the loss, or a list of losses on several batches.")
    return found
