from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lightning_koopman import KoopmanSpectrumMonitor, KoopmanWarning, dmd_rrr, plot_history, plot_spectrum
from lightning_koopman.callbacks.figures import deliver

NAMES = ["spectrum", "history"]


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
        {"epoch": e, "train_loss": loss, "unit_fraction": np.nan, "surrogate_unit_fraction": np.nan}
        for e, loss in ((1, np.nan), (2, -1.0))
    ]
    assert plot_history(rows).axes[0].get_yscale() == "linear"
    assert plot_history([{**rows[0], "train_loss": 0.5}]).axes[0].get_yscale() == "log"


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
    assert len(events.Scalars("koopman/unit_fraction")) == 6  # not for the first epoch, when nothing is known
    assert monitor.figure_paths == []


def test_mlflow_takes_figures(root, trainer, regression, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its database store would need more packages
    logger = root.loggers.MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns", artifact_location=str(tmp_path / "a"))
    trainer(callbacks=KoopmanSpectrumMonitor(log_figure=True), logger=logger).fit(regression())
    found = [item.path for item in logger.experiment.list_artifacts(logger.run_id, "koopman")]
    assert sorted(found) == ["koopman/history-step=24.png", "koopman/spectrum-step=24.png"]


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
