"""Clean signals, and the sine network that learns them from noisy samples with several losses (paper, section 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_koopman.demo.experiments.runner import Progress
from lightning_koopman.demo.experiments.training import BATCH, Batches
from lightning_koopman.demo.sine import HIDDEN, LAYERS, sine_network
from lightning_koopman.demo.table1 import TABLE
from lightning_koopman.sobolev.bands import SobolevNorm, sobolev_scales
from lightning_koopman.sobolev.loss import SobolevLoss
from lightning_koopman.sobolev.noise import shrink_noise, suggest_scales

Array = npt.NDArray[np.float64]
RATE, EVERY = 2e-3, 25  # learning rate; epochs between two evaluations


@dataclass(frozen=True)
class Signal:
    """A clean signal, a function from points (N, D) of a box to values (N, M), and its number of noisy samples."""

    domain: tuple[tuple[float, float], ...]
    n_samples: int
    function: Callable[[Array], Array]

    def grid(self) -> Array:
        """Return the fine grid (N, D) on which fits are compared with the clean signal, disjoint from all samples."""
        each = 4000 if len(self.domain) == 1 else 64
        axes = [low + (high - low) * (np.arange(each) + 0.5) / each for low, high in self.domain]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(self.domain))

    def clean(self) -> Array:
        """Return the clean signal on that grid."""
        return self.function(self.grid())

    def draw(self, noise: float, seed: int) -> tuple[Array, Array, int]:
        """Draw points and noisy samples, and count the 75 % that train; noise is ε times the range (equation 9)."""
        rng = np.random.default_rng(seed)
        low, high = np.array(self.domain).T
        points = rng.uniform(low, high, (self.n_samples, len(self.domain)))
        values = self.function(points)
        deviation = noise * np.ptp(self.clean(), axis=0)
        return points, values + deviation * rng.standard_normal(values.shape), self.n_samples * 3 // 4


CHIRP = Signal(((0.0, 2.0),), 2000, next(row.function for row in TABLE if row.name == "x + sin(2πx⁴)"))


def learn(
    signal: Signal, method: str, noise: float, seed: int, epochs: int, reached: Progress, device: str = "cpu"
) -> dict[str, Any]:
    """Train the network on noisy samples of a signal, with a one-cycle learning rate.

    The method is ``"L2"``, ``"Sobolev 1"`` or ``"Sobolev 2"``, optionally with a variant after a comma: ``"literal"``
    (equations 7 and 8 as written, with the paper's linear scale), ``"shrunk"`` (targets with their noise shrunk),
    ``"batches"`` (mini-batches), ``"decay 0.1"`` (weight decay).

    Returns:
        The RMSE against the clean signal (``errors``) and the mean squared error on held-out samples (``held``), both
        every 25 epochs; and the last values on the grid (``fit``).
    """
    torch.manual_seed(seed)
    *drawn, n_train = signal.draw(noise, seed)
    points, values = (torch.as_tensor(each, dtype=torch.float32) for each in drawn)
    x, y = points[:n_train], values[:n_train]
    if method.endswith("shrunk"):
        y = torch.as_tensor(shrink_noise(x, y, domain=signal.domain))
    network = sine_network(x.shape[1], y.shape[1])
    loss = loss_of(method, signal, network, x, y)
    both = nn.ModuleList([network, loss]).to(device)
    x, y, points, values = (each.to(device) for each in (x, y, points, values))
    fine, clean = torch.as_tensor(signal.grid(), dtype=torch.float32, device=device), signal.clean()
    optimizer = torch.optim.AdamW(both.parameters(), RATE, weight_decay=float(method.partition("decay ")[2] or 0))
    in_batches = method.endswith("batches")
    batches = Batches((x, y), BATCH if in_batches else n_train, torch.default_generator if in_batches else None)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * len(batches))
    errors, held = [], []
    for epoch in range(1, epochs + 1):
        for some_x, some_y in batches:
            optimizer.zero_grad()
            loss_value(loss, network(some_x), some_y, some_x).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if epoch % EVERY == 0:
            with torch.no_grad():
                fit = network(fine).cpu().numpy()
                held.append(float((network(points[n_train:]) - values[n_train:]).square().mean()))
            errors.append(np.sqrt(((fit - clean) ** 2).mean()))
            reached(epoch)
    return {"errors": errors, "held": held, "fit": fit}


def loss_of(method: str, signal: Signal, network: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """Build the loss of a method, with scales chosen from the samples."""
    kind, _, variant = method.partition(", ")
    if kind == "L2":
        return nn.MSELoss()
    scales: Any
    options: dict[str, Any] = {"domain": signal.domain}
    if kind == "Sobolev 1":
        options |= {"network": network, "layers": LAYERS, "example": x[:2]}
    if variant == "batches":
        options["n_samples"] = len(x)
    if variant == "literal":
        options["literal"] = True
        scales = sobolev_scales(HIDDEN, "linear", start=1 if kind == "Sobolev 1" else 0)
    elif variant == "shrunk":  # the noise is already removed: all modes, equally weighted
        options["exponent"] = 0.0
        scales = most_modes(*x.shape)
    else:
        scales = suggest_scales(x, y, domain=signal.domain)
    return SobolevLoss(scales, **options)


def most_modes(n_samples: int, dim: int) -> int:
    """Return the highest mode with at most half as many cosines and sines as samples."""
    highest = 1
    while SobolevNorm((highest + 1,)).bands(1, dim).n_functions <= n_samples / 2:
        highest += 1
    return highest


def loss_value(loss: nn.Module, outputs: Tensor, targets: Tensor, points: Tensor) -> Tensor:
    """Compute the loss of a batch; only Sobolev losses use the points."""
    given = (outputs, targets, points) if isinstance(loss, SobolevLoss) else (outputs, targets)
    value: Tensor = loss(*given)
    return value
