"""Clean signals, noisy samples of them, and the losses by which the sine network learns them (paper, section 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from lightning_koopman.demo.sine import HIDDEN, LAYERS
from lightning_koopman.demo.table1 import TABLE
from lightning_koopman.sobolev.bands import sobolev_scales
from lightning_koopman.sobolev.loss import SobolevLoss
from lightning_koopman.sobolev.noise import suggest_scales

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Signal:
    """A clean signal on a box, and how many noisy samples of it there are.

    Attributes:
        domain: Ends of the box, an input each.
        n_samples: Number of samples.
        function: From points (N, D) to values (N, M).
    """

    domain: tuple[tuple[float, float], ...]
    n_samples: int
    function: Callable[[Array], Array]

    def grid(self) -> Array:
        """The fine grid (N, D) where fits are compared with the clean signal, disjoint from all samples."""
        each = 4000 if len(self.domain) == 1 else 64
        axes = [low + (high - low) * (np.arange(each) + 0.5) / each for low, high in self.domain]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(self.domain))

    def clean(self) -> Array:
        """The signal on that grid."""
        return self.function(self.grid())

    def draw(self, noise: float, seed: int) -> tuple[Array, Array, int]:
        """Points and samples, with noise of ε times the signal's range (equation 9), and how many train: 75 %."""
        rng = np.random.default_rng(seed)
        low, high = np.array(self.domain).T
        points = rng.uniform(low, high, (self.n_samples, len(self.domain)))
        values = self.function(points)
        deviation = noise * np.ptp(self.clean(), axis=0)
        return points, values + deviation * rng.standard_normal(values.shape), self.n_samples * 3 // 4


CHIRP = Signal(((0.0, 2.0),), 2000, next(row.function for row in TABLE if row.name == "x + sin(2πx⁴)"))


def loss_of(
    name: str, signal: Signal, network: nn.Module, x: Tensor, y: Tensor, *, scales: Any = None, **options: Any
) -> nn.Module:
    """The loss of that name: ``"L2"``, ``"Sobolev 1"`` or ``"Sobolev 2"``, each maybe with a variant after a comma.

    Args:
        name: Its name; ``", literal"`` takes equations 7 and 8 as written, with the paper's linear scale.
        signal: What is learned.
        network: What learns it.
        x: Points that train.
        y: Samples there.
        scales: Scales, if they shall not be taken from the samples.
        **options: Others of :class:`SobolevLoss`.
    """
    kind, _, variant = name.partition(", ")
    if kind == "L2":
        return nn.MSELoss()
    literal = variant == "literal"
    if kind == "Sobolev 1":
        options |= {"network": network, "layers": LAYERS, "example": x[:2]}
    if literal:
        scales = sobolev_scales(HIDDEN, "linear", start=1 if kind == "Sobolev 1" else 0)
    elif scales is None:
        scales = suggest_scales(x, y, domain=signal.domain)
    return SobolevLoss(scales, domain=signal.domain, literal=literal, **options)


def loss_value(loss: nn.Module, outputs: Tensor, targets: Tensor, points: Tensor) -> Tensor:
    """The loss of a batch; only Sobolev losses look at the points."""
    given = (outputs, targets, points) if isinstance(loss, SobolevLoss) else (outputs, targets)
    value: Tensor = loss(*given)
    return value
