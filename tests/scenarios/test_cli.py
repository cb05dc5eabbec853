from __future__ import annotations

import sys
from importlib import import_module

import pytest
import yaml

from lightning_koopman import EarlyStopOnUnitEigenvalues, KoopmanSpectrumMonitor, RestartOnBadInitialization


@pytest.mark.parametrize("listed", [True, False], ids=["list", "bare"])
def test_lightning_cli_builds_the_monitor_from_yaml(root, regression, tmp_path, monkeypatch, listed):
    monitor = {
        "class_path": "lightning_koopman.KoopmanSpectrumMonitor",
        "init_args": {"observable": "weights", "window": 5, "parameters": ["net.*"], "log_figure": 2, "dirpath": None},
    }
    config = {
        "trainer": {
            "max_epochs": 6,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [monitor] if listed else monitor,
        },
        "model": {"lr": 0.05},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(tmp_path / "config.yaml")])
    cli = import_module(f"{root.__name__}.cli").LightningCLI(regression, save_config_callback=None)
    (built,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, KoopmanSpectrumMonitor)]
    assert isinstance(built, root.Callback)
    assert built.settings.window == 5
    assert built.log_figure == 2
    assert len(built.trajectory) == 5
    assert built.spectrum is not None


def test_lightning_cli_builds_the_stop_and_the_restart(root, regression, tmp_path, monkeypatch):
    arguments = ["fit", "--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.logger=false"]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
    stop = {"horizon": 6, "mode": "report", "dirpath": str(tmp_path)}
    restart = {"check_epoch": 5, "scheme": "orthogonal", "modules": ["*", "!head"], "dirpath": str(tmp_path)}
    callbacks = [
        {"class_path": "lightning_koopman.EarlyStopOnUnitEigenvalues", "init_args": stop},
        {"class_path": "lightning_koopman.RestartOnBadInitialization", "init_args": restart},
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, f"--trainer.callbacks={callbacks}"])
    cli = import_module(f"{root.__name__}.cli").LightningCLI(regression, save_config_callback=None)
    built = {type(callback): callback for callback in cli.trainer.callbacks}
    assert len(built[EarlyStopOnUnitEigenvalues].history) == 2
    assert built[RestartOnBadInitialization].modules == ("*", "!head")


def test_the_config_is_saved_with_the_run(root, regression, tmp_path, monkeypatch):
    """LightningCLI writes the callback's arguments back to YAML, so they must be serializable."""
    arguments = ["fit", "--trainer.callbacks=lightning_koopman.KoopmanSpectrumMonitor", "--trainer.accelerator=cpu"]
    arguments += ["--trainer.callbacks.window=7", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    logger = {"class_path": f"{root.__name__}.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, f"--trainer.logger={logger}"])
    import_module(f"{root.__name__}.cli").LightningCLI(regression)
    (saved,) = tmp_path.rglob("config.yaml")
    text = yaml.safe_load(saved.read_text())["trainer"]["callbacks"]
    text = text[0] if isinstance(text, list) else text
    assert text["init_args"]["window"] == 7
