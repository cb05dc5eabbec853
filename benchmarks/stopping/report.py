"""Tables and the figure of the replayed stop rules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import curve_fit

from benchmarks.stopping.record import CASES, EPOCHS, HORIZON, KNOWN, PROBLEMS, SANE, STARTS, UNSEEN
from benchmarks.stopping.replay import (
    FAMILIES,
    GRID,
    Outcome,
    Recorded,
    Rule,
    at_equal_saving,
    choose,
    early_stopping,
    fixed,
    ours,
    outcome,
    small_fall,
)
from lightning_koopman import EarlyStopOnUnitEigenvalues
from lightning_koopman.demo.experiments.figures import BLUE, GREEN, GREY, OLIVE, ORANGE, blank, grid, save_figure
from lightning_koopman.demo.experiments.tables import markdown
from lightning_koopman.stopping.forecast import forecast_change

COLUMNS = ("epochs saved", "least", "accuracy lost (points)", "most", "test loss above least", "false stops")


def exponential_change(values: np.ndarray) -> float:
    """Predict the change over the horizon by a fit of a + b exp(−c t)."""
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
    """Return errors of the predicted change over the horizon, in % of the baseline loss, for all epochs of all runs."""
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


def report(folder: Path, figure: Path | None) -> str:
    """Return all tables in Markdown and draw the curve."""
    runs = [Recorded(case, folder) for case in CASES if (folder / f"{case.name}.npz").exists()]
    sane = [run for run in runs if run.case.start in SANE]
    known, unseen = ([run for run in sane if run.case.seed in seeds] for seeds in (KNOWN, UNSEEN))
    default = EarlyStopOnUnitEigenvalues()
    options = choose(known)
    lines = [
        f"{len(runs)} trainings, {len(sane)} of them from He or Xavier weights: {len(known)} to choose thresholds "
        f"(seeds 0 and 1), {len(unseen)} to report (seeds 2 and 3).",
        f"Chosen: {', '.join(f'{name} {value:g}' for name, value in options.items())}; the callback's defaults: "
        f"tolerance {default.rule.tolerance:g}, fraction {default.rule.fraction:g}, patience {default.patience:g}.",
        "",
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
    lines += markdown(
        ("rule, on the unseen half", *COLUMNS), [_row(name, outcome(rule, unseen)) for name, rule in named]
    )
    chosen = outcome(named[0][1], unseen)
    curves = {name: [outcome(rule, unseen) for _, rule in family] for name, family in FAMILIES.items()}
    lines += [
        "",
        f"Points of accuracy lost at equal epochs saved, {chosen.saved:.1f} %: ours {chosen.lost:.2f} ± "
        f"{chosen.doubt:.2f}; "
        + "; ".join(f"{name}: {at_equal_saving(curve, chosen.saved):.2f}" for name, curve in curves.items())
        + ".",
        "",
    ]
    parts = {problem: [run for run in unseen if run.case.problem == problem] for problem in PROBLEMS}
    lines += markdown(
        ("unseen half, by problem", *COLUMNS),
        [
            _row(f"{problem}: {name}", outcome(rule, part))
            for problem, part in parts.items()
            if part
            for name, rule in named
        ],
    )
    lines += ["", *markdown(STARTED, _starts(runs, ours(**defaults))), ""]
    errors = forecast_errors(sane)
    lines += markdown(
        (f"predicted change over {HORIZON} epochs", "median error", "mean error", "95th percentile"),
        [
            (name, *(f"{each:.3f}" for each in (np.median(values), values.mean(), np.percentile(values, 95))))
            for name, values in errors.items()
        ],
    )
    lines.append(
        f"\nErrors in % of the chance loss, {errors['no change'].size:,} forecasts from the {len(sane)} trainings."
    )
    rule = ours(**defaults)
    live = [run.bad_by == run.noticed and (run.would_stop or len(run.losses)) == rule(run)[0] for run in runs]
    lines.append(f"\nThe callbacks themselves decided as the replay does in {sum(live)} of {len(live)} trainings.")
    if figure is not None:
        tolerances = [
            outcome(ours(tolerance, options["fraction"], int(options["patience"])), unseen)
            for tolerance in (*GRID["tolerance"], 1e-2, 2e-2)
        ]
        draw({"Koopman, two witnesses (ours)": tolerances, **curves}, chosen, figure)
    return "\n".join(lines)


def _row(name: str, result: Outcome) -> tuple[str, ...]:
    return (
        name,
        f"{result.saved:.1f} %",
        f"{result.least_saved:.0f} %",
        f"{result.lost:.2f} ± {result.doubt:.2f}",
        f"{result.most_lost:.2f}",
        f"{result.loss_excess:.1f} %",
        f"{result.false_stops}",
    )


STARTED = ("start", "trainings", "found bad", "by epoch", "stopped as converged", "falsely", "best accuracy")


def _starts(runs: list[Recorded], rule: Rule) -> Iterator[tuple[Any, ...]]:
    for problem, start in product(PROBLEMS, STARTS):
        part = [run for run in runs if (run.case.problem, run.case.start) == (problem, start)]
        if not part:
            continue
        found = [epoch for run in part if (epoch := run.bad_by)]
        finite = [run.best for run in part if np.isfinite(run.points).any()]
        whole = start != "5he"
        stops = sum(rule(run)[0] < len(run.losses) for run in part) if whole else "–"
        falsely = outcome(rule, part).false_stops if whole else "–"
        accuracies = f"{min(finite, default=np.nan):.1f}–{max(finite, default=np.nan):.1f}"
        yield f"{problem}, {start}", len(part), len(found), max(found, default="–"), stops, falsely, accuracies


def draw(curves: dict[str, list[Outcome]], chosen: Outcome, path: Path) -> None:
    """Draw the accuracy lost against the epochs saved, for all rules."""
    figure = blank(7.2, 4.6)
    axis = figure.subplots()
    colors, markers = (BLUE, ORANGE, GREEN, OLIVE, GREY), "osDv^"
    for (name, curve), color, marker in zip(curves.items(), colors, markers, strict=True):
        points = sorted((result.saved, result.lost) for result in curve)
        axis.plot(*zip(*points, strict=True), f"{marker}-", color=color, markersize=5, linewidth=1.5, label=name)
    axis.plot(chosen.saved, chosen.lost, "*", color=BLUE, markersize=17, label="ours, thresholds from the known half")
    axis.axhline(0.3, color=GREY, linewidth=0.8, linestyle="--")
    axis.text(1, 0.31, "0.3 points", fontsize=8, color=GREY)
    axis.set(xlim=(0, 92), ylim=(0, 1.4), xlabel="epochs saved (%)", ylabel="accuracy lost to the best epoch (points)")
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.98))
    grid(axis)
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
