"""The trainings that are compared: conjugate ones, networks on digits, and modular addition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.training import data_of
from lightning_koopman import Trajectory
from lightning_koopman.demo.experiments.cache import read, save
from lightning_koopman.demo.experiments.runner import Progress, Task

UNKNOWNS, ROWS, DRAWN, RATE = 10, 40, 8, 0.02  # least squares: weights, rows, rows per step, step length
EVERY, TIME, SPREAD = 10, 60, 0.3  # steps between two snapshots, snapshots, spread of the starts
EPOCHS, BATCH = 40, 64  # on digits
PRIME, SHARE, WIDTH, STEPS, ROUND = 59, 0.5, 64, 6000, 60  # modular addition; the last two: steps, steps per snapshot

DIGITS: dict[str, tuple[tuple[int, ...], str]] = {
    "5": ((5,), "sgd"), "10": ((10,), "sgd"), "40": ((40,), "sgd"), "160": ((160,), "sgd"), "10-10": ((10, 10), "sgd"),
    "40-40": ((40, 40), "sgd"), "40, momentum": ((40,), "momentum"), "40, Adam": ((40,), "adam"),
}  # fmt: skip
DECAYS = {"decay": 1.0, "no decay": 0.0}  # weight decay: with it, modular addition generalizes late, without it not


def conjugate(kind: str, seed: int) -> Trajectory:
    """Solve online least squares with positive weights w by one of three methods.

    Mirror descent with the entropy as its potential follows the flow of gradient descent on u, where w = u²/4: the two
    are conjugate (Amid, Warmuth 2020).  Gradient descent on w follows another flow.

    Args:
        kind: ``"mirror"``, ``"gradient on u"`` or ``"gradient on w"``.
        seed: Seed of the initial weights and of the rows drawn.
    """
    drawn = np.random.default_rng(0)
    rows, solution = drawn.standard_normal((ROWS, UNKNOWNS)) / UNKNOWNS**0.5, drawn.uniform(0.5, 2.0, UNKNOWNS)
    random = np.random.default_rng(seed)
    weights = solution * np.exp(SPREAD * random.standard_normal(UNKNOWNS))
    state = 2 * np.sqrt(weights) if kind == "gradient on u" else weights
    trajectory = Trajectory(UNKNOWNS)
    for step in range(TIME * EVERY):
        if step % EVERY == 0:
            trajectory.append(state)
        seen = rows[random.integers(0, ROWS, DRAWN)]
        present = state**2 / 4 if kind == "gradient on u" else state
        gradient = seen.T @ (seen @ (present - solution)) / DRAWN
        if kind == "mirror":
            state = state * np.exp(-RATE * gradient)
        else:
            state = state - RATE * gradient * (state / 2 if kind == "gradient on u" else 1.0)
    return trajectory


def digits(widths: tuple[int, ...], optimizer: str, seed: int) -> Trajectory:
    """Train a network on scikit-learn's digits, with one snapshot per epoch."""
    (inputs, targets), _, _ = data_of("digits", None)
    torch.manual_seed(seed)
    sizes = inputs[0].numel(), *widths, 10
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    network = nn.Sequential(nn.Flatten(), *layers[:-1])
    if optimizer == "adam":
        stepper: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    else:
        momentum = 0.9 if optimizer == "momentum" else 0.0
        stepper = torch.optim.SGD(network.parameters(), lr=0.1 * (1 - momentum), momentum=momentum)
    trajectory, drawn = Trajectory(_count(network)), torch.Generator().manual_seed(seed)
    trajectory.append(_vector(network))
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(inputs), generator=drawn).split(BATCH):
            stepper.zero_grad()
            nn.functional.cross_entropy(network(inputs[chosen]), targets[chosen]).backward()
            stepper.step()
        trajectory.append(_vector(network))
    return trajectory


class Adder(nn.Module):
    """A one-layer transformer without normalization that reads a, b and = (as in Nanda et al. 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(PRIME + 1, WIDTH), nn.Parameter(torch.randn(3, WIDTH) / WIDTH**0.5)
        nn.init.normal_(self.embed.weight, std=WIDTH**-0.5)
        self.attend = nn.MultiheadAttention(WIDTH, 4, bias=False, batch_first=True)
        self.middle = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, PRIME, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x) + self.place
        last = tokens[:, -1:]  # only the output at the last token is used
        last = last + self.attend(last, tokens, tokens, need_weights=False)[0]
        return self.head((last + self.middle(last))[:, 0])


def add(decay: float, seed: int, folder: Path, name: str, reached: Progress) -> None:
    """Train on modular addition in full batches; save the factor of the trajectory and the losses."""
    pairs = torch.cartesian_prod(torch.arange(PRIME), torch.arange(PRIME))
    inputs, targets = torch.cat([pairs, torch.full((len(pairs), 1), PRIME)], 1), pairs.sum(1) % PRIME
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    known, held = order[: round(SHARE * len(pairs))], order[round(SHARE * len(pairs)) :]
    torch.manual_seed(seed)
    network = Adder()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=decay)
    trajectory, rows = Trajectory(_count(network)), []
    for step in range(STEPS + 1):
        loss = nn.functional.cross_entropy(network(inputs[known]), targets[known])
        if step % ROUND == 0:
            trajectory.append(_vector(network))
            with torch.no_grad():
                outputs = network(inputs[held])
            right = float((outputs.argmax(1) == targets[held]).double().mean())
            rows.append([step, float(loss.detach()), float(nn.functional.cross_entropy(outputs, targets[held])), right])
            reached(step // ROUND)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save(folder / f"{name}.npz", factor=trajectory.factor(), rows=np.array(rows))


def additions(seeds: range, folder: Path) -> list[Task]:
    """Return all trainings on modular addition."""
    named = [(f"{kind}-{seed}", decay, seed) for seed in seeds for kind, decay in DECAYS.items()]
    return [Task(name, add, (decay, seed, folder, name), STEPS // ROUND) for name, decay, seed in named]


def kept(path: Path, train: Callable[[], Trajectory]) -> Trajectory:
    """Load a trajectory, or train and save it; only its factor is kept, which has the same spectrum."""
    if not path.exists():
        save(path, factor=train().factor())
    return of_factor(read(path)["factor"])


def of_factor(factor: np.ndarray) -> Trajectory:
    """Return a trajectory with this factor."""
    trajectory = Trajectory(len(factor), dtype=torch.float64)
    for column in factor.T:
        trajectory.append(column)
    return trajectory


def _count(network: nn.Module) -> int:
    return sum(each.numel() for each in network.parameters())


def _vector(network: nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()
