"""Evidence for the depth estimate and HSVR: ``python -m benchmarks.depth``.

The paper's Table 1 in full, the error by depth, and HSVR with predicted depth against models whose parameters are
searched for, on the table's 16 functions and on two signals from photographs that scikit-learn brings.  Finished
searches are kept in the output folder and not repeated.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
from sklearn.svm import SVR

from benchmarks import depth_peers
from benchmarks.training import run_all
from lightning_koopman import HSVR, estimate_depth
from lightning_koopman.demo.table1 import DOMAIN, N_FINE, N_SAMPLES, TABLE, Array, Row

CLOSE = 0.05  # of the paper's figure
FURTHER = 2  # layers beyond the predicted depth
MANY = 10_000  # samples of the timed fits
INK, BLUE, ORANGE, GREY = "#1b1f24", "#0b6e99", "#c2571a", "#8a929c"


def samples(row: Row, n: int = N_SAMPLES) -> tuple[Array, Array]:
    points = np.linspace(*DOMAIN, n)
    return points[:, None], row.function(points)


def error(model: HSVR, row: Row) -> float:
    """Largest error on the fine grid, which holds the samples and the points between them."""
    points, values = samples(row, N_FINE)
    return float(np.abs(model.predict(points) - values).max())


def print_table() -> None:
    """Table 1 beside the paper's."""
    started = time.perf_counter()
    rows = []
    for row in TABLE:
        x, y = samples(row)
        models = [HSVR(method=method, samples_per_scale=None).fit(x, y) for method in ("fft", "dmd")]
        tapered, thinned = (
            HSVR(taper=True, samples_per_scale=None).fit(x, y),
            HSVR().fit(x, y),
        )
        rows.append((row, 0.01 * np.ptp(y), [(m.n_layers_, error(m, row)) for m in (*models, tapered, thinned)]))
    spent = time.perf_counter() - started
    print("\nTable 1: ours (the paper's); taper and cells are not in the paper")
    print("| function | ε | FFT: layers | error | DMD: layers | error | taper=True: layers | error | in cells: error |")
    print("| --- |" + " ---: |" * 8)
    for row, epsilon, ((a, b), (c, d), (e, f), (_, g)) in rows:
        print(
            f"| {row.name} | {epsilon:.4f} ({row.epsilon}) | {a} ({row.fft_layers}) | {b:.4g} ({row.fft_error}) | "
            f"{c} ({row.dmd_layers}) | {d:.4g} ({row.dmd_error}) | {e} | {f:.4g} | {g:.4g} |"
        )

    def agree(pairs: list[tuple[float, float]], within: float = CLOSE) -> str:
        return f"{sum(abs(ours / theirs - 1) < within for ours, theirs in pairs)} of {len(pairs)}"

    print(f"| agree | {agree([(each, row.epsilon) for row, each, _ in rows], 0.02)} within 2 %", end=" ")
    for method in range(2):
        layers = [(each[method][0], (row.fft_layers, row.dmd_layers)[method]) for row, _, each in rows]
        errors = [(each[method][1], (row.fft_error, row.dmd_error)[method]) for row, _, each in rows]
        print(f"| {agree(layers)} | {agree(errors)} within 5 %", end=" ")
    print(f"| | | |\n\nAll four columns of models took {spent:.1f} s.")
    for title, column in (("FFT", 0), ("DMD", 1), ("taper=True", 2)):
        ratios = [each[column][1] / epsilon for _, epsilon, each in rows]
        print(
            f"{title}: {sum(each[column][0] for *_, each in rows)} layers in all; median error {np.median(ratios):.2f} "
            f"ε, largest {max(ratios):.1f} ε"
        )


def draw_depths(target: Path) -> Path:
    """The error by depth, with the predicted depth marked: the phase transition."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 8.6), layout="constrained")
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
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.supylabel("largest error / ε", fontsize=9, color=INK)
    for axis in figure.axes[-4:]:
        axis.set_xlabel("layers", fontsize=8, color=INK)
    path = target / "depth-errors.png"
    figure.savefig(path, dpi=130)
    print(f"\nOne layer less would have done for {early} of 16 functions (Fourier transform).\n{path}")
    return path


def print_speed() -> None:
    """Time of the estimates, and of a fit to many samples beside a plain loop over scikit-learn's SVR."""
    print(f"\n| function, {MANY:,} samples | layers | loop over SVR, s | error / ε | HSVR, s | error / ε |")
    print("| --- |" + " ---: |" * 5)
    for row in TABLE:
        if row.fft_layers < 5:
            continue
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
        print(f"| {row.name} | {model.n_layers_} | {plain:.1f} | {errors[0]:.2f} | {ours:.2f} | {errors[1]:.2f} |")
    for method in ("fft", "dmd"):
        started = time.perf_counter()
        for row in TABLE:
            estimate_depth(*(each.ravel() for each in samples(row)), method)
        spent = (time.perf_counter() - started) / len(TABLE)
        print(f"{method} estimate of {N_SAMPLES} samples: {spent * 1e3:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.depth", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("depth-runs"), help="folder of the recorded searches")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="searches at a time")
    parser.add_argument("--figures", type=Path, help="where the figure goes (default: the output folder)")
    parser.add_argument("--only", choices=["table", "peers", "speed"], help="one part (default: all)")
    options = parser.parse_args()
    folder = options.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if options.only in (None, "table"):
        print_table()
        draw_depths(options.figures or folder)
    if options.only in (None, "speed"):
        print_speed()
    if options.only in (None, "peers"):
        missing = [case for case in depth_peers.CASES if not (folder / depth_peers.file_name(*case)).exists()]
        run_all(options.jobs, [(" ".join(case), 1, depth_peers.fit, (*case, folder)) for case in missing])
        depth_peers.report(folder)


if __name__ == "__main__":
    main()
