"""Tables and the figure of the compared averages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.averaging import prune
from benchmarks.averaging.compare import LOSS, POINTS, VARIANTS
from benchmarks.averaging.record import SETTINGS
from benchmarks.reading.problems import PROBLEMS, Setting
from lightning_koopman.demo.experiments.cache import read
from lightning_koopman.demo.experiments.figures import BLUE, GREEN, GREY, ORANGE, blank, save_figure
from lightning_koopman.demo.experiments.tables import markdown
from lightning_koopman.stopping.rule import StoppingReason

NOISY = 0.01  # of the baseline loss: median change of the validation loss per epoch in a noisy training
PATIENCES = 3, 5, 10
OURS = "**KoopmanWeightAveraging**"
SHOWN = {"last weights": GREY, OURS: ORANGE, "EMA 0.99": GREEN, "EMA 0.999": BLUE}
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Compared:
    """A training with the scores of its averages."""

    setting: Setting
    arrays: dict[str, npt.NDArray[Any]]

    @property
    def rows(self) -> Array:
        return self.arrays["rows"]

    @property
    def learned(self) -> bool:
        """Whether the lowest test loss is that of a network that has learned."""
        return len(self.rows) > 0 and self.setting.learned(float(self.rows[:, 4].min()))

    @cached_property
    def noisy(self) -> bool:
        """Whether the validation loss of the last weights still fluctuates in the second half."""
        late = self.rows[len(self.rows) // 2 :, 2]
        return bool(np.median(np.abs(np.diff(late))) > NOISY * self.setting.baseline)

    def judged(self, variant: str) -> Array:
        """Return the scores (tenths, 4) of an average at each tenth of the training."""
        return self.arrays["judged"][:, VARIANTS.index(variant)]

    @property
    def stopped(self) -> int:
        return int(self.arrays["stopped"])

    def early_stopping(self, patience: int) -> tuple[int, int]:
        """Return the epochs at which ``EarlyStopping`` on the validation loss stops, and whose weights it restores."""
        best, kept = np.inf, 1
        for epoch, loss in enumerate(self.rows[:, 2], 1):
            if loss < best:
                best, kept = loss, epoch
            elif epoch - kept >= patience:
                return epoch, kept
        return len(self.rows), kept

    @property
    def earliest(self) -> tuple[int, Array]:
        """The first tenth at which our average is as good as the best single epoch, else the last, and its scores."""
        ahead = self.judged(OURS)[:, POINTS] >= self.rows[:, 5].max()
        at = int(ahead.argmax()) if ahead.any() else -1
        return int(self.arrays["times"][at]), self.judged(OURS)[at]


def load(folder: Path, seeds: tuple[int, ...]) -> list[Compared]:
    """Load the compared trainings of some seeds, except those that learned nothing."""
    known = [each for each in SETTINGS if each.seed in seeds and (folder / f"{each.name}.npz").exists()]
    return [run for run in (Compared(each, read(folder / f"{each.name}.npz")) for each in known) if run.learned]


def over_time(runs: list[Compared]) -> Iterator[list[str]]:
    """Rows: each average relative to the last weights, by problem, mean over all tenths of all trainings."""
    for variant in VARIANTS[1:]:
        cells, means = [], []
        for problem in PROBLEMS:
            chosen = [run for run in runs if run.setting.problem == problem]
            if not chosen:
                cells.append("–")
                continue
            changes = np.array([(run.judged(variant) - run.judged("last weights")).mean(0) for run in chosen])
            means.append((changes[:, POINTS].mean(), 100 * changes[:, LOSS].mean() / chosen[0].setting.baseline))
            cells.append(f"{means[-1][0]:+.2f} / {means[-1][1]:+.2f}")
        points, loss = np.mean(means, axis=0)
        yield [variant, *cells, f"{points:+.2f} / {loss:+.2f}"]


def ends(runs: list[Compared]) -> Iterator[list[str]]:
    """Rows: ways to end a training, the epochs saved, and points and loss relative to the best single epoch."""
    ways: dict[str, Any] = {
        "**stop, its average kept**": lambda run: (run.stopped, run.arrays["at_stop"]),
        "the first tenth at which the average is that good, in hindsight": lambda run: run.earliest,
        "stop, last weights": lambda run: (run.stopped, run.rows[run.stopped - 1, 2:6]),
        "all epochs, KoopmanWeightAveraging": lambda run: (len(run.rows), run.judged(OURS)[-1]),
        "all epochs, last weights": lambda run: (len(run.rows), run.rows[-1, 2:6]),
        "all epochs, EMA 0.99": lambda run: (len(run.rows), run.judged("EMA 0.99")[-1]),
        "all epochs, EMA 0.999": lambda run: (len(run.rows), run.judged("EMA 0.999")[-1]),
        "all epochs, best by validation loss": lambda run: (len(run.rows), run.rows[run.rows[:, 2].argmin(), 2:6]),
    }
    for patience in PATIENCES:
        ways[f"EarlyStopping, patience {patience}, best restored"] = lambda run, p=patience: (
            run.early_stopping(p)[0],
            run.rows[run.early_stopping(p)[1] - 1, 2:6],
        )
    for name, way in ways.items():
        saved, points, losses = [], [], []
        for run in runs:
            epochs, judged = way(run)
            saved.append(100 * (1 - epochs / len(run.rows)))
            points.append(judged[POINTS] - run.rows[:, 5].max())
            losses.append(100 * (judged[LOSS] - run.rows[:, 4].min()) / run.setting.baseline)
        error = np.std(points, ddof=1) / np.sqrt(len(points)) if len(points) > 1 else np.nan
        yield [
            name,
            f"{np.mean(saved):.0f} %",
            f"{np.mean(points):+.2f} ± {error:.2f}",
            f"{min(points):+.2f}",
            f"{np.mean(losses):+.2f}",
        ]


def stops(runs: list[Compared]) -> str:
    """Describe how many trainings were ended, and why."""
    reasons = [str(run.arrays["reason"]) for run in runs]
    told = [f"{reasons.count(each.value)} {each.value}" for each in StoppingReason if each.value in reasons]
    return f"{len(runs)} trainings: {', '.join(told)}."


def figure(runs: list[Compared], path: Path) -> None:
    """Plot test points of the last weights and of averages over the epochs, for one training of each problem."""
    picture = blank(11.0, 6.2)
    axes = picture.subplots(2, 3).ravel()
    wanted = {"digits": 0.5, "friedman": 0.5, "mnist": 1e-3, "augmented": 0.5, "resnet": 0.05, "transformer": 5e-3}
    for axis, problem in zip(axes, PROBLEMS, strict=True):
        chosen = [run for run in runs if run.setting.problem == problem and run.setting.schedule == "constant"]
        run = next((run for run in chosen if run.setting.rate == wanted[problem]), chosen[0] if chosen else None)
        if run is None:
            axis.set_axis_off()
            continue
        epochs, times = np.arange(1, len(run.rows) + 1), run.arrays["times"]
        axis.plot(epochs, run.rows[:, 5], color=GREY, linewidth=1, label="last weights")
        for name, color in list(SHOWN.items())[1:]:
            axis.plot(
                times,
                run.judged(name)[:, POINTS],
                "o-",
                color=color,
                markersize=3,
                linewidth=1.4,
                label=name.strip("*"),
            )
        if str(run.arrays["reason"]) != StoppingReason.NOT_STOPPED.value:
            axis.axvline(run.stopped, color=ORANGE, linestyle=":", linewidth=1.2)
        top = max(run.rows[:, 5].max(), run.judged(OURS)[:, POINTS].max())
        middle = np.median(run.rows[len(run.rows) // 2 :, 5])
        axis.set_ylim(middle - max(4 * (top - middle), 2.0), top + 0.4 * (top - middle) + 0.1)
        axis.set_title(f"{problem}, {run.setting.optimizer} at {run.setting.rate:g}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in axes[3:]:
        axis.set_xlabel("epoch", fontsize=9)
    for axis in axes[::3]:
        axis.set_ylabel("test accuracy or R², %", fontsize=9)
    axes[-1].legend(fontsize=8, frameon=False, loc="lower right")
    save_figure(picture, path)


def report(folder: Path, seeds: tuple[int, ...], path: Path) -> str:
    """Return all tables and write the figure to ``path``."""
    runs = load(folder / "compared", seeds)
    figure(runs, path)
    head = ("points / loss relative to the last weights", *PROBLEMS, "mean")
    columns = ("end of the training", "epochs saved", "points", "worst", "loss")
    which = ("Seed " if len(seeds) == 1 else "Seeds ") + " and ".join(map(str, seeds))
    told = [
        f"{which}: {len(runs)} trainings. Mean over all tenths of a training; losses are in % of the baseline loss.",
        "\n".join(markdown(head, over_time(runs))),
    ]
    for name, noisy in (("Noisy", True), ("Quiet", False)):
        some = [run for run in runs if run.noisy is noisy]
        if some:
            told.append(f"{name} trainings, relative to the best single epoch on test data. {stops(some)}")
            told.append("\n".join(markdown(columns, ends(some))))
    pruned = list(prune.rows(folder / "pruned", seeds))
    if pruned:
        told.append("Pruned at the end: test points of magnitude pruning, and the gain of the other two over it.")
        told.append("\n".join(markdown(("sparsity", *prune.WAYS), pruned)))
    return "\n\n".join(told)
