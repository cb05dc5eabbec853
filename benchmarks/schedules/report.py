"""Tables and the figure of trainings whose learning rates were set in different ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.patches import Patch, Rectangle

from benchmarks.reading.problems import Setting
from benchmarks.schedules.record import (
    AUTOPILOT,
    AVERAGE,
    CEILINGS,
    CONSTANT,
    METHODS,
    PLATEAU,
    SHARES,
    TIMES,
    TUNED,
)
from lightning_koopman import Phase
from lightning_koopman.demo.experiments.cache import Arrays, read
from lightning_koopman.demo.experiments.figures import BLUE, GREEN, GREY, ORANGE, blank, save_figure
from lightning_koopman.demo.experiments.tables import markdown
from lightning_koopman.plots.style import PHASES

EPOCH, VALIDATION, TEST_LOSS, POINTS = 0, 3, 5, 6  # columns of the rows of a training
LOSS, END = 2, 3  # columns of its final scores
LABELS = {
    CONSTANT: "constant rate, last weights", "cosine whole": "cosine over all epochs",
    AVERAGE: "average and stop, the rate stays", AUTOPILOT: "koopman_autopilot (dotted: the rate falls)",
}  # fmt: skip
SHOWN = {CONSTANT: GREY, "cosine whole": GREEN, AVERAGE: BLUE, AUTOPILOT: ORANGE}


@dataclass(frozen=True)
class Result:
    """How a training ended: points, loss relative to the baseline, and epochs relative to the ceiling, all in %."""

    points: float
    loss: float
    epochs: float


Case = dict[str, Arrays]  # all methods of a problem, optimizer, rate and seed
Way = Callable[[Case], Result]


def _last(method: str) -> Way:
    return lambda case: Result(float(case[method]["end"][END]), float(case[method]["end"][LOSS]), _epochs(case, method))


def _epochs(case: Case, method: str) -> float:
    return float(case[method]["epochs"])


def _best(method: str, column: int, sign: float) -> Way:
    """Return a way that picks the epoch of a training with the best value of a column."""

    def way(case: Case) -> Result:
        rows = case[method]["rows"]
        row = rows[np.argmax(sign * rows[:, column])]
        return Result(float(row[POINTS]), float(row[TEST_LOSS]), _epochs(case, method))

    return way


def _hindsight(method: str) -> Way:
    """Return a way that picks the horizon that is best on test data."""
    return lambda case: max((_last(f"{method} {share}")(case) for share in SHARES), key=lambda each: each.points)


WAYS: dict[str, Way] = {
    "constant rate, last epoch": _last(CONSTANT),
    "constant rate, best epoch in hindsight": _best(CONSTANT, POINTS, 1.0),
    "**koopman_autopilot**": _last(AUTOPILOT),
    "the same, the rate stays: average and stop": _last(AVERAGE),
    "ReduceLROnPlateau, EarlyStopping, best restored": _best(PLATEAU, VALIDATION, -1.0),
    "cosine over the ceiling": _last("cosine whole"),
    "cosine, best horizon in hindsight": _hindsight("cosine"),
    "OneCycle over the ceiling": _last("onecycle whole"),
    "OneCycle, best horizon in hindsight": _hindsight("onecycle"),
    "schedule-free": _last("schedulefree"),
    "Lightning's SWA": _last("swa"),
}


class Table:
    """Results (ways, cases, 3) of all ways, for the cases in which a constant rate learns.

    Args:
        folder: Folder of the recorded trainings.
        chosen: Settings of these trainings.
    """

    def __init__(self, folder: Path, chosen: list[Setting]) -> None:
        whole: dict[Setting, Case] = {}
        for setting in chosen:
            path = folder / f"{setting.name}.npz"
            if path.exists():
                case = Setting(setting.problem, setting.optimizer, "", setting.rate, setting.seed)
                whole.setdefault(case, {})[setting.schedule] = read(path)
        complete = {case: found for case, found in whole.items() if len(found) == len(METHODS)}
        self.cases = {case: found for case, found in complete.items() if _learned(case, found)}
        self.failed = [case for case in complete if case not in self.cases]
        rows = []
        for way in WAYS.values():
            results = [(case, way(found)) for case, found in self.cases.items()]
            rows.append(
                [
                    (each.points, 100 * each.loss / case.baseline, 100 * each.epochs / CEILINGS[case.problem])
                    for case, each in results
                ]
            )
        self.results: npt.NDArray[np.float64] = np.array(rows)

    def chosen(self, **wanted: object) -> npt.NDArray[np.bool_]:
        """Return a mask of the cases with these fields; ``times`` is the rate relative to the tuned one."""
        times = wanted.pop("times", None)
        found = [all(getattr(case, name) == value for name, value in wanted.items()) for case in self.cases]
        if times is not None:
            near = [_times(case) == times for case in self.cases]
            found = [both and each for both, each in zip(found, near, strict=True)]
        return np.array(found, dtype=bool)


def _learned(case: Setting, found: Case) -> bool:
    rows = found[CONSTANT]["rows"]
    return len(rows) > 0 and case.learned(float(np.nanmin(rows[:, TEST_LOSS])))


def _times(case: Setting) -> float:
    """Return a case's rate relative to the tuned one, as the nearest of :data:`TIMES`."""
    tuned = TUNED[case.problem, case.optimizer]
    return min(TIMES, key=lambda each: abs(np.log(case.rate / tuned / each)))


def by_problem(table: Table) -> Iterator[list[str]]:
    """Rows: mean points on each problem over rates and seeds, and their mean over problems."""
    for index, name in enumerate(WAYS):
        means = []
        for problem, kind in _kinds(table):
            which = table.chosen(problem=problem, optimizer=kind)
            means.append(np.nanmean(table.results[index, which, 0]) if which.any() else np.nan)
        yield [name, *("–" if np.isnan(each) else f"{each:.2f}" for each in means), f"{np.nanmean(means):.2f}"]


def by_rate(table: Table) -> Iterator[list[str]]:
    """Rows: points at each rate, spread over rates, loss and epochs, as means over problems and seeds."""
    groups = [table.chosen(problem=problem, optimizer=kind, seed=seed) for (problem, kind), seed in _groups(table)]
    for index, name in enumerate(WAYS):
        found = table.results[index]
        points = [np.nanmean(found[table.chosen(times=times), 0]) for times in TIMES]
        spread = np.mean([np.nanmax(found[group, 0]) - np.nanmin(found[group, 0]) for group in groups])
        yield [
            name,
            *(f"{each:.2f}" for each in points),
            f"{spread:.2f}",
            f"{np.nanmean(found[:, 1]):.2f}",
            f"{found[:, 2].mean():.0f} %",
        ]


def _kinds(table: Table) -> list[tuple[str, str]]:
    """Return the pairs of problem and optimizer that have cases."""
    return [kind for kind in TUNED if kind in {(case.problem, case.optimizer) for case in table.cases}]


def _groups(table: Table) -> list[tuple[tuple[str, str], int]]:
    """Return the pairs of problem and optimizer, with each seed."""
    return sorted({((case.problem, case.optimizer), case.seed) for case in table.cases})


def falls(table: Table) -> str:
    """Describe how often the rate fell and training stopped, and the points gained."""
    names, counts = list(WAYS), [len(found[AUTOPILOT]["falls"]) for found in table.cases.values()]
    ours, last = (
        table.results[names.index(name), :, 0] for name in ("**koopman_autopilot**", "constant rate, last epoch")
    )
    lost = [name for name, points in zip(names, table.results[:, :, 0], strict=True) if np.isnan(points).any()]
    ended = [found[AUTOPILOT]["epochs"] < CEILINGS[case.problem] for case, found in table.cases.items()]
    return (
        f"koopman_autopilot ended {sum(ended)} of {len(counts)} trainings before the ceiling, and lowered the rate "
        f"{sum(counts)} times, in {sum(count > 0 for count in counts)} trainings. Beside the last epoch of a constant "
        f"rate it is {ours.mean() - last.mean():+.2f} points ahead, {(ours - last).min():+.2f} at the least. Diverged, "
        f"and left out: {', '.join(lost) or 'none'}."
    )


def figure(table: Table, path: Path) -> None:
    """Plot test points over the epochs at the tuned rate, for one seed, below the autopilot's phases."""
    first = min((case.seed for case in table.cases), default=0)
    known = [case for case in table.cases if _times(case) == 1 and case.seed == first]
    picture = blank(11.0, 6.4)
    axes = picture.subplots(2, max(1, -(-len(known) // 2)), squeeze=False).ravel()
    seen = set()
    for axis, case in zip(axes, known, strict=False):
        found = table.cases[case]
        for method, color in SHOWN.items():
            rows, end = found[method]["rows"], found[method]
            axis.plot(rows[:, EPOCH], rows[:, POINTS], color=color, linewidth=1.3, label=LABELS[method])
            axis.plot(end["epochs"], end["end"][END], "o", color=color, markersize=5)
        for epoch in found[AUTOPILOT]["falls"]:
            axis.axvline(epoch, color=ORANGE, linewidth=0.8, linestyle=":")
        phases = [Phase(each) for each in found[AUTOPILOT]["phases"]]
        seen |= set(phases)
        for epoch, phase in enumerate(phases):
            strip = Rectangle((epoch, 1.01), 1, 0.05, color=PHASES[phase], linewidth=0, clip_on=False)
            strip.set_transform(axis.get_xaxis_transform())
            axis.add_patch(strip)
        top = max(float(np.nanmax(each["rows"][:, POINTS])) for each in found.values())
        middle = float(np.median(found[CONSTANT]["rows"][:, POINTS]))
        axis.set_ylim(middle - max(2 * (top - middle), 1.0), top + 0.3 * (top - middle) + 0.1)
        axis.set_title(f"{case.problem}, {case.optimizer} at {case.rate:g}", fontsize=9, pad=12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("epoch", fontsize=9)
    for axis in axes[len(known) :]:
        axis.axis("off")
    axes[0].set_ylabel("test accuracy or R², %", fontsize=9)
    handles = axes[0].get_legend_handles_labels()[0]
    handles += [Patch(color=color, label=phase.value) for phase, color in PHASES.items() if phase in seen]
    picture.legend(handles=handles, fontsize=8, frameon=False, loc="outside lower center", ncols=5)
    save_figure(picture, path)


def report(folder: Path, chosen: list[Setting], path: Path) -> str:
    """Return all tables and write the figure to ``path``."""
    table = Table(folder, chosen)
    figure(table, path)
    kinds = [f"{problem}, {kind}" for problem, kind in _kinds(table)]
    rates = "a third", "tuned", "three times", "spread", "test loss", "epochs"
    seeds = sorted({case.seed for case in table.cases})
    failed = ", ".join(f"{each.problem} {each.optimizer} {each.rate:g}" for each in table.failed) or "none"
    return "\n\n".join(
        [
            f"Seeds {', '.join(map(str, seeds))}: {len(table.cases)} problems, optimizers and rates, {len(METHODS)} "
            f"trainings of each. Left out, since a constant rate learns nothing: {failed}. {falls(table)}",
            "Test accuracy or R² in %, mean over three rates:",
            "\n".join(markdown(("points", *kinds, "mean"), by_problem(table))),
            "At a third of the tuned rate, at that and at three times it; test loss in % of the baseline loss; epochs "
            "in % of the ceiling:",
            "\n".join(markdown(("points", *rates), by_rate(table))),
        ]
    )
