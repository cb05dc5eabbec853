"""Stop rules, replayed on recorded trainings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.stopping.record import HORIZON
from benchmarks.training import Case
from lightning_koopman import RestartOnBadInitialization
from lightning_koopman.demo.experiments.cache import read
from lightning_koopman.stopping.bad_start import bad_start
from lightning_koopman.stopping.evidence import Baseline
from lightning_koopman.stopping.rule import ConvergenceRule

GRID = {"tolerance": (1e-3, 1.5e-3, 2e-3, 3e-3), "fraction": (0.7, 0.8, 0.9), "patience": (1, 2, 3, 4)}
MOST_LOST = 0.25  # points of accuracy that the chosen thresholds may lose on average
FALSE_STOP = 1.0  # points of accuracy still to gain when a stop counts as false


class Recorded:
    """A recorded training."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        stored = read(folder / f"{case.name}.npz")
        self.losses, self.factors, self.would_stop = stored["losses"], stored["factors"], int(stored["would_stop"])
        self.noticed, self.chance = int(stored["noticed"]), Baseline(*stored["chance"])
        self.validation, _, self.test_loss, self.points = stored["scores"].T
        self._verdicts: dict[tuple[float, float], list[bool]] = {}

    def agreed(self, tolerance: float, fraction: float) -> list[bool]:
        """Whether all criteria of the rule were met after each epoch."""
        if (tolerance, fraction) not in self._verdicts:
            rule = ConvergenceRule(fraction=fraction, horizon=HORIZON, tolerance=tolerance)
            self._verdicts[tolerance, fraction] = [
                rule.judge(self.losses[: epoch + 1], _unpadded(padded), self.chance).hold is None
                for epoch, padded in enumerate(self.factors)
            ]
        return self._verdicts[tolerance, fraction]

    @cached_property
    def bad_by(self) -> int:
        """Epoch by which the start is found bad, or 0."""
        check = RestartOnBadInitialization().check_epoch
        broken = np.flatnonzero(~np.isfinite(self.losses[:check]))
        if broken.size:
            return int(broken[0]) + 1
        factor = _unpadded(self.factors[check - 1])
        return check if bad_start(self.losses[:check], factor, self.chance, horizon=check) else 0

    @cached_property
    def best(self) -> float:
        return float(np.nanmax(self.points))


def _unpadded(padded: np.ndarray) -> np.ndarray | None:
    rows, columns = np.isfinite(padded).any(axis=1), np.isfinite(padded).any(axis=0)
    return padded[rows][:, columns] if columns.any() else None


Decision = tuple[int, int]  # completed epochs at the stop, and at the weights that are kept
Rule = Callable[[Recorded], Decision]


def ours(tolerance: float, fraction: float, patience: int) -> Rule:
    def decide(run: Recorded) -> Decision:
        agreed = 0
        for epoch, holds in enumerate(run.agreed(tolerance, fraction), start=1):
            agreed = agreed + 1 if holds else 0
            if agreed == patience:
                return epoch, epoch
        return len(run.losses), len(run.losses)

    return decide


def early_stopping(patience: int, *, restore: bool = True) -> Rule:
    """Lightning's ``EarlyStopping`` on the validation loss, with the best weights restored or with the last ones."""

    def decide(run: Recorded) -> Decision:
        best, kept, waited = np.inf, 1, 0
        for epoch, loss in enumerate(run.validation, start=1):
            if loss < best:
                best, kept, waited = loss, epoch, 0
            else:
                waited += 1
            if waited >= patience or not np.isfinite(loss):
                return epoch, kept if restore else epoch
        return len(run.losses), kept if restore else len(run.losses)

    return decide


def small_fall(least: float, epochs: int = 5) -> Rule:
    """Stop when the training loss fell by less than ``least`` of the baseline loss over some epochs."""

    def decide(run: Recorded) -> Decision:
        for epoch in range(epochs + 1, len(run.losses) + 1):
            if run.losses[epoch - 1 - epochs] - run.losses[epoch - 1] < least * run.chance.loss:
                return epoch, epoch
        return len(run.losses), len(run.losses)

    return decide


def fixed(epoch: int) -> Rule:
    return lambda run: (min(epoch, len(run.losses)),) * 2


PATIENCES = (2, 3, 4, 5, 7, 10, 15, 20, 30)
FAMILIES: dict[str, list[tuple[str, Rule]]] = {
    "training loss fell < c of chance in 5 epochs": [
        (f"c = {c:g}", small_fall(c)) for c in (1e-2, 5e-3, 3e-3, 2e-3, 1e-3, 5e-4, 3e-4, 1e-4, 3e-5)
    ],
    "EarlyStopping on validation loss, best restored": [(f"patience {p}", early_stopping(p)) for p in PATIENCES],
    "EarlyStopping on validation loss, last weights": [
        (f"patience {p}", early_stopping(p, restore=False)) for p in PATIENCES
    ],
    "fixed number of epochs": [(f"{e} epochs", fixed(e)) for e in (10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 100)],
}


@dataclass(frozen=True)
class Outcome:
    """Results of a rule on some runs: means, and the worst run."""

    saved: float  # % of the epochs
    least_saved: float
    lost: float  # points of accuracy below the best epoch
    doubt: float  # standard error of that mean
    most_lost: float
    loss_excess: float  # above the lowest test loss, in %
    false_stops: int


def outcome(rule: Rule, runs: list[Recorded]) -> Outcome:
    rows = []
    for run in runs:
        stopped, kept = rule(run)
        later = np.nanmax(run.points[stopped - 1 :])
        rows.append(
            (
                100 * (1 - stopped / len(run.losses)),
                run.best - run.points[kept - 1],
                100 * (run.test_loss[kept - 1] / np.nanmin(run.test_loss) - 1),
                later - run.points[kept - 1] > FALSE_STOP,
            )
        )
    saved, lost, excess, wrong = np.array(rows, dtype=float).T
    doubt = lost.std(ddof=1) / np.sqrt(lost.size) if lost.size > 1 else np.nan
    return Outcome(saved.mean(), saved.min(), lost.mean(), doubt, lost.max(), excess.mean(), int(wrong.sum()))


def choose(runs: list[Recorded]) -> dict[str, float]:
    """Return the thresholds that save most while they lose at most ``MOST_LOST`` points and never stop falsely."""
    found = []
    for values in tqdm(list(product(*GRID.values())), desc="thresholds", leave=False):
        options = dict(zip(GRID, values, strict=True))
        result = outcome(ours(**options), runs)
        found.append((result.lost > MOST_LOST or result.false_stops > 0, -result.saved, options))
    return min(found, key=lambda item: item[:2])[2]


def at_equal_saving(family: list[Outcome], saved: float) -> float:
    """Interpolate the accuracy that a family of rules loses where it saves as many epochs."""
    curve = sorted((result.saved, result.lost) for result in family)
    return float(np.interp(saved, *zip(*curve, strict=True), left=np.nan, right=np.nan))
