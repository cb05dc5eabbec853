"""What is run at each scale, and which trainings each figure needs."""

from __future__ import annotations

from dataclasses import dataclass

STARTS = ("he", "xavier", "normal")
NAMES = {"he": "He", "xavier": "Xavier", "normal": "standard normal"}
PRUNED = ("he", "xavier")
LOSSES = ("L2", "Sobolev 1", "Sobolev 2", "Sobolev 1, literal", "Sobolev 2, literal", "L2, early stop")
NOISES = (0.05, 0.5, 1.0)
SPARSITY = 0.75
# the paper's main text, then its supplement
FIGURES = ("2", "3", "4", "5", "S2", "S3", "S4", "S5", "S6")
SPECTRA = {"2": "xavier", "S2": "he", "S3": "normal"}
PRUNINGS = {"3": (1, 0), "S4": (1, 1), "S5": (2, 0), "S6": (2, 1)}  # algorithm, index into ``prune_at``


@dataclass(frozen=True)
class Plan:
    """A scale of the experiments.

    Attributes:
        name: Its name.
        n_images: Number of training images, None for all.
        epochs: Epochs of a training.
        past_divergence: Epochs of the training from standard normal weights, which diverges in the paper.
        loss_epochs: Epochs after which the spectrum of the loss is shown.
        weight_epochs: Epochs after which the spectrum of the weights is shown.
        prune_at: The two epochs after which weights are pruned.
        further: Epochs of training after pruning.
        noise_epochs: Epochs of the trainings on a noisy signal.
        seeds: Number of seeds for those trainings.
        dataset: Name of the images for :func:`load`.
    """

    name: str
    n_images: int | None
    epochs: int
    past_divergence: int
    loss_epochs: tuple[int, ...]
    weight_epochs: tuple[int, ...]
    prune_at: tuple[int, int]
    further: int
    noise_epochs: int
    seeds: int
    dataset: str = "mnist"

    def epochs_of(self, start: str) -> int:
        """Return the epochs of the training from that initialization."""
        return self.past_divergence if start == "normal" else self.epochs


PLANS = {
    "small": Plan("small", 10_000, 150, 300, (40, 100, 150), (50, 100, 150), (50, 100), 50, 1500, 3),
    "full": Plan("full", None, 1000, 2000, (40, 100, 500), (50, 100, 500), (100, 500), 500, 5000, 5),
}


@dataclass(frozen=True)
class Branch:
    """A pruned training: its initialization, the epoch of pruning, and the method."""

    start: str
    point: int
    method: str

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"pruned-{self.start}-{self.point}-{self.method.replace(' ', '-')}"


@dataclass(frozen=True)
class Noisy:
    """A training on a noisy signal."""

    loss: str
    noise: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"noisy-{self.loss.replace(', ', '-').replace(' ', '-')}-{self.noise}-{self.seed}"


def methods_of(figure: str) -> tuple[str, ...]:
    """Return the methods that a pruning figure shows: an algorithm of the paper, and the baselines."""
    return (f"algorithm {PRUNINGS[figure][0]}", "magnitude", "random")


def wanted(plan: Plan, figures: tuple[str, ...]) -> tuple[list[str], list[Branch], list[Noisy]]:
    """Return the trainings, the pruned ones, and those on noisy signals that the figures need."""
    pruned = {
        (plan.prune_at[PRUNINGS[figure][1]], method)
        for figure in figures
        if figure in PRUNINGS
        for method in methods_of(figure)
    }
    branches = [Branch(start, point, method) for point, method in sorted(pruned) for start in PRUNED]
    starts = {SPECTRA[figure] for figure in figures if figure in SPECTRA} | {branch.start for branch in branches}
    noisy = [Noisy(loss, noise, seed) for seed in range(plan.seeds) for noise in NOISES for loss in LOSSES[:-1]]
    return [start for start in STARTS[::-1] if start in starts], branches, noisy if "5" in figures else []
