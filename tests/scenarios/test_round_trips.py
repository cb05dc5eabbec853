"""Every argument survives a saved configuration; every callback can be copied at any time."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from importlib import import_module

import pytest
import yaml
from torch import nn

import lightning_koopman
from lightning_koopman import (
    EarlyStopOnUnitEigenvalues,
    KoopmanPruner,
    KoopmanSpectrumMonitor,
    KoopmanWeightAveraging,
    ReduceLROnNoiseFloor,
    RestartOnBadInitialization,
)

CALLBACKS = (
    KoopmanSpectrumMonitor,
    EarlyStopOnUnitEigenvalues,
    RestartOnBadInitialization,
    KoopmanPruner,
    KoopmanWeightAveraging,
    ReduceLROnNoiseFloor,
)
# non-default values; a few arguments exclude one another
VALUES = {
    "observable": ["train_loss"], "parameters": [["net*"], "net*"], "every_n_epochs": [2], "every_n_steps": [3],
    "window": [12, None], "radius": [0.1], "tol": [1e-2], "max_residual": [0.02], "log_figure": [True, 2],
    "storage": ["disk", "sketch"], "dtype": ["bfloat16"], "sketch": [128], "dirpath": ["."], "prefix": ["mine"],
    "fraction": [0.7], "horizon": [7], "tolerance": [1e-2], "patience": [3], "min_epochs": [2], "mode": ["report"],
    "baseline_loss": [1.5], "chance_loss": [1.5], "check_epoch": [4], "max_restarts": [1],
    "scheme": ["he", "xavier", "orthogonal"], "modules": [["net*"], "net*"], "seed": [3], "sparsity": [0.75],
    "threshold": [0.1], "epoch": [3, "settled"], "survivors": ["reinit", "keep"], "structured": [True],
    "scope": ["tensor", "global"], "rounds": [2], "round_epochs": [4], "rule": ["paper"], "settled_change": [0.1],
    "allow_empty": [True], "profile": ["ramp"], "length": [4, [1, 5]], "power": [2.0], "n_batches": [8],
    "restore": ["last"],
    "factor": [0.5], "min_lr": [1e-4], "groups": [[0]],
}  # fmt: skip
BUT = {(KoopmanWeightAveraging, "storage"): ["disk"], (KoopmanWeightAveraging, "window"): [12]}
NEEDS = {"sketch": {"storage": "sketch"}, "scheme": {"survivors": "reinit"}}  # if the callback has the argument


def cases():
    for kind in CALLBACKS:
        for name in inspect.signature(kind).parameters:
            for value in BUT.get((kind, name), VALUES[name]):  # a new argument needs a value here
                yield pytest.param(kind, name, value, id=f"{kind.__name__}-{name}-{value}")


@pytest.mark.parametrize(("kind", "name", "value"), list(cases()))
def test_an_argument_survives_a_saved_configuration(kind, name, value, regression, tmp_path, monkeypatch):
    known = inspect.signature(kind).parameters
    given = {name: value, **{key: needed for key, needed in NEEDS.get(name, {}).items() if key in known}}
    if kind is KoopmanPruner and name not in ("sparsity", "threshold"):
        given["sparsity"] = 0.5
    monkeypatch.chdir(tmp_path)
    cli = import_module("pytorch_lightning.cli").LightningCLI

    def build(callback):
        config = {"trainer": {"callbacks": [callback], "logger": False, "accelerator": "cpu"}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
        return cli(regression, run=False, save_config_callback=None)

    first = build({"class_path": f"lightning_koopman.{kind.__name__}", "init_args": given})
    text = first.parser.dump(first.config, skip_none=False)
    saved = yaml.safe_load(text)["trainer"]["callbacks"][0]["init_args"]
    assert saved[name] == value
    assert set(saved) == set(known)
    again = build({"class_path": f"lightning_koopman.{kind.__name__}", "init_args": saved})
    assert (
        yaml.safe_load(again.parser.dump(again.config, skip_none=False))["trainer"]["callbacks"][0]["init_args"]
        == saved
    )


def test_all_callbacks_are_tried():
    public = [getattr(lightning_koopman, name) for name in lightning_koopman.__all__]
    kinds = {each for each in public if isinstance(each, type) and hasattr(each, "on_train_epoch_end")}
    assert kinds == set(CALLBACKS)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_callbacks_are_copied_before_in_and_after_a_fit(kind, root, trainer, classifier):
    options = {KoopmanPruner: {"sparsity": 0.5, "epoch": 3}, RestartOnBadInitialization: {"check_epoch": 3}}
    callback = kind(**options.get(kind, {}))
    sizes = [len(pickle.dumps(callback))]

    class Copy(root.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.current_epoch in (0, 4):
                sizes.append(len(pickle.dumps(callback)))
                twin = copy.deepcopy(callback)
                assert type(twin) is kind
                assert twin.history == callback.history or trainer.current_epoch

    module = classifier()
    module.network.append(nn.Linear(10, 10))
    trainer(max_epochs=6, limit_val_batches=0, callbacks=[callback, Copy()]).fit(module)
    found = pickle.loads(pickle.dumps(callback))
    copied = copy.deepcopy(callback)
    assert str(found.history) == str(copied.history) == str(callback.history)
    weights = 4 * sum(parameter.numel() for parameter in module.parameters())
    # the stored window, but no copy of the module or its data
    window = 0 if callback.recorder.trajectory is None else callback.settings.window + 3
    assert max(*sizes, len(pickle.dumps(callback))) < 50_000 + window * weights
