from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from lightning_koopman import (
    KoopmanSpectrumMonitor,
    KoopmanWarning,
    Phase,
    TrainingReading,
    dmd_rrr,
    estimate_depth,
    plot_depth,
    plot_history,
    plot_portrait,
    plot_spectrum,
    plot_steps,
)
from lightning_koopman.callbacks.figures import deliver
from lightning_koopman.plots.style import PHASES

NAMES = ["history", "portrait", "spectrum"]


@pytest.fixture
def spectrum():
    return dmd_rrr(np.random.default_rng(0).standard_normal((20, 30)).cumsum(0))


def test_the_spectrum_is_drawn_by_importance_and_residual(spectrum):
    figure = plot_spectrum(spectrum, spectrum)
    ours, walk, _ = figure.axes
    (points,) = ours.collections
    np.testing.assert_allclose(
        points.get_offsets(), np.stack([spectrum.eigenvalues.real, spectrum.eigenvalues.imag], 1)
    )
    order = np.argsort(spectrum.importance)
    assert np.all(np.diff(points.get_sizes()[order]) >= 0)
    np.testing.assert_allclose(points.get_array(), np.clip(spectrum.residuals, 1e-4, 1))
    assert "random walk" in walk.get_title()
    assert len(plot_spectrum(spectrum).axes) == 2


def test_eigenvalues_outside_the_frame_are_counted():
    figure = plot_spectrum(dmd_rrr(3.0 ** np.arange(6.0)[:, None]))
    assert any("1 outside the frame" in text.get_text() for text in figure.axes[0].texts)


def test_history_copes_with_unknown_values():
    rows = [
        dict.fromkeys(("step_correlation", "step_correlation_error", "slowing", "step_length"), np.nan)
        | {"epoch": e, "train_loss": loss, "phase": "unknown"}
        for e, loss in ((1, np.nan), (2, -1.0))
    ]
    assert plot_history(rows).axes[0].get_yscale() == "linear"
    assert plot_history([{**rows[0], "train_loss": 0.5}]).axes[0].get_yscale() == "log"
    assert plot_portrait(rows).axes[0].texts[0].get_text() == "too few steps"


def test_every_figure_can_be_drawn_into_axes_of_ones_own(spectrum, trainer, regression):
    from matplotlib.figure import Figure

    monitor = KoopmanSpectrumMonitor()
    trainer(callbacks=monitor, max_epochs=8).fit(regression())
    x = np.linspace(0, 1, 101)
    drawings = [
        lambda ax: plot_history(monitor.history, ax=ax),
        lambda ax: plot_portrait(monitor.history, ax=ax),
        lambda ax: plot_spectrum(spectrum, spectrum, monitor.reading, ax=ax),
        lambda ax: plot_steps(monitor.reading, ax=ax),
        lambda ax: plot_depth(estimate_depth(x, x**2), ax=ax),
    ]
    figure = Figure()
    for draw, ax in zip(drawings, figure.subplots(1, 5), strict=True):
        assert draw(ax) is figure
        assert ax.has_data()
        with pytest.raises(TypeError, match="ax must be Axes of matplotlib"):
            draw(figure)
    assert len(figure.axes) == 5


def test_the_phases_are_a_strip_and_a_path(trainer, regression):
    monitor = KoopmanSpectrumMonitor()
    trainer(callbacks=monitor, max_epochs=12).fit(regression())
    top, _ = plot_history(monitor.history).axes
    strip = [patch.get_facecolor() for patch in top.patches]
    assert strip == [to_rgba(PHASES[Phase(row["phase"])]) for row in monitor.history]
    known = [row for row in monitor.history if np.isfinite(row["step_correlation"])]
    _, path = plot_portrait(monitor.history).axes[0].lines
    np.testing.assert_allclose(path.get_ydata(), [row["step_correlation"] for row in known])
    longest = max(row["step_length"] for row in monitor.history)
    np.testing.assert_allclose(path.get_xdata(), [row["step_length"] / longest for row in known])


def test_the_density_is_drawn_beside_the_walk(trainer, regression):
    monitor = KoopmanSpectrumMonitor()
    trainer(callbacks=monitor, max_epochs=12).fit(regression())
    (axis,) = plot_steps(monitor.reading).axes
    np.testing.assert_allclose(axis.lines[1].get_ydata(), monitor.reading.steps.density)
    assert len(plot_spectrum(monitor.spectrum, monitor.surrogate, monitor.reading).axes) == 4
    with pytest.raises(ValueError, match="too few for a density"):
        plot_steps(TrainingReading(Phase.WARMING_UP, ""))


def test_png_files_where_no_logger_takes_figures(root, trainer, regression, tmp_path):
    monitor = KoopmanSpectrumMonitor(log_figure=True)
    trainer(callbacks=monitor, logger=root.loggers.CSVLogger(tmp_path)).fit(regression())
    assert [path.name for path in monitor.figure_paths] == [f"{name}.png" for name in NAMES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in monitor.figure_paths)
    assert (
        monitor.figure_paths[0].parent == monitor.history_path.parent == tmp_path / "lightning_logs/version_0/koopman"
    )


def test_tensorboard_takes_figures(root, trainer, regression, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = root.loggers.TensorBoardLogger(tmp_path)
    monitor = KoopmanSpectrumMonitor(log_figure=3)
    trainer(callbacks=monitor, logger=logger, max_epochs=7).fit(regression())
    logger.experiment.close()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    for name in NAMES:
        assert [event.step for event in events.Images(f"koopman/{name}")] == [12, 24, 28]  # epochs 3 and 6, and the end
    assert len(events.Scalars("koopman/step_correlation")) == 3  # not in the first epochs, where it is unknown
    assert monitor.figure_paths == []


def test_mlflow_takes_figures(root, trainer, regression, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the database store needs more packages
    logger = root.loggers.MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns", artifact_location=str(tmp_path / "a"))
    trainer(callbacks=KoopmanSpectrumMonitor(log_figure=True), logger=logger).fit(regression())
    found = [item.path for item in logger.experiment.list_artifacts(logger.run_id, "koopman")]
    assert sorted(found) == [f"koopman/{name}-step=24.png" for name in NAMES]


def test_wandb_takes_pixels_by_its_logger_interface(spectrum, tmp_path):
    calls = []
    logger = SimpleNamespace(
        experiment=object(), log_image=lambda key, images, step: calls.append((key, images[0].shape, step))
    )
    figure = plot_spectrum(spectrum)
    assert deliver(figure, "koopman/spectrum", [logger], 7, tmp_path) == (None, [])
    width, height = (round(150 * side) for side in figure.get_size_inches())
    assert calls == [("koopman/spectrum", (height, width, 4), 7)]


def test_without_matplotlib_figures_are_an_error_before_training(trainer, regression, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning_koopman\[plots\]'"):
        trainer(callbacks=KoopmanSpectrumMonitor(log_figure=True)).fit(regression())


def test_a_logger_that_fails_warns_and_training_goes_on(trainer, regression, monkeypatch):
    def fail(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr("lightning_koopman.callbacks.monitor.deliver", fail)
    with pytest.warns(KoopmanWarning, match="drawing figures failed.*no network"):
        trainer(callbacks=KoopmanSpectrumMonitor(log_figure=True)).fit(regression())


def test_one_failing_logger_does_not_keep_figures_from_the_others(spectrum, tmp_path):
    def fail(**_):
        raise ConnectionError("no network")

    failing = SimpleNamespace(experiment=object(), log_image=fail)
    taken = []
    working = SimpleNamespace(experiment=object(), log_image=lambda **given: taken.append(given["key"]))
    figure = plot_spectrum(spectrum)
    path, failures = deliver(figure, "k/spectrum", [failing, working], 1, tmp_path)
    assert (path, taken) == (None, ["k/spectrum"])
    assert "ConnectionError: no network" in failures[0]
    path, _ = deliver(figure, "k/spectrum", [failing], 1, tmp_path)
    assert path == tmp_path / "spectrum.png"


def test_figures_are_not_registered_with_pyplot(spectrum):
    plot_spectrum(spectrum)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
