"""The figures, panel by panel: small images that a page can arrange to fit its width."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lightning_koopman.demo.experiments.figures import GREEN, PURPLE, blank
from lightning_koopman.demo.experiments.signals import CHIRP
from lightning_koopman.demo.reproduce.depth import FREQUENCY, PRODUCTS
from lightning_koopman.demo.reproduce.plan import NAMES, NOISES, PRUNED, PRUNINGS, SPECTRA, methods_of
from lightning_koopman.demo.reproduce.results import TEST, TRAIN, Results
from lightning_koopman.demo.table1 import TABLE
from lightning_koopman.plots.style import INK, MUTED, TRAINING, WALK

SIZE = (4.0, 3.1)  # inches of a panel
SHOWN = ("L2", "Sobolev 1", "Sobolev 2", "Sobolev 1, literal")


@dataclass(frozen=True)
class Panel:
    """One image of a figure.

    Attributes:
        name: Name of its file.
        title: Its heading.
        draw: Function that draws it into axes.
        group: Panels of the same group are shown in one row.
        square: Whether its height equals its width.
    """

    name: str
    title: str
    draw: Callable[[Any], None]
    group: str
    square: bool = False

    @cached_property
    def svg(self) -> bytes:
        """The image as SVG, drawn once."""
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            figure = blank(SIZE[0], SIZE[0] if self.square else SIZE[1])
            axis = figure.subplots()
            self.fill(axis)
            target = io.BytesIO()
            figure.savefig(target, format="svg", dpi=130, metadata={"Date": None})
        return target.getvalue()

    def fill(self, axis: Any) -> None:
        """Draw the panel with its heading into axes."""
        self.draw(axis)
        axis.set_title(self.title, fontsize=11, color=INK)
        axis.tick_params(labelsize=9, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)


def panels(results: Results, figure: str) -> list[Panel]:
    """Return the panels of a figure, in reading order."""
    if figure in SPECTRA:
        return list(_spectra(results, figure))
    if figure in PRUNINGS:
        return list(_prunings(results, figure))
    return list(_scales(results) if figure == "4" else _noise(results) if figure == "5" else _table(results))


def _labels(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=10, color=INK)
    axis.set_ylabel(y, fontsize=10, color=INK)


def _spectra(results: Results, figure: str) -> Iterator[Panel]:
    start, plan = SPECTRA[figure], results.plan
    curves = results.curves(start)

    def losses(first: int) -> Callable[[Any], None]:
        def draw(axis: Any) -> None:
            epochs = np.arange(first + 1, len(curves) + 1)
            axis.plot(epochs, curves[first:, TRAIN], color=TRAINING, linewidth=1.4, label="training")
            axis.plot(epochs, curves[first:, TEST], color=WALK, linewidth=1.4, label="test")
            axis.set_yscale("log")
            axis.legend(fontsize=9, framealpha=0.8, edgecolor="none")
            _labels(axis, "epoch", "cross-entropy")

        return draw

    yield Panel(f"{figure}-loss", f"Loss, {NAMES[start]} weights", losses(0), "curves")
    if len(curves) > 60:
        yield Panel(f"{figure}-loss-late", "Loss from epoch 50 onward", losses(50), "curves")
    for observable, epochs in (("loss", plan.loss_epochs), ("weights", plan.weight_epochs)):
        for count in epochs:
            yield Panel(
                f"{figure}-{observable}-{count}",
                f"{'Training loss' if observable == 'loss' else 'Weights'}, {count} epochs",
                _eigenvalues(results.spectrum(observable, start, count)),
                observable,
                square=True,
            )


def _eigenvalues(found: dict[str, Any]) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        from matplotlib.patches import Circle

        axis.add_patch(Circle((0, 0), 1, fill=False, color=MUTED, linewidth=1))
        axis.axhline(0, color=MUTED, linewidth=0.4)
        axis.axvline(0, color=MUTED, linewidth=0.4)
        for kind, color, fill, label in (
            ("walk", WALK, "none", "random walk"),
            ("training", TRAINING, TRAINING, "training"),
        ):
            if f"{kind}_eigenvalues" not in found:
                continue
            values, importance = found[f"{kind}_eigenvalues"], found[f"{kind}_importance"]
            axis.scatter(
                values.real,
                values.imag,
                s=8 + 220 * importance / (importance.max() or 1.0),
                facecolors=fill,
                edgecolors=color,
                linewidths=0.9,
                alpha=0.75,
                label=f"{label}: {float(found[f'{kind}_unit_fraction']):.0%} near 1",
            )
        outside = int((np.abs(found["training_eigenvalues"]) > 1.3).sum())
        axis.set(xlim=(-1.3, 1.3), ylim=(-1.75, 1.3), yticks=[-1, 0, 1], xticks=[-1, 0, 1], aspect="equal")
        legend = axis.legend(fontsize=9, frameon=False, loc="lower center", handletextpad=0.2, borderpad=0)
        for handle in legend.legend_handles:
            handle.set_sizes([30])
        if outside:
            axis.text(-1.25, 1.15, f"{outside} outside the frame", fontsize=9, color=MUTED)
        _labels(axis, "Re λ", "Im λ")

    return draw


def _prunings(results: Results, figure: str) -> Iterator[Panel]:
    algorithm, which = PRUNINGS[figure]
    point = results.plan.prune_at[which]
    end = point + results.plan.further
    styles = {
        f"algorithm {algorithm}": (WALK, "-", f"Koopman, Algorithm {algorithm}"),
        "magnitude": (GREEN, "--", "magnitude"),
        "random": (MUTED, "-", "random mask"),
    }

    def loss(start: str, column: int) -> Callable[[Any], None]:
        def draw(axis: Any) -> None:
            whole = results.curves(start)[:end, column]
            axis.plot(np.arange(1, len(whole) + 1), whole, color=TRAINING, linewidth=1.4, label="unpruned")
            for method in methods_of(figure)[::-1]:
                color, line, label = styles[method]
                curve = results.branch(start, point, method)["curves"][point:, column]
                axis.plot(point + np.arange(1, len(curve) + 1), curve, line, color=color, linewidth=1.4, label=label)
            axis.axvline(point, color=MUTED, linewidth=0.8, linestyle=":")
            axis.set_yscale("log")
            axis.legend(fontsize=9, framealpha=0.8, edgecolor="none")
            _labels(axis, "epoch", "cross-entropy")

        return draw

    for column, name in ((TRAIN, "Training"), (TEST, "Test")):
        for start in PRUNED:
            yield Panel(f"{figure}-{name.lower()}-{start}", f"{name} loss, {NAMES[start]}", loss(start, column), name)


def _scales(results: Results) -> Iterator[Panel]:
    def bell(axis: Any) -> None:
        t = np.linspace(-0.5, 0.5, 400) / FREQUENCY
        axis.plot(t * FREQUENCY, np.cos(2 * np.pi * FREQUENCY * t), color=TRAINING, label="wave, f")
        axis.plot(t * FREQUENCY, np.exp(-((6 * FREQUENCY * t) ** 2)), color=WALK, label="exp(−x²/σ²), σ = 1/(6f)")
        axis.legend(fontsize=9, frameon=False, loc="lower center")
        _labels(axis, "x in periods", "")

    def errors(axis: Any) -> None:
        axis.plot(PRODUCTS, results.scales["errors"], ".-", color=TRAINING)
        axis.axvline(1 / 6, color=WALK, linestyle="--", label="σ f = 1/6")
        axis.set(xscale="log", yscale="log")
        axis.legend(fontsize=9, frameon=False)
        _labels(axis, "σ f", "largest error / ε")

    yield Panel("4-bell", "A wave and its Gaussian", bell, "4")
    yield Panel("4-errors", "One layer on one wave", errors, "4")


def _noise(results: Results) -> Iterator[Panel]:
    x, clean = CHIRP.grid()[:, 0], CHIRP.clean()[:, 0]
    colors = dict(zip(SHOWN, (WALK, TRAINING, GREEN, PURPLE), strict=True))

    def fit(loss: str, noise: float) -> Callable[[Any], None]:
        def draw_fit(axis: Any) -> None:
            points, samples, n_train = CHIRP.draw(noise, 0)
            found = results.noisy(loss, noise, 0)
            axis.plot(
                points[:n_train, 0], samples[:n_train, 0], ".", color=MUTED, alpha=0.4, markersize=2, rasterized=True
            )
            axis.plot(x, found["fit"], color=colors[loss], linewidth=1.2)
            axis.plot(x, clean, color=INK, linewidth=0.8)
            axis.set(xlim=CHIRP.domain[0], ylim=(-3, 6), xticks=[0, 0.5, 1, 1.5, 2])
            axis.text(0.03, 0.95, f"RMSE {found['errors'][-1]:.2f}", transform=axis.transAxes, va="top", fontsize=10)
            _labels(axis, "x", "")

        return draw_fit

    for noise in NOISES:
        for loss in SHOWN:
            name = f"5-{loss}-{noise}".replace(", ", "-").replace(" ", "-")
            yield Panel(name, f"{loss}, noise {noise}", fit(loss, noise), f"noise {noise}")


def _table(results: Results) -> Iterator[Panel]:
    def errors(axis: Any) -> None:
        places = np.arange(len(TABLE))
        for method, color, shift in (("fft", TRAINING, -0.15), ("dmd", WALK, 0.15)):
            ours = results.table[f"{method}_error"] / results.table["epsilon"]
            papers = [getattr(row, f"{method}_error") / row.epsilon for row in TABLE]
            axis.plot(places + shift, ours, "o", color=color, markersize=5, label=f"ours, {method.upper()}")
            axis.plot(places + shift, papers, "_", color=INK, markersize=9)
        axis.plot([], [], "_", color=INK, markersize=9, label="paper's")
        axis.set(yscale="log", xticks=places, xticklabels=places + 1)
        axis.legend(fontsize=9, frameon=False)
        _labels(axis, "row of the table", "error / ε")

    yield Panel("T1-errors", "Errors of the 16 functions", errors, "T1")


def gallery(pictures: dict[str, list[Panel]]) -> dict[str, bytes]:
    """Return up to three PNG images for a page that cannot arrange panels."""
    found = {}
    for name, figure, group in (("spectra", "2", "weights"), ("pruning", "3", "Test"), ("noise", "5", "noise 0.5")):
        chosen = [panel for panel in pictures.get(figure, []) if panel.group == group][:3]
        if chosen:
            found[name] = sheet(chosen)
    return found


def sheet(chosen: Sequence[Panel]) -> bytes:
    """Draw panels side by side in a PNG image."""
    figure = blank(4.2 * len(chosen), 4.2 if chosen[0].square else 3.2)
    for axis, panel in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        panel.fill(axis)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()
