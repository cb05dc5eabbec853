"""Comparison of trainings: distances between their spectra, and tests of these against chance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from scipy.stats import permutation_test, wasserstein_distance

from lightning_koopman._checks import check_choice, check_count, check_share
from lightning_koopman._types import Array
from lightning_koopman.compare.signature import Run, signatures
from lightning_koopman.dmd.spectrum import Complex
from lightning_koopman.reading.steps import FREQUENCIES

SHUFFLES = 9999  # random splits of the runs of two groups, if there are more possible ones
VERDICTS = {
    True: "behave differently",
    False: "cannot be told apart, which does not prove them equal",
    None: "have too few runs to be told apart: train several seeds of each",
}


@dataclass(frozen=True)
class PairTest:
    """Test of two groups of trainings by one kind of distance.

    Attributes:
        groups: Indices of the two groups.
        by: ``"eigenvalues"``, or ``"steps"`` for the spectral measure of the steps.
        between: Mean distance between runs of the two groups, ≥ 0.
        within: Mean distance between runs of the same group, ≥ 0; NaN if neither group has two runs.
        p_value: Share of random splits with groups as far apart, in (0, 1]; NaN if a group has only one run.
        adjusted: ``p_value`` after Holm's correction for all tests of the comparison.
    """

    groups: tuple[int, int]
    by: str
    between: float
    within: float
    p_value: float
    adjusted: float

    def __str__(self) -> str:
        within = "" if math.isnan(self.within) else f", {self.within:.3g} within"
        value = "" if math.isnan(self.p_value) else f", p = {self.p_value:.2g}"
        return f"{self.by} {self.between:.3g} apart{within}{value}"


@dataclass(frozen=True, eq=False)
class TrainingComparison:
    """Distances between trainings, and whether chance explains them; ``print`` shows the verdict in words.

    Attributes:
        groups: Tuple: group of each run.
        distances: Dict: arrays (runs, runs) of the distances by ``"eigenvalues"`` and, if known, by ``"steps"``.
        tests: Tuple of :class:`PairTest`, one for each pair of groups and each kind of distance.
        level: Accepted rate of false alarms in all tests together.
        rank: Number of eigenvalues that were compared.

    Example:
        >>> import numpy as np
        >>> from lightning_koopman import compare_trainings, dmd_rrr
        >>> found = compare_trainings(*(dmd_rrr(1 + rate ** np.arange(12.0), delays=6) for rate in (0.5, 0.6)))
        >>> round(float(found.distances["eigenvalues"][0, 1]), 3), found.different()  # 1 and 0.5, 1 and 0.6
        (0.05, None)
    """

    groups: tuple[int, ...]
    distances: dict[str, Array]
    tests: tuple[PairTest, ...]
    level: float
    rank: int

    def different(self, first: int = 0, second: int = 1) -> bool | None:
        """Return whether two groups differ beyond chance, or None if there are too few runs to tell."""
        last = max(self.groups)
        first, second = check_count("first", first, 0, most=last), check_count("second", second, 0, most=last)
        if first == second:
            raise ValueError(f"second must be a group other than first={first}.")
        if any(test.adjusted <= self.level for test in self.tests if set(test.groups) == {first, second}):
            return True
        sizes = [self.groups.count(each) for each in (first, second)]
        least = (1 + (sizes[0] == sizes[1])) / math.comb(sum(sizes), sizes[0])  # smallest p-value of so few runs
        return False if min(sizes) > 1 and least * len(self.tests) <= self.level else None

    def order(self, by: str = "eigenvalues") -> list[int]:
        """Return the groups in the order of an average-linkage clustering, similar groups next to each other."""
        distances, member = self.distances[check_choice("by", by, tuple(self.distances))], np.array(self.groups)
        shares = np.array([(member == group) / self.groups.count(group) for group in sorted(set(self.groups))])
        apart = squareform(shares @ distances @ shares.T, checks=False)
        return list(map(int, leaves_list(linkage(apart, "average", optimal_ordering=True))))

    def __str__(self) -> str:
        lines = []
        for pair in itertools.combinations(sorted(set(self.groups)), 2):
            numbers = "; ".join(str(test) for test in self.tests if test.groups == pair)
            lines.append(f"Groups {pair[0]} and {pair[1]} {VERDICTS[self.different(*pair)]} ({numbers}).")
        note = f" after Holm's correction for {len(self.tests)} tests" if len(self.tests) > 1 else ""
        return "\n".join([*lines, f"{self.rank} eigenvalues; rate of false alarms: at most {self.level:.0%}{note}."])


def compare_trainings(*runs: Run | Sequence[Run], rank: int = 10, level: float = 0.05) -> TrainingComparison:
    r"""Compare trainings by the distances between their Koopman spectra.

    Trainings whose dynamics are the same up to a change of coordinates (conjugate ones) have equal Koopman eigenvalues
    (Redman et al., NeurIPS 2024).  Two Wasserstein distances are computed: between the leading eigenvalues in the
    complex plane, and between the spectral measures of the unit steps over frequency (:class:`TrainingReading`).
    Neither depends on the number of weights.

    Runs with different seeds differ as well.  So each argument may be a list of runs, and two groups are tested against
    random splits of their runs: all of them, or 9,999.  Two single runs have a distance but no p-value.

    Args:
        *runs: Two or more trainings or lists of them: :class:`Trajectory`, :class:`Spectrum`, or folder of a finished
            run with :class:`KoopmanSpectrumMonitor`.  Folders are compared by their common epochs (or steps),
            trajectories by as many of the newest snapshots as all have.
        rank: Number of eigenvalues to compare, the most important ones, ≥ 1; fewer if a run has fewer.
        level: Accepted rate of false alarms in all tests together, in (0, 1).

    Returns:
        The distances, tests and verdict.

    Raises:
        TypeError: If a run is of another type.
        ValueError: If there are fewer than two groups, an empty group, or fewer than six common snapshots; if snapshots
            are not equally spaced in time; or if an option is out of range.

    Example:
        >>> import torch
        >>> from lightning_koopman import Trajectory, compare_trainings
        >>> def train(rate, seed):
        ...     random, weights, run = torch.Generator().manual_seed(seed), torch.ones(100), Trajectory(100)
        ...     for _ in range(20):
        ...         run.append(weights)
        ...         weights = weights * (1 - rate) + 0.01 * torch.randn(100, generator=random)
        ...     return run
        >>> slow, fast = ([train(rate, seed) for seed in range(5)] for rate in (0.1, 0.3))
        >>> compare_trainings(slow, fast).different()
        True
    """
    rank, level = check_count("rank", rank, 1), check_share("level", level)
    groups: list[list[Run]] = [list(each) if isinstance(each, (list, tuple)) else [each] for each in runs]  # type: ignore[list-item]
    if len(groups) < 2 or not all(groups):
        raise ValueError(f"runs must be two or more trainings or lists of them, got {[len(each) for each in groups]}.")
    eigenvalues, measures = signatures([run for group in groups for run in group], rank)
    member = tuple(index for index, group in enumerate(groups) for _ in group)
    distances = {"eigenvalues": _matrix(eigenvalues, eigenvalue_distance)}
    if measures:
        distances["steps"] = _matrix(measures, lambda a, b: wasserstein_distance(FREQUENCIES, FREQUENCIES, a, b))
    asked = [(pair, name) for pair in itertools.combinations(range(len(groups)), 2) for name in distances]
    measured = [_measure(distances[name], np.array(member), pair) for pair, name in asked]
    adjusted = _holm([p_value for *_, p_value in measured])
    tests = [PairTest(*what, *found, each) for what, found, each in zip(asked, measured, adjusted, strict=True)]
    return TrainingComparison(member, distances, tuple(tests), level, eigenvalues[0].size)


def eigenvalue_distance(first: Complex, second: Complex) -> float:
    """Compute the Wasserstein-1 distance between two equally large sets of eigenvalues in the complex plane."""
    apart = np.abs(first[:, None] - second)
    return float(apart[linear_sum_assignment(apart)].mean())


def _matrix(found: Sequence[Any], distance: Callable[[Any, Any], float]) -> Array:
    """Compute the distances (runs, runs)."""
    return np.asarray(squareform([distance(a, b) for a, b in itertools.combinations(found, 2)]))


def _measure(distances: Array, member: Any, pair: tuple[int, int]) -> tuple[float, float, float]:
    """Return the mean distances between and within two groups, and the p-value of their difference."""

    def means(*groups: Any) -> tuple[float, float]:
        inner = [distances[np.ix_(g, g)].sum() / (g.size * (g.size - 1)) for g in groups if g.size > 1]
        return float(distances[np.ix_(*groups)].mean()), float(np.mean(inner)) if inner else math.nan

    def apart(first: Any, second: Any) -> float:
        return float(np.subtract(*means(first, second)))

    groups = tuple(np.flatnonzero(member == each) for each in pair)
    if min(group.size for group in groups) < 2:
        return *means(*groups), math.nan
    found = permutation_test(groups, apart, alternative="greater", n_resamples=SHUFFLES, random_state=0)
    return *means(*groups), float(found.pvalue)


def _holm(values: Sequence[float]) -> Array:
    """Adjust p-values by Holm's correction; NaN, where there was no test, stays."""
    known = np.sort([value for value in values if not math.isnan(value)])
    adjusted = np.maximum.accumulate(known * np.arange(known.size, 0, -1)).clip(max=1.0)
    return np.asarray(np.append(adjusted, math.nan)[np.searchsorted(known, values)])
