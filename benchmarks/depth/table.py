"""The paper's full Table 1, the error by depth, and the time of estimates and fits."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from sklearn.svm import SVR

from lightning_koopman import HSVR, estimate_depth
from lightning_koopman.demo.experiments.figures import BLUE, GREY, INK, ORANGE, blank, legend_below, save_figure
from lightning_koopman.demo.experiments.tables import show
from lightning_koopman.demo.table1 import N_FINE, N_SAMPLES, TABLE, Row, largest_error, samples

CLOSE = 0.05  # relative difference from the paper's value
FURTHER = 2  # layers beyond the predicted depth
MANY = 10_000  # samples of the timed fits


def print_table() -> None:
    """Print Table 1 beside the paper's."""
    started = time.perf_counter()
    rows = []
    for row in TABLE:
        x, y = samples(row)
        models = [HSVR(method=method, samples_per_scale=None).fit(x, y) for method in ("fft", "dmd")]
        models += [HSVR(taper=True, samples_per_scale=None).fit(x, y), HSVR().fit(x, y)]
        rows.append((row, 0.01 * np.ptp(y), [(model.n_layers_, largest_error(model, row)) for model in models]))
    spent = time.perf_counter() - started
    print("\nTable 1: ours (the paper's); taper and cells are not in the paper")

    def agree(pairs: list[tuple[float, float]], within: float = CLOSE) -> str:
        return f"{sum(abs(ours / theirs - 1) < within for ours, theirs in pairs)} of {len(pairs)}"

    table = [
        (
            row.name,
            f"{epsilon:.4f} ({row.epsilon})",
            *(f"{a} ({row.fft_layers})", f"{b:.4g} ({row.fft_error})"),
            *(f"{c} ({row.dmd_layers})", f"{d:.4g} ({row.dmd_error})"),
            *(e, f"{f:.4g}", f"{g:.4g}"),
        )
        for row, epsilon, ((a, b), (c, d), (e, f), (_, g)) in rows
    ]
    cells = [f"{agree([(each, row.epsilon) for row, each, _ in rows], 0.02)} within 2 %"]
    for method in range(2):
        layers = [(each[method][0], (row.fft_layers, row.dmd_layers)[method]) for row, _, each in rows]
        errors = [(each[method][1], (row.fft_error, row.dmd_error)[method]) for row, _, each in rows]
        cells += [agree(layers), f"{agree(errors)} within 5 %"]
    ours = ("FFT: layers", "error", "DMD: layers", "error", "taper=True: layers", "error", "in cells: error")
    show(("function", "ε", *ours), [*table, ("agree", *cells, "", "", "")])
    print(f"\nAll four columns of models took {spent:.1f} s.")
    for title, column in (("FFT", 0), ("DMD", 1), ("taper=True", 2)):
        ratios = [each[column][1] / epsilon for _, epsilon, each in rows]
        print(
            f"{title}: {sum(each[column][0] for *_, each in rows)} layers in all; median error {np.median(ratios):.2f} "
            f"ε, largest {max(ratios):.1f} ε"
        )


def draw_depths(target: Path) -> Path:
    """Plot the error by depth and mark the predicted depth: the phase transition."""
    from matplotlib.ticker import MaxNLocator

    figure = blank(11, 8.6)
    early = 0
    for axis, row in zip(figure.subplots(4, 4).flat, TABLE, strict=True):
        x, y = samples(row)
        fine, values = samples(row, N_FINE)
        epsilon, top = 0.01 * np.ptp(y), 0.0
        for method, color, marker in (("fft", BLUE, "o"), ("dmd", ORANGE, "s")):
            predicted = estimate_depth(x[:, 0], y, method).n_layers
            model = HSVR(predicted + FURTHER, method=method, samples_per_scale=None).fit(x, y)
            errors = [float(np.abs(stage - values).max()) / epsilon for stage in model.staged_predict(fine)]
            axis.plot(range(1, len(errors) + 1), errors, marker + "-", color=color, markersize=3.5, linewidth=1.2)
            axis.plot(predicted, errors[predicted - 1], marker, color=color, markersize=9, fillstyle="none")
            top = max(top, *errors)
            early += method == "fft" and predicted > 1 and errors[predicted - 2] < 1.3 * errors[predicted - 1]
        axis.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
        axis.set(yscale="log", ylim=(0.6, max(20, 2 * top)))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(row.name, fontsize=8 if len(row.name) < 40 else 6.5, color=INK)
        axis.tick_params(labelsize=7, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [
        figure.axes[0].plot([], [], style, color=color, markersize=5, label=label)[0]
        for style, color, label in (
            ("o-", BLUE, "scales from the Fourier transform"),
            ("s-", ORANGE, "scales from DMD"),
            ("--", GREY, "ε, the accuracy asked for"),
        )
    ]
    handles += figure.axes[0].plot([], [], "o", color=INK, markersize=9, fillstyle="none", label="predicted depth")
    legend_below(figure, handles, 4, frameon=False)
    figure.supylabel("largest error / ε", fontsize=9, color=INK)
    for axis in figure.axes[-4:]:
        axis.set_xlabel("layers", fontsize=8, color=INK)
    path = save_figure(figure, target / "depth-errors.png", dpi=130)
    print(f"\nOne layer less would have done for {early} of 16 functions (Fourier transform).\n{path}")
    return path


def print_speed() -> None:
    """Print the time of the estimates, and of a fit to many samples beside a plain loop over scikit-learn's SVR."""
    print()
    header = (f"function, {MANY:,} samples", "layers", "loop over SVR, s", "error / ε", "HSVR, s", "error / ε")
    show(header, (_fit_row(row) for row in TABLE if row.fft_layers >= 5))
    for method in ("fft", "dmd"):
        started = time.perf_counter()
        for row in TABLE:
            estimate_depth(*(each.ravel() for each in samples(row)), method)
        spent = (time.perf_counter() - started) / len(TABLE)
        print(f"{method} estimate of {N_SAMPLES} samples: {spent * 1e3:.0f} ms")


def _fit_row(row: Row) -> tuple[object, ...]:
    """Fit one function both ways and return the row."""
    x, y = samples(row, MANY)
    fine, values = samples(row, 2 * MANY - 1)
    epsilon = 0.01 * np.ptp(y)
    started = time.perf_counter()
    model = HSVR().fit(x, y)
    ours = time.perf_counter() - started
    started = time.perf_counter()
    left, total = y.copy(), np.zeros(len(fine))
    for scale in model.scales_:
        layer = SVR(gamma=scale**-2, C=5 * np.ptp(left), epsilon=epsilon).fit(x, left)
        left = left - layer.predict(x)
        total += layer.predict(fine)
    plain = time.perf_counter() - started
    errors = [np.abs(found - values).max() / epsilon for found in (total, model.predict(fine))]
    return row.name, model.n_layers_, f"{plain:.1f}", f"{errors[0]:.2f}", f"{ours:.2f}", f"{errors[1]:.2f}"
