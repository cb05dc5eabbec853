"""Evidence for the stop and the restart: ``python -m benchmarks.stopping``.

Trains every combination of problem, initialisation, optimizer and seed to the end, with the callbacks only reporting;
then replays the stop rules on what was recorded.  Thresholds are chosen on the runs with seeds 0 and 1 and reported on
those with seeds 2 and 3.  Finished runs are kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from scipy.optimize import curve_fit
from tqdm import tqdm

from benchmarks.training import Batches, Case, Part, Training, data_of, quiet_trainer, run_all
from lightning_koopman import EarlyStopOnUnitEigenvalues, RestartOnBadInitialization
from lightning_koopman.demo.experiments.cache import save as save_arrays
from lightning_koopman.stopping.bad_start import bad_start
from lightning_koopman.stopping.evidence import Chance
from lightning_koopman.stopping.forecast import forecast_change
from lightning_koopman.stopping.rule import ConvergenceRule

EPOCHS, HORIZON = 100, 10
PROBLEMS = ("digits", "mnist", "friedman")
STARTS = ("he", "xavier", "normal", "5he")
SANE = ("he", "xavier")
OPTIMIZERS = ("adam", "sgd")
KNOWN, UNSEEN = (0, 1), (2, 3)  # seeds
GRID = {"tolerance": (1e-3, 1.5e-3, 2e-3, 3e-3), "fraction": (0.7, 0.8, 0.9), "patience": (1, 2, 3, 4)}
MOST_LOST = 0.25  # points of accuracy that the choice of thresholds allows, on average
FALSE_STOP = 1.0  # points of accuracy that the run would still have gained


# -- training ---------------------------------------------------------------------------------------------------------


CASES = [
    Case(problem, start, optimizer, seed)
    for problem, start, optimizer in product(PROBLEMS, STARTS, OPTIMIZERS)
    for seed in (KNOWN + UNSEEN if start in SANE else KNOWN)
]


def epochs_of(case: Case) -> int:
    """Epochs that a case is trained."""
    return EPOCHS if case.start != "5he" else RestartOnBadInitialization().check_epoch + 2  # only its start matters


class RecordingStop(EarlyStopOnUnitEigenvalues):
    """Keeps what the rule was given, for the replay."""

    def __init__(self, **options: Any) -> None:
        super().__init__(mode="report", **options)
        self.factors: list[np.ndarray] = []

    def on_snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, recorded: bool) -> None:
        padded = np.full((HORIZON + 1, HORIZON + 1), np.nan)
        if recorded:
            factor = self.recorder.trajectory.factor(last=HORIZON + 1)
            padded[: factor.shape[0], : factor.shape[1]] = factor
        self.factors.append(padded)
        super().on_snapshot(trainer, pl_module, epoch, recorded)


class Noticing(RestartOnBadInitialization):
    """Notes a bad start, and lets it go on."""

    noticed = 0

    def _act(self, trainer: pl.Trainer, epoch: int, reason: str) -> None:
        self.noticed, self._settled = epoch, True


class Scores(pl.Callback):
    """Validation and test after each epoch."""

    def __init__(self, *parts: Part) -> None:
        self.parts, self.rows = parts, []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rows.append([number for part in self.parts for number in pl_module.score(part)])


def train(case: Case, root: Path | None, folder: Path) -> None:
    """Train one case and save what was recorded."""
    torch.set_num_threads(1)
    training, validation, test = data_of(case.problem, root)
    stop, start, scores = RecordingStop(horizon=HORIZON), Noticing(), Scores(validation, test)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = quiet_trainer(scratch, max_epochs=epochs_of(case), callbacks=[stop, start, scores])
        trainer.fit(Training(case), Batches(training, case.seed))
    save_arrays(
        folder / f"{case.name}.npz",
        losses=[row["value"] for row in stop.history],
        factors=np.stack(stop.factors),
        scores=np.array(scores.rows),
        chance=[stop.chance.loss, stop.chance.error],
        would_stop=stop.would_stop_epoch or 0,
        noticed=start.noticed,
    )


def train_all(cases: list[Case], root: Path | None, folder: Path, jobs: int) -> None:
    """Train what is missing, several at a time, with progress."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [case for case in cases if not (folder / f"{case.name}.npz").exists()]
    order = sorted(missing, key=lambda case: case.problem != "mnist")  # the longest first
    run_all(jobs, [(case.name, epochs_of(case), train, (case, root, folder)) for case in order])


# -- replay -----------------------------------------------------------------------------------------------------------


class Recorded:
    """A recorded training."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        with np.load(folder / f"{case.name}.npz") as stored:
            self.losses, self.factors, self.would_stop = stored["losses"], stored["factors"], int(stored["would_stop"])
            self.noticed, self.chance = int(stored["noticed"]), Chance(*stored["chance"])
            self.validation, _, self.test_loss, self.points = stored["scores"].T
        self._verdicts: dict[tuple[float, float], list[bool]] = {}

    def agreed(self, tolerance: float, fraction: float) -> list[bool]:
        """Whether the rule's witnesses agreed, epoch by epoch."""
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


Decision = tuple[int, int]  # completed epochs when it stops, and those of the weights that are kept
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
    """Stop when the training loss fell by less than ``least`` of the chance loss over some epochs."""

    def decide(run: Recorded) -> Decision:
        for epoch in range(epochs + 1, len(run.losses) + 1):
            if run.losses[epoch - 1 - epochs] - run.losses[epoch - 1] < least * run.chance.loss:
                return epoch, epoch
        return len(run.losses), len(run.losses)

    return decide


def fixed(epoch: int) -> Rule:
    return lambda run: (min(epoch, len(run.losses)),) * 2


FAMILIES: dict[str, list[tuple[str, Rule]]] = {
    "training loss fell < c of chance in 5 epochs": [
        (f"c = {c:g}", small_fall(c)) for c in (1e-2, 5e-3, 3e-3, 2e-3, 1e-3, 5e-4, 3e-4, 1e-4, 3e-5)
    ],
    "EarlyStopping on validation loss, best restored": [
        (f"patience {p}", early_stopping(p)) for p in (2, 3, 4, 5, 7, 10, 15, 20, 30)
    ],
    "EarlyStopping on validation loss, last weights": [
        (f"patience {p}", early_stopping(p, restore=False)) for p in (2, 3, 4, 5, 7, 10, 15, 20, 30)
    ],
    "fixed number of epochs": [(f"{e} epochs", fixed(e)) for e in (10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 100)],
}


@dataclass(frozen=True)
class Outcome:
    """What a rule did to some runs: means, and the worst run."""

    saved: float  # % of the epochs
    least_saved: float
    lost: float  # points of accuracy below the best epoch
    doubt: float  # standard error of that mean
    most_lost: float
    loss_excess: float  # % of the least test loss
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
    """The thresholds that save most among those that lose at most ``MOST_LOST`` points and never stop falsely."""
    found = []
    for values in tqdm(list(product(*GRID.values())), desc="thresholds", leave=False):
        options = dict(zip(GRID, values, strict=True))
        result = outcome(ours(**options), runs)
        found.append((result.lost > MOST_LOST or result.false_stops > 0, -result.saved, options))
    return min(found, key=lambda item: item[:2])[2]


def at_equal_saving(family: list[Outcome], saved: float) -> float:
    """Accuracy that a family of rules loses where it saves as much, by interpolation between its thresholds."""
    curve = sorted((result.saved, result.lost) for result in family)
    return float(np.interp(saved, *zip(*curve, strict=True), left=np.nan, right=np.nan))


# -- the forecast -----------------------------------------------------------------------------------------------------


def exponential_change(values: np.ndarray) -> float:
    """Change over the horizon by a fit of a + b exp(−c t)."""
    t = np.arange(values.size, dtype=float)
    start = (values[-1], values[0] - values[-1], 0.2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            a, b, c = curve_fit(lambda t, a, b, c: a + b * np.exp(-c * t), t, values, start, maxfev=2000)[0]
        change = a + b * np.exp(-c * (t[-1] + HORIZON)) - values[-1]
    except (RuntimeError, FloatingPointError):
        return 0.0
    return float(change) if np.isfinite(change) else 0.0


def forecast_errors(runs: list[Recorded]) -> dict[str, np.ndarray]:
    """Errors of the predicted change over the horizon, in % of the chance loss, over all epochs of all runs."""
    errors: dict[str, list[float]] = {"Hankel DMD (ours)": [], "exponential fit": [], "no change": []}
    for run in runs:
        for epoch in range(HORIZON + 2, len(run.losses) - HORIZON + 1):
            seen = run.losses[epoch - HORIZON - 2 : epoch]
            actual = run.losses[epoch + HORIZON - 1] - seen[-1]
            for name, predicted in zip(
                errors, (forecast_change(seen, HORIZON).change, exponential_change(seen), 0.0), strict=True
            ):
                errors[name].append(100 * abs(predicted - actual) / run.chance.loss)
    return {name: np.array(values) for name, values in errors.items()}


# -- report -----------------------------------------------------------------------------------------------------------


def report(folder: Path, figure: Path | None) -> str:
    """All tables as Markdown; draws the curve."""
    runs = [Recorded(case, folder) for case in CASES if (folder / f"{case.name}.npz").exists()]
    sane = [run for run in runs if run.case.start in SANE]
    known, unseen = ([run for run in sane if run.case.seed in seeds] for seeds in (KNOWN, UNSEEN))
    default = EarlyStopOnUnitEigenvalues()
    options = choose(known)
    heading = (
        "| {} | epochs saved | least | accuracy lost (points) | most | test loss above least | false stops |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    lines = [
        f"{len(runs)} trainings, {len(sane)} of them from He or Xavier weights: {len(known)} to choose thresholds "
        f"(seeds 0 and 1), {len(unseen)} to report (seeds 2 and 3).",
        f"Chosen: {', '.join(f'{name} {value:g}' for name, value in options.items())}; the callback's defaults: "
        f"tolerance {default.rule.tolerance:g}, fraction {default.rule.fraction:g}, patience {default.patience:g}.",
        "",
        heading.format("rule, on the unseen half"),
    ]
    defaults = {"tolerance": default.rule.tolerance, "fraction": default.rule.fraction, "patience": default.patience}
    named: list[tuple[str, Rule]] = [
        ("**`EarlyStopOnUnitEigenvalues`, thresholds from the known half**", ours(**options))
    ]
    if defaults != options:
        named.append(("**`EarlyStopOnUnitEigenvalues`, defaults**", ours(**defaults)))
    named += [
        ("`EarlyStopping(val_loss, patience=5)`, best restored", early_stopping(5)),
        ("`EarlyStopping(val_loss, patience=5)`, last weights", early_stopping(5, restore=False)),
        ("training loss fell < 1e-3 of chance in 5 epochs", small_fall(1e-3)),
        ("last epoch", fixed(EPOCHS)),
    ]
    for name, rule in named:
        lines.append(_row(name, outcome(rule, unseen)))
    chosen = outcome(named[0][1], unseen)
    curves = {name: [outcome(rule, unseen) for _, rule in family] for name, family in FAMILIES.items()}
    lines += [
        "",
        f"Points of accuracy lost at equal epochs saved, {chosen.saved:.1f} %: ours {chosen.lost:.2f} ± "
        f"{chosen.doubt:.2f}; "
        + "; ".join(f"{name}: {at_equal_saving(curve, chosen.saved):.2f}" for name, curve in curves.items())
        + ".",
    ]
    lines += ["", heading.format("unseen half, by problem")]
    for problem in PROBLEMS:
        part = [run for run in unseen if run.case.problem == problem]
        if part:
            lines += [_row(f"{problem}: {name}", outcome(rule, part)) for name, rule in named]
    lines += _starts(runs, ours(**defaults))
    errors = forecast_errors(sane)
    lines += ["", f"| predicted change over {HORIZON} epochs | median error | mean error | 95th percentile |",
              "| --- | ---: | ---: | ---: |"]  # fmt: skip
    for name, values in errors.items():
        lines.append(f"| {name} | {np.median(values):.3f} | {values.mean():.3f} | {np.percentile(values, 95):.3f} |")
    lines.append(f"\nErrors in % of the chance loss, {len(values):,} forecasts from the {len(sane)} trainings.")
    rule = ours(**defaults)
    live = [run.bad_by == run.noticed and (run.would_stop or len(run.losses)) == rule(run)[0] for run in runs]
    lines.append(f"\nThe callbacks themselves decided as the replay does in {sum(live)} of {len(live)} trainings.")
    if figure is not None:
        grid = [
            outcome(ours(tolerance, options["fraction"], int(options["patience"])), unseen)
            for tolerance in (*GRID["tolerance"], 1e-2, 2e-2)
        ]
        draw({"Koopman, two witnesses (ours)": grid, **curves}, chosen, figure)
    return "\n".join(lines)


def _row(name: str, result: Outcome) -> str:
    return (
        f"| {name} | {result.saved:.1f} % | {result.least_saved:.0f} % | {result.lost:.2f} ± {result.doubt:.2f} | "
        f"{result.most_lost:.2f} | "
        f"{result.loss_excess:.1f} % | {result.false_stops} |"
    )


def _starts(runs: list[Recorded], rule: Rule) -> list[str]:
    lines = [
        "",
        "| start | trainings | found bad | by epoch | stopped as converged | falsely | best accuracy |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for problem, start in product(PROBLEMS, STARTS):
        part = [run for run in runs if (run.case.problem, run.case.start) == (problem, start)]
        if not part:
            continue
        found = [epoch for run in part if (epoch := run.bad_by)]
        finite = [run.best for run in part if np.isfinite(run.points).any()]
        whole = start != "5he"
        stops = sum(rule(run)[0] < len(run.losses) for run in part) if whole else "–"
        falsely = outcome(rule, part).false_stops if whole else "–"
        lines.append(
            f"| {problem}, {start} | {len(part)} | {len(found)} | {max(found, default='–')} | {stops} | {falsely} | "
            f"{min(finite, default=np.nan):.1f}–{max(finite, default=np.nan):.1f} |"
        )
    return lines


def draw(curves: dict[str, list[Outcome]], chosen: Outcome, path: Path) -> None:
    """Accuracy lost against epochs saved, for all rules."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axis = figure.subplots()
    colors, markers = ("#0b6e99", "#c2571a", "#5b7f2b", "#a3b86c", "#8a929c"), "osDv^"
    for (name, curve), color, marker in zip(curves.items(), colors, markers, strict=True):
        points = sorted((result.saved, result.lost) for result in curve)
        axis.plot(*zip(*points, strict=True), f"{marker}-", color=color, markersize=5, linewidth=1.5, label=name)
    axis.plot(
        chosen.saved, chosen.lost, "*", color="#0b6e99", markersize=17, label="ours, thresholds from the known half"
    )
    axis.axhline(0.3, color="#8a929c", linewidth=0.8, linestyle="--")
    axis.text(1, 0.31, "0.3 points", fontsize=8, color="#8a929c")
    axis.set(xlim=(0, 92), ylim=(0, 1.4), xlabel="epochs saved (%)", ylabel="accuracy lost to the best epoch (points)")
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.98))
    axis.grid(color="#8a929c", alpha=0.25, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stopping", description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("LIGHTNING_KOOPMAN_DATA"))
    parser.add_argument("--output", type=Path, default=Path("koopman_stopping"), help="folder of the recorded runs")
    parser.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0))), help="trainings at a time")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--figure", type=Path, help="where the curve is drawn (default: in the output folder)")
    options = parser.parse_args()
    cases = [case for case in CASES if case.problem in options.problems]
    if options.data_root is None and "mnist" in options.problems:
        print("MNIST is left out: LIGHTNING_KOOPMAN_DATA or --data-root names the folder that holds MNIST/.")
        cases = [case for case in cases if case.problem != "mnist"]
    train_all(cases, options.data_root, options.output, options.jobs)
    text = report(options.output, options.figure or options.output / "stopping.png")
    (options.output / "report.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
