"""Trajectories with known answers, and of a real training."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from tqdm import tqdm

from lightning_koopman import KoopmanWarning, Trajectory
from lightning_koopman.demo.cnn import PaperCNN

ACCELERATOR = os.environ.get("LIGHTNING_KOOPMAN_ACCELERATOR", "cpu")  # for training: "gpu" or "cpu"
DEVICE = "cuda" if ACCELERATOR == "gpu" else "cpu"


def koopman_warnings(caught: Iterable[Any]) -> list[str]:
    """Texts of our warnings among recorded ones."""
    return [str(each.message) for each in caught if issubclass(each.category, KoopmanWarning)]


def linear_system(eigenvalues: list[complex], n: int, time: int, seed: int = 0, noise: float = 0.0) -> np.ndarray:
    """Snapshots (time, n) of w ↦ A w, where A has the given eigenvalues (λ with Im λ > 0 stands for its pair)."""
    rng = np.random.default_rng(seed)
    blocks = []
    for value in eigenvalues:
        turn = np.array([[value.real, -value.imag], [value.imag, value.real]])
        blocks.append(turn if value.imag else turn[:1, :1])
    size = sum(len(block) for block in blocks)
    matrix = np.zeros((size, size))
    at = 0
    for block in blocks:
        matrix[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    state = np.ones(size)
    states = [state]
    for _ in range(time - 1):
        state = matrix @ state
        states.append(state)
    mixing = np.linalg.qr(rng.standard_normal((n, size)))[0] + 0.3 * rng.standard_normal((n, size)) / np.sqrt(n)
    snapshots = np.stack(states) @ mixing.T
    return snapshots + noise * rng.standard_normal(snapshots.shape)


def linear(rates: list[complex], n: int = 40, count: int = 16, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Snapshots Σ_j Re(λ_j^t v_j) with known parts."""
    drawn = np.random.default_rng(seed)
    t = np.arange(count)[:, None]
    sizes = [1.0, *[0.5] * (len(rates) - 1)]  # the first is the largest, so none ranks above it
    parts = [
        size * (np.asarray(rate) ** t * (drawn.normal(size=n) + 1j * drawn.normal(size=n))).real
        for rate, size in zip(rates, sizes, strict=True)
    ]
    return sum(parts), parts


def trajectory_of(snapshots: np.ndarray, **options: Any) -> Trajectory:
    """Record snapshots (time, n) in a trajectory, in float64 by default."""
    trajectory = Trajectory(snapshots.shape[1], **{"dtype": torch.float64, **options})
    for snapshot in snapshots:
        trajectory.append(torch.from_numpy(snapshot))
    return trajectory


def record_together(parts: list[Trajectory], snapshots: list[np.ndarray]) -> list[bool]:
    """Record the parts of a snapshot, each in a thread of its own, as processes do; return which were finite."""
    barrier, sums = Barrier(len(parts)), {}

    def add_up(rank: int, own: np.ndarray) -> np.ndarray:
        sums[rank] = own
        barrier.wait()
        total = np.sum([sums[each] for each in range(len(parts))], axis=0)
        barrier.wait()
        return total

    def record(rank: int) -> bool:
        parts[rank].all_sum = partial(add_up, rank)
        with np.errstate(invalid="ignore"):
            return parts[rank].record(snapshots[rank])

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(record, range(len(parts))))


def noisy_decay(rate: float, seed: int, time: int = 14, n: int = 60) -> np.ndarray:
    """Snapshots (time, n) of weights that decay, with noise."""
    random, weights, found = np.random.default_rng(seed), np.ones(n), []
    for _ in range(time):
        found.append(weights)
        weights = weights * (1 - rate) + 0.02 * random.standard_normal(n)
    return np.array(found)


def full_spectrum(eigenvalues: list[complex]) -> np.ndarray:
    """Return the given eigenvalues and the conjugates of the complex ones."""
    pairs = [[value, np.conj(value)] if complex(value).imag else [value] for value in eigenvalues]
    return np.array([value for pair in pairs for value in pair], dtype=complex)


def match(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices that pair two sets of eigenvalues at the least total distance."""
    assert len(ours) == len(theirs), f"{len(ours)} eigenvalues against {len(theirs)}"
    return linear_sum_assignment(np.abs(ours[:, None] - theirs[None]))


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest distance between matched eigenvalues."""
    i, j = match(np.asarray(ours), np.asarray(theirs))
    return float(np.abs(np.asarray(ours)[i] - np.asarray(theirs)[j]).max())


def vector(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return one flat copy (n,) of all given tensors."""
    return torch.cat([parameter.detach().cpu().reshape(-1) for parameter in parameters.values()])


def record(data: Any, epochs: int) -> np.ndarray:
    """Weights (epochs + 1, 65558) of the paper's CNN (He, Adam) after each epoch, by a plain loop."""
    torch.manual_seed(0)
    model = PaperCNN("he", "adam")
    optimizer = model.configure_optimizers()
    loader, _ = data.loaders()
    snapshots = [nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()]
    for _ in tqdm(range(epochs), unit="epoch", leave=False, disable=None):  # shown on a terminal only
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        snapshots.append(nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy())
    return np.stack(snapshots)


def held(trajectory: object) -> np.ndarray:
    """Return a trajectory's snapshots in float64: its increments, summed without rounding."""
    rows = [segment.double().numpy() for segment in trajectory._held.segments()]
    return np.cumsum(np.concatenate(rows), axis=0)


def assert_recorded(found: object, expected: object) -> None:
    """Assert that snapshots agree to one float32 rounding of their largest value."""
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-23 * np.abs(expected).max())
