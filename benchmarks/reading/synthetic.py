"""Trajectories of known phase, as Gram matrices of their steps (a sum over parts in orthogonal subspaces)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_koopman.dmd.random_walk import wishart_root
from lightning_koopman.reading.reading import read_gram
from lightning_koopman.stopping.evidence import Baseline

Array = npt.NDArray[np.float64]
Random = np.random.Generator
BASELINE = 1.0


@dataclass(frozen=True)
class Synthetic:
    """Positions (r, time) of the orthogonal parts, the losses (time,), and the correct phases."""

    parts: list[Array]
    losses: Array
    right: tuple[str, ...]

    @property
    def gram(self) -> Array:
        """Inner products of the steps."""
        steps = [np.diff(part, axis=1) for part in self.parts]
        return np.asarray(sum(step.T @ step for step in steps))


class Draw:
    """Random values that all kinds share: dimension, number of snapshots, level of the loss and its noise."""

    def __init__(self, random: Random, least: int = 12, most: int = 100) -> None:
        self.random = random
        self.n, self.time = int(10 ** random.uniform(3, 6)), int(random.integers(least, most + 1))
        self.t = np.arange(self.time, dtype=float)
        self.level, self.noise = random.uniform(0.05, 0.5), random.uniform(0.001, 0.03)
        self.scatter = random.standard_normal(self.time)

    def flat(self, noise: float = 1.0) -> Array:
        """Return a loss that is constant up to noise."""
        return self.level * (1 + noise * self.noise * self.scatter)

    def directions(self, count: int | None = None) -> Array:
        """Return independent directions of unit mean square length, one column per snapshot."""
        return wishart_root(self.random, self.n, count or self.time) / np.sqrt(self.n)

    def walk(self, lengths: float | Array = 1.0) -> Array:
        """Return the positions of a random walk."""
        return np.cumsum(self.directions() * lengths, axis=1)

    def about(self, memory: float) -> Array:
        """Return positions around a point (Ornstein–Uhlenbeck) at a root mean square distance of 1."""
        drawn, found = self.directions(), np.empty((min(self.n, self.time), self.time))
        found[:, 0] = drawn[:, 0]
        for t in range(1, self.time):
            found[:, t] = memory * found[:, t - 1] + np.sqrt(1 - memory**2) * drawn[:, t]
        return found


def drift(random: Random) -> Synthetic:
    """Return a steady drift under noise at a constant loss."""
    d = Draw(random)
    return Synthetic([d.walk(10 ** -random.uniform(-0.5, 1)), d.t[None]], d.flat(0.1), ("drifting",))


def descent(random: Random) -> Synthetic:
    """Return a steady drift under noise with a falling loss."""
    d = Draw(random)
    losses = d.flat() + random.uniform(0.5, 2) * d.level * (1 - d.t / d.time)
    return Synthetic([d.walk(10 ** -random.uniform(-0.5, 1)), d.t[None]], losses, ("descending",))


def decay(random: Random) -> Synthetic:
    """Return one to three geometric decays to a point: descending early or settled late, redrawn if in between."""
    while True:
        d, count = Draw(random), int(random.integers(1, 4))
        rates, sizes = random.uniform(0.6, 0.97, count), random.uniform(0.3, 1, count)
        decays = sizes[:, None] * rates[:, None] ** d.t
        square, later = (decays[:, -1] ** 2).sum(), ((decays[:, -1] * rates**10) ** 2).sum()
        noise, losses = 10 ** random.uniform(-4, -2.5), d.flat(0.01) + 0.5 * (decays**2).sum(0)
        parts = [decays, noise * d.about(0.3)]
        if 0.5 * (square - later) > 5e-3:
            return Synthetic(parts, losses, ("descending",))
        if 0.5 * (square - later) < 4e-4 and square < 0.03**2:
            floor = ("hovering",) if square < (3 * noise) ** 2 else ()  # within the noise
            return Synthetic(parts, losses, ("settled", *floor))


def walk(random: Random) -> Synthetic:
    """Return a random walk."""
    d = Draw(random)
    return Synthetic([d.walk()], d.flat(), ("unknown",))


def walk_of_changing_lengths(random: Random) -> Synthetic:
    """Return a random walk whose step lengths change, as by a schedule or at random."""
    d = Draw(random)
    cosine = (1 + 0.95 * np.cos(np.pi * d.t / d.time)) / 2 + 0.01
    lengths = cosine if random.random() < 0.5 else np.exp(random.normal(0, 0.7, d.time))
    return Synthetic([d.walk(lengths)], d.flat(), ("unknown",))


def momentum(random: Random) -> Synthetic:
    """Return a random walk with momentum 0.9 and 8 steps per snapshot."""
    d, each = Draw(random, most=50), 8
    drawn = d.directions(d.time * each)
    velocity = np.zeros_like(drawn)
    for step in range(1, drawn.shape[1]):
        velocity[:, step] = 0.9 * velocity[:, step - 1] + 0.1 * drawn[:, step]
    return Synthetic([np.cumsum(velocity, axis=1)[:, each - 1 :: each]], d.flat(), ("unknown",))


def hovering(random: Random) -> Synthetic:
    """Return noise around a point."""
    d = Draw(random)
    return Synthetic([d.about(random.uniform(0, 0.85))], d.flat(), ("hovering",))


def hovering_after_descent(random: Random) -> Synthetic:
    """Return noise around a point, after an approach from 3 to 30 times its size."""
    d = Draw(random, least=45)
    fall = 0.7**d.t
    parts = [d.about(random.uniform(0, 0.85)), 10 ** random.uniform(0.5, 1.5) * fall[None]]
    return Synthetic(parts, d.flat() + d.level * fall**2, ("hovering",))


def hovering_with_drift(random: Random) -> Synthetic:
    """Return noise around a point that moves too slowly to matter."""
    d = Draw(random)
    return Synthetic([d.about(random.uniform(0, 0.6)), random.uniform(0, 0.01) * d.t[None]], d.flat(), ("hovering",))


def descent_under_noise(random: Random) -> Synthetic:
    """Return noise around a moving point with a falling loss."""
    d = Draw(random, least=20)
    losses = d.flat(0.3) + 2 * d.level * (1 - d.t / d.time)
    return Synthetic([d.about(random.uniform(0, 0.6)), random.uniform(0.4, 1) * d.t[None]], losses, ("descending",))


def oscillation(random: Random) -> Synthetic:
    """Return a rotation, or steps back and forth, under noise."""
    d = Draw(random)
    period = 2.0 if random.random() < 0.3 else random.uniform(2, min(8, d.time / 2))
    turns = 2 * np.pi * d.t / period
    circle = np.cos(turns)[None] if period == 2.0 else np.stack([np.cos(turns), np.sin(turns)])
    return Synthetic([circle, random.uniform(0, 0.3) * d.about(0.3)], d.flat(), ("oscillating",))


def saddle(random: Random) -> Synthetic:
    """Return a small growing part at an almost constant loss: drifting or descending."""
    d = Draw(random)
    grown = random.uniform(1.05, 1.3) ** (d.t - d.time + 1)
    parts = [0.3 * grown[None], 10 ** random.uniform(-3, -1.5) * d.about(0.5)]
    return Synthetic(parts, d.flat(0.02) - 1e-4 * grown**2, ("drifting", "descending"))


def explosion(random: Random) -> Synthetic:
    """Return growing steps and a growing loss."""
    d = Draw(random)
    grown = random.uniform(1.15, 1.6) ** (d.t - d.time + 1)
    parts = [10 * grown[None], 10 * grown * d.directions() * random.uniform(0, 1)]
    return Synthetic(parts, d.flat() + random.uniform(1, 100) * grown**2, ("diverging",))


def descent_of_changing_lengths(random: Random) -> Synthetic:
    """Return a descent whose steps shrink to a third, as by a schedule."""
    d = Draw(random)
    lengths = 0.65 + 0.35 * np.cos(np.pi * d.t / d.time)
    came = np.cumsum(lengths)
    losses = d.flat(0.3) + 2 * d.level * (1 - came / (came[-1] + 2))
    return Synthetic([came[None], d.walk(lengths * random.uniform(0, 1.5))], losses, ("descending",))


KINDS: list[Callable[[Random], Synthetic]] = [
    descent,
    descent_under_noise,
    descent_of_changing_lengths,
    decay,
    hovering,
    hovering_after_descent,
    hovering_with_drift,
    walk,
    walk_of_changing_lengths,
    momentum,
    drift,
    saddle,
    oscillation,
    explosion,
]


def table(seed: int, count: int) -> str:
    """Return the phases found for ``count`` trajectories of each kind, in Markdown."""
    random = np.random.default_rng(seed)
    lines = ["| trajectory | right | found |", "| --- | --- | --- |"]
    right, settled, unsettled = 0, 0, 0
    for kind in KINDS:
        found: Counter[str] = Counter()
        hits = 0
        for _ in range(count):
            drawn = kind(random)
            known = Baseline(BASELINE) if random.random() < 0.5 else None
            phase = read_gram(drawn.gram, drawn.losses[1:], baseline=known).phase.value
            found[phase] += 1
            hits += phase in drawn.right
            if "settled" not in drawn.right:
                unsettled += 1
                settled += phase == "settled"
        right += hits
        shown = ", ".join(f"{phase} {number}" for phase, number in found.most_common())
        lines.append(f"| {kind.__name__.replace('_', ' ')} | {hits / count:.1%} | {shown} |")
    lines.append(f"| **all** | **{right / count / len(KINDS):.1%}** | falsely settled: {settled} of {unsettled} |")
    return "\n".join(lines)
