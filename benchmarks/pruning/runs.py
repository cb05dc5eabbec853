"""What is pruned, when, by which method, and how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from benchmarks.training import Case

STARTS, SEEDS = ("he", "xavier"), (0, 1, 2)
POINTS, FURTHER, SPARSITIES = (50, 100), 30, (0.75, 0.9)
LAST = POINTS[-1] + FURTHER
CHANNEL_POINT = POINTS[0]
# by the channels left of 16, 32 and 100: the share to remove, by layer; the first layer takes most of the time
LEFT = {
    "8, 16, 50": {"network.*.weight": 0.5},
    "4, 16, 50": {"network.0.weight": 0.75, "network.[37].weight": 0.5},
    "3, 16, 50": {"network.0.weight": 0.8, "network.[37].weight": 0.5},
    "4, 8, 25": {"network.*.weight": 0.75},
    "2, 5, 15": {"network.*.weight": 0.85},
}
METHODS = (
    "koopman, reconstruction",
    "koopman, keep",
    "koopman, reinit",
    "koopman, paper's rule",
    "magnitude",
    "ModelPruning",
    "random mask",
)
CHANNELS = ("koopman channels", "magnitude channels", "random channels")
UNPRUNED, DENSE = "unpruned", "dense, drawn anew"


@dataclass(frozen=True)
class Run:
    """One branch: a case, the epoch after which it is pruned, how, and how much."""

    case: Case
    point: int
    method: str
    amount: float | str
    """The sparsity of masks, or the channels left."""

    @property
    def name(self) -> str:
        method = self.method.replace(",", "").replace("'", "").replace(" ", "_")
        amount = self.amount.replace(", ", "-") if isinstance(self.amount, str) else f"{100 * self.amount:.0f}"
        return f"{self.case.name}-{self.point}-{method}-{amount}"


CASES = [Case("mnist", start, "adam", seed) for seed, start in product(SEEDS, STARTS)]


def runs_of(case: Case) -> Iterator[Run]:
    for point, sparsity, method in product(POINTS, SPARSITIES, METHODS):
        yield Run(case, point, method, sparsity)
    for point in POINTS:
        yield Run(case, point, DENSE, 0.0)
    for left, method in product(LEFT, CHANNELS):
        yield Run(case, CHANNEL_POINT, method, left)
