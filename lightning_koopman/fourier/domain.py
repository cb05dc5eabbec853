"""The box of one period that contains the points, given or inferred from the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_koopman._checks import is_number

Interval = tuple[float, float]
Domain = Interval | Sequence[Interval]


def check_domain(domain: object) -> tuple[Interval, ...]:
    """Return a domain as one interval per input; raise ValueError if it is invalid."""
    domain = domain.tolist() if isinstance(domain, (np.ndarray, Tensor)) else domain
    pairs = tuple(domain) if isinstance(domain, Sequence) else ()
    if len(pairs) == 2 and all(is_number(each) for each in pairs):
        pairs = (pairs,)
    good = bool(pairs) and all(
        isinstance(pair, Sequence) and len(pair) == 2 and all(is_number(each) for each in pair) for pair in pairs
    )
    if not good or not all(low < high for low, high in pairs):
        raise ValueError(
            f"domain must be (low, high) with low < high, the ends of one period, or one such pair per input, "
            f"got {domain!r}."
        )
    return tuple((float(low), float(high)) for low, high in pairs)


def check_points(points: Tensor, box: Sequence[Interval], name: str = "points") -> None:
    """Raise ValueError unless all points (N, D) are finite and inside the box, and the dtype resolves it."""
    if is_hidden(points):  # values are unknown while a step is compiled
        return
    info = torch.finfo(torch.promote_types(points.dtype, torch.float32))  # dtype of the loss
    reach = torch.stack([points.detach().amin(0), points.detach().amax(0)]).tolist()  # both propagate NaN
    for axis, ((low, high), least, most) in enumerate(zip(box, *reach, strict=True)):
        size = max(abs(low), abs(high))
        if not max(info.tiny, info.eps * size) < high - low < info.max:
            raise ValueError(f"domain=({low:.6g}, {high:.6g}) is too fine for {info.dtype}: change unit or origin.")
        rounding = 2 * torch.finfo(points.dtype).eps * size
        slack = (high - low) * 1e-5 + rounding  # rounding of points and domain
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ValueError(f"{name} hold NaN or infinite values: remove those samples.")
        if least < low - slack or most > high + slack:
            raise ValueError(
                f"{name} reach from {least:.6g} to {most:.6g} in input {axis}, outside of the period "
                f"({low:.6g}, {high:.6g}): pass domain=(low, high) around all points, also in validation and test."
            )


def check_finite(points: Tensor) -> None:
    """Raise ValueError unless all points are finite."""
    if not is_hidden(points) and not torch.isfinite(points).all():
        raise ValueError("points hold NaN or infinite values: remove those samples.")


def match_domain(domain: tuple[Interval, ...], dim: int) -> tuple[Interval, ...]:
    """Return the domain for points with ``dim`` inputs; a single interval applies to all."""
    if len(domain) not in (1, dim):
        raise ValueError(f"domain has {len(domain)} intervals, but the points have {dim} inputs: pass one for each.")
    return domain * dim if len(domain) == 1 else domain


def is_hidden(*tensors: Tensor | None) -> bool:
    """Return whether values cannot be read, because a step is compiled or transformed by ``torch.func``."""
    return torch.compiler.is_compiling() or any(
        torch._C._functorch.is_functorch_wrapped_tensor(each) for each in tensors if each is not None
    )


def observe_domain(points: Tensor, name: str = "points") -> tuple[Interval, ...]:
    """Infer one period from the points (N, D): their range plus one mean spacing, which is exact on a grid.

    Raises:
        ValueError: If a point is not finite, the points do not differ in one of the inputs, or cannot be read.
    """
    check_finite(points)
    if is_hidden(points) and not torch.compiler.is_compiling():
        raise ValueError("domain=None is inferred from the points, which torch.func hides: pass domain=(low, high).")
    if len(points) == 1:
        raise ValueError("cannot infer `domain` from one sample: pass domain=(low, high).")
    box = []
    for axis, values in enumerate(points.detach().to(torch.float64).unbind(1)):
        different = torch.unique(values)  # sorted
        low, high = float(different[0]), float(different[-1])
        if not low < high:
            raise ValueError(f"{name} do not differ in input {axis}: leave that input out, or pass domain=(low, high).")
        box.append((low, high + (high - low) / (len(different) - 1)))
    return tuple(box)


def to_torus(points: Tensor, box: Sequence[Interval]) -> Tensor:
    """Return points (N, D) in units of the period, 0 at its beginning."""
    low, high = torch.tensor(box, dtype=points.dtype, device=points.device).unbind(1)
    return (points - low) / (high - low)
