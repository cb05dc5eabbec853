"""The readings against what happened next and against simpler rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap

from benchmarks.reading.problems import KNOWN, PROBLEMS, SETTINGS, UNSEEN, Setting, factor
from lightning_koopman.demo.experiments.cache import read
from lightning_koopman.demo.experiments.figures import blank, save_figure
from lightning_koopman.demo.experiments.tables import markdown
from lightning_koopman.dmd.gram import factor_from_increment_gram, merge_oldest
from lightning_koopman.dmd.random_walk import wishart_root
from lightning_koopman.dmd.rrr import decompose
from lightning_koopman.plots.style import INK, MUTED, PHASES
from lightning_koopman.reading.movement import movement
from lightning_koopman.reading.phase import Phase
from lightning_koopman.reading.reading import TrainingReading, read_gram
from lightning_koopman.stopping.evidence import Baseline
from lightning_koopman.stopping.trend import HORIZON, loss_trend

MATERIAL = 1.5e-3  # of the baseline loss: a fall that counts, as for the stop
FIRST = 6  # first epoch at which readings are scored
SEEN = 12  # number of losses that the rules use
GOES_ON = (Phase.DESCENDING, Phase.WARMING_UP)  # phases whose advice is to keep training
LABELS = ("training data", "test data")
SCALARS = ("step_correlation", "spectral_weight", "slowing", "loss_change")
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Run:
    """A recorded training, read epoch by epoch."""

    setting: Setting
    arrays: dict[str, npt.NDArray[Any]]

    @property
    def epochs(self) -> int:
        return len(self.arrays["rows"])

    @cached_property
    def readings(self) -> list[TrainingReading]:
        """The reading after each epoch."""
        gram, losses = self.arrays["gram"][1:, 1:], self.arrays["rows"][:, 0]
        found: list[TrainingReading] = []
        for epoch in range(1, self.epochs + 1):
            before = found[-1] if found else None
            given = {"baseline": Baseline(self.setting.baseline), "before": before}
            found.append(read_gram(gram[:epoch, :epoch], losses[:epoch], **given))
        return found

    def fell(self, label: int) -> dict[int, bool]:
        """Return, for each epoch with a known future, whether the average's loss then fell by more than its noise."""
        changes = self.arrays["falls"][:, 2 * label : 2 * label + 2]
        known = {epoch: change for epoch, change in enumerate(changes) if epoch >= FIRST and np.isfinite(change[0])}
        return {
            epoch: bool(change < -max(2 * error, MATERIAL * self.setting.baseline))
            for epoch, (change, error) in known.items()
        }

    def slope(self, column: int, epoch: int) -> float:
        """Predict the change over the horizon from the slope of the newest values."""
        values = self.arrays["rows"][max(0, epoch - SEEN) : epoch, column]
        scale = self.setting.baseline if column != 1 else float(values.mean()) or 1.0
        return float(np.polyfit(np.arange(values.size), values, 1)[0]) * HORIZON / scale

    def forecast(self, epoch: int) -> float:
        """Predict the change of the training loss by the library's own forecast, without the weights."""
        return loss_trend(self.arrays["rows"][:epoch, 0]).change / self.setting.baseline


RULES: dict[str, Callable[[Run, int], float]] = {
    "training loss slope": lambda run, epoch: run.slope(0, epoch),
    "validation loss slope": lambda run, epoch: run.slope(4, epoch),
    "gradient-norm slope": lambda run, epoch: run.slope(1, epoch),
    "training loss forecast (DMD)": lambda run, epoch: run.forecast(epoch),
}


def load(folder: Path, seeds: tuple[int, ...]) -> list[Run]:
    """Load the recorded runs of some seeds, except those that ended with NaN before the first scored reading."""
    chosen = [each for each in SETTINGS if each.seed in seeds and (folder / f"{each.name}.npz").exists()]
    runs = [Run(each, read(folder / f"{each.name}.npz")) for each in chosen]
    return [run for run in runs if run.epochs > FIRST]


def balanced(said: Bools, fell: Bools) -> float:
    """Return the balanced accuracy: mean share of right answers where the loss fell and where it did not."""
    return float(np.mean([np.mean(said[fell == each] == each) for each in (True, False) if (fell == each).any()]))


def pairs(runs: Iterable[Run], label: int) -> list[tuple[Run, int, bool]]:
    """Return all epochs whose future is known."""
    return [(run, epoch, fell) for run in runs for epoch, fell in run.fell(label).items()]


def goes_on(run: Run, epoch: int) -> bool:
    """Whether the reading says to keep training."""
    return run.readings[epoch - 1].phase in GOES_ON


def lead_error(phase: Bools, rule: Bools, fell: Bools, owner: npt.NDArray[np.int_]) -> float:
    """Return the standard error over trainings of how far the phase is ahead; ``owner`` is each answer's training."""
    members = [np.flatnonzero(owner == each) for each in np.unique(owner)]

    def lead(chosen: npt.NDArray[np.int_]) -> float:
        drawn = np.concatenate([members[each] for each in chosen])
        return balanced(phase[drawn], fell[drawn]) - balanced(rule[drawn], fell[drawn])

    trainings = (np.arange(len(members)),)
    return float(bootstrap(trainings, lead, n_resamples=999, vectorized=False, random_state=0).standard_error)


def rules(known: list[Run], unseen: list[Run], label: int) -> Iterator[list[str]]:
    """Rows: accuracy of the reading and of each rule on unseen seeds, thresholds chosen on the known one."""
    found = pairs(unseen, label)
    fell = np.array([each for *_, each in found])
    owner = np.array([unseen.index(run) for run, *_ in found])
    phase = np.array([goes_on(run, epoch) for run, epoch, _ in found])
    ours = balanced(phase, fell)
    yield ["**the phase**", f"**{ours:.1%}**", f"{np.mean(phase == fell):.1%}", ""]
    for name, rule in RULES.items():
        tried = np.array([rule(run, epoch) for run, epoch, _ in pairs(known, label)])
        truth = np.array([each for *_, each in pairs(known, label)])
        steps = np.geomspace(1e-5, 1, 61)
        best = max([*steps, 0.0, *-steps], key=lambda each: balanced(tried < -each, truth))
        said = np.array([rule(run, epoch) < -best for run, epoch, _ in found])
        ahead = f"{100 * (ours - balanced(said, fell)):+.1f} ± {100 * lead_error(phase, said, fell, owner):.1f}"
        yield [f"{name}, below {-best:.2g}", f"{balanced(said, fell):.1%}", f"{np.mean(said == fell):.1%}", ahead]


def confusion(runs: list[Run], label: int) -> Iterator[list[Any]]:
    """Rows: for each phase, how often the average's loss fell afterwards and how often not."""
    counts = Counter((run.readings[epoch - 1].phase, fell) for run, epoch, fell in pairs(runs, label))
    for phase in Phase:
        if counts[phase, True] or counts[phase, False]:
            yield [phase.value, counts[phase, True], counts[phase, False]]


def by_problem(runs: list[Run]) -> Iterator[list[str]]:
    """Rows: accuracy of the phase on each problem."""
    for problem in PROBLEMS:
        row = [problem]
        for label in range(2):
            found = pairs([run for run in runs if run.setting.problem == problem], label)
            fell = np.array([each for *_, each in found], dtype=bool)
            said = np.array([goes_on(run, epoch) for run, epoch, _ in found], dtype=bool)
            row += [f"{np.mean(said == fell):.1%}", f"{fell.mean():.0%}"] if fell.size else ["", ""]
        yield row


def changes(run: Run) -> int:
    """Count the phase changes, except in the ten epochs after a step of the learning rate."""
    phases = [reading.phase for reading in run.readings]
    rates = [factor(run.setting, epoch) for epoch in range(run.epochs)]
    steps = [epoch for epoch, (a, b) in enumerate(pairwise(rates), 1) if b < 0.5 * a]
    return sum(
        a is not b and not any(0 <= epoch - step < HORIZON for step in steps)
        for epoch, (a, b) in enumerate(pairwise(phases), 1)
    )


def unit_fractions(run: Run) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the share of the importance near 1 after each epoch: of all snapshots, and of the newest eleven."""
    gram, found = run.arrays["gram"], []
    for epoch in range(3, run.epochs + 1):
        held = gram[: epoch + 1, : epoch + 1]
        newest = merge_oldest(held, max(0, epoch - 10))
        both = (decompose(factor_from_increment_gram(each), tol=1e-3, refine=False) for each in (held, newest))
        found.append([each.unit_fraction() for each in both])
    whole, window = np.array(found).T
    return whole, window


def steadiness(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return a scalar's noise from epoch to epoch, and the spread of its trend."""
    finite = values[np.isfinite(values)]
    if finite.size < 5:
        return np.nan, np.nan
    noise = float(np.sqrt(np.mean(np.diff(finite, 2) ** 2) / 6))
    smooth = np.convolve(finite, np.ones(5) / 5, "valid")
    return noise, float(smooth.std())


def stability(runs: list[Run]) -> Iterator[list[str]]:
    """Rows: noise and trend of each scalar, medians over the trainings."""
    series = {name: [np.array([getattr(r, name) for r in run.readings]) for run in runs] for name in SCALARS}
    whole, window = zip(*(unit_fractions(run) for run in runs), strict=True)
    series |= {"unit fraction, newest 11 snapshots": list(window), "unit fraction, all snapshots": list(whole)}
    for name, curves in series.items():
        found = np.array([steadiness(each) for each in curves])
        noise, trend = np.nanmedian(found, axis=0)
        yield [name.replace("_", " "), f"{noise:.2g}", f"{trend:.2g}", f"{np.nanmedian(found[:, 0] / found[:, 1]):.2f}"]


def walk_like(run: Run, random: np.random.Generator, *, equal: bool) -> Run:
    """Return a random walk from the same start, with the same step lengths or equal ones of the same mean square."""
    gram = run.arrays["gram"]
    lengths = np.sqrt(np.diag(gram))
    if equal:
        lengths[1:] = np.sqrt(np.mean(lengths[1:] ** 2))
    root = wishart_root(random, int(run.arrays["n"]), len(gram))
    root *= lengths / np.linalg.norm(root, axis=0)
    return Run(run.setting, {**run.arrays, "gram": root.T @ root})


def convergence(runs: list[Run]) -> Iterator[list[str]]:
    """Rows: measures of "more eigenvalues near 1", early, at the end, and at the end of two random walks."""
    found: dict[str, list[list[float]]] = {"unit fraction, all": [], "unit fraction, newest 11": [], "slowing": []}
    for index, run in enumerate(run for run in runs if run.epochs > 2 * SEEN):
        random = np.random.default_rng(index)
        tried = run, walk_like(run, random, equal=False), walk_like(run, random, equal=True)
        shares = [unit_fractions(each) for each in tried]
        for row, name in enumerate(list(found)[:2]):
            found[name].append([shares[0][row][2 * SEEN - 3], *(each[row][-1] for each in shares)])
        ends = [movement(each.arrays["gram"][1:, 1:], None).slowing for each in tried]
        early = movement(run.arrays["gram"][1 : 2 * SEEN + 1, 1 : 2 * SEEN + 1], None).slowing
        found["slowing"].append([early, *ends])
    for name, each in found.items():
        values = np.array(each)
        grew = np.mean(values[:, 1] > values[:, 0])
        early, late, *walks = (f"{median:.2f}" for median in np.median(values, axis=0))
        yield [name, early, late, f"{grew:.0%}", *walks]


def coverage(runs: list[Run]) -> tuple[float, int]:
    """Return the share of loss changes over the horizon within the predicted range, and their number."""
    inside = []
    for run in runs:
        losses, constant = run.arrays["rows"][:, 0], run.setting.schedule == "constant"
        for epoch in range(SEEN, run.epochs - HORIZON + 1) if constant else ():
            low, high = run.readings[epoch - 1].loss_change_range
            inside.append(low <= losses[epoch + HORIZON - 1] - losses[epoch - 1] <= high)
    return float(np.mean(inside)), len(inside)


def draw(runs: list[Run], path: Path) -> Path:
    """Draw the phases of each run as a strip, marked where the average's loss fell in the next ten epochs."""
    from matplotlib.patches import Patch, Rectangle

    figure = blank(11, 7.2)
    axes = figure.subplots(2, 3)
    for axis, problem in zip(axes.flat, PROBLEMS, strict=True):
        own = [run for run in runs if run.setting.problem == problem and run.setting.seed == UNSEEN[0]]
        for row, run in enumerate(own):
            for epoch, reading in enumerate(run.readings):
                axis.add_patch(Rectangle((epoch, row), 1, 0.72, color=PHASES[reading.phase], linewidth=0))
            fell = [epoch - 0.5 for epoch, each in run.fell(0).items() if each]
            axis.plot(fell, [row + 0.84] * len(fell), ".", color=INK, markersize=2)
        axis.set(xlim=(0, max((run.epochs for run in own), default=1)), ylim=(len(own) or 1, 0))
        names = [f"{r.setting.optimizer} {r.setting.schedule} {r.setting.rate:g}" for r in own]
        axis.set_yticks(np.arange(len(own)) + 0.4, names, fontsize=7)
        axis.set_title(problem, fontsize=10, color=INK)
        axis.tick_params(labelsize=7, colors=INK, length=0)
        axis.spines[:].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("epochs (transformer: hundreds of steps)", fontsize=8, color=INK)
    shown = {reading.phase for run in runs for reading in run.readings}
    handles: list[Any] = [Patch(color=color, label=phase.value) for phase, color in PHASES.items() if phase in shown]
    handles += axes[0, 0].plot([], [], ".", color=INK, markersize=4, label="the average's loss fell in the next 10")
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False, labelcolor=MUTED)
    return save_figure(figure, path)


def report(folder: Path, figure: Path) -> str:
    """Return all tables in Markdown: thresholds are chosen on the known seed, results are of the others."""
    known, unseen = load(folder, KNOWN), load(folder, UNSEEN)
    lines = [f"{len(unseen)} trainings with seeds that no threshold was set on, {len(known)} with the other.", ""]
    for label, name in enumerate(LABELS):
        count = len(pairs(unseen, label))
        lines += [f"Does the loss of an average fall? Measured on {name}, {count} epochs:", ""]
        lines += markdown(("rule", "balanced accuracy", "accuracy", "lead of the phase"), rules(known, unseen, label))
        lines += ["", *markdown(("phase", "then fell", "did not"), confusion(unseen, label)), ""]
    header = ("problem", "right (training data)", "fell", "right (test data)", "fell")
    lines += [*markdown(header, by_problem(unseen)), ""]
    counts = [changes(run) for run in unseen]
    few = np.mean(np.array(counts) <= 3)
    lines += [f"Changes of phase a training: {few:.0%} have at most 3, the most is {max(counts)}.", ""]
    lines += [*markdown(("scalar", "noise", "trend", "noise / trend"), stability(unseen)), ""]
    walks = ("walk, same step lengths", "walk, equal steps")
    header = ("more eigenvalues near 1?", f"epoch {2 * SEEN}", "at the end", "grew in", *walks)
    lines += [*markdown(header, convergence(unseen)), ""]
    share, count = coverage(unseen)
    lines.append(f"Predicted range of the loss's change: it held in {share:.0%} of {count} epochs at constant rates.")
    draw(unseen, figure)
    return "\n".join(lines)
